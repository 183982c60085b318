"""Asks all members what there is, and tells what should be here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from struct import iter_unpack

import anyio
from anyio.lowlevel import checkpoint

from sheepdog.contracts.store import REPLICA, ShardKey
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.placement import Placer
from sheepdog.daemon.recovery_fetch import VERSION, Finder
from sheepdog.daemon.state import SheepState
from sheepdog.errors import TransportError
from sheepdog.model.clusterinfo import ClusterFlag
from sheepdog.model.ids import is_data
from sheepdog.model.node import NodeId
from sheepdog.wire.extensions import RECOVERY_POINT
from sheepdog.wire.header import Request
from sheepdog.wire.opcodes import SHEEP_PROTO_VER, Op
from sheepdog.wire.results import Result

logger = logging.getLogger(__name__)

LIST_BYTES_FIRST = 1 << 20
LIST_BYTES_MAX = 64 << 20
LIST_RETRY_S = 0.05


class Lister:
    """Questions to the other members under the present epoch."""

    def __init__(self, state: SheepState, peers: PeerPool, placer: Placer, finder: Finder) -> None:
        self._state = state
        self._peers = peers
        self._placer = placer
        self._finder = finder

    async def others(self) -> set[int] | None:
        """What the other members hold, live and set aside; ``None`` when the epoch ended before all answered."""
        lists: list[Sequence[int] | None] = []

        async def ask(node: NodeId) -> None:
            lists.append(await self._list(node))

        async with anyio.create_task_group() as tasks:
            for node in self._state.ring.with_disks:
                if node.id != self._state.me.id:
                    tasks.start_soon(ask, node.id)
        oids: set[int] = set()
        for listed in lists:
            if listed is None:
                return None
            oids.update(listed)
        return oids

    async def _list(self, node: NodeId) -> list[int] | None:
        """What ``node`` holds. Asked until it answers or the epoch is over: else something is overlooked."""
        epoch = self._state.epoch
        room = LIST_BYTES_FIRST
        asked = 0
        while self._state.epoch == epoch and room <= LIST_BYTES_MAX:
            try:
                response = await self._peers.call(node, Request(Op.GET_OBJ_LIST, epoch=epoch, data_length=room))
            except TransportError:
                result: int = Result.NETWORK_ERROR
            else:
                result = response.result
            if result == Result.BUFFER_SMALL:
                room *= 4
            elif result:
                asked += 1
                if asked % 20 == 0:
                    logger.warning("node=%s does not give its object list: result=0x%02x", node.text, result)
                await anyio.sleep(LIST_RETRY_S)
            else:
                return [oid for (oid,) in iter_unpack("<Q", bytes(response.body))]
        return None

    async def gathered(self) -> int:
        """The newest epoch of which another member knows that everybody had everything."""
        newest = 0
        for node in self._state.ring.with_disks:
            if node.id == self._state.me.id:
                continue
            response = await self._finder.send(
                node.id, Request(RECOVERY_POINT, proto=SHEEP_PROTO_VER, epoch=self._state.epoch)
            )
            if not response.result:
                newest = max(newest, VERSION.unpack_from(response.variant)[0])
        return newest

    async def lacking(self, oids: set[int], here: set[ShardKey], heirless: Callable[[int], bool]) -> list[ShardKey]:
        """What of ``oids`` belongs here and is not, in the order it is to be recovered in.

        :param heirless: of an object that nobody wants back.
        """
        lacking: list[ShardKey] = []
        for number, oid in enumerate(sorted(oids)):
            if number % 512 == 511:
                await checkpoint()  # others get their turn
            placement = self._placer.placement(oid)
            key = ShardKey(oid, REPLICA if placement.identical else placement.index)
            if placement.local and key not in here and not heirless(oid):
                lacking.append(key)
        # Inodes first: without them nothing can be opened.
        lacking.sort(key=lambda key: (is_data(key.oid), key))
        return lacking

    def overfull(self, oids: set[int]) -> bool:
        """The cluster is to avoid full disks, and some node has less space than it would have to hold."""
        if not self._state.flags & ClusterFlag.AVOID_DISK_FULL:
            return False
        needed: dict[NodeId, int] = {}
        for oid in oids:
            if is_data(oid):
                placement = self._placer.placement(oid)
                size = placement.scheme.shard_bytes(placement.object_bytes)
                for node in placement.holders:
                    needed[node] = needed.get(node, 0) + size
        for member in self._state.ring.storage:
            if needed.get(member.id, 0) > member.space:
                logger.warning("recovery is not started: node=%s would be full", member.id.text)
                return True
        return False
