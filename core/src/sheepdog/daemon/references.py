"""Map writes and reference counting (data model, section 8).

A write inside an inode's block map replaces references to data objects. The inode's primary does it alone in the
inode's lane: it reads the old entries and their generation/count pairs, writes the new entries, zeroes the pairs of the
entries that changed (and only those), and drops one reference for each data object that is not named any more.

Dropping (0, 0) removes the object, provided the inode's own volume made it; anything else goes to the ledger of the
data object, whose primary reads, changes and writes it alone in the ledger's lane. No reference is dropped twice, or an
object would go that is still in use: what a retry might repeat is not retried, and at worst an unused object stays, at
most until its volume is deleted (``sweep``).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from sheepdog.contracts.store import REPLICA, Buffer, ShardKey
from sheepdog.daemon.placement import Placement
from sheepdog.daemon.primary import RETRYABLE, Done, Primary
from sheepdog.errors import InvalidParameters, ObjectNotFound, StoreError
from sheepdog.model.ids import data_oid, is_inode, ledger_oid, ledger_subject, vid_of
from sheepdog.model.inode import MAP_OFFSET, REFS_OFFSET
from sheepdog.model.ledger import LEDGER_BYTES, UNSHARED, Ledger, decode, drop, encode
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.gateway import Gateway

logger = logging.getLogger(__name__)

DROPS_INFLIGHT_MAX = 64
STORE_POLICY_OFFSET = 553


@dataclass(frozen=True, slots=True)
class Drop:
    """One reference that was given up in ``epoch``: (generation, count) held by ``by`` to data object ``oid``."""

    oid: int
    generation: int
    count: int
    by: int
    epoch: int


def is_map_write(oid: int, offset: int, length: int) -> bool:
    """Whether a write lies inside an inode's block map."""
    return is_inode(oid) and offset >= MAP_OFFSET and offset + length <= REFS_OFFSET and length > 0


