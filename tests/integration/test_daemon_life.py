"""The life of the sheep process as scripts see it: the parent's exit code, pid file, log, signals, names of files."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from scenes import MiB

from sheepdog.client.connection import Connection
from sheepdog.client.volume import pack_vdi_variant
from sheepdog.testing.cluster import HOST, reserve_port, run_python, wait_until
from sheepdog.wire.opcodes import Op
from sheepdog.wire.payloads import ClusterRequest, pack_names, unpack_i32
from sheepdog.wire.results import Result

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

LEVELS = "EMERG| ALERT|  CRIT| ERROR|  WARN|NOTICE|  INFO| DEBUG"
LINE = re.compile(rf"[A-Z][a-z]{{2}} [ \d]\d \d\d:\d\d:\d\d ( ?{LEVELS}) \[[^]]+\] \S+\(\d+\) ")


def alive(pid: int) -> bool:
    """The process exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Daemon:
    """A sheep in the background, started as a script starts it."""

    def __init__(self, base: Path, port: int, *options: str) -> None:
        self.base = base
        self.port = port
        self.pid_path = base.parent / "pid"
        self.command = run_python(
            "sheepdog_cli.sheep", "-c", f"local:{base.parent / 'cluster'}", "-b", HOST, "-y", HOST, "-p", str(port),
            "-n", "-P", str(self.pid_path), *options, str(base),
        )  # fmt: skip
        self.pid = 0

    def start(self) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self.command, capture_output=True, timeout=60, check=False)

    def read_pid(self) -> int:
        """The pid file has appeared; what it says."""
        wait_until(lambda: self.pid_path.exists() and self.pid_path.read_text().endswith("\n"), "the pid file")
        self.pid = int(self.pid_path.read_text())
        return self.pid

    def log(self) -> str:
        return (self.base / "sheep.log").read_text()

    def end(self, number: int) -> None:
        """The process got the signal and is gone."""
        os.kill(self.pid, number)
        wait_until(lambda: not alive(self.pid), "the end of the sheep")


@contextmanager
def daemon(tmp_path: Path, *options: str) -> Iterator[Daemon]:
    with reserve_port() as holder:
        one = Daemon(tmp_path / "store", holder.getsockname()[1], *options)
        try:
            yield one
        finally:
            if one.pid and alive(one.pid):
                with suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGKILL)


def test_from_start_to_shutdown(tmp_path: Path) -> None:
    """The parent ends with 0 and says nothing; once the pid file is there both sockets answer; the log has the lines
    and the form that scripts look for; SIGHUP renames it; SIGTERM ends the sheep, removes the pid file and leaves the
    rest."""
    with daemon(tmp_path, "-w", "net=4,recovery=2") as one:
        mask = os.umask(0o022)
        try:
            started = one.start()
        finally:
            os.umask(mask)
        assert (started.returncode, started.stdout, started.stderr) == (0, b"", b"")
        pid = one.read_pid()
        for address in (f"{HOST}:{one.port}", f"unix:{one.base}/sock"):
            with Connection(address) as connection:
                assert connection.request(Op.CLUSTER_INFO, data_length=3).result == Result.BUFFER_SMALL
                assert unpack_i32(connection.request(Op.GET_LOGLEVEL, data_length=4).body) == 6
        assert os.readlink(f"/proc/{pid}/cwd") == str(one.base)
        assert stat.S_IMODE(one.pid_path.stat().st_mode) == 0o600
        modes = {name: stat.S_IMODE((one.base / name).stat().st_mode) for name in ("sheep.log", "lock", "obj", "epoch")}
        assert modes == {"sheep.log": 0o644, "lock": 0o640, "obj": 0o750, "epoch": 0o750}
        wait_until(lambda: "started" in one.log(), "the line about the start")
        lines = one.log().splitlines()
        assert all(LINE.match(line) for line in lines), lines
        for text in (
            "# of threads in net workqueue: 4",
            "gway workqueue is created as dynamic",
            "# of threads in rw workqueue: 2",
            "async workqueue is created as dynamic",
            "sheepdog daemon (version 1.0.1+py) started",
        ):
            assert any(line.endswith(") " + text) for line in lines), text
        assert any(re.search(r"\) .*/obj, vdisk nr \d+, total disk 1$", line) for line in lines)
        os.kill(pid, signal.SIGHUP)
        wait_until(lambda: len(list(one.base.glob("sheep.log.*"))) == 1, "the rotated log")
        assert re.fullmatch(r"sheep\.log\.\d{4}(-\d\d){4}", next(one.base.glob("sheep.log.*")).name)
        one.end(signal.SIGTERM)
        assert one.log().splitlines()[-1].endswith(") shutdown")
        assert not one.pid_path.exists()
        assert {"lock", "obj", "epoch", "sheep.log"} <= {path.name for path in one.base.iterdir()}
        assert (one.base / "lock").stat().st_size == 0


