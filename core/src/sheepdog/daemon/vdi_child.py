"""Inodes of new volumes, and the steps by which a volume gets a child (snapshot, clone, rollback).

The child takes over the base's map; each side's reference pairs change so that shared objects can be counted
(data model, section 8). The order of the steps is chosen so that a crash after any of them loses nothing:

1. the child's inode is written with a *mark* in a part of the header that nobody uses. It says whose child it is and
   holds a digest of the base's references as they were;
2. the child's references are written, 3. the base's counts grow. Done twice, objects would never be freed; not done,
   they would be freed too early. The digest tells whether it was done;
4. the volume that becomes a snapshot gets its time; 5. the mark is cleared: the child is complete.

Until the mark is gone the child is no answer to any lookup, and whoever meets it in a section does what is left.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from struct import Struct

from sheepdog.contracts.services import Clock
from sheepdog.daemon.interfaces import Objects
from sheepdog.daemon.state import SheepState
from sheepdog.errors import InvalidParameters, RequestError, SheepdogError
from sheepdog.model import btree
from sheepdog.model.ids import inode_oid
from sheepdog.model.inode import (
    FIELDS_BYTES,
    MAP_ENTRIES,
    MAP_ENTRY_BYTES,
    MAP_OFFSET,
    REF_BYTES,
    REFS_OFFSET,
    SNAP_CTIME_OFFSET,
    InodeHeader,
    derive_references,
    used_entries,
)
from sheepdog.model.limits import (
    BLOCK_SIZE_SHIFT_DEFAULT,
    BLOCK_SIZE_SHIFT_MAX,
    BLOCK_SIZE_SHIFT_MIN,
    COPIES_DEFAULT,
    HYPERVOLUME_BYTES_MAX,
    HYPERVOLUME_SHIFT,
    flat_bytes_max,
)
from sheepdog.model.policy import CopyPolicy, data_strips, parity_strips
from sheepdog.model.timestamps import pack_time
from sheepdog.model.vdi_lookup import LookupResult
from sheepdog.wire.payloads import VdiRequest
from sheepdog.wire.results import Result

MARK_OFFSET = 576  # in the part of the header that held child ids until 0.8 and is zero since
_MARK = Struct("<8sIII20s")
_MAGIC = b"newchild"
MARK_BYTES = _MARK.size
HEAD_BYTES = MARK_OFFSET + MARK_BYTES
assert FIELDS_BYTES <= MARK_OFFSET


@dataclass(frozen=True, slots=True)
class PendingChild:
    """The mark in the inode of an incomplete child."""

    base: int
    retired: int  # the volume that becomes a snapshot, 0 for none
    used: int  # map entries that the child took over
    digest: bytes  # SHA-1 of the base's references before

    def pack(self) -> bytes:
        """The mark."""
        return _MARK.pack(_MAGIC, self.base, self.retired, self.used, self.digest)


async def read_pending(objects: Objects, vid: int) -> tuple[InodeHeader, PendingChild | None]:
    """The header of an inode, and its mark if it is incomplete."""
    data = bytes(await objects.read(inode_oid(vid), 0, HEAD_BYTES))
    magic, base, retired, used, digest = _MARK.unpack_from(data, MARK_OFFSET)
    header = InodeHeader.unpack(data)
    if magic != _MAGIC or not 0 < base < 1 << 24 or retired >= 1 << 24 or used > MAP_ENTRIES:
        return header, None
    return header, PendingChild(base, retired, used, digest)


class ChildMaker:
    """Writes inodes. Always called inside a section."""

    def __init__(self, state: SheepState, objects: Objects, clock: Clock) -> None:
        self._state = state
        self._objects = objects
        self._clock = clock

    def new_header(
        self, wanted: VdiRequest, name: bytes, result: LookupResult, base: InodeHeader | None
    ) -> InodeHeader:
        """The header of the new volume, with the cluster's defaults where the request leaves something open.

        :raises InvalidParameters: numbers that no volume can have, or that do not fit the base.
        """
        state = self._state
        copies, policy = wanted.copies, wanted.copy_policy
        if not copies and not policy:
            copies, policy = state.copies or COPIES_DEFAULT, state.copy_policy
        if policy:
            copies = data_strips(policy) + parity_strips(policy)
        CopyPolicy(copies, policy)
        shift = wanted.block_size_shift or state.block_size_shift or BLOCK_SIZE_SHIFT_DEFAULT
        if base is not None:
            # Shared objects have the size that the base gave them.
            shift = base.block_size_shift
            if base.is_hypervolume or wanted.store_policy:
                raise InvalidParameters("hypervolumes count no references, so they cannot have snapshots or clones")
        if not BLOCK_SIZE_SHIFT_MIN <= shift <= BLOCK_SIZE_SHIFT_MAX:
            raise InvalidParameters(f"object size 2^{shift} ({BLOCK_SIZE_SHIFT_MIN} to {BLOCK_SIZE_SHIFT_MAX})")
        if wanted.store_policy == 0:
            size_max = flat_bytes_max(shift)
        elif wanted.store_policy == 1:
            size_max = HYPERVOLUME_BYTES_MAX
            if shift != HYPERVOLUME_SHIFT:
                raise InvalidParameters(f"a hypervolume has object size 2^{HYPERVOLUME_SHIFT}, not 2^{shift}")
        else:
            raise InvalidParameters(f"no store policy {wanted.store_policy}")
        if wanted.vdi_size > size_max:
            raise InvalidParameters(f"{wanted.vdi_size} bytes, at most {size_max} are possible")
        return InodeHeader(
            name=name,
            create_time=pack_time(self._clock.time()),
            vdi_size=wanted.vdi_size,
            copy_policy=policy,
            store_policy=wanted.store_policy,
            nr_copies=copies,
            block_size_shift=shift,
            snap_id=result.next_snap_id,
            vdi_id=result.free,
            parent_vdi_id=wanted.base_vdi_id if base is not None else 0,
        )

    async def create_volume(self, header: InodeHeader) -> None:
        """The inode of a volume without parent exists.

        :raises RequestError: VDI_WRITE; the inode may exist, which no lookup sees.
        """
        data = header.pack()
        if header.is_hypervolume:
            data += btree.BtreeNode().pack()
        await self._create(header, data)

    async def base_header(self, base: int) -> InodeHeader:
        """The header of the base volume.

        :raises RequestError: BASE_VDI_READ.
        """
        return InodeHeader.unpack(await self._read_base(base, 0, FIELDS_BYTES))

    async def create_pending(self, header: InodeHeader, base: int, retired: int) -> PendingChild:
        """Step 1: the child's inode exists, with its mark and without references.

        :raises RequestError: BASE_VDI_READ or VDI_WRITE; nothing refers to the child.
        """
        base_header = await self.base_header(base)
        count = min(base_header.objects, MAP_ENTRIES)
        entries = memoryview(await self._read_base(base, MAP_OFFSET, count * MAP_ENTRY_BYTES)).cast("B").cast("I")
        used = used_entries(entries)
        references = await self._read_base(base, REFS_OFFSET, used * REF_BYTES)
        pending = PendingChild(base, retired, used, hashlib.sha1(references, usedforsecurity=False).digest())
        data = bytearray(header.pack())
        data[MARK_OFFSET:HEAD_BYTES] = pending.pack()
        data += entries[:used].cast("B")
        await self._create(header, data)
        return pending

    async def complete(self, vid: int, pending: PendingChild) -> InodeHeader:
        """Steps 2 to 5, whichever are left. Returns the child's header.

        :raises RequestError: BASE_VDI_READ, BASE_VDI_WRITE or VDI_WRITE; it can be called again.
        """
        references = await self._read_base(pending.base, REFS_OFFSET, pending.used * REF_BYTES)
        if pending.used and hashlib.sha1(references, usedforsecurity=False).digest() == pending.digest:
            entries = await self._read_base(pending.base, MAP_OFFSET, pending.used * MAP_ENTRY_BYTES)
            own, grown = derive_references(
                memoryview(entries).cast("B").cast("I"), memoryview(references).cast("B").cast("i")
            )
            await self._write_child(vid, REFS_OFFSET, bytes(own))
            await self._write_base(pending.base, REFS_OFFSET, bytes(grown))
        if pending.retired:
            retired = await self.base_header(pending.retired)
            if not retired.is_snapshot:
                now = pack_time(self._clock.time())
                await self._write_base(pending.retired, SNAP_CTIME_OFFSET, now.to_bytes(8, "little"))
        await self._write_child(vid, MARK_OFFSET, bytes(MARK_BYTES))
        try:
            header, _ = await read_pending(self._objects, vid)
        except SheepdogError as error:
            raise RequestError(f"vid={vid:x}: {error}", result=Result.VDI_WRITE) from error
        return replace(header, vdi_id=vid)

    async def _create(self, header: InodeHeader, data: bytes | bytearray) -> None:
        try:
            await self._objects.create(
                inode_oid(header.vdi_id), 0, data, copies=header.nr_copies, policy=header.copy_policy
            )
        except SheepdogError as error:
            raise RequestError(f"vid={header.vdi_id:x}: {error}", result=Result.VDI_WRITE) from error

    async def _read_base(self, base: int, offset: int, length: int) -> bytes:
        if not 0 < base < 1 << 24:
            raise InvalidParameters(f"no base vid={base:x}")
        if not length:
            return b""
        try:
            return bytes(await self._objects.read(inode_oid(base), offset, length))
        except SheepdogError as error:
            raise RequestError(f"base vid={base:x}: {error}", result=Result.BASE_VDI_READ) from error

    async def _write_child(self, vid: int, offset: int, data: bytes) -> None:
        try:
            await self._objects.write(inode_oid(vid), offset, data)
        except SheepdogError as error:
            raise RequestError(f"vid={vid:x}: {error}", result=Result.VDI_WRITE) from error

    async def _write_base(self, base: int, offset: int, data: bytes) -> None:
        try:
            await self._objects.write(inode_oid(base), offset, data)
        except SheepdogError as error:
            raise RequestError(f"base vid={base:x}: {error}", result=Result.BASE_VDI_WRITE) from error
