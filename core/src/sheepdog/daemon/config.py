"""Everything that was decided on the command line of ``sheep``, checked and in its final form.

A plain value: building it opens nothing and imports no plugin. Names of plugins are still names here; the daemon turns
them into objects once, before its event loop starts.
"""

from __future__ import annotations

from dataclasses import dataclass

from sheepdog.model.node import VnodeMode

DEFAULT_PORT = 7000
# Thread pools of the original, which -w names, and what two of them are called in the log when their size is fixed.
POOLS = ("net", "gway", "io", "peer", "reclaim", "gway_fwd", "remove", "remove_peer", "recovery", "async")
POOLS_RENAMED = {"recovery": "rw", "async": "async_req"}
JOURNAL_BYTES_MIN = 64 << 20


@dataclass(frozen=True, slots=True)
class JournalConfig:
    """The write journal (``-j``)."""

    size_bytes: int  # of both files together, at least JOURNAL_BYTES_MIN
    directory: str | None = None  # absolute; None: the base directory
    skip: bool = False  # do not replay what a crash left

    def __post_init__(self) -> None:
        assert self.size_bytes >= JOURNAL_BYTES_MIN, f"journal of {self.size_bytes} bytes"


@dataclass(frozen=True, slots=True)
class IoAddress:
    """The second listener, for traffic between sheep (``-i``)."""

    host: str  # an IP literal
    port: int = DEFAULT_PORT


@dataclass(frozen=True, slots=True)
class FrontEndConfig:
    """One front end to run: the name of its plugin and the text given for it."""

    name: str
    options: str


@dataclass(frozen=True, slots=True)
class Throttle:
    """After ``max_exec_count`` objects recovery pauses ``interval_ms``. Off while either is 0."""

    max_exec_count: int = 0
    interval_ms: int = 0

    @property
    def active(self) -> bool:
        return self.max_exec_count > 0 and self.interval_ms > 0


@dataclass(frozen=True, slots=True)
class ScrubConfig:
    """When and how fast everything stored is looked at (``--scrub``).

    A week and 32 MB/s: 4 TB take a day and a half, and meanwhile a spinning disk is busy with it for a fifth of its
    time.

    :param interval_s: between the starts of two passes; 0: only when asked to.
    :param rate_bytes: at most so many bytes are read per second.
    """

    interval_s: int = 7 * 24 * 3600
    rate_bytes: int = 32_000_000

    def __post_init__(self) -> None:
        assert self.interval_s >= 0 and self.rate_bytes > 0, f"{self}"


@dataclass(frozen=True, slots=True)
class LogConfig:
    """Where the log goes and how it looks (``-l``). The daemon itself only logs; the command line installs handlers."""

    level: str = "info"  # one of LOG_LEVELS
    format: str = "server"  # server, default or json
    destination: str = "default"  # default (a file), stdout or syslog
    path: str | None = None  # of the log file, None unless destination is default


# The position of a level is its number in GET_LOGLEVEL and SET_LOGLEVEL. LOGGING_LEVELS are the levels of the standard
# library's logging that they stand for; the level in force is that of the root logger.
LOG_LEVELS = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
LOGGING_LEVELS = (60, 55, 50, 40, 30, 25, 20, 10)


@dataclass(frozen=True, slots=True)
class SheepConfig:
    """One sheep.

    :param base: absolute path of the base directory, which exists and is locked by this process.
    :param disks: absolute paths of the object directories; only ``base/obj`` when PATH had one element. They are
        as given on the command line, duplicates included; which of them can be used is for the daemon to find out.
    :param cluster: ``driver`` or ``driver:options``.
    :param bind_address: IP literal to listen on, None for all.
    :param port: TCP port, 1 to 65535.
    :param my_address: address announced to the cluster (an IP literal), None to ask the cluster driver.
    :param zone: failure zone 0 to 2**32 - 1, None for the default made of the address.
    :param vnodes: fixed number of virtual nodes 1 to 65535, None for automatic. Always None for a gateway.
    :param vnode_mode: what vnodes belong to, in the whole cluster.
    :param thread_counts: ``-w``: pool name to count, 0 and absent meaning dynamic.
    :param threads_max: ``-x``: upper bound of dynamic pools, None for no limit.
    :param transport: name of the transport plugin.
    :param redundancy: name of the erasure code plugin that is loaded beside the built-in copies, None for the first
        one installed.
    :param store: name of the store plugin, None for what the cluster was formatted with (``plain`` before that).
    """

    base: str
    disks: tuple[str, ...]
    cluster: str = "local"
    store: str | None = None
    redundancy: str | None = None
    transport: str = "tcp"
    front_ends: tuple[FrontEndConfig, ...] = ()
    bind_address: str | None = None
    port: int = DEFAULT_PORT
    my_address: str | None = None
    io_address: IoAddress | None = None
    zone: int | None = None
    vnodes: int | None = None
    vnode_mode: VnodeMode = VnodeMode.NODE
    gateway: bool = False
    nosync: bool = False
    directio: bool = False
    upgrade: bool = False
    wildcard_recovery: bool = False
    journal: JournalConfig | None = None
    recovery_throttle: Throttle = Throttle()
    scrub: ScrubConfig = ScrubConfig()
    recovery_delay_s: float = 0.0  # wait so long before moving data after a member left
    thread_counts: tuple[tuple[str, int], ...] = ()
    threads_max: int | None = None
    pid_file: str | None = None  # absolute; written and removed by the command line
    log: LogConfig = LogConfig()
    version: str = "1.0.1+py"

    def __post_init__(self) -> None:
        assert not (self.gateway and self.vnodes is not None), "a gateway has no vnodes"
        assert self.vnodes is None or self.vnode_mode is VnodeMode.NODE, "the sizes of disks say how many vnodes"

    @property
    def separate_disks(self) -> bool:
        """Objects live outside the base directory."""
        return self.disks != (f"{self.base}/obj",)
