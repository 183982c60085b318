"""Real etcd servers on free loopback ports."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from sheepdog.testing.cluster_kit import once_is_enough
from sheepdog.testing.services import hang_guard

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
    """One etcd process."""

    def __init__(self, directory: Path, port: int, peer_port: int, peers: str = "", name: str = "e0") -> None:
        self.port = port
        self.address = f"127.0.0.1:{port}"
        self.log = directory / "log"
        directory.mkdir(parents=True)
        peer = f"http://127.0.0.1:{peer_port}"
        self.command = [
            *("--name", name, "--data-dir", str(directory / "data"), "--unsafe-no-fsync"),
            *("--listen-client-urls", f"http://{self.address}", "--advertise-client-urls", f"http://{self.address}"),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", peers or f"{name}={peer}", "--initial-cluster-token", str(directory)),
            # a lease is at least 1.5 election timeouts
            *("--election-timeout", "500", "--heartbeat-interval", "50", "--log-level", "error"),
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        etcd = shutil.which("etcd")
        if etcd is None:
            missing("etcd is not installed (Debian package: etcd-server)")
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([etcd, *self.command], stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def wait(self) -> None:
        """It serves."""
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self.serving():
            if self.process.poll() is not None and "unsafe-no-fsync" in self.log.read_text():
                self.command.remove("--unsafe-no-fsync")  # an older etcd
                self.start()
            elif self.process.poll() is not None or time.monotonic() > deadline_s:
                pytest.fail(f"etcd did not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.05)

    def serving(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"http://{self.address}/health", timeout=1) as answer:
            return b'"true"' in answer.read()
        return False

    def stop(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="session")
def etcd(tmp_path_factory):
    """A server for the whole run; every test takes a prefix of its own."""
    server = Server(tmp_path_factory.mktemp("etcd") / "e", *free_ports(2))
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture
def own_server(tmp_path):
    """A server that the test may stop and restart."""
    server = Server(tmp_path / "etcd", *free_ports(2))
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture
def ensemble(tmp_path):
    """Three servers that need two for a quorum."""
    ports = free_ports(6)
    peers = ",".join(f"e{i}=http://127.0.0.1:{ports[2 * i + 1]}" for i in range(3))
    servers = [Server(tmp_path / f"e{i}", ports[2 * i], ports[2 * i + 1], peers, f"e{i}") for i in range(3)]
    for server in servers:
        server.command[server.command.index("--initial-cluster-token") + 1] = "three"
    try:
        for server in servers:
            server.start()
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.stop()
