"""What one sheep knows: its own identity, the cluster's configuration, the epoch and its ring, all volumes.

The control plane (membership, cluster operations) changes it, always between two awaits; the data path only reads it.
Everything here is the same on every member once the same events were processed, except ``me`` and ``clean_start``.
"""

from __future__ import annotations

from collections.abc import Callable

from sheepdog.daemon.vdi_table import VdiTable
from sheepdog.model.clusterinfo import ClusterFlag, ClusterStatus
from sheepdog.model.node import Node, VnodeMode
from sheepdog.model.ring import Ring


def always() -> bool:
    """While nobody says otherwise."""
    return True


class SheepState:
    """The shared state of one daemon. Observers are called, on the loop, right after ``install`` swapped the view."""

    def __init__(self, me: Node, mode: VnodeMode = VnodeMode.NODE) -> None:
        """:param mode: what vnodes belong to, and so how long node records are; never changes."""
        self.me = me
        self.mode = mode
        self.status = ClusterStatus.WAIT
        self.epoch = 0
        self.ctime = 0  # 0: never formatted
        self.flags = ClusterFlag(0)
        self.copies = 0
        self.copy_policy = 0
        self.block_size_shift = 0
        self.store_name = ""
        self.recovery_disabled = False
        self.has_served = False  # was OK at least once: requests then wait for a re-join instead of being refused
        self.joining = True  # not yet heard what the cluster is doing: object requests wait for that
        self.alive: Callable[[], bool] = always
        """Whether our membership certainly stands: nobody can have seen our ``Left`` yet. Until it does, nothing is
        served. Without a session nothing is anyhow."""
        self.members: tuple[Node, ...] = ()  # oldest first
        self.ring = Ring(())
        self.vdis = VdiTable()
        self._observers: list[Callable[[], None]] = []

    @property
    def formatted(self) -> bool:
        return self.ctime != 0

    def object_bytes_max(self) -> int:
        """No data object of the cluster is larger."""
        return 1 << max(self.block_size_shift, self.vdis.shift_max)

    def observe(self, changed: Callable[[], None]) -> None:
        """``changed()`` is called after every change of status, epoch or ring."""
        self._observers.append(changed)

    def install(
        self,
        *,
        status: ClusterStatus | None = None,
        epoch: int | None = None,
        members: tuple[Node, ...] | None = None,
        ring: Ring | None = None,
    ) -> None:
        """The new view stands: no await between the assignments, so nobody ever sees a part of it."""
        if members is not None:
            self.members = members
        if ring is not None:
            self.ring = ring
            for node in ring.nodes:
                if node.id == self.me.id:
                    self.me = node
        if epoch is not None:
            self.epoch = epoch
        if status is not None:
            self.status = status
            self.has_served = self.has_served or status is ClusterStatus.OK
        for changed in self._observers:
            changed()
