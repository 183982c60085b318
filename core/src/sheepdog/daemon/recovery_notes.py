"""What recovery must remember over a restart of the process: two small files beside the config file.

``recovery.state`` says how far recovery came (see ``Progress``). ``recovery.active`` lists the objects that may differ
between their holders because changes of them were under way, so that after a crash of all holders at once exactly
those are compared. It is a memory map: marking an object is a store into the page cache, which a killed process leaves
behind. Only where answers mean durable data it is flushed, before the data is (``Shards.before_flush``).

Marks lie in two halves. While one takes new marks, the other keeps those of the period before; when a period is over,
the older half is rewritten with the objects of which changes are still under way, and takes the new marks from then on.
So a mark is never gone before its change is over, and no mark has to be removed when a change ends.

The original knows neither file and looks at none but its own.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from struct import Struct

logger = logging.getLogger(__name__)

STATE_FILE = "recovery.state"
ACTIVE_FILE = "recovery.active"
MARKS_MAX = 1 << 16  # per half; far above what can be in flight
_WORD = Struct("<Q")
_HALF_BYTES = 8 * (1 + MARKS_MAX)  # a count and the oids


@dataclass(slots=True)
class Progress:
    """How far recovery came.

    :param ctime: of the cluster that this is about.
    :param gathered: the newest epoch of which every member had all it should have.
    :param retired: every object that does not belong here in an epoch up to this one was set aside.
    :param lossy: up to this epoch something may be missing here that was stored here: a disk went.
    :param disabled: recovery is switched off for the cluster.
    """

    ctime: int = 0
    gathered: int = 0
    retired: int = 0
    lossy: int = 0
    disabled: bool = False


class Notes:
    """Notes that last as long as this value: for gateways, tests and simulations."""

    def __init__(self) -> None:
        self.progress = Progress()
        self._halves: list[dict[int, None]] = [{}, {}]
        self._current = 0

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

    def flush(self) -> None:
        """All marks so far survive power loss. May block, called from worker threads."""

    def close(self) -> None:
        """Nothing is used after this."""


class FileNotes(Notes):
    """Notes in the base directory of a sheep."""

    def __init__(self, base: str) -> None:
        """Reads what an earlier process left; a damaged file is taken for none."""
        super().__init__()
        self._path = os.path.join(base, STATE_FILE)
        self._dirty = False
        self._counts = [0, 0]
        with suppress(FileNotFoundError):
            self._load()
        path = os.path.join(base, ACTIVE_FILE)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
        try:
            os.ftruncate(fd, 2 * _HALF_BYTES)  # sparse: only what was ever marked takes space
            self._map = mmap.mmap(fd, 2 * _HALF_BYTES)
        finally:
            os.close(fd)
        for half in (0, 1):
            (count,) = _WORD.unpack_from(self._map, half * _HALF_BYTES)
            self._counts[half] = min(count, MARKS_MAX)

    def _load(self) -> None:
        with open(self._path, encoding="ascii") as file:
            try:
                found = json.load(file)
                known = {field.name: found[field.name] for field in fields(Progress) if field.name in found}
                if not all(isinstance(value, int) for value in known.values()):
                    raise ValueError("not a number")
                self.progress = Progress(**known)
            except (ValueError, TypeError) as error:
                logger.warning("%s is ignored: %s", self._path, error)

    def save(self) -> None:
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

    def flush(self) -> None:
        if self._dirty:
            self._dirty = False
            self._map.flush()

    def close(self) -> None:
        self._map.close()
