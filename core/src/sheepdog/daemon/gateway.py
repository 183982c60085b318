"""The gateway: what a sheep does with object requests of its own clients.

Each request is a small object advanced by callbacks. A change goes to the object's primary, a read to the best holder.
What ends in a retryable way (an epoch moved on, a peer broke) is *parked* and tried again under the next epoch, or
after a short and growing delay; the client sees only final answers. Nothing here makes a task.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio

from sheepdog.contracts.services import Clock
from sheepdog.contracts.store import REPLICA, Buffer
from sheepdog.daemon.fencing import Client, Fences
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.peers import LOST, PeerPool
from sheepdog.daemon.placement import Placement, Placer
from sheepdog.daemon.primary import RETRYABLE, Primary
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.state import SheepState, always
from sheepdog.model.clusterinfo import ClusterFlag, ClusterStatus
from sheepdog.model.ids import vid_of
from sheepdog.wire.extensions import FORWARD_CREATE, FORWARD_DECREF, FORWARD_REMOVE, FORWARD_WRITE
from sheepdog.wire.header import Request, Response
from sheepdog.wire.opcodes import Flag, Op
from sheepdog.wire.payloads import RefRequest
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.changes import Changes
    from sheepdog.daemon.recovery import Recovery
    from sheepdog.daemon.striped import Striped

logger = logging.getLogger(__name__)

Done: TypeAlias = Callable[[int, Any], None]  # result code; the bytes of a read

RETRY_FIRST_S = 0.01
RETRY_MAX_S = 1.0
GIVE_UP_S = 300.0  # then the client gets EIO rather than silence


class Gateway:
    """Object requests of this sheep's clients, front ends and control plane."""

    def __init__(
        self,
        state: SheepState,
        placer: Placer,
        primary: Primary,
        peers: PeerPool,
        shards: Shards | None,
        outbox: Outbox,
        clock: Clock,
    ) -> None:
        self.state = state
        self.placer = placer
        self.peers = peers
        self.shards = shards
        self.primary = primary
        self.changes: Changes
        self.striped: Striped
        self.recovery: Recovery | None = None
        self.fences: Fences
        self._outbox = outbox
        self._clock = clock
        self._parked: list[_Operation] = []
        self._writing: dict[int, int] = {}  # oid -> changes in flight through us
        self._drains: list[_Drain] = []
        state.observe(self._state_changed)

    # ---- what the others call

    def submit_read(self, oid: int, offset: int, length: int, done: Done, *, copies: int = 0) -> None:
        """``done(SUCCESS, bytes)`` with exactly ``length`` bytes; what was never stored reads as zeros."""
        operation = _Read(self, oid, done, copies, 0)
        operation.offset = offset
        operation.length = length
        operation.start()

    def submit_write(
        self,
        oid: int,
        offset: int,
        data: Buffer,
        done: Done,
        *,
        copies: int = 0,
        policy: int = 0,
        checked: bool = True,
        client: Client | None = None,
    ) -> None:
        """Bytes of an existing object are replaced.

        :param checked: refuse data objects of snapshots.
        :param client: whoever asks. When it has gone, a change that is not on its way is dropped, and none is applied
            after a change of somebody who came later (see ``fencing``). ``None`` for this sheep itself.
        """
        self._change(FORWARD_WRITE, oid, offset, data, done, copies, policy, 0, 0, checked, client)

    def submit_create(
        self,
        oid: int,
        offset: int,
        data: Buffer,
        done: Done,
        *,
        cow_oid: int = 0,
        copies: int = 0,
        policy: int = 0,
        checked: bool = True,
        client: Client | None = None,
    ) -> None:
        """The object exists: ``data``, and around it the bytes of ``cow_oid`` or zeros."""
        flags = Flag.COW if cow_oid else 0
        self._change(FORWARD_CREATE, oid, offset, data, done, copies, policy, cow_oid, flags, checked, client)

    def submit_remove(
        self,
        oid: int,
        done: Callable[[int], None],
        *,
        client: Client | None = None,
        wanted: Callable[[], bool] | None = None,
    ) -> None:
        """The object is gone everywhere; NO_OBJ if nobody had it.

        :param client: as in ``submit_write``.
        :param wanted: whether a removal that must be tried again is still right: others may have made the object again.
        """
        self._change(FORWARD_REMOVE, oid, 0, b"", lambda result, _: done(result), 0, 0, 0, 0, False, client, wanted)

    def submit_decref(self, ledger: int, generation: int, count: int, done: Callable[[int], None]) -> None:
        """A reference to the ledger's data object is dropped, once. EIO: nobody knows whether it was."""
        operation = _Decref(self, ledger, lambda result, _: done(result), 0, 0)
        operation.generation = generation
        operation.count = count
        operation.start()

    def submit_sync(self, done: Done) -> None:
        """Everything acknowledged is on stable storage: it was when it was acknowledged (except under ``-n``)."""
        done(0, None)

    def _change(
        self,
        opcode: int,
        oid: int,
        offset: int,
        data: Buffer,
        done: Done,
        copies: int,
        policy: int,
        cow_oid: int,
        flags: int,
        checked: bool,
        client: Client | None,
        wanted: Callable[[], bool] | None = None,
    ) -> None:
        if client is not None:
            if not client.is_open():
                done(Result.NETWORK_ERROR, None)
                return
            wanted = client.is_open
        operation = _Change(self, oid, done, copies, policy)
        operation.client = client
        if wanted is not None:
            operation.wanted = wanted
        operation.opcode = opcode
        operation.offset = offset
        operation.data = data
        operation.cow_oid = cow_oid
        operation.flags = flags
        operation.checked = checked
        writing = self._writing
        writing[oid] = writing.get(oid, 0) + 1
        operation.start()

    # ---- waiting

    async def drain(self, vid: int) -> None:
        """Every change of the volume's objects that is in flight through this gateway now has ended."""
        oids = {oid: count for oid, count in self._writing.items() if vid_of(oid) == vid}
        if not oids:
            return
        drain = _Drain(oids)
        self._drains.append(drain)
        await drain.event.wait()

    def _ended(self, oid: int) -> None:
        count = self._writing[oid] - 1
        if count:
            self._writing[oid] = count
        else:
            del self._writing[oid]
        if self._drains:
            for drain in self._drains:
                drain.ended(oid)
            self._drains = [drain for drain in self._drains if drain.left]

    @property
    def changes_in_flight(self) -> int:
        """Changes that have not ended."""
        return sum(self._writing.values())

    @property
    def waiting(self) -> int:
        """Requests that wait to be tried again."""
        return len(self._parked)

    def writing(self, oid: int) -> bool:
        """A change of the object is in flight through this gateway."""
        return oid in self._writing

    def park(self, operation: _Operation) -> None:
        """The operation is started again under the next epoch, or when its delay is over."""
        self._parked.append(operation)

    def _state_changed(self) -> None:
        if self._parked:
            self._outbox.defer(partial(self._retry, None))

    def tick(self, now: float) -> None:
        """Starts what has waited long enough."""
        if self._parked:
            self._retry(now)

    def _retry(self, now: float | None) -> None:
        if self.state.status is not ClusterStatus.OK or not self.state.alive():
            return
        parked, self._parked = self._parked, []
        for operation in parked:
            if not operation.wanted():
                # Its client has gone, and may have sent it again through another sheep with newer writes after it.
                operation.finish(Result.NETWORK_ERROR, None)
            elif now is None:
                operation.attempts = 0  # a new epoch: what failed under the old one says nothing
                operation.start()
            elif operation.due <= now:
                operation.start()
            else:
                self._parked.append(operation)

    def fail_parked(self, result: int) -> None:
        """Nothing that waits will be tried again."""
        parked, self._parked = self._parked, []
        for operation in parked:
            operation.finish(result, None)

    @property
    def now(self) -> float:
        return self._clock.monotonic()

    # ---- limits that concern every request

    def halted(self, placement: Placement, opcode: int) -> bool:
        """Nobody stores objects; or the cluster is strict, the change no removal, and zones are fewer than copies."""
        if not placement.holders:
            return True
        return opcode != FORWARD_REMOVE and placement.short and bool(self.state.flags & ClusterFlag.STRICT)


