"""Which objects some volume still uses. Old versions of what was given up must not come back to life."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from sheepdog.contracts.store import Buffer
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.state import SheepState
from sheepdog.errors import RequestError, SheepdogError
from sheepdog.model.clusterinfo import ClusterFlag
from sheepdog.model.ids import index_of, inode_oid, is_data, is_inode, is_ledger, vid_of
from sheepdog.model.inode import MAP_OFFSET

if TYPE_CHECKING:
    from sheepdog.daemon.gateway import Gateway

STORE_POLICY_OFFSET = 553  # in the inode; not 0 for a hyper volume


class Wanted:
    """Answers from the volume table and from inodes."""

    def __init__(self, state: SheepState, outbox: Outbox) -> None:
        self._state = state
        self._outbox = outbox
        self.gateway: Gateway | None = None

    def _deleted(self, vid: int) -> bool:
        state = self._state.vdis.get(vid)
        return state is not None and state.deleted

    def heirless(self, oid: int) -> bool:
        """A data object or ledger of a deleted volume without living descendants. Reads nothing.

        A node that was away while the volume was deleted still has such objects: nobody wants them back.
        """
        if not (is_data(oid) or is_ledger(oid)):
            return False
        vid = vid_of(oid)
        return self._deleted(vid) and not self.heirs(vid)

    def heirs(self, vid: int) -> list[int]:
        """The live volumes that may name data objects of ``vid``: itself and what descends from it."""
        vdis = self._state.vdis
        found = []
        for state in vdis.states():
            if state.deleted:
                continue
            ancestor = state
            while ancestor.vid != vid and ancestor.parent_vid:
                parent = vdis.get(ancestor.parent_vid)
                if parent is None:
                    break
                ancestor = parent
            # Where the line breaks off, relationship cannot be ruled out.
            if ancestor.vid == vid or ancestor.parent_vid:
                found.append(state.vid)
        found.sort(key=lambda heir: heir != vid)  # most objects are used by their own volume
        return found

    async def referenced(self, oid: int) -> bool:
        """Whether any live volume uses this object; True when that cannot be ruled out."""
        vid = vid_of(oid)
        if self._state.vdis.get(vid) is None:
            # With recycling, a volume that nobody knows was reclaimed.
            return not self._state.flags & ClusterFlag.RECYCLE_VID
        if is_inode(oid):
            return True  # that of a deleted volume keeps its number taken
        if not is_data(oid):
            return not self._deleted(vid) or (is_ledger(oid) and bool(self.heirs(vid)))
        if self.gateway is None:
            return True
        for heir in self.heirs(vid):
            try:
                if await self._names(heir, oid):
                    return True
            except SheepdogError:
                return True
        return False

    async def _names(self, volume: int, oid: int) -> bool:
        """Whether the map of ``volume`` has this object; always of a hyper volume, whose tree is not searched."""
        if any(await self._read(inode_oid(volume), STORE_POLICY_OFFSET, 1)):
            return True
        entry = await self._read(inode_oid(volume), MAP_OFFSET + 4 * index_of(oid), 4)
        return int.from_bytes(entry, "little") == vid_of(oid)

    async def _read(self, oid: int, offset: int, length: int) -> Buffer:
        gateway = self.gateway
        assert gateway is not None
        event = anyio.Event()
        outcome: list[tuple[int, Any]] = []  # Any: the bytes on success

        def done(result: int, data: Any) -> None:  # Any: as above
            outcome.append((result, data))
            event.set()

        with self._outbox:
            gateway.submit_read(oid, offset, length, done)
        await event.wait()
        result, data = outcome[0]
        if result:
            raise RequestError(f"oid={oid:016x} cannot be read", result=result)
        content: Buffer = data
        return content
