"""The ``sheep`` command: parses options, becomes a daemon, locks the base directory, opens the log, runs the daemon.

Until the base directory is locked everything is quick and light, because a parent process waits for it; the daemon's
own modules are imported after that.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from sheepdog.daemon.config import (
    JOURNAL_BYTES_MIN,
    LOG_LEVELS,
    POOLS,
    FrontEndConfig,
    IoAddress,
    JournalConfig,
    LogConfig,
    ScrubConfig,
    SheepConfig,
    Throttle,
)
from sheepdog.model.node import VnodeMode
from sheepdog_cli.getopt import POSITIONAL, GetoptError, getopt
from sheepdog_cli.sheep_options import (
    ALL_OPTIONS,
    ARGUMENT_HELP,
    TRY,
    drivers_line,
    help_text,
    installed,
    version_text,
)
from sheepdog_cli.sizes import RATE_MAX, SUFFIX_HINT, parse_decimal, parse_size

DEFAULT_PATH = "/tmp"
LOG_NAME = "sheep.log"
U32_MAX = (1 << 32) - 1
DELAY_MAX_S = 24 * 3600
TIME_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 24 * 3600}


class BadUsage(Exception):
    """The command line is wrong; everything was printed already."""


class Done(Exception):
    """The command line asked for something that was printed; exit 0."""


def _refuse(*lines: str) -> NoReturn:
    for line in lines:
        sys.stderr.write(line + "\n")
    raise BadUsage


def parse(argv: Sequence[str]) -> tuple[SheepConfig, bool]:
    """The configuration and whether to stay in the foreground.

    The paths in it are as given; ``resolve_paths`` makes them absolute.

    :raises BadUsage: said on stderr.
    :raises Done: help or version, said on stdout.
    """
    program = os.path.basename(argv[0])
    options = _Options()
    try:
        for option, text in getopt(program, argv[1:], ALL_OPTIONS):
            if option is POSITIONAL:
                options.paths.append(text)
            else:
                getattr(options, "on_" + option.name.replace("-", "_"))(text)
    except GetoptError as error:
        sys.stderr.write(f"{error}\n")
        hint = "" if error.option is None else ARGUMENT_HELP.get(error.option.name, "")
        if hint:
            sys.stdout.write(hint)
        else:
            sys.stderr.write(TRY + "\n")
        raise BadUsage from None
    return options.config(), options.foreground


class _Options:
    """Collects the options, from left to right; each method checks one."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.foreground = False
        self.bind_address: str | None = None
        self.cluster: str | None = None
        self.flags: set[str] = set()
        self.io_address: IoAddress | None = None
        self.journal: JournalConfig | None = None
        self.log = LogConfig()
        self.log_directory: str | None = None
        self.port = 7000
        self.pid_file: str | None = None
        self.front_ends: list[FrontEndConfig] = []
        self.throttle = Throttle()
        self.recovery_delay_s = 0.0
        self.scrub = ScrubConfig()
        self.vnodes: int | None = None
        self.threads: dict[str, int] = {}
        self.threads_max: int | None = None
        self.my_address: str | None = None
        self.zone: int | None = None
        self.plugins: dict[str, str] = {}

    def config(self) -> SheepConfig:
        path = self.paths[0] if self.paths else DEFAULT_PATH
        base, *disks = path.split(",")
        return SheepConfig(
            base=base,
            disks=tuple(disks),
            cluster=self.cluster or "local",
            store=self.plugins.get("store"),
            redundancy=self.plugins.get("redundancy"),
            transport=self.plugins.get("transport", "tcp"),
            front_ends=tuple(self.front_ends),
            bind_address=self.bind_address,
            port=self.port,
            my_address=self.my_address,
            io_address=self.io_address,
            zone=self.zone,
            vnodes=self.vnodes,
            vnode_mode=VnodeMode.DISK if "disk-vnodes" in self.flags else VnodeMode.NODE,
            gateway="gateway" in self.flags,
            nosync="nosync" in self.flags,
            directio="directio" in self.flags,
            upgrade="upgrade" in self.flags,
            wildcard_recovery="wildcard" in self.flags,
            journal=self.journal,
            recovery_throttle=self.throttle,
            recovery_delay_s=self.recovery_delay_s,
            scrub=self.scrub,
            thread_counts=tuple(self.threads.items()),
            threads_max=self.threads_max,
            pid_file=self.pid_file,
            log=self.log,
        )

    # --- flags ---

    def on_directio(self, _: str) -> None:
        self.flags.add("directio")

    def on_foreground(self, _: str) -> None:
        self.foreground = True

    def on_gateway(self, _: str) -> None:
        self.flags.add("gateway")
        self._check_vnodes()

    def on_nosync(self, _: str) -> None:
        self.flags.add("nosync")

    def on_upgrade(self, _: str) -> None:
        self.flags.add("upgrade")

    def on_disk_vnodes(self, _: str) -> None:
        self.flags.add("disk-vnodes")
        self._check_vnodes()

    def on_wildcard_recovery(self, _: str) -> None:
        self.flags.add("wildcard")

    def on_help(self, _: str) -> None:
        sys.stdout.write(help_text())
        raise Done

    def on_version(self, _: str) -> None:
        sys.stdout.write(version_text(drivers=self.cluster is None, disk_vnodes="disk-vnodes" in self.flags))
        raise Done

    # --- numbers and addresses ---

    def on_port(self, text: str) -> None:
        self.port = self._number(text, 1, 65535, f"Invalid port number '{text}'")

    def on_zone(self, text: str) -> None:
        message = f"Invalid zone id '{text}': must be an integer between 0 and {U32_MAX}"
        self.zone = self._number(text, 0, U32_MAX, message)

    def on_vnodes(self, text: str) -> None:
        message = f"Invalid number of vnodes '{text}': must be an integer between 1 and 65535"
        self.vnodes = self._number(text, 1, 65535, message)
        self._check_vnodes()

    def on_max_dynamic_threads(self, text: str) -> None:
        message = f"Invalid number of threads '{text}': must be an integer between 1 and {U32_MAX}"
        self.threads_max = self._number(text, 1, U32_MAX, message)

    def on_bindaddr(self, text: str) -> None:
        self.bind_address = _literal(text) or _refuse(f"Bad address '{text}'")

    def on_myaddr(self, text: str) -> None:
        self.my_address = _resolve(text) or _refuse(f"Invalid address: '{text}'")

    def on_pidfile(self, text: str) -> None:
        self.pid_file = os.path.abspath(text)

    def _check_vnodes(self) -> None:
        if self.vnodes is None:
            return
        if "gateway" in self.flags:
            _refuse("Options '-g' and '-V' can not be both specified")
        if "disk-vnodes" in self.flags:
            _refuse("Options '--disk-vnodes' and '-V' can not be both specified: the sizes of disks decide")

    @staticmethod
    def _number(text: str, low: int, high: int, message: str) -> int:
        number = parse_decimal(text, low, high)
        if number is None:
            _refuse(message)
        return number

    # --- plugins ---

    def on_cluster(self, text: str) -> None:
        name = text.partition(":")[0]
        if name not in installed("cluster"):
            from sheepdog.plugins import package_for

            sys.stderr.write(f"Invalid cluster driver '{text}'\n")
            sys.stdout.write(f"\nSupported features:\n{drivers_line()}\n")
            if name:
                sys.stdout.write(f"For another one, try: pip install {package_for('cluster', name)}\n")
            raise BadUsage
        self._need("cluster", name)
        self.cluster = text

    def on_store(self, text: str) -> None:
        self._plugin("store", text)

    def on_redundancy(self, text: str) -> None:
        self._plugin("redundancy", text)

    def on_transport(self, text: str) -> None:
        self._plugin("transport", text)

    def on_nbd(self, text: str) -> None:
        self.on_frontend("nbd:" + text)

    def on_http(self, text: str) -> None:
        self.on_frontend("http:" + text)

    def on_frontend(self, text: str) -> None:
        name, _, options = text.partition(":")
        self._need("frontend", name)
        self.front_ends.append(FrontEndConfig(name, options))

    def _plugin(self, kind: str, name: str) -> None:
        self._need(kind, name)
        self.plugins[kind] = name

    @staticmethod
    def _need(kind: str, name: str) -> None:
        from sheepdog.errors import PluginError
        from sheepdog.plugins import require

        try:
            require(kind, name)
        except PluginError as error:
            _refuse(str(error))

    # --- lists ---

    def on_ioaddr(self, text: str) -> None:
        host: str | None = None
        port = 7000
        for key, value, word in _words(text, "host=", "port="):
            if key == "host=":
                host = _literal(value) or _refuse(f"Bad addr: '{value}'")
            elif key == "port=":
                number = _leading(value)
                if number is None or number > 65535:
                    _refuse(f"Bad port '{value}'")
                port = number
            else:
                _refuse(f"invalid option {word}")
        if host is None:
            _refuse("Bad addr: ''")
        self.io_address = IoAddress(host, port)

    def on_journal(self, text: str) -> None:
        size: int | None = None
        directory: str | None = None
        skip = False
        for key, value, word in _words(text, "size=", "dir=", "skip"):
            if key == "size=":
                size = parse_size(value)
                if size is None:
                    _refuse(f"Invalid size '{value}'", SUFFIX_HINT)
                if size < JOURNAL_BYTES_MIN or value.startswith("-"):
                    _refuse(f"invalid size {value}, must be bigger than 64(M)")
            elif key == "dir=":
                directory = os.path.abspath(value)
            elif key == "skip":
                skip = True
            else:
                _refuse(f"invalid option {word}")
        if size is None:
            _refuse("you must specify size for journal")
        self.journal = JournalConfig(size, directory, skip)

    def on_recovery(self, text: str) -> None:
        count = interval = 0
        for key, value, word in _words(text, "max=", "interval="):
            if key == "max=":
                count = _leading(value) or 0
            elif key == "interval=":
                interval = _leading(value) or 0
            else:
                _refuse(f"invalid option {word}")
        self.throttle = Throttle(count, interval)

    def on_recovery_delay(self, text: str) -> None:
        message = f"Invalid recovery delay '{text}': must be an integer between 0 and {DELAY_MAX_S}"
        self.recovery_delay_s = float(self._number(text, 0, DELAY_MAX_S, message))

    def on_scrub(self, text: str) -> None:
        interval, rate = self.scrub.interval_s, self.scrub.rate_bytes
        for key, value, word in _words(text, "interval=", "rate="):
            if key == "interval=":
                unit = TIME_UNITS.get(value[-1:], 0)
                number = parse_decimal(value[:-1] if unit else value, 0, U32_MAX)
                if number is None:
                    _refuse(f"Invalid interval '{value}': must be an integer, with s, m, h or d behind it")
                interval = number * (unit or 1)
            elif key == "rate=":
                message = f"Invalid rate '{value}': must be an integer between 1 and {RATE_MAX} (MB/s)"
                rate = self._number(value, 1, RATE_MAX, message) * 1_000_000
            else:
                _refuse(f"invalid option {word}")
        self.scrub = ScrubConfig(interval, rate)

    def on_wq_threads(self, text: str) -> None:
        for key, value, word in _words(text, *(pool + "=" for pool in POOLS)):
            if not key:
                _refuse(f"invalid option {word}")
            self.threads[key[:-1]] = _leading(value) or 0

    def on_log(self, text: str) -> None:
        level, form, destination, path = self.log.level, self.log.format, self.log.destination, self.log_directory
        for key, value, word in _words(text, "level=", "format=", "dir=", "dst="):
            if key == "level=":
                if value not in LOG_LEVELS:
                    sys.stderr.write(f"Invalid log level '{value}'\n")
                    sys.stdout.write("Available log levels:\n" + "".join(f"\t{name}\n" for name in LOG_LEVELS))
                    raise BadUsage
                level = value
            elif key == "format=":
                if value not in ("default", "server", "json"):
                    _refuse(f"invalid log format: {value}", "valid options are:", "\tdefault", "\tserver", "\tjson")
                form = value
            elif key == "dir=":
                path = _log_directory(value)
            elif key == "dst=":
                if value not in ("default", "stdout", "syslog"):
                    _refuse(f"invalid type of log destination: {value}")
                destination = value
            else:
                _refuse(f"invalid option {word}")
        if path is not None and destination != "default":
            _refuse(f"logdir ({path}) is specified but logging destination is {destination}")
        if destination == "stdout":
            self.foreground = True
        self.log_directory = path
        self.log = LogConfig(level, form, destination, None if path is None else f"{path}/{LOG_NAME}")


