"""Empties the stale area when nobody needs it any more.

When every member has announced for an epoch that it has everything, what was set aside goes at once: that is what the
announcements are for. Within that epoch a sheep may recover again, because it was restarted or its disks changed, and
then find or set aside objects that others lack: all sheep were killed and what one of them had was moved by hand, or
a disk of another sheep was put in. The other members have no cause to announce anything, so each object is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

from sheepdog.contracts.services import Executor
from sheepdog.contracts.store import ShardKey
from sheepdog.daemon.placement import Placer
from sheepdog.daemon.recovery_fetch import LIVE, Finder, StaleIndex, indexes
from sheepdog.daemon.state import SheepState
from sheepdog.errors import SheepdogError
from sheepdog.model.node import NodeId

logger = logging.getLogger(__name__)


class Purger:
    """Of the store of one sheep."""

    def __init__(
        self,
        state: SheepState,
        placer: Placer,
        executor: Executor,
        index: StaleIndex,
        finder: Finder,
        wanted: Callable[[int, int], Awaitable[bool]],
        generation: Callable[[], int],
    ) -> None:
        """
        :param wanted: whether an object, found in the version of an epoch, may be live again.
        :param generation: changes with every cause of recovery.
        """
        self._state = state
        self._placer = placer
        self._executor = executor
        self._index = index
        self._finder = finder
        self._wanted = wanted
        self._generation = generation

    async def purge(self, generation: int) -> None:
        """What was set aside goes, unless another change has begun since: it sets aside what must not go yet."""
        await self._executor.run(lambda: self._index.purge(lambda: self._generation() == generation))

    async def purge_unneeded(self, generation: int) -> None:
        """As ``purge``, if every object that somebody wants is live at all its holders.

        If not, or if one of them does not answer, everything is kept until this is called again, at the latest at the
        end of the next epoch's recovery.
        """
        for oid in sorted(await self._executor.run(self._index.oids)):
            if self._generation() != generation:
                return
            try:
                lacking = await self._lacking(oid)
                if lacking is None or not await self._wanted(oid, self._state.epoch):
                    continue
            except SheepdogError as error:
                logger.info("what was set aside is kept: %s", error)
                return
            logger.info("what was set aside is kept: node=%s does not have oid=%016x", lacking.text, oid)
            return
        await self.purge(generation)

    async def _lacking(self, oid: int) -> NodeId | None:
        """A holder without its live shard of the object.

        :raises SheepdogError: one does not answer.
        """
        placement = self._placer.placement(oid)
        for node, index in zip(placement.holders, indexes(placement), strict=True):
            answer = await self._finder.ask(node, ShardKey(oid, index), placement, self._state.epoch, length=0)
            if answer.version != LIVE:
                return node
        return None
