"""A whole cluster service in memory, with faults on demand: the fake of the cluster driver contract.

One :class:`MemoryCluster` is one cluster. It has no task of its own: time passes for it whenever a session waits for an
event, so it runs on any anyio backend, and on a mock clock. All delays come from one seed. ::

    hub = MemoryCluster(seed=7, delay_s_max=0.010)
    async with hub.driver().join(node, b"") as session: ...
    hub.pause(node.id); hub.kill(other.id); hub.partition(third.id); hub.heal()
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
import anyio.lowlevel

from sheepdog.builtin.groupsession import EventStream, check_size
from sheepdog.contracts.cluster import (
    ClusterDriver,
    ClusterSession,
    Delivered,
    Event,
    Joined,
    Left,
    Updated,
)
from sheepdog.errors import ClusterUnavailable, ConfigError, SessionLost
from sheepdog.model.node import Node, NodeId

MARGIN = 0.8  # of the session time: after that part without contact a session distrusts itself


class MemoryCluster:
    """The order of one cluster and the sessions that follow it.

    :param delay_s_max: deliveries come up to that much later, for each member at its own random pace.
    :param session_s: a member cut off that long is reported to have left.
    :param detection_s: a killed member is reported within that time.
    """

    def __init__(
        self, *, seed: int = 0, delay_s_max: float = 0.0, session_s: float = 2.0, detection_s: float = 1.0
    ) -> None:
        self.delay_s_max = delay_s_max
        self.session_s = session_s
        self.detection_s = detection_s
        self._random = random.Random(seed)
        self._log: list[tuple[float, Event]] = []  # (time of its place in the order, event)
        self._log_start = 0  # index of the first entry that somebody may still read
        self._members: dict[NodeId, MemorySession] = {}  # oldest first
        self._sessions: list[MemorySession] = []  # all that still read, members or not
        self._unreachable: set[NodeId] = set()
        self._outage = False
        self._changed = anyio.Event()

    def driver(self, options: str = "") -> ClusterDriver:
        """A driver for this cluster; every sheep may have its own."""
        if options:
            raise ConfigError(f"the memory cluster has no options, not {options!r}")
        return MemoryDriver(self)

    @property
    def view(self) -> tuple[Node, ...]:
        """The members at this moment, oldest first."""
        return tuple(session.node for session in self._members.values())

    # -- faults -------------------------------------------------------------------------------------------------

    def pause(self, *ids: NodeId) -> None:
        """The members stand still, as after SIGSTOP: they see nothing, and what they ask for waits."""
        for node_id in ids:
            self._members[node_id].cut_off()
        self._notify()

    def resume(self, *ids: NodeId) -> None:
        """The members go on, or find out that they were reported to have left."""
        self.pass_time()
        for session in self._sessions:
            if session.node.id in ids and session.node.id not in self._unreachable:
                session.reconnect()
        self._notify()

    def partition(self, *ids: NodeId) -> None:
        """These nodes do not reach the service, now and when they join again, until ``heal``."""
        self._unreachable.update(ids)
        for node_id in ids:
            if node_id in self._members:
                self._members[node_id].cut_off()
        self._notify()

    def heal(self, *ids: NodeId) -> None:
        """The nodes, by default all of them, reach the service again."""
        healed = ids or tuple(sorted(self._unreachable))
        self._unreachable.difference_update(healed)
        self.resume(*healed)

    def kill(self, *ids: NodeId) -> None:
        """The members died. Their sessions raise ``SessionLost``; whoever used them should be cancelled as well."""
        for node_id in ids:
            session = self._members[node_id]
            session.report_at_s = anyio.current_time() + self._random.uniform(0.1, 0.9) * self.detection_s
            session.lost = "killed"
        self._notify()

    def expire(self, *ids: NodeId) -> None:
        """The service dropped the sessions: everybody sees ``Left`` now, the members themselves ``SessionLost``."""
        for node_id in ids:
            session = self._members[node_id]
            session.lost = "the session expired"
            self.report(session)

    def delay(self, node_id: NodeId, seconds: float) -> None:
        """From now on this member is told everything that much later."""
        self._members[node_id].extra_delay_s = seconds

    def outage(self, down: bool) -> None:
        """The service answers nobody: joins and broadcasts raise ``ClusterUnavailable``. Sessions stay."""
        self._outage = down
        self._notify()

    # -- used by sessions ---------------------------------------------------------------------------------------

    def pass_time(self) -> None:
        """Whatever was due until now has happened."""
        now_s = anyio.current_time()
        due = [s for s in self._members.values() if s.report_at_s is not None and s.report_at_s <= now_s]
        for session in sorted(due, key=lambda s: (s.report_at_s, s.node.id)):
            self.report(session)

    def next_due_s(self) -> float:
        return min((s.report_at_s for s in self._members.values() if s.report_at_s is not None), default=float("inf"))

    def reachable(self, node_id: NodeId) -> None:
        """:raises ClusterUnavailable: the service does not answer this node."""
        if self._outage or node_id in self._unreachable:
            raise ClusterUnavailable("the memory cluster does not answer")

    def admit(self, session: MemorySession, greeting: bytes) -> None:
        self.pass_time()
        self.reachable(session.node.id)
        holder = self._members.get(session.node.id)
        if holder is not None:
            if holder.lost is None:
                raise ConfigError(f"{session.node.id.text} is in use by another live sheep")
            self.report(holder)
        self._members[session.node.id] = session
        self._sessions.append(session)
        session.index = self._log_start + len(self._log)
        self._append(Joined(session.node, greeting, self.view))

    def is_member(self, session: MemorySession) -> bool:
        return self._members.get(session.node.id) is session

    def report(self, session: MemorySession) -> None:
        """Everybody sees the ``Left`` of ``session``."""
        if self.is_member(session):
            del self._members[session.node.id]
            session.lost = session.lost or "cut off for too long"
            self._append(Left(session.node, self.view))

    def publish(self, session: MemorySession, payload: bytes) -> None:
        self._append(Delivered(session.node.id, payload))

    def replace(self, session: MemorySession, node: Node) -> None:
        session.node = node
        self._append(Updated(node, self.view))

    def forget(self, session: MemorySession) -> None:
        """``session`` reads no more; what only it still had to read is dropped."""
        self._sessions.remove(session)
        self._trim()

    def entry(self, index: int) -> tuple[float, Event] | None:
        """What stands at ``index`` in the order; None if nothing yet."""
        offset = index - self._log_start
        return self._log[offset] if offset < len(self._log) else None

    def _append(self, event: Event) -> None:
        self._log.append((anyio.current_time(), event))
        self._notify()
        self._trim()

    def _trim(self) -> None:
        """Keeps the log from growing for ever; done rarely, because it copies."""
        end = self._log_start + len(self._log)
        needed = min((session.index for session in self._sessions), default=end)
        if needed - self._log_start > 1000:
            del self._log[: needed - self._log_start]
            self._log_start = needed

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def wait(self, until_s: float) -> None:
        """Something changed, or it is ``until_s``, or something is due."""
        changed = self._changed
        deadline_s = min(until_s, self.next_due_s())
        with anyio.CancelScope(deadline=deadline_s):
            await changed.wait()
        self.pass_time()

    def random_delay_s(self) -> float:
        return self._random.uniform(0, self.delay_s_max) if self.delay_s_max else 0.0

    def fork_random(self) -> random.Random:
        return random.Random(self._random.getrandbits(64))


class MemoryDriver(ClusterDriver):
    """Joins one :class:`MemoryCluster`."""

    default_host = "127.0.0.1"

    def __init__(self, hub: MemoryCluster) -> None:
        self.hub = hub
        self.detection_s = hub.detection_s

    def join(self, me: Node, greeting: bytes) -> AbstractAsyncContextManager[ClusterSession]:
        return self._join(me, greeting)

    @asynccontextmanager
    async def _join(self, me: Node, greeting: bytes) -> AsyncIterator[ClusterSession]:
        check_size(greeting, "greeting")
        await anyio.sleep(self.hub.random_delay_s())
        session = MemorySession(self.hub, me)
        self.hub.admit(session, greeting)
        try:
            yield session
        finally:
            session.close()


class MemorySession(ClusterSession):
    """One member of a :class:`MemoryCluster`."""

    def __init__(self, hub: MemoryCluster, node: Node) -> None:
        self.node = node
        self.index = 0
        """Of the next entry of the order that ``events`` gives."""
        self.lost: str | None = None
        self.report_at_s: float | None = None
        self.extra_delay_s = 0.0
        self._hub = hub
        self._random = hub.fork_random()
        self._cut = False
        self._doubt_at_s = float("inf")
        self._visible: tuple[int, float] = (-1, 0.0)  # (index, from when on we may see it)
        self._closed = False

    # -- faults -------------------------------------------------------------------------------------------------

    def cut_off(self) -> None:
        if self.report_at_s is None:
            now_s = anyio.current_time()
            self._cut = True
            self._doubt_at_s = now_s + self._hub.session_s * MARGIN
            self.report_at_s = now_s + self._hub.session_s

    def reconnect(self) -> None:
        if not self._cut:
            return
        if anyio.current_time() >= self._doubt_at_s:
            self.lost = self.lost or "cut off for too long"
            self._hub.report(self)  # it closes its session; nobody waits for the rest of the time
        self._cut = False
        self.report_at_s = None
        self._doubt_at_s = float("inf")

    def close(self) -> None:
        """The others see our ``Left``, unless they have or we cannot tell them."""
        if self._closed:
            return
        self._closed = True
        if self.lost is None and not self._cut:
            self.lost = "the session was left"
            self._hub.report(self)
        self.lost = self.lost or "the session was left"
        self._hub.forget(self)

    # -- the contract -------------------------------------------------------------------------------------------

    def alive(self) -> bool:
        return self.lost is None and anyio.current_time() < self._doubt_at_s

    def events(self) -> AsyncIterator[Event]:
        return EventStream(self.next_event)

    async def status(self) -> dict[str, Any]:
        return {"members": len(self._hub.view), "state": "alive" if self.alive() else "lost"}

    def _check(self) -> None:
        if self.lost is not None:
            raise SessionLost(self.lost)

    async def _in_contact(self) -> None:
        """Nothing keeps us from the service.

        :raises SessionLost: too late.
        """
        self._hub.pass_time()
        self._check()
        while self._cut:
            await self._hub.wait(float("inf"))
            self._check()

    async def broadcast(self, payload: bytes) -> None:
        check_size(payload, "broadcast")
        await self._arrive()
        self._hub.publish(self, bytes(payload))
        await self._answered()

    async def update(self, node: Node) -> None:
        assert node.id == self.node.id, f"{node.id.text} is not {self.node.id.text}"
        await self._arrive()
        self._hub.replace(self, node)
        await self._answered()

    async def _arrive(self) -> None:
        """The request is at the service; cancelled before, nothing happened. No await may follow."""
        self._check()
        await anyio.sleep(self._hub.random_delay_s())
        await self._in_contact()
        self._hub.reachable(self.node.id)

    async def _answered(self) -> None:
        """The answer of the service is back."""
        await anyio.sleep(self._hub.random_delay_s())
        await self._in_contact()

    async def next_event(self) -> Event:
        while True:
            await self._in_contact()
            entry = self._hub.entry(self.index)
            if entry is None:
                await self._hub.wait(float("inf"))
                continue
            placed_s, event = entry
            if self._visible[0] != self.index:
                pace_s = self._random.uniform(0, self._hub.delay_s_max) + self.extra_delay_s
                self._visible = (self.index, max(self._visible[1], placed_s + pace_s))
            if anyio.current_time() < self._visible[1]:
                await self._hub.wait(self._visible[1])
                continue
            self.index += 1
            return event


def nodes_of(events: Sequence[Event]) -> tuple[Node, ...]:
    """The members after ``events``: the view of the last event that has one."""
    return next((event.view for event in reversed(events) if not isinstance(event, Delivered)), ())
