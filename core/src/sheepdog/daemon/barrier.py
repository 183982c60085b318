"""Waits until every member has seen what this sheep has seen.

A broadcast is applied by each member in its own time. Before an acknowledged change may be relied on through any
gateway, every member is asked directly whether it has come this far.
"""

from __future__ import annotations

import logging

import anyio

from sheepdog.contracts.services import Clock
from sheepdog.daemon.interfaces import Gateway, PeerCaller
from sheepdog.daemon.membership import Membership
from sheepdog.daemon.transfer import BARRIER, RETRY_S, WAIT_S
from sheepdog.errors import ClusterUnavailable, TransportError
from sheepdog.model.node import NodeId
from sheepdog.wire.header import Request, Response
from sheepdog.wire.results import Result

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0  # a member that is silent for so long without being declared dead is not waited for


class Barrier:
    """Both sides of the question."""

    def __init__(self, membership: Membership, peers: PeerCaller, gateway: Gateway, clock: Clock) -> None:
        self._membership = membership
        self._peers = peers
        self._gateway = gateway
        self._clock = clock

    async def wait(self, *, drain_vid: int = 0) -> None:
        """Every member has handled all events that we had when this was called, or has left.

        :param drain_vid: also, writes to data objects of this volume that were under way anywhere are complete.
        :raises ClusterUnavailable: we are no member any more.
        """
        position = self._membership.position
        async with anyio.create_task_group() as tasks:
            for node in self._membership.other_members():
                tasks.start_soon(self._wait_for, node, position, drain_vid)
            if drain_vid:
                with anyio.move_on_after(PATIENCE_S):
                    await self._gateway.drain(drain_vid)
        if not self._membership.admitted:
            raise ClusterUnavailable("this sheep left the cluster while it waited for the others")

    async def _wait_for(self, node: NodeId, position: int, drain_vid: int) -> None:
        deadline = self._clock.monotonic() + PATIENCE_S
        while node in self._membership.other_members():
            try:
                request = Request(BARRIER, proto=0x0A, oid=position, cow_oid=drain_vid)
                response = await self._peers.call(node, request)
                if response.result == Result.SUCCESS:
                    return
                if response.result != Result.AGAIN:
                    # It is ending or not serving: it answers no client either until it joins again.
                    logger.debug("node=%s answers a barrier with result=0x%02x", node.text, response.result)
            except TransportError as error:
                logger.debug("node=%s cannot be asked: %s", node.text, error)
            if self._clock.monotonic() > deadline:
                logger.warning("node=%s did not follow within %.0f s, going on without it", node.text, PATIENCE_S)
                return
            await anyio.sleep(RETRY_S)

    async def answer(self, request: Request) -> Response:
        """BARRIER: SUCCESS once we have come that far, AGAIN after a while."""
        with anyio.move_on_after(WAIT_S):
            await self._membership.reached(request.oid)
            if request.cow_oid:
                await self._gateway.drain(request.cow_oid)
            return Response(Result.SUCCESS)
        return Response(Result.AGAIN)
