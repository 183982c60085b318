"""Keeps what a vanished client had under way from being applied after what it does elsewhere.

A guest whose gateway does not answer gives up and goes on through another sheep. What it had sent to the first one may
or may not be applied; but not after a later change was acknowledged through the second. The first gateway drops what
waits there as soon as it sees that its client has gone. What it had forwarded already may be anywhere between the two
sheep, though, for as long as the network holds it back, and the epoch need not change meanwhile. Only the primary can
make sure that it is never applied, for the primary alone decides when it reads no more from a connection:

* A sheep says who it is with the first request of each connection to another sheep (HELLO), and sends nothing else
  before that was answered. A new connection ends the older ones of the same sheep at the other side. So what the
  network still holds of an older connection is dead before anything comes over the new one.
* Before the first change that comes over a client's connection goes to a primary, the gateway has that primary make a
  *fence*: from every sheep that is connected to it, it asks for a mark over that connection. What arrives before the
  mark is in its lane already and is applied before the new client's changes; a connection over which no mark comes
  within ``FENCE_S`` is ended, so that what is under way on it will not arrive.

A fence costs one round trip and holds for the life of the client's connection. Several that are asked for at once share
a round. In the usual case nothing is ended and no clock matters.

Limits: a gateway that does not know yet that its client has gone may try again what was refused; and a client that has
connections to two gateways at the same time must not send the same range over both.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from struct import Struct
from typing import TYPE_CHECKING, TypeAlias

from sheepdog.contracts.services import Clock
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.state import SheepState
from sheepdog.model.node import NodeId
from sheepdog.wire.extensions import FENCE, FENCE_ASK, FENCE_MARK, HELLO
from sheepdog.wire.header import Request, Response
from sheepdog.wire.opcodes import SHEEP_PROTO_VER
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.dispatch import Dispatcher
    from sheepdog.daemon.server import ClientConnection

logger = logging.getLogger(__name__)

FENCE_S = 2.0  # until a connection that brings no mark is ended
FENCES_MAX = 0xFFFFFFFF
_NODE = Struct("<16sHxxI")  # who speaks; number of the fence

Done: TypeAlias = Callable[[int], None]


class Client:
    """Whoever asks for changes and may go away: a client's connection, or a volume that a front end has open."""

    __slots__ = ("fenced", "open")

    def __init__(self) -> None:
        self.open = True
        self.fenced: set[NodeId] = set()
        """Primaries at which everything that was sent before we came has arrived, or never will."""

    def is_open(self) -> bool:
        """Whether it is still there."""
        return self.open


class Clients(Client):
    """Several at once: there as long as one of them is."""

    __slots__ = ("_members",)

    def __init__(self, members: Sequence[Client]) -> None:
        super().__init__()
        self.fenced = set.intersection(*(member.fenced for member in members))
        self._members = members

    def is_open(self) -> bool:
        return any(member.is_open() for member in self._members)


