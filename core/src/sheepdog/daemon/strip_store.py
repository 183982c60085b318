"""Small changes without ``-j``: a log of the store's own, for strips and for whole copies.

*Strips.* A change of a strip in place needs what was there before, so that it can be taken back. A small one is logged
with its old and its new bytes: one sequential write for all that are waiting, and the strip itself is flushed when a
file of the log is full. Of a large one the old bytes are logged, then the strip is written and flushed. With ``-n``
nothing is flushed: the entries lie in the page cache, where the death of the process leaves them.

*Whole copies.* A small write is made in the page cache and then logged; it is durable when its entry is. That costs one
flush for all that are waiting, instead of one for each object. With ``-n`` copies are not logged. A larger write goes
*past* the log: the copy itself is flushed. Where the log has changes of the copy that a replay would make again, the
log is told to forget them when the copy has them.

The files (``strip_log0`` and ``strip_log1`` in the base directory, a name older than their second use) are made with
the first such change, and gone after a clean end. Whatever else happens to a shard (it is made anew, removed, set
aside) sees to it that nothing logged of it is replayed later.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from sheepdog.contracts.incoming import Incoming
from sheepdog.contracts.store import REPLICA, Buffer, ObjectStore, ShardKey
from sheepdog.daemon import journal_files
from sheepdog.daemon.journal import DEFAULT_SHIFT, Journal
from sheepdog.daemon.journal_files import STRIPS, Left, file_paths, left_journal
from sheepdog.daemon.journaled_store import JournaledStore
from sheepdog.daemon.store_wrapper import StoreWrapper
from sheepdog.daemon.strip_memory import Record, StripChange, StripMemory
from sheepdog.daemon.summed_incoming import WrappedIncoming
from sheepdog.errors import ConfigError, StoreError
from sheepdog.model.journal_entry import JournalKind, entry_bytes

logger = logging.getLogger(__name__)

LOG_BYTES = 64 << 20  # both files
ROOM_BYTES = 1 << 30  # must be free for a log that only copies want
REDO_BYTES_MAX = 64 << 10  # of one strip; above, flushing the strip costs less than writing it twice
COPY_BYTES_MAX = 16 << 10  # of a write to a whole copy; above, a group commit of the copies costs less
INLINE_BYTES_MAX = 64 << 10


class StripLog:
    """The journal of strips and of small writes, made when it is needed. Thread-safe."""

    def __init__(self, directory: str, *, synced: bool, size_bytes: int = LOG_BYTES) -> None:
        """
        :param synced: entries survive power loss, otherwise the end of the process.
        """
        self._directory = directory
        self.synced = synced
        self.of_copies = synced
        """Small writes to whole copies are logged, too."""
        self._size_bytes = size_bytes
        self._lock = threading.Lock()
        self._made: Journal | None = None
        self._given_up = False
        self._scarce: bool | None = None  # not looked at yet
        self._flush: Callable[[Iterable[ShardKey]], None] = _flush_nothing
        self.left = Left()

    def replay(self, store: ObjectStore, *, block_size_shift: int) -> None:
        """What a crash left is in the store, and in ``left``.

        :raises ConfigError: it cannot be read, or there is no space.
        """
        if left_journal(self._directory, STRIPS):
            journal_files.replay(
                self._directory, store, block_size_shift=block_size_shift or DEFAULT_SHIFT, name=STRIPS, left=self.left
            )

    def begin(self, left: Left | None = None) -> None:
        """What was left, here or (``left``) in a journal for everything, is in the new log, if it is anything.

        :raises ConfigError: there is no space.
        """
        if left is not None:
            self.left.strips = left.strips
        if self._made is None and (left_journal(self._directory, STRIPS) or self.left.strips.marks):
            self._made = self._make()

    def give_up(self) -> None:
        """What a crash left is older than what is in the store: something else, the original for one, has used it."""
        for path in file_paths(self._directory, STRIPS):
            if os.path.exists(path):
                os.rename(path, f"{path}.unused")
                logger.warning("something else has used %s since %s was written, it is %s.unused now",
                               self._directory, path, path)  # fmt: skip

    def remove(self) -> None:
        """No file is there; for after something else has taken over what they say."""
        for path in file_paths(self._directory, STRIPS):
            if os.path.exists(path):
                os.unlink(path)

    def _make(self) -> Journal:
        made = Journal(self._directory, self._size_bytes, name=STRIPS, synced=self.synced, left=self.left)
        made.serve(self._flush)
        return made

    def _cramped(self) -> bool:
        """Whole copies can do without a log, and do where it would take space that objects may need soon."""
        if self._scarce is None:
            status = os.statvfs(self._directory)
            self._scarce = status.f_bavail * status.f_frsize < ROOM_BYTES
            if self._scarce:
                logger.info("%s has less than 1 GiB of space: small writes flush the objects", self._directory)
        return self._scarce

    def serve(self, flush: Callable[[Iterable[ShardKey]], None]) -> None:
        """``flush`` makes durable what was applied to some shards."""
        self._flush = flush
        if self._made is not None:
            self._made.serve(flush)

    @property
    def made(self) -> Journal | None:
        """The journal if there is one already."""
        return self._made

    def get(self, *, for_copies: bool = False) -> Journal | None:
        """The journal; ``None`` when there cannot be one, or only copies want it and space is scarce."""
        with self._lock:
            if self._made is None and not self._given_up and not (for_copies and self._cramped()):
                try:
                    self._made = self._make()
                except ConfigError as error:
                    logger.error("%s; no log: changes of strips cannot be taken back after a crash", error)
                    self._given_up = True
            return self._made

    def finish(self) -> None:
        """A clean end: the shards have everything, and the files are gone."""
        if self._made is not None:
            self._made.finish()


class StripStore(JournaledStore):
    """A store with a journal of its strips and of small writes to its whole copies."""

    def __init__(self, inner: ObjectStore, log: StripLog) -> None:
        StoreWrapper.__init__(self, inner)
        self.try_read_into = inner.try_read_into  # type: ignore[method-assign]  # saves a call per read
        self._try_write_inner = inner.try_write
        self._dirty = {}
        self._past_lock = threading.Lock()  # held for moments
        self._past_log: dict[ShardKey, object] = {}
        """Whole copies changed past the log since they were flushed, with what tells one change from the next."""
        self._log = log
        self.strips_left = log.left.strips if log.made is None else log.made.strips()
        log.serve(self._flush if log.synced else _flush_nothing)

    @property
    def _journal(self) -> Journal:
        journal = self._log.made
        assert journal is not None, "used only where there is one"
        return journal

    @property
    def _synced(self) -> bool:
        return self._log.synced

    def _void(self, key: ShardKey, *, gone: bool = False) -> None:
        """Nothing journaled of the shard is replayed over what comes now.

        :param gone: nor is the last change of it taken back.
        """
        journal = self._log.made
        if journal is None or journal.failed:
            return
        number = journal.drop_strip(key) if gone else 0
        if journal.mentions(key):
            if self._log.synced:
                self.inner.sync([key])
            journal.forget(key)
        elif not number:
            return
        journal.commit()

    # ---- changes

    def create(
        self, key: ShardKey, data: Buffer, *, offset_bytes: int, size_bytes: int, sparse: bool, durable: bool
    ) -> None:
        make = partial(self.inner.create, key, data, offset_bytes=offset_bytes, size_bytes=size_bytes, sparse=sparse)
        self._make_anew(key, make, durable=durable)

    def receive(self, key: ShardKey, size_bytes: int, *, sparse: bool) -> Incoming:
        inner = self.inner.receive(key, size_bytes, sparse=sparse)
        return WrappedIncoming(inner, partial(self._make_anew, key, inner.finish))

    def _make_anew(self, key: ShardKey, make: Callable[..., None], *, durable: bool) -> None:
        if key.index != REPLICA:
            self._void(key, gone=True)
        make(durable=durable)
        if key.index == REPLICA and not durable:
            self._note_past(key)
        self._forget_copy(key)

    def _note_past(self, key: ShardKey) -> None:
        """The shard was changed past the log. After the change: of a flush meanwhile nobody knows what it found."""
        if self._log.of_copies:
            with self._past_lock:
                self._past_log[key] = object()

    def _forget_copy(self, key: ShardKey) -> None:
        """A whole copy has become another one, or is gone: nothing logged of the former one is replayed.

        Not earlier: until then, changes that were acknowledged may be nowhere but in the log.
        """
        journal = self._log.made
        if key.index == REPLICA and journal is not None and journal.mentions(key):
            journal.forget(key)
            journal.commit()

    def write(self, key: ShardKey, data: Buffer, *, offset_bytes: int, durable: bool) -> None:
        if key.index != REPLICA:
            self._void(key)
            self.inner.write(key, data, offset_bytes=offset_bytes, durable=durable)
            return
        journal = self._log.get(for_copies=True) if self._log.of_copies else None
        logged = journal is not None and journal.mentions(key)
        if journal is not None and len(data) <= (REDO_BYTES_MAX if logged else COPY_BYTES_MAX):
            # Past the log, what follows logged changes costs a flush of the copy and a note that the log forgets it.
            self.inner.write(key, data, offset_bytes=offset_bytes, durable=False)
            if not journal.add(JournalKind.STORE, key, bytes(data), offset=offset_bytes):  # lent
                self._note_past(key)
            if durable:
                self.sync((key,))
            return
        self.inner.write(key, data, offset_bytes=offset_bytes, durable=durable and not logged)
        if logged:
            self.inner.sync((key,))  # with what was logged, which is not to be replayed over these bytes
            self._forget_copy(key)
        elif not durable:
            self._note_past(key)

    def try_write(self, key: ShardKey, data: Buffer, *, offset_bytes: int) -> bool:
        if key[1] != REPLICA:
            return ObjectStore.try_write(self, key, data, offset_bytes=offset_bytes)
        if not self._log.of_copies:
            return self._try_write_inner(key, data, offset_bytes=offset_bytes)
        journal = self._log.made
        if len(data) > REDO_BYTES_MAX or not self._try_write_inner(key, data, offset_bytes=offset_bytes):
            return False
        if not (
            journal is not None
            and (len(data) <= COPY_BYTES_MAX or journal.mentions(key))
            and journal.add(JournalKind.STORE, key, bytes(data), offset=offset_bytes)  # lent
        ):
            self._note_past(key)  # whoever flushes it makes a log
        return True

    def remove(self, key: ShardKey) -> None:
        if key.index != REPLICA:
            self._void(key, gone=True)
        self.inner.remove(key)
        if key.index == REPLICA:
            self._note_past(key)
        self._forget_copy(key)

    def retire(self, key: ShardKey, epoch: int) -> None:
        self._void(key)
        self.inner.retire(key, epoch)

    def revive(self, key: ShardKey, epoch: int) -> None:
        self._void(key)
        self.inner.revive(key, epoch)

    def put_back(self, key: ShardKey, old: int, *, durable: bool) -> bool:
        self._void(key)
        return self.inner.put_back(key, old, durable=durable)

    def wipe(self) -> None:
        self.inner.wipe()
        self._dirty.clear()
        self._past_log.clear()
        if self._log.made is not None:
            self._log.made.reset()

    def sync(self, keys: Iterable[ShardKey]) -> None:
        log = self._log
        if not log.of_copies:
            self.inner.sync(keys)
            return
        changes = {key: self._past_log.get(key) for key in keys}
        past = [key for key, change in changes.items() if change is not None or key.index != REPLICA]
        journal = log.get(for_copies=True)
        if journal is None or not journal.commit():
            past = list(changes)
        if past:
            self.inner.sync(past)
            with self._past_lock:
                for key in past:
                    # Only what was noted before the flush: another change may have come during it.
                    if changes[key] is not None and self._past_log.get(key) is changes[key]:
                        del self._past_log[key]

    @property
    def flushes_apart(self) -> bool:
        journal = self._log.made if self._log.of_copies else None
        return (journal is None or journal.failed) and self.inner.flushes_apart

    # ---- strips

    def write_strips(self, changes: Sequence[StripChange]) -> list[StoreError | None]:
        if self._log.get() is None:
            return [self._change(change, False) for change in changes]
        return super().write_strips(changes)

    def ready_for(self, changes: Sequence[StripChange]) -> bool:
        journal = self._log.made
        if self._log.synced or journal is None:
            return False
        length = sum(change.size_bytes for change in changes)
        if not all(self.inner.ready(change.record.key) for change in changes):
            return False
        # Old bytes, and what is around them in an entry.
        return length <= INLINE_BYTES_MAX and journal.ready(length + len(changes) * entry_bytes(4096))

    def _before_unjournaled(self, key: ShardKey) -> None:
        if self._log.synced and self._journal.mentions(key):
            self.inner.sync([key])
            self._journal.add(JournalKind.FORGET, key)  # goes with what undoes the change

    def _redo(self, change: StripChange) -> bool:
        return self._log.synced and change.size_bytes <= REDO_BYTES_MAX

    def _change(self, change: StripChange, journaled: bool) -> StoreError | None:
        key = change.record.key
        try:
            self._apply(change, durable=self._log.synced and not journaled)
            if journaled and self._journal.failed:
                self.inner.sync([key])
        except StoreError as error:
            self._give_up(change)
            return error
        return None

    def _give_up(self, change: StripChange) -> None:
        if self._log.made is not None:
            super()._give_up(change)
        elif change.staged is not None:
            self.inner.unstage(change.staged)

    def meet_primary(self, primary: int, low_water: int) -> None:
        if self._log.get() is not None:
            super().meet_primary(primary, low_water)

    def keep_strip(self, oid: int, number: int) -> None:
        if self._log.get() is not None:
            super().keep_strip(oid, number)

    def doubt_strip(self, record: Record) -> None:
        if self._log.made is not None:
            super().doubt_strip(record)

    def drop_strip(self, key: ShardKey) -> None:
        if self._log.made is not None:
            super().drop_strip(key)

    def close(self) -> None:
        if self._log.made is None or self._log.made.gone:
            self.inner.release()
        self.inner.close()


def strips_of(store: ObjectStore) -> StripMemory:
    """What is known of strips by a store that was just opened."""
    return store.strips_left.copy() if isinstance(store, JournaledStore) else StripMemory()


def _flush_nothing(_: Iterable[ShardKey]) -> None:
    """Nothing is flushed."""
