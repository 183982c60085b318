"""Sessions of a local cluster.

Each session follows the log with two cursors. One feeds ``events`` at the pace of the caller; the log itself is the
buffer. The other, the *tail*, is moved to the end whenever membership matters: to know whom to wake, whom to watch, and
whom to report dead. A member is woken by a datagram, and reads the log then; a lost or repeated datagram does no harm.

Deaths are seen at once by the next two members in order of age (ring), which wait for the end of the process through
a process descriptor; and by everybody within ``TICK_S``. A stopped process is found by its heartbeat.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import anyio
import anyio.abc
import anyio.lowlevel

from sheepdog.api import (
    ClusterDriver,
    ClusterSession,
    ClusterUnavailable,
    ConfigError,
    Event,
    EventStream,
    GroupMember,
    GroupState,
    Joined,
    Left,
    Node,
    RecordDamaged,
    SessionLost,
    check_size,
)
from sheepdog_cluster_local import liveness
from sheepdog_cluster_local.liveness import Traces
from sheepdog_cluster_local.options import LocalOptions
from sheepdog_cluster_local.rendezvous import FRAME, LOG_AT, SLOT_COUNT, Cursor, Rendezvous

logger = logging.getLogger(__name__)

TICK_S = 1.0  # at most, between two looks at everybody
MARGIN = 0.8  # of the timeout: after that part without a heartbeat we distrust ourselves
TAKEN_TIMEOUT_S = 0.5  # grace for a process of our identity that is just dying
WATCHED_COUNT = 2
REPLAY_BATCH = 256  # records between two checkpoints while joining
TOUCH_INTERVAL_S = 3600.0


class LocalDriver(ClusterDriver):
    """The cluster of all sheep on this host that name the same file."""

    name = "local"

    detection_s = TICK_S
    default_host = "127.0.0.1"

    def __init__(self, options: LocalOptions) -> None:
        self.options = options

    def join(self, me: Node, greeting: bytes) -> AbstractAsyncContextManager[ClusterSession]:
        return self._join(me, greeting)

    @asynccontextmanager
    async def _join(self, me: Node, greeting: bytes) -> AsyncIterator[ClusterSession]:
        check_size(greeting, "greeting")
        session = LocalSession(self.options, me)
        failure: Exception | None = None
        try:
            try:
                await session.enter(greeting)
            except RecordDamaged as error:
                raise ConfigError(
                    f"cluster file {self.options.file} is damaged ({error}); "
                    "stop all sheep that use it, or name another one: -c local:FILE"
                ) from error
            async with anyio.create_task_group() as tasks:
                session.start(tasks)
                try:
                    yield session
                except Exception as error:
                    failure = error  # leaves the task group as itself, not wrapped into a group
                finally:
                    tasks.cancel_scope.cancel()
        finally:
            session.close()
        if failure is not None:
            raise failure


class LocalSession(ClusterSession):
    """One member. All methods run on the loop; none of the system calls in here waits for another process."""

    def __init__(self, options: LocalOptions, me: Node) -> None:
        self._options = options
        self._me = me
        self._id = os.urandom(16)
        self._timeout_ns = int(options.timeout_s * 1e9)
        self._tick_s = min(TICK_S, options.timeout_s / 5)
        self._space = liveness.pid_space()
        self._file = Rendezvous(options.file)
        self._lost: str | None = None
        self._closed = False
        self._number = 0
        self._joined: Joined | None = None  # our own, until events() handed it out
        self._touched_s = time.monotonic()
        self._watched: dict[bytes, anyio.CancelScope] = {}
        self._tasks: anyio.abc.TaskGroup | None = None
        self._beat_ns = 0
        self._deadline_ns = 0
        self._state = GroupState()
        self._cursor = Cursor(self._file, LOG_AT)
        self._tail_state = GroupState()
        self._tail = Cursor(self._file, LOG_AT)
        try:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
            self._socket.bind(_address(self._id))
        except OSError as error:
            self._file.close()
            raise ClusterUnavailable(f"no socket for cluster file {options.file}: {error.strerror}") from error

    # -- joining and leaving ------------------------------------------------------------------------------------

    async def enter(self, greeting: bytes) -> None:
        """We are a member, and ``events`` will begin with our ``Joined``."""
        with anyio.move_on_after(self._options.enter_timeout_s) as scope:
            while not self._file.try_enter(self._id, time.monotonic_ns()):
                await anyio.sleep(0.005)
        if scope.cancelled_caught:
            raise ClusterUnavailable(
                f"cluster file {self._options.file} is locked by a sheep that does not go on; is it stopped?"
            )
        await self._replay()
        give_up_s = time.monotonic() + TAKEN_TIMEOUT_S
        while True:
            holder = self._state.named(self._me)
            if holder is None:
                if await self._ask(greeting):
                    break
                continue
            reason = self._why_dead(holder)
            if reason is not None:
                self._report(holder, reason)
            elif time.monotonic() > give_up_s:
                raise ConfigError(
                    f"{holder.node.id.text} is in use by another live sheep (pid {Traces.of(holder).pid}) "
                    f"of cluster file {self._options.file}"
                )
            else:
                await anyio.sleep(0.02)
            self._advance_past_foreign()
        self._tail_state = self._state.copy()
        self._tail = Cursor(self._file, self._cursor.position)

    async def _replay(self) -> None:
        """The cursor stands at the end of the log, and its state holds there."""
        for _ in range(100):
            at = self._file.snapshot_position()
            try:
                if at:
                    body = Cursor(self._file, at).next()
                    if body is None:
                        raise RecordDamaged("the snapshot lies beyond the end of the log")
                    self._state, position = GroupState.from_snapshot(body)
                else:
                    self._state, position = GroupState(), LOG_AT
            except RecordDamaged:
                if self._file.snapshot_position() == at:
                    raise
                continue  # it was discarded under our eyes
            # From here on nobody discards what we have to read; unless a newer snapshot came in between.
            self._file.write_slot(self._id, time.monotonic_ns(), position)
            if self._file.snapshot_position() == at:
                break
        else:
            raise ClusterUnavailable(f"cluster file {self._options.file} is compacted too often")
        self._cursor = Cursor(self._file, position)
        count = 0
        while (body := self._cursor.next()) is not None:
            self._state.apply(body)
            count += 1
            if count % REPLAY_BATCH == 0:
                await anyio.lowlevel.checkpoint()

    async def _ask(self, greeting: bytes) -> bool:
        """Whether our join was accepted; if not, somebody has our identity."""
        await anyio.lowlevel.checkpoint()
        started = liveness.pid_started(os.getpid()) or 0
        timeout_ms = max(1, self._timeout_ns // 1_000_000)
        traces = Traces(self._file.slot, os.getpid(), started, self._space, timeout_ms)
        member = GroupMember(self._id, self._me, tuple(traces))
        self._first_beat()
        self._file.append(GroupState.join_record(member, greeting))
        # no await until the end: cancelled before, we never asked; after, we are in and leave
        while (body := self._cursor.next()) is not None:
            event = self._state.apply(body)
            if self._state.session == self._id and not isinstance(event, Left):
                if isinstance(event, Joined):
                    self._joined = event
                    self._wake(self._state)
                    return True
                return False
        raise RecordDamaged("our own join is not in the log")

    def _advance_past_foreign(self) -> None:
        """The cursor moves to the end; we are not a member yet, so every record is about others."""
        while (body := self._cursor.next()) is not None:
            self._state.apply(body)

    def start(self, tasks: anyio.abc.TaskGroup) -> None:
        """The session keeps itself alive in ``tasks``, until they are cancelled."""
        self._tasks = tasks
        self._watch()
        tasks.start_soon(self._keep)

    def close(self) -> None:
        """The others see our ``Left``; nothing of the session works any more. May be called twice."""
        if self._closed:
            return
        self._closed = True
        self._tasks = None
        if self._joined_at_all and self._lost is None:
            with contextlib.suppress(ClusterUnavailable, RecordDamaged, OSError):
                self._file.append(GroupState.leave_record(self._id))
                self._catch_up()
                self._wake(self._tail_state)
        self._lost = self._lost or "the session was left"
        with contextlib.suppress(OSError):
            if self._file.slot >= 0:
                self._file.write_slot(bytes(16), 0, 0)
        # whoever waits in events() must not wait on a descriptor that is gone
        with contextlib.suppress(Exception):
            anyio.notify_closing(self._socket)
        self._socket.close()
        self._file.close()

    @property
    def _joined_at_all(self) -> bool:
        return self._id in self._state.members

    # -- the contract -------------------------------------------------------------------------------------------

    def events(self) -> AsyncIterator[Event]:
        return EventStream(self.next_event)

    async def broadcast(self, payload: bytes) -> None:
        check_size(payload, "broadcast")
        await anyio.lowlevel.checkpoint()
        self._publish(GroupState.send_record(self._id, self._next_number(), bytes(payload)))

    async def update(self, node: Node) -> None:
        assert node.id == self._me.id, f"{node.id.text} is not {self._me.id.text}"
        await anyio.lowlevel.checkpoint()
        self._publish(GroupState.update_record(self._id, self._next_number(), node))

    def _next_number(self) -> int:
        self._number += 1
        return self._number

    def _publish(self, record: bytes) -> None:
        self._check()
        self._file.append(record)
        # A member that joined before our record must be woken: look for it after the append, not before.
        try:
            self._catch_up()
        except RecordDamaged as error:
            self._lose(str(error))
        self._check()  # still within our time: then nobody has reported us, and the record counts
        self._wake(self._tail_state)

    def alive(self) -> bool:
        return self._lost is None and time.monotonic_ns() < self._deadline_ns

    async def status(self) -> dict[str, Any]:
        return {
            "file": self._options.file,
            "state": "alive" if self.alive() else f"lost: {self._lost or 'paused too long'}",
            "members": len(self._tail_state.members),
            "timeout_ms": self._timeout_ns // 1_000_000,
            "log_bytes": 0 if self._closed else self._file.size() - LOG_AT,
        }

    # -- our own life -------------------------------------------------------------------------------------------

    def _first_beat(self) -> None:
        """Nobody judges us before our join record; so this one needs no proof that the last one was in time."""
        self._beat_ns = time.monotonic_ns()
        self._file.write_slot(self._id, self._beat_ns, self._cursor.position)
        self._deadline_ns = self._beat_ns + int(self._timeout_ns * MARGIN)

    def _beat(self) -> None:
        """The others know that we live now.

        The deadline moves only if the new heartbeat was in the file before the old one ran out for everybody else.
        Without the look at the clock after the write, a process stopped between the two clock readings of a write could
        believe in a heartbeat that came too late.
        """
        if not self.alive():
            self._lose("paused or blocked for too long")
            return
        now_ns = time.monotonic_ns()
        self._file.write_slot(self._id, now_ns, self._cursor.position)
        if time.monotonic_ns() < self._deadline_ns:
            self._beat_ns = now_ns
            self._deadline_ns = now_ns + int(self._timeout_ns * MARGIN)
        else:
            self._lose("paused or blocked for too long")

    def _lose(self, reason: str) -> None:
        if self._lost is None:
            self._lost = reason
            logger.warning("lost the session of %s in %s: %s", self._me.id.text, self._options.file, reason)
            self._wake_one(self._id)

    def _check(self) -> None:
        """:raises SessionLost: we may have been reported dead."""
        if not self.alive():
            self._lose("paused or blocked for too long")
            raise SessionLost(f"cluster {self._options.file}: {self._lost}")

    async def _keep(self) -> None:
        """Heartbeat, look at the others, compaction; until the session is lost."""
        while self._lost is None:
            await anyio.sleep(self._tick_s)
            try:
                self._tick()
            except ClusterUnavailable as error:
                logger.warning("%s", error)  # no space: what is due is done at a later tick
            except (RecordDamaged, OSError) as error:
                self._lose(str(error))
        # The slot tells the others at once that there is nothing to wait for.
        with contextlib.suppress(OSError):
            self._file.write_slot(bytes(16), 0, 0)

    def _tick(self) -> None:
        self._beat()
        if not self.alive():
            return
        if not self._file.still_there():
            self._lose("the file was removed or replaced")
            return
        self._sweep()
        if self._cursor.position < self._tail.position:
            self._wake_one(self._id)  # who wrote that could not: it is in another network namespace
        self._compact()
        if time.monotonic() - self._touched_s > TOUCH_INTERVAL_S:
            self._touched_s = time.monotonic()
            self._file.touch()

    # -- the others ---------------------------------------------------------------------------------------------

    def _catch_up(self) -> None:
        """The tail stands at the end of the log."""
        members = self._tail_state.members
        count = len(members)
        changed = False
        while (body := self._tail.next()) is not None:
            changed |= isinstance(self._tail_state.apply(body), Joined | Left)
        if changed or len(members) != count:
            self._watch()

    def _why_dead(self, member: GroupMember) -> str | None:
        if liveness.process_gone(Traces.of(member), self._space):
            return "its process ended"
        return liveness.silent_or_unlocked(self._file, member)

    def _sweep(self) -> None:
        """Everybody who is dead now is reported dead."""
        self._catch_up()
        reported = False
        for member in list(self._tail_state.members.values()):
            if member.session == self._id:
                continue
            reason = liveness.silent_or_unlocked(self._file, member)
            if (
                reason is None
                and member.session in self._watched
                and liveness.process_gone(Traces.of(member), self._space)
            ):
                reason = "its process ended"
            if reason is not None:
                self._report(member, reason)
                reported = True
        if reported:
            self._catch_up()
            self._wake(self._tail_state)

    def _report(self, member: GroupMember, reason: str) -> None:
        logger.info("%s is dead: %s", member.node.id.text, reason)
        self._file.append(GroupState.leave_record(member.session))

    def _watch(self) -> None:
        """Waits for the end of the next ``WATCHED_COUNT`` processes after us."""
        if self._tasks is None or not self._space or self._id not in self._tail_state.members:
            return
        ring = list(self._tail_state.members.values())
        index = next(i for i, member in enumerate(ring) if member.session == self._id)
        wanted = [
            member
            for member in (ring[index + 1 :] + ring[:index])[:WATCHED_COUNT]
            if (traces := Traces.of(member)).pid_space == self._space and traces.pid != os.getpid()
        ]
        sessions = {member.session for member in wanted}
        for session in [session for session in self._watched if session not in sessions]:
            self._watched.pop(session).cancel()
        for member in wanted:
            if member.session not in self._watched:
                scope = self._watched[member.session] = anyio.CancelScope()
                self._tasks.start_soon(self._watch_one, member, scope)

    async def _watch_one(self, member: GroupMember, scope: anyio.CancelScope) -> None:
        with scope:
            traces = Traces.of(member)
            await anyio.lowlevel.checkpoint()  # a scope cancelled before we ran ends here
            try:
                descriptor = os.pidfd_open(traces.pid)
            except ProcessLookupError:
                descriptor = -1
            except OSError as error:
                logger.debug("no descriptor for pid %d: %s", traces.pid, error)
                return  # the tick still looks at it
            try:
                if descriptor >= 0 and liveness.pid_started(traces.pid) == traces.pid_started:
                    await anyio.wait_readable(descriptor)
                    # The end of the last thread comes before the state that /proc shows: ask the descriptor.
                    assert select.select([descriptor], [], [], 0)[0], f"pid {traces.pid} did not end"
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
            try:
                self._catch_up()
                if member.session in self._tail_state.members:
                    self._report(member, "its process ended")
                self._sweep()
                self._wake(self._tail_state)
            except ClusterUnavailable as error:
                logger.warning("%s", error)
            except (RecordDamaged, OSError) as error:
                self._lose(str(error))

    # -- waking -------------------------------------------------------------------------------------------------

    def _wake(self, state: GroupState) -> None:
        for session in state.members:
            self._wake_one(session)
        if self._id not in state.members:
            self._wake_one(self._id)

    def _wake_one(self, session: bytes) -> None:
        # A full queue holds wake-ups enough; a peer in another network namespace finds the log by its tick.
        with contextlib.suppress(OSError):
            self._socket.sendto(b"", _address(session))

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._socket.recv(1)

    # -- compaction ---------------------------------------------------------------------------------------------

    def _compact(self) -> None:
        """The disk space of records that nobody needs is free again, now and then."""
        if self._tail.position - max(self._tail_state.snapshot_at, LOG_AT) < self._options.compact_bytes:
            return
        with self._file.try_compaction_lock() as locked:
            if not locked:
                return
            self._catch_up()
            position = self._tail.position
            record = self._tail_state.snapshot_record(self._id, position)
            self._file.append(record)
            cursor = Cursor(self._file, position)
            while (body := cursor.next()) != record:
                if body is None:
                    raise RecordDamaged("our snapshot is not in the log")
            self._file.publish_snapshot(cursor.position - FRAME.size - len(record))
            self._file.discard_before(min(position, self._needed_from()))
            self._catch_up()

    def _needed_from(self) -> int:
        """The lowest position that a live session still has to read. Sessions that ran out of time do not count."""
        needed = self._cursor.position
        limits_ns = {m.session: Traces.of(m).timeout_ms * 1_000_000 for m in self._tail_state.members.values()}
        for index in range(SLOT_COUNT):
            slot = self._file.read_slot(index)
            if index == self._file.slot or not slot.session.strip(b"\0") or not self._file.slot_locked(index):
                continue
            if time.monotonic_ns() - slot.beat_ns <= limits_ns.get(slot.session, 60_000_000_000):
                needed = min(needed, slot.position)
        return needed

    # -- events -------------------------------------------------------------------------------------------------

    async def next_event(self) -> Event:
        """:raises SessionLost: instead of the next event."""
        while (event := self._ready_event()) is None:
            await self._wait()
        return event

    def _ready_event(self) -> Event | None:
        """The next event in order, or None if there is none yet.

        :raises SessionLost: there will be none.
        """
        self._check()
        if self._joined is not None:
            event: Event | None = self._joined
            self._joined = None
            return event
        try:
            while (body := self._cursor.next()) is not None:
                event = self._state.apply(body)
                # Read first, then look at the clock: in time, nothing that we read was discarded already.
                self._check()
                if event is None:
                    continue
                if isinstance(event, Left) and self._state.session == self._id:
                    self._lose("the others reported us dead")
                    self._check()
                if isinstance(event, Joined | Left):
                    self._catch_up()  # the ring has changed: watch the right neighbours
                return event
        except RecordDamaged as error:
            self._lose(str(error))
            self._check()
        return None

    async def _wait(self) -> None:
        """Something may have happened."""
        try:
            await anyio.wait_readable(self._socket)
        except anyio.ClosedResourceError:
            return  # next_event tells
        if not self._closed:
            self._drain()


def _address(session: bytes) -> bytes:
    return b"\0sheepdog-local-" + session.hex().encode()
