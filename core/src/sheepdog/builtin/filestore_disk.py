"""One disk directory of the file-per-object store: its identity, its weight, what lies in it.

A disk is known by device, inode number and the attribute ``user.md.size``. All three are looked at again whenever a
file is missing, so that an unmounted, moved or deleted directory shows as a failed disk and not as lost objects
(docs/on-disk.md, "Object directories").
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator
from struct import Struct

from sheepdog.api import (
    REPLICA,
    ConfigError,
    DiskInfo,
    DiskRing,
    NodeId,
    ShardKey,
    StoreBusy,
    StoreDeviceError,
    StoreError,
    StoreFull,
    Usage,
)
from sheepdog.builtin import filestore_io as io

logger = logging.getLogger(__name__)

STALE = ".stale"
TEMPORARY = ".tmp"  # anywhere in a name: never finished, removed at start
SPARE = "spare."  # begins the name of a file in the stale area that is none of a set-aside version (filestore_spares)
WEIGHT_ATTRIBUTE = "user.md.size"
DIRECTORY_MODE = 0o770

_PROBE_ATTRIBUTE = "user.dummy"
_WEIGHT = Struct("<Q")
_PATHS_MAX = 1 << 15
_KEPT = frozenset({"lost+found"})  # belongs to the file system, not to us
_NAME = re.compile(r"([0-9a-f]{16})(?:_(0|[1-9][0-9]*))?(?:\.(0|[1-9][0-9]*))?", re.ASCII)
_NO_OIDS = frozenset({0, (1 << 64) - 1})
_BUSY = frozenset({errno.EMFILE, errno.ENFILE, errno.EINTR, errno.EAGAIN, errno.EEXIST, errno.ENOMEM})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


def file_name(key: ShardKey) -> str:
    """``OID`` of a whole copy, ``OID_K`` of strip K."""
    return f"{key[0]:016x}" if key[1] < 0 else f"{key[0]:016x}_{key[1]}"


def parse_file_name(name: str) -> tuple[ShardKey, int | None] | None:
    """The shard, and the epoch if the name is that of a set-aside version; ``None`` for a file that is not ours."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    oid = int(match[1], 16)
    if oid in _NO_OIDS:
        return None
    key = ShardKey(oid, REPLICA if match[2] is None else int(match[2]))
    return key, None if match[3] is None else int(match[3])


class Layout(ABC):
    """In which directory of a disk the file of an object lies. This is all that a file-per-object store has to say."""

    @abstractmethod
    def directory(self, oid: int) -> str:
        """Relative to the disk, ``""`` for the disk itself. Asked once in a while for each object, then remembered."""

    @abstractmethod
    def directories(self) -> tuple[str, ...]:
        """Everything that ``directory`` may return. Made when a disk is taken into use."""


