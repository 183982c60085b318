"""Private ZooKeeper and etcd servers for tests, one or an ensemble, plain or with TLS.

Each server has a directory and ports of its own, answers only on 127.0.0.1 and is gone with the ``ExitStack`` that it
was put on. Its ports are held all that time (see ``hold_ports``), so that nobody else can be found there while it is
stopped: a client that meets another server of the same kind would believe that its session is over. A server that is
not installed skips the test with a reason; where CI is set it fails it, because there it must be installed.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

HOST = "127.0.0.1"
START_S = 60.0
HANG_S = 200.0  # longer than the timeout of any test that needs a server
JARS = Path("/usr/share/java")
# Debian names each library as a jar of its own, and zookeeper.jar lists those it needs in its manifest; except these,
# which the encrypted port wants.
TLS_JARS = ("netty-codec.jar", "netty-resolver.jar", "netty-transport-native-unix-common.jar")


@contextmanager
def hang_guard(config: pytest.Config, limit_s: float = HANG_S) -> Iterator[None]:
    """A test that hangs beyond all its timeouts ends the whole run, with the stacks of all threads on stderr.

    The timeouts are exceptions, thrown once into whatever runs at that moment; an event loop or a library may swallow
    them, and they never come while a library blocks with the interpreter's lock held. This does not depend on either.
    """
    capture: Any = config.pluginmanager.getplugin("capturemanager")  # Any: not part of pytest's typed interface
    with capture.global_and_fixture_disabled() if capture is not None else nullcontext():
        stderr = os.dup(2)
    try:
        faulthandler.dump_traceback_later(limit_s, exit=True, file=stderr)
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        os.close(stderr)


@pytest.fixture(autouse=True)
def no_hang(request: pytest.FixtureRequest) -> Iterator[None]:
    """``hang_guard`` around every test below a ``conftest.py`` that imports this."""
    with hang_guard(request.config):
        yield


def missing_service(reason: str) -> None:
    """The calling test is skipped, or fails where CI is set."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def hold_ports(count: int, stack: ExitStack) -> list[int]:
    """Ports that are ours until ``stack`` is closed.

    On each there is a bound, silent socket: a server that allows the reuse of addresses can listen there, but the
    system gives the port to nobody who wants any, neither to listen nor to connect from.
    """
    ports = []
    for _ in range(count):
        holder = stack.enter_context(socket.socket())
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((HOST, 0))
        ports.append(holder.getsockname()[1])
    return ports


def free_ports(count: int) -> list[int]:
    """Ports that nobody used a moment ago, all different; for who wants to meet nobody there."""
    with ExitStack() as stack:
        return hold_ports(count, stack)


@dataclass(frozen=True)
class Tls:
    """Files of an encrypted server: whom it trusts, its certificate and key."""

    ca: Path
    cert: Path
    key: Path


class Server(ABC):
    """One server process, which a test may stop, start again, pause and resume."""

    def __init__(self, directory: Path, port: int) -> None:
        self.directory = directory
        self.port = port
        self.address = f"{HOST}:{port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.log_path = directory / "server.log"
        directory.mkdir(parents=True)

    @abstractmethod
    def command(self) -> list[str]: ...

    @abstractmethod
    def serving(self) -> bool:
        """It answers clients at this moment."""

    def start(self) -> None:
        """The process runs; it need not serve yet."""
        assert self.process is None, f"{self.address} runs already"
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.directory,
                start_new_session=True,
            )

    def wait(self) -> None:
        """It serves.

        :raises RuntimeError: it ended, or does not serve in time; the message ends with its log.
        """
        assert self.process is not None
        deadline_s = time.monotonic() + START_S
        while not self.serving():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                tail = self.log_path.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{self.address} does not serve (exit code {self.process.poll()}):\n{tail}")
            time.sleep(0.05)

    def stop(self) -> None:
        """Killed, also when paused. Its directory stays."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def pause(self) -> None:
        """It hangs: it accepts what the system accepts for it, and answers nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


