"""From a checked command line to a running daemon: directories, fork, lock, log, pid file.

The order is part of the interface: a daemon's parent process reports everything up to the lock of the base directory,
and only that.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace

from sheepdog.daemon.config import SheepConfig
from sheepdog.errors import ConfigError, SheepdogError
from sheepdog_cli import sheep_log

logger = logging.getLogger(__name__)

LOG_NAME = "sheep.log"
OBJECTS_NAME = "obj"


class StartError(Exception):
    """It cannot start; the reason was logged."""


def start(config: SheepConfig, *, foreground: bool) -> int:
    """The exit code of this process: of the daemon in the foreground, else of the start.

    In the background the daemon itself never returns from here, it ends its process.
    """
    early = sheep_log.start_early(config.log, config.port)
    try:
        config = prepare_paths(config)
    except StartError:
        return 1
    if foreground:
        return _run(config, early, None)
    return _daemonise(config, early)


def prepare_paths(config: SheepConfig) -> SheepConfig:
    """The base directory and the disks exist; all paths are absolute.

    :raises StartError: one cannot be made.
    """
    from sheepdog.daemon.storedir import create_directory, parse_path

    path = parse_path(",".join((config.base, *config.disks)))
    try:
        create_directory(path.base)
        create_directory(f"{path.base}/{OBJECTS_NAME}")
        for disk in path.disks:
            create_directory(disk)
    except ConfigError as error:
        _log_lines(error)
        raise StartError from None
    log = config.log
    if log.destination == "default" and log.path is None:
        log = replace(log, path=f"{path.base}/{LOG_NAME}")
    return replace(config, base=path.base, disks=path.disks, log=log)


def _log_lines(error: ConfigError) -> None:
    for line in str(error).splitlines():
        logger.error("%s", line)


def _daemonise(config: SheepConfig, early: logging.Handler) -> int:
    """Two forks; the parent waits until the daemon has the lock or failed to get it."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        os.close(writer)
        status = os.read(reader, 1)
        os.close(reader)
        os.waitpid(child, 0)
        return 0 if status == b"0" else 1
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(0)
    code = 1
    try:
        code = _run(config, early, writer)
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        logger.exception("unexpected end")
    finally:
        logging.shutdown()
        os._exit(code)


def _detach(writer: int) -> None:
    """No terminal, no directory is held; the waiting parent ends with success."""
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    if null > 2:
        os.close(null)
    os.write(writer, b"0")
    os.close(writer)


def _run(config: SheepConfig, early: logging.Handler, writer: int | None) -> int:
    from sheepdog.daemon.storedir import StoreDirectory

    directory = StoreDirectory(config.base)
    try:
        directory.lock()
    except ConfigError as error:
        _log_lines(error)
        return 1
    try:
        log_file = sheep_log.start(config.log, config.port, early)
    except OSError as error:
        log = f"log file {config.log.path}" if config.log.path is not None else "system log"
        logger.error("cannot open the %s (%s)", log, os.strerror(error.errno or 0))
        return 1
    if writer is not None:
        _detach(writer)
    os.chdir(config.base)
    _raise_file_limit()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGHUP, lambda *_: None if log_file is None else log_file.rotate())
    pid_file = PidFile(config.pid_file)
    try:
        return _serve(config, pid_file.write)
    finally:
        pid_file.remove()
        directory.unlock()


def _serve(config: SheepConfig, started: Callable[[], None]) -> int:
    try:
        from sheepdog.daemon.sheep import main

        return main(config, started)
    except SheepdogError as error:
        logger.error("%s", error)
        return error.exit_code
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception:
        logger.exception("unexpected end")
        return 1


class PidFile:
    """The pid file: written when the sheep listens and has asked to join, removed at an orderly end."""

    def __init__(self, path: str | None) -> None:
        """:param path: ``None``: there is none to write."""
        self._path = path
        self._handle = -1

    def write(self) -> None:
        """The file is locked and holds our process id.

        :raises ConfigError: it cannot be written, or another process holds it.
        """
        if self._path is None:
            return
        handle = -1
        try:
            handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.write(handle, b"%d\n" % os.getpid())
        except OSError as error:
            if handle >= 0:
                os.close(handle)
            raise ConfigError(f"failed to pid file '{self._path}' - {os.strerror(error.errno or 0)}") from None
        self._handle = handle

    def remove(self) -> None:
        """Our file is gone; another process's stays."""
        if self._handle < 0 or self._path is None:
            return
        os.close(self._handle)
        self._handle = -1
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            pass  # somebody tidied up before us


def _raise_file_limit() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:
        logger.warning("failed to set nofile to suggested %d, max %d: %s", hard, hard, error)
