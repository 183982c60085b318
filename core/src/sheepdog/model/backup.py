"""The stream of ``dog vdi backup``: what differs between two snapshots of a VDI.

A header, then one record per data object that differs (the differing part, trimmed at both ends to 512-byte sectors),
then an end record. Layout: docs, on-disk layout, section 10.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from struct import Struct

from sheepdog.errors import ProtocolError
from sheepdog.model.limits import BLOCK_SIZE_SHIFT_MAX

Buffer = bytes | bytearray | memoryview

VERSION = 1
MAGIC = 0x11921192
SECTOR_BYTES = 512
END_INDEX = 0xFFFFFFFF

_HEADER = Struct("<II")
_RECORD = Struct("<IIII")


@dataclass(frozen=True, slots=True)
class BackupRecord:
    """The new content of a part of one data object.

    :param index: of the data object, below 2^32 - 1.
    :param offset: bytes from the object's begin.
    """

    index: int
    offset: int
    data: Buffer


def difference(old: Buffer, new: Buffer) -> tuple[int, int] | None:
    """(offset, length) of the smallest run of whole sectors outside which both are equal; ``None`` when they are equal.

    Both have the same length, a multiple of 512.
    """
    assert len(old) == len(new), f"objects of {len(old)} and {len(new)} bytes"
    assert len(new) % SECTOR_BYTES == 0, f"an object of {len(new)} bytes"
    left, right = memoryview(old), memoryview(new)
    if left == right:
        return None
    first = _equal_bytes(left, right, from_end=False) // SECTOR_BYTES * SECTOR_BYTES
    last = len(new) - _equal_bytes(left, right, from_end=True) // SECTOR_BYTES * SECTOR_BYTES
    return first, last - first


def _equal_bytes(left: memoryview, right: memoryview, *, from_end: bool) -> int:
    """How many bytes are equal before the first difference (or behind the last), found by halving the range.

    Invariant: everything in the first ``low`` bytes is equal, the first ``high`` bytes are not.
    """
    total = len(left)
    low, high = 0, total
    while high - low > 1:
        middle = (low + high) // 2
        here = slice(total - middle, total - low) if from_end else slice(low, middle)
        if left[here] == right[here]:
            low = middle
        else:
            high = middle
    return low


def pack_header() -> bytes:
    """The eight bytes that every stream begins with."""
    return _HEADER.pack(VERSION, MAGIC)


def pack_record_head(index: int, offset: int, length: int) -> bytes:
    """The 16 bytes before the data of a record."""
    return _RECORD.pack(index, offset, length, 0)


def pack_end() -> bytes:
    """The record that ends a stream."""
    return _RECORD.pack(END_INDEX, 0, 0, 0)


def write_backup(records: Iterable[BackupRecord]) -> Iterator[Buffer]:
    """The pieces of a whole stream, in order; record data is passed on without a copy."""
    yield pack_header()
    for record in records:
        yield pack_record_head(record.index, record.offset, len(record.data))
        yield record.data
    yield pack_end()


def read_backup(read: Callable[[int], bytes]) -> Iterator[BackupRecord]:
    """The records of a stream, each read when it is asked for.

    :param read: returns as many bytes as asked for, fewer only at the end of the stream (as a buffered file does).
    :raises ProtocolError: not such a stream, another version, cut short, or a record that fits no object.
    """
    version, magic = _HEADER.unpack(_exactly(read, _HEADER.size))
    if magic != MAGIC:
        raise ProtocolError(f"not a backup: magic 0x{magic:08x}")
    if version != VERSION:
        raise ProtocolError(f"a backup of version {version}, not {VERSION}")
    while True:
        index, offset, length, _ = _RECORD.unpack(_exactly(read, _RECORD.size))
        if index == END_INDEX:
            return
        if offset + length > 1 << BLOCK_SIZE_SHIFT_MAX:
            raise ProtocolError(f"a backup record of {length} bytes at {offset} fits no object")
        yield BackupRecord(index, offset, _exactly(read, length))


def _exactly(read: Callable[[int], bytes], count: int) -> bytes:
    data = read(count)
    if len(data) != count:
        raise ProtocolError(f"the backup ends early: {count} bytes expected, {len(data)} there")
    return data
