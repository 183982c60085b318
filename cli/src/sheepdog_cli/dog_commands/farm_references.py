"""References of loaded snapshots.

A saved inode carries the reference counts of the cluster that it came from, where others (working vdis, snapshots that
are gone or that are not loaded) had references, too, and where ledgers told of those already dropped. Nothing of that
exists in the cluster that is loaded into: with those counts an object would outlive everybody who can see it. So the
counts are made new: of all loaded inodes that name an object one is its maker (generation 0, with as many copies of
the reference as there are others) and the others have copies (generation 1, from which nobody copied).

An object whose maker was deleted before, or is not loaded, gets the first that names it as its maker, and the number
that goes with that: otherwise nobody could free it.
"""

from __future__ import annotations

from collections import Counter

from sheepdog.model.ids import data_oid, index_of, is_data, vid_of
from sheepdog.model.inode import REFS_OFFSET, InodeHeader, allocated, map_view, refs_view


class LoadedReferences:
    """Learns who names what among the inodes that are loaded, then gives each its map and its pairs."""

    def __init__(self) -> None:
        self._named: Counter[int] = Counter()
        self._makers: dict[int, int] = {}

    def add(self, inode: bytes | bytearray) -> None:
        """The inode will be loaded. All are added before anything is asked."""
        vid = InodeHeader.unpack(inode).vdi_id
        for index, owner in allocated(map_view(inode)):
            oid = data_oid(owner, index)
            self._named[oid] += 1
            if owner == vid:
                self._makers[oid] = vid
            else:
                self._makers.setdefault(oid, vid)

    def oid(self, saved: int) -> int:
        """What the saved object is called now."""
        if not is_data(saved):
            return saved
        return data_oid(self._makers.get(saved, vid_of(saved)), index_of(saved))

    def renewed(self, inode: bytes | bytearray) -> bytearray:
        """The inode with a map and references that hold among what is loaded."""
        vid = InodeHeader.unpack(inode).vdi_id
        made = bytearray(inode[:REFS_OFFSET]) + bytes(len(inode) - REFS_OFFSET)
        entries, pairs = map_view(made), refs_view(made)
        for index, owner in allocated(entries):
            oid = data_oid(owner, index)
            maker, others = self._makers[oid], self._named[oid] - 1
            entries[index] = maker
            if maker == vid:
                pairs[2 * index + 1] = others
            else:
                pairs[2 * index] = 1
        return made
