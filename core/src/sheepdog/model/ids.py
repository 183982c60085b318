"""Object ids: 64 bits that say what an object is and which VDI it belongs to.

From the top: five type bits (63 inode, 62 VM state, 61 attribute, 60 B-tree node, 59 ledger; none of them set means
data), three reserved bits, the 24-bit vid, and a 32-bit index inside the VDI. A ledger carries the oid of its data
object with bit 59 added (docs: data model, section 1).
"""

from __future__ import annotations

from typing import NewType

Oid = NewType("Oid", int)
Vid = NewType("Vid", int)
Epoch = NewType("Epoch", int)

INODE_BIT = 1 << 63
VMSTATE_BIT = 1 << 62
ATTRIBUTE_BIT = 1 << 61
BTREE_BIT = 1 << 60
LEDGER_BIT = 1 << 59
TYPE_BITS = INODE_BIT | VMSTATE_BIT | ATTRIBUTE_BIT | BTREE_BIT | LEDGER_BIT
REPLICATED_BITS = INODE_BIT | BTREE_BIT | LEDGER_BIT
SPARSE_BITS = INODE_BIT | LEDGER_BIT

VID_SHIFT = 32
VID_MASK = (1 << 24) - 1
INDEX_MASK = (1 << 32) - 1

_INODE_BYTES = 12587576
_ATTRIBUTE_BYTES = 66320
_FIXED_BYTES = 4 << 20  # of B-tree nodes and ledgers, whatever the VDI's object size


NO_OIDS = frozenset({0, (1 << 64) - 1})  # never the name of an object


def data_oid(vid: int, index: int) -> Oid:
    """The oid of data object ``index`` of ``vid``."""
    return Oid(vid << 32 | index)


def inode_oid(vid: int) -> Oid:
    """The oid of the inode of ``vid``."""
    return Oid(INODE_BIT | vid << 32)


def vmstate_oid(vid: int, n: int) -> Oid:
    """The oid of VM state object ``n`` of ``vid``."""
    return Oid(VMSTATE_BIT | vid << 32 | n)


def attribute_oid(vid: int, attr_id: int) -> Oid:
    """The oid of an attribute. ``vid`` is the hash of the VDI's *name*, so attributes survive snapshots."""
    return Oid(ATTRIBUTE_BIT | vid << 32 | attr_id)


def btree_oid(vid: int, n: int) -> Oid:
    """The oid of B-tree leaf ``n`` of a hypervolume."""
    return Oid(BTREE_BIT | vid << 32 | n)


def ledger_oid(oid: int) -> Oid:
    """The oid of the ledger of a data object."""
    return Oid(LEDGER_BIT | oid)


def ledger_subject(oid: int) -> Oid:
    """The data object that a ledger belongs to."""
    return Oid(oid & ~LEDGER_BIT)


def vid_of(oid: int) -> Vid:
    """The vid part of any oid (for attributes the hash of the name)."""
    return Vid(oid >> 32 & VID_MASK)


def index_of(oid: int) -> int:
    """The low 32 bits: data index, VM state number, attribute id or B-tree node number."""
    return oid & INDEX_MASK


def is_data(oid: int) -> bool:
    """No type bit is set."""
    return not oid & TYPE_BITS


def is_inode(oid: int) -> bool:
    return bool(oid & INODE_BIT)


def is_vmstate(oid: int) -> bool:
    return bool(oid & VMSTATE_BIT)


def is_attribute(oid: int) -> bool:
    return bool(oid & ATTRIBUTE_BIT)


def is_btree(oid: int) -> bool:
    return bool(oid & BTREE_BIT)


def is_ledger(oid: int) -> bool:
    return bool(oid & LEDGER_BIT)


def always_replicated(oid: int) -> bool:
    """Inodes, B-tree nodes and ledgers are whole copies even in erasure-coded VDIs."""
    return bool(oid & REPLICATED_BITS)


def is_sparse(oid: int) -> bool:
    """Inodes and ledgers: zeros in them need no disk space."""
    return bool(oid & SPARSE_BITS)


def object_bytes(oid: int, block_size_shift: int) -> int:
    """Full size of the object in bytes; the shift matters only for data and VM state."""
    if not oid & TYPE_BITS or oid & VMSTATE_BIT:
        return 1 << block_size_shift
    if oid & INODE_BIT:
        return _INODE_BYTES
    if oid & ATTRIBUTE_BIT:
        return _ATTRIBUTE_BYTES
    return _FIXED_BYTES


def format_oid(oid: int) -> str:
    """16 lower-case hex digits, the spelling of file names, logs and dog."""
    return f"{oid:016x}"
