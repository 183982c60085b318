"""A store that knows what it stored: checksums of every block of 4 KiB, in front of any object store.

The object files stay as they are; checksums are side data. In memory each shard in use has an array of 32-bit sums (the
low half of XXH3-64), 0 meaning "not known". A write brings the sums of its blocks up to date from the bytes that it
was given, so nothing is read back and nothing more is written: it costs the hash, a quarter of a microsecond for 4 KiB.
Of a block that is written in part the old bytes are checked first; they do not become right by being written beside.

On disk (``checksum_files``) the sums of a shard exist only while it *rests*: they are removed before its first change,
and written down by ``upkeep`` when none came for one or two of its periods. After ``kill -9`` the shards that did not
rest have no sums; the scrub compares them with other holders' before it trusts them (``repair``). The removal is on
stable storage before the change is even begun: what is in the page cache may reach the disk at any moment, and if the
power fails right then, sums that come back must not find other bytes than theirs. ``ready`` says when that is to be
waited for.

Somebody may edit an object's file while no sheep runs, on purpose: a restore, an original sheep, an administrator. So
beside the sums lies the time when the file was last changed. Another one that lies before our start voids them. Damage
by the disk leaves the time alone, and what happens behind a running sheep is damage in any case.

Every read is compared, on the event loop too: what the page cache answers was read from a disk once. A read beside a
write of the same shard may see bytes of one and sums of the other. Each change counts ``changes`` up before and after,
so it is odd meanwhile; a difference means something only if the count was even and is the same afterwards.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from xxhash import xxh3_64_intdigest

from sheepdog.contracts.incoming import Incoming
from sheepdog.contracts.store import Buffer, ObjectStore, ShardKey, Staged, Verified
from sheepdog.daemon.block_sums import (
    BLOCK_BYTES,
    INSIDE,
    MANY,
    MASK,
    PART_BYTES,
    block_count,
    sum_of,
    sums_of,
    sums_of_new,
    touched_blocks,
)
from sheepdog.daemon.checksum_files import ChecksumFiles, Saved
from sheepdog.daemon.store_wrapper import StoreWrapper
from sheepdog.daemon.summed_incoming import SummedIncoming
from sheepdog.errors import ShardCorrupt, StoreBusy, StoreError

logger = logging.getLogger(__name__)

MEMORY_BYTES_MAX = 64 << 20  # of sums: those of 16,384 data objects
_ATTEMPTS = 200  # of a read that meets writes of the same shard
_PAUSE_S = 0.001  # between them
_STATE_BYTES = 400  # of memory, beside the sums
_CHANCES = 64  # shards that are passed over for one that rests, whenever room is to be made


class _State:
    """What is known of one live shard."""

    __slots__ = ("changes", "period", "saved", "size", "sums")

    def __init__(self, size: int, sums: array[int] | None, *, saved: bool) -> None:
        self.size = size
        self.sums = sums  # None: nothing is known
        self.saved = saved  # they are on disk as well
        self.changes = 0  # odd while one is under way
        self.period: object = None  # in which it changed last; None: it rests


class ChecksummedStore(StoreWrapper):
    """``inner`` with checksums. Raises ``ShardCorrupt`` instead of handing out other bytes than were stored."""

    def __init__(self, inner: ObjectStore, files: ChecksumFiles, *, memory_bytes_max: int = MEMORY_BYTES_MAX) -> None:
        super().__init__(inner)
        self._try_inner = inner.try_read_into
        self._try_write_inner = inner.try_write
        self._files = files
        self._memory_bytes_max = memory_bytes_max
        self._memory_bytes = 0
        self._lock = threading.RLock()  # of the table and of what lies on disk; the common case does without
        self._states: dict[ShardKey, _State] = {}  # what was taken up longest ago at the front
        self._changed: dict[ShardKey, _State] = {}  # those that do not rest
        self._period = object()
        self._staged: dict[tuple[ShardKey, int], array[int]] = {}  # sums of contents that are not live yet
        self._closed = threading.Event()
        self.distrust = False
        """While a journal is replayed: what is written to was changed in ways that the sums on disk may not know."""

    # ---- the table

    def _put(self, key: ShardKey, state: _State) -> None:
        """With the lock."""
        self._forget(key)
        self._states[key] = state
        self._memory_bytes += _bytes_of(state)
        self._trim(key)

    def _trim(self, key: ShardKey) -> None:
        """With the lock. What is pushed out before it rested is not known any more, so what rests is first to go."""
        chances = _CHANCES
        while self._memory_bytes > self._memory_bytes_max and len(self._states) > 1:
            oldest = next(iter(self._states))
            if oldest == key:
                break
            if oldest in self._changed and chances:
                chances -= 1
                self._states[oldest] = self._states.pop(oldest)
                continue
            self._forget(oldest)

    def _forget(self, key: ShardKey) -> None:
        """With the lock."""
        state = self._states.pop(key, None)
        if state is not None:
            self._memory_bytes -= _bytes_of(state)
            self._changed.pop(key, None)

    def _set_sums(self, key: ShardKey, state: _State, sums: array[int] | None) -> None:
        """With the lock."""
        known = self._states.get(key) is state  # otherwise it was pushed out, and its memory is not counted
        if known:
            self._memory_bytes -= _bytes_of(state)
        state.sums = sums
        if known:
            self._memory_bytes += _bytes_of(state)
            self._trim(key)

    def _load(self, key: ShardKey) -> _State:
        """:raises ObjectNotFound: no live shard."""
        with self._lock:
            state = self._states.get(key)
            if state is None:
                found = self._saved(key)
                if found is not None:
                    state = _state_of(found)
                else:
                    state = _State(self.inner.size(key), None, saved=False)
                self._put(key, state)
            return state

    def _saved(self, key: ShardKey, epoch: int | None = None) -> Saved | None:
        """What lies on disk of the shard, unless that is void."""
        found = self._files.load(key, epoch)
        if found is None or not found.modified_ns:
            return found
        modified_ns = self._modified_ns(key, epoch)
        if not modified_ns or modified_ns == found.modified_ns or modified_ns >= self._files.started_ns:
            return found
        logger.info("oid=%016x was changed while no sheep ran: its checksums are void", key.oid)
        self._files.drop(key, epoch)
        return None

    def _modified_ns(self, key: ShardKey, epoch: int | None = None) -> int:
        """0 for a store that does not know, and for a shard or disk that is not there: whoever uses it will notice."""
        try:
            return self.inner.modified_ns(key, epoch=epoch) or 0
        except StoreError:
            return 0

    def _begin(self, key: ShardKey, state: _State) -> None:
        """The shard does not rest any more. Called with ``changes`` odd."""
        with self._lock:
            if self._states.get(key) is not state:
                self._put(key, state)  # pushed out, and perhaps loaded anew by a reader
            saved = state.saved
            if saved:
                self._files.drop(key)
        if saved:
            self._files.flush()
        with self._lock:
            if saved:
                state.saved = False  # only now: if one of the two failed, the next change tries both again
                if self.distrust:
                    self._set_sums(key, state, None)
            state.period = self._period
            self._changed[key] = state

    # ---- changes

    def ready(self, key: ShardKey) -> bool:
        state = self._states.get(key)
        try:
            if state is None and self.inner.exists(key):
                return False  # what is known of it is on disk
        except StoreError:
            return False  # whoever waits for the change will hear of it
        return (state is None or not state.saved) and self.inner.ready(key)

    def write(self, key: ShardKey, data: Buffer, *, offset_bytes: int, durable: bool) -> None:
        state = self._states.get(key)
        if state is None:
            state = self._load(key)
        state.changes += 1  # before the look at ``period``: see ``_rest``
        try:
            period = state.period
            if period is not self._period:
                if period is None or self._states.get(key) is not state:
                    self._begin(key, state)
                else:
                    state.period = self._period  # not with the lock, which is held while files are written: see _rest
            if durable:
                self._files.flush()
            length = len(data)
            if length == BLOCK_BYTES and not offset_bytes & INSIDE and offset_bytes + length <= state.size:
                self.inner.write(key, data, offset_bytes=offset_bytes, durable=durable)
                sums = state.sums
                if sums is None:
                    sums = self._blank(key, state)
                sums[offset_bytes >> 12] = xxh3_64_intdigest(data) & MASK or 1
            elif length:
                self._write_range(key, state, memoryview(data), offset_bytes, durable)
            else:
                self.inner.write(key, data, offset_bytes=offset_bytes, durable=durable)
        except BaseException:
            # Some of it may have been written.
            if state.sums is not None:
                for block in touched_blocks(offset_bytes, len(data), len(state.sums)):
                    state.sums[block] = 0
            raise
        finally:
            state.changes += 1

    def try_write(self, key: ShardKey, data: Buffer, *, offset_bytes: int) -> bool:
        state = self._states.get(key)
        if state is None or state.saved or len(data) != BLOCK_BYTES or offset_bytes & INSIDE:
            return super().try_write(key, data, offset_bytes=offset_bytes)
        # What guests write most: one whole block, of a shard that changed a moment ago.
        state.changes += 1  # before the look at ``period``: see ``_rest``
        sums = state.sums
        try:
            if sums is not None and state.period is self._period and offset_bytes + BLOCK_BYTES <= state.size:
                block = offset_bytes >> 12
                try:
                    if self._try_write_inner(key, data, offset_bytes=offset_bytes):
                        sums[block] = xxh3_64_intdigest(data) & MASK or 1
                        return True
                except BaseException:
                    sums[block] = 0  # some of it may have been written
                    raise
        finally:
            state.changes += 1
        return super().try_write(key, data, offset_bytes=offset_bytes)

    def stage(self, key: ShardKey, data: Buffer, *, durable: bool) -> Staged | None:
        staged = self.inner.stage(key, data, durable=durable)
        if staged is not None:
            self._staged[key, staged.new] = sums_of_new(memoryview(data), 0, len(data))
        return staged

    def unstage(self, staged: Staged) -> None:
        self._staged.pop((staged.key, staged.new), None)
        self.inner.unstage(staged)

    def exchange(self, staged: Staged) -> None:
        sums = self._staged.pop((staged.key, staged.new), None)

        def change() -> bool:
            self.inner.exchange(staged)
            return True

        self._replace(staged.key, sums, change)

    def put_back(self, key: ShardKey, old: int, *, durable: bool) -> bool:
        return self._replace(key, None, lambda: self.inner.put_back(key, old, durable=durable))

    def _replace(self, key: ShardKey, sums: array[int] | None, change: Callable[[], bool]) -> bool:
        """``change()`` gives the shard another content of the same size, with these sums, and says whether it did."""
        state = self._load(key)
        state.changes += 1
        try:
            self._begin(key, state)
            done = change()
            if done:
                with self._lock:
                    self._set_sums(key, state, sums)
            return done
        finally:
            state.changes += 1

    def finish_exchanges(self, exchanges: Sequence[Staged], kept: Iterable[tuple[ShardKey, int]]) -> list[ShardKey]:
        for staged in exchanges:
            self._files.drop(staged.key)
        if exchanges and self._files.durable:
            self._files.flush()
        return self.inner.finish_exchanges(exchanges, kept)

    def _blank(self, key: ShardKey, state: _State) -> array[int]:
        sums = array("I", bytes(4 * block_count(state.size)))
        with self._lock:
            self._set_sums(key, state, sums)
        return sums

    def _write_range(self, key: ShardKey, state: _State, data: memoryview, offset: int, durable: bool) -> None:
        end = offset + len(data)
        if end > state.size:
            # No caller does that. The shard is what it is then, and nothing is known of it.
            self.inner.write(key, data, offset_bytes=offset, durable=durable)
            with self._lock:
                self._forget(key)
            return
        sums = state.sums if state.sums is not None else self._blank(key, state)
        # Blocks at the ends that the data covers in part, with their old bytes if those are right.
        ends: dict[int, bytearray | None] = {}
        for block in {offset >> 12, (end - 1) >> 12}:
            begin = block << 12
            if begin < offset or min(begin + BLOCK_BYTES, state.size) > end:
                ends[block] = self._old_block(key, state, block)
        self.inner.write(key, data, offset_bytes=offset, durable=durable)
        first_block, last_block = offset >> 12, (end - 1) >> 12
        if not ends and not end & INSIDE:
            sums[first_block : last_block + 1] = sums_of(data)
            return
        for block in range(first_block, last_block + 1):
            begin = block << 12
            if block not in ends:
                sums[block] = sum_of(data[begin - offset : begin - offset + BLOCK_BYTES])
                continue
            old = ends[block]
            if old is None:
                continue
            first, last = max(begin, offset), min(begin + len(old), end)
            old[first - begin : last - begin] = data[first - offset : last - offset]
            sums[block] = sum_of(old)

    def _old_block(self, key: ShardKey, state: _State, block: int) -> bytearray | None:
        """The bytes of the block if they are at hand, known and right.

        ``None`` leaves the sum alone: unknown stays unknown, and a block that is wrong already stays wrong. One that is
        not at hand is not known any more.
        """
        sums = state.sums
        assert sums is not None
        if not sums[block]:
            return None
        begin = block << 12
        old = bytearray(min(BLOCK_BYTES, state.size - begin))
        if self.inner.try_read_into(key, memoryview(old), offset_bytes=begin) != len(old):
            sums[block] = 0
            return None
        return old if sum_of(old) == sums[block] else None

    def _hold(self, key: ShardKey) -> _State | None:
        """What is known of the live shard, which is about to be replaced or to go.

        Until that is done ``changes`` is odd: bytes that do not fit may be the new ones; who reads them waits to see.
        """
        with self._lock:
            state = self._states.get(key)
            if state is None and self._saved(key) is not None:
                state = self._load(key)
            if state is not None:
                state.changes += 1
            return state

    def create(
        self, key: ShardKey, data: Buffer, *, offset_bytes: int, size_bytes: int, sparse: bool, durable: bool
    ) -> None:
        how = {"offset_bytes": offset_bytes, "size_bytes": size_bytes}
        make = partial(self.inner.create, key, data, **how, sparse=sparse, durable=durable)
        self._make_anew(key, size_bytes, durable, make, lambda: sums_of_new(memoryview(data), offset_bytes, size_bytes))

    def receive(self, key: ShardKey, size_bytes: int, *, sparse: bool) -> Incoming:
        inner = self.inner.receive(key, size_bytes, sparse=sparse)
        return SummedIncoming(inner, size_bytes, partial(self._make_anew, key, size_bytes))

    def _make_anew(
        self, key: ShardKey, size: int, durable: bool, make: Callable[[], None], sums: Callable[[], array[int]]
    ) -> None:
        """``make()`` replaces the shard by one of ``size`` bytes with these sums."""
        old = self._hold(key)
        try:
            with self._lock:
                self._files.drop(key)
                if old is not None:
                    old.saved = False
            if durable:
                self._files.flush()
            make()
        except BaseException:
            if old is not None:
                with self._lock:
                    old.period = self._period
                    self._changed[key] = old
                old.changes += 1
            raise
        state = _State(size, sums(), saved=False)
        with self._lock:
            state.period = self._period
            self._put(key, state)
            self._changed[key] = state

    def remove(self, key: ShardKey) -> None:
        self._hold(key)
        try:
            self._files.drop(key)
            self.inner.remove(key)
        finally:
            with self._lock:
                self._forget(key)

    def wipe(self) -> None:
        with self._lock:
            self._files.renew()
            for key in list(self._states):
                self._forget(key)
            self._staged.clear()
        self.inner.wipe()

    def sync(self, keys: Iterable[ShardKey]) -> None:
        self._files.flush()
        keys = tuple(keys)
        try:
            self.inner.sync(keys)
        except StoreError:
            # Without power, or once the system gives up on what it could not write, the old bytes are there again.
            with self._lock:
                for key in keys:
                    state = self._states.get(key)
                    if state is not None and not state.saved:
                        self._forget(key)
            raise

    # ---- reads

    def _wrong(self, state: _State, view: memoryview, offset: int, count: int) -> str:
        """What is wrong with ``count`` bytes read at ``offset``: whole blocks, but for the last one of the shard."""
        expected = max(0, min(len(view), state.size - offset))
        if count != expected:
            return f"the file has {offset + count} bytes instead of {state.size}" if count < expected else "it grew"
        sums = state.sums
        if sums is None:
            return ""
        block = offset >> 12
        if count != len(view):
            view = view[:count]
        if count >= MANY * BLOCK_BYTES:
            whole = count & ~INSIDE
            if sums_of(view[:whole]) == sums[block : block + (whole >> 12)]:
                view, block, count, offset = view[whole:], block + (whole >> 12), count - whole, offset + whole
            # Otherwise some are not known, or wrong: one by one.
        for begin in range(0, count, BLOCK_BYTES):
            want = sums[block]
            if want and (xxh3_64_intdigest(view[begin : begin + BLOCK_BYTES]) & MASK or 1) != want:
                return f"the block at {block << 12} differs from its checksum"
            block += 1
        return ""

    def _read(
        self, state: _State, view: memoryview, offset: int, read: Callable[[memoryview, int], int | None]
    ) -> tuple[int | None, str]:
        """The count that ``read(view, offset)`` returned, and what is wrong with the bytes."""
        end = offset + len(view)
        if not offset & INSIDE and (not end & INSIDE or end >= state.size):
            count = read(view, offset)
            return count, "" if count is None else self._wrong(state, view, offset, count)
        if offset >= state.size:
            return read(view, offset), ""
        # Whole blocks, of which a part was asked for.
        begin = offset & ~INSIDE
        wide = memoryview(bytearray(min((end + INSIDE) & ~INSIDE, state.size) - begin))
        count = read(wide, begin)
        if count is None:
            return None, ""
        reason = self._wrong(state, wide, begin, count)
        part = wide[offset - begin : min(count, end - begin)]
        view[: len(part)] = part
        return len(part), reason

    def try_read_into(self, key: ShardKey, buffer: memoryview, *, offset_bytes: int) -> int | None:
        state = self._states.get(key)
        if state is None:
            return None  # its sums are on disk
        if state.sums is None and not state.saved:
            return self.inner.try_read_into(key, buffer, offset_bytes=offset_bytes)
        changes = state.changes
        if len(buffer) == BLOCK_BYTES and not offset_bytes & INSIDE and state.sums is not None:
            # What guests ask for most, without the generality below.
            count = self._try_inner(key, buffer, offset_bytes=offset_bytes)
            if count is None:
                return None
            if count == BLOCK_BYTES and offset_bytes + BLOCK_BYTES <= state.size:
                want = state.sums[offset_bytes >> 12]
                if not want or (xxh3_64_intdigest(buffer) & MASK or 1) == want:
                    return count
        count, reason = self._read(
            state, buffer, offset_bytes, lambda view, at: self.inner.try_read_into(key, view, offset_bytes=at)
        )
        if reason:
            if self._certain(key, state, changes):
                raise ShardCorrupt(key.oid, key.index, reason)
            return None
        return count

    def read_into(self, key: ShardKey, buffer: memoryview, *, offset_bytes: int) -> int:
        for _ in range(_ATTEMPTS):
            state = self._states.get(key)
            if state is None:
                state = self._load(key)
            if state.sums is None and not state.saved:
                return self.inner.read_into(key, buffer, offset_bytes=offset_bytes)
            changes = state.changes
            count, reason = self._read(
                state, buffer, offset_bytes, lambda view, at: self.inner.read_into(key, view, offset_bytes=at)
            )
            if not reason:
                assert count is not None, "only try_read_into may give up"
                return count
            if self._certain(key, state, changes):
                raise ShardCorrupt(key.oid, key.index, reason)
            self._closed.wait(_PAUSE_S)
        raise StoreBusy(f"oid={key.oid:016x} changes all the time")

    def _certain(self, key: ShardKey, state: _State, changes: int) -> bool:
        """Nothing changed the shard since ``changes`` was read, so bytes and sums were of one moment."""
        return not changes & 1 and state.changes == changes and self._states.get(key) is state

    # ---- set aside

    def retire(self, key: ShardKey, epoch: int) -> None:
        state = self._hold(key)
        try:
            with self._lock:
                if state is None or state.saved:
                    self._files.move(key, None, epoch)
                else:
                    self._files.drop(key, epoch)
                    if state.sums is not None:
                        self._flush_data([key])
                        self._files.save(key, Saved(state.size, state.sums, self._modified_ns(key)), epoch)
            self.inner.retire(key, epoch)
        except StoreError:
            self._files.drop(key, epoch)
            raise
        finally:
            with self._lock:
                self._forget(key)

    def revive(self, key: ShardKey, epoch: int) -> None:
        if not self.inner.exists(key):
            with self._lock:
                self._forget(key)
                # The version stays where it is, but changes of the live shard may show in it.
                self._files.move(key, epoch, None)
        self.inner.revive(key, epoch)

    def read_stale_into(self, key: ShardKey, epoch: int, buffer: memoryview, *, offset_bytes: int) -> int:
        found = self._saved(key, epoch)
        if found is None:
            return self.inner.read_stale_into(key, epoch, buffer, offset_bytes=offset_bytes)
        state = _state_of(found)
        count, reason = self._read(
            state, buffer, offset_bytes, lambda view, at: self.inner.read_stale_into(key, epoch, view, offset_bytes=at)
        )
        if reason and self._files.load(key, epoch) == found:  # otherwise it came back to life meanwhile
            raise ShardCorrupt(key.oid, key.index, reason, epoch=epoch)
        assert count is not None, "only try_read_into may give up"
        return count

    def purge_stale(self) -> None:
        self.inner.purge_stale()
        self._files.drop_stale()

    # ---- digests and comparison

    def digest(self, key: ShardKey, *, epoch: int | None = None, cache: bool = False) -> bytes:
        if epoch is not None:
            self._verify_stale(key, epoch)
            return self.inner.digest(key, epoch=epoch)
        offset, complete = 0, True
        while True:
            part = self.verify(key, offset_bytes=offset, length_bytes=PART_BYTES)
            complete = complete and part.complete
            offset += part.count
            if part.count < PART_BYTES:
                break
        # What was remembered once says nothing about bytes that have no checksum.
        return self.inner.digest(key, cache=cache and complete)

    def _verify_stale(self, key: ShardKey, epoch: int) -> None:
        view = memoryview(bytearray(PART_BYTES))
        offset = 0
        while (count := self.read_stale_into(key, epoch, view, offset_bytes=offset)) == len(view):
            offset += count

    def verify(self, key: ShardKey, *, offset_bytes: int, length_bytes: int) -> Verified:
        state = self._load(key)
        sums = state.sums
        if sums is None and not state.saved:
            return self.inner.verify(key, offset_bytes=offset_bytes, length_bytes=length_bytes)
        count = self.read_into(key, memoryview(bytearray(length_bytes)), offset_bytes=offset_bytes)
        known = sums is not None and all(sums[offset_bytes >> 12 : (offset_bytes + count + INSIDE) >> 12])
        return Verified(count, known)

    def accept(self, key: ShardKey, digest: bytes) -> bool:
        size = self.inner.size(key)
        modified_ns = self._modified_ns(key)
        sums = array("I", bytes(4 * block_count(size)))
        sha1 = hashlib.sha1(usedforsecurity=False)
        view = memoryview(bytearray(min(PART_BYTES, max(size, 1))))
        offset = 0
        while count := self.inner.read_into(key, view, offset_bytes=offset):
            sha1.update(view[:count])
            for begin in range(0, count, BLOCK_BYTES):
                sums[(offset + begin) >> 12] = sum_of(view[begin : min(begin + BLOCK_BYTES, count)])
            offset += count
        if sha1.digest() != digest:
            return False
        self._flush_data([key])  # a process that was killed may have left it in the page cache
        with self._lock:
            self._files.drop(key)
            self._put(key, _State(size, sums, saved=self._files.save(key, Saved(size, sums, modified_ns))))
        return True

    def vouched(self, key: ShardKey, *, offset_bytes: int, length_bytes: int, epoch: int | None = None) -> bool:
        if epoch is None:
            state = self._states.get(key)
        else:
            found = self._saved(key, epoch)
            state = None if found is None else _state_of(found)
        if state is None or state.sums is None:
            return False
        return all(state.sums[offset_bytes >> 12 : (offset_bytes + length_bytes + INSIDE) >> 12])

    def known(self, key: ShardKey) -> bool:
        state = self._states.get(key)
        return self._saved(key) is not None if state is None else state.sums is not None

    def doubt(self, key: ShardKey) -> None:
        with self._lock:
            state = self._states.get(key)
            if state is not None:
                self._files.drop(key)
                state.saved = False
                self._set_sums(key, state, None)

    # ---- rest

    def upkeep(self) -> None:
        """What did not change in the last period is written down, and a new period begins."""
        last, self._period = self._period, object()
        self._rest_all([entry for entry in list(self._changed.items()) if entry[1].period is not last])
        self.inner.upkeep()

    def _rest_all(self, shards: Iterable[tuple[ShardKey, _State]]) -> None:
        """These rest, but for those that change meanwhile."""
        noted = [(key, state, state.changes) for key, state in shards]
        # A journal may hold what the shards do not have on stable storage yet, and nobody can tell that it is replayed.
        self._flush_data([key for key, _, _ in noted])
        for key, state, changes in noted:
            self._rest(key, state, changes)

    def _rest(self, key: ShardKey, state: _State, changes: int) -> None:
        """:param changes: those that are on stable storage."""
        with self._lock:
            if self._states.get(key) is not state:
                self._changed.pop(key, None)
                return
            # A change first counts up and then looks at ``period``; here it is the other way round. So one of the two
            # sees the other: either the change finds the shard at rest, and waits for the lock, or it is seen here.
            period, state.period = state.period, None
            if changes & 1 or state.changes != changes:
                state.period = period
                return
            self._changed.pop(key, None)
            if state.sums is not None:
                # No change is under way, and whoever begins one waits for the lock: the time is that of the last.
                state.saved = self._files.save(key, Saved(state.size, state.sums, self._modified_ns(key)))
                if not state.saved:
                    self._files.drop(key)  # a part of it

    def _flush_data(self, keys: Sequence[ShardKey]) -> None:
        """What was written of the shards survives power loss, if anything does: checksums of it may be written down."""
        if self._files.durable and keys:
            self.inner.sync(keys)

    def close(self) -> None:
        self._closed.set()
        try:
            self._rest_all(list(self._changed.items()))
        except StoreError as error:
            logger.warning("checksums of what changed last are not written: %s", error)
        self.inner.close()


def _state_of(found: Saved) -> _State:
    known = len(found.sums) == block_count(found.size_bytes)
    return _State(found.size_bytes, found.sums if known else None, saved=True)


def _bytes_of(state: _State) -> int:
    return _STATE_BYTES + (0 if state.sums is None else 4 * len(state.sums))
