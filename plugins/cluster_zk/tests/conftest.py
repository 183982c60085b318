"""Real ZooKeeper servers on free loopback ports."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from sheepdog.testing.cluster_kit import once_is_enough
from sheepdog.testing.services import hang_guard

JAR = "/usr/share/java/zookeeper.jar"
START_TIMEOUT_S = 60.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    once_is_enough(items, Path(__file__).parent)


@pytest.fixture(autouse=True)
def no_hang(request):
    with hang_guard(request.config):
        yield


def missing(reason: str) -> None:
    """Skips on a laptop, fails where the service must be there."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


class Server:
    """One ZooKeeper server process."""

    def __init__(self, directory: Path, port: int, extra: str = "", my_id: int | None = None) -> None:
        self.port = port
        self.address = f"127.0.0.1:{port}"
        self.directory = directory
        data = directory / "data"
        data.mkdir(parents=True)
        if my_id is not None:
            (data / "myid").write_text(str(my_id))
        self.config = directory / "zoo.cfg"
        self.config.write_text(
            f"tickTime=200\nminSessionTimeout=400\nmaxSessionTimeout=20000\ndataDir={data}\n"
            f"clientPort={port}\nclientPortAddress=127.0.0.1\nadmin.enableServer=false\nmaxClientCnxns=0\n"
            f"4lw.commands.whitelist=ruok,srvr\n{extra}"
        )
        self.main = "ZooKeeperServerMain" if my_id is None else "quorum.QuorumPeerMain"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        java = shutil.which("java")
        if java is None or not glob.glob(JAR):
            missing(f"java or {JAR} is not installed (Debian packages: default-jre-headless libzookeeper-java)")
        with open(self.directory / "log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    *(java, "-Xmx128m", "-XX:TieredStopAtLevel=1", "-Dzookeeper.forceSync=no"),
                    *("-cp", JAR, f"org.apache.zookeeper.server.{self.main}", str(self.config)),
                ],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def wait(self) -> None:
        """It serves."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self.serving():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                pytest.fail(f"zookeeper did not start: {(self.directory / 'log').read_text()[-2000:]}")
            time.sleep(0.05)

    def serving(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1) as client:
            client.settimeout(1)
            client.sendall(b"srvr")
            return b"Mode:" in client.recv(4096)
        return False

    def stop(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session")
def zookeeper(tmp_path_factory):
    """A server for the whole run; every test takes a path of its own."""
    server = Server(tmp_path_factory.mktemp("zookeeper"), free_ports(1)[0])
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture
def own_server(tmp_path):
    """A server that the test may stop and restart."""
    server = Server(tmp_path / "zookeeper", free_ports(1)[0])
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture
def ensemble(tmp_path):
    """Three servers that need two for a quorum."""
    ports = free_ports(9)
    peers = "initLimit=50\nsyncLimit=10\n" + "".join(
        f"server.{i + 1}=127.0.0.1:{ports[3 * i + 1]}:{ports[3 * i + 2]}\n" for i in range(3)
    )
    servers = [Server(tmp_path / f"zk{i}", ports[3 * i], peers, i + 1) for i in range(3)]
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.stop()
