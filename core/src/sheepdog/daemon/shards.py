"""The local store as the data path sees it: callbacks, order per shard, group commit.

What the page cache can answer runs inline on the event loop: reads that ``try_read_into`` answers, and writes of up to
``INLINE_BYTES_MAX``. Everything else goes to worker threads. A shard that a worker is changing has a *lane*: later
changes to it wait there in order, so the store sees one mutator per shard. Durable writes are put into the page cache
at once, and a flush follows, which is shared by all that arrive in time (group commit, ``gathering``).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from sheepdog.contracts.services import Clock, Executor
from sheepdog.contracts.store import Buffer, ObjectStore, ShardKey, Staged
from sheepdog.daemon.gathering import Gathering
from sheepdog.daemon.journaled_store import JournaledStore
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.spawner import AsyncFunction
from sheepdog.daemon.strip_memory import StripChange
from sheepdog.errors import ShardCorrupt, SheepdogError, StoreDeviceError, StoreError
from sheepdog.model.ids import is_data
from sheepdog.wire.results import Result

logger = logging.getLogger(__name__)

INLINE_BYTES_MAX = 64 * 1024
FLUSH_THREADS = 4  # for the files of one group commit
# Of strips being changed at a time, small ones and large ones: the journal has room for more than all of them, so that
# nobody who has an entry in one of its files waits for that file to be emptied.
SMALL_BYTES_MAX = 2 << 20
SMALL_COUNT_MAX = 256
LARGE_BYTES_MAX = 8 << 20

# result code, and the bytes read (or the result of the work) on success
Done: TypeAlias = Callable[[int, Any], None]
_Work: TypeAlias = Callable[[], Any]


class Shards:
    """Callback access to one sheep's store. All methods are called on the event loop."""

    def __init__(
        self,
        store: ObjectStore,
        executor: Executor,
        outbox: Outbox,
        clock: Clock,
        spawn: Callable[[AsyncFunction], None],
        *,
        durable: bool,
        direct: bool = False,
        device_failed: Callable[[StoreDeviceError], bool],
    ) -> None:
        """
        :param durable: answers to writes mean that the bytes survive power loss.
        :param direct: the store writes past the page cache, so that no write to a data object may run inline.
        :param device_failed: told of each disk error; says whether the sheep still has a disk: a retry can help then.
        """
        self.store = store
        self._executor = executor
        self._outbox = outbox
        self.durable = durable
        self._direct = direct
        self._device_failed = device_failed
        self._lanes: dict[ShardKey, deque[Callable[[], None]]] = {}
        self._commit: dict[ShardKey, list[Done]] = {}
        self._commits = Gathering(self._start_commit, outbox, clock, spawn)
        self._strips: deque[tuple[StripChange, Done]] = deque()
        self._large_strips: deque[tuple[StripChange, Done]] = deque()
        self._large_bytes = 0  # that are being written
        self._strips_deferred = False  # a look at the large ones
        self._small_strips = Gathering(self._start_small_strips, outbox, clock, spawn)
        # Recovery sets these: shards that must not be used yet, what it has to know, what is flushed before the data.
        self.gate: Callable[[ShardKey], bool] | None = None
        self.removed: Callable[[ShardKey], None] = _ignore
        self.created: Callable[[ShardKey], None] = _ignore
        self.before_flush: Callable[[], None] = _nothing
        self.corrupt: Callable[[ShardCorrupt], None] = _note
        """Told of every shard that was read and is not what was stored, also by those who read past this class."""

    def replace(self, store: ObjectStore) -> None:
        """Another store takes over (format). Work under way still ends on the old one."""
        self.store = store

    def busy(self, key: ShardKey) -> bool:
        """A worker is changing this shard."""
        return key in self._lanes

    def changing(self) -> list[ShardKey]:
        """All shards that workers are changing."""
        return list(self._lanes)

    def disk_failed(self, error: StoreDeviceError) -> bool:
        """A disk error met outside of here is handled; says whether a disk is left."""
        return self._device_failed(error)

    def _gated(self, key: ShardKey, done: Done) -> bool:
        if self.gate is not None and self.gate(key):
            done(Result.NETWORK_ERROR, None)
            return True
        return False

    # ---- reads

    def read(self, key: ShardKey, offset: int, length: int, done: Done) -> None:
        """``done(SUCCESS, bytes)``; what lies beyond the end of the shard reads as zeros."""
        if self.gate is not None and self._gated(key, done):
            return
        buffer = bytearray(length)
        view = memoryview(buffer)
        try:
            count = self.store.try_read_into(key, view, offset_bytes=offset)
        except SheepdogError as error:
            done(self._failed(error), None)
            return
        if count is not None:
            done(0, buffer)
            return

        def work() -> bytearray:
            self.store.read_into(key, view, offset_bytes=offset)
            return buffer

        self._submit(work, done)

    # ---- changes

    def write(self, key: ShardKey, offset: int, data: Buffer, done: Done) -> None:
        """Bytes of an existing shard are replaced."""
        result = self.try_write(key, offset, data)
        if result is None:
            if len(data) <= INLINE_BYTES_MAX:
                self._write_waiting(key, offset, data, done)
            else:
                self.write_plainly(key, offset, data, done)
        elif result or not self.durable:
            done(result, None)
        else:
            self.commit(key, done)

    def try_write(self, key: ShardKey, offset: int, data: Buffer) -> int | None:
        """Bytes of an existing shard are replaced, if that waits for nothing. ``None``: it would, and is for ``write``.

        The data path's short cut past callbacks. Where answers mean durable data, ``commit`` has to follow.
        """
        if self.gate is not None and self.gate(key):
            return Result.NETWORK_ERROR
        if len(data) > INLINE_BYTES_MAX or key in self._lanes or (self._direct and is_data(key[0])):
            return None
        try:
            return 0 if self.store.try_write(key, data, offset_bytes=offset) else None
        except SheepdogError as error:
            return self._failed(error)

    def write_plainly(self, key: ShardKey, offset: int, data: Buffer, done: Done) -> None:
        """As ``write``, always on a worker thread: the store may have to flush something first."""
        if self.gate is not None and self._gated(key, done):
            return
        store, durable, before_flush = self.store, self.durable, self.before_flush

        def work() -> None:
            if durable:
                before_flush()
            store.write(key, data, offset_bytes=offset, durable=durable)

        self._change(key, work, done)

    def _write_waiting(self, key: ShardKey, offset: int, data: Buffer, done: Done) -> None:
        """A small write that may wait for the disk, and shares its flush with others."""
        store = self.store

        def written(result: int, value: Any) -> None:  # Any: nothing
            if result or not self.durable:
                done(result, value)
            else:
                self.commit(key, done)

        self._change(key, lambda: store.write(key, data, offset_bytes=offset, durable=False), written)

    def create(self, key: ShardKey, offset: int, data: Buffer, size: int, sparse: bool, done: Done) -> None:
        """The shard exists with ``size`` bytes, zeros but for ``data``."""
        if self.gate is not None and self._gated(key, done):
            return
        store, durable, before_flush = self.store, self.durable, self.before_flush
        self.created(key)

        def work() -> None:
            if durable:
                before_flush()
            store.create(key, data, offset_bytes=offset, size_bytes=size, sparse=sparse, durable=durable)

        self._change(key, work, done)

    def remove(self, key: ShardKey, done: Done) -> None:
        """The shard is gone; NO_OBJ if there was none."""
        self.removed(key)
        store, durable, before_flush = self.store, self.durable, self.before_flush

        def work() -> None:
            if durable:
                before_flush()  # should the removal last and the note of it not, somebody's old copy could come back
            store.remove(key)
            if durable:
                store.sync((key,))

        self._change(key, work, done)

    def run(self, key: ShardKey, work: _Work, done: Done) -> None:
        """``work()`` runs on a worker thread as a change of this shard."""
        self._change(key, work, done)

    def submit(self, work: _Work, done: Done) -> None:
        """``work()`` runs on a worker thread, in no order."""
        self._submit(work, done)

    # ---- inside

    def _change(self, key: ShardKey, work: _Work, done: Done) -> None:
        lane = self._lanes.get(key)
        if lane is not None:
            lane.append(lambda: self._start_change(key, work, done))
            return
        self._lanes[key] = deque()
        self._start_change(key, work, done)

    def _start_change(self, key: ShardKey, work: _Work, done: Done) -> None:
        def finished(error: Exception | None, value: Any) -> None:  # Any: whatever the work returns
            with self._outbox:
                self._leave_lane(key)
                done(0 if error is None else self._failed(error), value)

        self._executor.submit(work, finished)

    def _leave_lane(self, key: ShardKey) -> None:
        lane = self._lanes[key]
        if lane:
            lane.popleft()()
        else:
            del self._lanes[key]

    # ---- strips

    def write_strip(self, change: StripChange, done: Done) -> None:
        """Bytes of a strip are replaced; where the store has a journal they can be put back, even after a crash."""
        key = change.record.key
        if self.gate is not None and self._gated(key, done):
            return
        if not isinstance(self.store, JournaledStore):
            self._write_pieces(change, done)
            return
        lane = self._lanes.get(key)
        if lane is not None:
            lane.append(lambda: self._add_strip(change, done))
            return
        self._lanes[key] = deque()
        self._add_strip(change, done)

    def stage(self, key: ShardKey, data: Buffer, done: Callable[[Staged | None], None]) -> None:
        """``data`` lies ready to be all of the shard, if it is as large and the store can do that.

        Nobody need have the shard's lane. Trouble comes up again, and is reported, by whoever writes in place then.
        """
        store, durable = self.store, self.durable
        if not isinstance(store, JournaledStore):
            done(None)
            return

        def finished(error: Exception | None, staged: Staged | None) -> None:
            with self._outbox:
                done(staged if error is None else None)

        self._executor.submit(partial(store.stage, key, data, durable=durable), finished)

    def _write_pieces(self, change: StripChange, done: Done) -> None:
        key = change.record.key
        if len(change.pieces) == 1:
            ((offset, data),) = change.pieces
            self.write(key, offset, data, done)
            return
        store, durable, before_flush = self.store, self.durable, self.before_flush

        def work() -> None:
            if durable:
                before_flush()
            for offset, data in change.pieces:
                store.write(key, data, offset_bytes=offset, durable=False)
            if durable:
                store.sync((key,))

        self._change(key, work, done)

    def _add_strip(self, change: StripChange, done: Done) -> None:
        """``change`` has its shard's lane."""
        if change.size_bytes <= INLINE_BYTES_MAX:
            self._strips.append((change, done))
            self._small_strips.add()
        else:
            self._large_strips.append((change, done))
            self._start_large_strips_soon()

    def _start_large_strips_soon(self) -> None:
        if not self._strips_deferred:
            self._strips_deferred = True
            self._outbox.defer(self._start_large_strips)

    def _start_large_strips(self) -> None:
        """Each on a thread of its own."""
        self._strips_deferred = False
        while self._large_strips:
            size = self._large_strips[0][0].size_bytes
            if self._large_bytes and self._large_bytes + size > LARGE_BYTES_MAX:
                break
            self._large_bytes += size
            self._submit_strips([self._large_strips.popleft()])

    def _start_small_strips(self) -> int:
        """They go together, one batch at a time."""
        batch: list[tuple[StripChange, Done]] = []
        size = 0
        while self._strips and size <= SMALL_BYTES_MAX and len(batch) < SMALL_COUNT_MAX:
            batch.append(self._strips.popleft())
            size += batch[-1][0].size_bytes
        store = self.store
        assert isinstance(store, JournaledStore), "the store in use changes to one of the same kind"
        changes = [change for change, _ in batch]
        if store.ready_for(changes):
            results = store.write_strips(changes)
            # At the end of the pass: the caller counts these as under way now.
            self._outbox.defer(lambda: self._strips_written(batch, None, results))
        else:
            self._submit_strips(batch)
        return len(batch)

    def _submit_strips(self, batch: list[tuple[StripChange, Done]]) -> None:
        store = self.store
        assert isinstance(store, JournaledStore), "the store in use changes to one of the same kind"
        changes = [change for change, _ in batch]

        self._executor.submit(partial(self._write_strips, store, changes), partial(self._strips_written, batch))

    def _write_strips(self, store: JournaledStore, changes: list[StripChange]) -> list[StoreError | None]:
        if self.durable:
            self.before_flush()
        return store.write_strips(changes)

    def _strips_written(self, batch: list[tuple[StripChange, Done]], error: Exception | None, results: Any) -> None:
        with self._outbox:
            size = batch[0][0].size_bytes
            if size <= INLINE_BYTES_MAX:
                self._small_strips.ended()
            else:
                self._large_bytes -= size
                self._start_large_strips_soon()
            for position, (change, done) in enumerate(batch):
                failure = error or results[position]
                self._leave_lane(change.record.key)
                done(self._failed(failure) if failure else 0, None)

    def _submit(self, work: _Work, done: Done) -> None:
        def finished(error: Exception | None, value: Any) -> None:  # Any: whatever the work returns
            with self._outbox:
                done(0 if error is None else self._failed(error), value)

        self._executor.submit(work, finished)

    def commit(self, key: ShardKey, done: Done) -> None:
        """``done(result, None)`` when what was written to the shard is durable; flushes are shared."""
        self._commit.setdefault(key, []).append(done)
        self._commits.add()

    def _start_commit(self) -> int:
        batch, self._commit = self._commit, {}
        keys = tuple(batch)
        store, before_flush = self.store, self.before_flush
        # A few threads: their flushes of different files ride on the same commit of the file system.
        count = min(FLUSH_THREADS, (len(keys) + 1) // 2) if store.flushes_apart else 1
        results: list[int] = []

        def finished(error: Exception | None, _: object) -> None:
            with self._outbox:
                results.append(0 if error is None else self._failed(error))
                if len(results) < count:
                    return
                self._commits.ended()
                result = next((result for result in results if result), 0)
                for waiting in batch.values():
                    for done in waiting:
                        done(result, None)

        def flush() -> None:
            before_flush()
            store.sync(keys)

        def prepared(error: Exception | None, _: object) -> None:
            for first in range(count):
                part = keys[first::count]
                if error is not None:
                    finished(error, None)
                else:
                    self._executor.submit(partial(store.sync, part), finished)

        if count == 1:
            self._executor.submit(flush, finished)
        else:
            self._executor.submit(before_flush, prepared)
        return sum(map(len, batch.values()))

    def _failed(self, error: Exception) -> int:
        if isinstance(error, StoreDeviceError):
            # With the last disk this sheep leaves, and others have the data: trying again helps in any case.
            self._device_failed(error)
            return Result.NETWORK_ERROR
        if isinstance(error, ShardCorrupt):
            self.corrupt(error)
        if isinstance(error, SheepdogError):
            return error.result
        raise error


def _ignore(_: ShardKey) -> None:
    """Nobody wants to know."""


def _note(error: ShardCorrupt) -> None:
    logger.error("%s", error)


def _nothing() -> None:
    """Nothing comes before the data."""