class ZookeeperServer(Server):
    """With short ticks and session times from 0.4 to 20 s; with ``tls``, ``address`` is that of the encrypted port."""

    def __init__(
        self, directory: Path, port: int, extra: str = "", number: int | None = None, tls: tuple[Tls, int] | None = None
    ) -> None:
        super().__init__(directory, port)
        data = directory / "data"
        data.mkdir()
        if number is not None:
            (data / "myid").write_text(str(number))
        self._main = "ZooKeeperServerMain" if number is None else "quorum.QuorumPeerMain"
        self._config = directory / "zoo.cfg"
        if tls is not None:
            files, secure_port = tls
            self.address = f"{HOST}:{secure_port}"
            store = directory / "key-and-certificate.pem"
            store.write_text(files.key.read_text() + files.cert.read_text())
            extra += (
                f"secureClientPort={secure_port}\nsecureClientPortAddress={HOST}\n"
                "serverCnxnFactory=org.apache.zookeeper.server.NettyServerCnxnFactory\n"
                f"ssl.keyStore.location={store}\nssl.keyStore.type=PEM\nssl.trustStore.location={files.ca}\n"
                "ssl.trustStore.type=PEM\nssl.clientAuth=need\nssl.hostnameVerification=false\n"
            )
        self._config.write_text(
            f"tickTime=200\nminSessionTimeout=400\nmaxSessionTimeout=20000\ndataDir={data}\n"
            f"clientPort={port}\nclientPortAddress={HOST}\nadmin.enableServer=false\nmaxClientCnxns=0\n"
            f"4lw.commands.whitelist=srvr,dump\n{extra}"
        )

    def command(self) -> list[str]:
        java = shutil.which("java")
        jar = JARS / "zookeeper.jar"
        if java is None or not jar.exists():
            missing_service("no ZooKeeper server here (Debian: apt-get install zookeeper)")
        path = ":".join(map(str, [jar, *(JARS / name for name in TLS_JARS)]))
        return [
            *(str(java), "-Xmx128m", "-XX:TieredStopAtLevel=1", "-Dzookeeper.forceSync=no"),
            *("-cp", path, f"org.apache.zookeeper.server.{self._main}", str(self._config)),
        ]

    def _ask(self, word: bytes) -> bytes:
        """What the server says to one of its four-letter words; nothing while it does not answer."""
        answer = b""
        with suppress(OSError), socket.create_connection((HOST, self.port), 1) as client:
            client.settimeout(1)
            client.sendall(word)
            while data := client.recv(4096):
                answer += data
        return answer

    def serving(self) -> bool:
        return b"Mode:" in self._ask(b"srvr")

    def remembers(self, port: int) -> bool:
        """A session of the sheep with that port stands, be it alive or not."""
        return f" port:{port}\n".encode() in self._ask(b"dump")


class EtcdServer(Server):
    """Leases of one second are possible: etcd wants 1.5 election timeouts at least."""

    def __init__(
        self, directory: Path, port: int, peer_port: int, name: str = "e0", peers: str = "", tls: Tls | None = None
    ) -> None:
        super().__init__(directory, port)
        self._tls = tls
        self._scheme = "http" if tls is None else "https"
        client, peer = f"{self._scheme}://{self.address}", f"http://{HOST}:{peer_port}"
        self._arguments = [
            *("--name", name, "--data-dir", str(directory / "data"), "--unsafe-no-fsync"),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", peers or f"{name}={peer}", "--initial-cluster-token", peers or str(directory)),
            *("--election-timeout", "500", "--heartbeat-interval", "50", "--log-level", "error"),
        ]
        if tls is not None:
            self._arguments += ["--cert-file", str(tls.cert), "--key-file", str(tls.key)]
            self._arguments += ["--trusted-ca-file", str(tls.ca), "--client-cert-auth"]

    def command(self) -> list[str]:
        etcd = shutil.which("etcd")
        if etcd is None:
            missing_service("no etcd server here (Debian: apt-get install etcd-server)")
        return [str(etcd), *self._arguments]

    def serving(self) -> bool:
        context = None
        if self._tls is not None:
            context = ssl.create_default_context(cafile=str(self._tls.ca))
            context.check_hostname = False  # it may be the test that its name is wrong
            context.load_cert_chain(self._tls.cert, self._tls.key)
        url = f"{self._scheme}://{self.address}/health"
        with suppress(OSError, urllib.error.URLError), _open(url, context) as answer:
            return b'"true"' in answer.read()
        return False


