"""The base directory of a sheep: PATH on the command line, the lock, config and epoch files, the preferred store.

Everything here is synchronous and durable when it returns: a file is written under another name, flushed, renamed, and
the directory is flushed too. Layouts: docs/on-disk.md, sections 1, 4 and 5.

What stops a start is a ``ConfigError``. Its message may have several lines, each of which is a line of the log.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from sheepdog.errors import ConfigError, ProtocolError
from sheepdog.model.clusterinfo import ClusterFlag, DiskConfig, mode_of_flags, pack_store_name, unpack_store_name
from sheepdog.model.epochs import EpochRecord, epoch_file_name, parse_epoch_file_name
from sheepdog.model.node import NodeId, VnodeMode

logger = logging.getLogger(__name__)

DIRECTORY_MODE = 0o770
FILE_MODE = 0o660
DEFAULT_PATH = "/tmp"

NO_DISK = "There isn't any available disk!"
VNODE_STRATEGY_DIFFERS = "Designation of before a restart and a vnodes option is different."
DISK_MODE_DIFFERS = "This sheep can't run because exists data format mismatch"
CREATE_CLUSTER_FAILED = "failed to create sheepdog cluster"
UPGRADE_HINT = "use '-u' option to upgrade sheep store"
UPGRADE_OFF_LINE = "a sheep converts no layout itself; for files of older releases there is 'dog upgrade'"

_TEMPORARY = ".tmp"
_NODE_CONFIG_BYTES = 16


@dataclass(frozen=True, slots=True)
class StorePath:
    """PATH in its parts. All are absolute and without trailing slashes.

    :param base: where config, epochs, lock, socket and log are.
    :param disks: object directories in the order given; ``base/obj`` alone when PATH had one element.
    :param listed: disks were given; ``base/obj`` exists then too but holds nothing.
    """

    base: str
    disks: tuple[str, ...]
    listed: bool


def parse_path(argument: str = DEFAULT_PATH) -> StorePath:
    """``BASE`` or ``BASE,DISK,...`` taken apart. Looks at no file, except to resolve symbolic links of BASE.

    Disks are made absolute but keep their symbolic links, because objects are placed by the path as it was given.
    """
    first, *rest = argument.split(",")
    base = os.path.realpath(first or DEFAULT_PATH)
    disks = tuple(os.path.abspath(path) for path in rest if path)
    return StorePath(base, disks or (os.path.join(base, "obj"),), listed=bool(disks))


def create_directory(path: str) -> None:
    """The directory exists. Made if only its last component was missing.

    :raises ConfigError: anything else is missing or in the way.
    """
    try:
        os.mkdir(path, DIRECTORY_MODE)
    except OSError as error:
        if error.errno == errno.EEXIST and os.path.isdir(path):
            return
        raise ConfigError(f"cannot create the directory {path} ({os.strerror(error.errno or 0)})") from error


def is_base(path: str) -> bool:
    """The directory is some sheep's base: it holds config and epochs."""
    return os.path.exists(os.path.join(path, "config")) and os.path.exists(os.path.join(path, "epoch"))


def usable_disks(disks: Sequence[str], base: str) -> tuple[str, ...]:
    """The object directories that exist now, in the order given; the others were logged and dropped.

    A directory named twice counts once. Whether a disk can hold attributes is for the store to find out.

    :raises ConfigError: one is a sheep's base directory, or none is left.
    """
    real_base = os.path.realpath(base)
    kept: dict[str, str] = {}  # by real path
    for path in disks:
        real = os.path.realpath(path)
        if real in kept:
            logger.error("duplicate path %s", path)
            continue
        if real == real_base or is_base(path):
            raise ConfigError(f"{path} is meta-store, abort")
        try:
            create_directory(path)
        except ConfigError as error:
            logger.error("%s", error)
            continue
        kept[real] = path
    if not kept:
        raise ConfigError(NO_DISK)
    return tuple(kept.values())


