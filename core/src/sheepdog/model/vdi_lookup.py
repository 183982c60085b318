"""From a VDI's name to its number: open addressing with linear probing over 2^24 numbers.

All VDIs of one name stand in a run of used numbers that starts at the hash of the name, mixed with others that
collided; numbers are never given back, so the run never shrinks. The search goes down from the end of the run and
therefore meets the newest member of a name first. The free number behind the run is what the next VDI of that name
gets.

With recycling of vids runs have gaps: every used number is looked at, and the lowest free one is given next.
Docs: data model, section 3.

``lookup`` is a generator so that it can be driven by async and by plain code: it yields the number of each inode it
must see and is sent the header.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from enum import Enum

from sheepdog.errors import RequestError, TagNotFound, VdiNotFound
from sheepdog.model.hashing import vdi_hash
from sheepdog.model.ids import Vid
from sheepdog.model.inode import InodeHeader
from sheepdog.model.limits import VID_MAX
from sheepdog.model.vid_bitmap import VidBitmap

_FULL_VDI = 0x13


class Outcome(Enum):
    """How a lookup ended."""

    FOUND = "found"
    NO_VDI = "no vdi"
    NO_TAG = "no tag"
    FULL = "no number is free"


@dataclass(frozen=True, slots=True)
class LookupResult:
    """What a lookup found.

    :param vid: of the VDI that matched; with NO_VDI the newest snapshot of the name (its working VDI was deleted), or
        0.
    :param header: of ``vid``, ``None`` when that is 0.
    :param free: the number for the next VDI of this name; 0 when none is free.
    :param next_snap_id: the snap_id of the next VDI of this name (of a lookup without tag and snapshot id).
    """

    outcome: Outcome
    vid: int = 0
    header: InodeHeader | None = None
    free: int = 0
    next_snap_id: int = 1

    def found(self) -> tuple[int, InodeHeader]:
        """(vid, header) of what was asked for.

        :raises VdiNotFound: NO_VDI.
        :raises TagNotFound: NO_TAG.
        :raises RequestError: no number is free (FULL_VDI).
        """
        if self.outcome is Outcome.FOUND and self.header is not None:
            return self.vid, self.header
        if self.outcome is Outcome.NO_TAG:
            raise TagNotFound("no snapshot of that tag or id")
        if self.outcome is Outcome.FULL:
            raise RequestError("every vdi number is in use", result=_FULL_VDI)
        raise VdiNotFound("no vdi of that name")


def lookup(
    name: bytes,
    tag: bytes,
    snap_id: int,
    *,
    in_use: VidBitmap,
    deleted: VidBitmap | None = None,
    recycle: bool = False,
) -> Generator[Vid, InodeHeader, LookupResult]:
    """Which VDI a name, tag and snapshot id mean. Yields each vid whose header it must see.

    Without tag and snapshot id the working VDI is meant. With both, either may match. An error thrown into the
    generator ends the lookup, so a header that cannot be read is never taken for "no such VDI".

    :param in_use: numbers ever given to a VDI (with recycling: not given back yet).
    :param deleted: numbers of deleted VDIs.
    :param recycle: the cluster was formatted with recycling of vids.
    """
    candidates: Iterator[int]
    free: int | None
    if recycle:
        free = in_use.first_clear(1)
        candidates = _all_used(in_use, deleted)
    else:
        left = vdi_hash(name) or 1
        free = in_use.first_clear(left)
        if free is not None:
            candidates = iter(range(free - 1, left - 1, -1))
        else:
            free = in_use.first_clear(1)
            if free is not None:
                candidates = iter([*range(free - 1, 0, -1), *range(VID_MAX, left - 1, -1)])
    if free is None:
        return LookupResult(Outcome.FULL)

    wants_snapshot = bool(tag) or snap_id != 0
    wrong_tag = False
    for vid in candidates:
        header = yield Vid(vid)
        if header.name != name:
            continue
        if wants_snapshot:
            if not header.is_snapshot:
                wrong_tag = True
            elif (header.tag and header.tag == tag) or snap_id == header.snap_id:
                return LookupResult(Outcome.FOUND, vid, header, free, header.snap_id + 1)
            continue
        outcome = Outcome.NO_VDI if header.is_snapshot else Outcome.FOUND
        return LookupResult(outcome, vid, header, free, header.snap_id + 1)
    return LookupResult(Outcome.NO_TAG if wrong_tag else Outcome.NO_VDI, free=free)


def _all_used(in_use: VidBitmap, deleted: VidBitmap | None) -> Iterator[int]:
    """Every number in either set, the highest first."""
    if deleted is None:
        return (vid for vid in in_use.descending() if vid)
    either = in_use.copy()
    either.update(deleted)
    return (vid for vid in either.descending() if vid)


def run(steps: Generator[Vid, InodeHeader, LookupResult], read_header: Callable[[Vid], InodeHeader]) -> LookupResult:
    """The result of ``lookup``, with headers read by a plain function."""
    try:
        vid = next(steps)
        while True:
            vid = steps.send(read_header(vid))
    except StopIteration as stop:
        result: LookupResult = stop.value
        return result
