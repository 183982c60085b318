"""The inode of a VDI: header, map, references.

12587576 bytes, mostly zeros. The *header* (4664 bytes) says what the VDI is. The *map* names for each data object the
vid that owns it, 0 for none. The *references* are one (generation, count) pair per map entry, from which the ledger of
a shared object is settled when the entry goes. Layout: docs, data model, section 4.

Whole inodes are big, so nothing here copies or scans more than it must: maps are memoryviews of u32, and scans skip
zeros in blocks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct

from sheepdog.errors import InvalidParameters, ProtocolError

Buffer = bytes | bytearray | memoryview

NAME_BYTES = 256  # of the name and tag fields, the NUL included
HEADER_BYTES = 4664
MAP_ENTRIES = 1 << 20
MAP_OFFSET = HEADER_BYTES
MAP_ENTRY_BYTES = 4
REFS_OFFSET = MAP_OFFSET + MAP_ENTRIES * MAP_ENTRY_BYTES
REF_BYTES = 8
SHORT_INODE_BYTES = REFS_OFFSET
INODE_BYTES = REFS_OFFSET + MAP_ENTRIES * REF_BYTES

TAG_OFFSET = 256
CREATE_TIME_OFFSET = 512
SNAP_CTIME_OFFSET = 520
VDI_SIZE_OFFSET = 536
COPY_POLICY_OFFSET = 552
BTREE_COUNTER_OFFSET = 568
FIELDS_BYTES = 572  # of the header that mean something; the rest is zero

# name, tag, create_time, snap_ctime, vm_clock_nsec, vdi_size, vm_state_size, copy_policy, store_policy, nr_copies,
# block_size_shift, snap_id, vdi_id, parent_vdi_id, btree_counter
_HEADER = Struct("<256s256sQQQQQBBBBIIII")
assert _HEADER.size == FIELDS_BYTES
assert INODE_BYTES == 12587576
assert SHORT_INODE_BYTES == 4198968
assert sys.byteorder == "little", "maps are viewed in place, so the host must be little-endian"

_SCAN_BYTES = 4096
_SCAN_ZEROS = bytes(_SCAN_BYTES)


def check_name(name: bytes, what: str = "name") -> bytes:
    """``name``, which fits a 256-byte field with its NUL.

    :raises InvalidParameters: longer than 255 bytes, or with a NUL inside.
    """
    if len(name) >= NAME_BYTES or b"\0" in name:
        raise InvalidParameters(f"a {what} has at most {NAME_BYTES - 1} bytes and no NUL: {name[:40]!r}")
    return name


def cut_name(raw: bytes | memoryview) -> bytes:
    """The bytes of a NUL-padded field before the first NUL."""
    return bytes(raw).split(b"\0", 1)[0]


@dataclass(frozen=True, slots=True)
class InodeHeader:
    """What a VDI is.

    :param name: empty means deleted.
    :param tag: of a snapshot; empty on a working VDI.
    :param create_time: in the form of ``sheepdog.model.timestamps``, as ``snap_ctime``.
    :param snap_ctime: 0 on a working VDI.
    :param vdi_size: bytes; 0 after deletion.
    :param copy_policy: 0 replication, else an erasure code.
    :param store_policy: 0 flat map, 1 hypervolume.
    :param snap_id: 1 for a fresh VDI, one more with each snapshot of the name.
    :param parent_vdi_id: what it was snapshotted or cloned from, 0 for nothing.
    :param btree_counter: the next B-tree node number of a hypervolume.
    """

    name: bytes = b""
    tag: bytes = b""
    create_time: int = 0
    snap_ctime: int = 0
    vm_clock_nsec: int = 0
    vdi_size: int = 0
    vm_state_size: int = 0
    copy_policy: int = 0
    store_policy: int = 0
    nr_copies: int = 0
    block_size_shift: int = 0
    snap_id: int = 0
    vdi_id: int = 0
    parent_vdi_id: int = 0
    btree_counter: int = 0

    def __post_init__(self) -> None:
        check_name(self.name)
        check_name(self.tag, "tag")

    def pack(self) -> bytes:
        """4664 bytes, unused ones zero."""
        return _HEADER.pack(
            self.name,
            self.tag,
            self.create_time,
            self.snap_ctime,
            self.vm_clock_nsec,
            self.vdi_size,
            self.vm_state_size,
            self.copy_policy,
            self.store_policy,
            self.nr_copies,
            self.block_size_shift,
            self.snap_id,
            self.vdi_id,
            self.parent_vdi_id,
            self.btree_counter,
        ).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, buffer: Buffer) -> InodeHeader:
        """From the beginning of an inode.

        A field that somebody filled to its last byte without a NUL is cut to 255 bytes, as the original prints it.

        :raises ProtocolError: fewer than 572 bytes.
        """
        if len(buffer) < FIELDS_BYTES:
            raise ProtocolError(f"an inode header needs {FIELDS_BYTES} bytes, here are {len(buffer)}")
        name, tag, *numbers = _HEADER.unpack_from(buffer)
        return cls(cut_name(name[:-1]), cut_name(tag[:-1]), *numbers)

    @property
    def is_snapshot(self) -> bool:
        """It was set aside: its data objects are read-only."""
        return self.snap_ctime != 0

    @property
    def is_deleted(self) -> bool:
        """Its name was wiped."""
        return not self.name

    @property
    def is_clone(self) -> bool:
        """The first of its name and made from another VDI, as ``dog vdi list`` marks with ``c``."""
        return self.snap_id == 1 and self.parent_vdi_id != 0 and not self.is_snapshot

    @property
    def is_hypervolume(self) -> bool:
        """The map area is the root of a B-tree."""
        return self.store_policy == 1

    @property
    def objects(self) -> int:
        """How many data objects the VDI spans."""
        return object_count(self.vdi_size, self.block_size_shift)


def object_count(vdi_size: int, block_size_shift: int) -> int:
    """Data objects of a VDI, the last one maybe used in part."""
    return (vdi_size + (1 << block_size_shift) - 1) >> block_size_shift


def map_offset(index: int) -> int:
    """Where map entry ``index`` stands in the inode, in bytes."""
    return MAP_OFFSET + index * MAP_ENTRY_BYTES


def refs_offset(index: int) -> int:
    """Where the reference pair of entry ``index`` stands in the inode, in bytes."""
    return REFS_OFFSET + index * REF_BYTES


def map_view(inode: Buffer) -> memoryview:
    """The map as u32 entries, viewed in place; as many whole entries as the buffer has, at most 2^20."""
    end = min(len(inode), REFS_OFFSET)
    end -= max(end - MAP_OFFSET, 0) % MAP_ENTRY_BYTES
    return memoryview(inode)[MAP_OFFSET:end].cast("I")


def refs_view(inode: Buffer) -> memoryview:
    """The references of a whole inode as i32 values, viewed in place: generation of entry i at 2i, count at 2i+1."""
    end = min(len(inode), INODE_BYTES)
    end -= max(end - REFS_OFFSET, 0) % REF_BYTES
    return memoryview(inode)[REFS_OFFSET:end].cast("i")


def allocated(entries: memoryview) -> Iterator[tuple[int, int]]:
    """(index, vid) of every entry that is not 0, ascending. Stretches of zeros cost next to nothing."""
    view = entries.cast("B")
    step = _SCAN_BYTES // MAP_ENTRY_BYTES
    for start in range(0, len(entries), step):
        block = view[start * MAP_ENTRY_BYTES : start * MAP_ENTRY_BYTES + _SCAN_BYTES]
        if block == _SCAN_ZEROS:
            continue
        for index, vid in enumerate(entries[start : start + step].tolist(), start):
            if vid:
                yield index, vid


def used_entries(entries: memoryview) -> int:
    """One more than the highest index that is not 0; what must be written of a map that is zero behind."""
    view = entries.cast("B")
    end = len(view)
    while end:
        start = max(0, (end - 1) // _SCAN_BYTES * _SCAN_BYTES)
        block = bytes(view[start:end]).rstrip(b"\0")
        if block:
            return (start + len(block) + MAP_ENTRY_BYTES - 1) // MAP_ENTRY_BYTES
        end = start
    return 0


def derive_references(entries: memoryview, references: memoryview) -> tuple[bytearray, bytearray]:
    """The references of a child and of its base after a snapshot or clone, as bytes: (child's, base's).

    For every allocated entry the child gets (generation + 1, 0) and the base's count grows by one; nothing else
    changes. Both reach as far as the last allocated entry of the map; behind it the child's are zero.

    :param entries: the base's map.
    :param references: the base's references, as ``refs_view`` gives them, at least as many pairs as used entries.
    """
    used = used_entries(entries)
    base = bytearray(references[: 2 * used])
    child = bytearray(len(base))
    base_view, child_view = memoryview(base).cast("i"), memoryview(child).cast("i")
    for index, _ in allocated(entries[:used]):
        child_view[2 * index] = _wrap32(base_view[2 * index] + 1)
        base_view[2 * index + 1] = _wrap32(base_view[2 * index + 1] + 1)
    return child, base


def _wrap32(number: int) -> int:
    return (number + 0x80000000 & 0xFFFFFFFF) - 0x80000000
