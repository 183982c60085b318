"""Object requests as they come in: from clients (gateway operations) and from other sheep (peer operations).

A peer operation is served only under the same epoch: an older one is refused, a newer one waits until this sheep gets
there. What is applied for another sheep is logged per connection until it is known to be complete (see ``unsettled``).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from sheepdog.contracts.store import REPLICA, ShardKey
from sheepdog.daemon import striped_undo
from sheepdog.daemon.changes import Changes
from sheepdog.daemon.coherence import Coherence
from sheepdog.daemon.dispatch import Dispatcher
from sheepdog.daemon.fencing import Fences
from sheepdog.daemon.gateway import Gateway
from sheepdog.daemon.held_writes import HeldWrites
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.primary import Primary
from sheepdog.daemon.references import is_map_write
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.stats import Stats
from sheepdog.daemon.strip_memory import Pieces
from sheepdog.daemon.striped import unpack_pieces
from sheepdog.daemon.unsettled import Unsettled
from sheepdog.model.ids import (
    INODE_BIT,
    NO_OIDS,
    REPLICATED_BITS,
    VID_MASK,
    VID_SHIFT,
    is_ledger,
    is_sparse,
)
from sheepdog.model.inode import SHORT_INODE_BYTES
from sheepdog.wire.extensions import (
    FENCE_MARK,
    FORWARD_CREATE,
    FORWARD_DECREF,
    FORWARD_READ,
    FORWARD_REMOVE,
    FORWARD_WRITE,
    LOW_WATER,
    OWN_OPCODES,
    RECOVERY_POINT,
    SETTLE,
    STRIP_WRITE,
)
from sheepdog.wire.header import Request
from sheepdog.wire.opcodes import Flag, Op
from sheepdog.wire.payloads import RefRequest
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.recovery import Recovery
    from sheepdog.daemon.server import ClientConnection

_Serve: TypeAlias = "Callable[[ClientConnection, Request], None]"

new_tuple = tuple.__new__
READ_BYTES_MAX = 64 * 1024 * 1024  # unless there are larger objects


class ObjectOperations:
    """Registers and serves the data path's opcodes."""

    def __init__(
        self,
        state: SheepState,
        dispatcher: Dispatcher,
        gateway: Gateway,
        primary: Primary,
        changes: Changes,
        shards: Shards | None,
        unsettled: Unsettled,
        stats: Stats,
        outbox: Outbox,
        fences: Fences,
    ) -> None:
        self._state = state
        self._fences = fences
        self._gateway = gateway
        self._primary = primary
        self._changes = changes
        self._shards = shards
        self._unsettled = unsettled
        self._stats = stats
        self._outbox = outbox
        self.recovery: Recovery | None = None
        self._held: HeldWrites | None = None
        self.coherence: Coherence | None = None
        self._early: deque[tuple[ClientConnection, Request, _Serve]] = deque()
        state.observe(self._epoch_changed)
        path = dispatcher.path
        path(Op.READ_OBJ, self._read_obj)
        path(Op.WRITE_OBJ, self._write_obj)
        path(Op.CREATE_AND_WRITE_OBJ, self._create_obj)
        path(Op.REMOVE_OBJ, self._remove_obj)
        path(Op.DECREF_OBJ, self._decref_obj)
        for opcode, serve in (
            (Op.READ_PEER, self._read_peer),
            (Op.WRITE_PEER, self._write_peer),
            (STRIP_WRITE, self._write_strip_pieces),
            (Op.CREATE_AND_WRITE_PEER, self._create_peer),
            (Op.REMOVE_PEER, self._remove_peer),
            (Op.DECREF_PEER, self._forward_decref),
            (FORWARD_WRITE, self._forward_change),
            (FORWARD_CREATE, self._forward_change),
            (FORWARD_REMOVE, self._forward_change),
            (FORWARD_DECREF, self._forward_decref),
            (SETTLE, self._settle),
            (FORWARD_READ, self._forward_read),
        ):
            path(opcode, self._at_epoch(serve))
        striped_undo.register(
            gateway.striped.undo, lambda opcode, serve: path(opcode, self._at_epoch(serve)), self._peer_answer
        )
        path(LOW_WATER, self._low_water, force=True)  # also from a sheep that serves already, to one that does not yet
        path(RECOVERY_POINT, self._recovery_point)
        path(FENCE_MARK, self._fence_mark, force=True)

    def recover_by(self, recovery: Recovery) -> None:
        """What is missing here is brought by ``recovery``."""
        self.recovery = recovery
        if self._shards is not None:
            self._held = HeldWrites(self._state, self._shards, recovery)

    # ---- clients

    def _read_obj(self, connection: ClientConnection, request: Request) -> None:
        length = request.data_length
        if length > READ_BYTES_MAX and length > self._state.object_bytes_max():
            connection.reply(request, Result.INVALID_PARMS)
            return
        stats = self._stats
        stats.gateway.began(request)

        coherence = self.coherence
        if request.flags & Flag.TGT and coherence is not None and coherence.refuses(request):
            stats.gateway.active -= 1
            connection.reply(request, Result.INODE_INVALIDATED)
            return

        def done(result: int, data: Any) -> None:  # Any: the bytes on success
            stats.gateway.active -= 1
            if result:
                connection.reply(request, result)
            elif length == SHORT_INODE_BYTES and coherence is not None and coherence.is_refresh(request):
                coherence.refreshed(request.oid, lambda: connection.reply(request, 0, b"", data))
            else:
                connection.reply(request, 0, b"", data)

        self._gateway.submit_read(request.oid, request.offset, length, done, copies=request.copies)

    def _write_obj(self, connection: ClientConnection, request: Request) -> None:
        self._stats.gateway.began(request)
        answer = self._answer(connection, request)
        if (request.flags & Flag.TGT or request.data_length != len(request.body)) and self._refused(request, answer):
            return
        oid = request.oid
        if oid & INODE_BIT and self.coherence is not None and is_map_write(oid, request.offset, len(request.body)):
            self.coherence.before_map_write(oid, partial(self._submit_write, connection, request, answer))
        else:
            self._submit_write(connection, request, answer)

    def _submit_write(self, connection: ClientConnection, request: Request, answer: Callable[[int, Any], None]) -> None:
        self._gateway.submit_write(
            request.oid, request.offset, request.body, answer, copies=request.copies, policy=request.copy_policy,
            client=connection,
        )  # fmt: skip

    def _refused(self, request: Request, answer: Callable[[int, Any], None]) -> bool:
        if request.data_length != len(request.body):
            answer(Result.INVALID_PARMS, None)  # without the WRITE flag there is nothing to write
            return True
        if request.flags & Flag.TGT and self.coherence is not None and self.coherence.refuses(request):
            answer(Result.INODE_INVALIDATED, None)
            return True
        return False

    def _create_obj(self, connection: ClientConnection, request: Request) -> None:
        self._stats.gateway.began(request)
        answer = self._answer(connection, request)
        if self._refused(request, answer):
            return
        if request.oid in NO_OIDS:
            answer(Result.INVALID_PARMS, None)  # no start of a sheep would find a file of that name again
            return
        self._gateway.submit_create(
            request.oid, request.offset, request.body, answer,
            cow_oid=request.cow_oid if request.flags & Flag.COW else 0,
            copies=request.copies, policy=request.copy_policy, client=connection,
        )  # fmt: skip

    def _remove_obj(self, connection: ClientConnection, request: Request) -> None:
        self._stats.gateway.began(request)
        answer = self._answer(connection, request)
        self._gateway.submit_remove(request.oid, lambda result: answer(result, None), client=connection)

    def _decref_obj(self, connection: ClientConnection, request: Request) -> None:
        self._stats.gateway.began(request)
        answer = self._answer(connection, request)
        ref = RefRequest.unpack(request.variant or b"")
        if not is_ledger(ref.oid):
            answer(Result.INVALID_PARMS, None)
            return
        self._gateway.submit_decref(ref.oid, ref.generation, ref.count, lambda result: answer(result, None))

    def _answer(self, connection: ClientConnection, request: Request) -> Callable[[int, Any], None]:
        stats = self._stats

        def done(result: int, _: Any) -> None:  # Any: changes carry no data
            stats.gateway.active -= 1
            connection.reply(request, result)

        return done

    # ---- the epoch gate

    def _at_epoch(self, serve: _Serve) -> _Serve:
        state = self._state
        stats = self._stats.peer

        def gate(connection: ClientConnection, request: Request) -> None:
            epoch = request.epoch
            connection.limited = False
            if request.oid in NO_OIDS and request.opcode < OWN_OPCODES:
                connection.reply(request, Result.NO_OBJ)  # in whatever epoch
                return
            if epoch == state.epoch:
                if state.alive():
                    stats.began(request)
                    serve(connection, request)
                else:
                    connection.reply(request, Result.WAIT_FOR_JOIN)
            elif (epoch - state.epoch) & 0xFFFFFFFF < 0x80000000:
                self._early.append((connection, request, gate))
            else:
                connection.reply(request, Result.OLD_NODE_VER)

        return gate

    def _fence_mark(self, connection: ClientConnection, request: Request) -> None:
        """What was sent before a mark may wait for its epoch; then the mark waits behind it."""
        if request.epoch != self._state.epoch and (request.epoch - self._state.epoch) & 0xFFFFFFFF < 0x80000000:
            self._early.append((connection, request, self._fence_mark))
        else:
            self._fences.marked(connection, request)

    def _epoch_changed(self) -> None:
        if self._early:
            self._outbox.defer(self._serve_early)

    def _serve_early(self) -> None:
        early, self._early = self._early, deque()
        for connection, request, gate in early:
            if connection.open:
                gate(connection, request)
            else:
                # Whoever sent it knows that it may be lost, and may have sent newer ones over another connection.
                connection.reply(request, Result.NETWORK_ERROR)

    # ---- other sheep

    def _peer_answer(
        self, connection: ClientConnection, request: Request, *, read: bool = False
    ) -> Callable[[int, Any], None]:
        stats = self._stats
        state = self._state
        epoch = state.epoch

        def done(result: int, data: Any) -> None:  # Any: the bytes of a read
            stats.peer.active -= 1
            if state.epoch != epoch and (not result or result == Result.NO_OBJ):
                result = Result.OLD_NODE_VER
            if result or not read:
                connection.reply(request, result)
            else:
                connection.reply(request, 0, b"", data)

        return done

    def _version_answer(self, connection: ClientConnection, request: Request) -> Callable[[int, Any, bytes], None]:
        stats = self._stats
        state = self._state
        epoch = state.epoch

        def done(result: int, data: Any, variant: bytes) -> None:  # Any: the bytes on success
            stats.peer.active -= 1
            if state.epoch != epoch:
                connection.reply(request, Result.OLD_NODE_VER)
            else:
                connection.reply(request, result, variant, b"" if result else data)

        return done

    def _recovery_point(self, connection: ClientConnection, request: Request) -> None:
        assert self.recovery is not None
        connection.reply(request, *self.recovery.point(request))

    def _local(self, connection: ClientConnection, request: Request) -> Shards | None:
        if self._shards is None:
            self._stats.peer.active -= 1
            connection.reply(request, Result.NO_OBJ)
        return self._shards

    def _key(self, request: Request) -> ShardKey:
        oid = request.oid
        if not request.copy_policy:
            # dog does not say the policy; what is known of the volume tells whether the object is stored in strips.
            known = self._state.vdis.schemes.get(oid >> VID_SHIFT & VID_MASK)
            if known is None or not known[1] or oid & REPLICATED_BITS:
                return new_tuple(ShardKey, (oid, REPLICA))  # a third of what the generated constructor takes
        return ShardKey(oid, request.ec_index)

    def _read_peer(self, connection: ClientConnection, request: Request) -> None:
        shards = self._local(connection, request)
        if shards is None:
            return
        key = self._key(request)
        length = request.data_length
        if length > READ_BYTES_MAX and length > self._state.object_bytes_max():
            self._peer_answer(connection, request)(Result.INVALID_PARMS, None)
            return
        answer = self._peer_answer(connection, request, read=True)
        recovery = self.recovery
        if request.flags & Flag.RECOVERY:
            assert recovery is not None, "a sheep with a store has recovery"
            recovery.serve(key, request, self._version_answer(connection, request))
            return

        def done(result: int, data: Any) -> None:  # Any: the bytes on success
            # A missing strip is not waited for: it is computed from others here, and mended by the object's primary.
            if result == Result.NO_OBJ and key.index == REPLICA and recovery is not None and recovery.may_find(key.oid):
                recovery.fetch(key.oid, key.index, fetched)
            else:
                answer(result, data)

        def fetched(result: int) -> None:
            if result:
                answer(result, None)
            else:
                shards.read(key, request.offset, length, answer)

        shards.read(key, request.offset, length, done)

    def _write_peer(self, connection: ClientConnection, request: Request) -> None:
        shards = self._shards
        if shards is None:
            self._local(connection, request)
            return
        self._unsettled.applied(connection.applied, request.cow_oid, request.oid, request.tail)
        key = self._key(request)
        if key[1] != REPLICA:
            self._write_strip(key, connection, request, ((request.offset, request.body),))
            return
        held = self._held
        assert held is not None, "a sheep with a store has recovery"
        result = shards.try_write(key, request.offset, request.body) if held.nothing else None
        if result == 0 and not shards.durable:
            self._stats.peer.active -= 1
            connection.reply(request, 0)
            return
        answer = self._peer_answer(connection, request)
        if result is None:
            held.write(key, connection, request, answer)
        elif result == 0:
            shards.commit(key, answer)
        else:
            held.failed(key, connection, request, answer, result)

    def _write_strip_pieces(self, connection: ClientConnection, request: Request) -> None:
        if self._local(connection, request) is None:
            return
        self._unsettled.applied(connection.applied, request.cow_oid, request.oid, request.tail)
        self._write_strip(self._key(request), connection, request, unpack_pieces(request.body))

    def _write_strip(
        self, key: ShardKey, connection: ClientConnection, request: Request, pieces: Pieces | None
    ) -> None:
        answer = self._peer_answer(connection, request)
        if pieces is None or key.index == REPLICA:
            answer(Result.INVALID_PARMS, None)
            return
        holders = self._gateway.placer.placement(request.oid, request.copies, request.copy_policy).holders
        self._gateway.striped.undo.write(key, pieces, request.cow_oid, request.tgt_epoch, request.tail, holders, answer)

    def _forward_read(self, connection: ClientConnection, request: Request) -> None:
        placement = self._gateway.placer.placement(request.oid, request.copies, request.copy_policy)
        answer = self._peer_answer(connection, request, read=True)
        if not placement.here:
            answer(Result.NETWORK_ERROR, None)
        elif request.data_length > max(READ_BYTES_MAX, self._state.object_bytes_max()):
            answer(Result.INVALID_PARMS, None)
        else:
            self._gateway.striped.read_computed(request.oid, request.offset, request.data_length, placement, answer)

    def _create_peer(self, connection: ClientConnection, request: Request) -> None:
        shards = self._local(connection, request)
        if shards is None:
            return
        self._unsettled.applied(connection.applied, request.cow_oid, request.oid, request.tail)
        placement = self._gateway.placer.placement(request.oid, request.copies, request.copy_policy)
        size = placement.shard_bytes if request.copy_policy else placement.object_bytes
        size = max(size, request.offset + len(request.body))
        self._gateway.striped.undo.forget(request.oid)
        shards.create(
            self._key(request), request.offset, request.body, size, is_sparse(request.oid),
            self._peer_answer(connection, request),
        )  # fmt: skip

    def _remove_peer(self, connection: ClientConnection, request: Request) -> None:
        shards = self._local(connection, request)
        if shards is None:
            return
        self._unsettled.settled(request.oid)
        self._gateway.striped.undo.forget(request.oid)
        shards.remove(self._key(request), self._peer_answer(connection, request))

    def _forward_change(self, connection: ClientConnection, request: Request) -> None:
        placement = self._gateway.placer.placement(request.oid, request.copies, request.copy_policy)
        answer = self._peer_answer(connection, request)
        if not placement.here:
            # The two sheep disagree on the volume's copies for a moment: the gateway tries again.
            answer(Result.NETWORK_ERROR, None)
            return
        if request.opcode != FORWARD_REMOVE and not self._gateway.placer.writable(request.oid):
            answer(Result.READONLY, None)
            return
        self._changes.apply(
            request.opcode, request.oid, request.offset, request.body,
            request.cow_oid if request.flags & Flag.COW else 0, placement, lambda result: answer(result, None),
        )  # fmt: skip

    def _forward_decref(self, connection: ClientConnection, request: Request) -> None:
        ref = RefRequest.unpack(request.variant or b"")
        placement = self._gateway.placer.placement(ref.oid)

        def answer(result: int, _: object) -> None:
            # Not refused for a new epoch once it is done: a reference must not be dropped twice.
            self._stats.peer.active -= 1
            connection.reply(request, result)

        if not is_ledger(ref.oid):
            answer(Result.INVALID_PARMS, None)
            return
        if not placement.here:
            answer(Result.NETWORK_ERROR, None)
            return
        self._changes.references.decref(
            ref.oid, ref.generation, ref.count, placement, lambda result: answer(result, None)
        )

    def _settle(self, connection: ClientConnection, request: Request) -> None:
        answer = self._peer_answer(connection, request)
        if request.offset:
            self._unsettled.oids[request.oid] = None  # its shards may differ, says a holder; else one is missing
        self._primary.settle(request.oid, lambda result: answer(result, None))

    def _low_water(self, connection: ClientConnection, request: Request) -> None:
        self._unsettled.applied(connection.applied, 0, 0, request.tail)
        connection.reply(request, 0)