class Fences:
    """The fences of one sheep: those it asks for as a gateway, and those it makes as a primary."""

    def __init__(self, state: SheepState, peers: PeerPool, dispatcher: Dispatcher, clock: Clock) -> None:
        self._state = state
        self._peers = peers
        self._clock = clock
        peers.hello = self._hello_request
        self._waiting: dict[tuple[Client, NodeId], list[Done]] = {}  # changes that wait for a fence
        self.incoming: dict[ClientConnection, NodeId] = {}
        """The connections of other sheep, and who made them."""
        self._number = 0  # of the round under way, or of the last one
        self._left: dict[ClientConnection, bool] = {}  # those without a mark in this round; whether asked for one
        self._callers: list[Done] = []  # of this round
        self._next: list[Done] = []  # of the next one
        self._deadline = 0.0
        dispatcher.path(HELLO, self._hello, force=True)
        dispatcher.path(FENCE, lambda connection, request: self.make(partial(connection.reply, request)))
        dispatcher.path(FENCE_ASK, self._mark_asked, force=True)

    # ---- as a gateway

    def ask(self, client: Client, primary: NodeId, done: Done) -> None:
        """``done(0)`` once what was sent to ``primary`` before cannot be applied after what ``client`` sends now.

        ``client.fenced`` has the primary then. Any other result can be retried.
        """
        key = (client, primary)
        waiting = self._waiting.get(key)
        if waiting is not None:
            waiting.append(done)
            return
        self._waiting[key] = [done]
        if primary == self._state.me.id:
            self.make(partial(self._made, client, primary))
        else:
            request = Request(FENCE, proto=SHEEP_PROTO_VER, epoch=self._state.epoch)
            self._peers.link(primary).send(request, lambda response: self._made(client, primary, response.result))

    def _made(self, client: Client, primary: NodeId, result: int) -> None:
        if result == Result.INVALID_PARMS:
            result = 0  # a sheep that knows no fences, while a cluster is brought to a newer version node by node
        if not result:
            client.fenced.add(primary)
        for done in self._waiting.pop((client, primary)):
            done(result)

    # ---- who is connected

    def _hello_request(self) -> bytes:
        me = self._state.me.id
        return Request(HELLO, proto=SHEEP_PROTO_VER, variant=_NODE.pack(me.address, me.port, 0)).pack()

    def _hello(self, connection: ClientConnection, request: Request) -> None:
        address, port, _ = _NODE.unpack_from(request.variant or b"")
        node = NodeId(address, port)
        for older in [other for other, known in self.incoming.items() if known == node and other is not connection]:
            self._end(older)
        self.incoming[connection] = node
        connection.reply(request, 0)
        self._advance()

    def closed(self, connection: ClientConnection) -> None:
        """Nothing comes over the connection any more."""
        if self.incoming.pop(connection, None) is not None:
            self._left.pop(connection, None)
            self._advance()

    def _end(self, connection: ClientConnection) -> None:
        connection.end()
        self.incoming.pop(connection, None)
        self._left.pop(connection, None)

    # ---- as a primary

    def make(self, done: Done) -> None:
        """``done(0)`` once everything that other sheep sent to us before now has arrived, or never will."""
        self._next.append(done)
        if not self._callers:
            self._begin()

    def _begin(self) -> None:
        self._callers, self._next = self._next, []
        self._number = self._number % FENCES_MAX + 1
        self._deadline = self._clock.monotonic() + FENCE_S
        self._left = dict.fromkeys(self.incoming, False)
        self._ask_marks()
        self._advance()

    def _ask_marks(self) -> None:
        me = self._state.me.id
        variant = _NODE.pack(me.address, me.port, self._number)
        for connection in [connection for connection, asked in self._left.items() if not asked]:
            member = self._member(self.incoming[connection])
            if member is None:
                self._end(connection)  # it would be refused anyhow
                continue
            self._left[connection] = True
            request = Request(FENCE_ASK, proto=SHEEP_PROTO_VER, epoch=self._state.epoch, variant=variant)
            self._peers.link(member).send(request, partial(self._asked, self._number, connection))

    def _member(self, node: NodeId) -> NodeId | None:
        """The member, with its second network, if it is one."""
        return next((known.id for known in (*self._state.members, *self._state.ring.nodes) if known.id == node), None)

    def _asked(self, number: int, connection: ClientConnection, response: Response) -> None:
        if response.result and number == self._number and connection in self._left:
            self._left[connection] = False  # it has not heard: asked again with the next tick

    def _mark_asked(self, connection: ClientConnection, request: Request) -> None:
        """A primary wants to hear of us over the connection that our changes come by."""
        address, port, number = _NODE.unpack_from(request.variant or b"")
        member = self._member(NodeId(address, port))
        if member is None:
            connection.reply(request, Result.WAIT_FOR_JOIN)
            return
        mark = Request(
            FENCE_MARK, proto=SHEEP_PROTO_VER, epoch=self._state.epoch, variant=_NODE.pack(address, port, number)
        )
        self._peers.link(member).send(mark, _ignore)
        connection.reply(request, 0)

    def marked(self, connection: ClientConnection, request: Request) -> None:
        """Everything that was sent over this connection before the mark has been served, or refused."""
        _, _, number = _NODE.unpack_from(request.variant or b"")
        connection.reply(request, 0)
        if number == self._number:
            self._left.pop(connection, None)
            self._advance()

    def _advance(self) -> None:
        while self._callers and not self._left:
            callers, self._callers = self._callers, []
            for done in callers:
                done(0)
            if self._next and not self._callers:
                self._begin()

    def tick(self, now: float) -> None:
        """Ends the connections over which no mark came in time."""
        if not self._left:
            return
        if now < self._deadline:
            self._ask_marks()
            self._advance()
            return
        for connection in list(self._left):
            node = self.incoming.get(connection)
            if node is not None:
                logger.warning("node=%s does not answer, what it sent before is not waited for", node.text)
                self._end(connection)
        self._advance()


def _ignore(_: object) -> None:
    """Whether the mark arrived is seen at the other side."""
