"""The half of a cluster session that does not depend on the service.

A bounded queue of events, one broadcast at a time, the clock that says whether we are alive; and the way out of
a library's threads.

A driver derives from :class:`GroupSession`, appends records to its log in ``append`` and hands what it reads from the
log to ``take``, in order. One whose log is kept by a service derives from :class:`ServiceDriver` and
:class:`ServiceSession`, which bring joining and leaving, and the clock that is moved on by answers of the service.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio
import anyio.abc
import anyio.lowlevel

from sheepdog.api import (
    PAYLOAD_BYTES_MAX,
    ClusterDriver,
    ClusterError,
    ClusterSession,
    ClusterUnavailable,
    ConfigError,
    Event,
    GroupMember,
    GroupState,
    Joined,
    Left,
    Node,
    PayloadTooLarge,
    SessionLost,
)

logger = logging.getLogger(__name__)

EVENTS_MAX = 256  # read ahead of the caller
MARGIN = 0.8  # of the session time: after that part without an answer we distrust ourselves
GIVE_UP = 2.0  # session times without an answer: then the session is lost, whatever the service thinks
GOODBYE_S = 2.0  # for telling the others that we leave; they find out by themselves too


def check_size(payload: bytes, kind: str) -> None:
    """:raises PayloadTooLarge: no driver takes that much as a ``kind``, ``broadcast`` or ``greeting``."""
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise PayloadTooLarge(f"a {kind} of {len(payload)} bytes; {PAYLOAD_BYTES_MAX} are allowed")


class EventStream(AsyncIterator[Event]):
    """Events as ``next_event`` gives them, which loses none when it is cancelled.

    Not a generator: a cancelled ``anext`` leaves it usable.
    """

    def __init__(self, next_event: Callable[[], Awaitable[Event]]) -> None:
        self._next_event = next_event

    async def __anext__(self) -> Event:
        await anyio.lowlevel.checkpoint()
        return await self._next_event()


class Mailbox:
    """Calls from a library's threads, made on the event loop.

    ``post`` never blocks and never fails, whatever state the loop is in; so a callback of the library cannot hang its
    thread. One task of the session sits in ``run``.
    """

    def __init__(self) -> None:
        self._calls: deque[Callable[[], object]] = deque()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._closed = False

    def post(self, call: Callable[[], object]) -> None:
        """``call()`` runs on the loop soon; calls run in the order in which they were posted. Callable anywhere."""
        self._calls.append(call)
        try:
            self._writer.send(b"\0")
        except OSError:
            pass  # full: the loop is awake already; closed: nobody cares any more

    async def run(self) -> None:
        """Makes the calls, until ``close``; also while the task around it is cancelled, since leaving needs answers.

        To be started with ``start_soon``: asyncio's ``start`` would wait for a shielded task if it is cancelled.
        """
        with anyio.CancelScope(shield=True):
            while True:
                while self._calls:
                    self._calls.popleft()()
                if self._closed:
                    break
                await anyio.wait_readable(self._reader)
                try:
                    while self._reader.recv(4096):
                        pass
                except BlockingIOError:
                    pass
        self._reader.close()
        self._writer.close()

    def close(self) -> None:
        """Nothing posted from now on is run; ``run`` ends soon."""
        self.post(self._close)

    def _close(self) -> None:
        self._closed = True


class GroupSession(ClusterSession):
    """A session on a totally ordered log of :class:`GroupState` records."""

    def __init__(self, me: Node) -> None:
        self.me = me
        self.id = os.urandom(16)
        self.state = GroupState()
        self.lost: str | None = None
        self.deadline_s = 0.0
        """Until then, on the monotonic clock, nobody can have reported us dead. The driver moves it on."""
        self._joined = False
        self._refused = False
        self._events: deque[Event] = deque()
        self._changed = anyio.Event()
        self._sending = anyio.Lock()
        self._number = 0

    # -- for the driver -----------------------------------------------------------------------------------------

    @abstractmethod
    async def append(self, record: bytes) -> None:
        """The record has its place in the log. It may stand there more than once.

        Cancelled, or on an error, it may appear there later or never; except for ``ClusterUnavailable``: never.

        :raises SessionLost: we are no member any more.
        :raises ClusterUnavailable: it was not appended.
        """

    async def take(self, record: bytes) -> Event | None:
        """The next record of the log took effect. Waits while the caller of ``events`` is too far behind.

        :returns: the event that it was, also before we joined.
        :raises RecordDamaged: no member writes such a record.
        """
        event = self.state.apply(record)
        mine = self.state.session == self.id
        if not self._joined:
            if mine and isinstance(event, Joined):
                self._joined = True
            else:
                if mine and self.id not in self.state.members:
                    self._refused = True
                    self.notify()
                return event
        if event is None:
            return None
        if mine and isinstance(event, Left):
            self.lose("the others reported us dead")
            return event
        while len(self._events) >= EVENTS_MAX and self.lost is None:
            await self._changed.wait()
        self._events.append(event)
        self.notify()
        return event

    async def enter(self, greeting: bytes, notes: tuple[int, ...] = ()) -> None:
        """We are a member. Somebody else feeds ``take`` meanwhile.

        The driver made sure before that no live session has our identity; one that is still among the members is dead.
        """
        while True:
            self._refused = False
            await self.append(GroupState.join_record(GroupMember(self.id, self.me, notes), greeting))
            await self._verdict()
            if self._joined:
                return
            holder = self.state.named(self.me)
            if holder is not None:
                await self.append(GroupState.leave_record(holder.session))

    async def _verdict(self) -> None:
        """Our join was read from the log, and it counted or it did not."""
        while not (self._joined or self._refused):
            self.check_lost()
            await self._changed.wait()

    @property
    def joined(self) -> bool:
        """Whether our ``Joined`` was read from the log."""
        return self._joined

    def notify(self) -> None:
        """Whoever waits for something looks again."""
        self._changed.set()
        self._changed = anyio.Event()

    def lose(self, reason: str) -> None:
        """The session is over. The first reason counts."""
        if self.lost is None:
            self.lost = reason
            self.notify()

    def check_lost(self) -> None:
        """:raises SessionLost: the session is over."""
        if self.lost is not None:
            raise SessionLost(f"session of {self.me.id.text}: {self.lost}")

    # -- the contract -------------------------------------------------------------------------------------------

    def alive(self) -> bool:
        return self.lost is None and time.monotonic() < self.deadline_s

    def events(self) -> AsyncIterator[Event]:
        return EventStream(self.next_event)

    async def broadcast(self, payload: bytes) -> None:
        check_size(payload, "broadcast")
        async with self._sending:  # numbers must reach the log in order
            self.check_lost()
            self._number += 1
            await self.append(GroupState.send_record(self.id, self._number, bytes(payload)))

    async def update(self, node: Node) -> None:
        assert node.id == self.me.id, f"{node.id.text} is not {self.me.id.text}"
        async with self._sending:
            self.check_lost()
            self._number += 1
            await self.append(GroupState.update_record(self.id, self._number, node))

    async def next_event(self) -> Event:
        """:raises SessionLost: instead of the next event, also while events wait that were read before."""
        while True:
            self.check_lost()
            if self._events:
                event = self._events.popleft()
                if len(self._events) == EVENTS_MAX - 1:
                    self.notify()
                return event
            await self._changed.wait()


class ServiceSession(GroupSession):
    """A session whose log is kept by a service, which a library with threads of its own talks to.

    :param service: what messages call it, with its address.
    :param session_s: the service, or the other members, count us out when they did not hear of us for that long. To be
        corrected when the service grants another time.
    :param ended: sessions of this process that are over, though the service may not know yet.
    """

    disconnect_limit_s = 2.0
    """For the threads of the library. They need milliseconds, but what they wait for may hang."""

    def __init__(self, me: Node, service: str, session_s: float, ended: set[bytes]) -> None:
        super().__init__(me)
        self.mailbox = Mailbox()
        self.service = service
        self.session_s = session_s
        self._ended = ended
        self._contact_s = time.monotonic()
        self._closed = False

    @property
    @abstractmethod
    def detection_s(self) -> float:
        """As ``ClusterDriver.detection_s``, for the session time that was granted."""

    @abstractmethod
    async def begin(self, tasks: anyio.abc.TaskGroup, greeting: bytes) -> None:
        """We are a member, and what works for the session is in ``tasks``. Ends in bounded time.

        :raises ConfigError: as ``join``.
        :raises ClusterUnavailable: as ``join``.
        :raises SessionLost: as soon as it began.
        """

    async def say_goodbye(self) -> None:
        """The others see our ``Left``. Called once, while we are a member."""
        await self.append(GroupState.leave_record(self.id))

    @abstractmethod
    async def disconnect(self) -> None:
        """What ``begin`` opened is closed, whatever had come of it."""

    async def aclose(self) -> None:
        """The others see our ``Left`` soon; nothing is open any more. Ends in bounded time."""
        if self._closed:
            return
        self._closed = True
        with anyio.move_on_after(GOODBYE_S, shield=True):
            if self.lost is None and self.joined:
                with contextlib.suppress(ClusterError, ConfigError):
                    await self.say_goodbye()
        self.lose("the session was left")
        self._ended.add(self.id)
        with anyio.move_on_after(self.disconnect_limit_s, shield=True) as scope:
            await self.disconnect()
        if scope.cancelled_caught:
            logger.info("the connection to %s does not end; it is left behind", self.service)

    def contact(self, asked_s: float) -> None:
        """What we asked at ``asked_s`` was answered: nobody can count us out before a session time from then."""
        self._contact_s = max(self._contact_s, asked_s)
        self.deadline_s = self._contact_s + self.session_s * MARGIN

    def give_up(self) -> None:
        """To be called now and then: the session is lost if there was no answer for too long."""
        if time.monotonic() - self._contact_s > GIVE_UP * self.session_s:
            self.lose(f"no answer from {self.service} for {GIVE_UP * self.session_s:.1f} s")


class ServiceDriver(ClusterDriver):
    """Joins with sessions that ``session`` makes."""

    def __init__(self) -> None:
        self.ended: set[bytes] = set()

    @abstractmethod
    def session(self, me: Node) -> ServiceSession:
        """A session that has not opened anything yet; ``ended`` is for it."""

    def join(self, me: Node, greeting: bytes) -> AbstractAsyncContextManager[ClusterSession]:
        return self._join(me, greeting)

    @asynccontextmanager
    async def _join(self, me: Node, greeting: bytes) -> AsyncIterator[ClusterSession]:
        check_size(greeting, "greeting")
        session = self.session(me)
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:
            try:
                tasks.start_soon(session.mailbox.run)
                try:
                    await session.begin(tasks, greeting)
                except SessionLost as error:
                    raise ClusterUnavailable(f"{session.service}: {error}") from error
                self.detection_s = session.detection_s
                yield session
            except Exception as error:
                failure = error  # leaves the task group as itself, not wrapped into a group
            finally:
                try:
                    await session.aclose()
                finally:  # else the group would wait for the mailbox for ever
                    session.mailbox.close()
                    tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure
