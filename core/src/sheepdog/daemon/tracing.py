"""What ``dog trace`` switches on: a record of requests, and a watch over those that keep the event loop.

``graph`` notes for each request when it came and when it was answered, in the format of the original's function tracer
(``dog trace graph cat`` draws it): the name of the operation in place of a function, who asked in place of a thread,
and as depth the lowest number that no other request under way has, so that those which overlap stand beside each other.
``loop_checker`` logs a warning for each request whose handling kept the event loop for more than a millisecond.

While nothing is switched on, a request costs two looks at an attribute that is ``None``.
"""

from __future__ import annotations

import logging
from collections import deque
from heapq import heappop, heappush
from itertools import islice
from struct import Struct
from typing import TYPE_CHECKING

from sheepdog.contracts.services import Clock
from sheepdog.wire.header import Request, Response
from sheepdog.wire.opcodes import Op, op_name
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.dispatch import Dispatcher, PathHandler
    from sheepdog.daemon.server import ClientConnection

logger = logging.getLogger(__name__)

GRAPH, LOOP_CHECKER = "graph", "loop_checker"
ITEMS_MAX = 1 << 17  # 10 MB; the oldest go first
LOOP_S_MAX = 0.001
ENTRY, RETURN = 0, 1
ITEM = Struct("<i20si36sQQ")  # kind, thread, depth, function, entered, returned (ns)
_OWN = frozenset({Op.TRACE_STATUS, Op.TRACE_READ_BUF, Op.TRACE_ENABLE, Op.TRACE_DISABLE})


class Tracers:
    """The tracers of one sheep."""

    def __init__(self, dispatcher: Dispatcher, clock: Clock) -> None:
        self._dispatcher = dispatcher
        self._now = clock.monotonic
        self._enabled = dict.fromkeys((GRAPH, LOOP_CHECKER), False)
        self._items: deque[bytes] = deque(maxlen=ITEMS_MAX)
        self._recorded = False  # there was a record, which dog fetches to its end
        self._begun: dict[int, tuple[Request, bytes, int, int]] = {}  # id(request) -> itself, thread, depth, entered
        self._depths: list[int] = []  # given back
        for opcode, handler in (
            (Op.TRACE_STATUS, self.status),
            (Op.TRACE_ENABLE, self.enable),
            (Op.TRACE_DISABLE, self.disable),
            (Op.TRACE_READ_BUF, self.read),
        ):
            dispatcher.fast(opcode, handler)

    # ---- what dog asks

    def enable(self, request: Request) -> Response:
        """TRACE_ENABLE: NO_SUPPORT for a tracer that there is not, INVALID_PARMS if it is enabled already."""
        return self._switch(request, True)

    def disable(self, request: Request) -> Response:
        """TRACE_DISABLE: as ``enable``; what was recorded can be read afterwards."""
        return self._switch(request, False)

    def _switch(self, request: Request, on: bool) -> Response:
        name = bytes(request.body).split(b"\0", 1)[0].decode("utf-8", "replace")
        if name not in self._enabled:
            return Response(Result.NO_SUPPORT)
        if self._enabled[name] is on:
            return Response(Result.INVALID_PARMS)
        self._enabled[name] = on
        if name == GRAPH:
            self._begun.clear()
            self._depths.clear()
            if on:
                self._items.clear()
                self._recorded = True
        self._dispatcher.tracer = self if any(self._enabled.values()) else None
        logger.info("tracer %s is %s", name, "enabled" if on else "disabled")
        return Response()

    def status(self, request: Request) -> Response:
        """TRACE_STATUS: a line for each tracer."""
        lines = (f"{name}\t{'enabled' if on else 'disabled'}\n" for name, on in self._enabled.items())
        body = "".join(lines).encode() + b"\0"
        return Response(body=body) if len(body) <= request.data_length else Response(Result.BUFFER_SMALL)

    def read(self, request: Request) -> Response:
        """TRACE_READ_BUF: the next items, oldest first, with AGAIN while there are more, or if there never were any."""
        if not self._recorded:
            return Response(Result.AGAIN)
        count = min(request.data_length // ITEM.size, len(self._items))
        body = b"".join(islice(self._items, count))
        for _ in range(count):
            self._items.popleft()
        return Response(Result.AGAIN if self._items and count else Result.SUCCESS, body=body)

    # ---- requests

    def run(self, handler: PathHandler, connection: ClientConnection, request: Request) -> None:
        """``handler(connection, request)``, watched."""
        began = self._now()
        if self._enabled[GRAPH] and request.opcode not in _OWN:
            self._enter(connection.channel.remote, request, began)
        try:
            handler(connection, request)
        finally:
            took = self._now() - began
            if took > LOOP_S_MAX and self._enabled[LOOP_CHECKER]:
                logger.warning("%s kept the event loop for %.3f ms", op_name(request.opcode), took * 1000)

    def _enter(self, remote: str, request: Request, now: float) -> None:
        depth = heappop(self._depths) if self._depths else len(self._begun)
        thread, entered = remote.encode()[-19:], int(now * 1e9)
        self._begun[id(request)] = request, thread, depth, entered
        self._items.append(ITEM.pack(ENTRY, thread, depth, op_name(request.opcode).encode()[:35], entered, 0))

    def replied(self, request: Request) -> None:
        """The request is answered."""
        begun = self._begun.pop(id(request), None)
        if begun is None:
            return  # it came before the record began
        _, thread, depth, entered = begun
        heappush(self._depths, depth)
        if not self._begun:
            self._depths.clear()
        name = op_name(request.opcode).encode()[:35]
        self._items.append(ITEM.pack(RETURN, thread, depth, name, entered, int(self._now() * 1e9)))
