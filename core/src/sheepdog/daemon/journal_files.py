"""The two files of a write journal: made, appended to, emptied, replayed and removed.

Both have half of the journal's size. One is appended to while the other is empty or being emptied; names, sizes and
the layout of entries are those of the original (docs: on-disk layout, section 6), which replays what we leave and the
other way round. A file is emptied by overwriting what was used with zeros instead of making it anew: its blocks stay
allocated, so that an append needs no more than its own bytes to become durable. Where only we replay it, the first
entry alone is overwritten; what else is left is of an earlier *use*, and entries say of which use they are.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile

from sheepdog.contracts.store import ObjectStore, ShardKey, Staged
from sheepdog.daemon.storedir import sync_directory
from sheepdog.daemon.strip_memory import StripChange, StripMemory
from sheepdog.errors import ConfigError, ObjectNotFound, StoreDeviceError, StoreError, StoreFull
from sheepdog.model.ids import inode_oid, is_sparse, object_bytes, vid_of
from sheepdog.model.inode import InodeHeader
from sheepdog.model.journal_entry import REPLICA, UNIT_BYTES, JournalEntry, JournalKind, PlacedEntry, scan

logger = logging.getLogger(__name__)

FILE_MODE = 0o644
VECTOR_MAX = 1024  # buffers of one writev, IOV_MAX
ZEROS = bytes(1 << 20)
AHEAD_BYTES = len(ZEROS)
HEADER_PART_BYTES = 572  # of an inode, as much as names its block size


JOURNAL = "journal_file"  # what the original calls them
STRIPS = "strip_log"  # a journal of erasure-coded strips, and of small writes to whole copies


def file_paths(directory: str, name: str = JOURNAL) -> tuple[str, str]:
    """Where the two files of a journal in this directory are."""
    return os.path.join(directory, f"{name}0"), os.path.join(directory, f"{name}1")


def left_journal(directory: str, name: str = JOURNAL) -> bool:
    """A former run left a journal in this directory."""
    return any(os.path.exists(path) for path in file_paths(directory, name))


@dataclass(slots=True)
class Left:
    """What a former run left in a journal, besides what was replayed.

    :param first: number of the file to be overwritten first, because the other one says all that it says of strips.
    :param number: of the last entry.
    """

    first: int = 0
    number: int = 0
    strips: StripMemory = field(default_factory=StripMemory)


class JournalFile:
    """One of the two files. Not thread-safe."""

    def __init__(self, path: str, size_bytes: int, *, synced: bool = True, zeroed: bool = True) -> None:
        """The file exists with all its space, and is empty.

        :param synced: what is appended is on stable storage; otherwise in the page cache.
        :param zeroed: nothing is left in it when it is emptied: for those who replay it and know no ``use``.
        :raises ConfigError: the directory is missing, there is no space, or another sheep uses the file.
        """
        self.path = path
        self.size_bytes = self._usual_bytes = size_bytes
        self._synced = synced
        self._zeroed = zeroed
        self.use = 1  # counts how often it was emptied
        self.end = 0  # of what was written
        self._allocated = 0  # up to here the blocks were written once
        self.last_number = 0  # of the last entry in it
        self.keys: set[ShardKey] = set()  # shards whose files are not flushed since an entry was written here
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (os.O_DSYNC if synced else 0)
            self._fd = os.open(path, flags, FILE_MODE)
        except OSError as error:
            raise ConfigError(f"cannot open the journal file {path} ({error.strerror})") from error
        try:
            _lock(self._fd, path)  # for as long as it is open
        except ConfigError:
            os.close(self._fd)
            raise
        try:
            os.ftruncate(self._fd, 0)
            os.posix_fallocate(self._fd, 0, size_bytes)
            os.fsync(self._fd)
            sync_directory(os.path.dirname(path))
        except OSError as error:
            os.close(self._fd)
            with suppress(OSError):
                os.unlink(path)  # the part of it that was reserved
            raise ConfigError(
                f"cannot reserve {size_bytes} bytes for the journal file {path} ({error.strerror})"
            ) from error

    def room_for(self, length: int) -> bool:
        """Whether so many bytes fit behind what is there."""
        return self.end + length <= self.size_bytes

    def grow(self, size_bytes: int) -> bool:
        """There is space for so many bytes until the file is emptied; False when the disk has none."""
        if size_bytes > self.size_bytes:
            try:
                os.posix_fallocate(self._fd, 0, size_bytes)
            except OSError as error:
                logger.warning("journal: no space for %d bytes in %s: %s", size_bytes, self.path, error.strerror)
                return False
            self.size_bytes = size_bytes
        return True

    def append(self, buffers: Sequence[bytes | bytearray | memoryview], length: int) -> None:
        """The buffers, ``length`` bytes together, are behind what was there (on stable storage, if ``synced``).

        :raises OSError: they may be there in part.
        """
        at = self.end
        end = at + length
        ahead = self._ahead(end)
        if ahead:
            buffers = (*buffers, memoryview(ZEROS)[:ahead])
        for first in range(0, len(buffers), VECTOR_MAX):
            part = buffers[first : first + VECTOR_MAX]
            left = sum(map(len, part))
            while left:
                written = os.pwritev(self._fd, part, at)
                at += written
                left -= written
                if left:
                    part = [memoryview(b"".join(part))[written:]]
        assert at == end + ahead, f"{at - self.end} bytes of journal instead of {length}"
        self.end = end
        self._allocated = max(self._allocated, at)

    def _ahead(self, end: int) -> int:
        """How many zeros go with an append up to ``end``.

        Space that is reserved and was never written is marked as such, and the first write to it changes that mark: the
        flush has to commit the journal of the file system, too, which costs as much again. So what is written for the
        first time is written with plenty behind it, and most appends change nothing but their own bytes.
        """
        if not self._synced or end <= self._allocated:
            return 0
        return min(AHEAD_BYTES, self.size_bytes - end)

    def clear(self) -> None:
        """The file holds no entry; all that it held are applied.

        The first one goes first: without it none of the others counts. Were they given up in any other order, a crash
        on the way could leave an old entry of some bytes and not the newer one.
        """
        if self.end:
            fd = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)  # not flushed piece by piece, as the other one would
            try:
                self._zero(fd, 0, min(UNIT_BYTES, self.end))
                if self._zeroed and self.end > UNIT_BYTES:
                    self._zero(fd, UNIT_BYTES, self.end)
                if self.size_bytes > self._usual_bytes:
                    os.ftruncate(fd, self._usual_bytes)
                    self.size_bytes = self._usual_bytes
                    self._allocated = min(self._allocated, self.size_bytes)
            finally:
                os.close(fd)
        self.use += 1
        self.end = 0
        self.keys = set()

    def _zero(self, fd: int, start: int, end: int) -> None:
        while start < end:
            start += os.pwrite(fd, memoryview(ZEROS)[: end - start], start)
        if self._synced:
            os.fdatasync(fd)

    def close(self) -> None:
        os.close(self._fd)

    def remove(self) -> None:
        """The file is gone."""
        self.close()
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        sync_directory(os.path.dirname(self.path))


def _lock(fd: int, path: str) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise ConfigError(
            f"the journal file {path} is used by another sheep; give each sheep a directory of its own"
        ) from error


def refuse_if_used(directory: str) -> None:
    """No running sheep has its journal in this directory.

    :raises ConfigError: one has.
    """
    for path in file_paths(directory):
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            continue  # there is none, or who opens it next tells what the matter is
        try:
            _lock(fd, path)
        finally:
            os.close(fd)


# ---- replay


def replay(
    directory: str, store: ObjectStore, *, block_size_shift: int, name: str = JOURNAL, left: Left | None = None
) -> int:
    """The store has, on stable storage, what the journal in ``directory`` says; returns how many entries were applied.

    The older file comes first. What was cut short, or is wrong by its checksum, is left out. Repeating it is harmless.
    The files are left as they are.

    :param block_size_shift: of volumes whose inode says none; the original did not note the size of what it created.
    :param left: is filled with what the next journal has to know.
    :raises ConfigError: the journal cannot be read, or the disks have no space for it.
    """
    files = []
    for place, path in enumerate(file_paths(directory, name)):
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                if not status.st_size:
                    continue
                view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"cannot read the journal file {path} ({error.strerror})") from error
        entries = _in_use(list(scan(memoryview(view))))
        if entries:
            files.append((entries[0].number, status.st_mtime_ns, entries, place))
    if all(file[0] for file in files):
        files.sort(key=lambda file: file[0])
    else:
        files.sort(key=lambda file: file[1])
    entries = [entry for file in files for entry in file[2]]
    if not entries:
        return 0
    if left is not None:
        left.first = files[0][3] if len(files) > 1 else 1 - files[0][3]
        left.number = max(left.number, *(entry.number for entry in entries), 0)
        for entry in entries:
            left.strips.take(entry)
        left.strips.drop_complete_exchanges()  # their files may have got other contents since
    records = left.strips.records.values() if left is not None else ()
    kept = [(record.key, record.exchange.old) for record in records if record.exchange is not None]
    return _Replay(store, block_size_shift).run(entries, kept)


def _in_use(placed: Sequence[PlacedEntry]) -> list[JournalEntry]:
    """What counts of the entries that a file has: those that were added since it was emptied last."""
    if not placed or (placed[0].at and placed[0].entry.checked):
        return []  # it was being emptied, or never had more than an entry that was cut short
    use = placed[0].entry.use
    return [one.entry for one in takewhile(lambda one: one.entry.use == use, placed)]


_REPLACED = frozenset({JournalKind.FORGET, JournalKind.REMOVE})
_REPLAYED = frozenset({JournalKind.STORE, JournalKind.REMOVE, JournalKind.UNDO})


class _Replay:
    """Applies entries to a store."""

    def __init__(self, store: ObjectStore, block_size_shift: int) -> None:
        self._store = store
        self._shift = block_size_shift
        self._strips: dict[int, int] = {}
        self._missing = 0

    def run(self, entries: Sequence[JournalEntry], kept: Iterable[tuple[ShardKey, int]] = ()) -> int:
        """:param kept: contents that may be put back later."""
        if any(not entry.checked for entry in entries):
            # The original does not say which strip; a sheep has one of each object.
            self._strips = {key.oid: key.index for key in self._store.keys() if key.index != REPLICA}  # noqa: SIM118
        begin: dict[ShardKey, int] = {}
        exchanges: dict[ShardKey, tuple[int, Staged]] = {}
        for position, entry in enumerate(entries):
            key = self._key(entry)
            if entry.kind is JournalKind.FORGET:
                begin[key] = position
            if entry.kind in _REPLACED or (entry.kind is JournalKind.STORE and entry.create):
                exchanges.pop(key, None)  # the shard is not what it became then
            elif entry.kind is JournalKind.UNDO:
                staged = StripChange.unpack(key, entry.data).staged
                if staged is not None:
                    exchanges.pop(key, None)
                    exchanges[key] = position, staged
        for key, (position, _) in exchanges.items():
            begin[key] = max(position, begin.get(key, -1))  # what came before is not in it
        touched: dict[ShardKey, None] = dict.fromkeys(
            self._exchange([staged for _, staged in exchanges.values()], kept)
        )
        applied = 0
        for position, entry in enumerate(entries):
            if entry.kind not in _REPLAYED:
                continue
            key = self._key(entry)
            if position <= begin.get(key, -1):
                continue
            try:
                self._apply(key, entry)
            except ObjectNotFound:
                self._missing += 1  # set aside or removed later
                continue
            except StoreFull as error:
                raise ConfigError(
                    f"no space to replay the journal ({error}); free some, or start with -j ...,skip to give it up"
                ) from error
            except StoreDeviceError as error:
                logger.error("journal: %s", error)
                continue
            touched[key] = None
            applied += 1
        self._flush(list(touched))
        logger.info("journal: replayed %d of %d entries", applied, len(entries))
        return applied

    def _exchange(self, exchanges: Sequence[Staged], kept: Iterable[tuple[ShardKey, int]]) -> list[ShardKey]:
        try:
            return self._store.finish_exchanges(exchanges, kept)
        except StoreError as error:
            logger.error("journal: %s", error)
            return []

    def _flush(self, keys: list[ShardKey]) -> None:
        try:
            self._store.sync(keys)
        except StoreError as error:
            logger.error("journal: %s", error)
            for key in keys:  # what lies on the other disks is safe at least
                with suppress(StoreError):
                    self._store.sync([key])

    def _key(self, entry: JournalEntry) -> ShardKey:
        if entry.checked:
            return ShardKey(entry.oid, entry.index)
        return ShardKey(entry.oid, self._strips.get(entry.oid, REPLICA))

    def _apply(self, key: ShardKey, entry: JournalEntry) -> None:
        store = self._store
        if entry.kind is JournalKind.REMOVE:
            store.remove(key)
        elif entry.kind is JournalKind.UNDO:
            for offset, data in StripChange.unpack(key, entry.data).pieces:
                store.write(key, data, offset_bytes=offset, durable=False)
        elif not entry.create:
            store.write(key, entry.data, offset_bytes=entry.offset, durable=False)
        else:
            size = max(self._size(key, entry), entry.offset + len(entry.data))
            store.create(
                key, entry.data, offset_bytes=entry.offset, size_bytes=size, sparse=is_sparse(key.oid), durable=False
            )

    def _size(self, key: ShardKey, entry: JournalEntry) -> int:
        if entry.checked:
            return entry.size_bytes
        try:
            return self._store.size(key)
        except ObjectNotFound:
            return object_bytes(key.oid, self._volume_shift(key.oid))

    def _volume_shift(self, oid: int) -> int:
        buffer = bytearray(HEADER_PART_BYTES)
        try:
            self._store.read_into(ShardKey(inode_oid(vid_of(oid))), memoryview(buffer), offset_bytes=0)
        except StoreError:
            return self._shift
        return InodeHeader.unpack(buffer).block_size_shift or self._shift
