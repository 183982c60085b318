"""The listening side: one ``ClientConnection`` per accepted connection, whoever is at the other end.

Clients, dog and other sheep speak the same protocol on the same port. A connection keeps no state but its decoder and
what is in flight; a malformed stream closes it. A client that has too much in flight, or does not read its replies, is
not read from until that has drained. Of other sheep any number of requests is taken: it is bounded by what their
clients may have in flight, and two sheep that waited for each other's answers before they read on would wait for ever.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from sheepdog.contracts.transport import Buffer, Channel
from sheepdog.daemon.fencing import Client
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.unsettled import AppliedLog
from sheepdog.errors import ProtocolError
from sheepdog.wire.codec import request_decoder
from sheepdog.wire.header import RESPONSE, Request

if TYPE_CHECKING:
    from sheepdog.daemon.dispatch import Dispatcher

logger = logging.getLogger(__name__)

MiB = 1024 * 1024
INFLIGHT_MAX = 4096
INFLIGHT_BYTES_MAX = 256 * MiB


class ClientConnection(Client):
    """Receiver of one accepted connection."""

    __slots__ = (
        "_dispatch", "_inflight", "_inflight_bytes", "_outbox", "_output", "_paused", "_server", "applied", "channel",
        "decoder", "limited", "number",
    )  # fmt: skip

    def __init__(self, server: Server, channel: Channel) -> None:
        super().__init__()
        self.channel = channel
        self.number = server.accepted  # tells connections apart in the log
        self.decoder = request_decoder(larger=server.state.object_bytes_max)
        self.limited = True  # by what is in flight; not for other sheep
        self.applied: AppliedLog = deque()
        self._server = server
        self._outbox = server.outbox
        self._dispatch = server.dispatcher.handle
        self._output: list[Buffer] = []
        self._inflight = 0
        self._inflight_bytes = 0
        self._paused = False

    def get_buffer(self, size_hint: int) -> memoryview:
        return self.decoder.get_buffer()

    def buffer_updated(self, count: int) -> None:
        if not self.open:
            return
        try:
            requests = self.decoder.received(count)
        except ProtocolError as error:
            logger.warning("closing connection of %s: %s", self.channel.remote, error)
            self.channel.abort()
            return
        if not requests:
            return
        dispatch = self._dispatch
        with self._outbox:
            for request in requests:
                self._inflight += 1
                self._inflight_bytes += request.data_length
                dispatch(self, request)
        self._throttle()

    def reply(self, request: Request, result: int, variant: bytes = b"", body: Buffer = b"") -> None:
        """The answer to ``request`` leaves with this pass. Called exactly once for each request."""
        self._inflight -= 1
        self._inflight_bytes -= request.data_length
        tracer = self._server.dispatcher.tracer
        if tracer is not None:
            tracer.replied(request)
        if not self.open:
            return
        output = self._output
        first = not output
        length = len(body)
        output.append(
            RESPONSE.pack(0, request.opcode, 0, self._server.state.epoch, request.id, length, result, variant)
        )
        if length:
            output.append(body)
        if first:
            self._outbox.defer(self._flush)

    def _flush(self) -> None:
        output = self._output
        if output and self.open:
            self._output = []
            self.channel.write(output)
            if self._paused:
                self._throttle()

    def _throttle(self) -> None:
        crowded = self.channel.congested or (
            self.limited and (self._inflight > INFLIGHT_MAX or self._inflight_bytes > INFLIGHT_BYTES_MAX)
        )
        if crowded != self._paused and self.open:
            self._paused = crowded
            if crowded:
                self.channel.pause_reading()
            else:
                self.channel.resume_reading()

    def writable(self) -> None:
        self._throttle()

    def end(self) -> None:
        """The connection ends now: nothing that comes over it, or came and waits, is served any more."""
        self.open = False
        self.channel.abort()

    def closed(self, error: Exception | None) -> None:
        self.open = False
        self._output = []
        self._server.connections.discard(self)
        self._server.gone(self)
        if self.applied:
            self._server.abandoned(self.applied)


class Server:
    """Makes connections out of channels and knows them all."""

    def __init__(self, dispatcher: Dispatcher, outbox: Outbox, abandoned: Callable[[AppliedLog], None]) -> None:
        """:param abandoned: told what another sheep's connection had applied when it broke."""
        self.abandoned = abandoned
        self.gone: Callable[[ClientConnection], None] = _ignore
        self.dispatcher = dispatcher
        self.outbox = outbox
        self.state = dispatcher.state
        self.connections: set[ClientConnection] = set()
        self.accepted = 0  # connections so far

    def accept(self, channel: Channel) -> ClientConnection:
        """The receiver for a new connection."""
        self.accepted += 1
        connection = ClientConnection(self, channel)
        self.connections.add(connection)
        return connection

    def close(self) -> None:
        """Every connection ends after what it has queued."""
        for connection in list(self.connections):
            connection.channel.close()


def _ignore(_: ClientConnection) -> None:
    """Nobody wants to know."""