def test_busy_port_in_the_background(tmp_path: Path) -> None:
    """The parent ends with 0, for it waits no longer than for the lock of the directory; the log tells the rest, and no
    pid file appears."""
    with socket.create_server((HOST, 0)) as other:
        one = Daemon(tmp_path / "store", other.getsockname()[1])
        assert one.start().returncode == 0
        wait_until(lambda: "failed to create a listening port" in one.log(), "the reason in the log")
    assert "failed to bind server socket: Address already in use" in one.log()
    wait_until(lambda: unlocked(one.base / "lock"), "the end of the sheep")
    assert not one.pid_path.exists()


def unlocked(path: Path) -> bool:
    """No process holds the lock on the file."""
    with path.open("r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_pid_file_that_cannot_be_written(tmp_path: Path) -> None:
    """Exit 1 in the foreground, the reason in the log, and the store can be used afterwards."""
    with daemon(tmp_path) as one:
        one.command[-1:] = ["-f", "-P", str(tmp_path / "none" / "pid"), str(one.base)]
        assert one.start().returncode == 1
        assert f"failed to pid file '{tmp_path}/none/pid' - No such file or directory" in one.log()
        assert "Traceback" not in one.log()
        assert unlocked(one.base / "lock")


def test_lines_of_operations_and_locks(tmp_path: Path) -> None:
    """Each administrative operation is logged when it arrives and when it ends, with its name, the client, the volume
    and the result; locks and unlocks name the volume. The refusal of a lock tells the volume's number as well."""
    with daemon(tmp_path) as one:
        assert one.start().returncode == 0
        one.read_pid()
        name = pack_names(b"alpha")
        with Connection(f"{HOST}:{one.port}") as connection:
            formatted = connection.request(
                Op.MAKE_FS, variant=ClusterRequest(copies=1, flags=0x0C).pack(), body=b"plain\0"
            )
            assert formatted.result == Result.SUCCESS
            created = connection.request(Op.NEW_VDI, variant=pack_vdi_variant(size=MiB), body=name)
            vid = created.u32(24)
            again = connection.request(Op.NEW_VDI, variant=pack_vdi_variant(size=MiB), body=name)
            assert again.result == Result.VDI_EXIST
            assert connection.request(Op.LOCK_VDI, body=name).result == Result.SUCCESS
            refused = connection.request(Op.LOCK_VDI, body=name)
            assert (refused.result, refused.u32(24), refused.header[32:34]) == (Result.VDI_LOCKED, vid, b"\1\x16")
            assert connection.request(Op.RELEASE_VDI, variant=pack_vdi_variant(base_vid=vid)).result == Result.SUCCESS
        log = one.log()
        client = rf"req=0x[0-9a-f]+, fd=\d+, client={HOST}:\d+, op="
        for text in (
            rf"{client}MAKE_FS, data=plain$",
            rf"{client}MAKE_FS, data=plain, result=00$",
            rf"{client}NEW_VDI, data=alpha$",
            rf"{client}NEW_VDI, data=alpha, result=04$",
            rf"vid={vid:x} is locked by node=.*{one.port}",
            rf"vid={vid:x} is unlocked by node=.*{one.port}",
        ):
            assert re.search(text, log, re.MULTILINE), text
        assert "op=LOCK_VDI" not in log
