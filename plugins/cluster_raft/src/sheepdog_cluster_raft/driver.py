"""Sessions on a replicated log of our own.

Every member appends signs of life to the log, several per timeout. A member whose last one was applied here longer ago
than the timeout is reported dead, by all who see it so; see ``server`` for why a late report does no harm. Our own
clock counts from the moment when we *sent* our last applied sign of life, which is before anybody else applied it.

Nobody is judged while no entry of ours is applied (no leader, no quorum, paused), nor in the timeout after that.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from sheepdog.api import (
    PAYLOAD_BYTES_MAX,
    ClusterDriver,
    ClusterSession,
    ClusterUnavailable,
    ConfigError,
    GroupMember,
    GroupSession,
    GroupState,
    Mailbox,
    Node,
    PayloadTooLarge,
    RecordDamaged,
    SessionLost,
)
from sheepdog_cluster_raft.options import RaftOptions
from sheepdog_cluster_raft.server import Applied, Kind, Server, beat_entry, death_entry, record_entry

logger = logging.getLogger(__name__)

MARGIN = 0.8  # of the timeout: after that part without an applied sign of life we distrust ourselves
GIVE_UP = 2.0  # timeouts: then the session is lost, whatever the others think
CLEANUP_S = 2.0
STOP_S = 10.0  # for the server's thread; it needs milliseconds, but a disk may hang
ANSWER_TIMEOUT_S = 1.0  # of one attempt to append; a leader that died never answers
RETRY_DELAY_S = 0.05
BACKLOG_MAX = 10_000  # entries that wait for the caller of events()


class RaftDriver(ClusterDriver):
    """The cluster of all sheep that know the same voters."""

    name = "raft"

    def __init__(self, options: RaftOptions) -> None:
        self.options = options
        self.detection_s = 1.5 * options.timeout_s + 1.0
        self._ended: set[bytes] = set()  # sessions of ours that are over, though the others may not know yet

    def join(self, me: Node, greeting: bytes) -> AbstractAsyncContextManager[ClusterSession]:
        return self._join(me, greeting)

    @asynccontextmanager
    async def _join(self, me: Node, greeting: bytes) -> AsyncIterator[ClusterSession]:
        if len(greeting) > PAYLOAD_BYTES_MAX:
            raise PayloadTooLarge(f"a greeting of {len(greeting)} bytes; {PAYLOAD_BYTES_MAX} are allowed")
        session = RaftSession(self.options, me, self._ended)
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:
            try:
                tasks.start_soon(session.mailbox.run)
                try:
                    await session.open()
                    tasks.start_soon(session.follow)
                    with anyio.move_on_after(self.options.connect_timeout_s) as scope:
                        session.joining = scope
                        await session.enter(greeting)
                    if scope.cancelled_caught:
                        raise ClusterUnavailable(f"no raft leader among {self.options.text} answers")
                except SessionLost as error:
                    raise ClusterUnavailable(f"raft {self.options.text}: {error}") from error
                tasks.start_soon(session.beat)
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


class RaftSession(GroupSession):
    """One member, with a Raft server or follower of its own."""

    def __init__(self, options: RaftOptions, me: Node, ended: set[bytes]) -> None:
        super().__init__(me)
        self.mailbox = Mailbox()
        self._options = options
        self._ended = ended
        self._server = Server(options)
        self._opened = False
        self._closed = False
        self._position: int | None = None  # of the last entry seen; none before our join
        self._backlog: deque[Applied] = deque()
        self._arrived = anyio.Event()
        self._beats = 0
        self._sent_s: dict[int, float] = {}
        self._contact_s = 0.0
        # session -> (number of its last beat, when that was applied here)
        self._heard: dict[bytes, tuple[int, float]] = {}
        self._judging_since_s = float("inf")
        self._latest: Applied | None = None  # the last entry applied here before our join
        self.joining: anyio.CancelScope | None = None  # ends the attempt to join

    # -- joining and leaving ------------------------------------------------------------------------------------

    async def open(self) -> None:
        """The server runs.

        :raises ConfigError: its directory or address cannot be used.
        """
        self._opened = True
        # not abandoned: what was started must be stopped
        await anyio.to_thread.run_sync(self._server.start, self._applied)
        self._contact_s = time.monotonic()

    async def enter(self, greeting: bytes, notes: tuple[int, ...] = ()) -> None:
        record = GroupState.join_record(GroupMember(self.id, self.me, notes), greeting)
        while True:
            self._refused = False
            self._contact_s = time.monotonic()
            await self.append(record)
            await self._verdict()
            if self._joined:
                break
            holder = self.state.named(self.me)
            if holder is None:
                continue
            if holder.session in self._ended:
                await self.append(GroupState.leave_record(holder.session))
            else:
                await self._outlast(holder.session)
        self._contact(self._contact_s)

    async def _outlast(self, holder: bytes) -> None:
        """The session that has our identity is a member no longer: it fell silent for the timeout, as all can see.

        It may be our own from before a crash or a restart of all, when nobody else is left to report it.

        :raises ConfigError: it lives.
        """
        timeout_s = self._options.timeout_s
        logger.info("%s was in use a moment ago, waiting up to %.1f s", self.me.id.text, timeout_s)
        first = number = self._last_beat(holder)
        silent_since_s = time.monotonic()
        probes = 0
        while True:
            started_s = time.monotonic()
            probes += 1
            await self._put(beat_entry(self.id, probes))  # of no member, so without effect: shows us the end of the log
            now_s = time.monotonic()
            if self.joining is not None:  # somebody answers; the wait for the holder has a bound of its own
                self.joining.deadline = anyio.current_time() + self._options.connect_timeout_s
            assert self._latest is not None, "an entry was applied, but none was seen"
            if holder not in self._latest.before.members:
                return
            last = self._last_beat(holder)
            # One beat may have been under way when its sender died.
            if last > first + 1:
                raise ConfigError(
                    f"{self.me.id.text} is in use by another sheep of raft {self._options.text}, which is alive"
                )
            if last != number or now_s - started_s > timeout_s / 3:  # without a quorum nobody could be heard
                number, silent_since_s = last, now_s
            if now_s - silent_since_s > timeout_s:
                await self._put(death_entry(holder, number))
            await anyio.sleep(timeout_s / 6)

    def _last_beat(self, session: bytes) -> int:
        return self._latest.beats.get(session, 0) if self._latest is not None else 0

    async def aclose(self) -> None:
        """The others see our ``Left`` soon; the server has stopped."""
        if self._closed:
            return
        self._closed = True
        with anyio.move_on_after(CLEANUP_S, shield=True):
            if self.lost is None and self.joined:
                with contextlib.suppress(SessionLost, ClusterUnavailable):
                    await self.append(GroupState.leave_record(self.id))
        self.lose("the session was left")
        self._ended.add(self.id)
        if self._opened:
            self._server.request_stop()
            with anyio.move_on_after(STOP_S, shield=True) as scope:
                await anyio.to_thread.run_sync(self._server.stop, abandon_on_cancel=True)
            if scope.cancelled_caught:
                logger.warning("the raft server does not end; it is left behind")

    # -- the log ------------------------------------------------------------------------------------------------

    def _applied(self, entry: Applied) -> None:
        """Runs in the server's thread."""
        self.mailbox.post(partial(self._arrive, entry))

    def _arrive(self, entry: Applied) -> None:
        now_s = time.monotonic()
        mine = entry.session == self.id
        if self._position is None:
            self._latest = entry
            if entry.kind is Kind.RECORD and mine:
                self._backlog.append(entry)
                if entry.counted:  # our join: from here on everything matters
                    self._position = entry.position
                    self._heard = {session: (number, now_s) for session, number in entry.beats.items()}
                self._arrived.set()
            return
        if entry.position != self._position + 1:
            self.lose("too far behind: the log was replaced by a snapshot")
            return
        self._position = entry.position
        if entry.kind is Kind.BEAT and entry.counted:
            self._heard[entry.session] = (entry.number, now_s)
            if mine and entry.number in self._sent_s:
                self._contact(self._sent_s[entry.number])
                self._sent_s = {n: s for n, s in self._sent_s.items() if n > entry.number}
        elif entry.record and entry.kind is not Kind.BEAT:
            if len(self._backlog) >= BACKLOG_MAX:
                self.lose("too far behind")
            self._backlog.append(entry)
            self._arrived.set()

    async def follow(self) -> None:
        """Everything in the log is taken, in order, until the session is lost."""
        try:
            while self.lost is None:
                while not self._backlog:
                    self._arrived = anyio.Event()
                    await self._arrived.wait()
                entry = self._backlog.popleft()
                if not self.joined:
                    self.state = entry.before.copy()
                await self.take(entry.record)
        except RecordDamaged as error:  # the servers would have ignored it
            self.lose(str(error))

    async def append(self, record: bytes) -> None:
        counted = await self._put(record_entry(record))
        if self.joined and not counted and not self._closed:
            self.lose("the others reported us dead")
            self.check_lost()

    async def _put(self, entry: bytes) -> bool:
        """The entry was applied here. Whether its session was a member then.

        An attempt without an answer is repeated; the entry may then be in the log twice.
        """
        while True:
            self.check_lost()
            answers: list[tuple[bool, bool]] = []
            answered = anyio.Event()

            def answer(applied: bool, member: bool, answers: Any = answers, answered: Any = answered) -> None:
                answers.append((applied, member))
                answered.set()

            self._server.put(entry, lambda *args, answer=answer: self.mailbox.post(partial(answer, *args)))
            with anyio.move_on_after(ANSWER_TIMEOUT_S):
                await answered.wait()
            if answers and answers[0][0]:
                return answers[0][1]
            await anyio.sleep(RETRY_DELAY_S)

    # -- who lives ----------------------------------------------------------------------------------------------

    def _contact(self, sent_s: float) -> None:
        """What we sent at ``sent_s`` was applied."""
        self._contact_s = max(self._contact_s, sent_s)
        self.deadline_s = self._contact_s + self._options.timeout_s * MARGIN

    async def beat(self) -> None:
        """Tells that we live, and reports those who do not, several times per timeout."""
        timeout_s = self._options.timeout_s
        while self.lost is None:
            now_s = time.monotonic()
            self._beats += 1
            self._sent_s[self._beats] = now_s
            self._send(beat_entry(self.id, self._beats))
            if not self.alive():
                self._judging_since_s = float("inf")
            elif self._judging_since_s == float("inf"):
                self._judging_since_s = now_s
            for session, member in list(self.state.members.items()):
                number, heard_s = self._heard.setdefault(session, (0, now_s))
                if session != self.id and now_s - max(heard_s, self._judging_since_s) > timeout_s:
                    logger.info("%s is dead: no sign of life for %.1f s", member.node.id.text, now_s - heard_s)
                    self._send(death_entry(session, number))
            if now_s - self._contact_s > GIVE_UP * timeout_s:
                self.lose(f"no quorum among {self._options.text} for {GIVE_UP * timeout_s:.1f} s")
            await anyio.sleep(timeout_s / 6)

    def _send(self, entry: bytes) -> None:
        """Once, without waiting: what is lost is said again at the next beat."""
        with contextlib.suppress(ClusterUnavailable):
            self._server.put(entry, lambda *_: None)

    async def status(self) -> dict[str, Any]:
        return {
            "voters": self._options.text,
            "role": "voter" if self._options.self_address else "follower",
            "state": "alive" if self.alive() else f"lost: {self.lost}" if self.lost else "no quorum",
            "members": len(self.state.members),
            **self._server.status(),
        }
