"""The write hole of erasure coding, closed: a change of strips that died half-way is taken back or kept as a whole.

A change reaches the holders of an object one by one. When it stops in the middle, some strips are new and some are
old, and a strip that has to be computed from such a mixture is garbage, even where nobody wrote. So every holder
keeps, for each object, what the bytes of its strip were before the last change, together with the number of that
change. When the object is settled (``recovery_settle``), and before anything is computed from its strips, the primary
asks the members for these records:

* every present holder of that change has it whole: it may have been acknowledged, and stays. A holder that does not
  know the primary of the change is not counted: its memory began later;
* somebody knows that it is complete: it stays;
* otherwise nobody was told that it succeeded: those who have it, or a part of it, put the old bytes back.

A record goes when the next change of the object replaces it, or when it is decided. A number consists of 32 bits
drawn at random by the primary when it starts, and its own count of changes; with each change it tells below which
count all are complete (the low-water mark), so a holder that has dropped its record knows that the change was
complete.

Records are in memory, and in a journal of which they are read back after a crash (``strip_store``, ``journal``). That a
holder has no record of a change means something only if its memory goes back so far: it may have a new disk, or have
been stopped in order meanwhile. So a primary introduces itself to each holder, once in every epoch, before the first
change; what it says is in the journal as well, and a holder that has not heard of a primary does not testify against
its changes.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable
from functools import partial
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import anyio

from sheepdog.contracts.store import Buffer, ObjectStore, ShardKey, Staged
from sheepdog.daemon.journaled_store import JournaledStore
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.strip_memory import (
    COUNT_MASK,
    NODE_PACKED_BYTES,
    Pieces,
    Record,
    StripChange,
    StripMemory,
    unpack_nodes,
)
from sheepdog.daemon.strip_store import REDO_BYTES_MAX, strips_of
from sheepdog.errors import ObjectNotFound, StoreBusy
from sheepdog.model.node import NodeId
from sheepdog.wire.extensions import STRIP_DECIDE, STRIP_HELLO, STRIP_STATE
from sheepdog.wire.header import Response
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.primary import Primary

logger = logging.getLogger(__name__)

Done: TypeAlias = Callable[[int, Any], None]  # Any: whatever the operation gives

# number, epoch, start of the primary, is the strip whole?; of the number asked for: is its primary known, is it
# complete?; count of holders
_STATE = Struct("<QIIBBBB")
STATE_BYTES_MAX = _STATE.size + 31 * NODE_PACKED_BYTES


class StripState(NamedTuple):
    """What a member says of one object."""

    number: int  # of its record, 0 for none
    epoch: int
    start: int
    whole: bool  # the strip is as after that change
    knows: bool  # it would have a record of the change that was asked for, had it got it as the last one
    complete: bool  # the change that was asked for is known to be complete
    holders: tuple[NodeId, ...]

    @property
    def age(self) -> tuple[int, int, int]:
        """Grows with each change of one object."""
        return self.epoch, self.start, self.number & COUNT_MASK

    def has(self, last: StripState) -> bool:
        """The strip is as after the change that ``last`` tells of."""
        return self.number == last.number and self.whole


class StripUndo:
    """The records of one sheep, and what it asks of others as a primary."""

    def __init__(
        self,
        state: SheepState,
        primary: Primary,
        peers: PeerPool,
        shards: Shards | None,
        start: int = 0,
    ) -> None:
        """:param start: of this process: a count that has grown since its last one."""
        self._state = state
        self.start = start
        self._primary = primary
        self._peers = peers
        self._shards = shards
        self.memory = strips_of(shards.store) if shards is not None else StripMemory()
        self._introduced: set[NodeId] = set()  # in this epoch
        self._epoch = 0
        state.observe(self._state_changed)
        # Not from Services: it only has to differ from that of any other start of any sheep.
        self._base = random.SystemRandom().getrandbits(31) << 32 | 1 << 63

    def _state_changed(self) -> None:
        """With a new epoch somebody may be there who has forgotten us."""
        if self._state.epoch != self._epoch:
            self._epoch = self._state.epoch
            self._introduced.clear()

    # ---- as primary: numbers

    def number(self, sequence: int) -> int:
        """The number of a change of ours, given its place in our count."""
        return self._base | sequence

    def strangers(self, nodes: Iterable[NodeId]) -> list[NodeId]:
        """Those that may not know us yet."""
        return [node for node in nodes if node not in self._introduced]

    def introduce(self, nodes: list[NodeId], done: Callable[[int], None]) -> None:
        """These know that changes of ours are to come, and will know it after a crash."""
        state = self._state
        epoch = state.epoch
        left = len(nodes)
        worst = 0

        def one(node: NodeId, result: int, _: object = None) -> None:
            nonlocal left, worst
            left -= 1
            if result:
                worst = worst or result
            elif state.epoch == epoch:
                self._introduced.add(node)
            if not left:
                done(worst)

        def answered(node: NodeId, response: Response) -> None:
            one(node, response.result)

        low_water = self._primary.unsettled.low_water
        for node in nodes:
            if node == state.me.id:
                self.meet(self._base, low_water, partial(one, node))
            else:
                self._peers.link(node).object_request(
                    STRIP_HELLO, epoch, 0, partial(answered, node), cow_oid=self._base, tail=low_water
                )

    # ---- as holder

    def meet(self, base: int, low_water: int, done: Done) -> None:
        """Changes of a primary are to come: from now on it means something that one of them is not on record here."""
        self.memory.mark(base >> 32, low_water)
        shards = self._shards
        if shards is not None and isinstance(store := shards.store, JournaledStore):
            shards.submit(partial(store.meet_primary, base >> 32, low_water), done)
        else:
            done(0, None)

    def write(
        self,
        key: ShardKey,
        pieces: Pieces,
        number: int,
        start: int,
        low_water: int,
        holders: tuple[NodeId, ...],
        done: Done,
    ) -> None:
        """Bytes of a strip are replaced, and can be put back.

        :param pieces: one or more; they do not overlap.
        """
        shards = self._shards
        assert shards is not None, "a sheep with strips has a store"
        state = self._state
        epoch = state.epoch
        if not number:  # a piece of a strip that is being brought whole
            self.forget(key.oid)
            for offset, data in pieces:
                shards.write_plainly(key, offset, data, done)
            return

        def make(before: Pieces, staged: Staged | None) -> None:
            if state.epoch != epoch:
                # Whether the change is here may have been asked meanwhile, and the answer was no.
                stored(Result.OLD_NODE_VER, None, staged)
                return
            record = Record(number, epoch, start, key, before, holders, exchange=staged)
            self.memory.note(record, low_water)
            change = StripChange(record, low_water, () if staged else pieces, staged)
            shards.write_strip(change, partial(stored, staged=staged, noted=True))

        def stored(result: int, _: object, staged: Staged | None, noted: bool = False) -> None:
            if result and noted:
                self.forget(key.oid)  # nothing was written here
            if result and staged is not None:
                shards.store.unstage(staged)
            done(result, None)

        def ready(staged: Staged | None) -> None:
            if staged is None:
                self._read_old(key, pieces, make, done)
            else:
                make((), staged)

        if len(pieces) > 1 or pieces[0][0] or len(pieces[0][1]) <= REDO_BYTES_MAX:
            ready(None)
        else:
            shards.stage(key, pieces[0][1], ready)

    def _read_old(self, key: ShardKey, pieces: Pieces, make: Callable[[Pieces, None], None], done: Done) -> None:
        """``make`` is given what the pieces are now."""
        shards = self._shards
        assert shards is not None, "a sheep with strips has a store"
        old: list[Buffer] = [b""] * len(pieces)
        worst = 0
        left = len(pieces) + 1

        def one(place: int, result: int, data: Any) -> None:  # Any: the bytes on success
            nonlocal worst, left
            left -= 1
            if result == Result.EIO:
                # Corrupt: nothing to put back, and no reason to refuse the write for ever. The change is on record all
                # the same: a holder that knows nothing of it would testify that it was never made.
                old[place] = bytes(pieces[place][1])
            elif result:
                worst = worst or result
            elif place >= 0:
                old[place] = data
            if left:
                return
            if worst:
                done(worst, None)
            else:
                make(tuple((offset, former) for (offset, _), former in zip(pieces, old, strict=True)), None)

        for place, (offset, data) in enumerate(pieces):
            shards.read(key, offset, len(data), partial(one, place))
        one(-1, 0, None)

    def forget(self, oid: int) -> None:
        """The object was made anew, removed or decided upon."""
        self.memory.drop(oid)

    def _known_complete(self, oid: int, number: int) -> bool:
        self.memory.mark(self._base >> 32, self._primary.unsettled.low_water)
        return self.memory.complete(oid, number)

    def state_of(self, oid: int, asked: int) -> bytes:
        """The answer to STRIP_STATE."""
        record = self.memory.records.get(oid)
        complete = bool(asked) and self._known_complete(oid, asked)
        knows = asked >> 32 in self.memory.marks
        if record is None:
            return _STATE.pack(0, 0, 0, False, knows, complete, 0)
        head = _STATE.pack(
            record.number, record.epoch, record.start, record.whole, knows, complete, len(record.holders)
        )
        return head + b"".join(node.pack() for node in record.holders)

    def decide(self, oid: int, number: int, stays: bool, done: Done) -> None:
        """The change stays, or is taken back here. Any other change of the object of which we have a record stays."""
        shards = self._shards
        record = self.memory.records.get(oid)
        if not stays and record is not None and record.number != number:
            number, stays = record.number, True  # the one before, which was complete when the other one began
        if stays:
            self.memory.keep(oid, number)
            if shards is not None and isinstance(store := shards.store, JournaledStore):
                # After the change itself, which may be on its way to the journal still.
                key = record.key if record is not None else ShardKey(oid)
                shards.run(key, partial(store.keep_strip, oid, number), done)
            else:
                done(0, None)
            return
        if record is None:
            done(0, None)
            return
        assert shards is not None, "a record is of a strip that is stored here"
        store = shards.store
        durable = shards.durable
        logger.info("oid=%016x: taking back a change of strip %d", oid, record.key.index)

        def ended(result: int, _: object) -> None:
            if not result:
                self.forget(oid)
            done(result, None)

        shards.run(record.key, lambda: _put_back(store, record, durable), ended)

    # ---- as primary: deciding

    def resolve(self, oid: int, done: Callable[[int], None]) -> None:
        """No change of the object is half-way any more. For a caller that is alone in the object's lane."""
        _Resolve(self, oid, done).start()

    async def resolved(self, oid: int) -> int:
        """As ``resolve``; returns the result."""
        event = anyio.Event()
        results: list[int] = []

        def done(result: int) -> None:
            results.append(result)
            event.set()

        self.resolve(oid, done)
        await event.wait()
        return results[0]

    @property
    def epoch(self) -> int:
        """Under which holders are asked and told."""
        return self._state.epoch

    def members(self) -> list[NodeId]:
        """Whoever may have a record: also a member whose disk is so small by now that it holds nothing."""
        return [node.id for node in self._state.ring.with_disks]

    def ask(self, node: NodeId, oid: int, number: int, done: Callable[[int, StripState | None], None]) -> None:
        """What ``node`` has of the object."""
        if node == self._state.me.id:
            done(0, _unpack(self.state_of(oid, number)))
            return

        def answered(response: Response) -> None:
            done(response.result, None if response.result else _unpack(response.body))

        self._peers.link(node).object_request(
            STRIP_STATE, self._state.epoch, oid, answered, cow_oid=number, length=STATE_BYTES_MAX
        )

    def tell(self, node: NodeId, oid: int, number: int, stays: bool, done: Callable[[int], None]) -> None:
        """``node`` does what was decided."""
        if node == self._state.me.id:
            self.decide(oid, number, stays, lambda result, _: done(result))
            return
        self._peers.link(node).object_request(
            STRIP_DECIDE, self._state.epoch, oid, lambda response: done(response.result), cow_oid=number,
            tgt_epoch=int(stays),
        )  # fmt: skip


