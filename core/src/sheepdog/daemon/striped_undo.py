"""The write hole of erasure coding, closed: a change of strips that died half-way is taken back or kept as a whole.

A change reaches the holders of an object one by one. When it stops in the middle, some strips are new and some are
old, and a strip that has to be computed from such a mixture is garbage, even where nobody wrote. So every holder
keeps, for each object, what the bytes of its strip were before the last change, together with the number of that
change. When the object is settled (``recovery_settle``), and before anything is computed from its strips, the primary
asks the members for these records:

* every present holder of that change has it: it may have been acknowledged, and stays. A holder whose process began
  after the change has no memory of it and is not counted;
* somebody knows that it is complete: it stays;
* otherwise nobody was told that it succeeded: those who have it put the old bytes back.

A record goes when the next change of the object replaces it, or when it is decided. A number consists of 32 bits
drawn at random by the primary when it starts, and its own count of changes; with each change it tells below which
count all are complete (the low-water mark), so a holder that has dropped its record knows that the change was
complete.

Records are in memory. When all holders die at once there are none, and the data strips count as they are: the parity is
computed from them (``recovery_settle``).
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from functools import partial
from struct import Struct
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import anyio

from sheepdog.contracts.store import Buffer, ObjectStore, ShardKey
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.state import SheepState
from sheepdog.errors import ObjectNotFound, StoreBusy
from sheepdog.model.clusterinfo import ClusterStatus
from sheepdog.model.node import NodeId
from sheepdog.wire.extensions import STRIP_DECIDE, STRIP_STATE
from sheepdog.wire.header import Response
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.primary import Primary

logger = logging.getLogger(__name__)

Done: TypeAlias = Callable[[int, Any], None]  # Any: whatever the operation gives

RECORDS_MAX = 1 << 16
RECORD_BYTES_MAX = 64 << 20  # of old strips together; beyond, those of complete changes go first
NODE_PACKED_BYTES = 40
# number, epoch, first epoch of this process, is the number that was asked for complete?, count of holders
_STATE = Struct("<QIIBB")
STATE_BYTES_MAX = _STATE.size + 31 * NODE_PACKED_BYTES
COUNT_MASK = 0xFFFFFFFF


class Record(NamedTuple):
    """What a strip was before one change of its object."""

    number: int
    epoch: int
    key: ShardKey
    offset: int
    old: Buffer
    holders: tuple[NodeId, ...]  # all that the change was sent to

    @property
    def age(self) -> tuple[int, int]:
        """Grows with each change of one object."""
        return self.epoch, self.number & COUNT_MASK


class StripState(NamedTuple):
    """What a member says of one object."""

    number: int  # of its record, 0 for none
    epoch: int
    since: int  # the first epoch that the process took part in, 0 for none so far
    complete: bool  # the change that was asked for is known to be complete
    holders: tuple[NodeId, ...]

    @property
    def age(self) -> tuple[int, int]:
        return self.epoch, self.number & COUNT_MASK


class StripUndo:
    """The records of one sheep, and what it asks of others as a primary."""

    def __init__(self, state: SheepState, primary: Primary, peers: PeerPool, shards: Shards | None) -> None:
        self._state = state
        self._primary = primary
        self._peers = peers
        self._shards = shards
        self._records: dict[int, Record] = {}  # by oid, the change that was touched last at the end
        self._bytes = 0
        self._marks: dict[int, int] = {}  # random part of a number -> every smaller count is complete
        self._kept: dict[int, int] = {}  # oid -> the last change that was decided to stay
        self._since = 0
        state.observe(self._state_changed)
        # Not from Services: it only has to differ from that of any other start of any sheep.
        self._base = random.SystemRandom().getrandbits(31) << 32 | 1 << 63

    def _state_changed(self) -> None:
        if not self._since and self._state.status is ClusterStatus.OK:
            self._since = self._state.epoch

    # ---- as primary: numbers

    def number(self, sequence: int) -> int:
        """The number of a change of ours, given its place in our count."""
        return self._base | sequence

    # ---- as holder

    def write(
        self,
        key: ShardKey,
        offset: int,
        data: Buffer,
        number: int,
        low_water: int,
        holders: tuple[NodeId, ...],
        done: Done,
    ) -> None:
        """Bytes of a strip are replaced, and can be put back."""
        shards = self._shards
        assert shards is not None, "a sheep with strips has a store"
        epoch = self._state.epoch

        def old_read(result: int, old: Any) -> None:  # Any: the bytes on success
            if result:
                done(result, None)
                return
            self._keep(Record(number, epoch, key, offset, old, holders))
            shards.write(key, offset, data, stored)

        def stored(result: int, _: object) -> None:
            if result:
                self.forget(key.oid)  # nothing was written here
            done(result, None)

        if number:
            self._marks[number >> 32] = low_water
            shards.read(key, offset, len(data), old_read)
        else:
            self.forget(key.oid)
            shards.write(key, offset, data, done)

    def _keep(self, record: Record) -> None:
        oid = record.key.oid
        self.forget(oid)
        self._records[oid] = record
        self._bytes += len(record.old)
        if self._bytes <= RECORD_BYTES_MAX and len(self._records) <= RECORDS_MAX:
            return
        for other in list(self._records.values()):
            if self._bytes <= RECORD_BYTES_MAX // 2 and len(self._records) <= RECORDS_MAX // 2:
                break
            if self._known_complete(other.key.oid, other.number):
                self.forget(other.key.oid)

    def forget(self, oid: int) -> None:
        """The object was made anew, removed or decided upon."""
        record = self._records.pop(oid, None)
        if record is not None:
            self._bytes -= len(record.old)

    def _known_complete(self, oid: int, number: int) -> bool:
        if self._kept.get(oid) == number:
            return True
        if number & ~COUNT_MASK == self._base:
            mark: int | None = self._primary.unsettled.low_water
        else:
            mark = self._marks.get(number >> 32)
        return mark is not None and 0 < ((mark - number) & COUNT_MASK) < 0x80000000

    def state_of(self, oid: int, asked: int) -> bytes:
        """The answer to STRIP_STATE."""
        record = self._records.get(oid)
        complete = bool(asked) and self._known_complete(oid, asked)
        if record is None:
            return _STATE.pack(0, 0, self._since, complete, 0)
        head = _STATE.pack(record.number, record.epoch, self._since, complete, len(record.holders))
        return head + b"".join(node.pack() for node in record.holders)

    def decide(self, oid: int, number: int, stays: bool, done: Done) -> None:
        """The change stays, or is taken back here. Any other change of the object of which we have a record stays."""
        record = self._records.get(oid)
        if stays:
            if len(self._kept) >= RECORDS_MAX:
                del self._kept[next(iter(self._kept))]
            self._kept[oid] = number
        if record is None or record.number != number or stays:
            self.forget(oid)
            done(0, None)
            return
        shards = self._shards
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

    def members(self) -> list[NodeId]:
        return [node.id for node in self._state.ring.storage]

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
    number, epoch, since, complete, count = _STATE.unpack_from(body)
    at = _STATE.size
    holders = tuple(
        NodeId.unpack(bytes(body[at + index * NODE_PACKED_BYTES : at + (index + 1) * NODE_PACKED_BYTES]))
        for index in range(count)
    )
    return StripState(number, epoch, since, bool(complete), holders)


def _put_back(store: ObjectStore, record: Record, durable: bool) -> None:
    """The strip has its old bytes, be it live or set aside meanwhile. On a worker thread."""
    key = record.key
    for _ in range(3):  # it may be set aside between two looks
        try:
            store.write(key, record.old, offset_bytes=record.offset, durable=durable)
            return
        except ObjectNotFound:
            pass
        aside = max((epoch for stale, epoch in store.stale_keys() if stale == key), default=None)
        if aside is not None:
            store.revive(key, aside)
            store.write(key, record.old, offset_bytes=record.offset, durable=durable)
            store.retire(key, aside)
            return
        if not store.exists(key):
            return  # a disk went, and the strip with it
    raise StoreBusy(f"oid={key.oid:016x} is being moved")


class _Resolve:
    """One decision."""

    __slots__ = ("_done", "_left", "_oid", "_result", "_states", "_undo")

    def __init__(self, undo: StripUndo, oid: int, done: Callable[[int], None]) -> None:
        self._undo = undo
        self._oid = oid
        self._done = done
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
            else:
                then()

    def _collected(self) -> None:
        with_record = [state for state in self._states.values() if state.number]
        if not with_record:
            self._done(0)
            return
        last = max(with_record, key=lambda state: state.age)
        lacking = any(
            state.number != last.number and node in last.holders and 0 < state.since <= last.epoch
            for node, state in self._states.items()
        )
        if not lacking:
            self._tell(last.number, True)
            return
        self._ask(list(self._states), last.number, lambda: self._judge(last))

    def _judge(self, last: StripState) -> None:
        complete = any(state.complete for state in self._states.values())
        self._tell(last.number, complete)

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
    """The two peer operations are served.

    :param path: registers a handler of (connection, request).
    :param answer: makes what replies to a request.
    """

    def state(connection: Any, request: Any) -> None:  # Any: a ClientConnection and a Request, as path wants them
        answer(connection, request, read=True)(0, undo.state_of(request.oid, request.cow_oid))

    def decide(connection: Any, request: Any) -> None:  # Any: as above
        undo.decide(request.oid, request.cow_oid, bool(request.tgt_epoch), answer(connection, request))

    path(STRIP_STATE, state)
    path(STRIP_DECIDE, decide)
