"""Entries of the journal: one per object write, create or remove, on 512-byte boundaries.

An entry is a 508-byte head, the data, zeros, and an end marker that tells a whole entry from one that was cut by a
crash. Layout: docs, on-disk layout, section 6. The original leaves bytes 33 to 507 of the head zero and does not look
at them when it replays; entries of ours use 27 of them, so that strips find their file, new files get their size, the
halves of a journal know their order, and torn data and what is left of a former use of the file are noticed:

======  ====  =========================================================
offset  size  field
======  ====  =========================================================
33      1     0: original entry; 1: the fields below are filled
34      2     strip number + 1; 0 for a whole copy
36      4     CRC-32 of the head (with this field zero) and of the data
40      8     size of the shard that is made; 0: not stated
48      8     number of the entry, growing through both files; 0: none
56      4     which use of the file it is of: all entries in use have the same
======  ====  =========================================================
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import NamedTuple

from sheepdog.errors import ProtocolError

Buffer = bytes | bytearray | memoryview

MAGIC = 0xFEE1900D
END_MARKER = 0xDEADBEEF
UNIT_BYTES = 512
HEAD_BYTES = 508
REPLICA = -1  # index of a whole copy

# magic, kind, oid, offset, size, create, form, strip, crc, shard size, number, use
_HEAD = Struct("<IH2xQQQBBHIQQI448x")
_MARKER = Struct("<I")
_CRC = Struct("<I")
_CRC_OFFSET = 36
_MAGIC_BYTES = MAGIC.to_bytes(4, "little")
_FORM_ORIGINAL = 0
_FORM_CHECKED = 1


class JournalKind(IntEnum):
    """What an entry does to its object."""

    STORE = 0
    REMOVE = 2
    FORGET = 4  # ours: what was journaled of this shard before must not be replayed (it is on the disk, or set aside)
    UNDO = 5  # ours: what a strip was before a change, and perhaps what it is after it (daemon/strip_memory)
    DONE = 8  # ours: the strip is as after the change with the number in ``offset``
    STRIPS = 6  # ours: which changes of strips are complete
    DROPPED = 7  # ours: the change of the strip that is on record cannot be taken back any more


_KINDS = frozenset(JournalKind)


def entry_bytes(data_bytes: int) -> int:
    """Length of an entry that carries so many bytes of data."""
    return UNIT_BYTES + (data_bytes + UNIT_BYTES - 1) // UNIT_BYTES * UNIT_BYTES


@dataclass(slots=True)  # not frozen, which would triple the time it takes to make one for each small write
class JournalEntry:
    """One change of one shard. Nobody changes it.

    :param offset: bytes from the shard's begin.
    :param create: the shard is made by this entry.
    :param index: strip number, or ``REPLICA`` for a whole copy.
    :param checked: carry what is ours (strip number, checksum, and the rest); False makes the original's form.
    :param size_bytes: of the shard that is made, 0 where it is not stated.
    :param number: of the entry, growing through both files of a journal.
    :param use: of the file, as it was read.
    """

    kind: JournalKind
    oid: int
    offset: int = 0
    data: Buffer = b""
    create: bool = False
    index: int = REPLICA
    checked: bool = True
    size_bytes: int = 0
    number: int = 0
    use: int = 0

    def __len__(self) -> int:
        """Bytes of the packed entry."""
        return entry_bytes(len(self.data))

    def pack_around(self, use: int = 0) -> tuple[Buffer, Buffer]:
        """What stands before the data and behind it, so that the data need not be copied.

        :param use: of the file that it goes to.
        """
        size = len(self.data)
        behind = _MARKER.pack(END_MARKER).rjust(entry_bytes(size) - HEAD_BYTES - size, b"\0")
        fields = (MAGIC, self.kind, self.oid, self.offset, size, self.create)
        if not self.checked:
            return _HEAD.pack(*fields, _FORM_ORIGINAL, 0, 0, 0, 0, 0), behind
        head = bytearray(_HEAD.pack(*fields, _FORM_CHECKED, self.index + 1, 0, self.size_bytes, self.number, use))
        _CRC.pack_into(head, _CRC_OFFSET, zlib.crc32(self.data, zlib.crc32(head)))
        return head, behind

    def pack(self, use: int = 0) -> bytes:
        """The whole entry."""
        before, behind = self.pack_around(use)
        return b"".join((before, self.data, behind))

    @classmethod
    def unpack(cls, buffer: Buffer, offset: int = 0) -> JournalEntry:
        """The entry at ``offset``; its data is a view of the buffer.

        :raises ProtocolError: no entry, one that was cut short, or one whose checksum is wrong.
        """
        view = memoryview(buffer)[offset:]
        if len(view) < UNIT_BYTES:
            raise ProtocolError(f"a journal entry has at least {UNIT_BYTES} bytes, {len(view)} are left")
        magic, kind, oid, start, size, create, form, strip, crc, shard_bytes, number, use = _HEAD.unpack_from(view)
        length = entry_bytes(size)
        if magic != MAGIC or kind not in _KINDS or length > len(view):
            raise ProtocolError(f"no journal entry at {offset}")
        if _MARKER.unpack_from(view, length - _MARKER.size)[0] != END_MARKER:
            raise ProtocolError(f"the journal entry at {offset} was cut short")
        data = view[HEAD_BYTES : HEAD_BYTES + size]
        checked = form == _FORM_CHECKED
        if checked:
            head = bytearray(view[:HEAD_BYTES])
            head[_CRC_OFFSET : _CRC_OFFSET + 4] = bytes(4)
            if zlib.crc32(data, zlib.crc32(head)) != crc:
                raise ProtocolError(f"the journal entry at {offset} has a wrong checksum")
        if not checked:
            return cls(JournalKind(kind), oid, start, data, bool(create), checked=False)
        return cls(JournalKind(kind), oid, start, data, bool(create), strip - 1, True, shard_bytes, number, use)


class PlacedEntry(NamedTuple):
    """An entry and where in its file it begins."""

    at: int
    entry: JournalEntry


def scan(journal: Buffer) -> Iterator[PlacedEntry]:
    """Every whole entry of a journal file (or of a map of one), in order.

    Goes on unit by unit over whatever is no entry: an entry that was cut short is skipped, not the ones behind it.
    """
    view = memoryview(journal)
    at = 0
    while at + UNIT_BYTES <= len(view):
        if view[at : at + 4] == _MAGIC_BYTES:
            try:
                entry = JournalEntry.unpack(view, at)
            except ProtocolError:
                pass
            else:
                yield PlacedEntry(at, entry)
                at += len(entry)
                continue
        at += UNIT_BYTES