def _open(url: str, context: ssl.SSLContext | None) -> IO[bytes]:
    answer: IO[bytes] = urllib.request.urlopen(url, timeout=1, context=context)
    return answer


def _run(servers: Sequence[Server], stack: ExitStack) -> None:
    for server in servers:
        stack.callback(server.stop)
        server.start()
    for server in servers:
        server.wait()


def start_zookeeper(base: Path, stack: ExitStack, *, tls: Tls | None = None) -> ZookeeperServer:
    """A ZooKeeper server."""
    port, secure_port = hold_ports(2, stack)
    server = ZookeeperServer(base / "zookeeper", port, tls=(tls, secure_port) if tls is not None else None)
    _run([server], stack)
    return server


def start_zookeeper_ensemble(base: Path, stack: ExitStack) -> list[ZookeeperServer]:
    """Three servers that need two for a quorum."""
    ports = hold_ports(9, stack)
    peers = "initLimit=50\nsyncLimit=10\n" + "".join(
        f"server.{i + 1}={HOST}:{ports[3 * i + 1]}:{ports[3 * i + 2]}\n" for i in range(3)
    )
    servers = [ZookeeperServer(base / f"zookeeper{i}", ports[3 * i], peers, i + 1) for i in range(3)]
    _run(servers, stack)
    return servers


def start_etcd(base: Path, stack: ExitStack, *, tls: Tls | None = None) -> EtcdServer:
    """An etcd server."""
    port, peer_port = hold_ports(2, stack)
    server = EtcdServer(base / "etcd", port, peer_port, tls=tls)
    _run([server], stack)
    return server


def start_etcd_ensemble(base: Path, stack: ExitStack) -> list[EtcdServer]:
    """Three servers that need two for a quorum."""
    ports = hold_ports(6, stack)
    peers = ",".join(f"e{i}=http://{HOST}:{ports[2 * i + 1]}" for i in range(3))
    servers = [EtcdServer(base / f"etcd{i}", ports[2 * i], ports[2 * i + 1], f"e{i}", peers) for i in range(3)]
    _run(servers, stack)
    return servers


def zookeeper_specs(server: ZookeeperServer, count: int) -> list[str]:
    """The ``sheep -c`` argument of each of ``count`` sheep that form a cluster on ``server``."""
    return [f"zk:{server.address}/sheepdog,timeout=2000"] * count


def raft_specs(count: int, base: Path, stack: ExitStack, *, hosts: Sequence[str] | None = None) -> list[str]:
    """The ``sheep -c`` argument of each of ``count`` sheep that form a cluster without a service.

    There is an odd number of voters; where two would lose the quorum with either, there is one.

    :param hosts: the address of each sheep, when they are in network namespaces.
    """
    base.mkdir(parents=True, exist_ok=True)
    secret = base / "raft-secret"
    secret.write_text("for tests\n")
    ports = hold_ports(1 if count < 3 else 3 if count < 5 else 5, stack)
    voters = [f"{HOST if hosts is None else hosts[index]}:{port}" for index, port in enumerate(ports)]
    own = [*voters, *["none"] * count]
    spec = f"raft:{','.join(voters)},timeout=2000,password-file={secret}"
    return [f"{spec},self={own[index]}" for index in range(count)]


def driver_specs(
    kind: str, count: int, base: Path, stack: ExitStack, *, hosts: Sequence[str] | None = None
) -> list[str]:
    """The ``sheep -c`` argument of each of ``count`` sheep that form one cluster; servers needed are started.

    :param kind: ``zk``, ``zookeeper``, ``etcd`` or ``raft``.
    :param hosts: the address of each sheep, when they are in network namespaces. Servers would not be reached there.
    """
    if hosts is not None and kind != "raft":
        raise ValueError(f"driver {kind!r} needs a server, which sheep in network namespaces do not reach")
    if kind in ("zk", "zookeeper"):
        return zookeeper_specs(start_zookeeper(base, stack), count)
    if kind == "etcd":
        return [f"etcd:{start_etcd(base, stack).address}/sheepdog,ttl=2"] * count
    if kind == "raft":
        return raft_specs(count, base, stack, hosts=hosts)
    raise ValueError(f"no way is known to run a cluster on driver {kind!r}")
