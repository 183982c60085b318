"""What recovery must remember over a restart of the process: three small files beside the config file.

``recovery.state`` says how far recovery came (see ``Progress``). ``recovery.active`` lists the objects that may differ
between their holders because changes of them were under way, so that after a crash of all holders at once exactly
those are compared. It is a memory map: marking an object is a store into the page cache, which a killed process leaves
behind. Only where answers mean durable data it is flushed, before the data is (``Shards.before_flush``).

Marks lie in two halves. While one takes new marks, the other keeps those of the period before; when a period is over,
the older half is rewritten with the objects of which changes are still under way, and takes the new marks from then on.
So a mark is never gone before its change is over, and no mark has to be removed when a change ends.

``recovery.removed``, a memory map as well, lists the objects that were removed since everything was gathered last:
somebody who was away may still have them, and they must not come back with him. When everything is gathered it is
emptied.

The original knows none of these files and looks at none but its own.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from struct import Struct

logger = logging.getLogger(__name__)

STATE_FILE = "recovery.state"
ACTIVE_FILE = "recovery.active"
MARKS_MAX = 1 << 16  # per half; far above what can be in flight
REMOVED_FILE = "recovery.removed"
REMOVALS_MAX = 1 << 20  # entries; half as many are noted at once, the rest is for changes
_WORD = Struct("<Q")
_REMOVAL = Struct("<QQ")  # oid; the epoch it was removed in, 0: it was made again
_REMOVED_BYTES = _REMOVAL.size * (1 + REMOVALS_MAX)  # a count and what it counts
_HALF_BYTES = 8 * (1 + MARKS_MAX)  # a count and the oids


@dataclass(slots=True)
class Progress:
    """How far recovery came.

    :param ctime: of the cluster that this is about.
    :param gathered: the newest epoch of which every member had all it should have.
    :param retired: every object that does not belong here in an epoch up to this one was set aside.
    :param lossy: up to this epoch something may be missing here that was stored here: a disk went.
    :param disabled: recovery is switched off for the cluster.
    :param disks: the directories that objects were stored in: without one of them, something may be missing.
    """

    ctime: int = 0
    gathered: int = 0
    retired: int = 0
    lossy: int = 0
    disabled: bool = False
    disks: list[str] = field(default_factory=list)


class Notes:
    """Notes that last as long as this value: for gateways, tests and simulations."""

    def __init__(self) -> None:
        self.progress = Progress()
        self._halves: list[dict[int, None]] = [{}, {}]
        self._current = 0
        self.removed: dict[int, int] = {}
        """oid -> the epoch it was removed in, since everything was gathered last."""

    def save(self) -> None:
        """``progress`` survives the process. May block."""

    def recall(self) -> list[int]:
        """The objects that were marked when the process ended, ascending."""
        return sorted({*self._halves[0], *self._halves[1]})

    def mark(self, oid: int) -> None:
        """Changes of ``oid`` begin. Called once per object and period; must not block."""
        self._halves[self._current][oid] = None

    def turn(self, active: Iterable[int]) -> None:
        """A new period begins; changes of ``active`` are still under way."""
        self._current ^= 1
        self._halves[self._current] = dict.fromkeys(active)

    def note_removal(self, oid: int, epoch: int) -> None:
        """The object is about to be removed. Must not block."""
        self.removed[oid] = epoch

    def forget_removal(self, oid: int) -> None:
        """The object is made again. Must not block."""
        self.removed.pop(oid, None)

    def forget_removals(self) -> None:
        """Nobody has anything of what was removed any more. Must not block."""
        self.removed = {}

    def flush(self) -> None:
        """All marks and removals so far survive power loss. May block, called from worker threads."""

    def close(self) -> None:
        """Nothing is used after this."""


class FileNotes(Notes):
    """Notes in the base directory of a sheep."""

    def __init__(self, base: str) -> None:
        """Reads what an earlier process left; a damaged file is taken for none."""
        super().__init__()
        self._path = os.path.join(base, STATE_FILE)
        self._dirty = self._removed_dirty = False
        self._saving = threading.Lock()
        self._counts = [0, 0]
        with suppress(FileNotFoundError):
            self._load()
        self._map = _map(os.path.join(base, ACTIVE_FILE), 2 * _HALF_BYTES)
        self._removed_map = _map(os.path.join(base, REMOVED_FILE), _REMOVED_BYTES)
        self._removals = min(_WORD.unpack_from(self._removed_map, 0)[0], REMOVALS_MAX)
        for oid, epoch in _REMOVAL.iter_unpack(self._removed_map[_REMOVAL.size : _REMOVAL.size * (1 + self._removals)]):
            if epoch:
                self.removed[oid] = epoch
            else:
                self.removed.pop(oid, None)
        for half in (0, 1):
            (count,) = _WORD.unpack_from(self._map, half * _HALF_BYTES)
            self._counts[half] = min(count, MARKS_MAX)

    def _load(self) -> None:
        with open(self._path, encoding="ascii") as file:
            try:
                found = json.load(file)
                known = {row.name: found[row.name] for row in fields(Progress) if row.name in found}
                disks = known.pop("disks", [])
                if not all(isinstance(value, int) for value in known.values()):
                    raise ValueError("not a number")
                if not (isinstance(disks, list) and all(isinstance(path, str) for path in disks)):
                    raise ValueError("not a list of disks")
                self.progress = Progress(**known, disks=disks)
            except (ValueError, TypeError) as error:
                logger.warning("%s is ignored: %s", self._path, error)

    def save(self) -> None:
        # Two threads may be here at once; what is older must not come last.
        with self._saving:
            self._save()

    def _save(self) -> None:
        temporary = f"{self._path}.tmp"
        try:
            with open(temporary, "w", encoding="ascii") as file:
                json.dump(asdict(self.progress), file)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, self._path)
        except OSError as error:
            # Without it a later start searches more and trusts less, nothing else.
            logger.error("cannot write %s: %s", self._path, error.strerror)

    def recall(self) -> list[int]:
        found: set[int] = set()
        for half in (0, 1):
            start = half * _HALF_BYTES + 8
            words = self._map[start : start + 8 * self._counts[half]]
            found.update(oid for (oid,) in _WORD.iter_unpack(words))
        return sorted(found)

    def mark(self, oid: int) -> None:
        half = self._current
        count = self._counts[half]
        if count == MARKS_MAX:
            logger.error("more than %d objects change at once, oid=%016x is not marked", MARKS_MAX, oid)
            return
        at = half * _HALF_BYTES
        # The count last: a process that is killed in between leaves a list that is whole.
        _WORD.pack_into(self._map, at + 8 + 8 * count, oid)
        _WORD.pack_into(self._map, at, count + 1)
        self._counts[half] = count + 1
        self._dirty = True

    def turn(self, active: Iterable[int]) -> None:
        self._current = half = self._current ^ 1
        oids = list(active)[:MARKS_MAX]
        if not oids and not self._counts[half]:
            return
        at = half * _HALF_BYTES
        _WORD.pack_into(self._map, at, 0)
        self._map[at + 8 : at + 8 + 8 * len(oids)] = b"".join(map(_WORD.pack, oids))
        _WORD.pack_into(self._map, at, len(oids))
        self._counts[half] = len(oids)
        self._dirty = True

    def note_removal(self, oid: int, epoch: int) -> None:
        super().note_removal(oid, epoch)
        self._append(oid, epoch)

    def forget_removal(self, oid: int) -> None:
        if self.removed.pop(oid, None) is not None:
            self._append(oid, 0)

    def forget_removals(self) -> None:
        super().forget_removals()
        if self._removals:
            self._removals = 0
            _WORD.pack_into(self._removed_map, 0, 0)
            self._removed_dirty = True

    def _append(self, oid: int, epoch: int) -> None:
        if self._removals == REMOVALS_MAX:
            if epoch and len(self.removed) > REMOVALS_MAX // 2:
                logger.error("more than %d objects were removed, oid=%016x is not noted", REMOVALS_MAX // 2, oid)
                return
            self._compact()
        else:
            _REMOVAL.pack_into(self._removed_map, _REMOVAL.size * (1 + self._removals), oid, epoch)
            self._removals += 1
            # The count last: a process that is killed in between leaves a list that is whole.
            _WORD.pack_into(self._removed_map, 0, self._removals)
        self._removed_dirty = True

    def _compact(self) -> None:
        """The list says each thing once."""
        # From the front, under the old count: an entry that is overwritten was repeated before it already, or was
        # superseded by a later one. So a process that is killed in the middle leaves a list that says the same.
        entries = list(islice(self.removed.items(), REMOVALS_MAX // 2))
        packed = b"".join(_REMOVAL.pack(oid, epoch) for oid, epoch in entries)
        self._removed_map[_REMOVAL.size : _REMOVAL.size + len(packed)] = packed
        self._removals = len(entries)
        _WORD.pack_into(self._removed_map, 0, self._removals)

    def flush(self) -> None:
        if self._dirty:
            self._dirty = False
            self._map.flush()
        if self._removed_dirty:
            self._removed_dirty = False
            self._removed_map.flush()

    def close(self) -> None:
        self._map.close()
        self._removed_map.close()


def _map(path: str, length: int) -> mmap.mmap:
    """The file, made if there is none. It is sparse: only what was ever noted takes space."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
    try:
        os.ftruncate(fd, length)
        return mmap.mmap(fd, length)
    finally:
        os.close(fd)
