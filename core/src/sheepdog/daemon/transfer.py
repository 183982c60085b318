"""Carries the replicated state to a joiner, in pieces, over ordinary peer requests."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

import anyio

from sheepdog.daemon.interfaces import PeerCaller
from sheepdog.errors import TransportError
from sheepdog.model.node import NodeId
from sheepdog.wire.header import Request, Response
from sheepdog.wire.results import Result

logger = logging.getLogger(__name__)

FETCH_STATE = 0xD0  # oid: nonce of the join, cow_oid: offset, data_length: room; the total is in the variant
BARRIER = 0xD1  # oid: position to reach, cow_oid: vid to drain (0: none)

PIECE_BYTES = 1 << 20
FROZEN_MAX = 64  # joiners that may be on their way at once
RETRY_S = 0.05
WAIT_S = 5.0  # how long a request waits here before it answers AGAIN; well below what a peer connection allows


class FrozenStates:
    """States kept for joiners until they have them."""

    def __init__(self) -> None:
        self._states: OrderedDict[int, bytes] = OrderedDict()
        self._kept = anyio.Event()

    def keep(self, nonce: int, data: bytes) -> None:
        """``data`` is there for the join ``nonce``."""
        self._states[nonce] = data
        while len(self._states) > FROZEN_MAX:
            self._states.popitem(last=False)
        kept, self._kept = self._kept, anyio.Event()
        kept.set()

    def drop(self, nonce: int) -> None:
        """Nobody asks for it any more."""
        self._states.pop(nonce, None)

    def clear(self) -> None:
        """Nothing is kept."""
        self._states.clear()

    async def answer(self, request: Request) -> Response:
        """FETCH_STATE: a piece; AGAIN when the acceptance has not come this far here yet."""
        with anyio.move_on_after(WAIT_S):
            while request.oid not in self._states:
                await self._kept.wait()
        data = self._states.get(request.oid)
        if data is None:
            return Response(Result.AGAIN)
        start = request.cow_oid
        piece = data[start : start + min(request.data_length, PIECE_BYTES)]
        return Response(Result.SUCCESS, variant=len(data).to_bytes(8, "little"), body=piece)


async def fetch(peers: PeerCaller, nonce: int, candidates: Callable[[], Sequence[NodeId]]) -> bytes | None:
    """The state that was frozen for the join ``nonce``, from the first candidate that has it.

    Tries again as long as there are candidates; ``None`` when none is left.

    :param candidates: members that may have it, the likeliest first; asked again before each round.
    """
    while True:
        nodes = candidates()
        if not nodes:
            return None
        for node in nodes:
            data = await _fetch_from(peers, nonce, node)
            if data is not None:
                return data
        await anyio.sleep(RETRY_S)


async def _fetch_from(peers: PeerCaller, nonce: int, node: NodeId) -> bytes | None:
    data = b""
    while True:
        request = Request(FETCH_STATE, proto=0x0A, oid=nonce, cow_oid=len(data), data_length=PIECE_BYTES)
        try:
            response = await peers.call(node, request)
        except TransportError as error:
            logger.debug("node=%s cannot hand over the state: %s", node.text, error)
            return None
        if response.result != Result.SUCCESS:
            return None
        total = int.from_bytes(response.variant[:8], "little")
        data += bytes(response.body)
        if len(data) >= total:
            return data
        if not response.body:
            return None
