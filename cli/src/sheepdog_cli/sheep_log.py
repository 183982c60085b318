"""The log of the daemon: three line formats, a file that rotates, the system log, or stderr.

Everything goes through the standard library's root logger, so plugins and libraries end up in the same log. The level
in force is the root logger's. Of libraries, what is meant for debugging them is left out.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from typing import IO

from sheepdog.daemon.config import LOG_LEVELS, LOGGING_LEVELS, LogConfig
from sheepdog.plugins import plugin_packages

ROTATE_BYTES = 500 * 1000 * 1000
MAIN_THREAD_NAME = "main"

_SHOWN = {60: "EMERG", 55: "ALERT", 50: "CRIT", 40: "ERROR", 30: "WARN", 25: "NOTICE", 20: "INFO", 10: "DEBUG"}
_COLORS = {60: "41", 55: "41", 50: "31", 40: "31", 30: "33", 25: "36", 20: "32", 10: "37"}


def _thread(record: logging.LogRecord) -> tuple[str, int]:
    """The name of the thread and its kernel id, 0 for the main one."""
    if record.thread == threading.main_thread().ident:
        return MAIN_THREAD_NAME, 0
    return record.threadName or "thread", threading.get_native_id()


class ServerFormatter(logging.Formatter):
    """``Nov 21 09:14:02   INFO [main] main(311) message``."""

    def __init__(self, *, color: bool = False) -> None:
        super().__init__()
        self._color = color

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%b %e %H:%M:%S", time.localtime(record.created))
        name, tid = _thread(record)
        who = f"{name} {tid}" if tid else name
        level = _SHOWN.get(record.levelno, record.levelname)
        text = f"{when} {level:>6} [{who}] {record.funcName}({record.lineno}) {_message(self, record)}"
        if self._color:
            return f"\033[{_COLORS.get(record.levelno, '0')}m{text}\033[0m"
        return text


class DefaultFormatter(logging.Formatter):
    """The message alone."""

    def format(self, record: logging.LogRecord) -> str:
        return _message(self, record)


class JsonFormatter(logging.Formatter):
    """One JSON object per line, with the keys, their order and the spacing that log readers know."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port

    def format(self, record: logging.LogRecord) -> str:
        name, tid = _thread(record)
        second, fraction = divmod(record.created, 1)
        message = json.dumps(_message(self, record), ensure_ascii=False)
        worker = json.dumps(name, ensure_ascii=False)
        return (
            f'{{ "user_info": {{"program_name": "sheep", "port": {self._port}}},'
            f'"body": {{"second": {int(second)}, "usecond": {int(fraction * 1_000_000)}, '
            f'"worker_name": {worker}, "worker_idx": {tid}, "func": "{record.funcName}", '
            f'"line": {record.lineno}, "msg": {message}}} }}'
        )


class LibraryFilter(logging.Filter):
    """Below INFO only we and the plugins are heard: libraries tell of themselves (kazoo of each heartbeat)."""

    def __init__(self) -> None:
        super().__init__()
        self._heard = {"sheepdog": True, "sheepdog_cli": True}  # package -> whether it is

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.INFO:
            return True
        package = record.name.partition(".")[0]
        heard = self._heard.get(package)
        if heard is None:
            heard = self._heard[package] = package in plugin_packages()
        return heard


def _message(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    text = record.getMessage()
    if record.exc_info:
        text += "\n" + formatter.formatException(record.exc_info)
    return text


class RotatingFile(logging.Handler):
    """Appends to a file, which is renamed with the time and begun anew at ``ROTATE_BYTES`` or when asked to."""

    def __init__(self, path: str) -> None:
        """:raises OSError: the file cannot be opened."""
        super().__init__()
        self._path = path
        self._file: IO[str] = self._open()

    def _open(self) -> IO[str]:
        handle = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        # Line buffering: what was logged before a crash is in the file.
        opened = os.fdopen(handle, "a", buffering=1, encoding="utf-8", errors="backslashreplace")
        faulthandler.enable(opened)
        return opened

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._file.write(self.format(record) + "\n")
            if self._file.tell() >= ROTATE_BYTES:
                self.rotate()
        except Exception:
            self.handleError(record)

    def rotate(self) -> None:
        """The file has another name, and a new one is open."""
        self.acquire()
        try:
            self._file.close()
            try:
                os.rename(self._path, f"{self._path}.{time.strftime('%Y-%m-%d-%H-%M')}")
            finally:
                self._file = self._open()
        finally:
            self.release()

    def close(self) -> None:
        faulthandler.disable()
        self._file.close()
        super().close()


def make_formatter(config: LogConfig, port: int, *, terminal: bool = False) -> logging.Formatter:
    """The formatter of the chosen format."""
    if config.format == "json":
        return JsonFormatter(port)
    if config.format == "default":
        return DefaultFormatter()
    return ServerFormatter(color=terminal)


def start_early(config: LogConfig, port: int) -> logging.Handler:
    """Messages go to stderr, in the chosen format, until the real log is open. Returns the handler to replace."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(make_formatter(config, port, terminal=sys.stderr.isatty()))
    handler.addFilter(LibraryFilter())
    _name_levels()
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(LOGGING_LEVELS[LOG_LEVELS.index(config.level)])
    return handler


def start(config: LogConfig, port: int, early: logging.Handler) -> RotatingFile | None:
    """Messages go where the configuration says. Returns the file handler, if there is one, for rotation.

    :raises OSError: the log file cannot be opened.
    """
    handler: logging.Handler
    if config.destination == "stdout":
        return None  # the early handler is the right one
    if config.destination == "syslog":
        from logging.handlers import SysLogHandler

        class SystemLog(SysLogHandler):
            ident = "sheep: "

            def mapPriority(self, levelName: str) -> str:
                return {"WARN": "warning", "ERROR": "err"}.get(levelName, levelName.lower())

        handler = SystemLog("/dev/log")
    else:
        assert config.path is not None
        handler = RotatingFile(config.path)
    handler.setFormatter(make_formatter(config, port))
    handler.addFilter(LibraryFilter())
    root = logging.getLogger()
    root.addHandler(handler)
    root.removeHandler(early)
    return handler if isinstance(handler, RotatingFile) else None


def _name_levels() -> None:
    for level, shown in _SHOWN.items():
        logging.addLevelName(level, shown)