class _Drain:
    """Waits for a set of changes to end."""

    def __init__(self, oids: dict[int, int]) -> None:
        self.left = oids
        self.event = anyio.Event()

    def ended(self, oid: int) -> None:
        if oid in self.left:
            self.left[oid] -= 1
            if not self.left[oid]:
                del self.left[oid]
                if not self.left:
                    self.event.set()


class _Operation:
    """One request, from its start to its final result, over as many attempts as it takes."""

    __slots__ = ("attempts", "begun", "copies", "done", "due", "gateway", "oid", "policy", "wanted")

    def __init__(self, gateway: Gateway, oid: int, done: Done, copies: int, policy: int) -> None:
        self.gateway = gateway
        self.oid = oid
        self.done = done
        self.copies = copies
        self.policy = policy
        self.attempts = 0
        self.begun = 0.0  # when it was first to be retried
        self.due = 0.0
        self.wanted: Callable[[], bool] = always

    def start(self) -> None:
        """One attempt."""
        raise AssertionError("an operation says how it starts")

    def finish(self, result: int, data: Any) -> None:  # Any: the bytes of a read, else None
        self.done(result, data)

    def ended(self, epoch: int, result: int, data: Any) -> None:  # Any: as in finish
        """An attempt that began under ``epoch`` is over."""
        gateway = self.gateway
        if result == Result.NO_OBJ and gateway.state.epoch != epoch:
            result = Result.OLD_NODE_VER  # it was not where it belonged before: that says nothing about now
        if result not in RETRYABLE:
            self.finish(result, data)
            return
        if not self.wanted():
            self.finish(result, None)
            return
        now = gateway.now
        self.begun = self.begun or now
        self.attempts += 1
        if now - self.begun > GIVE_UP_S:
            logger.error("gave up on oid=%016x after %.0f s: result=0x%02x", self.oid, now - self.begun, result)
            self.finish(Result.EIO, None)
            return
        if gateway.state.epoch != epoch and self.attempts < 8:
            self.start()
            return
        self.due = now + min(RETRY_FIRST_S * (1 << min(self.attempts, 10)) / 2, RETRY_MAX_S)
        gateway.park(self)


