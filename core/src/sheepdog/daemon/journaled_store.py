"""A store in front of which a journal makes changes durable (``journal``, which tells the rules of order)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from sheepdog.contracts.store import Buffer, ObjectStore, ShardKey
from sheepdog.daemon.journal import Journal
from sheepdog.daemon.store_wrapper import StoreWrapper
from sheepdog.daemon.strip_memory import Record, StripChange
from sheepdog.errors import StoreError
from sheepdog.model.journal_entry import JournalKind, entry_bytes

PENDING_MAX = 1024  # entries that nobody waits for


class JournaledStore(StoreWrapper):
    """A store whose changes are durable as soon as the journal has them."""

    def __init__(self, inner: ObjectStore, journal: Journal) -> None:
        super().__init__(inner)
        self._try_write_inner = inner.try_write
        self._given = journal
        # Changed in place since the last flush, with what tells one change from the next. Noted when it is made: of a
        # flush that ran meanwhile nobody knows what it found.
        self._dirty: dict[ShardKey, object] = {}
        self.strips_left = journal.strips()  # what is known of strips at the start
        journal.serve(self._flush)

    @property
    def _journal(self) -> Journal:
        return self._given

    @property
    def _synced(self) -> bool:
        """What is journaled survives power loss."""
        return True

    def _flush(self, keys: Iterable[ShardKey]) -> None:
        changes = {key: self._dirty.get(key) for key in keys}
        self.inner.sync(changes)
        for key, change in changes.items():
            # Not before: who is about to set the old content aside must not take it for flushed.
            if change is not None and self._dirty.get(key) is change:
                del self._dirty[key]

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
        journal.drop_strip(key)
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
                # Nothing changed; the entry must not come true later.
                inner.sync([key])
                self._leave(key)
                raise
        finally:
            self._dirty[key] = object()
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
        try:
            self.inner.write(key, data, offset_bytes=offset_bytes, durable=False)
        finally:
            self._dirty[key] = object()
        if entry_bytes(len(data)) > self._journal.entry_bytes_max:
            self.inner.sync([key])
            self._leave(key)
            return
        # Lent: who waits for the entry here still has it when it is written, everybody else may not.
        lent = data if durable else bytes(data)
        number = self._journal.add(JournalKind.STORE, key, lent, offset=offset_bytes)
        if durable:
            self._settle(number, key)

    def try_write(self, key: ShardKey, data: Buffer, *, offset_bytes: int) -> bool:
        journal = self._journal
        if entry_bytes(len(data)) > journal.entry_bytes_max:
            return False
        try:
            if not self._try_write_inner(key, data, offset_bytes=offset_bytes):
                return False
        finally:
            self._dirty[key] = object()
        journal.add(JournalKind.STORE, key, bytes(data), offset=offset_bytes)
        return True

    def remove(self, key: ShardKey) -> None:
        self.inner.remove(key)
        self._journal.drop_strip(key)
        self._journal.add(JournalKind.REMOVE, key)

    # ---- strips

    def write_strips(self, changes: Sequence[StripChange]) -> list[StoreError | None]:
        """Bytes of strips are replaced, and can be put back after a crash; what became of each.

        Durable as ``sync`` is; no shard comes twice.
        """
        journal = self._journal
        redos = [change.staged is not None or self._redo(change) for change in changes]
        for change, redo in zip(changes, redos, strict=True):
            if not redo:
                self._before_unjournaled(change.record.key)
            elif change.staged is not None and self._synced and change.record.key in self._dirty:
                self._flush([change.record.key])  # what is kept is to be whole after a power loss
        numbers = journal.add_strips(changes, redos)
        freed = journal.freed()
        try:
            try:
                logged = any(numbers) and journal.commit(max(numbers))
            except StoreError as error:
                for change in changes:
                    self._give_up(change)
                journal.not_yet(freed)
                return [error] * len(changes)
            if freed:
                self.inner.release(freed)
            redone = [redo and bool(number) for redo, number in zip(redos, numbers, strict=True)]
            results = [self._change(change, redo and logged) for change, redo in zip(changes, redone, strict=True)]
            finished = [
                journal.finish_strip(change.record)
                for change, number, redo, result in zip(changes, numbers, redone, results, strict=True)
                if number and not redo and result is None
            ]
            if any(finished):
                # Only then may the change count as made here, which it must before it is answered.
                journal.commit(max(finished))
            return results
        finally:
            journal.applied(*numbers)

    def ready_for(self, changes: Sequence[StripChange]) -> bool:
        """Whether ``write_strips`` would wait for nobody and no disk."""
        return False

    def _before_unjournaled(self, key: ShardKey) -> None:
        """A strip is about to be changed outside of the journal, which must not replay older changes over that."""

    def _redo(self, change: StripChange) -> bool:
        """Whether the new bytes are journaled as well."""
        return True

    def _change(self, change: StripChange, journaled: bool) -> StoreError | None:
        key = change.record.key
        try:
            self._apply(change, durable=False)
            if not journaled or self._journal.failed:
                self.inner.sync([key])
                self._leave(key)
        except StoreError as error:
            self._give_up(change)
            return error
        return None

    def _apply(self, change: StripChange, *, durable: bool) -> None:
        if change.staged is not None:
            self.inner.exchange(change.staged)
            if durable:
                self.inner.sync([change.record.key])
            return
        try:
            for offset, data in change.pieces:
                self.inner.write(change.record.key, data, offset_bytes=offset, durable=durable)
        finally:
            if not durable:
                self._dirty[change.record.key] = object()

    def _give_up(self, change: StripChange) -> None:
        """A change of a strip failed: nothing of it comes true later."""
        key = change.record.key
        self._journal.drop_strip(key)
        self._journal.add(JournalKind.FORGET, key)
        if change.staged is not None:
            self.inner.unstage(change.staged)

    def meet_primary(self, primary: int, low_water: int) -> None:
        """It is known, also after a crash, that changes of strips are to come from there."""
        self._journal.meet_primary(primary, low_water)
        self._journal.commit()

    def keep_strip(self, oid: int, number: int) -> None:
        """It is known, also after a crash, that this change stays."""
        self._journal.keep_strip(oid, number)
        self._journal.commit()

    def doubt_strip(self, record: Record) -> None:
        """Also after a crash it is known that the strip may be on its way back to what it was."""
        self._journal.doubt_strip(record)
        self._journal.commit()

    def put_back(self, key: ShardKey, old: int, *, durable: bool) -> bool:
        self.inner.sync([key])
        self._leave(key)
        return self.inner.put_back(key, old, durable=True)

    def drop_strip(self, key: ShardKey) -> None:
        """The last change of the strip has been taken back."""
        self._journal.drop_strip(key)

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
        self._dirty.clear()
        self._journal.reset()

    def sync(self, keys: Iterable[ShardKey]) -> None:
        if not self._journal.commit():
            self.inner.sync(keys)

    def close(self) -> None:
        if self._journal.gone:
            self.inner.release()  # nobody could ask for it
        self.inner.close()
