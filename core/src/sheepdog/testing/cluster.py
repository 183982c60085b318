"""A cluster of real sheep processes, for integration tests, examples and measurements.

``SheepCluster`` starts as many ``sheep`` as asked, each with a directory, a port and a zone of its own, and knows how
to hurt them: kill, stop, pause, restart. Nothing is assumed about time: whatever is waited for is polled until a
deadline, and a process that ends while it is waited for fails at once with the end of its log.

Ports are reserved by holding a bound socket on each (``SO_REUSEADDR``, not listening): the sheep can listen there,
nobody else is given the number, and a restarted sheep finds its port free.

Cluster driver, store and redundancy are taken from SHEEPDOG_TEST_CLUSTER (local, raft, zk, etcd), SHEEPDOG_TEST_STORE
(plain, tree) and SHEEPDOG_TEST_REDUNDANCY (copies, ec) unless the caller names them; the test matrix sets these. With
SHEEPDOG_TEST_JOURNAL (a size, such as 64M) each sheep has a write journal, unless its options say something about one;
with SHEEPDOG_TEST_DISKS (a number) each has so many directories for its objects, unless the caller names them; with
SHEEPDOG_TEST_SYNC=1 all writes are synchronous.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import TracebackType
from typing import IO

from sheepdog.client import admin
from sheepdog.client.connection import Connection, open_socket
from sheepdog.errors import SheepdogError
from sheepdog.testing.network import Network

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
START_S = 30.0  # a loaded two-core machine needs seconds for a dozen interpreters
POLL_S = 0.05
LOG_TAIL_BYTES = 6000

_SHARD_NAME = re.compile(r"([0-9a-f]{16})(?:_(\d+))?")


class ClusterFailure(AssertionError):
    """The processes did not do what was waited for; the message ends with their logs."""


def run_python(module: str, *arguments: str) -> list[str]:
    """The command that runs one of our command lines with this very interpreter."""
    return [sys.executable, "-m", module, *arguments]


def reserve_port(port: int = 0) -> socket.socket:
    """A bound, silent socket: its port is ours until it is closed, and a sheep can listen on it meanwhile.

    :raises OSError: somebody else has the port.
    """
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        holder.bind((HOST, port))
    except OSError:
        holder.close()
        raise
    return holder


def wait_until(true: Callable[[], bool], what: str, *, timeout_s: float = START_S) -> None:
    """``true()`` returned True before the deadline.

    :raises ClusterFailure: it did not.
    """
    deadline = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > deadline:
            raise ClusterFailure(f"waited {timeout_s:.0f} s for {what}")
        time.sleep(POLL_S)


class Sheep:
    """One sheep of a ``SheepCluster``: its place, and its process while it runs.

    ``disks``: further directories of its PATH; without any the objects are in ``directory``.
    """

    def __init__(
        self,
        index: int,
        directory: Path,
        *,
        zone: int,
        nbd: bool,
        gateway: bool,
        port: int = 0,
        host: str = HOST,
        command: Sequence[str] = (),
    ) -> None:
        """
        :param host: the address that it serves on.
        :param command: what stands in front of its command line.
        """
        self.index = index
        self.directory = directory
        self.disks: tuple[Path, ...] = ()
        self.zone = zone
        self.gateway = gateway
        self.host = host
        self._command = tuple(command)
        self.log_path = directory.with_name(f"{directory.name}.log")
        self.pid_path = directory.with_name(f"{directory.name}.pid")
        self.paused = False
        self.killed = False
        """Ended without a word, and not started since."""
        self._port_holder = reserve_port(port)
        self._nbd_holder = reserve_port() if nbd else None
        self.process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def port(self) -> int:
        """For clients and peers."""
        number: int = self._port_holder.getsockname()[1]
        return number

    @property
    def address(self) -> str:
        """``host:port`` of this gateway."""
        return f"{self.host}:{self.port}"

    @property
    def nbd_port(self) -> int:
        """Of the NBD front end."""
        assert self._nbd_holder is not None, "this cluster was made without nbd=True"
        number: int = self._nbd_holder.getsockname()[1]
        return number

    def nbd_uri(self, volume: str) -> str:
        """What ``qemu-img`` and others take for a volume of this sheep's NBD front end."""
        return f"nbd://{self.host}:{self.nbd_port}/{volume}"

    @property
    def object_directories(self) -> tuple[Path, ...]:
        """Where its objects are, apart from disks that were plugged in later."""
        return self.disks or (self.directory / "obj",)

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, driver: str, options: Sequence[str], *, sync: bool) -> None:
        """The process exists; it need not serve yet. The log is appended to."""
        assert not self.running, f"sheep {self.index} runs already"
        arguments = ["-f", "-c", driver, "-b", self.host, "-y", self.host, "-p", str(self.port), "-z", str(self.zone)]
        arguments += ["-P", str(self.pid_path), "-l", "dst=stdout,level=debug"]
        if not sync:
            arguments.append("-n")
        if self.gateway:
            arguments.append("-g")
        if self._nbd_holder is not None:
            arguments += ["--nbd", f"{self.host}:{self.nbd_port}"]
        self._close_log()
        self._log = self.log_path.open("ab")
        self.process = subprocess.Popen(
            [
                *self._command,
                *run_python("sheepdog_cli.sheep", *arguments, *options),
                ",".join(map(str, (self.directory, *self.disks))),
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=self.directory.parent,
            start_new_session=True,  # Ctrl-C in the terminal is for the program that runs the cluster
        )

    def signal(self, number: int) -> None:
        """The process got the signal, if it runs."""
        if self.running:
            assert self.process is not None
            self.process.send_signal(number)

    def end(self, number: int, *, timeout_s: float = START_S) -> int:
        """The process is gone; returns its exit code (negative: the signal that ended it). Resumed first if paused.

        :raises ClusterFailure: it did not end in time; it was killed then.
        """
        assert self.process is not None
        self.killed = number == signal.SIGKILL
        self.signal(number)
        if self.paused and number != signal.SIGKILL:
            self.signal(signal.SIGCONT)
        self.paused = False
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise ClusterFailure(
                f"sheep {self.index} did not end within {timeout_s:.0f} s of signal {number}\n{self.log_tail()}"
            ) from None
        self._close_log()
        return code

    def release(self) -> None:
        """No process, no port, no open file."""
        if self.running:
            self.end(signal.SIGKILL)
        self._close_log()
        self._port_holder.close()
        if self._nbd_holder is not None:
            self._nbd_holder.close()

    def _close_log(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def log_bytes(self) -> int:
        """How much it has logged."""
        return self.log_path.stat().st_size if self.log_path.exists() else 0

    def log_since(self, position: int) -> bytes:
        """What it logged after ``log_bytes`` gave ``position``."""
        with self.log_path.open("rb") as log:
            log.seek(position)
            return log.read()

    def log_tail(self, size: int = LOG_TAIL_BYTES) -> str:
        """The end of what it logged."""
        if not self.log_path.exists():
            return f"(sheep {self.index} logged nothing)"
        with self.log_path.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - size))
            return f"---- end of the log of sheep {self.index}\n{log.read().decode('utf-8', 'replace')}"


