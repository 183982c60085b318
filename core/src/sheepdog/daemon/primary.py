"""The primary of an object: puts the changes to it in order and brings them to every holder.

Every change of an object goes through the first node of its placement. Changes of one object share a *lane*: plain
writes of replicated objects follow each other without waiting for answers, because a holder applies what comes over one
connection in the order it comes; whatever reads before it writes (creates, erasure-coded writes, map writes, removals,
settling) runs alone in its lane. So two gateways can never leave two copies in different states.

A change that reached only some holders marks the object as unsettled (see ``unsettled``).

A sheep learns of a new epoch in its own time. Until then it answers reads from copies that may not be among the
object's holders any more; so a change waits until every former holder is known to have come to the present epoch.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from sheepdog.contracts.store import REPLICA, Buffer, ShardKey
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.placement import Placement, Placer
from sheepdog.daemon.shards import INLINE_BYTES_MAX, Shards
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.unsettled import Unsettled
from sheepdog.model.clusterinfo import ClusterStatus
from sheepdog.model.ids import is_sparse
from sheepdog.model.node import NodeId
from sheepdog.model.ring import Ring
from sheepdog.wire.extensions import LOW_WATER
from sheepdog.wire.header import Response
from sheepdog.wire.opcodes import Op
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.recovery import Recovery

logger = logging.getLogger(__name__)

FORMER_MAX = 64

Done: TypeAlias = Callable[[int], None]
Start: TypeAlias = Callable[[Done], None]

# What a gateway answers by trying again (wire protocol, section 7).
RETRYABLE = frozenset(
    {
        Result.OLD_NODE_VER,
        Result.NEW_NODE_VER,
        Result.NETWORK_ERROR,
        Result.WAIT_FOR_JOIN,
        Result.WAIT_FOR_FORMAT,
        Result.KILLED,
        Result.SHUTDOWN,
    }
)


class _Lane:
    """The order of one object's changes while any is under way."""

    __slots__ = ("alone", "running", "waiting")

    def __init__(self) -> None:
        self.running = 0
        self.alone = False
        self.waiting: deque[tuple[bool, Start, Done]] | None = None  # made when somebody has to


class FanOut:
    """Collects the results of one change at its holders and answers when the last is in."""

    __slots__ = ("_count", "_done", "_left", "_sequence", "_unsettled", "missing", "result", "succeeded")

    def __init__(self, count: int, unsettled: Unsettled, oid: int, done: Done) -> None:
        self._count = count
        self._left = count
        self._done = done
        self._unsettled = unsettled
        self._sequence = unsettled.begin(oid)
        self.result = 0
        self.succeeded = 0
        self.missing = 0

    @property
    def sequence(self) -> int:
        return self._sequence

    def one(self, result: int, _: object = None) -> None:
        """A holder's result is in. An error that no retry can mend outweighs one that it can."""
        if not result:
            self.succeeded += 1
        elif result == Result.NO_OBJ:
            self.missing += 1
        elif not self.result or self.result in RETRYABLE:
            self.result = result
        self._left -= 1
        if not self._left:
            self._finish()

    def answered(self, response: Response) -> None:
        """As ``one``, for an answer from another sheep."""
        if response.result:
            self.one(response.result)
            return
        self.succeeded += 1
        self._left -= 1
        if not self._left:
            self._finish()

    def _finish(self) -> None:
        result = self.result
        if self.missing and not result:
            # Some have the object and some do not: settling gives it to all, then the gateway's retry succeeds.
            result = Result.NETWORK_ERROR if self.succeeded else Result.NO_OBJ
        # Whoever did not answer, or answered from a newer epoch, may have applied it nevertheless.
        self._unsettled.end(self._sequence, complete=not result or self.missing == self._count)
        self._done(result)

    def unsent(self, result: int) -> None:
        """Instead of all results: no holder has heard of the change."""
        self._unsettled.end(self._sequence, complete=True)
        self._done(result)


