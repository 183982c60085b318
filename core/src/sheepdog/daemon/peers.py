"""Connections to the other sheep: one per node, multiplexed by request id.

A request is a callback: ``done(response)`` is called exactly once, with result NETWORK_ERROR when no answer came.
Requests to one node are sent, and arrive, in the order they were made, which is what keeps the copies of an object in
step (see ``primary``). The connection is made when first needed; an idle one stays. Nothing is sent over a new one
before the other side knows whose it is and has ended what older ones there were (see ``fencing``).

``tail`` of a request carries the low-water mark of this connection's completed writes (see ``unsettled``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeAlias

import anyio

from sheepdog.contracts.services import Clock
from sheepdog.contracts.transport import Buffer, Channel, Transport
from sheepdog.daemon.outbox import Outbox
from sheepdog.errors import ProtocolError, TransportError
from sheepdog.model.node import NodeId
from sheepdog.wire.codec import response_decoder
from sheepdog.wire.header import FLAG_WRITE, REQUEST, Request, Response
from sheepdog.wire.opcodes import SHEEP_PROTO_VER
from sheepdog.wire.results import Result

logger = logging.getLogger(__name__)

CONNECT_S = 5.0
SECOND_CONNECT_S = 2.0  # over the second network, while there is the main address to go to
ANSWER_S = 30.0  # a peer that answers nothing for so long loses the connection
ID_MAX = 0xFFFFFFFF  # of a request; then they begin again
RETRY_S = 0.2  # between attempts to reach a node that refused

Answer: TypeAlias = Callable[[Response], None]

# Given in place of an answer, compared by identity: the connection broke, and the request may have been carried out.
LOST = Response(Result.NETWORK_ERROR)


class PeerLink:
    """The connection to one node."""

    __slots__ = (
        "_channel", "_connecting", "_failed_at", "_forgotten", "_held", "_into", "_next_id", "_output", "_pending",
        "_pool", "_ready", "decoder", "node",
    )  # fmt: skip

    def __init__(self, pool: PeerPool, node: NodeId) -> None:
        self.node = node
        self._pool = pool
        self.decoder = response_decoder(larger=pool.object_bytes_max, place=self._place)
        self._channel: Channel | None = None
        self._connecting = False
        self._forgotten = False
        self._failed_at = -RETRY_S
        self._next_id = 1
        self._ready = False  # the other side has answered our hello
        self._held: list[tuple[int, bytes, Buffer | None, Callable[[], bool] | None]] = []  # until then
        self._output: list[Buffer] = []
        self._pending: dict[int, tuple[Answer, float]] = {}
        self._into: dict[int, memoryview] = {}  # where the body of an answer goes

    # ---- requests

    def object_request(
        self,
        opcode: int,
        epoch: int,
        oid: int,
        done: Answer,
        *,
        flags: int = 0,
        cow_oid: int = 0,
        copies: int = 0,
        copy_policy: int = 0,
        ec_index: int = 0,
        tgt_epoch: int = 0,
        offset: int = 0,
        length: int = 0,
        body: Buffer | None = None,
        tail: int = 0,
        wanted: Callable[[], bool] | None = None,
        into: memoryview | None = None,
    ) -> None:
        """Sends an object request. With ``body`` it is a write; otherwise ``length`` bytes of answer are expected.

        :param into: of ``length`` bytes; a large answer is received there, and is a part of it then.
        :param wanted: if the request has to wait for a connection, whether it is still to be sent then.
        """
        id_ = self._begin(done)
        if id_ is None:
            return
        if into is not None:
            self._into[id_] = into
        if body is None:
            header = REQUEST.pack(
                SHEEP_PROTO_VER, opcode, flags, epoch, id_, length,
                oid, cow_oid, copies, copy_policy, ec_index, 0, tgt_epoch, offset, tail,
            )  # fmt: skip
            self._queue(id_, header, None, wanted)
        else:
            header = REQUEST.pack(
                SHEEP_PROTO_VER, opcode, flags | FLAG_WRITE, epoch, id_, len(body),
                oid, cow_oid, copies, copy_policy, ec_index, 0, tgt_epoch, offset, tail,
            )  # fmt: skip
            self._queue(id_, header, body, wanted)

    def change_request(
        self,
        opcode: int,
        epoch: int,
        oid: int,
        offset: int,
        body: Buffer,
        copies: int,
        copy_policy: int,
        flags: int,
        cow_oid: int,
        tail: int,
        done: Answer,
        wanted: Callable[[], bool] | None = None,
    ) -> None:
        """As ``object_request`` with a body. By position: names for so many arguments cost half of all this."""
        id_ = self._begin(done)
        if id_ is None:
            return
        header = REQUEST.pack(
            SHEEP_PROTO_VER, opcode, flags | FLAG_WRITE, epoch, id_, len(body),
            oid, cow_oid, copies, copy_policy, 0, 0, 0, offset, tail,
        )  # fmt: skip
        self._queue(id_, header, body, wanted)

    def send(self, request: Request, done: Answer) -> None:
        """Sends any other request (its id is replaced)."""
        id_ = self._begin(done)
        if id_ is None:
            return
        request.id = id_
        request.proto = SHEEP_PROTO_VER
        if len(request.body):
            request.flags |= FLAG_WRITE
            request.data_length = len(request.body)
        self._queue(id_, request.pack(), request.body)

    def _queue(self, id_: int, header: bytes, body: Buffer | None, wanted: Callable[[], bool] | None = None) -> None:
        if not self._ready:
            self._held.append((id_, header, body, wanted))
            return
        output = self._output
        first = not output
        output.append(header)
        if body is not None and len(body):
            output.append(body)
        if first:
            self._pool.outbox.defer(self._flush)

    def _begin(self, done: Answer) -> int | None:
        pool = self._pool
        if self._channel is None and not self._connecting:
            if pool.clock.monotonic() - self._failed_at < RETRY_S:
                done(Response(Result.NETWORK_ERROR))
                return None
            self._connecting = True
            pool.spawn(self._connect)
        id_ = self._next_id
        self._next_id = id_ + 1 if id_ < ID_MAX else 1
        self._pending[id_] = (done, pool.now)
        return id_

    def _flush(self) -> None:
        if self._channel is not None and self._output:
            output, self._output = self._output, []
            self._channel.write(output)

    async def _connect(self) -> None:
        addresses = [self.node.text]
        if self.node.io_port:
            addresses.insert(0, NodeId(self.node.io_address, self.node.io_port).text)
        try:
            for address in addresses:
                try:
                    with anyio.fail_after(CONNECT_S if address is addresses[-1] else SECOND_CONNECT_S):
                        await self._pool.transport.connect(address, self._opened)
                    return
                except (TransportError, TimeoutError) as error:
                    if address is not addresses[-1]:
                        logger.warning("fallback to main address of node=%s: %s", self.node.text, error)
                    else:
                        logger.debug("node=%s is not reachable: %s", self.node.text, error)
            self._failed_at = self._pool.clock.monotonic()
            self._connecting = False  # first: who is told of the failure may try again at once
            self._lost(Response(Result.NETWORK_ERROR))
        finally:
            self._connecting = False

    def _opened(self, channel: Channel) -> PeerLink:
        self._channel = channel
        self.decoder = response_decoder(larger=self._pool.object_bytes_max, place=self._place)
        if self._forgotten:
            channel.abort()
        elif self._pool.hello is not None:
            channel.write([self._pool.hello()])
        else:
            self._greeted()
        return self

    def _greeted(self) -> None:
        """The other side knows whose connection this is: what waited for it leaves."""
        self._ready = True
        held, self._held = self._held, []
        with self._pool.outbox:
            for id_, header, body, wanted in held:
                if wanted is None or wanted():
                    self._queue(id_, header, body)
                else:
                    self._pending.pop(id_)[0](Response(Result.NETWORK_ERROR))

    # ---- receiver

    def _place(self, response: Response) -> memoryview | None:
        return self._into.get(response.id)

    def get_buffer(self, size_hint: int) -> memoryview:
        return self.decoder.get_buffer()

    def buffer_updated(self, count: int) -> None:
        try:
            responses = self.decoder.received(count)
        except ProtocolError as error:
            logger.error("node=%s sent garbage: %s", self.node.text, error)
            self.abort()
            return
        pending, into = self._pending, self._into
        with self._pool.outbox:
            for response in responses:
                entry = pending.pop(response.id, None)
                if into:
                    into.pop(response.id, None)
                if entry is not None:
                    entry[0](response)
                elif not self._ready:
                    self._greeted()  # whatever the answer was: a sheep that knows no hello needs none

    def writable(self) -> None:
        """Nothing waits for this: what may be in flight is bounded by the clients' own limits."""

    def closed(self, error: Exception | None) -> None:
        self._channel = None
        self._ready = False
        self._lost(LOST)

    def _lost(self, response: Response) -> None:
        pending, self._pending = self._pending, {}
        self._into = {}
        self._output = []
        self._held = []
        with self._pool.outbox:
            for done, _ in pending.values():
                done(response)

    def forget(self) -> None:
        """The node is no member any more."""
        self._forgotten = True
        self.abort()

    def abort(self) -> None:
        """The connection ends now; what waits on it is answered with NETWORK_ERROR."""
        if self._channel is not None:
            self._channel.abort()

    def check(self, now: float) -> None:
        """Gives the connection up when its oldest request has waited too long."""
        if self._pending and self._channel is not None:
            _, since = next(iter(self._pending.values()))
            if now - since > ANSWER_S:
                logger.warning(
                    "node=%s has not answered for %.0f s, closing the connection", self.node.text, now - since
                )
                self.abort()

    @property
    def idle(self) -> bool:
        return not self._pending


