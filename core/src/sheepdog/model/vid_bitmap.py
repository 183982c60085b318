"""A set of vids, in the form that READ_VDIS sends: 2^24 bits, vid n at bit n mod 8 of byte n div 8."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from sheepdog.errors import ProtocolError
from sheepdog.model.ids import Vid
from sheepdog.model.limits import VDI_BITMAP_BYTES, VID_MAX, VIDS

Buffer = bytes | bytearray | memoryview

_NOT_FULL = re.compile(rb"[^\xff]", re.DOTALL)
_NOT_EMPTY = re.compile(rb"[^\0]", re.DOTALL)
_CHUNK_BYTES = 4096


class VidBitmap:
    """A mutable set of numbers from 0 to 2^24 - 1. Searches run over bytes, not bits."""

    __slots__ = ("_bits",)

    def __init__(self, vids: Iterable[int] = ()) -> None:
        self._bits = bytearray(VDI_BITMAP_BYTES)
        for vid in vids:
            self.add(vid)

    def add(self, vid: int) -> None:
        """``vid`` is in the set."""
        self._bits[vid >> 3] |= 1 << (vid & 7)

    def discard(self, vid: int) -> None:
        """``vid`` is not in the set."""
        self._bits[vid >> 3] &= ~(1 << (vid & 7))

    def clear(self) -> None:
        """The set is empty."""
        self._bits = bytearray(VDI_BITMAP_BYTES)

    def __contains__(self, vid: int) -> bool:
        return bool(self._bits[vid >> 3] >> (vid & 7) & 1)

    def __iter__(self) -> Iterator[Vid]:
        """All members, ascending."""
        bits = self._bits
        match = _NOT_EMPTY.search(bits)
        while match is not None:
            byte = match.start()
            yield from self._members(byte)
            match = _NOT_EMPTY.search(bits, byte + 1)

    def descending(self) -> Iterator[Vid]:
        """All members, the highest first."""
        for start in range(VDI_BITMAP_BYTES - _CHUNK_BYTES, -1, -_CHUNK_BYTES):
            chunk = self._bits[start : start + _CHUNK_BYTES]
            if any(chunk):
                for byte in range(start + _CHUNK_BYTES - 1, start - 1, -1):
                    if self._bits[byte]:
                        yield from reversed(self._members(byte))

    def _members(self, byte: int) -> list[Vid]:
        value = self._bits[byte]
        return [Vid(byte << 3 | bit) for bit in range(8) if value >> bit & 1]

    def __len__(self) -> int:
        return int.from_bytes(self._bits, "little").bit_count()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VidBitmap) and self._bits == other._bits

    __hash__ = None  # type: ignore[assignment]  # mutable

    def first_clear(self, start: int) -> Vid | None:
        """The lowest number from ``start`` on that is not in the set; ``None`` when all are."""
        vid = start
        while vid < VIDS and vid & 7:
            if vid not in self:
                return Vid(vid)
            vid += 1
        match = _NOT_FULL.search(self._bits, vid >> 3)
        if match is None:
            return None
        byte = match.start()
        value = self._bits[byte]
        return Vid(byte << 3 | next(bit for bit in range(8) if not value >> bit & 1))

    def update(self, other: VidBitmap) -> None:
        """Members of ``other`` are members of this, too."""
        merged = int.from_bytes(self._bits, "little") | int.from_bytes(other._bits, "little")
        self._bits = bytearray(merged.to_bytes(VDI_BITMAP_BYTES, "little"))

    def copy(self) -> VidBitmap:
        """An independent set with the same members."""
        twin = VidBitmap()
        twin._bits[:] = self._bits
        return twin

    def pack(self) -> bytes:
        """2097152 bytes."""
        return bytes(self._bits)

    @classmethod
    def unpack(cls, buffer: Buffer) -> VidBitmap:
        """From a READ_VDIS reply.

        :raises ProtocolError: any other length than 2097152.
        """
        if len(buffer) != VDI_BITMAP_BYTES:
            raise ProtocolError(f"a vid bitmap has {VDI_BITMAP_BYTES} bytes, not {len(buffer)}")
        made = cls()
        made._bits[:] = buffer
        return made

    def __repr__(self) -> str:
        return f"VidBitmap({len(self)} of {VID_MAX})"
