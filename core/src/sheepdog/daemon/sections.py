"""Changes of the replicated state, and exclusive sections around several of them.

A *change* is a named map of fields that every member applies when it is delivered; the result of the sender's own
application is what its ``submit`` returns. Appliers are deterministic: they see only replicated state and the fields.

An *exclusive section* is a turn in a queue that all members keep alike: claims queue in the order of delivery, the head
acts, and its last broadcast (or its ``Left``) ends its turn. A change that belongs to a section counts only while its
claim is the head, so nothing of a holder that lost its turn is ever applied.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import anyio

from sheepdog.daemon import messages
from sheepdog.errors import ClusterUnavailable, ProtocolError, RequestError, SessionLost
from sheepdog.model.node import NodeId

logger = logging.getLogger(__name__)

CLEANUP_S = 10.0
CLAIMS_MAX = 4096  # waiting here; more are refused at once

Applier: TypeAlias = Callable[[messages.Fields, NodeId], Awaitable[Any]]  # Any: a result of the change's own
Broadcast: TypeAlias = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Claim:
    """A place in the queue."""

    owner: NodeId
    token: int


class _Waiter:
    """Somebody here waits for the delivery of an own message, or for a turn."""

    __slots__ = ("error", "event", "result")

    def __init__(self) -> None:
        self.event = anyio.Event()
        self.result: Any = None
        self.error: Exception | None = None

    def settle(self, result: Any, error: Exception | None) -> None:
        self.result, self.error = result, error
        self.event.set()


class Section:
    """One turn. Made by ``Sections.exclusive``."""

    def __init__(self, sections: Sections, token: int) -> None:
        self._sections = sections
        self.token = token
        self.finished = False

    async def change(self, name: str, **fields: Any) -> Any:
        """The change stands on every member that has come this far; the turn goes on. Returns its result here."""
        return await self._sections.send(name, fields, claim=self.token, release=False)

    async def finish(self, name: str, **fields: Any) -> Any:
        """As ``change``, and the turn ends with it."""
        result = await self._sections.send(name, fields, claim=self.token, release=True)
        self.finished = True  # not before: until then a release is needed, and one too many does no harm
        return result


class Sections:
    """The queue of claims, the appliers, and whoever waits here."""

    def __init__(self, me: NodeId) -> None:
        self._me = me
        self._appliers: dict[str, Applier] = {}
        self._waiters: dict[int, _Waiter] = {}
        self._turns: dict[int, _Waiter] = {}
        self._next_token = 1
        self._broadcast: Broadcast | None = None
        self.claims: list[Claim] = []

    # ---- set-up

    def register(self, name: str, applier: Applier) -> None:
        """``await applier(fields, sender)`` applies changes called ``name``; what it raises is the sender's result."""
        assert name not in self._appliers, f"change {name} has two appliers"
        self._appliers[name] = applier

    def attach(self, broadcast: Broadcast) -> None:
        """A session stands and we are admitted: changes and claims can be sent."""
        self._broadcast = broadcast

    def detach(self) -> None:
        """The session is over: everybody who waits gets ``SessionLost`` and the queue is forgotten."""
        self._broadcast = None
        self.claims = []
        waiters = [*self._waiters.values(), *self._turns.values()]
        self._waiters.clear()
        self._turns.clear()
        for waiter in waiters:
            waiter.settle(None, SessionLost("the session ended; the operation may or may not have been done"))

    def reset(self) -> None:
        """The cluster was formatted: no section goes on, and changes that belong to one do not count any more."""
        self.claims = []
        turns = list(self._turns.values())
        self._turns.clear()
        for turn in turns:
            turn.settle(None, ClusterUnavailable("the cluster was formatted meanwhile"))

    # ---- sending

    async def submit(self, name: str, **fields: Any) -> Any:
        """The change was applied here, in the order of all events; returns what its applier returned or raises its
        error.

        :raises SessionLost: it may or may not stand.
        :raises ClusterUnavailable: nothing was sent.
        :raises PayloadTooLarge: nothing was sent.
        """
        return await self.send(name, fields, claim=0, release=False)

    async def send(self, name: str, fields: messages.Fields, *, claim: int, release: bool) -> Any:
        """As ``submit``, as part of the section whose claim has that token (0: of none)."""
        assert name in self._appliers, f"nobody applies {name}"
        token = self._token()
        payload = messages.message(messages.CHANGE, token, n=name, f=fields, c=claim, r=release)
        waiter = self._waiters[token] = _Waiter()
        try:
            await self._send(payload)
            await waiter.event.wait()
        finally:
            self._waiters.pop(token, None)
        if waiter.error is not None:
            raise waiter.error
        return waiter.result

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[Section]:
        """Nobody else in the cluster is inside a section. Cancelled or failed, the turn is given up.

        :raises SessionLost: the turn never came, or is over for the others.
        :raises ClusterUnavailable: no claim was made.
        """
        if len(self._turns) >= CLAIMS_MAX:
            raise ClusterUnavailable("too many cluster operations wait on this sheep")
        token = self._token()
        payload = messages.message(messages.CLAIM, token)
        section = Section(self, token)
        turn = self._turns[token] = _Waiter()
        sent = False
        try:
            sent = True  # cancelled inside the broadcast, the claim may stand
            try:
                await self._send(payload)
            except ClusterUnavailable:
                sent = False
                raise
            await turn.event.wait()
            if turn.error is not None:
                raise turn.error
            yield section
        finally:
            self._turns.pop(token, None)
            if sent and not section.finished and self._broadcast is not None:
                with anyio.move_on_after(CLEANUP_S, shield=True):
                    await self._release(token)

    async def _release(self, token: int) -> None:
        while self._broadcast is not None:
            try:
                await self._send(messages.message(messages.RELEASE, token))
                return
            except SessionLost:
                return  # our Left drops the claim
            except ClusterUnavailable:
                await anyio.sleep(0.1)

    async def _send(self, payload: bytes) -> None:
        broadcast = self._broadcast
        if broadcast is None:
            raise ClusterUnavailable("this sheep is not a member at the moment")
        await broadcast(payload)

    def _token(self) -> int:
        token = self._next_token
        self._next_token += 1
        return token

    # ---- delivery, on every member in the same order

    async def delivered_change(self, sender: NodeId, token: int, fields: messages.Fields) -> None:
        """Applies a change unless it belongs to a section that is not the sender's turn."""
        claim = Claim(sender, messages.integer(fields, "c"))
        waiter = self._waiters.get(token) if sender == self._me else None
        result: Any = None
        error: Exception | None = None
        if claim.token and (not self.claims or self.claims[0] != claim):
            error = SessionLost("the section of this change is over")
        else:
            name = messages.text(fields, "n")
            applier = self._appliers.get(name)
            arguments = fields.get("f")
            if applier is None or not isinstance(arguments, dict):
                logger.warning("a change called %r from node=%s is not known here", name, sender.text)
                error = ProtocolError(f"unknown change {name!r}")
            else:
                try:
                    result = await applier(arguments, sender)
                except (RequestError, ProtocolError) as refusal:
                    error = refusal  # by every member alike
                except Exception as failure:
                    error = failure
                    logger.error("change %s of node=%s failed here", name, sender.text, exc_info=failure)
            if claim.token and messages.integer(fields, "r"):
                self._drop(claim)
        if waiter is not None:
            waiter.settle(result, error)

    def delivered_claim(self, sender: NodeId, token: int) -> None:
        """The claim is the last of the queue."""
        self.claims.append(Claim(sender, token))
        self._wake_head()

    def delivered_release(self, sender: NodeId, token: int) -> None:
        """The claim is gone, whether it was the head or still waited."""
        self._drop(Claim(sender, token))

    def node_left(self, node: NodeId) -> None:
        """Claims of ``node`` are gone."""
        self.claims = [claim for claim in self.claims if claim.owner != node]
        self._wake_head()

    def _drop(self, claim: Claim) -> None:
        if claim in self.claims:
            self.claims.remove(claim)
        self._wake_head()

    def _wake_head(self) -> None:
        if self.claims and self.claims[0].owner == self._me:
            turn = self._turns.get(self.claims[0].token)
            if turn is not None and not turn.event.is_set():
                turn.settle(None, None)

    # ---- state transfer

    def export(self) -> list[Any]:
        """The queue, for a joiner."""
        return [[claim.owner.pack(), claim.token] for claim in self.claims]

    def restore(self, value: Any) -> None:
        """The queue as another member exported it.

        :raises ProtocolError: it did not.
        """
        if not isinstance(value, list):
            raise ProtocolError("the queue of sections is missing")
        claims = []
        for entry in value:
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], bytes) or len(entry[0]) != 40:
                raise ProtocolError("a claim is malformed")
            claims.append(Claim(NodeId.unpack(entry[0]), int(entry[1])))
        self.claims = claims