class SheepCluster:
    """Several sheep as processes on this machine. Use it in a ``with`` block: whatever happens, nothing is left.

    :param count: how many sheep; ``gateways`` of them, the last ones, store nothing.
    :param zones: zone of each sheep; 0, 1, 2 ... by default.
    :param driver: ``local``, ``raft``, ``zk``, ``etcd``, or a whole ``sheep -c`` argument containing a colon.
    :param store: store layout that ``format`` asks for.
    :param redundancy: what ``format`` asks for with ``-c``: ``3``, ``2:1``, or ``copies`` and ``ec`` for what fits;
        ``ec`` means copies where there are fewer than three zones.
    :param copies: how many ``copies`` means, at most one for each zone.
    :param nbd: each sheep serves NBD too.
    :param sync: writes are synchronous; tests rarely need that.
    :param options: further words of each sheep's command line.
    :param disks: further directories of each sheep's PATH; as many as SHEEPDOG_TEST_DISKS says by default.
    :param ports: of each sheep, where stored data was made with them; free ones by default.
    :param base: directory for everything; a temporary one that is removed at the end by default.
    :param network: each sheep runs in a network namespace of its own, so that they can be cut off.
    :param start_s: until when all must be members; dozens of them need more time.
    """

    def __init__(
        self,
        count: int = 3,
        *,
        gateways: int = 0,
        zones: Sequence[int] | None = None,
        driver: str | None = None,
        store: str | None = None,
        redundancy: str | None = None,
        copies: int = 3,
        nbd: bool = False,
        sync: bool = False,
        options: Sequence[str] = (),
        disks: Sequence[Sequence[Path]] | None = None,
        ports: Sequence[int] = (),
        base: Path | None = None,
        network: Network | None = None,
        start_s: float = START_S,
    ) -> None:
        """:raises OSError: somebody else has one of ``ports``."""
        self.driver = driver or os.environ.get("SHEEPDOG_TEST_CLUSTER", "local")
        self.store = store or os.environ.get("SHEEPDOG_TEST_STORE", "plain")
        storing = len(set((zones or range(count))[: count - gateways]))
        self.redundancy = redundancy or os.environ.get("SHEEPDOG_TEST_REDUNDANCY", "copies")
        if self.redundancy == "copies" or (self.redundancy == "ec" and storing < 3):
            self.redundancy = str(max(1, min(copies, storing)))
        elif self.redundancy == "ec":
            self.redundancy = "2:1" if storing < 6 else "4:2"
        self.options = tuple(options)
        journal = os.environ.get("SHEEPDOG_TEST_JOURNAL")
        if journal and "-j" not in self.options:
            self.options += ("-j", f"size={journal}")
        self.network = network
        self.start_s = start_s
        self.sync = sync or os.environ.get("SHEEPDOG_TEST_SYNC") == "1"
        self._owns_base = base is None
        self.base = Path(tempfile.mkdtemp(prefix="sheep-")) if base is None else base
        self.base.mkdir(parents=True, exist_ok=True)
        self._services = ExitStack()
        self._specs: list[str] = []
        self._remembered: Callable[[int], bool] | None = None
        self.sheep: list[Sheep] = []
        try:
            for index in range(count):
                zone = index if zones is None else zones[index]
                directory = self.base / f"sheep{index}"
                port = ports[index] if ports else 0
                host, command = (HOST, ()) if network is None else (network.host(index), network.command(index))
                gateway = index >= count - gateways
                self.sheep.append(
                    Sheep(index, directory, zone=zone, nbd=nbd, gateway=gateway, port=port, host=host, command=command)
                )
            if disks is None:
                names = [f"disk{number}" for number in range(int(os.environ.get("SHEEPDOG_TEST_DISKS", "0")))]
                disks = [[sheep.directory / name for name in names] for sheep in self.sheep[: count - gateways]]
            for sheep, places in zip(self.sheep, disks, strict=False):
                sheep.disks = tuple(places)
            self._specs = self._make_specs()
        except BaseException:
            self.close()
            raise

    # ---- life

    def _make_specs(self) -> list[str]:
        count = len(self.sheep)
        if ":" in self.driver:
            return [self.driver] * count
        if self.driver == "local":
            return [f"local:{self.base / 'cluster'}"] * count
        try:
            from sheepdog.testing import services  # needs pytest, which a script that uses this class need not have
        except ModuleNotFoundError as error:
            raise ClusterFailure(
                f"driver {self.driver!r} needs the test tools here ({error}); try: pip install 'sheepdog-core[testing]'"
            ) from None

        # Not in ``base``, which may be on a small disk: etcd sets 64 MiB aside at its start.
        base = Path(self._services.enter_context(tempfile.TemporaryDirectory(prefix="sheep-services-")))
        if self.driver in ("zk", "zookeeper"):
            server = services.start_zookeeper(base, self._services)
            self._remembered = server.remembers
            return services.zookeeper_specs(server, count)
        hosts = None if self.network is None else [sheep.host for sheep in self.sheep]
        return services.driver_specs(self.driver, count, base, self._services, hosts=hosts)

    def __enter__(self) -> SheepCluster:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, ClusterFailure):
            # tests show logs through the pytest plugin; scripts see at least where to look
            error.add_note(f"sheep logs were in {self.base}")
        self.close()

    def start(self) -> None:
        """All sheep are members of one cluster and answer.

        :raises ClusterFailure: one ended or did not answer in time.
        """
        for sheep in self.sheep:
            self._start(sheep)
        self.wait_members(timeout_s=self.start_s)

    def _start(self, sheep: Sheep) -> None:
        if self._remembered is not None and sheep.killed:
            # With this driver a sheep that comes back too early ends with a message, and is to be started once more.
            remembered = self._remembered
            wait_until(lambda: not remembered(sheep.port), f"the old session of sheep {sheep.index} to end")
        sheep.killed = False
        options = self.options
        if self.network is not None and self.network.second:
            options += ("-i", f"host={self.network.second_host(sheep.index)},port={sheep.port}")
        sheep.start(self._specs[sheep.index], options, sync=self.sync)

    def close(self) -> None:
        """No process, no port and no temporary file is left. Repeating it is harmless."""
        for sheep in self.sheep:
            sheep.release()
        self._services.close()
        if self._owns_base:
            shutil.rmtree(self.base, ignore_errors=True)

    # ---- what the redundancy means

    @property
    def shards(self) -> int:
        """How many files hold an object of a volume with the cluster's redundancy: its copies, or its strips.

        As many holders has its inode, which is always a copy.
        """
        data, _, parity = self.redundancy.partition(":")
        return int(data) + int(parity or 0)

    @property
    def needed(self) -> int:
        """How many of these files are enough to read the object."""
        data, _, parity = self.redundancy.partition(":")
        return int(data) if parity else 1

    @property
    def fewest(self) -> int:
        """How many sheep must run for volumes to be read and written; Raft needs most of its voters besides."""
        voters = 1 if len(self.sheep) < 3 or self.driver != "raft" else 3 if len(self.sheep) < 5 else 5
        return max(self.needed, voters // 2 + 1)

    # ---- doing

    def format(self, *arguments: str) -> None:
        """``dog cluster format`` with the store and the redundancy of this cluster, and what else is given."""
        self.dog("cluster", "format", "-b", self.store, "-c", self.redundancy, *arguments)

    def dog(
        self,
        *arguments: str,
        node: int | None = None,
        check: bool = True,
        input: bytes | None = None,  # noqa: A002  the name that subprocess.run has for it
        timeout_s: float = 120.0,
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs ``dog`` against one sheep.

        :param node: index of the sheep to talk to; the first running one by default.
        :param check: a non-zero exit code raises ``ClusterFailure`` with what dog printed.
        """
        gateway = self.sheep[node] if node is not None else self.live[0]
        environment = {**os.environ, "SHEEPDOG_DOG_ADDR": gateway.host, "SHEEPDOG_DOG_PORT": str(gateway.port)}
        command = [] if self.network is None else self.network.command(gateway.index)
        done = subprocess.run(
            [*command, *run_python("sheepdog_cli.dog", *arguments)],
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            env=environment,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode != 0:
            raise ClusterFailure(
                f"dog {' '.join(arguments)} ended with {done.returncode}\n"
                f"stdout: {done.stdout.decode(errors='replace')}\nstderr: {done.stderr.decode(errors='replace')}\n"
                f"{gateway.log_tail(2000)}"
            )
        return done

    def address(self, index: int = 0) -> str:
        """``host:port`` of one gateway."""
        return self.sheep[index].address

    def connect(self, index: int = 0, *, timeout_s: float | None = 10.0) -> Connection:
        """A client connection to one sheep, for protocol-level tests."""

        def open_with_timeout(address: str) -> socket.socket:
            with nullcontext() if self.network is None else self.network.beside(index):
                stream = open_socket(address)
            stream.settimeout(timeout_s)
            return stream

        return Connection(self.sheep[index].address, connect=open_with_timeout)

    # ---- hurting

    def kill(self, index: int) -> None:
        """``kill -9``: the sheep is gone without a word."""
        self.sheep[index].end(signal.SIGKILL)

    def stop(self, index: int) -> int:
        """SIGTERM: the sheep left in order; returns its exit code."""
        return self.sheep[index].end(signal.SIGTERM)

    def pause(self, index: int) -> None:
        """SIGSTOP: the sheep is there and does nothing."""
        self.sheep[index].signal(signal.SIGSTOP)
        self.sheep[index].paused = True

    def resume(self, index: int) -> None:
        """SIGCONT."""
        self.sheep[index].signal(signal.SIGCONT)
        self.sheep[index].paused = False

    def restart(self, index: int, *, wait: bool = True) -> None:
        """The sheep runs again on its directory and port. With ``wait`` all that run are members again."""
        sheep = self.sheep[index]
        if sheep.running:
            sheep.end(signal.SIGTERM)
        deadline = time.monotonic() + START_S
        while self._refused_for_its_former_session(sheep, deadline):
            logger.debug("sheep %d came back before its former session had ended", sheep.index)
        if wait:
            self.wait_members()

    def _refused_for_its_former_session(self, sheep: Sheep, deadline: float) -> bool:
        """Starts the sheep; True when ZooKeeper's driver did not let it in because its former session still lives.

        The sheep ends with an error then, as the original does, and is for its service manager to start again.
        """
        before = sheep.log_bytes()
        self._start(sheep)
        if self.driver not in ("zk", "zookeeper"):
            return False
        while sheep.running and time.monotonic() < deadline:
            if any(words in sheep.log_since(before) for words in (b"joined: epoch=", b"is the first member")):
                return False
            time.sleep(POLL_S)
        return time.monotonic() < deadline and b"Previous zookeeper session exist" in sheep.log_since(before)

    # ---- looking and waiting

    @property
    def live(self) -> list[Sheep]:
        """The sheep that run and are not paused."""
        return [sheep for sheep in self.sheep if sheep.running and not sheep.paused]

    def epoch(self, index: int) -> int:
        """The epoch of one sheep, 0 before the cluster is formatted."""
        with self.connect(index) as connection:
            return admin.current_epoch(connection.request)

    def members(self, index: int) -> set[int]:
        """The ports of the members that one sheep sees."""
        with self.connect(index) as connection:
            return {node.id.port for node in admin.node_list(connection.request)}

    def wait_members(self, *, timeout_s: float = START_S) -> None:
        """Every live sheep sees exactly the live ones, in one and the same epoch.

        :raises ClusterFailure: not in time, or one of them ended.
        """
        wanted = {sheep.port for sheep in self.live}
        watched = self.live

        def agreed() -> bool:
            try:
                return (
                    all(self.members(sheep.index) == wanted for sheep in watched)
                    and len({self.epoch(sheep.index) for sheep in watched}) == 1
                )
            except (SheepdogError, OSError):
                return False

        self._wait(agreed, f"{len(wanted)} members that agree", watched, timeout_s)

    def wait_recovered(self, *, timeout_s: float = 60.0) -> None:
        """Every live sheep sees the live ones and has nothing left to recover."""
        self.wait_members(timeout_s=timeout_s)
        watched = self.live

        def idle(sheep: Sheep) -> bool:
            with self.connect(sheep.index) as connection:
                answer = connection.request(admin.OP_STAT_RECOVERY, data_length=24)
                if answer.result != 0:
                    return False
                return not admin.unpack_recovery_state(answer.body).in_recovery

        def all_idle() -> bool:
            try:
                return all(idle(sheep) for sheep in watched)
            except (SheepdogError, OSError):
                return False

        self._wait(all_idle, "recovery to end", watched, timeout_s)

    def _wait(self, true: Callable[[], bool], what: str, watched: Iterable[Sheep], timeout_s: float) -> None:
        def stop_early() -> bool:
            for sheep in watched:
                if not sheep.running:
                    code = sheep.process.returncode if sheep.process is not None else None
                    raise ClusterFailure(
                        f"sheep {sheep.index} ended with {code} while waiting for {what}\n{sheep.log_tail()}"
                    )
            return true()

        try:
            wait_until(stop_early, what, timeout_s=timeout_s)
        except ClusterFailure as failure:
            if "ended with" in str(failure):
                raise
            raise ClusterFailure(f"{failure}\n{self.logs()}") from None

    def census(self) -> dict[tuple[int, int], list[int]]:
        """Which sheep have which shard on disk: (oid, strip or -1) -> indexes of sheep. Looks at files, not at answers.

        Stale copies, temporary files and dead sheep's disks: only the last of these are counted.
        """
        found: dict[tuple[int, int], list[int]] = {}
        for sheep in self.sheep:
            for path in sorted(path for place in sheep.object_directories for path in place.rglob("*")):
                match = _SHARD_NAME.fullmatch(path.name)
                if match is not None and ".stale" not in path.parts and path.is_file():
                    key = (int(match[1], 16), int(match[2]) if match[2] is not None else -1)
                    found.setdefault(key, []).append(sheep.index)
        return found

    def logs(self) -> str:
        """The ends of all logs."""
        return "\n".join(sheep.log_tail() for sheep in self.sheep)
