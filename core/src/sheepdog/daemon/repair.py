"""Compares the shards of an object and repairs those that are wrong: for the scrub, and for ``dog vdi check``.

Whoever compares from outside sees writes on their way as differences, so what it found is only a reason to look again.
The object's primary looks. When all copies are there and of equal content, it needs nobody's attention for that.
Otherwise it looks again alone in the object's lane, when no change is under way and none can begin.

Which copy is right is decided by checksums where there are any, else by majority; which strip, by checksums and by
whether they fit together (``verdicts``). A shard that is known to be wrong is never copied anywhere, and when no right
one can be told, nothing is changed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from struct import Struct
from typing import TYPE_CHECKING

import anyio

from sheepdog.contracts.services import Executor
from sheepdog.contracts.store import REPLICA, Buffer, ShardKey
from sheepdog.daemon.awaiting import result_of
from sheepdog.daemon.dispatch import Dispatcher
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.placement import Placement, Placer
from sheepdog.daemon.primary import Done, Primary
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.verdicts import Look, Outcome, Verdict, best_of, judge_strips
from sheepdog.errors import (
    InvalidParameters,
    ObjectNotFound,
    RequestError,
    ShardCorrupt,
    StoreDeviceError,
    TransportError,
)
from sheepdog.model.node import NodeId
from sheepdog.wire.extensions import COMPARE, INSPECT, REPAIR, REPAIR_NEEDLESS
from sheepdog.wire.header import Request, Response
from sheepdog.wire.opcodes import SHEEP_PROTO_VER
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.recovery import Recovery
    from sheepdog.daemon.striped import Striped

logger = logging.getLogger(__name__)

PART_BYTES = 1 << 20
_LOOK = Struct("<B20s")


class Repairs:
    """Compares and repairs, as holder and as primary."""

    def __init__(
        self,
        state: SheepState,
        primary: Primary,
        shards: Shards | None,
        placer: Placer,
        peers: PeerPool,
        executor: Executor,
        outbox: Outbox,
        dispatcher: Dispatcher,
        recovery: Recovery,
        striped: Striped,
    ) -> None:
        self._state = state
        self._primary = primary
        self._shards = shards
        self._placer = placer
        self._peers = peers
        self._executor = executor
        self._outbox = outbox
        self._recovery = recovery
        if recovery.mender is not None:
            recovery.mender.looks = self._looks
        self._striped = striped
        # Sheep wait for each other here, so these tasks must not wait for those that wait for them.
        dispatcher.task(REPAIR, self._serve_repair, unlimited=True)
        dispatcher.task(COMPARE, self._serve_compare, unlimited=True)
        dispatcher.task(INSPECT, self._serve_inspect, unlimited=True)

    # ---- one copy, as dog's check wants it

    async def repair(self, oid: int) -> Response:
        """The copy held here is the right one. The answer's variant says when nothing had to be done.

        :raises SheepdogError: nobody knows which is right, or somebody did not answer; nothing was changed.
        """
        placement = self._placer.placement(oid)
        if not placement.local:
            raise ObjectNotFound(f"oid={oid:016x} does not belong here")
        if placement.here:
            return await self._repair(oid, placement, 0)
        return await self._ask_primary(REPAIR, oid, placement)

    async def _ask_primary(self, opcode: int, oid: int, placement: Placement) -> Response:
        assert placement.primary is not None, "an object that belongs here has a primary"
        return await self._peers.call(
            placement.primary,
            Request(opcode, proto=SHEEP_PROTO_VER, epoch=self._state.epoch, oid=oid, ec_index=max(placement.index, 0)),
        )

    async def _serve_repair(self, request: Request) -> Response:
        placement = self._placer.placement(request.oid)
        if request.epoch != self._state.epoch or not placement.here:
            return Response(Result.OLD_NODE_VER)
        if request.ec_index >= len(placement.holders):
            return Response(Result.INVALID_PARMS)
        return await self._repair(request.oid, placement, request.ec_index)

    async def _repair(self, oid: int, placement: Placement, at: int) -> Response:
        if not placement.identical:
            raise InvalidParameters(f"oid={oid:016x} is stored in strips, which are rebuilt, not copied")
        target = placement.holders[at]
        async with self._alone(oid, placement):
            looks = await self._looks(oid, placement)
            if all(look.verdict is Verdict.MISSING for look in looks.values()):
                return Response(Result.NO_OBJ)
            best = best_of(looks, by_majority=True)
            if best is None:
                raise RequestError(f"no majority among the copies of oid={oid:016x}", result=Result.EIO)
            if looks[target].digest == best and looks[target].verdict in (Verdict.RIGHT, Verdict.UNKNOWN):
                return Response(variant=bytes([REPAIR_NEEDLESS]))
            await self._copy_best(oid, placement, looks, best, target)
        return Response()

    # ---- all shards, as the scrub wants it

    async def compare(self, oid: int) -> Outcome:
        """All shards of the object were compared, by its primary, and repaired as far as possible.

        :raises SheepdogError: not now; somebody did not answer, or changes are being settled.
        """
        placement = self._placer.placement(oid)
        if placement.here:
            return await self._compare(oid, placement)
        if placement.primary is None:
            raise RequestError(f"nobody stores oid={oid:016x}", result=Result.HALT)
        response = await self._ask_primary(COMPARE, oid, placement)
        if response.result:
            raise RequestError(f"oid={oid:016x} cannot be compared now", result=response.result)
        return Outcome.unpack(response.variant)

    async def _serve_compare(self, request: Request) -> Response:
        placement = self._placer.placement(request.oid)
        if request.epoch != self._state.epoch or not placement.here:
            return Response(Result.OLD_NODE_VER)
        return Response(variant=(await self._compare(request.oid, placement)).pack())

    async def _compare(self, oid: int, placement: Placement) -> Outcome:
        if not placement.identical:
            return await self._compare_strips(oid, placement)
        looks = await self._looks(oid, placement)
        if _agree(looks):
            await self._accept_all(oid, placement, looks, next(iter(looks.values())).digest)
            return Outcome()
        async with self._alone(oid, placement):
            looks = await self._looks(oid, placement)
            best = best_of(looks)
            if best is None:
                if all(look.verdict is Verdict.MISSING for look in looks.values()):
                    return Outcome()
                if oid in self._primary.unsettled.oids:
                    raise RequestError(f"oid={oid:016x} is being settled", result=Result.NETWORK_ERROR)
                damaged = [look for look in looks.values() if look.verdict is Verdict.CORRUPT]
                return Outcome(len(damaged), 0, True)
            damaged_at = [
                node for node, look in looks.items() if look.digest != best or look.verdict is Verdict.MISSING
            ]
            for node in damaged_at:
                await self._copy_best(oid, placement, looks, best, node)
            await self._accept_all(oid, placement, looks, best)
            self._primary.unsettled.settled(oid)
        return Outcome(len(damaged_at), len(damaged_at), False)

    async def _accept_all(self, oid: int, placement: Placement, looks: Mapping[NodeId, Look], digest: bytes) -> None:
        """The copies that are right get checksums where they had none."""
        for node, look in looks.items():
            if look.verdict in (Verdict.UNKNOWN, Verdict.CORRUPT) and look.digest == digest:
                await self._accept(node, ShardKey(oid, REPLICA), placement, digest)

    async def _copy_best(
        self, oid: int, placement: Placement, looks: Mapping[NodeId, Look], best: bytes, target: NodeId
    ) -> None:
        sources = [
            node for node, look in looks.items()
            if look.digest == best and look.verdict in (Verdict.RIGHT, Verdict.UNKNOWN)
        ]  # fmt: skip
        source = min(sources, key=lambda node: (looks[node].verdict is not Verdict.RIGHT, node != self._state.me.id))
        await self._copy(oid, placement, source, target, best)
        logger.info("oid=%016x was repaired on node=%s from node=%s", oid, target.text, source.text)

    # ---- looking

    async def _looks(self, oid: int, placement: Placement) -> dict[NodeId, Look]:
        """What each holder has, in their order.

        :raises SheepdogError: one does not answer.
        """
        found: dict[NodeId, Look] = {}

        async def look(index: int, node: NodeId) -> None:
            key = ShardKey(oid, REPLICA if placement.identical else index)
            if node == self._state.me.id:
                found[node] = await self.inspect(key)
                return
            response = await self._peers.call(node, self._inspect_request(key, placement))
            if response.result:
                raise RequestError(f"oid={oid:016x} cannot be compared on {node.text}", result=response.result)
            verdict, digest = _LOOK.unpack_from(response.variant)
            found[node] = Look(Verdict(verdict), digest)

        # One after the other: a comparison is nothing that anybody waits for.
        for index, node in enumerate(placement.holders):
            await look(index, node)
        return found

    def _inspect_request(self, key: ShardKey, placement: Placement, body: bytes = b"") -> Request:
        return Request(
            INSPECT, proto=SHEEP_PROTO_VER, epoch=self._state.epoch, oid=key.oid, ec_index=max(key.index, 0),
            copy_policy=0 if placement.identical else placement.policy, body=body,
        )  # fmt: skip

    async def inspect(self, key: ShardKey) -> Look:
        """What this sheep has."""
        assert self._shards is not None, "asked of a sheep with a store"
        store = self._shards.store
        verdict = Verdict.RIGHT
        try:
            offset = 0
            while True:
                part = await self._executor.run(
                    partial(store.verify, key, offset_bytes=offset, length_bytes=PART_BYTES)
                )
                if not part.complete:
                    verdict = Verdict.UNKNOWN
                offset += part.count
                if part.count < PART_BYTES:
                    break
        except ShardCorrupt as error:
            self._shards.corrupt(error)
            verdict = Verdict.CORRUPT
        except ObjectNotFound:
            return Look(Verdict.MISSING)
        except StoreDeviceError as error:
            self._shards.disk_failed(error)
            raise
        try:
            return Look(verdict, await self._executor.run(partial(store.stored_digest, key)))
        except ObjectNotFound:
            return Look(Verdict.MISSING)
        except StoreDeviceError as error:
            self._shards.disk_failed(error)
            raise

    async def _serve_inspect(self, request: Request) -> Response:
        if request.epoch != self._state.epoch:
            return Response(Result.OLD_NODE_VER)
        if self._shards is None:
            return Response(Result.NO_OBJ)
        key = ShardKey(request.oid, request.ec_index if request.copy_policy else REPLICA)
        if len(request.body):
            return Response(await self._accept_own(key, bytes(request.body)))
        look = await self.inspect(key)
        return Response(variant=_LOOK.pack(look.verdict, look.digest))

    async def _accept(self, node: NodeId, key: ShardKey, placement: Placement, digest: bytes) -> None:
        """The shard there is right if that is its digest; one that has changed meanwhile is left alone."""
        if node == self._state.me.id:
            await self._accept_own(key, digest)
            return
        await self._peers.call(node, self._inspect_request(key, placement, digest))

    async def _accept_own(self, key: ShardKey, digest: bytes) -> int:
        shards = self._shards
        assert shards is not None, "asked of a sheep with a store"
        store = shards.store
        return await result_of(self._outbox, lambda done: shards.run(key, lambda: store.accept(key, digest), done))

    # ---- copying

    async def _copy(self, oid: int, placement: Placement, source: NodeId, target: NodeId, digest: bytes) -> None:
        key = ShardKey(oid, REPLICA)
        mender = self._recovery.mender
        assert mender is not None, "a primary stores objects"
        found = await self._recovery.finder.ask(source, key, placement, self._state.epoch)
        content = found.content
        if content is None or hashlib.sha1(content, usedforsecurity=False).digest() != digest:
            raise TransportError(f"oid={oid:016x} is not on node {source.text} any more as it was compared")
        if target == self._state.me.id:
            result = await self._recovery.store_shard(
                key, content, max(placement.object_bytes, len(content)), replace=True
            )
        else:
            result = await mender.push_copy(target, key, content, placement, mark=False)
        if result:
            raise RequestError(f"oid={oid:016x} cannot be repaired on node {target.text}", result=result)

    # ---- strips

    async def _compare_strips(self, oid: int, placement: Placement) -> Outcome:
        looks = await self._looks(oid, placement)
        if all(look.verdict is Verdict.RIGHT for look in looks.values()):
            return Outcome()
        recovery = self._recovery
        mender = recovery.mender
        assert mender is not None, "a primary stores objects"
        async with self._alone(oid, placement):
            # Strips from before and after a change that died half-way do not fit together.
            result = await self._striped.undo.resolved(oid)
            if result:
                raise RequestError(f"oid={oid:016x} cannot be compared now", result=result)
            looks = await self._looks(oid, placement)
            parts: dict[int, Buffer] = {}
            for index, node in enumerate(placement.holders):
                if looks[node].verdict in (Verdict.RIGHT, Verdict.UNKNOWN):
                    answer = await recovery.finder.ask(node, ShardKey(oid, index), placement, self._state.epoch)
                    if answer.content is not None:
                        parts[index] = answer.content
            if not parts and all(look.verdict is Verdict.MISSING for look in looks.values()):
                return Outcome()
            right = {
                index for index, node in enumerate(placement.holders)
                if looks[node].verdict is Verdict.RIGHT and index in parts
            }  # fmt: skip
            wrong = await self._executor.run(
                lambda: judge_strips(placement.scheme, parts, right, len(placement.holders))
            )
            if wrong is None:
                if oid in self._primary.unsettled.oids:
                    raise RequestError(f"oid={oid:016x} is being settled", result=Result.NETWORK_ERROR)
                corrupt = sum(look.verdict is Verdict.CORRUPT for look in looks.values())
                return Outcome(corrupt, 0, True)
            for index, strip in wrong.items():
                result = await mender.push_strip(oid, index, strip, placement)
                if result:
                    raise RequestError(f"strip {index} of oid={oid:016x} cannot be repaired", result=result)
                logger.info("oid=%016x: strip %d was repaired on node=%s", oid, index, placement.holders[index].text)
            for index, node in enumerate(placement.holders):
                if looks[node].verdict is Verdict.UNKNOWN and index not in wrong:
                    await self._accept(node, ShardKey(oid, index), placement, looks[node].digest)
            self._primary.unsettled.settled(oid)
        return Outcome(len(wrong), len(wrong), False)

    # ---- order

    @asynccontextmanager
    async def _alone(self, oid: int, placement: Placement) -> AsyncIterator[None]:
        """Inside, no change of the object is under way. Cancelled while it waits, the lane is passed on at once.

        :raises RequestError: an epoch began meanwhile, so others may be its holders now.
        """
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
            if placement.ring is not self._state.ring:
                raise RequestError("the epoch moved on", result=Result.OLD_NODE_VER)
            yield
        finally:
            left = True
            with self._outbox:
                for finish in held:
                    finish(0)


def _agree(looks: Mapping[NodeId, Look]) -> bool:
    """All are there, none is known to be wrong, and they are equal."""
    return len({look.digest for look in looks.values()}) == 1 and all(
        look.verdict in (Verdict.RIGHT, Verdict.UNKNOWN) for look in looks.values()
    )