class _Change(_Operation):
    """A create, write or removal: to the primary and back."""

    __slots__ = ("checked", "client", "cow_oid", "data", "epoch", "flags", "offset", "opcode")

    client: Client | None
    opcode: int
    offset: int
    data: Buffer
    cow_oid: int
    flags: int
    checked: bool

    def start(self) -> None:
        gateway = self.gateway
        state = gateway.state
        if state.status is not ClusterStatus.OK or not state.alive():
            gateway.park(self)
            return
        oid = self.oid
        placement = gateway.placer.placement(oid, self.copies, self.policy)
        if self.checked and not gateway.placer.writable(oid):
            self.finish(Result.READONLY, None)
            return
        if placement.short and gateway.halted(placement, self.opcode):
            self.finish(Result.HALT, None)
            return
        epoch = self.epoch = state.epoch
        client = self.client
        if client is not None and placement.primary not in client.fenced:
            primary = placement.primary
            assert primary is not None, "without holders everything is halted"
            gateway.fences.ask(client, primary, partial(self._fenced, epoch))
            return
        if placement.here:
            gateway.changes.apply(self.opcode, oid, self.offset, self.data, self.cow_oid, placement, self._applied)
            return
        link = placement.primary_link
        assert link is not None, "the primary is another sheep"
        link.change_request(
            self.opcode, epoch, oid, self.offset, self.data, placement.copies, placement.policy, self.flags,
            self.cow_oid, 0, self._answered, self.wanted,
        )  # fmt: skip

    def _applied(self, result: int) -> None:
        if result:
            self.ended(self.epoch, result, None)
        else:
            self.finish(0, None)

    def _answered(self, response: Response) -> None:
        self._applied(response.result)

    def _fenced(self, epoch: int, result: int) -> None:
        """The primary has made the fence that the client's first change there waits for, or has not."""
        if result:
            self.ended(epoch, result, None)
        elif self.wanted():
            self.start()
        else:
            self.finish(Result.NETWORK_ERROR, None)

    def finish(self, result: int, data: Any) -> None:  # Any: as in _Operation
        self.gateway._ended(self.oid)
        self.done(result, data)


