"""Which objects may differ between their holders, as far as this sheep knows.

A change is *settled* when every holder has it. Two parties remember those that are not: the primary, when some holder did
not answer; and every holder, for changes that it applied and has not yet heard to be complete. A primary numbers its
changes and tells, with every request, below which number all are complete (the low-water mark); when the connection
breaks first, the holder marks those objects here.

For each marked object the holder asks the object's present primary to settle it, which copies the primary's own content over
the others: what was acknowledged is on every holder, so any holder's content is a right answer, but all must give the
same one. Until then reads of a marked object go to its primary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TypeAlias

SEQUENCE_MASK = 0xFFFFFFFF

# (sequence number, oid) in the order they were applied
AppliedLog: TypeAlias = deque[tuple[int, int]]


def _before(a: int, b: int) -> bool:
    """Whether sequence number ``a`` comes before ``b``, across the wrap."""
    return 0 < ((b - a) & SEQUENCE_MASK) < 0x80000000


class Unsettled:
    """The marks of one sheep."""

    __slots__ = ("_inflight", "_next", "low_water", "oids")

    def __init__(self) -> None:
        self.oids: dict[int, None] = {}  # ordered, so that settling is deterministic
        self._next = 1
        self._inflight: dict[int, int] = {}
        self.low_water = 1
        """Every change of ours with a smaller number is complete."""

    # ---- as primary

    def begin(self, oid: int) -> int:
        """The number of a new change of ``oid``; never 0, which means "not numbered"."""
        sequence = self._next
        self._next = (sequence + 1) & SEQUENCE_MASK or 1
        self._inflight[sequence] = oid
        return sequence

    def end(self, sequence: int, complete: bool) -> None:
        """The change is over; unless every holder has it, its object is marked."""
        oid = self._inflight.pop(sequence)
        if not complete:
            self.oids[oid] = None
        if sequence == self.low_water:
            self.low_water = next(iter(self._inflight), self._next)

    # ---- as holder

    @staticmethod
    def applied(log: AppliedLog, sequence: int, oid: int, low_water: int) -> None:
        """A change came over the connection that ``log`` belongs to."""
        while log and _before(log[0][0], low_water):
            log.popleft()
        if sequence:
            log.append((sequence, oid))

    def abandon(self, log: Iterable[tuple[int, int]]) -> None:
        """The connection is gone: what it had not told to be complete is marked."""
        for _, oid in log:
            self.oids[oid] = None

    def settled(self, oid: int) -> None:
        """All holders of ``oid`` have the same content."""
        self.oids.pop(oid, None)
