"""What a sheep announces of its disks where vnodes belong to disks.

The record of such a sheep lists its disks with their recorded sizes. When one comes, goes, fails or is weighed anew,
the sheep announces another record; every member then begins an epoch with the new ring, and recovery moves the objects
of the arcs that changed hands. Until that epoch stands the sheep makes do with the disks that it has, as sheep do whose
vnodes do not belong to disks.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import anyio

from sheepdog.daemon.interfaces import Backend, Spawn
from sheepdog.daemon.membership import Membership
from sheepdog.daemon.state import SheepState
from sheepdog.errors import SheepdogError
from sheepdog.model.node import Node, VnodeMode
from sheepdog.model.ring import node_disk

logger = logging.getLogger(__name__)

RETRY_S = 1.0


def with_disks(node: Node, weights: Mapping[str, int]) -> Node:
    """The record of ``node`` when it has disks with these paths and recorded sizes."""
    return replace(node, disks=tuple(node_disk(*disk) for disk in weights.items()), space=sum(weights.values()))


class DiskList:
    """Keeps the record of this sheep in step with its disks."""

    def __init__(self, state: SheepState, membership: Membership, backend: Backend, spawn: Spawn) -> None:
        self._state = state
        self._membership = membership
        self._backend = backend
        self._spawn = spawn
        self._changes = 0
        self._running = False

    def changed(self) -> None:
        """The cluster hears soon of the disks that there are now; nothing happens where vnodes do not belong to disks.

        Called on the event loop.
        """
        if self._state.mode is not VnodeMode.DISK:
            return
        self._changes += 1
        if not self._running:
            self._running = True
            self._spawn(self._announce)

    async def _announce(self) -> None:
        """Tries until it is done: an announcement that was not made is missing for ever."""
        seen, complained = 0, False
        while seen != self._changes:
            seen = self._changes
            store, me = self._backend.store, self._state.me
            assert store is not None, "a gateway has no disks"
            record = with_disks(me, store.weights())
            if record.shares == me.shares:
                continue  # a size that makes no vnode more or less is not worth an epoch
            try:
                await self._membership.update(record)
                logger.info("disks=%d space=%d were announced", len(record.disks), record.space)
                if self._state.formatted:
                    await self._membership.log.write_config()
            except SheepdogError as error:
                if not complained:
                    logger.warning("the disks of this sheep have to be announced again: %s", error)
                complained = True
                seen -= 1
                await anyio.sleep(RETRY_S)
        self._running = False
