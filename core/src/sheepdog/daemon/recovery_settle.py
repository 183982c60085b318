"""Brings the shards of one object in step; runs at its primary, alone in the object's lane, so no change is under way.

Replicated objects: the primary's copy is compared with the others by digest and copied over those that differ or are
missing. Erasure-coded objects: missing strips are computed from enough others; of an object that may be unsettled all
strips are read, and parity that does not belong to the data is computed anew. The data strips as they are count: what
was acknowledged is in all of them.

Strips are mended here and nowhere else. If each holder computed its own from what the others have at the moment, it
would mix strips from before and after a change.

Whatever is changed is changed under the ring that the settling began with. A later epoch may have another primary,
which orders changes of its own, and other holders: what reached former ones under its number would stay there.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import anyio

from sheepdog.contracts.services import Executor
from sheepdog.contracts.store import REPLICA, Buffer, ShardKey
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.placement import Placement, Placer
from sheepdog.daemon.recovery_fetch import Finder
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.verdicts import Look, Verdict
from sheepdog.errors import ObjectNotFound, ShardCorrupt, SheepdogError, StoreDeviceError
from sheepdog.model.node import NodeId
from sheepdog.wire.header import Request
from sheepdog.wire.opcodes import SHEEP_PROTO_VER, Op
from sheepdog.wire.payloads import HashResponse
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.recovery import Recovery

logger = logging.getLogger(__name__)

Done: TypeAlias = Callable[[int], None]
Looks: TypeAlias = Callable[[int, Placement], Awaitable[Mapping[NodeId, Look]]]

PUSH_BYTES_MAX = 16 << 20  # larger objects are pushed in pieces


class Mender:
    """Settles objects whose primary is this sheep."""

    def __init__(
        self,
        recovery: Recovery,
        finder: Finder,
        state: SheepState,
        placer: Placer,
        shards: Shards,
        executor: Executor,
        outbox: Outbox,
        spawn: Callable[..., None],
    ) -> None:
        self._recovery = recovery
        self._finder = finder
        self._state = state
        self._placer = placer
        self._shards = shards
        self._executor = executor
        self._outbox = outbox
        self._spawn = spawn
        self.looks: Looks | None = None  # how copies are compared by their checksums

    def settle(self, oid: int, done: Done) -> None:
        """Every holder has the same version. For a caller that is alone in the object's lane."""
        self._spawn(self._run, oid, done)

    async def _run(self, oid: int, done: Done) -> None:
        result: int = Result.NETWORK_ERROR
        try:
            result = await self._settle(oid)
        except StoreDeviceError as error:
            self._shards.disk_failed(error)
        except SheepdogError as error:
            logger.warning("oid=%016x cannot be settled now: %s", oid, error)
            result = error.result
        finally:
            with self._outbox:
                done(result)

    async def _settle(self, oid: int) -> int:
        state = self._state
        epoch = state.epoch
        placement = self._placer.placement(oid)
        if placement.primary != state.me.id:
            return Result.OLD_NODE_VER
        if self._recovery.removed_here(oid):
            self._recovery.unsettled.settled(oid)
            return 0
        settle = self._settle_copies if placement.scheme.identical else self._settle_strips
        result = await settle(oid, placement)
        if not result and state.epoch != epoch:
            return Result.OLD_NODE_VER
        if not result:
            self._recovery.unsettled.settled(oid)
            self._recovery.mended(oid)
        return result

    # ---- copies

    async def _settle_copies(self, oid: int, placement: Placement) -> int:
        key = ShardKey(oid, REPLICA)
        store = self._shards.store
        if not await self._executor.run(lambda: store.exists(key)):
            result = await self._recovery.fetched(oid, REPLICA)
            if result == Result.NO_OBJ:
                # Nobody has it: it was removed, or its creation never completed.
                self._recovery.unsettled.settled(oid)
                return 0
            if result:
                return result
        if not placement.others:
            return 0
        digests: dict[NodeId, bytes | None] = {}

        async def ask(node: NodeId) -> None:
            digests[node] = await self._digest(node, oid)

        async with anyio.create_task_group() as tasks:
            for node in placement.others:
                tasks.start_soon(ask, node)

        def read() -> tuple[bytearray, bytes]:
            content = bytearray(store.size(key))
            store.read_into(key, memoryview(content), offset_bytes=0)
            return content, hashlib.sha1(content, usedforsecurity=False).digest()

        try:
            try:
                content, digest = await self._executor.run(read)
                same = all(theirs == digest for theirs in digests.values())
                better = () if same else await self._better(oid, placement)
            except ShardCorrupt as error:
                self._shards.corrupt(error)
                better = placement.others
            if better:
                result = await self._replace_own(key, placement, better)
                if result:
                    return result
                content, digest = await self._executor.run(read)
        except ObjectNotFound:
            return Result.NETWORK_ERROR  # a disk went just now: again
        results: list[int] = []

        async def bring(node: NodeId) -> None:
            if digests[node] == digest:
                results.append(0)
            else:
                results.append(await self.push_copy(node, key, content, placement))

        async with anyio.create_task_group() as tasks:
            for node in placement.others:
                tasks.start_soon(bring, node)
        return next((result for result in results if result), 0)

    async def _better(self, oid: int, placement: Placement) -> tuple[NodeId, ...]:
        """Holders of another copy that is known to be right, while nothing is known of ours.

        Each copy has everything that was acknowledged; ours may have changed on its disk besides.
        """
        if self.looks is None:
            return ()
        looks = await self.looks(oid, placement)
        right = tuple(node for node, look in looks.items() if look.verdict is Verdict.RIGHT)
        if self._state.me.id in right or len({looks[node].digest for node in right}) != 1:
            return ()
        return right

    async def _replace_own(self, key: ShardKey, placement: Placement, sources: Sequence[NodeId]) -> int:
        """Our copy becomes that of the first source that has a good one."""
        for node in sources:
            answer = await self._finder.ask(node, key, placement, self._state.epoch)
            if answer.content is not None:
                logger.info("oid=%016x: our copy is replaced by that of node=%s", key.oid, node.text)
                size = max(placement.object_bytes, len(answer.content))
                return await self._recovery.store_shard(key, answer.content, size, replace=True)
        logger.error("oid=%016x: no good copy is left", key.oid)
        return Result.EIO

    async def _digest(self, node: NodeId, oid: int) -> bytes | None:
        """SHA-1 of the live copy there; ``None`` for none."""
        return await digest_at(self._finder, self._state, node, oid)

    async def push_copy(
        self, node: NodeId, key: ShardKey, content: Buffer, placement: Placement, *, mark: bool = True
    ) -> int:
        """``node`` has this copy.

        :param mark: should we die half-way, the object is to be settled by our own copy; for a copy that is not ours
            that would be wrong.
        """
        first = content if len(content) <= PUSH_BYTES_MAX else memoryview(content)[:PUSH_BYTES_MAX]
        if mark:  # until the last piece is there, here and in the notes on disk
            self._recovery.unsettled.oids[key.oid] = None
        result = await self._change(Op.CREATE_AND_WRITE_PEER, node, key, 0, first, placement)
        offset = len(first)
        while not result and offset < len(content):
            piece = memoryview(content)[offset : offset + PUSH_BYTES_MAX]
            result = await self._change(Op.WRITE_PEER, node, key, offset, piece, placement)
            offset += len(piece)
        if not result:
            logger.info("oid=%016x was settled: copy to node=%s", key.oid, node.text)
        return result

    async def _change(
        self, opcode: int, node: NodeId, key: ShardKey, offset: int, data: Buffer, placement: Placement
    ) -> int:
        if placement.ring is not self._state.ring:
            return Result.OLD_NODE_VER
        response = await self._finder.request(
            node, opcode, key.oid, offset=offset, body=data, copies=placement.copies, copy_policy=placement.policy,
            ec_index=max(key.index, 0), tail=self._recovery.unsettled.low_water,
        )  # fmt: skip
        return response.result

    # ---- strips

    async def _settle_strips(self, oid: int, placement: Placement) -> int:
        marked = oid in self._recovery.unsettled.oids
        if not marked and await self._all_there(oid, placement):
            return 0
        gateway = self._recovery.gateway
        if gateway is not None:
            # Strips from before and after a change that died half-way do not fit together.
            result = await gateway.striped.undo.resolved(oid)
            if result:
                return result
        scheme = placement.scheme
        need = scheme.shards_to_read
        parts = await self._live_strips(oid, placement)
        live = set(parts)
        if len(parts) < need:
            found = await self._finder.find(
                oid, placement, need, self._recovery.gathered, skip_own=placement.index not in live
            )
            if len(found.parts) < need and self._recovery.wildcard:
                for index in range(scheme.shards):
                    if index not in found.parts:
                        found.parts.update((await self._finder.find_wildcard(oid, index, placement)).parts)
            if len(found.parts) < need:
                if not found.doubtful:
                    # Removed, or its creation never completed.
                    self._recovery.unsettled.settled(oid)
                    return Result.NO_OBJ
                logger.warning(
                    "oid=%016x cannot be rebuilt: %d strips are there, %d needed", oid, len(found.parts), need
                )
                return Result.EIO
            if not await self._recovery.wanted(oid, found.version):
                return Result.NO_OBJ
            parts = found.parts

        def compute() -> dict[int, Buffer]:
            """The strips that are missing or wrong."""
            known = {index: parts[index] for index in sorted(parts)[:need]}
            data = {index: parts[index] if index in parts else scheme.rebuild(index, known) for index in range(need)}
            wanted: dict[int, Buffer] = {}
            for index in range(len(placement.holders)):
                if index in live and not marked:
                    continue
                strip = data[index] if index < need else scheme.rebuild(index, data)
                if index not in live or bytes(strip) != bytes(parts[index]):
                    wanted[index] = strip
            return wanted

        wanted = await self._executor.run(compute)
        results: list[int] = []

        async def bring(index: int, strip: Buffer) -> None:
            results.append(await self.push_strip(oid, index, strip, placement))

        async with anyio.create_task_group() as tasks:
            for index, strip in wanted.items():
                tasks.start_soon(bring, index, strip)
        return next((result for result in results if result), 0)

    async def _all_there(self, oid: int, placement: Placement) -> bool:
        """Every holder has its strip. Says nothing about what is in it."""
        found = await self._live_strips(oid, placement, length=1)
        return len(found) == len(placement.holders)

    async def _live_strips(self, oid: int, placement: Placement, *, length: int | None = None) -> dict[int, Buffer]:
        """What the present holders have; strip index -> content. A corrupt strip is none.

        :raises TransportError: one does not answer.
        """
        parts: dict[int, Buffer] = {}
        trouble: list[SheepdogError] = []
        present = {node.id for node in self._state.ring.storage}
        epoch = self._state.epoch

        async def read(index: int, node: NodeId) -> None:
            try:
                answer = await self._finder.ask(node, ShardKey(oid, index), placement, epoch, length=length)
            except SheepdogError as error:
                trouble.append(error)
                return
            if answer.content is not None:
                parts[index] = answer.content

        async with anyio.create_task_group() as tasks:
            for index, node in enumerate(placement.holders):
                if node in present:
                    tasks.start_soon(read, index, node)
        if trouble:
            raise trouble[0]
        return parts

    async def push_strip(self, oid: int, index: int, strip: Buffer, placement: Placement) -> int:
        """The holder of that strip has it."""
        key = ShardKey(oid, index)
        node = placement.holders[index]
        size = max(placement.shard_bytes, len(strip))
        logger.debug("oid=%016x: strip %d to node=%s", oid, index, node.text)
        if node == self._state.me.id:
            if placement.ring is not self._state.ring:
                return Result.OLD_NODE_VER
            return await self._recovery.store_shard(key, strip, size, replace=True)
        first = strip if len(strip) <= PUSH_BYTES_MAX else memoryview(strip)[:PUSH_BYTES_MAX]
        if len(first) < len(strip):
            self._recovery.unsettled.oids[oid] = (
                None  # a strip of which only a part arrives must not be taken for whole
            )
        result = await self._change(Op.CREATE_AND_WRITE_PEER, node, key, 0, first, placement)
        offset = len(first)
        while not result and offset < len(strip):
            piece = memoryview(strip)[offset : offset + PUSH_BYTES_MAX]
            result = await self._change(Op.WRITE_PEER, node, key, offset, piece, placement)
            offset += len(piece)
        return result


async def digest_at(finder: Finder, state: SheepState, node: NodeId, oid: int) -> bytes | None:
    """SHA-1 of the live copy at ``node``; ``None`` when it has none, or does not say."""
    # An epoch of 0 matches no set-aside version.
    response = await finder.send(
        node, Request(Op.GET_HASH, proto=SHEEP_PROTO_VER, epoch=state.epoch, oid=oid, tgt_epoch=0)
    )
    if response.result:
        return None
    return HashResponse.unpack(response.variant).digest
