"""Asks the primaries of unsettled objects to settle them, until none is left (see ``unsettled``)."""

from __future__ import annotations

import logging

import anyio

from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.placement import Placer
from sheepdog.daemon.primary import Primary
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.unsettled import Unsettled
from sheepdog.model.clusterinfo import ClusterStatus
from sheepdog.wire.extensions import SETTLE
from sheepdog.wire.header import Response

logger = logging.getLogger(__name__)

PAUSE_S = 0.05
PARALLEL = 8


class Settler:
    """The background task of one sheep's unsettled objects."""

    def __init__(
        self,
        state: SheepState,
        unsettled: Unsettled,
        primary: Primary,
        placer: Placer,
        peers: PeerPool,
        outbox: Outbox,
    ) -> None:
        self._state = state
        self._unsettled = unsettled
        self._primary = primary
        self._placer = placer
        self._peers = peers
        self._outbox = outbox
        self._asked: set[int] = set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await anyio.sleep(PAUSE_S)
            if self._unsettled.oids and self._state.status is ClusterStatus.OK:
                with self._outbox:
                    for oid in list(self._unsettled.oids):
                        if len(self._asked) >= PARALLEL:
                            break
                        if oid not in self._asked:
                            self._ask(oid)

    def _ask(self, oid: int) -> None:
        placement = self._placer.placement(oid)
        if placement.primary is None:
            return
        if not placement.scheme.identical:
            # Strips are brought in step by the next write of their stripe, or by a check.
            self._unsettled.settled(oid)
            return
        self._asked.add(oid)

        def done(result: int) -> None:
            self._asked.discard(oid)
            if not result:
                self._unsettled.settled(oid)

        if placement.primary == self._state.me.id:
            self._primary.settle(oid, done)
            return

        def answered(response: Response) -> None:
            done(response.result)

        self._peers.link(placement.primary).object_request(SETTLE, self._state.epoch, oid, answered)
