"""Sets aside what this sheep holds and should not: objects that belong elsewhere, or that missed changes.

A live shard counts as valid for as long as it belonged here in every epoch. When epochs follow each other faster than
the store can be gone through, a shard may have belonged here, then not, then again: it missed the changes of the
epoch in between. So the rings that the store was not checked against yet are kept, and checked one after the other;
until that is done the gate of ``Shards`` is closed for every shard that one of them excludes. How far the checks came
is noted on disk, because a killed sheep must go on there. The same goes for a volume that has fewer copies for a while:
what excludes a shard then is the ring together with that number.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeAlias

from sheepdog.contracts.services import Executor
from sheepdog.contracts.store import REPLICA, ShardKey
from sheepdog.daemon.placement import Placer
from sheepdog.daemon.recovery_fetch import RingOf, StaleIndex
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.state import SheepState
from sheepdog.errors import RequestError
from sheepdog.model.ids import vid_of
from sheepdog.model.ring import Ring

logger = logging.getLogger(__name__)

# an epoch; its ring, None: to be read from the log; vid -> fewer copies of a volume than before
_Unchecked: TypeAlias = tuple[int, Ring | None, dict[int, int]]

InLane: TypeAlias = Callable[[ShardKey, Callable[[], Any]], Awaitable[int]]  # Any: what the work returns, not looked at


class Aside:
    """What of the store was checked against which epochs."""

    def __init__(
        self,
        state: SheepState,
        shards: Shards,
        placer: Placer,
        executor: Executor,
        index: StaleIndex,
        ring: RingOf,
        in_lane: InLane,
    ) -> None:
        """
        :param ring: the ring of an epoch, ``None`` when nobody knows it any more.
        :param in_lane: runs work as a change of a shard, after those that were made before.
        """
        self._state = state
        self._shards = shards
        self._placer = placer
        self._executor = executor
        self._index = index
        self._ring = ring
        self._in_lane = in_lane
        self._rings: list[_Unchecked] = []  # not checked yet

    def add(self, lowered: tuple[int, int] | None = None) -> None:
        """The present ring is to be checked, too.

        :param lowered: a volume, and how many copies it has now: fewer than before. A shard that has missed changes
            since must not count when the number is raised again.
        """
        state = self._state
        unchecked = (state.epoch, state.ring, {} if lowered is None else dict((lowered,)))
        if lowered is not None or not self._rings or self._rings[-1] != unchecked:
            self._rings.append(unchecked)
        if len(self._rings) > 1:
            self._shards.gate = self._doubtful

    def missed(self, epochs: range) -> None:
        """Epochs that began and were not acted upon before the process ended."""
        self._rings = [(epoch, None, {}) for epoch in epochs]

    def clear(self) -> None:
        """There is nothing to be checked."""
        self._rings = []
        self._shards.gate = None

    def _belongs(self, key: ShardKey, ring: Ring, lowered: dict[int, int]) -> bool:
        placement = self._placer.placement(key.oid)
        shards = placement.scheme.shards
        if lowered and placement.identical:
            shards = min(shards, lowered.get(vid_of(key.oid), shards))
        holders = [node.id for node in ring.holders(key.oid, shards)]
        me = self._state.me.id
        if placement.identical:
            return key.index == REPLICA and me in holders
        return 0 <= key.index < len(holders) and holders[key.index] == me

    def _doubtful(self, key: ShardKey) -> bool:
        # The newest ring says where requests go; only those before it matter here.
        return any(ring is None or not self._belongs(key, ring, lowered) for _, ring, lowered in self._rings[:-1])

    async def check(self, lifted: bool) -> int:
        """All rings are checked; returns the newest epoch among them, 0 when another join or a format came between.

        :param lifted: the newest of them began with a change of members, so what leaves was valid until the one before.
        """
        newest = 0
        while self._rings:
            for at, (epoch, ring, _) in enumerate(self._rings):
                if ring is None:
                    known = await self._ring(epoch)
                    if at >= len(self._rings) or self._rings[at] != (epoch, None, {}):
                        return 0
                    # Of an epoch that nobody knows any more nothing can be said.
                    self._rings[at] = (epoch, known if known is not None else self._state.ring, {})
            rings = list(self._rings)
            same_epoch = len(rings) == 1 and not lifted

            def last_valid(key: ShardKey, rings: list[_Unchecked] = rings, same_epoch: bool = same_epoch) -> int | None:
                for epoch, ring, lowered in rings:
                    assert ring is not None
                    if not self._belongs(key, ring, lowered):
                        return epoch if same_epoch else max(epoch - 1, 1)
                return None

            await self.retire(last_valid)
            if self._rings[: len(rings)] != rings:
                return 0
            self._rings = self._rings[len(rings) :]
            newest = rings[-1][0]
            lifted = True
        self._shards.gate = None
        return newest

    async def retire(self, last_valid: Callable[[ShardKey], int | None]) -> None:
        """Every live shard for which ``last_valid`` names an epoch is set aside under it.

        :raises SheepdogError: not yet; to be tried again.
        """
        # What a worker is making at this moment belongs to an older epoch; setting aside waits behind it in its lane.
        busy = self._shards.changing()
        store = self._shards.store
        for key in sorted({*busy, *await self._executor.run(lambda: list(store.keys()))}):
            epoch = last_valid(key)
            if epoch is not None:
                result = await self._in_lane(key, partial(self._index.retire, key, epoch))
                if result:
                    # As long as it is live it would be served, so the check must not be over.
                    raise RequestError(f"oid={key.oid:016x} cannot be set aside", result=result)