class PeerPool:
    """All peer connections of one sheep."""

    def __init__(
        self,
        transport: Transport,
        outbox: Outbox,
        clock: Clock,
        spawn: Callable[..., None],
        object_bytes_max: Callable[[], int] | None = None,
    ) -> None:
        """:param object_bytes_max: the size of the largest object that an answer may hold at this moment."""
        self.transport = transport
        self.object_bytes_max = object_bytes_max
        self.outbox = outbox
        self.clock = clock
        self.spawn = spawn
        self.hello: Callable[[], bytes] | None = None
        """The first request of each connection, with id 0."""
        self.now = clock.monotonic()  # of the last tick: exact enough for deadlines
        self._links: dict[NodeId, PeerLink] = {}

    def link(self, node: NodeId) -> PeerLink:
        """The connection to ``node``, made when first used."""
        link = self._links.get(node)
        if link is None:
            link = self._links[node] = PeerLink(self, node)
        return link

    async def call(self, node: NodeId, request: Request) -> Response:
        """The answer to one request, awaited.

        :raises TransportError: no answer; the request may or may not have been carried out.
        """
        event = anyio.Event()
        answers: list[Response] = []

        def done(response: Response) -> None:
            answers.append(response)
            event.set()

        with self.outbox:
            self.link(node).send(request, done)
        await event.wait()
        response = answers[0]
        if response.result == Result.NETWORK_ERROR:
            raise TransportError(f"node {node.text} does not answer")
        return response

    def tick(self) -> None:
        """Once in a while: deadlines, and connections to nodes that are gone."""
        self.now = self.clock.monotonic()
        for link in list(self._links.values()):
            link.check(self.now)

    def forget(self, members: set[NodeId]) -> None:
        """Connections to nodes that are no members any more are dropped; what waits there is answered."""
        for node in [node for node in self._links if node not in members]:
            self._links.pop(node).forget()

    def close(self) -> None:
        """All connections end at once."""
        for link in self._links.values():
            link.abort()