class _Decref(_Operation):
    """A dropped reference: to the primary of the ledger."""

    __slots__ = ("count", "generation")

    generation: int
    count: int

    def start(self) -> None:
        gateway = self.gateway
        placement = gateway.placer.placement(self.oid)
        if placement.primary is None:
            self.finish(Result.HALT, None)
            return
        epoch = gateway.state.epoch
        if placement.primary == gateway.state.me.id:
            gateway.changes.references.decref(
                self.oid, self.generation, self.count, placement, lambda result: self.ended(epoch, result, None)
            )
            return
        request = Request(
            FORWARD_DECREF,
            epoch=epoch,
            variant=RefRequest(self.oid, self.generation, self.count).pack(),
        )
        gateway.peers.link(placement.primary).send(request, partial(self._answered, epoch))

    def _answered(self, epoch: int, response: Response) -> None:
        if response is LOST:
            # A reference must not be dropped twice. At worst it stays, and the object with it.
            self.finish(Result.EIO, None)
        else:
            self.ended(epoch, response.result, None)


class _Read(_Operation):
    """A read: from our own copy, else from the primary, else from any holder that has it."""

    __slots__ = ("epoch", "length", "offset", "placement", "trying", "worst")

    offset: int
    length: int

    def start(self) -> None:
        gateway = self.gateway
        state = gateway.state
        if state.status is not ClusterStatus.OK or not state.alive():
            gateway.park(self)
            return
        placement = gateway.placer.placement(self.oid, self.copies, self.policy)
        if placement.primary is None:
            self.finish(Result.HALT, None)
            return
        self.epoch = state.epoch
        self.placement = placement
        if not placement.identical:
            gateway.striped.read(self.oid, self.offset, self.length, placement, self._striped_done)
            return
        own_copy = placement.local and gateway.shards is not None
        if (own_copy and placement.here) or (
            own_copy and self.oid not in gateway._writing and self.oid not in gateway.primary.unsettled.oids
        ):
            self._local()
        else:
            self.worst = 0
            self.trying = 0
            self._next_holder()

    def _striped_done(self, result: int, data: Any) -> None:  # Any: the bytes on success
        recovery = self.gateway.recovery
        if result == Result.NO_OBJ and recovery is not None and recovery.must_mend(self.oid):
            # After a change of members strips may still be where they belonged before.
            recovery.mend(self.oid, self._mended)
        else:
            self.ended(self.epoch, result, data)

    def _mended(self, result: int) -> None:
        if result:
            self.ended(self.epoch, result, None)
        else:
            self.gateway.striped.read(
                self.oid, self.offset, self.length, self.placement,
                lambda outcome, data: self.ended(self.epoch, outcome, data),
            )  # fmt: skip

    def _local(self) -> None:
        shards = self.gateway.shards
        assert shards is not None, "checked by the caller"
        shards.read(self.placement.replica, self.offset, self.length, self._local_done)

    def _local_done(self, result: int, data: Any) -> None:  # Any: the bytes on success
        if not result:
            self.finish(0, data)
        elif result in (Result.NO_OBJ, Result.EIO) or result in RETRYABLE:
            # A corrupt copy is no reason to fail while somebody has a good one.
            self.worst = 0 if result == Result.NO_OBJ else result
            self.trying = 0
            self._next_holder()
        else:
            self.finish(result, None)

    def _next_holder(self) -> None:
        gateway = self.gateway
        links = self.placement.links
        if self.trying < len(links):
            link = links[self.trying]
            self.trying += 1
            link.object_request(
                Op.READ_PEER, self.epoch, self.oid, self._holder_done, offset=self.offset, length=self.length
            )
            return
        if self.worst:
            self.ended(self.epoch, self.worst, None)
            return
        own_copy = self.placement.local and gateway.shards is not None
        if own_copy and gateway.recovery is not None and gateway.recovery.may_find(self.oid):
            gateway.recovery.fetch(self.oid, REPLICA, self._fetched)
            return
        self.ended(self.epoch, Result.NO_OBJ, None)

    def _fetched(self, result: int) -> None:
        if not result:
            self._local()
        else:
            self.ended(self.epoch, result, None)

    def _holder_done(self, response: Response) -> None:
        result = response.result
        if not result:
            data = response.body
            if len(data) < self.length:
                data = bytes(data).ljust(self.length, b"\0")
            self.finish(0, data)
            return
        # That a copy is corrupt counts last: one that cannot be had now may be good, and a retry shows.
        if result != Result.NO_OBJ and (
            self.worst in (0, Result.EIO) or (result not in RETRYABLE and result != Result.EIO)
        ):
            self.worst = result
        self._next_holder()
