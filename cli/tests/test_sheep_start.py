"""From a checked command line to the daemon: directories, lock, pid file, log."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sheepdog.daemon.config import LogConfig, SheepConfig
from sheepdog.errors import ConfigError
from sheepdog_cli import sheep_log, sheep_start


@pytest.fixture
def root_logger() -> Iterator[logging.Logger]:
    """The root logger, put back as it was."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield root
    for handler in list(root.handlers):
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.setLevel(level)


def record(message: str, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("x", level, "file.py", 311, message, (), None, func="main")


def test_paths_are_made(tmp_path: Path) -> None:
    """The last component of every directory is made; paths become absolute; one path means objects in ``obj``."""
    config = sheep_start.prepare_paths(SheepConfig(f"{tmp_path}/n0/", ()))
    listed = sheep_start.prepare_paths(SheepConfig(str(tmp_path / "n1"), (f"{tmp_path}/d1/", f"{tmp_path}/d2")))

    assert (config.base, config.disks) == (f"{tmp_path}/n0", (f"{tmp_path}/n0/obj",))
    assert config.log.path == f"{tmp_path}/n0/sheep.log"
    assert listed.disks == (f"{tmp_path}/d1", f"{tmp_path}/d2")
    assert all((tmp_path / name).is_dir() for name in ("n0/obj", "n1/obj", "d1", "d2"))


def test_missing_parent_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only the last component may be missing."""
    with pytest.raises(sheep_start.StartError):
        sheep_start.prepare_paths(SheepConfig(f"{tmp_path}/a/b", ()))

    assert caplog.messages == [f"cannot create the directory {tmp_path}/a/b (No such file or directory)"]


def test_pid_file(tmp_path: Path) -> None:
    """It holds the decimal process id, mode 0600, and is removed again; one that was not ours stays."""
    path = tmp_path / "pid"
    path.write_text("somebody else's\n")
    sheep_start.PidFile(str(path)).remove()
    assert path.exists()
    pid_file = sheep_start.PidFile(str(path))
    pid_file.write()

    assert path.read_text() == f"{os.getpid()}\n"
    pid_file.remove()
    assert not path.exists()
    pid_file.write()
    assert path.stat().st_mode & 0o777 == 0o600
    pid_file.remove()
    with pytest.raises(ConfigError, match=f"failed to pid file '{tmp_path}/none/pid' - No such file or directory"):
        sheep_start.PidFile(f"{tmp_path}/none/pid").write()


def test_second_sheep_is_refused(tmp_path: Path) -> None:
    """Two sheep never share a base directory: the second ends with two lines on stderr, the daemon's parent, too."""
    from sheepdog.daemon.storedir import StoreDirectory

    base = tmp_path / "n0"
    base.mkdir()
    first = StoreDirectory(str(base))
    first.lock()
    script = "import sys; sys.argv[0] = 'sheep'; from sheepdog_cli.sheep import main; main()"
    try:
        for words in ([str(base)], ["-f", str(base)]):
            command = [sys.executable, "-c", script, "-l", "format=default", *words]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 1
            assert done.stderr == f"another sheep daemon is using {base}\nlocking directory: {base} failed\n"
    finally:
        first.unlock()


def test_server_format() -> None:
    """Date, level in six columns, thread, function and line, message."""
    line = sheep_log.ServerFormatter().format(record("sheepdog daemon started"))

    date, rest = line[:15], line[15:]
    assert re.fullmatch(r"[A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d", date)
    assert rest == "   INFO [main] main(311) sheepdog daemon started"


def test_thread_names() -> None:
    """A line of another thread names it and its kernel id."""
    lines = []

    def log() -> None:
        lines.append(sheep_log.ServerFormatter().format(record("x", logging.ERROR)))

    thread = threading.Thread(target=log, name="net")
    thread.start()
    thread.join()

    assert re.search(r"  ERROR \[net \d+\] main\(311\) x$", lines[0])


def test_default_format() -> None:
    """The message alone."""
    assert sheep_log.DefaultFormatter().format(record("shutdown")) == "shutdown"


def test_json_format() -> None:
    """One object per line with fixed keys, in order; any message keeps the line parseable."""
    line = sheep_log.JsonFormatter(7711).format(record('a "b" \\ \n c'))

    parsed = json.loads(line)
    assert "\n" not in line
    assert line.startswith('{ "user_info": {"program_name": "sheep", "port": 7711},"body": {"second": ')
    assert list(parsed["body"]) == ["second", "usecond", "worker_name", "worker_idx", "func", "line", "msg"]
    assert parsed["body"]["msg"] == 'a "b" \\ \n c'
    assert (parsed["body"]["func"], parsed["body"]["line"]) == ("main", 311)


def test_log_goes_to_the_file_and_rotates(tmp_path: Path, root_logger: logging.Logger) -> None:
    """The early handler gives way to the file; rotation renames it with the time and begins a new one."""
    config = LogConfig(format="default", path=str(tmp_path / "sheep.log"))
    early = sheep_log.start_early(config, 7000)
    handler = sheep_log.start(config, 7000, early)
    assert handler is not None
    root_logger.info("one")
    handler.rotate()
    root_logger.info("two")

    old = [path for path in tmp_path.iterdir() if path.name != "sheep.log"]
    assert early not in root_logger.handlers
    assert (tmp_path / "sheep.log").read_text() == "two\n"
    assert len(old) == 1 and old[0].read_text() == "one\n"
    assert re.fullmatch(r"sheep\.log\.\d{4}-\d\d-\d\d-\d\d-\d\d", old[0].name)


def test_log_rotates_when_it_is_large(
    tmp_path: Path, root_logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file at the limit is set aside by itself."""
    monkeypatch.setattr(sheep_log, "ROTATE_BYTES", 10)
    config = LogConfig(format="default", path=str(tmp_path / "sheep.log"))
    sheep_log.start(config, 7000, sheep_log.start_early(config, 7000))
    root_logger.info("12345678901")

    assert (tmp_path / "sheep.log").read_text() == ""
    assert len(list(tmp_path.iterdir())) == 2


def test_libraries_are_quiet(root_logger: logging.Logger, tmp_path: Path) -> None:
    """At level debug the log has what we and plugins say, and of libraries what is not for their own debugging."""
    config = LogConfig(level="debug", format="default", path=str(tmp_path / "sheep.log"))
    sheep_log.start(config, 7000, sheep_log.start_early(config, 7000))
    for name in ("sheepdog.daemon.peers", "sheepdog_cluster_zk.driver", "kazoo.client", "asyncio"):
        logging.getLogger(name).debug("%s debugs", name)
        logging.getLogger(name).info("%s tells", name)

    assert (tmp_path / "sheep.log").read_text().splitlines() == [
        "sheepdog.daemon.peers debugs",
        "sheepdog.daemon.peers tells",
        "sheepdog_cluster_zk.driver debugs",
        "sheepdog_cluster_zk.driver tells",
        "kazoo.client tells",
        "asyncio tells",
    ]


def test_level(root_logger: logging.Logger, tmp_path: Path) -> None:
    """The chosen level is the root logger's."""
    config = LogConfig(level="err", path=str(tmp_path / "x"))
    sheep_log.start_early(config, 7000)

    assert root_logger.level == logging.ERROR
