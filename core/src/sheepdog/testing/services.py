"""Private ZooKeeper and etcd servers for tests.

Each server has a directory and ports of its own, answers only on 127.0.0.1 and is gone with the ``ExitStack`` that it
was put on. A server that is not installed skips the test with a reason; where CI is set it fails it, because there it
must be installed.
"""

from __future__ import annotations

import faulthandler
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HOST = "127.0.0.1"
START_S = 40.0
HANG_S = 200.0  # longer than the timeout of any test that needs a server
ZOOKEEPER_JARS = ("/usr/share/java/zookeeper.jar",)
# Debian names each library as a jar of its own, and zookeeper.jar lists those it needs in its manifest.


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


def missing_service(reason: str) -> None:
    """The calling test is skipped, or fails where CI is set."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def free_ports(count: int) -> list[int]:
    """Ports that nobody used a moment ago, all different."""
    with ExitStack() as stack:
        ports = []
        for _ in range(count):
            probe = stack.enter_context(socket.socket())
            probe.bind((HOST, 0))
            ports.append(probe.getsockname()[1])
        return ports


def start_server(
    command: Sequence[str], directory: Path, ready: Callable[[], bool], stack: ExitStack
) -> subprocess.Popen[bytes]:
    """The server runs and is ready; it is killed when ``stack`` is closed.

    :raises RuntimeError: it ended, or was not ready in time; the message ends with its log.
    """
    log_path = directory / "server.log"
    log = stack.enter_context(log_path.open("ab"))
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=directory, start_new_session=True
    )

    def end() -> None:
        process.kill()
        process.wait()

    stack.callback(end)
    deadline = time.monotonic() + START_S
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            tail = log_path.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{command[0]} is not ready (exit code {process.poll()}):\n{tail}")
        time.sleep(0.05)
    return process


@dataclass(frozen=True)
class Service:
    """A running server. Tests may stop and continue its process; it is killed in the end, also when stopped."""

    address: str
    process: subprocess.Popen[bytes]


def start_zookeeper(base: Path, stack: ExitStack) -> Service:
    """A ZooKeeper server."""
    java = shutil.which("java")
    jar = next((path for path in ZOOKEEPER_JARS if Path(path).exists()), None)
    if java is None or jar is None:
        missing_service("no ZooKeeper server here (Debian: apt-get install zookeeper)")
    assert java is not None and jar is not None
    directory = base / "zookeeper"
    directory.mkdir(parents=True)
    (port,) = free_ports(1)
    config = directory / "zoo.cfg"
    config.write_text(
        f"dataDir={directory}/data\nclientPort={port}\nclientPortAddress={HOST}\ntickTime=500\n"
        "minSessionTimeout=500\nmaxClientCnxns=0\nadmin.enableServer=false\n4lw.commands.whitelist=ruok\n"
    )

    def ready() -> bool:
        try:
            with socket.create_connection((HOST, port), timeout=1) as stream:
                stream.sendall(b"ruok")
                return stream.recv(4) == b"imok"
        except OSError:
            return False

    command = [java, "-Xmx128m", "-cp", jar, "org.apache.zookeeper.server.ZooKeeperServerMain", str(config)]
    return Service(f"{HOST}:{port}", start_server(command, directory, ready, stack))


def start_etcd(base: Path, stack: ExitStack) -> Service:
    """An etcd server with short leases."""
    etcd = shutil.which("etcd")
    if etcd is None:
        missing_service("no etcd server here (Debian: apt-get install etcd-server)")
    assert etcd is not None
    directory = base / "etcd"
    directory.mkdir(parents=True)
    client, peer = free_ports(2)
    command = [
        etcd,
        *("--name", "test", "--data-dir", str(directory / "data")),
        *("--listen-client-urls", f"http://{HOST}:{client}", "--advertise-client-urls", f"http://{HOST}:{client}"),
        *("--listen-peer-urls", f"http://{HOST}:{peer}", "--initial-advertise-peer-urls", f"http://{HOST}:{peer}"),
        *("--initial-cluster", f"test=http://{HOST}:{peer}"),
        *("--election-timeout", "500", "--heartbeat-interval", "50"),  # leases of one second are possible
    ]

    def ready() -> bool:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{client}/health", timeout=1) as answer:
                return b"true" in answer.read()
        except (OSError, urllib.error.URLError):
            return False

    return Service(f"{HOST}:{client}", start_server(command, directory, ready, stack))


def driver_specs(kind: str, count: int, base: Path, stack: ExitStack) -> list[str]:
    """The ``sheep -c`` argument of each of ``count`` sheep that form one cluster; servers needed are started.

    :param kind: ``zk``, ``zookeeper``, ``etcd`` or ``raft``.
    """
    if kind in ("zk", "zookeeper"):
        return [f"{kind}:{start_zookeeper(base, stack).address}/sheepdog,timeout=2000"] * count
    if kind == "etcd":
        return [f"etcd:{start_etcd(base, stack).address}/sheepdog,ttl=2"] * count
    if kind == "raft":
        # an odd number of voters; where two would lose the quorum with either, there is one
        voters = [f"{HOST}:{port}" for port in free_ports(1 if count < 3 else 3 if count < 5 else 5)]
        spec = f"raft:{','.join(voters)}"
        own = [f",self={voter},dir={base / f'raft{number}'}" for number, voter in enumerate(voters)]
        return [f"{spec}{own[index] if index < len(own) else ''},timeout=2000" for index in range(count)]
    raise ValueError(f"no way is known to run a cluster on driver {kind!r}")