class Primary:
    """Orders the changes of the objects whose first holder is this sheep."""

    def __init__(
        self,
        state: SheepState,
        shards: Shards | None,
        peers: PeerPool,
        placer: Placer,
        unsettled: Unsettled,
        recovery: Recovery | None = None,
    ) -> None:
        self._state = state
        self._shards = shards
        self._peers = peers
        self._placer = placer
        self.unsettled = unsettled
        self.recovery = recovery
        self._lanes: dict[int, _Lane] = {}
        self._ring = state.ring
        self._former: list[Ring] = []  # older rings; an empty one stands for those that are not known here
        self._behind: dict[NodeId, None] = {}  # sheep of which we do not know that they have left the older rings
        self._asking: set[NodeId] = set()
        state.observe(self._changed)
        self._told: dict[NodeId, int] = {}  # the low-water mark that each holder heard last

    @property
    def shards(self) -> Shards:
        """The local store; only a sheep that stores objects is ever a primary."""
        assert self._shards is not None, "a gateway cannot be a primary"
        return self._shards

    # ---- order

    def enter(self, oid: int, alone: bool, start: Start, done: Done) -> None:
        """``start(finish)`` runs in the object's lane: at once, or after what came before it."""
        lane = self._lanes.get(oid)
        if lane is None:
            lane = self._lanes[oid] = _Lane()
        elif lane.waiting or lane.alone or (alone and lane.running):
            if lane.waiting is None:
                lane.waiting = deque()
            lane.waiting.append((alone, start, done))
            return
        self._run(oid, lane, alone, start, done)

    def _run(self, oid: int, lane: _Lane, alone: bool, start: Start, done: Done) -> None:
        lane.running += 1
        lane.alone = alone
        start(partial(self._finished, oid, lane, done))

    def _finished(self, oid: int, lane: _Lane, done: Done, result: int) -> None:
        lane.running -= 1
        if not lane.running:
            lane.alone = False
        while lane.waiting and not lane.alone and not (lane.waiting[0][0] and lane.running):
            self._run(oid, lane, *lane.waiting.popleft())
        if not lane.running and not lane.waiting and self._lanes.get(oid) is lane:
            del self._lanes[oid]
        done(result)

    def busy(self, oid: int) -> bool:
        """A change of this object is under way."""
        return oid in self._lanes

    @property
    def lanes(self) -> int:
        """Objects of which changes are under way."""
        return len(self._lanes)

    def ended_at(self, epoch: int, result: int) -> int:
        """A change that ended under a newer epoch may have missed a new holder: the gateway repeats it there."""
        return result if result or self._state.epoch == epoch else Result.OLD_NODE_VER

    def refusal(self, oid: int, placement: Placement) -> int:
        """Why a change cannot be made now at the holders of ``placement``; 0 if it can."""
        state = self._state
        if placement.ring is not state.ring or state.status is not ClusterStatus.OK:
            return Result.OLD_NODE_VER  # while the change waited for its turn an epoch began, or our session ended
        if self._behind and self._served_elsewhere(oid, placement):
            return Result.NETWORK_ERROR
        return 0

    # ---- the beginning of an epoch

    def _changed(self) -> None:
        """With a new ring, other sheep may go on under an older one for a moment."""
        state = self._state
        ring, self._ring = self._ring, state.ring
        if ring is self._ring:
            return
        self._former.append(ring)
        if len(self._former) > FORMER_MAX:
            self._former = [Ring(())]
        self._behind = dict.fromkeys(node.id for node in self._ring.with_disks if node.id != state.me.id)
        self._ask_behind()

    def _served_elsewhere(self, oid: int, placement: Placement) -> bool:
        """A former holder may still answer reads of ``oid`` from its copy, which the change would not reach."""
        behind = [node for node in self._behind if node not in placement.holders]
        if not behind:
            return False  # who holds it now answers the change only when it has come to this epoch
        shards = placement.scheme.shards
        return any(
            not ring.storage or any(node.id in behind for node in ring.holders(oid, shards)) for ring in self._former
        )

    def _ask_behind(self) -> None:
        """Every answer tells the epoch of who gives it."""
        low_water = self.unsettled.low_water
        for node in list(self._behind):
            if node not in self._asking:
                self._asking.add(node)
                self._peers.link(node).object_request(
                    LOW_WATER, self._state.epoch, 0, partial(self._epoch_told, node), tail=low_water
                )

    def _epoch_told(self, node: NodeId, response: Response) -> None:
        self._asking.discard(node)
        if response.result != Result.NETWORK_ERROR and (response.epoch - self._state.epoch) & 0xFFFFFFFF < 0x80000000:
            self._behind.pop(node, None)
            if not self._behind:
                self._former.clear()

    # ---- replicated objects

    def write(self, oid: int, offset: int, data: Buffer, placement: Placement, done: Done) -> None:
        """Bytes of an existing object are replaced at every holder."""
        alone = len(data) > INLINE_BYTES_MAX or self.shards.busy(placement.replica)
        if not alone and oid not in self._lanes:
            # As ``enter`` would do it: most changes find nothing under way.
            lane = self._lanes[oid] = _Lane()
            lane.running = 1
            self.write_now(oid, offset, data, placement, partial(self._finished, oid, lane, done))
            return
        self.enter(oid, alone, lambda finish: self.write_now(oid, offset, data, placement, finish), done)

    def write_now(
        self, oid: int, offset: int, data: Buffer, placement: Placement, done: Done, *, fetched: bool = False
    ) -> None:
        """As ``write``, for a caller that is in the lane already.

        :param fetched: a copy that was missing here has been brought.
        """
        refused = self.refusal(oid, placement)
        if refused:
            done(refused)
            return
        epoch = self._state.epoch
        shards = self.shards
        key = placement.replica
        links = placement.links
        fan = FanOut(1 + len(links), self.unsettled, oid, done)
        # The local write is first: an object that is missing here is fetched before anybody's copy changes.
        result = shards.try_write(key, offset, data)
        if result:
            if result != Result.NO_OBJ or self.recovery is None or fetched:
                fan.unsent(result)
                return

            def again(outcome: int) -> None:
                if outcome:
                    fan.unsent(outcome)
                else:
                    self.unsettled.end(fan.sequence, complete=True)
                    self.write_now(oid, offset, data, placement, done, fetched=True)

            # What comes later waits: its client may have sent it after this one's client gave up.
            self._lanes[oid].alone = True
            self.recovery.fetch(oid, REPLICA, again)
            return

        if links:
            sequence, low_water, copies = fan.sequence, self.unsettled.low_water, placement.copies
            for link in links:
                link.change_request(
                    Op.WRITE_PEER, epoch, oid, offset, data, copies, 0, 0, sequence, low_water, fan.answered
                )
        if result is None:
            shards.write(key, offset, data, lambda outcome, _: fan.one(self.ended_at(epoch, outcome)))
        elif shards.durable:
            shards.commit(key, lambda outcome, _: fan.one(self.ended_at(epoch, outcome)))
        else:
            fan.one(0)

    def create(self, oid: int, offset: int, data: Buffer, placement: Placement, done: Done) -> None:
        """The object exists at every holder, zeros but for ``data``; an older one is replaced."""
        self.enter(oid, True, lambda finish: self.create_now(oid, offset, data, placement, finish), done)

    def create_now(self, oid: int, offset: int, data: Buffer, placement: Placement, done: Done) -> None:
        """As ``create``, for a caller that is in the lane already."""
        refused = self.refusal(oid, placement)
        if refused:
            done(refused)
            return
        epoch = self._state.epoch
        fan = FanOut(1 + len(placement.others), self.unsettled, oid, done)
        for link in placement.links:
            link.change_request(
                Op.CREATE_AND_WRITE_PEER, epoch, oid, offset, data, placement.copies, placement.policy, 0,
                fan.sequence, self.unsettled.low_water, fan.answered,
            )  # fmt: skip
        self.shards.create(
            placement.replica, offset, data, max(placement.object_bytes, offset + len(data)), is_sparse(oid),
            lambda result, _: fan.one(self.ended_at(epoch, result)),
        )  # fmt: skip

    def remove(self, oid: int, placement: Placement, done: Done) -> None:
        """The object is gone at every holder; NO_OBJ when nobody had it. Serves erasure-coded objects too."""
        self.enter(oid, True, lambda finish: self.remove_now(oid, placement, finish), done)

    def remove_now(self, oid: int, placement: Placement, done: Done) -> None:
        refused = self.refusal(oid, placement)
        if refused:
            done(refused)
            return
        epoch = self._state.epoch
        identical = placement.scheme.identical

        def finish(result: int) -> None:
            # A holder that lacked it is no obstacle: nobody has it now, which is what was asked for.
            if fan.result not in RETRYABLE:
                self.unsettled.settled(oid)
            done(0 if fan.succeeded and not fan.result else result)

        fan = FanOut(len(placement.holders), self.unsettled, oid, finish)
        for index, node in enumerate(placement.holders):
            if node == self._state.me.id:
                key = ShardKey(oid, REPLICA if identical else index)
                self.shards.remove(key, lambda result, _: fan.one(self.ended_at(epoch, result)))
            else:
                self._peers.link(node).object_request(
                    Op.REMOVE_PEER, epoch, oid, fan.answered, ec_index=index, copy_policy=placement.policy,
                    tail=self.unsettled.low_water,
                )  # fmt: skip

    # ---- settling

    def settle(self, oid: int, done: Done) -> None:
        """Every holder has the same version of the object (see ``recovery_settle``)."""
        mender = self.recovery.mender if self.recovery is not None else None
        if mender is None:
            done(Result.OLD_NODE_VER)
            return
        self.enter(oid, True, partial(mender.settle, oid), done)

    # ---- now and then

    def tick(self) -> None:
        """Holders that have had nothing from us since are told the low-water mark; who may be behind is asked."""
        if self._behind:
            self._ask_behind()
        low_water = self.unsettled.low_water
        for node in self._state.ring.nodes:
            if node.id != self._state.me.id and self._told.get(node.id, 1) != low_water:
                self._told[node.id] = low_water
                self._peers.link(node.id).object_request(
                    LOW_WATER, self._state.epoch, 0, partial(self._low_water_told, node.id), tail=low_water
                )

    def _low_water_told(self, node: NodeId, response: Response) -> None:
        if response.result == Result.NETWORK_ERROR:
            self._told.pop(node, None)  # it has not heard: told again with the next tick
