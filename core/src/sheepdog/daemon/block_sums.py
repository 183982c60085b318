"""Checksums of blocks of 4 KiB: the low half of XXH3-64 of each, in arrays. 0 means "not known"."""

from __future__ import annotations

import sys
from array import array
from typing import Final

from xxhash import xxh3_64_digest, xxh3_64_intdigest

from sheepdog.contracts.store import Buffer

BLOCK_BYTES: Final = 4096
PART_BYTES: Final = 1 << 20
INSIDE: Final = BLOCK_BYTES - 1
MASK: Final = 0xFFFFFFFF


def sum_of(block: Buffer) -> int:
    """Of one block, never 0."""
    return xxh3_64_intdigest(block) & MASK or 1


_ZERO_SUM = sum_of(bytes(BLOCK_BYTES))
_SLICES: Final = tuple(slice(begin, begin + BLOCK_BYTES) for begin in range(0, PART_BYTES, BLOCK_BYTES))
MANY: Final = 4  # blocks from which on ``sums_of`` is the quicker way


def sums_of(blocks: memoryview) -> array[int]:
    """Of whole blocks, without a step of the interpreter for each: half as dear. May be 0, so not known, by chance."""
    sums = array("I")
    for begin in range(0, len(blocks), PART_BYTES):
        part = blocks[begin : begin + PART_BYTES]
        raw = b"".join(map(xxh3_64_digest, map(part.__getitem__, _SLICES[: len(part) >> 12])))
        sums.frombytes(memoryview(raw).cast("I")[1::2].tobytes())
    if sys.byteorder == "little":
        sums.byteswap()  # a digest is written as a big-endian number
    return sums


def sums_of_new(data: memoryview, offset: int, size: int) -> array[int]:
    """Of a shard of zeros but for ``data``."""
    sums = array("I", [_ZERO_SUM]) * block_count(size)
    if size & INSIDE:
        sums[-1] = sum_of(bytes(size & INSIDE))
    end = offset + len(data)
    done = range(0)
    if not offset & INSIDE and len(data) >= MANY * BLOCK_BYTES:
        done = range(offset >> 12, end >> 12)
        sums[done.start : done.stop] = sums_of(data[: len(done) << 12])
    for block in touched_blocks(offset, len(data), len(sums)):
        if block in done:
            continue
        begin = block << 12
        stop = min(begin + BLOCK_BYTES, size)
        if begin >= offset and stop <= end:
            sums[block] = sum_of(data[begin - offset : stop - offset])
        else:
            whole = bytearray(stop - begin)
            first, last = max(begin, offset), min(stop, end)
            whole[first - begin : last - begin] = data[first - offset : last - offset]
            sums[block] = sum_of(whole)
    return sums


def block_count(size: int) -> int:
    return (size + INSIDE) >> 12


def touched_blocks(offset: int, length: int, blocks: int) -> range:
    return range(offset >> 12, min((offset + length + INSIDE) >> 12, blocks)) if length else range(0)
