"""What one sheep knows about all volumes: their schemes, which numbers are used, which are deleted, who holds locks.

The table is the same on every member once the same events were processed (membership). The data path asks two things of
it for every request, whether a volume is a snapshot and how its objects are stored, so each is one dictionary lookup.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from sheepdog.model.limits import BLOCK_SIZE_SHIFT_MAX
from sheepdog.model.node import NodeId
from sheepdog.model.vdi_state import VdiState
from sheepdog.model.vid_bitmap import VidBitmap


class VdiTable:
    """All known volumes."""

    __slots__ = ("_states", "born", "deleted", "in_use", "schemes", "shift_max", "snapshots")

    def __init__(self) -> None:
        self.in_use = VidBitmap()
        self.deleted = VidBitmap()
        self.born: set[int] = set()
        """Volumes that were made since we are a member. What descends from them is known here, be its inode lost."""
        self._states: dict[int, VdiState] = {}
        self.schemes: dict[int, tuple[int, int, int]] = {}
        """(copies, copy policy, block size shift) of known volumes, for the data path to look up."""
        self.snapshots: set[int] = set()
        """Volumes of which the data objects must not change any more. For the data path as well."""
        self.shift_max = 0  # of the objects of any volume that was ever known since the last format

    # ---- data path

    def scheme_of(self, vid: int) -> tuple[int, int, int] | None:
        """(copies, copy policy, block size shift) of a known volume; ``None``: use the defaults of the cluster."""
        return self.schemes.get(vid)

    def readonly(self, vid: int) -> bool:
        """Whether data objects of this volume must not change any more, because it is a snapshot."""
        return vid in self.snapshots

    # ---- control plane

    def get(self, vid: int) -> VdiState | None:
        """The state of a known volume."""
        return self._states.get(vid)

    def states(self) -> list[VdiState]:
        """All states, ordered by vid."""
        return [self._states[vid] for vid in sorted(self._states)]

    def __len__(self) -> int:
        return len(self._states)

    def put(self, state: VdiState) -> None:
        """``state`` replaces what was known of its vid; the bitmaps stay."""
        vid = state.vid
        self._states[vid] = state
        self.schemes[vid] = (state.copies, state.copy_policy, state.block_size_shift)
        self.shift_max = max(self.shift_max, min(state.block_size_shift, BLOCK_SIZE_SHIFT_MAX))
        if state.snapshot:
            self.snapshots.add(vid)
        else:
            self.snapshots.discard(vid)

    def use(self, vid: int) -> None:
        """The number is taken."""
        self.in_use.add(vid)

    def make(self, vid: int) -> None:
        """The number is given to a new volume, unless it was taken already."""
        if vid not in self.in_use:
            self.in_use.add(vid)
            self.born.add(vid)

    def mark_deleted(self, vid: int) -> None:
        """The volume is deleted: both bits are set and its state says so."""
        self.in_use.add(vid)
        self.deleted.add(vid)
        state = self._states.get(vid)
        if state is not None and not state.deleted:
            self.put(replace(state, deleted=True))

    def forget(self, vid: int) -> None:
        """Nothing is known of ``vid`` and its number is free again."""
        self.born.discard(vid)
        self.in_use.discard(vid)
        self.deleted.discard(vid)
        self._states.pop(vid, None)
        self.schemes.pop(vid, None)
        self.snapshots.discard(vid)

    def clear(self) -> None:
        """Format: no volume exists."""
        self.born.clear()
        self.in_use.clear()
        self.deleted.clear()
        self._states.clear()
        self.schemes.clear()
        self.shift_max = 0
        self.snapshots.clear()

    def merge(self, states: Iterable[VdiState]) -> None:
        """What another sheep knows is added by union: a volume known anywhere is used, one deleted anywhere is deleted,
        one that is a snapshot anywhere is a snapshot. Scheme and lock of a volume known already stay."""
        for theirs in sorted(states, key=lambda state: state.vid):
            vid = theirs.vid
            self.in_use.add(vid)
            ours = self._states.get(vid)
            if ours is None:
                self.put(theirs)
            elif theirs.snapshot and not ours.snapshot:
                self.put(replace(ours, snapshot=True))
            if theirs.deleted:
                self.mark_deleted(vid)

    def drop_node(self, node: NodeId) -> None:
        """``node`` left: it takes part in no shared lock any more. A normal lock of it stays until somebody unlocks."""
        for vid in sorted(self._states):
            state = self._states[vid]
            changed = state.without_node(node)
            if changed is not state:
                self._states[vid] = changed

    # ---- families (recycling of numbers)

    def children(self) -> dict[int, list[int]]:
        """vid -> the vids that name it as parent, ascending. Roots are listed under 0."""
        tree: dict[int, list[int]] = {}
        for vid in sorted(self._states):
            parent = self._states[vid].parent_vid
            tree.setdefault(parent if parent in self._states else 0, []).append(vid)
        return tree

    def dead_families(self) -> list[int]:
        """All vids, ascending, of families of which every member is deleted."""
        tree = self.children()
        dead: list[int] = []
        for root in tree.get(0, ()):
            family, queue = [], [root]
            while queue:
                vid = queue.pop()
                family.append(vid)
                queue.extend(tree.get(vid, ()))
            if all(self._states[vid].deleted for vid in family):
                dead.extend(family)
        return sorted(dead)
