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
from functools import partial
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread

from sheepdog.api import (
    ClusterUnavailable,
    ConfigError,
    GroupMember,
    GroupState,
    Node,
    RecordDamaged,
    ServiceDriver,
    ServiceSession,
)
from sheepdog_cluster_raft.asking import agreed_voters, ask_voters
from sheepdog_cluster_raft.options import RaftOptions
from sheepdog_cluster_raft.server import Applied, Kind, Server, beat_entry, death_entry, record_entry

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 1.0  # of one attempt to append; a leader that died never answers
RETRY_DELAY_S = 0.05
ASK_AGAIN_S = 0.2
BACKLOG_MAX = 10_000  # entries that wait for the caller of events()


class RaftDriver(ServiceDriver):
    """The cluster of all sheep that know the same voters."""

    name = "raft"

    def __init__(self, options: RaftOptions) -> None:
        super().__init__()
        self.options = options
        self.detection_s = detection_s(options.timeout_s)
        self._known: list[str] = []  # the voters of the last session; who is in the list may be gone since

    def session(self, me: Node) -> RaftSession:
        return RaftSession(self.options, me, self.ended, self._known)


def detection_s(timeout_s: float) -> float:
    return 1.5 * timeout_s + 1.0


class RaftSession(ServiceSession):
    """One member, with a Raft server or follower of its own."""

    disconnect_limit_s = 10.0  # what was started must be stopped: the next session wants the same port and directory

    def __init__(self, options: RaftOptions, me: Node, ended: set[bytes], known: list[str]) -> None:
        """``known``: voters of an earlier session, which may be asked; those of this one take their place."""
        super().__init__(me, f"raft {options.text}", options.timeout_s, ended)
        self._options = options
        self._known = known
        self._server: Server | None = None
        self._position: int | None = None  # of the last entry seen; none before our join
        self._backlog: deque[Applied] = deque()
        self._arrived = anyio.Event()
        self._beats = 0
        self._sent_s: dict[int, float] = {}
        # session -> (number of its last beat, when that was applied here)
        self._heard: dict[bytes, tuple[int, float]] = {}
        self._judging_since_s = float("inf")
        self._latest: Applied | None = None  # the last entry applied here before our join
        self._joining: anyio.CancelScope | None = None  # ends the attempt to join
        self._trouble = ""  # what it waits for, if that is not the leader
        self._differs: set[bytes] = set()  # members whose copy of the log was not like ours when they told last

    # -- joining and leaving ------------------------------------------------------------------------------------

    @property
    def detection_s(self) -> float:
        return detection_s(self.session_s)

    async def begin(self, tasks: anyio.abc.TaskGroup, greeting: bytes) -> None:
        options = await anyio.to_thread.run_sync(self._options.placed, self.me.id.host)
        with anyio.move_on_after(options.connect_timeout_s) as self._joining:
            self._options = await self._agreed(options)
            self._known[:] = self._options.voters
            self.service = f"raft {self._options.text}"
            self._server = Server(self._options)
            # not abandoned: what was started must be stopped
            await anyio.to_thread.run_sync(self._server.start, self._applied)
            tasks.start_soon(self.follow)
            await self.enter(greeting)
        if self._joining.cancelled_caught:
            raise ClusterUnavailable(
                self._trouble
                or f"no raft leader among {self._options.text} answers; do most of them run, with the same secret?"
            )
        tasks.start_soon(self.beat)

    async def _agreed(self, options: RaftOptions) -> RaftOptions:
        """With the voters that run.

        Who does not vote waits until there are any. Who votes waits until all that run count on its vote: those that do
        not would not talk to it, and its elections would only disturb them.

        :raises ConfigError: we do not fit them.
        """
        while True:
            lists = await ask_voters([*options.peers, *self._known], options)
            agreed = await anyio.to_thread.run_sync(agreed_voters, options, lists)
            others = next((one for one in lists if options.votes and options.self_address not in one), None)
            if others is not None:
                self._trouble = (
                    f"the raft voters that run go by {','.join(others)}, without {options.self_address}; start them "
                    f"with the new list {options.text} first, one after the other, and this one afterwards"
                )
            elif lists or options.votes:
                self._trouble = ""
                return agreed
            await anyio.sleep(ASK_AGAIN_S)

    async def enter(self, greeting: bytes, notes: tuple[int, ...] = ()) -> None:
        record = GroupState.join_record(GroupMember(self.id, self.me, notes), greeting)
        while True:
            self._refused = False
            asked_s = time.monotonic()
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
        self.contact(asked_s)

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
            # of no member, so without effect: shows us the end of the log
            await self._put(beat_entry(self.id, probes, self._running.mark))
            now_s = time.monotonic()
            if self._joining is not None:  # somebody answers; the wait for the holder has a bound of its own
                self._joining.deadline = anyio.current_time() + self._options.connect_timeout_s
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

    async def disconnect(self) -> None:
        if self._server is not None:
            self._server.request_stop()
            await anyio.to_thread.run_sync(self._server.stop, abandon_on_cancel=True)

    @property
    def _running(self) -> Server:
        assert self._server is not None, "the server was not started"
        return self._server

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
            self._compare(entry)
            if mine and entry.number in self._sent_s:
                self.contact(self._sent_s[entry.number])
                self._sent_s = {n: s for n, s in self._sent_s.items() if n > entry.number}
        elif entry.record and entry.kind is not Kind.BEAT:
            if len(self._backlog) >= BACKLOG_MAX:
                self.lose("too far behind")
            self._backlog.append(entry)
            self._arrived.set()

    def _compare(self, beat: Applied) -> None:
        """Copies of a log cannot differ. If they do, those that are alone with theirs stop, before they serve from it.

        What they computed goes with the session; the next one begins with what is on disk, or with another's snapshot.
        """
        if beat.agrees is None or beat.session == self.id:
            return
        if beat.agrees:
            self._differs.discard(beat.session)
        else:
            self._differs.add(beat.session)
        others = set(self.state.members) - {self.id}
        self._differs &= others
        if 2 * len(self._differs) > len(others):
            self.lose(f"our copy of the log of {self.service} is not that of the others at entry {beat.position}")

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

            self._running.put(entry, lambda *args, answer=answer: self.mailbox.post(partial(answer, *args)))
            with anyio.move_on_after(ANSWER_TIMEOUT_S):
                await answered.wait()
            if answers and answers[0][0]:
                return answers[0][1]
            await anyio.sleep(RETRY_DELAY_S)

    # -- who lives ----------------------------------------------------------------------------------------------

    async def beat(self) -> None:
        """Tells that we live, and reports those who do not, several times per timeout."""
        timeout_s = self._options.timeout_s
        while self.lost is None:
            now_s = time.monotonic()
            self._beats += 1
            self._sent_s[self._beats] = now_s
            self._send(beat_entry(self.id, self._beats, self._running.mark))
            if not self.alive():
                self._judging_since_s = float("inf")
            elif self._judging_since_s == float("inf"):
                self._judging_since_s = now_s
            for session, member in list(self.state.members.items()):
                number, heard_s = self._heard.setdefault(session, (0, now_s))
                if session != self.id and now_s - max(heard_s, self._judging_since_s) > timeout_s:
                    logger.info("%s is dead: no sign of life for %.1f s", member.node.id.text, now_s - heard_s)
                    self._send(death_entry(session, number))
            self.give_up()
            await anyio.sleep(timeout_s / 6)

    def _send(self, entry: bytes) -> None:
        """Once, without waiting: what is lost is said again at the next beat."""
        with contextlib.suppress(ClusterUnavailable):
            self._running.put(entry, lambda *_: None)

    async def status(self) -> dict[str, Any]:
        return {
            "voters": self._options.text,
            "role": "voter" if self._options.votes else "follower",
            "answers_at": self._options.answers_at,
            "state": "alive" if self.alive() else f"lost: {self.lost}" if self.lost else "no quorum",
            "members": len(self.state.members),
            **self._running.status(),
        }
