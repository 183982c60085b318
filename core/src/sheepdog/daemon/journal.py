"""The write journal (``-j``): what makes small writes durable with one sequential write for all that are waiting.

A ``JournaledStore`` stands in front of the real store. Every change is applied to the page cache and appended to the
journal; it is durable when its entry is. Entries of concurrent changes leave in one ``O_DSYNC`` write (group commit):
the first who wants to be sure writes for all. When one of the two files is full the other one takes over, and a
thread flushes the shards named in the full one, then empties it; a writer that needs it sooner waits.

Order. Entries of one shard stand in the order of its changes, because a shard has one mutator at a time. Writes in
place are applied first and journaled then. Creates are journaled first: a new file whose name survives a power loss
and whose bytes do not would look like an object. Until such a file is made, the journal file with its entry is not
emptied.

A shard that is set aside or brought back from there leaves the journal: an entry says that what was journaled before
must not be replayed. When the journal cannot be written, everything is flushed, the files are removed and the daemon
goes on without.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from sheepdog.contracts.store import Buffer, DiskInfo, ObjectStore, ShardKey, Usage
from sheepdog.daemon import journal_files
from sheepdog.daemon.config import SheepConfig
from sheepdog.daemon.journal_files import JournalFile, file_paths
from sheepdog.errors import ConfigError, StoreError
from sheepdog.model.journal_entry import JournalEntry, JournalKind, entry_bytes

logger = logging.getLogger(__name__)

RETRY_S = 0.1  # after a disk refused to flush
DEFAULT_SHIFT = 22  # of object sizes
PENDING_MAX = 1024  # entries that nobody waits for


class Journal:
    """Two files and the entries on their way to them. Thread-safe; ``add`` never waits for a disk."""

    def __init__(self, directory: str, size_bytes: int) -> None:
        """Both files exist and are empty.

        :raises ConfigError: the directory is missing, or has no space for them.
        """
        if not os.path.isdir(directory):
            raise ConfigError(f"the journal directory {directory} does not exist")
        self._files: list[JournalFile] = []
        for path in file_paths(directory):
            try:
                self._files.append(JournalFile(path, size_bytes // 2))
            except ConfigError:
                self._remove_files()
                raise
        self._active = 0
        self.failed = False
        self.entry_bytes_max = size_bytes // 2
        self._lock = threading.Condition()  # of what follows; held for moments
        self._pending: list[JournalEntry] = []
        self._number = 0  # of the last entry that was added
        self._applying: set[int] = set()  # entries whose change is not made yet
        self._full: JournalFile | None = None  # waits to be emptied
        self._cleaner: threading.Thread | None = None
        self._trouble: StoreError | None = None  # why it could not be, for now
        self._broken: OSError | None = None  # why it never will be
        self._io = threading.RLock()  # held by who writes; taken before ``_lock``
        self._durable = 0  # entries up to this number are on stable storage
        self._flush_store: Callable[[Iterable[ShardKey]], None] = lambda _: None

    def serve(self, flush_store: Callable[[Iterable[ShardKey]], None]) -> None:
        """``flush_store`` makes everything durable that was applied to some shards."""
        self._flush_store = flush_store

    # ---- adding

    def add(
        self,
        kind: JournalKind,
        key: ShardKey,
        data: Buffer = b"",
        *,
        offset: int = 0,
        create: bool = False,
        size_bytes: int = 0,
        applying: bool = False,
    ) -> int:
        """An entry is on its way; returns its number, 0 when the journal failed. ``data`` must not change any more.

        :param applying: the change is still to be made; ``applied`` tells when it is.
        """
        with self._lock:
            if self.failed:
                return 0
            self._number = number = self._number + 1
            self._pending.append(JournalEntry(kind, key[0], offset, data, create, key[1], True, size_bytes, number))
            if applying:
                self._applying.add(number)
            return number

    def applied(self, number: int) -> None:
        """The change of an entry that was added with ``applying`` is made."""
        with self._lock:
            self._applying.discard(number)
            self._lock.notify_all()

    def mentions(self, key: ShardKey) -> bool:
        """Whether a replay would touch the shard."""
        with self._lock:
            return any(key in file.keys for file in self._files) or any(
                (entry.oid, entry.index) == key for entry in self._pending
            )

    @property
    def pending(self) -> int:
        """Entries that are not written yet."""
        return len(self._pending)

    # ---- writing

    def commit(self, number: int | None = None) -> bool:
        """Entries up to ``number`` (all, by default) are on stable storage; False when the journal failed.

        :raises StoreError: a disk does not take what must leave the journal before more can enter. May be repeated.
        """
        with self._io:
            if self.failed:
                return False
            if number is not None and number <= self._durable:
                return True
            with self._lock:
                batch, self._pending = self._pending, []
            try:
                if self._broken is not None:
                    raise self._broken
                self._write(batch)
            except OSError as error:
                self._fail(error, batch)
                return False
            return True

    def _write(self, batch: list[JournalEntry]) -> None:
        done = 0
        while done < len(batch):
            file = self._files[self._active]
            buffers: list[Buffer] = []
            length = 0
            first = done
            keys: list[ShardKey] = []
            while done < len(batch) and file.room_for(length + len(batch[done])):
                entry = batch[done]
                before, behind = entry.pack_around()
                buffers += (before, entry.data, behind)
                length += len(entry)
                keys.append(ShardKey(entry.oid, entry.index))
                done += 1
            if buffers:
                file.append(buffers, length)
                with self._lock:
                    file.keys.update(keys)
                file.last_number = self._durable = batch[done - 1].number
            if done < len(batch):
                assert done > first or file.end, f"an entry of {len(batch[done])} bytes fits no journal file"
                try:
                    self._switch()
                except StoreError:
                    # Who lent the data is told of the error and may use its buffer again.
                    rest = [replace(entry, data=bytes(entry.data)) for entry in batch[done:]]
                    with self._lock:
                        self._pending[:0] = rest
                    raise

    def _switch(self) -> None:
        """The other file is empty and takes over; this one is being emptied."""
        with self._lock:
            self._wait_clean()
            self._full = self._files[self._active]
            self._active = 1 - self._active
            if self._cleaner is None or not self._cleaner.is_alive():
                self._cleaner = threading.Thread(target=self._clean, name="sheepdog-journal", daemon=True)
                self._cleaner.start()
            self._lock.notify_all()

    def _clean(self) -> None:
        """The thread: empties the full file, then ends."""
        while True:
            with self._lock:
                file = self._full
                if file is None or self.failed:
                    return
                while any(number <= file.last_number for number in self._applying):
                    self._lock.wait()
                keys = sorted(file.keys)
            try:
                self._flush_store(keys)
            except StoreError as error:
                with self._lock:
                    self._trouble = error
                    self._lock.notify_all()
                    self._lock.wait(RETRY_S)
                continue
            try:
                file.clear()
            except OSError as error:
                with self._lock:
                    self._broken = error  # who writes next takes the journal out of use
                    self._lock.notify_all()
                return
            with self._lock:
                self._full = None
                self._trouble = None
                self._lock.notify_all()
                return

    def _fail(self, error: OSError, batch: Iterable[JournalEntry]) -> None:
        """No journal any more: everything is flushed, and nothing of it can be replayed over what comes."""
        logger.error("journal: %s; going on without a journal", error)
        with self._lock:
            keys = {key for file in self._files for key in file.keys}
            keys.update(ShardKey(entry.oid, entry.index) for entry in (*batch, *self._pending))
            self._pending = []
            self.failed = True
            self._full = None
            self._lock.notify_all()
        try:
            self._flush_store(sorted(keys))
        except StoreError as failure:
            # Those who wait flush their own shards again, and report it.
            logger.error("journal: %s", failure)
        self._remove_files()

    # ---- the end

    def empty(self) -> None:
        """Everything is flushed to the shards themselves; nothing would be replayed.

        :raises StoreError: a disk did not take it; the journal still has it.
        """
        with self._io:
            if not self.commit():
                return
            try:
                with self._lock:
                    self._wait_clean()
                file = self._files[self._active]
                self._flush_store(sorted(file.keys))
                file.clear()
            except OSError as error:
                self._fail(error, ())

    def reset(self) -> None:
        """What was journaled so far is not replayed: the store was emptied."""
        with self._io:
            with self._lock:
                self._pending = []
                for file in self._files:
                    file.keys.clear()
            if self.failed:
                return
            try:
                with self._lock:
                    self._wait_clean()
                self._files[self._active].clear()
            except OSError as error:
                self._fail(error, ())

    def _wait_clean(self) -> None:
        """No file waits to be emptied. Called with the lock, which is given up meanwhile."""
        while self._full is not None:
            if self._broken is not None:
                raise self._broken
            if self._trouble is not None:
                trouble, self._trouble = self._trouble, None
                raise trouble
            self._lock.wait()

    def finish(self) -> None:
        """A clean end: the shards have everything, and the files are gone."""
        try:
            self.empty()
        except StoreError as error:
            logger.error("journal: %s; its files are left to the next start", error)
            self.close(remove=False)
        else:
            self.close(remove=True)

    def close(self, *, remove: bool) -> None:
        """No file is open.

        :param remove: the files are gone too: for after ``empty``.
        """
        with self._io:
            if self.failed:
                return
            with self._lock:
                self.failed = True
            if remove:
                logger.info("cleaning journal file")
                self._remove_files()
            else:
                for file in self._files:
                    file.close()

    def _remove_files(self) -> None:
        for file in self._files:
            try:
                file.remove()
            except OSError as error:
                logger.error("the journal file %s cannot be removed (%s)", file.path, error.strerror)


class JournaledStore(ObjectStore):
    """A store whose changes are durable as soon as the journal has them."""

    def __init__(self, inner: ObjectStore, journal: Journal) -> None:
        self.inner = inner
        self._journal = journal
        journal.serve(self._flush)

    def _flush(self, keys: Iterable[ShardKey]) -> None:
        self.inner.sync(keys)

    def _settle(self, number: int, key: ShardKey) -> None:
        """The change with that entry is durable, by the journal or without it."""
        if not number or not self._journal.commit(number):
            self.inner.sync([key])

    @property
    def flushes_apart(self) -> bool:
        """One append makes all of them durable, as long as there is a journal."""
        return self._journal.failed and self.inner.flushes_apart

    # ---- changes

    def create(
        self, key: ShardKey, data: Buffer, *, offset_bytes: int, size_bytes: int, sparse: bool, durable: bool
    ) -> None:
        inner, journal = self.inner, self._journal
        number = 0
        if entry_bytes(len(data)) <= journal.entry_bytes_max:
            number = journal.add(
                JournalKind.STORE, key, data, offset=offset_bytes, create=True, size_bytes=size_bytes, applying=True
            )
        try:
            journaled = bool(number) and journal.commit(number)
            try:
                inner.create(
                    key, data, offset_bytes=offset_bytes, size_bytes=size_bytes, sparse=sparse, durable=not journaled
                )
            except BaseException:
                # What is there is as it was before; the entry must not come true later.
                inner.sync([key])
                self._leave(key)
                raise
        finally:
            journal.applied(number)
        if not journaled:
            self._leave(key)
        elif journal.failed:
            inner.sync([key])  # the journal went while the file was made

    def _leave(self, key: ShardKey) -> None:
        """What was journaled of the shard is not replayed."""
        number = self._journal.add(JournalKind.FORGET, key)
        if number:
            self._journal.commit(number)

    def write(self, key: ShardKey, data: Buffer, *, offset_bytes: int, durable: bool) -> None:
        self.inner.write(key, data, offset_bytes=offset_bytes, durable=False)
        if entry_bytes(len(data)) > self._journal.entry_bytes_max:
            self.inner.sync([key])
            self._leave(key)
            return
        # Lent: who waits for the entry here still has it when it is written, everybody else may not.
        lent = data if durable else bytes(data)
        number = self._journal.add(JournalKind.STORE, key, lent, offset=offset_bytes)
        if durable:
            self._settle(number, key)

    def remove(self, key: ShardKey) -> None:
        self.inner.remove(key)
        self._journal.add(JournalKind.REMOVE, key)

    def retire(self, key: ShardKey, epoch: int) -> None:
        self._set_apart(key, lambda: self.inner.retire(key, epoch))

    def revive(self, key: ShardKey, epoch: int) -> None:
        self._set_apart(key, lambda: self.inner.revive(key, epoch))

    def _set_apart(self, key: ShardKey, change: Callable[[], None]) -> None:
        if not self._journal.mentions(key):
            change()
            return
        self.inner.sync([key])
        change()
        # Nobody need wait for it: a replay that does not know of the change brings back what was there before.
        self._journal.add(JournalKind.FORGET, key)
        if self._journal.pending > PENDING_MAX:
            self._journal.commit()

    def wipe(self) -> None:
        self.inner.wipe()
        self._journal.reset()

    def sync(self, keys: Iterable[ShardKey]) -> None:
        if not self._journal.commit():
            self.inner.sync(keys)

    # ---- the rest is the store's

    def read_into(self, key: ShardKey, buffer: memoryview, *, offset_bytes: int) -> int:
        return self.inner.read_into(key, buffer, offset_bytes=offset_bytes)

    def try_read_into(self, key: ShardKey, buffer: memoryview, *, offset_bytes: int) -> int | None:
        return self.inner.try_read_into(key, buffer, offset_bytes=offset_bytes)

    def exists(self, key: ShardKey) -> bool:
        return self.inner.exists(key)

    def size(self, key: ShardKey) -> int:
        return self.inner.size(key)

    def keys(self) -> Iterator[ShardKey]:
        return self.inner.keys()

    def stale_keys(self) -> Iterator[tuple[ShardKey, int]]:
        return self.inner.stale_keys()

    def digest(self, key: ShardKey, *, epoch: int | None = None, cache: bool = False) -> bytes:
        return self.inner.digest(key, epoch=epoch, cache=cache)

    def read_stale_into(self, key: ShardKey, epoch: int, buffer: memoryview, *, offset_bytes: int) -> int:
        return self.inner.read_stale_into(key, epoch, buffer, offset_bytes=offset_bytes)

    def stale_size(self, key: ShardKey, epoch: int) -> int:
        return self.inner.stale_size(key, epoch)

    def purge_stale(self) -> None:
        self.inner.purge_stale()

    def usage(self) -> Usage:
        return self.inner.usage()

    def disks(self) -> tuple[DiskInfo, ...]:
        return self.inner.disks()

    def add_disk(self, path: str) -> None:
        self.inner.add_disk(path)

    def remove_disk(self, path: str) -> None:
        self.inner.remove_disk(path)

    def reweigh(self) -> Usage:
        return self.inner.reweigh()

    def close(self) -> None:
        self.inner.close()


def left_journal(directory: str) -> bool:
    """A former run left a journal in this directory."""
    return any(os.path.exists(path) for path in file_paths(directory))


def start_journal(config: SheepConfig, store: ObjectStore, *, block_size_shift: int) -> Journal | None:
    """What a crash left in the journal is in the store, and an empty journal is ready if ``config`` asks for one.

    Without ``-j`` a journal that is found in the base directory is replayed and removed: what was acknowledged must
    not be lost because an option was left out.

    :param block_size_shift: the cluster's default, 0 where it is not known.
    :raises ConfigError: the directory is missing, full or another sheep's, or what was left cannot be replayed.
    """
    options = config.journal
    directory = config.base if options is None else options.directory or config.base
    if not os.path.isdir(directory):
        raise ConfigError(f"the journal directory {directory} does not exist")
    if left_journal(directory):
        journal_files.refuse_if_used(directory)
        if options is not None and options.skip:
            logger.warning("the journal in %s is not replayed", directory)
        else:
            journal_files.replay(directory, store, block_size_shift=block_size_shift or DEFAULT_SHIFT)
    if options is not None:
        return Journal(directory, options.size_bytes)
    for path in file_paths(directory):
        if os.path.exists(path):
            logger.warning("removing %s, which a former run with a journal left", path)
            os.unlink(path)
    return None
