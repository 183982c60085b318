"""The loop around a session with the cluster driver: join, handle its events in order, and join again when it is lost.

When the session is lost the sheep stops serving at once, before it knows or does anything else. Events are read by one
task and handled by another, so that the handler can look ahead to who is still there while it waits for somebody.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

import anyio
from anyio.abc import TaskGroup

from sheepdog.contracts.cluster import ClusterDriver, ClusterSession, Delivered, Event, Joined, Left
from sheepdog.daemon import messages
from sheepdog.daemon.state import SheepState, always
from sheepdog.errors import ClusterUnavailable, JoinRefused, SessionLost
from sheepdog.model.clusterinfo import ClusterStatus
from sheepdog.model.node import NodeId

logger = logging.getLogger(__name__)

REJOIN_S = 1.0  # between attempts to join again
PING_S = 5.0  # how long the answer about the driver waits for a broadcast to come back
RESEND_S = 0.2  # between attempts to broadcast while the coordination service does not answer


class SessionKeeper(ABC):
    """Owns the session of one sheep. What the events mean is up to the subclass.

    An error of the handler is not caught: a member that cannot go on in order must not go on at all.
    """

    def __init__(self, state: SheepState, driver: ClusterDriver) -> None:
        self.state = state
        self.position = 0  # number of the event in work, or of the last one
        self.done = 0  # number of the last event that is finished
        self._driver = driver
        self._session: ClusterSession | None = None
        self._tasks: TaskGroup | None = None
        self._queue: deque[Event] = deque()
        self._older: list[NodeId] = []  # members that were there before us and have not left, maybe not handled yet
        self._arrived = anyio.Event()
        self._progress = anyio.Event()
        self._pings: dict[bytes, anyio.Event] = {}  # broadcasts that somebody waits for -> seen
        self._ping_count = 0
        self._refusal: str | None = None
        self._give_up = False  # this session leads nowhere: leave and join again

    # ---- of the subclass

    @abstractmethod
    async def _prepare(self, *, again: bool) -> tuple[bytes, list[bytes]]:
        """The greeting for the next join, and messages to broadcast right after it.

        :param again: an earlier session was lost.
        """

    @abstractmethod
    async def _handle(self, event: Event) -> None:
        """The event's effect stands. Sets ``_refusal`` to end the membership, ``_give_up`` to join anew."""

    @abstractmethod
    def _ended(self) -> None:
        """The session is over; whoever waits for something of it must be told."""

    # ---- life

    async def run(self) -> None:
        """Member until cancelled. Cancelled, the cluster is left in order.

        :raises JoinRefused: the members do not want this sheep; the reason is in the log.
        :raises ClusterUnavailable: the first join found no coordination service.
        :raises ConfigError: the driver's options make no sense.
        """
        joined = False
        while True:
            greeting, more = await self._prepare(again=joined)
            try:
                async with self._driver.join(self.state.me, greeting) as session:
                    joined = True
                    await self._serve(session, more)
            except ClusterUnavailable as error:
                if not joined:
                    raise
                logger.warning("cannot join again yet: %s", error)
            except SessionLost:
                joined = True
            finally:
                self._session = None
                self.state.alive = always
                self.state.vdis.born.clear()  # of what is made while we are away we may never hear
                self._older = []
                self._stop_serving()
                self._ended()
                self._tick()
            self._give_up = False
            if self._refusal is not None:
                raise JoinRefused(self._refusal)
            if self.state.status in (ClusterStatus.SHUTDOWN, ClusterStatus.KILLED):
                return
            logger.warning("the session with the cluster ended, joining again")
            await anyio.sleep(REJOIN_S)

    async def _serve(self, session: ClusterSession, more: list[bytes]) -> None:
        self._session = session
        self.state.alive = session.alive
        self.position = self.done = 0
        self._queue.clear()
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            tasks.start_soon(self._read, session, tasks.cancel_scope)
            tasks.start_soon(self._process, tasks.cancel_scope)
            if more:
                tasks.start_soon(self._send_all, more)
        self._tasks = None

    async def _read(self, session: ClusterSession, scope: anyio.CancelScope) -> None:
        try:
            async for event in session.events():
                if isinstance(event, Joined) and event.node.id == self.state.me.id:
                    self._older = [node.id for node in event.view if node.id != event.node.id]
                elif isinstance(event, Left) and event.node.id in self._older:
                    self._older.remove(event.node.id)
                elif isinstance(event, Delivered) and event.sender == self.state.me.id:
                    ping = self._pings.get(event.payload)
                    if ping is not None:
                        ping.set()
                self._queue.append(event)
                self._arrived.set()
        except SessionLost:
            pass
        self._stop_serving()
        scope.cancel()

    def _stop_serving(self) -> None:
        """Nothing is served from here on; called before anything else is done about a lost session."""
        if self.state.status is ClusterStatus.OK:
            self.state.install(status=ClusterStatus.WAIT)

    async def _process(self, scope: anyio.CancelScope) -> None:
        while self._refusal is None and not self._give_up:
            while not self._queue:
                self._arrived = anyio.Event()
                await self._arrived.wait()
            event = self._queue.popleft()
            self.position += 1
            await self._handle(event)
            self.done = self.position
            self._tick()
        scope.cancel()

    def _tick(self) -> None:
        progress, self._progress = self._progress, anyio.Event()
        progress.set()

    # ---- sending

    async def broadcast(self, payload: bytes) -> None:
        """As ``ClusterSession.broadcast``; a lost session stops the service at once."""
        session = self._session
        if session is None:
            raise ClusterUnavailable("this sheep is not a member at the moment")
        try:
            await session.broadcast(payload)
        except SessionLost:
            if self._session is session:
                self._stop_serving()
            raise

    async def driver_status(self, monotonic: Callable[[], float]) -> dict[str, Any]:  # Any: CBOR
        """What an operator wants to know about the driver, in words and numbers. Takes at most about ``PING_S``.

        ``driver``, ``detection_s``; ``session`` (``alive``, ``doubtful``: others may have seen us leave, ``none``);
        ``status``: the driver's own words; ``round_trip_s`` of one broadcast, or ``error``: why there is none.
        """
        session = self._session
        status: dict[str, Any] = {"driver": self._driver.name or type(self._driver).__name__}
        status |= {"detection_s": self._driver.detection_s, "session": "none", "status": {}}
        if session is None:
            return {**status, "error": "this sheep is not a member at the moment"}
        status["session"] = "alive" if session.alive() else "doubtful"
        try:
            with anyio.fail_after(PING_S):
                status["status"] = await session.status()
                status["round_trip_s"] = await self._round_trip(monotonic)
        except TimeoutError:
            status["error"] = f"a broadcast did not come back within {PING_S:.0f} s"
        except (ClusterUnavailable, SessionLost) as error:
            status["error"] = str(error)
        return status

    async def _round_trip(self, monotonic: Callable[[], float]) -> float:
        self._ping_count += 1
        payload = messages.message(messages.PING, self._ping_count)
        seen = self._pings[payload] = anyio.Event()
        try:
            started_s = monotonic()
            await self.broadcast(payload)
            await seen.wait()
            return monotonic() - started_s
        finally:
            del self._pings[payload]

    async def _send_all(self, payloads: list[bytes]) -> None:
        for payload in payloads:
            while True:
                try:
                    await self.broadcast(payload)
                    break
                except SessionLost:
                    return  # the reader sees it too
                except ClusterUnavailable as error:
                    logger.warning("a message to the cluster has to wait: %s", error)
                    await anyio.sleep(RESEND_S)

    def _send_soon(self, kind: str, **fields: object) -> None:
        """A message of that kind is broadcast, after what is being sent, before the session ends."""
        assert self._tasks is not None, "a message without a session"
        self._tasks.start_soon(self._send_all, [messages.message(kind, 0, **fields)])