class Disk:
    """A directory in use. Construction prepares it and removes what was never finished.

    :raises StoreError: it cannot be used; the message says why.
    """

    def __init__(self, path: str, layout: Layout, *, empty: bool = False) -> None:
        """
        :param path: absolute, without trailing slashes.
        :param empty: whatever is in the directory goes (a disk plugged into a running sheep).
        """
        self.path = path
        self._layout = layout
        try:
            if not os.path.isdir(path):
                os.mkdir(path, DIRECTORY_MODE)
        except OSError as error:
            raise StoreError(f"cannot create the directory {path} ({error.strerror})") from error
        self._refuse_without_attributes()
        try:
            if empty:
                self._remove_contents()
            status = os.stat(path)
            self._identity = (status.st_dev, status.st_ino)
            self.weight_bytes = self._recorded_weight() or self._record_weight(self.free_bytes())
            self.make_directories()
            self._remove_unfinished()
        except OSError as error:
            raise StoreError(f"cannot use {path}: {error.strerror}") from error

    def _refuse_without_attributes(self) -> None:
        try:
            os.setxattr(self.path, _PROBE_ATTRIBUTE, b"")
            os.removexattr(self.path, _PROBE_ATTRIBUTE)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise StoreError(f"multi-disk support need xattr feature for path: {self.path}") from error
            raise StoreError(f"cannot use {self.path}: {error.strerror}") from error

    # ---- identity and errors

    def check(self) -> None:
        """The directory is still the one that was opened.

        :raises StoreDeviceError: it is gone, it is another one (something was unmounted), or it cannot be read.
        """
        try:
            status = os.stat(self.path)
            if (status.st_dev, status.st_ino) == self._identity:
                os.getxattr(self.path, WEIGHT_ATTRIBUTE)
                return
        except OSError as error:
            raise StoreDeviceError(f"disk {self.path} failed: {error.strerror}", path=self.path) from error
        raise StoreDeviceError(f"disk {self.path} failed: another directory is there now", path=self.path)

    def trouble(self, error: OSError, what: str) -> StoreError:
        """The contract's error for one of the operating system; what a missing file means is for callers to judge."""
        if error.errno in _FULL:
            return StoreFull(f"no space on {self.path} for {what}")
        if error.errno in _BUSY:
            return StoreBusy(f"{what} on {self.path}: {error.strerror}")
        return StoreDeviceError(f"disk {self.path} failed: {what}: {error.strerror}", path=self.path)

    # ---- weight and usage

    def _recorded_weight(self) -> int | None:
        try:
            raw = os.getxattr(self.path, WEIGHT_ATTRIBUTE)
        except OSError as error:
            if error.errno == errno.ENODATA:
                return None
            raise
        return int(_WEIGHT.unpack(raw)[0]) if len(raw) == _WEIGHT.size else None

    def _record_weight(self, weight_bytes: int) -> int:
        os.setxattr(self.path, WEIGHT_ATTRIBUTE, _WEIGHT.pack(weight_bytes))
        return weight_bytes

    def free_bytes(self) -> int:
        """As the file system says now."""
        status = os.statvfs(self.path)
        return status.f_frsize * status.f_bavail

    def _used_bytes(self) -> int:
        """Space of all object files, set-aside versions included; a version that is also live counts once."""
        used = 0
        linked: set[int] = set()
        for directory in (*self._layout.directories(), STALE):
            base = os.path.join(self.path, directory)
            for name in self._names(directory):
                try:
                    status = os.stat(f"{base}/{name}", follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if not stat.S_ISREG(status.st_mode):
                    continue
                if status.st_nlink > 1:
                    if status.st_ino in linked:
                        continue
                    linked.add(status.st_ino)
                used += status.st_blocks * io.SECTOR_BYTES
        return used

    def info(self) -> DiskInfo:
        """Path and usage as measured now; a failing disk has nothing."""
        try:
            usage = Usage(self._used_bytes(), self.free_bytes(), self.weight_bytes)
        except (OSError, StoreError) as error:
            logger.warning("disk %s cannot be measured: %s", self.path, error)
            usage = Usage(0, 0, self.weight_bytes)
        return DiskInfo(self.path, usage)

    def reweigh(self) -> None:
        """The recorded weight is what the disk could hold now: its objects and the free space."""
        try:
            self.weight_bytes = self._record_weight(self._used_bytes() + self.free_bytes())
        except OSError as error:
            raise self.trouble(error, "measuring") from error

    # ---- what lies in it

    def live(self) -> Iterator[ShardKey]:
        """Live shards in no order."""
        for directory in self._layout.directories():
            for name in self._names(directory):
                found = parse_file_name(name)
                if found is not None and found[1] is None and self._layout.directory(found[0].oid) == directory:
                    yield found[0]

    def stale(self) -> Iterator[tuple[ShardKey, int]]:
        """Set-aside versions in no order."""
        for name in self._names(STALE):
            found = parse_file_name(name)
            if found is not None and found[1] is not None:
                yield found[0], found[1]

    def _names(self, directory: str) -> list[str]:
        try:
            return os.listdir(os.path.join(self.path, directory))
        except FileNotFoundError:
            self.check()
            return []
        except OSError as error:
            raise self.trouble(error, "listing") from error

    def make_directories(self) -> None:
        """Every directory of the layout and the stale area exist."""
        for directory in (*self._layout.directories(), STALE):
            os.makedirs(os.path.join(self.path, directory), DIRECTORY_MODE, exist_ok=True)

    def _remove_unfinished(self) -> None:
        for directory in (*self._layout.directories(), STALE):
            base = os.path.join(self.path, directory)
            for name in os.listdir(base):
                if TEMPORARY in name and not _is_spare(name):
                    logger.debug("removing unfinished %s/%s", base, name)
                    os.unlink(os.path.join(base, name))

    def spares(self) -> list[str]:
        """Paths of the spares that lie in the stale area."""
        return [os.path.join(self.path, STALE, name) for name in sorted(self._names(STALE)) if _is_spare(name)]

    def purge_stale(self) -> None:
        """No version is in the stale area."""
        base = os.path.join(self.path, STALE)
        for name in self._names(STALE):
            if _is_spare(name):
                continue
            try:
                os.unlink(os.path.join(base, name))
            except FileNotFoundError:
                continue
            except OSError as error:
                raise self.trouble(error, "purging") from error

    def wipe(self) -> None:
        """Nothing is left but empty directories, also of other layouts; on return this survives power loss."""
        self.check()
        try:
            self._remove_contents()
            self.make_directories()
            io.sync_directory(self.path)
        except OSError as error:
            raise self.trouble(error, "wiping") from error

    def _remove_contents(self) -> None:
        with os.scandir(self.path) as entries:
            found = list(entries)
        for entry in found:
            if entry.name in _KEPT:
                continue
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            else:
                os.unlink(entry.path)


def _is_spare(name: str) -> bool:
    return name.startswith(SPARE) and name.endswith(TEMPORARY)


def left_by_another(path: str, layout: Layout) -> str | None:
    """One object file on the disk that this layout would not find there, relative to the disk; None without any."""
    known = frozenset(layout.directories())
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if entry.name in known or entry.name.startswith("."):
                        continue
                    for name in os.listdir(entry.path):
                        if _is_object(name):
                            return f"{entry.name}/{name}"
                elif "" not in known and _is_object(entry.name):
                    return entry.name
    except OSError as error:  # taking the disk into use will tell
        logger.debug("looking at %s: %s", path, error)
    return None


def refuse_another_layout(path: str, layout: Layout) -> None:
    """:raises ConfigError: objects lie on the disk where another layout puts them."""
    found = left_by_another(path, layout)
    if found is not None:
        raise ConfigError(
            f"{path} has objects in the places of another store, for example {found}\n"
            "start the sheep with the store that they were written by, or convert them: "
            "dog upgrade store-convert PATH STORE"
        )


def _is_object(name: str) -> bool:
    found = parse_file_name(name)
    return found is not None and found[1] is None


class Paths(dict[ShardKey, str]):
    """Where each shard belongs under one set of disks; swapped as a whole when that changes. Remembers strings only."""

    def __init__(self, disks: tuple[Disk, ...], layout: Layout, node: NodeId | None) -> None:
        """:param node: whose vnodes the disks have, ``None`` where vnodes do not belong to disks."""
        super().__init__()
        self.disks = disks
        self._layout = layout
        self._by_path = {disk.path: disk for disk in disks}
        self._ring: DiskRing | None = None
        if len(disks) > 1:
            # A disk that was full when it was first used has weight 0 and still must be found. Among vnodes of disks it
            # has none, unless there is no other.
            least = 1 if node is None or not any(disk.weight_bytes for disk in disks) else 0
            self._ring = DiskRing(((disk.path, max(disk.weight_bytes, least)) for disk in disks), node)

    def __missing__(self, key: ShardKey) -> str:
        path = self.on(self.disk_of(key), key)
        if len(self) >= _PATHS_MAX:
            self.clear()
        self[key] = path
        return path

    def disk_of(self, key: ShardKey) -> Disk:
        """Where the shard belongs.

        :raises StoreDeviceError: no disk is left.
        """
        if self._ring is not None:
            return self._by_path[self._ring.disk_of(key[0])]
        if not self.disks:
            raise StoreDeviceError("there is no disk left")
        return self.disks[0]

    def disks_for(self, key: ShardKey) -> tuple[Disk, ...]:
        """All disks, the one where the shard belongs first."""
        home = self.disk_of(key)
        return (home, *(disk for disk in self.disks if disk is not home))

    def on(self, disk: Disk, key: ShardKey) -> str:
        """Path of the live file, were it on this disk."""
        directory = self._layout.directory(key[0])
        return f"{disk.path}/{directory}/{file_name(key)}" if directory else f"{disk.path}/{file_name(key)}"
