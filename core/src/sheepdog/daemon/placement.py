"""Where the shards of an object belong, and by which scheme: ring, volume table and redundancy plugins put together.

Kept per object for as long as a ring stands, because it is asked on every request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from sheepdog.contracts.redundancy import RedundancyFactory, RedundancyScheme
from sheepdog.contracts.store import REPLICA, ShardKey
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.state import SheepState
from sheepdog.errors import ConfigError
from sheepdog.model.ids import TYPE_BITS, VID_MASK, VID_SHIFT, always_replicated, object_bytes
from sheepdog.model.node import Node, NodeId
from sheepdog.model.ring import Ring

CACHE_MAX = 1 << 16

SchemeOf = Callable[[int, int], RedundancyScheme]  # policy byte, number of shards


class Placement:
    """The holders of one object under one ring.

    What every request asks is worked out once: comparing node ids costs more than all else in here.
    """

    __slots__ = (
        "copies", "here", "holders", "identical", "index", "links", "local", "object_bytes", "others", "policy",
        "primary", "primary_link", "replica", "ring", "scheme", "shard_bytes", "short",
    )  # fmt: skip

    def __init__(
        self,
        oid: int,
        ring: Ring,
        holders: tuple[Node, ...],
        me: NodeId,
        scheme: RedundancyScheme,
        bytes_: int,
        striped_bytes: int,
        peers: PeerPool,
    ) -> None:
        self.ring = ring  # what this is valid for
        self.replica = ShardKey(oid, REPLICA)  # names a whole copy
        self.holders = tuple(node.id for node in holders)
        self.scheme = scheme
        self.policy = scheme.policy
        self.copies = scheme.shards
        self.object_bytes = bytes_
        self.shard_bytes = bytes_ if scheme.identical else scheme.shard_bytes(striped_bytes)  # of each shard's file
        self.index = next((i for i, node in enumerate(self.holders) if node == me), -1)
        self.local = self.index >= 0  # a shard belongs here
        self.primary = self.holders[0] if self.holders else None
        self.here = self.index == 0  # we are the primary
        self.others = tuple(node for node in self.holders if node != me)
        self.links = tuple(peers.link(node) for node in self.others)
        self.primary_link = self.links[0] if self.links and not self.here else None
        self.identical = scheme.identical
        self.short = len(self.holders) < scheme.shards  # fewer zones than copies


class Placer:
    """Answers ``placement(oid)`` for the current ring."""

    def __init__(self, state: SheepState, scheme_of: SchemeOf, peers: PeerPool) -> None:
        self._state = state
        self._peers = peers
        self._scheme_of = scheme_of
        self._ring: Ring | None = None
        self._cache: dict[int, tuple[Placement, tuple[int, ...]]] = {}

    def placement(self, oid: int, copies: int = 0, policy: int = 0) -> Placement:
        """Where ``oid`` belongs now.

        :param copies: what the request says; used only for volumes that this sheep has not heard of.
        """
        state = self._state
        ring = state.ring
        if ring is not self._ring or len(self._cache) > CACHE_MAX:
            self._cache = {}
            self._ring = ring
        known = state.vdis.schemes.get(oid >> VID_SHIFT & VID_MASK)
        entry = self._cache.get(oid)
        if entry is not None:
            asked = entry[1]
            if asked is known or asked == (known or (copies, policy)):
                return entry[0]
        asked = known or (copies, policy)
        if known is not None:
            copies, policy, shift = known
        else:
            shift = state.block_size_shift or 22
            copies = copies or state.copies or 1
            policy = policy or (state.copy_policy if copies == state.copies else 0)
        if always_replicated(oid):
            policy = 0
        scheme = self._scheme_of(policy, copies)
        # Every strip has the size of a data object's, also the strips of attributes, which are smaller.
        made = Placement(
            oid, ring, ring.holders(oid, scheme.shards), state.me.id, scheme, object_bytes(oid, shift), 1 << shift,
            self._peers,
        )  # fmt: skip
        self._cache[oid] = (made, asked)
        return made

    def holders_in(self, ring: Ring, oid: int) -> tuple[NodeId, ...]:
        """Where ``oid`` belonged under another ring."""
        return tuple(node.id for node in ring.holders(oid, self.placement(oid).scheme.shards))

    def writable(self, oid: int) -> bool:
        """Data objects of snapshots are read-only."""
        return bool(oid & TYPE_BITS) or oid >> VID_SHIFT & VID_MASK not in self._state.vdis.snapshots


def scheme_finder(factories: Sequence[RedundancyFactory]) -> Callable[[int, int], RedundancyScheme]:
    """``scheme(policy byte, shards)``, remembered.

    :raises ConfigError: from the result, when no installed plugin knows the policy.
    """

    @lru_cache(maxsize=1024)
    def scheme(policy: int, shards: int) -> RedundancyScheme:
        for factory in factories:
            if factory.accepts(policy):
                return factory.scheme(policy, shards)
        raise ConfigError(
            f"no installed redundancy plugin knows the policy 0x{policy:02x}; try: pip install sheepdog-redundancy-ec"
        )

    return scheme