def same_device(base: str, disks: Iterable[str]) -> bool:
    """All these directories exist, and are on the file system of ``base``."""
    try:
        device = os.stat(base).st_dev
        return all(os.stat(path).st_dev == device for path in disks)
    except OSError:
        return False


class StoreDirectory:
    """One sheep's base directory, which exists."""

    def __init__(self, base: str, mode: VnodeMode = VnodeMode.NODE) -> None:
        """
        :param base: absolute path; see ``parse_path`` and ``create_directory``.
        :param mode: what vnodes belong to: the layout of epoch files.
        """
        self.base = base
        self._mode = mode
        self._epochs = os.path.join(base, "epoch")
        self._config = os.path.join(base, "config")
        self._node_config = os.path.join(base, "node_config")
        self._lock_fd = -1
        self._numbers = itertools.count()
        self._config_lock = threading.Lock()  # held while the config file is replaced
        self.config_follows: Callable[[os.stat_result], None] = _nothing
        """Called before the config file is replaced, with the status of the new one."""
        self.config_written: Callable[[], None] = _nothing
        """Called whenever the config file has been replaced."""

    # ---- the lock

    def lock(self) -> None:
        """This process alone uses the directory until ``unlock`` or its end. Not inherited by a fork.

        :raises ConfigError: another process has it, or the file cannot be made.
        """
        assert self._lock_fd < 0, f"{self.base} is locked by us already"
        path = os.path.join(self.base, "lock")
        failed = f"locking directory: {self.base} failed"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT, FILE_MODE)
        except OSError as error:
            raise ConfigError(f"failed to open lock file {path} ({error.strerror})\n{failed}") from error
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise ConfigError(f"another sheep daemon is using {self.base}\n{failed}") from error
            raise ConfigError(f"unable to get lock {path} ({error.strerror})\n{failed}") from error
        self._lock_fd = fd

    def unlock(self) -> None:
        """Others may use the directory. The file stays. Harmless without the lock."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def prepare(self) -> None:
        """The sub-directories exist, and what an interrupted write left is gone.

        :raises ConfigError: they cannot be made.
        """
        for name in ("epoch", "obj"):
            create_directory(os.path.join(self.base, name))
        for directory in (self.base, self._epochs):
            for name in os.listdir(directory):
                if name.endswith(_TEMPORARY):
                    with suppress(OSError):
                        os.unlink(os.path.join(directory, name))

    # ---- config

    def read_config(self, *, upgrade: bool = False) -> DiskConfig | None:
        """The config file; ``None`` before the first format.

        :param upgrade: ``-u`` was given, so it is not what to advise.
        :raises ConfigError: unreadable, or of another format version.
        """
        raw = self._read(self._config)
        if not raw:
            return None  # the original, too, takes an empty file for none
        try:
            return DiskConfig.unpack(raw)
        except ConfigError as error:
            if "not compatible" in str(error):
                raise ConfigError(f"{error}\n{UPGRADE_OFF_LINE if upgrade else UPGRADE_HINT}") from error
            raise

    def write_config(self, config: DiskConfig) -> None:
        """The config file holds ``config``."""
        with self._config_lock:
            self._write(self._config, config.pack(), follows=self.config_follows)
            self.config_written()

    def set_clean_shutdown(self, clean: bool) -> None:
        """The config file says whether the last end was an orderly one. No effect before the first format."""
        config = self.read_config()
        if config is not None and config.shutdown != clean:
            self.write_config(replace(config, shutdown=clean))

    # ---- epochs

    def epochs(self) -> Sequence[int]:
        """Numbers of all epoch files, ascending."""
        try:
            names = os.listdir(self._epochs)
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise ConfigError(f"cannot read {self._epochs}: {error.strerror}") from error
        return sorted(epoch for epoch in map(parse_epoch_file_name, names) if epoch is not None)

    def latest_epoch(self) -> int:
        """The highest epoch whose file is whole; 0 without any."""
        return next((epoch for epoch in reversed(self.epochs()) if self.read_epoch(epoch) is not None), 0)

    def read_epoch(self, epoch: int) -> EpochRecord | None:
        """One epoch file; ``None`` when it is missing or its length does not fit."""
        raw = self._read(os.path.join(self._epochs, epoch_file_name(epoch)))
        if raw is None:
            return None
        try:
            return EpochRecord.unpack(raw, self._mode)
        except ProtocolError as error:
            logger.warning("epoch file %s is ignored: %s", epoch_file_name(epoch), error)
            return None

    def write_epoch(self, epoch: int, record: EpochRecord) -> None:
        """The epoch file holds ``record``."""
        self._write(os.path.join(self._epochs, epoch_file_name(epoch)), record.pack(self._mode))

    def remove_epochs(self, after: int = 0) -> None:
        """No epoch file with a number above ``after`` is left."""
        doomed = [epoch for epoch in self.epochs() if epoch > after]
        # From the newest, so that a crash in the middle leaves a log without gaps.
        for epoch in reversed(doomed):
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(self._epochs, epoch_file_name(epoch)))
        if doomed:
            sync_directory(self._epochs)

    # ---- the store this node prefers

    def read_node_config(self) -> str | None:
        """The store that ``dog node format`` chose for this node; ``None`` without one."""
        raw = self._read(self._node_config)
        return (unpack_store_name(raw[:_NODE_CONFIG_BYTES]) or None) if raw else None

    def write_node_config(self, store: str) -> None:
        """This node prefers ``store`` to the cluster's from its next start on."""
        self._write(self._node_config, pack_store_name(store).ljust(_NODE_CONFIG_BYTES, b"\0"))

    # ---- files

    def _read(self, path: str) -> bytes | None:
        try:
            with open(path, "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error

    def _write(self, path: str, data: bytes, *, follows: Callable[[os.stat_result], None] | None = None) -> None:
        """:param follows: called when the new file is whole and does not have its name yet."""
        temporary = f"{path}.{next(self._numbers)}{_TEMPORARY}"  # two threads may write the same file
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
            try:
                with open(fd, "wb", closefd=False) as file:
                    file.write(data)
                os.fsync(fd)
                if follows is not None:
                    follows(os.fstat(fd))
            finally:
                os.close(fd)
            os.rename(temporary, path)
            sync_directory(os.path.dirname(path))
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error


def sync_directory(path: str) -> None:
    """Names in the directory survive a loss of power.

    :raises OSError: that cannot be promised.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# ---- is what the store says compatible with how the sheep was started?


def _nothing(*_: object) -> None:
    """Nobody wants to know."""


def check_config(config: DiskConfig, *, fixed_vnodes: bool, gateway: bool, mode: VnodeMode = VnodeMode.NODE) -> None:
    """The store was used in the way that is asked for now: the same vnode mode, and the same strategy.

    Unformatted stores always pass. The strategy means nothing to gateways, the mode does: they have epoch files too.

    :param fixed_vnodes: ``-V`` was given.
    :raises ConfigError: it was not.
    """
    if not config.ctime:
        return
    used = mode_of_flags(config.flags)
    if used is not mode:
        how = "with" if used is VnodeMode.DISK else "without"
        raise ConfigError(f"{DISK_MODE_DIFFERS}\nthe store was formatted {how} --disk-vnodes, start the sheep so, too")
    if not gateway and bool(config.flags & ClusterFlag.AUTO_VNODES) == fixed_vnodes:
        raise ConfigError(VNODE_STRATEGY_DIFFERS)


def check_vnodes(records: Iterable[EpochRecord], me: NodeId, vnodes: int) -> None:
    """The fixed number of vnodes is that of the previous run.

    :param records: epoch records, newest first; the first one with this node decides.
    :raises ConfigError: it is another.
    """
    for record in records:
        for node in record.nodes:
            if node.id == me:
                if node.vnodes not in (0, vnodes):  # 0: this node was a gateway
                    raise ConfigError(
                        "mismatch specified vnodes is compared with the previous. "
                        f"previous vnodes:{node.vnodes}\n{CREATE_CLUSTER_FAILED}"
                    )
                return