class References:
    """The map writer of a sheep, and the queue of references it has to drop."""

    def __init__(self, primary: Primary, gateway: Gateway, *, drop_first: Callable[[], bool]) -> None:
        """:param drop_first: whether drops come before the answer (clusters that recycle volume ids)."""
        self._primary = primary
        self._gateway = gateway
        self._drop_first = drop_first
        self._drops: deque[tuple[Drop, Callable[[], None] | None]] = deque()
        self._dropping = 0

    # ---- map writes

    def write_map(self, oid: int, offset: int, data: Buffer, placement: Placement, done: Done) -> None:
        """The map entries are replaced at every holder and what they named before is released."""
        if (offset - MAP_OFFSET) % 4 or len(data) % 4:
            done(Result.INVALID_PARMS)
            return
        self._primary.enter(oid, True, lambda finish: self._write_map(oid, offset, data, placement, finish), done)

    def _write_map(self, oid: int, offset: int, data: Buffer, placement: Placement, done: Done) -> None:
        first = (offset - MAP_OFFSET) // 4
        count = len(data) // 4
        refs_offset = REFS_OFFSET + 8 * first
        key = ShardKey(oid, REPLICA)
        shards = self._primary.shards
        store = shards.store
        policy = bytearray(1)
        old_map = bytearray(4 * count)
        old_refs = bytearray(8 * count)

        def read(quick: bool) -> bool:
            read_into = store.try_read_into if quick else store.read_into
            for buffer, where in ((policy, STORE_POLICY_OFFSET), (old_map, offset), (old_refs, refs_offset)):
                if read_into(key, memoryview(buffer), offset_bytes=where) is None:
                    return False
            return True

        def replace() -> None:
            if policy[0]:
                # A hypervolume: its map area is the root of a B-tree, whose entries carry no pairs.
                self._primary.write_now(oid, offset, data, placement, done)
            else:
                self._replace(oid, offset, data, placement, old_map, old_refs, done)

        def fetched(result: int) -> None:
            if result:
                done(result)
            else:
                shards.submit(lambda: read(False), have)

        def have(result: int, _: Any) -> None:  # Any: read() says True here
            if result == Result.NO_OBJ and self._primary.recovery is not None:
                self._primary.recovery.fetch(oid, REPLICA, fetched)
            elif result:
                done(result)
            else:
                replace()

        quick = False
        with suppress(StoreError):  # whatever it is, the worker meets it as well, and ``have`` is told
            quick = read(True)
        if quick:
            replace()
        else:
            shards.submit(lambda: read(False), have)

    def _replace(
        self,
        oid: int,
        offset: int,
        data: Buffer,
        placement: Placement,
        old_map: bytearray,
        old_refs: bytearray,
        done: Done,
    ) -> None:
        first = (offset - MAP_OFFSET) // 4
        by = vid_of(oid)
        epoch = self._gateway.state.epoch
        old = memoryview(old_map).cast("I")
        new = memoryview(bytes(data)).cast("I")
        pairs = memoryview(old_refs).cast("i")
        writes: list[tuple[int, Buffer]] = [(offset, data)]
        drops: list[Drop] = []
        run_start = -1
        count = len(old)
        for i in range(count):
            changed = old[i] != new[i]
            if changed and old[i]:
                drops.append(Drop(data_oid(old[i], first + i), pairs[2 * i], pairs[2 * i + 1], by, epoch))
            stale = changed and (pairs[2 * i] or pairs[2 * i + 1])
            if stale and run_start < 0:
                run_start = i
            elif not stale and run_start >= 0:
                writes.append((REFS_OFFSET + 8 * (first + run_start), bytes(8 * (i - run_start))))
                run_start = -1
        if run_start >= 0:
            writes.append((REFS_OFFSET + 8 * (first + run_start), bytes(8 * (count - run_start))))
        left = len(writes)
        worst = 0

        def written(result: int) -> None:
            nonlocal left, worst
            worst = worst or result
            left -= 1
            if left:
                return
            if worst or not drops:
                done(worst)
            elif self._drop_first() or any(not lost.generation and not lost.count for lost in drops):
                # A private object is removed before the answer: its owner may create it again right afterwards.
                self._drop_then(drops, lambda: done(0))
            else:
                done(0)
                self._drop_then(drops, None)

        for where, content in writes:
            self._primary.write_now(oid, where, content, placement, written)

    # ---- dropping

    def _drop_then(self, drops: list[Drop], after: Callable[[], None] | None) -> None:
        left = len(drops)

        def dropped() -> None:
            nonlocal left
            left -= 1
            if not left and after is not None:
                after()

        for lost in drops:
            self._drops.append((lost, dropped))
        self._start_drops()

    def _start_drops(self) -> None:
        while self._drops and self._dropping < DROPS_INFLIGHT_MAX:
            lost, after = self._drops.popleft()
            self._dropping += 1
            self.release(lost, partial(self._dropped, lost, after))

    def _dropped(self, drop: Drop, after: Callable[[], None] | None, result: int) -> None:
        self._dropping -= 1
        if result and result != Result.NO_OBJ:
            logger.warning("could not release oid=%016x held by vid=%x: result=0x%02x", drop.oid, drop.by, result)
        if after is not None:
            after()
        self._start_drops()

    def release(self, drop: Drop, done: Done) -> None:
        """One reference is given up."""
        if drop.generation or drop.count:
            self._gateway.submit_decref(ledger_oid(drop.oid), drop.generation, drop.count, done)
        elif vid_of(drop.oid) == drop.by:
            # The owner may make it again as soon as the map write is answered. In this epoch that is after the removal,
            # but another primary of the map does not know of it, and then the object must stay.
            state = self._gateway.state
            if state.epoch == drop.epoch:
                self._gateway.submit_remove(drop.oid, done, wanted=lambda: state.epoch == drop.epoch)
            else:
                done(Result.OLD_NODE_VER)
        else:
            # Never shared, yet made by somebody else: the pair was lost. Leaking one object beats losing one.
            logger.warning("vid=%x gives up oid=%016x without a reference count; keeping the object", drop.by, drop.oid)
            done(0)

    @property
    def idle(self) -> bool:
        """No reference is waiting to be dropped."""
        return not self._drops and not self._dropping

    # ---- ledgers, at their primary

    def decref(self, oid: int, generation: int, count: int, placement: Placement, done: Done) -> None:
        """The ledger ``oid`` loses one reference of ``generation`` that had ``count`` children."""
        self._primary.enter(oid, True, lambda finish: self._decref(oid, generation, count, placement, finish), done)

    def _decref(self, oid: int, generation: int, count: int, placement: Placement, done: Done) -> None:
        key = ShardKey(oid, REPLICA)
        shards = self._primary.shards
        store = shards.store

        def load() -> Ledger | None:
            buffer = bytearray(LEDGER_BYTES)
            try:
                store.read_into(key, memoryview(buffer), offset_bytes=0)
            except ObjectNotFound:
                return None
            return decode(buffer)

        def first_loaded(result: int, ledger: Any) -> None:  # Any: what load() returned
            recovery = self._primary.recovery
            if not result and ledger is None and recovery is not None and recovery.may_find(oid):
                recovery.fetch(oid, REPLICA, fetched)
            else:
                loaded(result, ledger)

        def fetched(result: int) -> None:
            if result and result != Result.NO_OBJ:
                done(result)
            else:
                shards.submit(load, loaded)

        def attempted(expected: Ledger | None, after: Callable[[], None], result: int) -> None:
            """A change was tried. It counts once it is done here, for settling brings it to the others."""

            def compare(outcome: int, ledger: Any) -> None:  # Any: what load() returned
                if outcome or ledger != expected:
                    done(result)
                else:
                    after()

            if result in RETRYABLE:
                shards.submit(load, compare)
            elif result and result != Result.NO_OBJ:
                done(result)
            else:
                after()

        def loaded(result: int, ledger: Any) -> None:  # Any: what load() returned
            if result:
                done(result)
                return
            stored = ledger is not None
            try:
                changed = drop(ledger if stored else UNSHARED, generation, count)
            except InvalidParameters as error:
                done(error.result)
                return
            if changed:
                written = partial(attempted, changed, lambda: done(0))
                content = encode(changed)
                if stored:
                    content = content.ljust(4 * len(ledger), b"\0")  # counters that became zero are cleared
                    self._primary.write_now(oid, 0, content, placement, written)
                else:
                    self._primary.create_now(oid, 0, content, placement, written)
                return

            def ledger_gone() -> None:
                self._gateway.submit_remove(ledger_subject(oid), removed)

            def removed(outcome: int) -> None:
                done(0 if outcome == Result.NO_OBJ else outcome)

            if stored:
                self._primary.remove_now(oid, placement, partial(attempted, None, ledger_gone))
            else:
                ledger_gone()

        shards.submit(load, first_loaded)
