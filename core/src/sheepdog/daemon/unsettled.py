"""Which objects may differ between their holders, as far as this sheep knows.

A change is *settled* when every holder has it. Two parties remember those that are not: the primary, when some holder
did not answer; and every holder, for changes that it applied and has not yet heard to be complete. A primary numbers
its changes and tells, with every request, below which number all are complete (the low-water mark); when the
connection breaks first, or the primary leaves the cluster, the holder marks those objects here.

For each marked object the holder asks the object's present primary to settle it, which copies the primary's own
content over the others: what was acknowledged is on every holder, so any holder's content is a right answer, but all
must give the same one. Until then reads of a marked object go to its primary.

When all holders are killed at once, nobody is left who remembers. So every object of which changes are under way is
noted on disk as well (``recovery_notes``), and after such an end the noted objects are marked again. Since nobody knows
yet what the others have noted, the sheep is *cautious* at first: it treats every object as marked, until all members
have settled what they found.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TypeAlias

from sheepdog.daemon.recovery_notes import Notes

SEQUENCE_MASK = 0xFFFFFFFF
HALF = 0x80000000  # of two numbers the one less than this behind the other is the older, across the wrap
LOG_MAX = 1 << 14  # per connection; what does not fit is settled without need

# (sequence number, oid) in the order they were applied
AppliedLog: TypeAlias = deque[tuple[int, int]]


class _EveryObject(dict[int, None]):
    """Marks of a cautious sheep: contains every object, though only the real marks are counted and listed."""

    def __contains__(self, oid: object) -> bool:
        return True


class Unsettled:
    """The marks of one sheep."""

    __slots__ = ("_incomplete", "_inflight", "_next", "_noted", "_notes", "hopeless", "low_water", "oids")

    def __init__(self, notes: Notes | None = None) -> None:
        """:param notes: where the objects with changes under way are noted."""
        self.oids: dict[int, None] = {}  # ordered, so that settling is deterministic
        self._next = 1
        self._inflight: dict[int, int] = {}  # in the order of their numbers; with those that ended incomplete
        self._incomplete: dict[int, list[int]] = {}  # oid -> numbers of changes that ended so; until it is settled
        self._notes = notes if notes is not None else Notes()
        self._noted: set[int] = set()  # in the present period
        self.low_water = 1
        """Every change of ours with a smaller number is complete."""
        self.hopeless: set[int] = set()
        """Marked objects that cannot be settled with the present members."""

    # ---- as primary

    def begin(self, oid: int) -> int:
        """The number of a new change of ``oid``; never 0, which means "not numbered"."""
        if oid not in self._noted:
            self._note(oid)
        sequence = self._next
        self._next = (sequence + 1) & SEQUENCE_MASK or 1
        self._inflight[sequence] = oid
        return sequence

    def end(self, sequence: int, complete: bool) -> None:
        """The change is over; unless every holder has it, its object is marked."""
        if not complete:
            # The holders go on remembering it as well: should we die before it is settled, nobody else could tell.
            oid = self._inflight[sequence]
            self.oids[oid] = None
            self._incomplete.setdefault(oid, []).append(sequence)
            return
        del self._inflight[sequence]
        if sequence == self.low_water:
            self.low_water = next(iter(self._inflight), self._next)

    @property
    def in_flight(self) -> int:
        """Changes that are under way, or ended incomplete and are not settled."""
        return len(self._inflight)

    def _release(self, oid: int) -> None:
        """Changes of ``oid`` that ended incomplete are not to be remembered by the holders any more."""
        for sequence in self._incomplete.pop(oid, ()):
            del self._inflight[sequence]
        self.low_water = next(iter(self._inflight), self._next)

    # ---- as holder

    def applied(self, log: AppliedLog, sequence: int, oid: int, low_water: int) -> None:
        """A change comes over the connection that ``log`` belongs to. Called before it is applied."""
        while log and 0 < (low_water - log[0][0]) & SEQUENCE_MASK < HALF:
            log.popleft()
        if sequence:
            if oid not in self._noted:
                self._note(oid)
            log.append((sequence, oid))
            if len(log) > LOG_MAX:
                self.oids[log.popleft()[1]] = None

    def abandon(self, log: Iterable[tuple[int, int]]) -> None:
        """The connection is gone: what it had not told to be complete is marked."""
        for _, oid in log:
            self.oids[oid] = None

    def settled(self, oid: int) -> None:
        """All holders of ``oid`` have the same content."""
        self.oids.pop(oid, None)
        self.hopeless.discard(oid)
        if oid in self._incomplete:
            self._release(oid)

    def forget(self) -> None:
        """No object is marked any more; there are none (format)."""
        self.oids = {}
        self.hopeless.clear()
        for oid in list(self._incomplete):
            self._release(oid)

    def postpone(self, oid: int) -> bool:
        """The object, if it is marked, comes last: one that cannot be settled now does not keep others waiting."""
        if self.oids.pop(oid, self) is self:
            return False
        self.oids[oid] = None
        return True

    # ---- over a crash

    def _note(self, oid: int) -> None:
        self._noted.add(oid)
        self._notes.mark(oid)

    def turn(self, logs: Iterable[AppliedLog]) -> None:
        """A new period of notes begins: what was noted before the last one is forgotten, unless it is under way.

        :param logs: of all connections.
        """
        for oid in [oid for oid in self._incomplete if oid in self.hopeless]:
            self._release(oid)  # this may take long; our own notes have it
        active = {*self._inflight.values(), *self.oids}
        for log in logs:
            active.update(oid for _, oid in log)
        self._noted = active
        self._notes.turn(sorted(active))

    def be_cautious(self, marked: Iterable[int]) -> None:
        """Every object counts as marked until ``trust``; ``marked`` are to be settled."""
        self.oids = _EveryObject(self.oids)
        for oid in marked:
            self.oids[oid] = None

    def trust(self) -> None:
        """Only marked objects may differ."""
        if self.cautious:
            self.oids = dict(self.oids)

    @property
    def cautious(self) -> bool:
        return type(self.oids) is _EveryObject
