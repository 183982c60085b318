"""Files that lie ready for the next whole content of some object, and those with the contents that were replaced.

Replacing the whole content of a file so that the old one can be brought back would cost a second write of either; two
files that exchange their names cost nothing. The new content is written into a *spare*, a file beside the objects that
has its space already, so that making it durable takes no more than its own bytes. Then spare and object exchange their
names in one step (``renameat2``), which the file system makes atomic also for a power loss. What was the object is
*kept* under the spare's name until nobody may want it back. Then it *rests*: nothing is written to a file that may come
up under an object's name after a power loss. When some rest, the directories are flushed once, and they are spares.

Names say nothing about contents, therefore, and after a crash nobody knows which exchanges have reached the disk. The
number of a file (inode) tells: a journal has noted which one an object is to be, and wherever that lies it is exchanged
to its place. A number may be given to another file once its own is gone; whoever claims it last has it.

Spares lie in ``.stale`` of each disk and have ``.tmp`` in their names: whatever is started on the directories later
without knowing of them, the original included, removes them.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sheepdog.api import Buffer, ShardKey, Staged, StoreBusy
from sheepdog.builtin import filestore_io as io
from sheepdog.builtin.filestore_digest import DIGEST_ATTRIBUTE, DIGEST_OF_ATTRIBUTE
from sheepdog.builtin.filestore_disk import SPARE, STALE, TEMPORARY, Disk

logger = logging.getLogger(__name__)

FILE_MODE = 0o660
BYTES_MAX = 64 << 20  # of spares that wait for a use, and of all others, on one disk each
RESTING_MAX = 8
ROOM_BYTES = 1 << 30  # left to objects: with less free space no spare is made
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(slots=True, eq=False)
class _Spare:
    """One file, used or not."""

    path: str
    disk: str
    size: int
    directory: str = ""  # where the object is whose content it had


class Spares:
    """Of all disks of one store. Thread-safe for different shards."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # of what follows; held for moments
        self._free: list[_Spare] = []  # what was used last at the end
        self._staged: dict[tuple[ShardKey, int], _Spare] = {}
        self._kept: dict[tuple[ShardKey, int], _Spare] = {}
        self._resting: list[_Spare] = []
        self._possible: dict[str, bool] = {}  # by disk: whether its file system exchanges names
        self._serial = itertools.count(1)
        self._used = False  # since the last upkeep

    # ---- files

    def take_up(self, disk: Disk) -> None:
        """What a former run left on the disk is there for whoever claims it."""
        with self._lock:
            for path in disk.spares():
                with suppress(FileNotFoundError):
                    self._free.append(_Spare(path, disk.path, os.stat(path).st_size))

    def leave(self, disk: str) -> None:
        """The disk is not used any more."""
        with self._lock:
            self._forget(lambda spare: spare.disk != disk)
            self._possible.pop(disk, None)

    def forget(self) -> None:
        """All files are gone."""
        with self._lock:
            self._forget(lambda _: False)

    def _forget(self, stays: Callable[[_Spare], bool]) -> None:
        self._free = [spare for spare in self._free if stays(spare)]
        self._resting = [spare for spare in self._resting if stays(spare)]
        for table in (self._staged, self._kept):
            for name in [name for name, spare in table.items() if not stays(spare)]:
                del table[name]

    def upkeep(self) -> None:
        """Without use, nothing lies around."""
        with self._lock:
            idle, self._used = not self._used, False
            resting = list(self._resting) if idle else []
        if idle:
            with suppress(OSError):
                _flush_names(resting)
                self.close()

    def close(self) -> None:
        """Only what may be put back is left."""
        with self._lock:
            gone = [*self._free, *self._resting]
            self._free, self._resting = [], []
        _unlink(gone)

    # ---- staging

    def stage(
        self,
        disk: Disk,
        key: ShardKey,
        path: str,
        data: Buffer,
        write: Callable[[str, memoryview], None],
        durable: bool,
    ) -> Staged | None:
        """``data`` lies in a spare of the disk; ``None`` if the file at ``path`` must be written in place.

        :param write: puts the data into the file of that path, durably if that is asked for.
        :raises OSError: it could not be written, for another reason than a lack of space.
        """
        self._used = True
        try:
            size = os.stat(path).st_size
            old = io.file_id(path)
        except FileNotFoundError:
            return None
        if size != len(data):
            return None
        spare = None
        try:
            spare = (
                self._take(disk, size)
                or self._take_rested(disk, size, durable, RESTING_MAX)
                or self._make(disk, size, durable)
                or self._take_rested(disk, size, durable, 1)
            )
            if spare is None:
                return None
            write(spare.path, memoryview(data))
            staged = Staged(key, io.file_id(spare.path), old)
        except OSError as error:
            if spare is not None:
                _unlink([spare])
            if error.errno in _FULL:
                return None
            if error.errno == errno.ENOENT:  # somebody removed the spare
                disk.check()
                return None
            raise
        with self._lock:
            self._staged[key, staged.new] = spare
        return staged

    def _take(self, disk: Disk, size: int) -> _Spare | None:
        with self._lock:
            for position in range(len(self._free) - 1, -1, -1):
                spare = self._free[position]
                if spare.disk == disk.path and spare.size == size:
                    return self._free.pop(position)
        return None

    def _take_rested(self, disk: Disk, size: int, durable: bool, count_min: int) -> _Spare | None:
        """One of those that rest, if there are so many on the disk."""
        with self._lock:
            resting = [spare for spare in self._resting if spare.disk == disk.path]
            if len(resting) < count_min:
                return None
            self._resting = [spare for spare in self._resting if spare.disk != disk.path]
        try:
            if durable:
                _flush_names(resting)
        except OSError:
            with self._lock:
                self._resting += resting
            raise
        self._set_free(resting)
        return self._take(disk, size)

    def _make(self, disk: Disk, size: int, durable: bool) -> _Spare | None:
        with self._lock:
            all_used = (*self._kept.values(), *self._staged.values(), *self._resting)
            used = sum(spare.size for spare in all_used if spare.disk == disk.path)
        if used + size > BYTES_MAX or disk.free_bytes() < ROOM_BYTES or not self._can_exchange(disk):
            return None
        for _ in range(2):
            spare = _Spare(self._free_name(disk), disk.path, size)
            try:
                fd = os.open(spare.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, FILE_MODE)
                break
            except FileNotFoundError:  # somebody removed the directory; the disk itself is to be found good
                disk.check()
                disk.make_directories()
        else:
            return None
        try:
            io.reserve(fd, size)
        except OSError:
            _unlink([spare])
            raise
        finally:
            os.close(fd)
        if durable:
            io.sync_directory(os.path.dirname(spare.path))  # its number is to be found after a power loss
        return spare

    def _free_name(self, disk: Disk) -> str:
        while True:
            path = f"{disk.path}/{STALE}/{SPARE}{next(self._serial):x}{TEMPORARY}"
            if not os.path.lexists(path):
                return path

    def _can_exchange(self, disk: Disk) -> bool:
        possible = self._possible.get(disk.path)
        if possible is None:
            one, other = self._free_name(disk), self._free_name(disk)
            try:
                for path in (one, other):
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT, FILE_MODE))
                possible = io.exchange(one, other)
            finally:
                for path in (one, other):
                    with suppress(OSError):
                        os.unlink(path)
            self._possible[disk.path] = possible
        return possible

    def unstage(self, staged: Staged) -> None:
        """The spare is there for the next one."""
        with self._lock:
            spare = self._staged.pop((staged.key, staged.new), None)
        self._set_free([spare] if spare is not None else [])

    # ---- exchanging

    def exchange(self, staged: Staged, path: str) -> None:
        """The file at ``path`` is the spare, and the other way round.

        :raises OSError: it could not be done.
        """
        with self._lock:
            spare = self._staged.get((staged.key, staged.new))
        if spare is None or io.file_id(path) != staged.old:
            self.unstage(staged)
            raise StoreBusy(f"oid={staged.key.oid:016x} was replaced while it was being written")
        _exchange(spare.path, path)
        spare.directory = os.path.dirname(path)
        with self._lock:
            self._staged.pop((staged.key, staged.new), None)
            self._kept[staged.key, staged.old] = spare

    def put_back(self, key: ShardKey, old: int, path: str, settle: Callable[[], None]) -> bool:
        """The file at ``path`` is the one that was kept; False when it is not kept any more.

        :param settle: makes the names durable, if that is asked for: the other content is not needed from then on.
        """
        if io.file_id(path) == old:
            return True
        with self._lock:
            spare = self._kept.get((key, old))
        if spare is None or not os.path.exists(spare.path):
            return False
        _exchange(spare.path, path)
        with self._lock:
            self._kept.pop((key, old), None)
        settle()
        self._set_free([spare])
        return True

    def release(self, versions: Iterable[tuple[ShardKey, int]] | None) -> None:
        """These contents, or all, are not wanted any more."""
        with self._lock:
            names = list(self._kept) if versions is None else versions
            self._resting += [spare for name in names if (spare := self._kept.pop(name, None)) is not None]

    def _set_free(self, spares: Sequence[_Spare]) -> None:
        for spare in spares:
            try:
                if os.stat(spare.path).st_nlink > 1:  # a version that was set aside is the same file
                    _unlink([spare])
                    continue
                for attribute in (DIGEST_ATTRIBUTE, DIGEST_OF_ATTRIBUTE):
                    with suppress(OSError):
                        os.removexattr(spare.path, attribute)
            except OSError:
                continue
            with self._lock:
                room = sum(free.size for free in self._free if free.disk == spare.disk) + spare.size <= BYTES_MAX
                if room:
                    self._free.append(spare)
            if not room:
                _unlink([spare])

    # ---- after a crash

    def finish(
        self, exchanges: Sequence[Staged], kept: Iterable[tuple[ShardKey, int]], live: Callable[[ShardKey], str | None]
    ) -> list[ShardKey]:
        """See the contract.

        :param live: path of the live file, ``None`` if there is none.
        """
        paths = {staged.key: path for staged in exchanges if (path := live(staged.key)) is not None}
        claims: dict[tuple[int, int], ShardKey] = {}
        for staged in exchanges:
            if staged.key in paths:
                # A number that is claimed twice was another file's before.
                claims[os.stat(paths[staged.key]).st_dev, staged.new] = staged.key
        with self._lock:
            spares = {spare.path: spare for spare in self._free}
        places: dict[tuple[int, int], str] = {}
        for path in (*spares, *paths.values()):
            with suppress(FileNotFoundError):
                places[os.stat(path).st_dev, io.file_id(path)] = path
        for wanted, key in claims.items():
            target = paths[key]
            now = wanted[0], io.file_id(target)
            source = places.get(wanted)
            if source is None or source == target:
                continue
            logger.debug("oid=%016x: the file %d takes its place", key.oid, wanted[1])
            _exchange(source, target)
            places[wanted], places[now] = target, source
        with self._lock:
            for key, old in kept:
                path = live(key)
                place = None if path is None else places.get((os.stat(path).st_dev, old))
                spare = None if place is None else spares.get(place)
                if path is not None and spare is not None and spare in self._free:
                    self._free.remove(spare)
                    spare.directory = os.path.dirname(path)
                    self._kept[key, old] = spare
        return sorted(paths)


def _exchange(one: str, other: str) -> None:
    if not io.exchange(one, other):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def _flush_names(spares: Iterable[_Spare]) -> None:
    """No name of an object is that of one of these files, also after a power loss."""
    for directory in sorted({name for spare in spares for name in (os.path.dirname(spare.path), spare.directory)}):
        io.sync_directory(directory)


def _unlink(spares: Iterable[_Spare]) -> None:
    for spare in spares:
        with suppress(OSError):
            os.unlink(spare.path)