def _words(text: str, *keys: str) -> list[tuple[str, str, str]]:
    """(key, value, word) for each word of a list option; the key is empty where none fits."""
    found = []
    for word in filter(None, text.split(",")):  # as strtok: commas too many do no harm
        key = next((key for key in keys if word.startswith(key)), "")
        found.append((key, word[len(key) :], word))
    return found


def _leading(text: str) -> int | None:
    """The number that the text begins with."""
    match = re.match(r"\d+", text, re.ASCII)
    return int(match.group()) if match else None


def _literal(text: str) -> str | None:
    """The text itself if it is an IPv4 or IPv6 address."""
    import socket

    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, text)
        except (OSError, ValueError):
            continue
        return text
    return None


def _resolve(text: str) -> str | None:
    """The address of a host name or literal; IPv4 where there are both."""
    literal = _literal(text)
    if literal is not None or not text:
        return literal
    import socket

    try:
        found = socket.getaddrinfo(text, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return None
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0]) if found else None


def _log_directory(text: str) -> str:
    try:
        path = os.path.realpath(text, strict=True)
    except OSError as error:
        _refuse(os.strerror(error.errno or 0))
    if not os.path.isdir(path):
        _refuse(f"log dir: {path} is not a directory")
    return path


def main() -> None:
    """The console script."""
    try:
        config, foreground = parse(sys.argv)
    except Done:
        sys.exit(0)
    except BadUsage:
        sys.stdout.flush()
        sys.exit(1)
    from sheepdog_cli.sheep_start import start

    sys.exit(start(config, foreground=foreground))


if __name__ == "__main__":
    main()
