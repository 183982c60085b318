"""What a holder remembers of changes of erasure-coded strips, and how it is written into a journal.

One *record* for each object, of its last change: what the bytes of the strip were before. Beside them, what tells a
complete change from one that died half-way: low-water marks of the primaries that made the changes, and decisions (see
``striped_undo``). The event loop has one memory to answer from. A journal has another one that says what it must keep:
when one of its files is given up, the other begins with a ``snapshot``.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from sheepdog.contracts.store import Buffer, ShardKey, Staged
from sheepdog.model.journal_entry import JournalEntry, JournalKind
from sheepdog.model.node import NodeId

RECORDS_MAX = 1 << 16
RECORD_BYTES_MAX = 64 << 20  # of old strips together; beyond, those of complete changes go first
KEPT_MAX = 1 << 14
MARKS_MAX = 1 << 10  # primaries, one more for each of their starts
NODE_PACKED_BYTES = 40
COUNT_MASK = 0xFFFFFFFF

# number, epoch, start of the primary, its low-water mark, pieces, holders, flags
_RECORD = Struct("<QIIIHBB")
# The entry makes the change as well; the strip is as after it; it was one of whole contents, whose names follow.
_REDO, _WHOLE, _EXCHANGE = 1, 2, 4
_PIECE = Struct("<QI")
_PAIR = Struct("<QQ")
_COUNTS = Struct("<II")

_NAMES = Struct("<QQ")
Pieces = tuple[tuple[int, Buffer], ...]  # (offset, bytes) of one strip


class Record(NamedTuple):
    """What a strip was before one change of its object."""

    number: int
    epoch: int
    start: int  # of the process that made the change: seconds since 1970, or any other count that grows
    key: ShardKey
    pieces: Pieces
    holders: tuple[NodeId, ...]  # all that the change was sent to
    whole: bool = True  # the strip is as after the change; otherwise it may be half-way
    exchange: Staged | None = None  # without pieces: the store keeps what the whole strip was

    @property
    def age(self) -> tuple[int, int, int]:
        """Grows with each change of one object."""
        return self.epoch, self.start, self.number & COUNT_MASK

    @property
    def size_bytes(self) -> int:
        """Bytes of the old strip that are kept."""
        return sum(len(old) for _, old in self.pieces)

    def pack(self, low_water: int, new: Pieces = (), *, redo: bool = False) -> bytes:
        """As the data of a journal entry.

        :param new: what the pieces are after the change, if the entry is to make it as well.
        :param redo: the entry is to make the exchange.
        """
        head = (self.number, self.epoch, self.start, low_water & COUNT_MASK)
        flags = (_REDO if new or redo else 0) | (_WHOLE if self.whole else 0) | (_EXCHANGE if self.exchange else 0)
        return b"".join(
            (
                _RECORD.pack(*head, len(self.pieces), len(self.holders), flags),
                *(_PIECE.pack(offset, len(old)) for offset, old in self.pieces),
                *(node.pack() for node in self.holders),
                b"" if self.exchange is None else _NAMES.pack(self.exchange.new, self.exchange.old),
                *(data for _, data in self.pieces),
                *(data for _, data in new),
            )
        )


def unpack_nodes(data: Buffer, at: int, count: int) -> tuple[NodeId, ...]:
    """``count`` nodes, packed one after the other from ``at`` on."""
    return tuple(
        NodeId.unpack(bytes(data[place : place + NODE_PACKED_BYTES]))
        for place in range(at, at + count * NODE_PACKED_BYTES, NODE_PACKED_BYTES)
    )


class StripChange(NamedTuple):
    """A change of one strip: what undoes it, what the primary says with it, and the new bytes."""

    record: Record
    low_water: int
    pieces: Pieces
    staged: Staged | None = None  # instead of pieces: the new content of the whole strip

    @property
    def size_bytes(self) -> int:
        return sum(len(data) for _, data in self.pieces)

    @classmethod
    def unpack(cls, key: ShardKey, data: Buffer) -> StripChange:
        """What is in the data of a journal entry, which has passed its checksum; new bytes only if they are there."""
        number, epoch, start, low_water, piece_count, holder_count, flags = _RECORD.unpack_from(data)
        at = _RECORD.size
        places = [_PIECE.unpack_from(data, at + index * _PIECE.size) for index in range(piece_count)]
        at += piece_count * _PIECE.size
        holders = unpack_nodes(data, at, holder_count)
        at += holder_count * NODE_PACKED_BYTES
        exchange = None
        if flags & _EXCHANGE:
            exchange = Staged(key, *_NAMES.unpack_from(data, at))
            at += _NAMES.size
        pieces: list[tuple[int, Buffer]] = []
        for offset, length in places * (2 if flags & _REDO else 1):
            pieces.append((offset, bytes(data[at : at + length])))
            at += length
        old, new = tuple(pieces[:piece_count]), tuple(pieces[piece_count:])
        record = Record(number, epoch, start, key, old, holders, bool(flags & (_REDO | _WHOLE)), exchange)
        return cls(record, low_water, new, exchange if flags & _REDO else None)


class StripMemory:
    """Records and what is known to be complete. Not thread-safe."""

    def __init__(self) -> None:
        self.records: dict[int, Record] = {}  # by oid, the change that was noted last at the end
        self.marks: dict[int, int] = {}  # upper half of a number -> every smaller count is complete
        self.kept: dict[int, int] = {}  # oid -> the last change that was decided to stay
        self.freed: list[tuple[ShardKey, int]] | None = None
        """Contents that stores kept for records that are gone, where somebody looks here now and then."""
        self._exchanges: dict[int, None] = {}  # objects whose records are of whole contents
        self._bytes = 0

    def note(self, record: Record, low_water: int) -> None:
        """A change begins, and replaces the one before of the same object, which is complete or decided upon."""
        self.mark(record.number >> 32, low_water)
        before = self.records.get(record.key.oid)
        if before is not None and before.number == record.number:
            # A file of the journal that began while the entry was on its way says it twice.
            self._bytes -= before.size_bytes
        elif before is not None:
            # Whoever has only that one may ask for it when this change was taken back.
            self.keep(record.key.oid, before.number)
        self.records[record.key.oid] = record
        if record.exchange is not None:
            self._exchanges[record.key.oid] = None
        self._bytes += record.size_bytes
        if self._bytes <= RECORD_BYTES_MAX and len(self.records) <= RECORDS_MAX:
            return
        for other in list(self.records.values()):
            if self._bytes <= RECORD_BYTES_MAX // 2 and len(self.records) <= RECORDS_MAX // 2:
                break
            if self.complete(other.key.oid, other.number):
                self.drop(other.key.oid)

    def mark(self, primary: int, low_water: int) -> None:
        """Every change of that primary with a smaller count is complete."""
        before = self.marks.pop(primary, None)  # those that were heard of last come last
        if before is not None and (before - low_water) & COUNT_MASK < 0x80000000:
            low_water = before  # a change that took longer to be noted says less than one after it
        self.marks[primary] = low_water
        if len(self.marks) > MARKS_MAX:
            del self.marks[next(iter(self.marks))]

    def finish(self, key: ShardKey, number: int) -> None:
        """The strip is as after that change."""
        record = self.records.get(key.oid)
        if record is not None and record.key == key and record.number == number:
            self.records[key.oid] = record._replace(whole=True)

    def doubt(self, key: ShardKey, number: int) -> None:
        """The strip is being taken back, so it may be half-way from now on."""
        record = self.records.get(key.oid)
        if record is not None and record.key == key and record.number == number:
            self.records[key.oid] = record._replace(whole=False)

    def drop(self, oid: int) -> None:
        """No change of the object can be taken back."""
        record = self.records.pop(oid, None)
        if record is not None:
            self._bytes -= record.size_bytes
            if record.exchange is not None:
                del self._exchanges[oid]
                if self.freed is not None:
                    self.freed.append((record.key, record.exchange.old))

    def drop_complete_exchanges(self) -> None:
        """Nothing is kept for changes that are known to be complete."""
        for oid in list(self._exchanges):
            if self.complete(oid, self.records[oid].number):
                self.drop(oid)

    def keep(self, oid: int, number: int) -> None:
        """The change stays, and so does the one that is on record of that object."""
        self.drop(oid)
        self.kept.pop(oid, None)
        if len(self.kept) >= KEPT_MAX:
            del self.kept[next(iter(self.kept))]
        self.kept[oid] = number

    def complete(self, oid: int, number: int) -> bool:
        """The change is known to be complete, or was decided to stay."""
        if self.kept.get(oid) == number:
            return True
        mark = self.marks.get(number >> 32)
        return mark is not None and 0 < ((mark - number) & COUNT_MASK) < 0x80000000

    # ---- in a journal

    def take(self, entry: JournalEntry) -> None:
        """What an entry of a journal says, in the order of the entries."""
        if entry.kind is JournalKind.UNDO:
            change = StripChange.unpack(ShardKey(entry.oid, entry.index), entry.data)
            self.note(change.record, change.low_water)
        elif entry.kind is JournalKind.DONE:
            noted = self.doubt if entry.create else self.finish
            noted(ShardKey(entry.oid, entry.index), entry.offset)
        elif entry.kind is JournalKind.DROPPED:
            self.drop(entry.oid)
        elif entry.kind is JournalKind.STRIPS:
            marks, kept = _COUNTS.unpack_from(entry.data)
            pairs = list(_PAIR.iter_unpack(entry.data[_COUNTS.size : _COUNTS.size + (marks + kept) * _PAIR.size]))
            for primary, low_water in pairs[:marks]:
                self.mark(primary, low_water)
            for oid, number in pairs[marks:]:
                self.keep(oid, number)

    def snapshot(self) -> Iterator[tuple[JournalKind, ShardKey, bytes]]:
        """Entries that say all of this again. Records of complete changes are given up first."""
        for record in list(self.records.values()):
            if self.complete(record.key.oid, record.number):
                self.drop(record.key.oid)
        if self.marks or self.kept:
            yield JournalKind.STRIPS, ShardKey(0), pack_known(self.marks, self.kept)
        for record in self.records.values():
            yield JournalKind.UNDO, record.key, record.pack(self.marks.get(record.number >> 32, 0))

    def copy(self) -> StripMemory:
        """Another memory of the same things."""
        made = StripMemory()
        made.records, made.marks, made.kept = dict(self.records), dict(self.marks), dict(self.kept)
        made._bytes, made._exchanges = self._bytes, dict(self._exchanges)
        return made


def pack_known(marks: dict[int, int], kept: dict[int, int]) -> bytes:
    """Data of an entry that tells marks and decisions."""
    return _COUNTS.pack(len(marks), len(kept)) + b"".join(
        _PAIR.pack(*pair) for pairs in (marks, kept) for pair in pairs.items()
    )
