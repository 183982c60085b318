"""The write journal (``-j``): what makes small writes durable with one sequential write for all that are waiting.

A ``JournaledStore`` stands in front of the real store. Every change is applied to the page cache and appended to the
journal; it is durable when its entry is. Entries of concurrent changes leave in one ``O_DSYNC`` write (group commit):
the first who wants to be sure writes for all. When one of the two files is full the other one takes over, and a
thread flushes the shards named in the full one, then empties it; a writer that needs it sooner waits.

Order. Entries of one shard stand in the order of its changes, because a shard has one mutator at a time. Writes in
place are applied first and journaled then. Creates are journaled first: a new file whose name survives a power loss
and whose bytes do not would look like an object. Until such a file is made, the journal file with its entry is not
emptied.

Changes of erasure-coded strips that may have to be taken back (``write_strips``) are journaled first, together with
what undoes them: one write makes both durable, before the strip itself is touched. Whatever the journal must know of
such changes when one file is given up stands at the begin of the other (``strip_memory``). ``strip_store`` is what
serves strips where there is no journal for everything.

A shard that is set aside or brought back from there leaves the journal: an entry says that what was journaled before
must not be replayed. When the journal cannot be written, everything is flushed, the files are removed and the daemon
goes on without.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

from sheepdog.contracts.store import Buffer, ObjectStore, ShardKey
from sheepdog.daemon import journal_files
from sheepdog.daemon.config import SheepConfig
from sheepdog.daemon.journal_files import JOURNAL, JournalFile, Left, file_paths, left_journal
from sheepdog.daemon.strip_memory import Record, StripChange, StripMemory, pack_known
from sheepdog.errors import ConfigError, StoreError
from sheepdog.model.journal_entry import JournalEntry, JournalKind, entry_bytes

logger = logging.getLogger(__name__)

RETRY_S = 0.1  # after a disk refused to flush
DEFAULT_SHIFT = 22  # of object sizes
_UNFLUSHED = frozenset({JournalKind.STORE, JournalKind.REMOVE, JournalKind.UNDO})
_CHANGES = _UNFLUSHED | {JournalKind.FORGET}
_key_of = tuple.__new__  # a third of what the generated constructor takes
_META_BYTES = 4096  # above what a record has besides the old bytes
PENDING_MAX = 1024  # entries that nobody waits for


class Journal:
    """Two files and the entries on their way to them. Thread-safe; ``add`` never waits for a disk."""

    def __init__(
        self, directory: str, size_bytes: int, *, name: str = JOURNAL, synced: bool = True, left: Left | None = None
    ) -> None:
        """Both files exist and are empty, but for what ``left`` says of strips.

        :param name: of the files.
        :param synced: entries survive power loss, otherwise the end of the process.
        :param left: from the replay of the same files.
        :raises ConfigError: the directory is missing, or has no space for them.
        """
        if not os.path.isdir(directory):
            raise ConfigError(f"the journal directory {directory} does not exist")
        left = left or Left()
        self._strips = self._collecting(left.strips)
        self._number = left.number  # of the last entry that was added
        self._active = 0
        self.failed = False
        self.gone = False  # no file is left that could be replayed
        self.entry_bytes_max = size_bytes // 2
        self._mutex = threading.RLock()  # of what follows; held for moments
        self._lock = threading.Condition(self._mutex)
        self._pending: list[JournalEntry] = []
        self._applying: set[int] = set()  # entries whose change is not made yet
        self._full: JournalFile | None = None  # waits to be emptied
        self._cleaner: threading.Thread | None = None
        self._trouble: StoreError | None = None  # why it could not be, for now
        self._broken: OSError | None = None  # why it never will be
        self._io = threading.RLock()  # held by who writes; taken before ``_lock``
        self._durable = 0  # entries up to this number are on stable storage
        self._flush_store: Callable[[Iterable[ShardKey]], None] = lambda _: None
        paths = file_paths(directory, name)
        zeroed = name == JOURNAL  # what the original may replay
        self._files = [JournalFile(paths[left.first], size_bytes // 2, synced=synced, zeroed=zeroed)]
        self._carry(self._files[0])  # before the other file, which says the same, is overwritten
        try:
            self._files.append(JournalFile(paths[1 - left.first], size_bytes // 2, synced=synced, zeroed=zeroed))
        except ConfigError:
            if not self._strips.records:  # what is known of strips must not go with the files
                self._remove_files()
            raise

    def serve(self, flush_store: Callable[[Iterable[ShardKey]], None]) -> None:
        """``flush_store`` makes everything durable that was applied to some shards."""
        self._flush_store = flush_store

    @staticmethod
    def _collecting(strips: StripMemory) -> StripMemory:
        made = strips.copy()
        made.freed = []
        return made

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
        with self._mutex:
            if self.failed:
                return 0
            self._number = number = self._number + 1
            self._pending.append(JournalEntry(kind, key[0], offset, data, create, key[1], True, size_bytes, number))
            if applying:
                self._applying.add(number)
            return number

    def forget(self, key: ShardKey) -> None:
        """Nothing added so far of the shard, which is flushed, removed or set aside, is replayed once this is durable.

        The shard need not be flushed again before the files are emptied.
        """
        with self._lock:
            for file in self._files:
                file.keys.discard(key)
            self.add(JournalKind.FORGET, key)

    def applied(self, *numbers: int) -> None:
        """The changes of entries that were added with ``applying`` are made."""
        with self._lock:
            self._applying.difference_update(numbers)
            self._lock.notify_all()

    def add_strips(self, changes: Sequence[StripChange], redos: Sequence[bool]) -> list[int]:
        """Entries that undo changes of strips, and with ``redo`` make them; their numbers, 0 where there is none.

        ``applied`` tells when they are made. The entries stand side by side, so that nobody waits for his own.
        """
        numbers = []
        with self._lock:
            for change, redo in zip(changes, redos, strict=True):
                length = entry_bytes(change.record.size_bytes + change.size_bytes + _META_BYTES)
                if self.failed or length > self.entry_bytes_max:
                    numbers.append(0)
                    continue
                record = change.record._replace(whole=redo)
                self._strips.note(record, change.low_water)
                exchange = change.staged is not None
                data = record.pack(change.low_water, change.pieces if redo else (), redo=exchange)
                numbers.append(self.add(JournalKind.UNDO, record.key, data, applying=True))
        return numbers

    def freed(self) -> list[tuple[ShardKey, int]]:
        """What stores kept for changes that nobody takes back, whoever replays the entries that were added so far."""
        with self._lock:
            self._strips.drop_complete_exchanges()
            freed, self._strips.freed = self._strips.freed or [], []
            return freed

    def not_yet(self, freed: Iterable[tuple[ShardKey, int]]) -> None:
        """Those entries were not written; the contents are told of again."""
        with self._lock:
            self._strips.freed = [*(self._strips.freed or ()), *freed]

    def finish_strip(self, record: Record) -> int:
        """A change that the journal does not make is made; the number of the entry."""
        with self._lock:
            self._strips.finish(record.key, record.number)
            return self.add(JournalKind.DONE, record.key, offset=record.number)

    def doubt_strip(self, record: Record) -> int:
        """A change is about to be taken back: the strip may not have it as a whole any more; number of the entry."""
        with self._lock:
            self._strips.doubt(record.key, record.number)
            return self.add(JournalKind.DONE, record.key, offset=record.number, create=True)

    def meet_primary(self, primary: int, low_water: int) -> None:
        """Changes of strips are to come from there."""
        with self._lock:
            self._strips.mark(primary, low_water)
            self.add(JournalKind.STRIPS, ShardKey(0), pack_known({primary: low_water}, {}))

    def keep_strip(self, oid: int, number: int) -> None:
        """A change of strips was decided to stay."""
        with self._lock:
            self._strips.keep(oid, number)
            self.add(JournalKind.STRIPS, ShardKey(0), pack_known({}, {oid: number}))

    def drop_strip(self, key: ShardKey) -> int:
        """The last change of that strip is not taken back any more; the number of the entry, 0 when nothing is new."""
        with self._lock:
            record = self._strips.records.get(key.oid)
            if record is None or record.key != key:
                return 0
            self._strips.drop(key.oid)
            return self.add(JournalKind.DROPPED, key)

    def strips(self) -> StripMemory:
        """What is known of strips, for somebody else to use."""
        with self._lock:
            return self._strips.copy()

    def mentions(self, key: ShardKey) -> bool:
        """Whether a replay would touch the shard."""
        with self._lock:
            return any(key in file.keys for file in self._files) or any(
                (entry.oid, entry.index) == key and entry.kind in _CHANGES for entry in self._pending
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
        if number is None:
            number = self._number
        while True:
            with self._io:
                if self.failed:
                    return False
                if number <= self._durable:
                    return True
                with self._lock:
                    batch, self._pending = self._pending, []
                try:
                    if self._broken is not None:
                        raise self._broken
                    if self._write(batch):
                        return True
                except OSError as error:
                    self._fail(error, batch)
                    return False
            # Not under the lock of writing: others need it to learn that they may make changes the full file waits for.
            with self._lock, suppress(OSError):  # who writes next takes a broken journal out of use
                try:
                    self._wait_clean(number)
                except StoreError:
                    # Who lent the data is told of the error and may use its buffer again.
                    self._pending = [replace(entry, data=bytes(entry.data)) for entry in self._pending]
                    raise

    def ready(self, length: int) -> bool:
        """Whether ``commit`` of so many bytes more would wait for nobody."""
        if not self._io.acquire(blocking=False):
            return False
        try:
            with self._lock:
                length += sum(map(len, self._pending))
                return not self.failed and self._broken is None and self._files[self._active].room_for(length)
        finally:
            self._io.release()

    def _write(self, batch: list[JournalEntry]) -> bool:
        """The entries are on stable storage; False when some are pending again because both files are full."""
        done = 0
        while done < len(batch):
            file = self._files[self._active]
            buffers: list[Buffer] = []
            length = 0
            first = done
            keys: list[ShardKey] = []
            while done < len(batch):
                entry = batch[done]
                size = len(entry)
                if not file.room_for(length + size):
                    break
                before, behind = entry.pack_around(file.use)
                buffers += (before, entry.data, behind)
                length += size
                if entry.kind in _UNFLUSHED:
                    keys.append(_key_of(ShardKey, (entry.oid, entry.index)))
                done += 1
            if buffers:
                file.append(buffers, length)
                with self._lock:
                    file.keys.update(keys)
                    file.last_number = self._durable = batch[done - 1].number
                    self._lock.notify_all()
            if done < len(batch):
                assert done > first or file.end, f"an entry of {len(batch[done])} bytes fits no journal file"
                if not self._switch():
                    with self._lock:
                        self._pending[:0] = batch[done:]
                    return False
                self._carry(self._files[self._active])
        return True

    def _carry(self, file: JournalFile) -> None:
        """An empty file begins with what is known of strips: the other one may be emptied."""
        buffers: list[Buffer] = []
        length = 0
        left_out = 0
        with self._lock:
            known = list(self._strips.snapshot())
            needed = sum(entry_bytes(len(data)) for _, _, data in known)
            # At least half of it is for what comes.
            room = needed if file.grow(max(file.size_bytes, 2 * needed)) else file.size_bytes // 2
            for kind, key, data in known:
                if length + entry_bytes(len(data)) > room:
                    left_out += 1
                    continue
                self._number = number = self._number + 1
                entry = JournalEntry(kind, key.oid, 0, data, False, key.index, True, 0, number)
                before, behind = entry.pack_around(file.use)
                buffers += (before, data, behind)
                length += len(entry)
        if left_out:
            logger.warning("journal: %d changes of strips under way could not be taken back after a crash", left_out)
        if buffers:
            file.append(buffers, length)

    def _switch(self) -> bool:
        """The other file takes over and this one is being emptied; False when the other one is not empty yet."""
        with self._lock:
            if self._full is not None:
                return False
            self._full = self._files[self._active]
            self._active = 1 - self._active
            if self._cleaner is None or not self._cleaner.is_alive():
                self._cleaner = threading.Thread(target=self._clean, name="sheepdog-journal", daemon=True)
                self._cleaner.start()
            self._lock.notify_all()
            return True

    def _may_empty(self) -> bool:
        """All changes in the full file are made, or it need not be emptied any more. Called with the lock."""
        file = self._full
        return file is None or self.failed or all(number > file.last_number for number in self._applying)

    def _clean(self) -> None:
        """The thread: empties the full file, then ends."""
        while True:
            with self._lock:
                while not self._may_empty():
                    self._lock.wait()
                file = self._full
                if file is None or self.failed:
                    return
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
            changes = (entry for entry in (*batch, *self._pending) if entry.kind in _CHANGES)
            keys.update(ShardKey(entry.oid, entry.index) for entry in changes)
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
        while self.commit():
            with self._io:
                with self._lock:
                    waiting = self._full is not None
                if not waiting:
                    file = self._files[self._active]
                    self._flush_store(sorted(file.keys))
                    try:
                        file.clear()
                    except OSError as error:
                        self._fail(error, ())
                    return
            try:
                with self._lock:  # not under the lock of writing, see ``commit``
                    self._wait_clean()
            except OSError as error:
                with self._io:
                    self._fail(error, ())
                return

    def reset(self) -> None:
        """What was journaled so far is not replayed: the store was emptied."""
        with self._io:
            with self._lock:
                self._pending = []
                self._strips = self._collecting(StripMemory())
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

    def _wait_clean(self, number: int | None = None) -> None:
        """No file waits to be emptied, or that entry is durable. Called with the lock, which is given up meanwhile."""
        while self._full is not None and (number is None or number > self._durable):
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
                self._lock.notify_all()
            if remove:
                logger.info("cleaning journal file")
                self._remove_files()
            else:
                for file in self._files:
                    file.close()
        if self._cleaner is not None:
            self._cleaner.join()  # or it would empty a file that somebody else reads by now

    def _remove_files(self) -> None:
        self.gone = True
        for file in self._files:
            try:
                file.remove()
            except OSError as error:
                self.gone = False
                logger.error("the journal file %s cannot be removed (%s)", file.path, error.strerror)


def start_journal(
    config: SheepConfig,
    store: ObjectStore,
    *,
    block_size_shift: int,
    left: Left | None = None,
    leaving: Callable[[Left], None] | None = None,
) -> Journal | None:
    """What a crash left in the journal is in the store, and an empty journal is ready if ``config`` asks for one.

    Without ``-j`` a journal that is found in the base directory is replayed and removed: what was acknowledged must
    not be lost because an option was left out.

    :param block_size_shift: the cluster's default, 0 where it is not known.
    :param left: what is known of strips already; more is added.
    :param leaving: called with it before files that are not used any more are removed.
    :raises ConfigError: the directory is missing, full or another sheep's, or what was left cannot be replayed.
    """
    left = left or Left()
    options = config.journal
    directory = config.base if options is None else options.directory or config.base
    if not os.path.isdir(directory):
        raise ConfigError(f"the journal directory {directory} does not exist")
    if left_journal(directory):
        journal_files.refuse_if_used(directory)
        if options is not None and options.skip:
            logger.warning("the journal in %s is not replayed", directory)
        else:
            journal_files.replay(directory, store, block_size_shift=block_size_shift or DEFAULT_SHIFT, left=left)
    if options is not None:
        return Journal(directory, options.size_bytes, left=left)
    for path in file_paths(directory):
        if os.path.exists(path):
            if leaving is not None:
                leaving(left)
                leaving = None
            logger.warning("removing %s, which a former run with a journal left", path)
            os.unlink(path)
    return None
