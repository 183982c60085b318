"""Asks the primaries of unsettled objects to settle them, until none is left (see ``unsettled``)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import anyio

from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.placement import Placer
from sheepdog.daemon.primary import RETRYABLE, Primary
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.unsettled import AppliedLog, Unsettled
from sheepdog.model.clusterinfo import ClusterStatus
from sheepdog.wire.extensions import SETTLE
from sheepdog.wire.header import Response

logger = logging.getLogger(__name__)

PAUSE_S = 0.05
PARALLEL = 8
PERIOD_S = 2.0  # of the notes about objects with changes under way


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
        logs: Callable[[], Iterable[AppliedLog]] = tuple,
    ) -> None:
        """:param logs: of all connections, what was applied and is not known to be complete."""
        self._state = state
        self._unsettled = unsettled
        self._primary = primary
        self._placer = placer
        self._peers = peers
        self._outbox = outbox
        self._logs = logs
        self._asked: set[int] = set()
        self._ring = state.ring
        self._was_away = False
        state.observe(self._changed)

    def _changed(self) -> None:
        """A primary that is no member any more tells nobody what is complete, even if its connection still stands.

        Nor may one whose member we were not for a while: it may have closed the connection without our hearing of it.
        """
        if self._state.status is not ClusterStatus.OK:
            self._was_away = True
        ring, self._ring = self._ring, self._state.ring
        if ring is self._ring:
            return
        self._unsettled.hopeless.clear()
        present = {node.id for node in self._ring.storage}
        if self._was_away or any(node.id not in present for node in ring.storage):
            self._was_away = self._state.status is not ClusterStatus.OK
            # Whose connection is whose is not known here. A primary that stays has few changes under way.
            for log in self._logs():
                self._unsettled.abandon(log)
                log.clear()

    async def run(self) -> None:
        """Until cancelled."""
        passes = 0
        while True:
            await anyio.sleep(PAUSE_S)
            passes += 1
            if passes * PAUSE_S >= PERIOD_S:
                passes = 0
                self._unsettled.turn(self._logs())
            if self._unsettled.oids and self._state.status is ClusterStatus.OK:
                with self._outbox:
                    for oid in list(self._unsettled.oids):
                        if len(self._asked) >= PARALLEL:
                            break
                        if oid not in self._asked and oid not in self._unsettled.hopeless:
                            self._ask(oid)

    def _ask(self, oid: int) -> None:
        placement = self._placer.placement(oid)
        if placement.primary is None:
            return
        self._asked.add(oid)
        ring = self._state.ring

        def done(result: int) -> None:
            self._asked.discard(oid)
            unsettled = self._unsettled
            if not result:
                unsettled.settled(oid)
            elif unsettled.postpone(oid) and result not in RETRYABLE and ring is self._state.ring:
                unsettled.hopeless.add(oid)  # until the members change

        if placement.here:
            self._primary.settle(oid, done)
            return

        def answered(response: Response) -> None:
            done(response.result)

        self._peers.link(placement.primary).object_request(SETTLE, self._state.epoch, oid, answered, offset=1)
