"""Repair of one copy of a replicated object, as ``dog vdi check`` asks for it (REPAIR_REPLICA).

Whoever compares copies from outside sees writes on their way as differences, so what it found is only a reason to look
again. The object's primary looks: alone in the object's lane, when no change is under way and none can begin, it asks
all holders for their digests and brings the copy in question in line with the majority, if it still differs from that.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from sheepdog.contracts.store import REPLICA, Buffer, ShardKey
from sheepdog.daemon.dispatch import Dispatcher
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.placement import Placement, Placer
from sheepdog.daemon.primary import Done, Primary
from sheepdog.daemon.state import SheepState
from sheepdog.errors import InvalidParameters, ObjectNotFound, RequestError
from sheepdog.model.ids import is_sparse
from sheepdog.model.node import NodeId
from sheepdog.wire.extensions import REPAIR, REPAIR_NEEDLESS
from sheepdog.wire.header import Request, Response
from sheepdog.wire.opcodes import SHEEP_PROTO_VER, Op
from sheepdog.wire.payloads import HashResponse
from sheepdog.wire.results import Result

logger = logging.getLogger(__name__)


class Repairs:
    """Repairs copies, as their holder and as their primary."""

    def __init__(
        self,
        state: SheepState,
        primary: Primary,
        placer: Placer,
        peers: PeerPool,
        outbox: Outbox,
        dispatcher: Dispatcher,
        get_hash: Callable[[Request], Awaitable[Response]],
    ) -> None:
        """:param get_hash: answers GET_HASH for what this sheep holds."""
        self._state = state
        self._primary = primary
        self._placer = placer
        self._peers = peers
        self._outbox = outbox
        self._get_hash = get_hash
        # Sheep wait for each other here, so these tasks must not wait for those that wait for them.
        dispatcher.task(REPAIR, self._serve, unlimited=True)

    async def repair(self, oid: int) -> Response:
        """The copy held here is that of the majority. The answer's variant says when nothing had to be done.

        :raises SheepdogError: there is no majority, or somebody did not answer; nothing was changed.
        """
        placement = self._placer.placement(oid)
        if not placement.local:
            raise ObjectNotFound(f"oid={oid:016x} does not belong here")
        if placement.here:
            return await self._repair(oid, placement, 0)
        assert placement.primary is not None, "an object that belongs here has a primary"
        return await self._peers.call(
            placement.primary,
            Request(
                REPAIR, proto=SHEEP_PROTO_VER, epoch=self._state.epoch, oid=oid, ec_index=placement.index,
            ),
        )  # fmt: skip

    async def _serve(self, request: Request) -> Response:
        placement = self._placer.placement(request.oid)
        if request.epoch != self._state.epoch or not placement.here:
            return Response(Result.OLD_NODE_VER)
        if request.ec_index >= len(placement.holders):
            return Response(Result.INVALID_PARMS)
        return await self._repair(request.oid, placement, request.ec_index)

    async def _repair(self, oid: int, placement: Placement, at: int) -> Response:
        if not placement.identical:
            raise InvalidParameters(f"oid={oid:016x} is stored in strips, which are rebuilt, not copied")
        epoch = self._state.epoch
        async with self._alone(oid):
            if self._state.epoch != epoch:
                return Response(Result.OLD_NODE_VER)
            digests: dict[NodeId, bytes] = {}
            for node in placement.holders:
                digest = await self._digest(oid, node, epoch)
                if digest is not None:
                    digests[node] = digest
            if not digests:
                return Response(Result.NO_OBJ)
            best, votes = Counter(digests.values()).most_common(1)[0]
            if votes * 2 <= len(digests):
                raise RequestError(f"no majority among the copies of oid={oid:016x}", result=Result.EIO)
            target = placement.holders[at]
            if digests.get(target) == best:
                return Response(variant=bytes([REPAIR_NEEDLESS]))
            source = next(node for node in placement.holders if digests.get(node) == best)
            await self._copy(oid, placement, source, target, epoch)
        logger.info("oid=%016x was repaired on node=%s from node=%s", oid, target.text, source.text)
        return Response()

    async def _digest(self, oid: int, node: NodeId, epoch: int) -> bytes | None:
        request = Request(Op.GET_HASH, proto=SHEEP_PROTO_VER, oid=oid, tgt_epoch=epoch)
        try:
            response = await (self._get_hash(request) if node == self._state.me.id else self._peers.call(node, request))
        except ObjectNotFound:
            return None
        if response.result == Result.NO_OBJ:
            return None
        if response.result:
            raise RequestError(f"oid={oid:016x} cannot be read on node={node.text}", result=response.result)
        return HashResponse.unpack(response.variant).digest

    async def _copy(self, oid: int, placement: Placement, source: NodeId, target: NodeId, epoch: int) -> None:
        shards = self._primary.shards
        key = ShardKey(oid, REPLICA)
        size = placement.object_bytes
        content: Buffer
        if source == self._state.me.id:
            content = await self._answer(oid, lambda done: shards.read(key, 0, size, done))
        else:
            response = await self._peers.call(
                source,
                Request(Op.READ_PEER, proto=SHEEP_PROTO_VER, epoch=epoch, oid=oid, data_length=size),
            )
            if response.result:
                raise RequestError(f"oid={oid:016x} cannot be read there", result=response.result)
            content = response.body
        if target == self._state.me.id:
            await self._answer(oid, lambda done: shards.create(key, 0, content, size, is_sparse(oid), done))
            return
        # Over the connection that brought the changes before: a holder applies them in the order in which they come.
        link = self._peers.link(target)
        await self._answer(
            oid,
            lambda done: link.object_request(
                Op.CREATE_AND_WRITE_PEER, epoch, oid, lambda response: done(response.result, None), body=content,
                copies=placement.copies, copy_policy=placement.policy,
                tail=self._primary.unsettled.low_water,
            ),
        )  # fmt: skip

    async def _answer(self, oid: int, start: Callable[[Callable[[int, Any], None]], None]) -> Any:
        """What the callback got. Any: the bytes of a read.

        :raises RequestError: its result was no success.
        """
        event = anyio.Event()
        answers: list[tuple[int, Any]] = []

        def done(result: int, data: Any) -> None:  # Any: as above
            answers.append((result, data))
            event.set()

        with self._outbox:
            start(done)
        await event.wait()
        result, data = answers[0]
        if result:
            raise RequestError(f"oid={oid:016x} cannot be repaired", result=result)
        return data

    @asynccontextmanager
    async def _alone(self, oid: int) -> AsyncIterator[None]:
        """Inside, no change of the object is under way. Cancelled while it waits, the lane is passed on at once."""
        entered = anyio.Event()
        held: list[Done] = []
        left = False

        def start(finish: Done) -> None:
            if left:
                finish(0)
                return
            held.append(finish)
            entered.set()

        with self._outbox:
            self._primary.enter(oid, True, start, lambda result: None)
        try:
            await entered.wait()
            yield
        finally:
            left = True
            with self._outbox:
                for finish in held:
                    finish(0)