def _unpack(body: Buffer) -> StripState:
    number, epoch, start, whole, knows, complete, count = _STATE.unpack_from(body)
    holders = unpack_nodes(body, _STATE.size, count)
    return StripState(number, epoch, start, bool(whole), bool(knows), bool(complete), holders)


def _put_back(store: ObjectStore, record: Record, durable: bool) -> None:
    """The strip has its old bytes, be it live or set aside meanwhile. On a worker thread."""
    key = record.key

    def write() -> None:
        if isinstance(store, JournaledStore):
            store.doubt_strip(record)
        for offset, old in record.pieces:
            store.write(key, old, offset_bytes=offset, durable=durable)
        if record.exchange is not None and not store.put_back(key, record.exchange.old, durable=durable):
            # A disk that held it went, or whoever looked after the files. Others have what it is computed from.
            logger.warning("oid=%016x: strip %d cannot be taken back, and is made anew", key.oid, key.index)
            store.remove(key)
            store.sync((key,))
        if isinstance(store, JournaledStore):
            store.drop_strip(key)

    for _ in range(3):  # it may be set aside between two looks
        try:
            write()
            return
        except ObjectNotFound:
            pass
        aside = max((epoch for stale, epoch in store.stale_keys() if stale == key), default=None)
        if aside is not None:
            store.revive(key, aside)
            write()
            store.retire(key, aside)
            return
        if not store.exists(key):
            return  # a disk went, and the strip with it
    raise StoreBusy(f"oid={key.oid:016x} is being moved")


