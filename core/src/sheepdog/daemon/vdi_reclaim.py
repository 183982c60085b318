"""Takes a volume apart: its map is cleared, which drops its references, then its inode is wiped.

Clients that know how clear the map themselves before they delete; for those that do not (QEMU) the server does it. VM
state goes with the snapshot that it belongs to.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from sheepdog.contracts.store import REPLICA, ObjectStore, ShardKey
from sheepdog.daemon.interfaces import Objects
from sheepdog.errors import ObjectNotFound, StoreError
from sheepdog.model.btree import INNER_DEPTH, BtreeNode, entry_offset
from sheepdog.model.ids import Oid, data_oid, inode_oid, is_attribute, vid_of, vmstate_oid
from sheepdog.model.inode import (
    MAP_ENTRIES,
    MAP_ENTRY_BYTES,
    MAP_OFFSET,
    REFS_OFFSET,
    VDI_SIZE_OFFSET,
    InodeHeader,
    allocated,
    map_offset,
    object_count,
    used_entries,
)

logger = logging.getLogger(__name__)

BATCH_ENTRIES = 128  # map entries cleared by one write, as dog does
VMSTATE_OBJECTS_MAX = 1 << 20
_ZERO_PIECE_BYTES = 1 << 20
_WIPED_BYTES = VDI_SIZE_OFFSET + 8


class Reclaimer:
    """Frees what volumes hold."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    async def _map(self, header: InodeHeader) -> memoryview:
        count = min(header.objects, MAP_ENTRIES)
        if not count:
            return memoryview(b"").cast("I")
        data = bytes(await self._objects.read(inode_oid(header.vdi_id), MAP_OFFSET, count * MAP_ENTRY_BYTES))
        return memoryview(data).cast("I")

    async def is_empty(self, header: InodeHeader) -> bool:
        """Whether nothing but the inode is left to free."""
        if header.is_hypervolume or header.vm_state_size:
            return False
        return used_entries(await self._map(header)) == 0

    async def reclaim(self, header: InodeHeader) -> None:
        """The volume refers to no object any more."""
        if header.is_hypervolume:
            await self._reclaim_tree(header)
        else:
            await self._reclaim_map(header)
        await self._reclaim_vmstate(header)

    async def _reclaim_map(self, header: InodeHeader) -> None:
        indexes = [index for index, _ in allocated(await self._map(header))]
        at = 0
        while at < len(indexes):
            # As many as possible that stand close together: the write covers everything between first and last.
            end = at + 1
            while end < len(indexes) and indexes[end] - indexes[at] < BATCH_ENTRIES:
                end += 1
            first, last = indexes[at], indexes[end - 1]
            await self._objects.write(
                inode_oid(header.vdi_id), map_offset(first), bytes((last - first + 1) * MAP_ENTRY_BYTES)
            )
            at = end

    async def _reclaim_tree(self, header: InodeHeader) -> None:
        data = await self._objects.read(inode_oid(header.vdi_id), MAP_OFFSET, REFS_OFFSET - MAP_OFFSET)
        root = BtreeNode.unpack(data)
        if root.depth != INNER_DEPTH:
            await self._remove_owned(header.vdi_id, root)
            return
        for _, oid in root.items():
            try:
                leaf = BtreeNode.unpack(await self._objects.read(oid, 0, REFS_OFFSET - MAP_OFFSET))
            except ObjectNotFound:
                continue  # an earlier, interrupted deletion came this far
            await self._remove_owned(header.vdi_id, leaf)
            await self._remove(oid)

    async def discard_from_tree(self, vid: int, index: int) -> None:
        """A hypervolume gives up one data object: its entry in the tree says so, and the object goes."""
        oid, offset = inode_oid(vid), MAP_OFFSET
        node = BtreeNode.unpack(await self._objects.read(oid, offset, REFS_OFFSET - MAP_OFFSET))
        if node.depth == INNER_DEPTH:
            slot = node.find(index)
            if slot == len(node):
                return
            oid, offset = Oid(node.value_at(slot)), 0
            node = BtreeNode.unpack_leaf(await self._objects.read(oid, 0, REFS_OFFSET - MAP_OFFSET))
        slot = node.find(index)
        if slot == len(node) or node.index_at(slot) != index or not node.value_at(slot):
            return
        await self._objects.write(oid, offset + entry_offset(slot), bytes(MAP_ENTRY_BYTES))
        if node.value_at(slot) == vid:
            await self._remove(data_oid(vid, index))

    async def _remove_owned(self, vid: int, leaf: BtreeNode) -> None:
        for index, owner in leaf.items():
            if owner == vid:
                await self._remove(data_oid(vid, index))

    async def _reclaim_vmstate(self, header: InodeHeader) -> None:
        if not header.block_size_shift:
            return
        count = min(object_count(header.vm_state_size, header.block_size_shift), VMSTATE_OBJECTS_MAX)
        for number in range(count):
            await self._remove(vmstate_oid(header.vdi_id, number))

    async def _remove(self, oid: int) -> None:
        try:
            await self._objects.remove(oid)
        except ObjectNotFound:
            pass  # never written, or an earlier deletion was interrupted behind it

    async def wipe(self, vid: int, header: InodeHeader) -> None:
        """The inode says that the volume is deleted: no name, no size, an empty map.

        A flat map was cleared by ``reclaim`` or the client, and its references with it.
        """
        oid = inode_oid(vid)
        if header.is_hypervolume:
            for at in range(MAP_OFFSET, REFS_OFFSET, _ZERO_PIECE_BYTES):
                await self._objects.write(oid, at, bytes(min(_ZERO_PIECE_BYTES, REFS_OFFSET - at)))
        # One write, so that there is never a name without a size or the reverse.
        fields = replace(header, name=b"", vdi_size=0).pack()
        await self._objects.write(oid, 0, fields[:_WIPED_BYTES])


def forget_locally(store: ObjectStore, vids: frozenset[int]) -> None:
    """No object of these volumes is stored here. Runs on a worker thread.

    Attributes stay: the number in their ids is the hash of a name, not a volume.
    """
    for vid in sorted(vids):
        try:
            store.remove(ShardKey(inode_oid(vid), REPLICA))
        except ObjectNotFound:
            pass  # not a holder
    for key in list(store.keys()):
        if vid_of(key.oid) in vids and not is_attribute(key.oid):
            try:
                store.remove(key)
            except StoreError as error:
                logger.warning("oid=%016x of a reclaimed volume cannot be removed: %s", key.oid, error)
