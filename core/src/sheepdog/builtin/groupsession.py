"""The half of a cluster session that does not depend on the service.

A bounded queue of events, one broadcast at a time, the clock that says whether we are alive; and the way out of
a library's threads.

A driver derives from :class:`GroupSession`, appends records to its log in ``append`` and hands what it reads from the
log to ``take``, in order.
"""

from __future__ import annotations

import os
import socket
import time
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable

import anyio
import anyio.lowlevel

from sheepdog.api import (
    PAYLOAD_BYTES_MAX,
    ClusterSession,
    Event,
    GroupMember,
    GroupState,
    Joined,
    Left,
    Node,
    PayloadTooLarge,
    SessionLost,
)

EVENTS_MAX = 256  # read ahead of the caller


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
        return _Events(self)

    async def broadcast(self, payload: bytes) -> None:
        if len(payload) > PAYLOAD_BYTES_MAX:
            raise PayloadTooLarge(f"a broadcast of {len(payload)} bytes; {PAYLOAD_BYTES_MAX} are allowed")
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


class _Events(AsyncIterator[Event]):
    """Not a generator: a cancelled ``anext`` leaves it usable, and loses nothing."""

    def __init__(self, session: GroupSession) -> None:
        self._session = session

    async def __anext__(self) -> Event:
        await anyio.lowlevel.checkpoint()
        return await self._session.next_event()
