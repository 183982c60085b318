"""Removes what deleted volumes left behind.

A reference that is given up is dropped once or not at all (``references``): when a holder had no space for the map
write that gave it up, when the sheep that was to drop it was killed, or when an epoch began at that moment, the object
stays although no map names it any more. So when everybody has recovered, and some time after a volume was deleted, each
sheep that has objects of deleted volumes looks whether any living volume names them. It is not left to their primaries:
a creation that was refused may have reached the other holders only, and recovery brings nobody such objects.

Nothing that is in use goes, and nothing that was made again meanwhile:

* Only objects of deleted volumes are looked at. Nobody makes objects of such a volume, whose number is not given out
  again. (With recycling it is. There each sheep forgets a whole family at once, and nothing is swept.)
* Only volumes that were made while this sheep was a member. Of older ones there may be descendants of which nobody
  knows, because all holders of their inodes are away; when those return, what they name must still be there.
* A deleted volume is one of which all sheep say so, and whose inode was wiped at every holder that has it.
* Its objects can be named by its descendants alone. All copies of the map of each of them are read, also those that a
  change under way has not reached, because any of them may be the one that lasts. A copy that cannot be read may name
  the object.
* A map gets the name of an object only when its volume is made, as a child of one that has it already. The child is
  known to all sheep before its map is filled (``vdi.PREPARE``). So if no descendant was added while the maps were read,
  each of them was read after all that could have been copied from it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio

from sheepdog.contracts.services import Executor
from sheepdog.contracts.store import REPLICA, Buffer, ShardKey
from sheepdog.daemon.awaiting import result_of
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.placement import Placer
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.state import SheepState
from sheepdog.errors import ObjectNotFound, RequestError, SheepdogError, StoreDeviceError
from sheepdog.model.clusterinfo import ClusterFlag
from sheepdog.model.ids import index_of, inode_oid, is_attribute, is_data, is_inode, is_ledger, vid_of
from sheepdog.model.inode import FIELDS_BYTES, MAP_ENTRIES, MAP_ENTRY_BYTES, MAP_OFFSET, InodeHeader
from sheepdog.wire.opcodes import Op
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.recovery import Recovery

logger = logging.getLogger(__name__)

DELAY_S = 3.0  # several deletions that follow each other cause one look


class Sweeper:
    """Of the objects that one sheep has."""

    def __init__(
        self,
        recovery: Recovery,
        state: SheepState,
        placer: Placer,
        shards: Shards,
        executor: Executor,
        outbox: Outbox,
        spawn: Callable[..., None],
    ) -> None:
        self._recovery = recovery
        self._state = state
        self._placer = placer
        self._shards = shards
        self._executor = executor
        self._outbox = outbox
        self._spawn = spawn
        self._due = False
        self._running = False

    def soon(self) -> None:
        """There may be something to sweep."""
        self._due = True
        if not self._running:
            self._running = True
            self._spawn(self._run)

    async def _run(self) -> None:
        try:
            while self._due:
                await anyio.sleep(DELAY_S)
                self._due = False
                try:
                    # While something is recovered this waits: then there is cause again.
                    if self._recovery.whole():
                        await self.sweep()
                except StoreDeviceError as error:
                    self._shards.disk_failed(error)
                except SheepdogError as error:
                    logger.warning("what deleted volumes left cannot be looked for: %s", error)
        finally:
            self._running = False

    async def sweep(self) -> int:
        """What deleted volumes left here is gone, here and elsewhere; returns how many objects went.

        What cannot be found out about a volume leaves its objects for another time.

        :raises StoreError: what is stored here cannot be listed.
        """
        state = self._state
        epoch = state.epoch
        if state.flags & ClusterFlag.RECYCLE_VID:
            return 0
        deleted = {vid for vid in state.vdis.born if self._deleted(vid)}
        if not deleted:
            return 0
        store = self._shards.store

        def work() -> set[int]:
            return {
                key.oid
                for key in store.keys()  # noqa: SIM118  a store is no mapping
                if vid_of(key.oid) in deleted and not is_inode(key.oid) and not is_attribute(key.oid)
            }

        candidates: dict[int, set[int]] = {}
        for oid in sorted(await self._executor.run(work)):
            candidates.setdefault(vid_of(oid), set()).add(oid)
        for vid in sorted(candidates):
            try:
                if await self._wiped(vid):
                    continue
                logger.warning("vid=%x is deleted, but some copy of its inode is not wiped; its objects stay", vid)
            except SheepdogError as error:
                logger.info("what vid=%x left stays for now: %s", vid, error)
            del candidates[vid]
        await self._leave_named(candidates)
        count = 0
        for oid in sorted(oid for oids in candidates.values() for oid in oids):
            count += await self._remove(oid, epoch)
        if count:
            logger.info("%d objects of deleted volumes were left over, and are removed", count)
        return count

    def _deleted(self, vid: int) -> bool:
        known = self._state.vdis.get(vid)
        return known is not None and known.deleted

    async def _remove(self, oid: int, epoch: int) -> bool:
        def wanted() -> bool:
            return self._state.epoch == epoch and self._deleted(vid_of(oid))

        gateway = self._recovery.gateway
        if gateway is None or not wanted():
            return False
        return not await result_of(self._outbox, lambda done: gateway.submit_remove(oid, done, wanted=wanted))

    async def _wiped(self, vid: int) -> bool:
        """Every copy of the inode is that of a deleted volume: one that a crash damaged looks the same."""
        copies = await self._copies(inode_oid(vid), 0, FIELDS_BYTES)
        return bool(copies) and all(InodeHeader.unpack(copy).is_deleted for copy in copies)

    async def _leave_named(self, candidates: dict[int, set[int]]) -> None:
        """What a living volume names, or may name, is no candidate any more."""
        heirs = {vid: self._recovery.wanted_objects.heirs(vid) for vid in candidates}
        of: dict[int, list[int]] = {}  # a living volume -> those of the deleted ones that it descends from
        for vid, found in heirs.items():
            for heir in found:
                of.setdefault(heir, []).append(vid)
        for heir, vids in sorted(of.items()):
            try:
                maps = await self._maps(heir, max(_index(oid) for vid in vids for oid in candidates[vid] or (0,)))
            except SheepdogError as error:
                logger.info("what the ancestors of vid=%x left stays for now: %s", heir, error)
                for vid in vids:
                    candidates[vid] = set()
                continue
            for map_ in maps:
                for vid in vids:
                    candidates[vid] -= {
                        oid
                        for oid in candidates[vid]
                        if (is_data(oid) or is_ledger(oid)) and index_of(oid) < len(map_) and map_[index_of(oid)] == vid
                    }
        for vid in sorted(candidates):
            if self._recovery.wanted_objects.heirs(vid) != heirs[vid]:
                del candidates[vid]  # the maps that were read are not all: another time

    async def _maps(self, vid: int, index_max: int) -> list[memoryview]:
        """All copies of the map, with at least so many entries as there are up to ``index_max``.

        :raises ObjectNotFound: there is none, though there should be.
        """
        length = MAP_ENTRY_BYTES * min(index_max + 1, MAP_ENTRIES)
        copies = await self._copies(inode_oid(vid), MAP_OFFSET, length)
        if not copies:
            raise ObjectNotFound(f"vid={vid:x} has no inode")
        return [memoryview(bytes(copy).ljust(length, b"\0")).cast("I") for copy in copies]

    async def _copies(self, oid: int, offset: int, length: int) -> list[Buffer]:
        """These bytes of all live copies.

        :raises SheepdogError: a holder does not say what it has.
        """
        found: list[Buffer] = []
        store = self._shards.store
        for node in self._placer.placement(oid).holders:
            if node == self._state.me.id:
                buffer = bytearray(length)
                key = ShardKey(oid, REPLICA)

                def read(key: ShardKey = key, buffer: bytearray = buffer) -> bool:
                    try:
                        store.read_into(key, memoryview(buffer), offset_bytes=offset)
                    except ObjectNotFound:
                        return False
                    return True

                if await self._executor.run(read):
                    found.append(buffer)
                continue
            response = await self._recovery.finder.request(node, Op.READ_PEER, oid, offset=offset, length=length)
            if not response.result:
                found.append(response.body)
            elif response.result != Result.NO_OBJ:
                raise RequestError(f"node={node.text} does not give its copy of oid={oid:016x}", result=response.result)
        return found


def _index(oid: int) -> int:
    """The map entry that says whether the object is in use; of those that no map names, the first."""
    return index_of(oid) if is_data(oid) or is_ledger(oid) else 0
