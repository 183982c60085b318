"""Every number that bounds something (docs: data model, section 12)."""

from __future__ import annotations

from typing import Final

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB
TiB: Final = 1024 * GiB
PiB: Final = 1024 * TiB

VID_BITS: Final = 24
VIDS: Final = 1 << VID_BITS  # numbers; 0 is never given to a VDI
VID_MAX: Final = VIDS - 1
VDI_BITMAP_BYTES: Final = VIDS // 8

NAME_BYTES_MAX: Final = 255  # of a VDI name, a tag and an attribute key, without the NUL
ATTRIBUTE_VALUE_BYTES_MAX: Final = 64 * KiB

BLOCK_SIZE_SHIFT_DEFAULT: Final = 22
BLOCK_SIZE_SHIFT_MIN: Final = 20
BLOCK_SIZE_SHIFT_MAX: Final = 31

FLAT_OBJECTS_MAX: Final = 1 << 20
HYPERVOLUME_SHIFT: Final = 22  # the only object size that a hypervolume can have
HYPERVOLUME_BYTES_MAX: Final = 16 * PiB

COPIES_DEFAULT: Final = 3
COPIES_MAX: Final = 31
DATA_STRIPS: Final = (2, 4, 8, 16)
PARITY_STRIPS_MAX: Final = 15

PARTICIPANTS_MAX: Final = 31  # of a shared lock
NODES_MAX: Final = 6144
NODES_WITH_DISKS_MAX: Final = 830  # where vnodes belong to disks
NODE_DISKS_MAX: Final = 32  # that a node announces there
DISKS_MAX: Final = 64  # that md info can report
GENERATION_MAX: Final = (1 << 20) - 2
LEDGER_COUNTERS: Final = 1 << 20

PORT_DEFAULT: Final = 7000


def flat_bytes_max(block_size_shift: int) -> int:
    """The largest size of a VDI with a flat map, in bytes."""
    return FLAT_OBJECTS_MAX << block_size_shift