class _Resolve:
    """One decision, made in one epoch: in the next one it may be another sheep's to make."""

    __slots__ = ("_done", "_epoch", "_left", "_oid", "_result", "_states", "_undo")

    def __init__(self, undo: StripUndo, oid: int, done: Callable[[int], None]) -> None:
        self._undo = undo
        self._oid = oid
        self._done = done
        self._epoch = undo.epoch
        self._left = 0
        self._result = 0
        self._states: dict[NodeId, StripState] = {}

    def start(self) -> None:
        self._ask(self._undo.members(), 0, self._collected)

    def _ask(self, nodes: list[NodeId], number: int, then: Callable[[], None]) -> None:
        self._left = len(nodes) + 1
        for node in nodes:
            self._undo.ask(node, self._oid, number, partial(self._answered, node, then))
        self._one(then)

    def _answered(self, node: NodeId, then: Callable[[], None], result: int, state: StripState | None) -> None:
        if state is None:
            self._result = result or Result.NETWORK_ERROR
        else:
            self._states[node] = state
        self._one(then)

    def _one(self, then: Callable[[], None]) -> None:
        self._left -= 1
        if not self._left:
            if self._result:
                self._done(self._result)
            elif self._undo.epoch != self._epoch:
                self._done(Result.OLD_NODE_VER)
            else:
                then()

    def _collected(self) -> None:
        with_record = [state for state in self._states.values() if state.number]
        if not with_record:
            self._done(0)
            return
        last = max(with_record, key=lambda state: state.age)
        if all(state.has(last) for node, state in self._states.items() if node in last.holders):
            self._tell(last.number, True)
            return
        self._ask(list(self._states), last.number, lambda: self._judge(last))

    def _judge(self, last: StripState) -> None:
        states = self._states
        lacking = any(not state.has(last) and node in last.holders and state.knows for node, state in states.items())
        self._tell(last.number, not lacking or any(state.complete for state in states.values()))

    def _tell(self, number: int, stays: bool) -> None:
        nodes = [node for node, state in sorted(self._states.items()) if state.number or stays]
        self._left = len(nodes) + 1

        def told(result: int) -> None:
            self._result = self._result or result
            self._one(lambda: self._done(0))

        for node in nodes:
            self._undo.tell(node, self._oid, number, stays, told)
        told(0)


def register(
    undo: StripUndo, path: Callable[[int, Callable[[Any, Any], None]], None], answer: Callable[..., Done]
) -> None:
    """The peer operations are served.

    :param path: registers a handler of (connection, request).
    :param answer: makes what replies to a request.
    """

    def state(connection: Any, request: Any) -> None:  # Any: a ClientConnection and a Request, as path wants them
        answer(connection, request, read=True)(0, undo.state_of(request.oid, request.cow_oid))

    def decide(connection: Any, request: Any) -> None:  # Any: as above
        undo.decide(request.oid, request.cow_oid, bool(request.tgt_epoch), answer(connection, request))

    def hello(connection: Any, request: Any) -> None:  # Any: as above
        undo.meet(request.cow_oid, request.tail, answer(connection, request))

    path(STRIP_STATE, state)
    path(STRIP_HELLO, hello)
    path(STRIP_DECIDE, decide)
