"""The replicated log: one Raft server, or a follower of the servers, in a thread of its own.

Entries are CBOR arrays ``[version, kind, ...]``:

* ``RECORD``: a record of ``sheepdog.api.GroupState``.
* ``BEAT session n``: the session lives; its n-th sign of life.
* ``DEATH session n``: nobody heard of the session after its n-th beat. It counts only if that is still its last beat in
  the log, so a sign of life that was merely late voids the report.

Notes on pysyncobj 0.3.17: batches stay on (without them a paused follower applied entries twice); the batch size is
above our largest entry, because larger ones are cut into pieces whose last one is recognised by the wrong length;
an entry without an answer may still be appended later, so everything that we append may come twice.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import cbor2
from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, replicated

from sheepdog.api import PAYLOAD_BYTES_MAX, ClusterUnavailable, ConfigError, GroupState, RecordDamaged
from sheepdog_cluster_raft.options import RaftOptions

logger = logging.getLogger(__name__)

ENTRY_VERSION = 1
TICK_S = 0.01
JOIN_S = 15.0  # an abandoned join must not keep its own thread, and with it the process, for ever
ENDED_MAX = 1024
BATCH_BYTES = 8 * PAYLOAD_BYTES_MAX


class Kind(IntEnum):
    RECORD = 1
    BEAT = 2
    DEATH = 3


@dataclass(frozen=True, slots=True)
class Applied:
    """An entry of the log, as it took effect here.

    :param position: counts all entries from the beginning, without gaps; a gap means that a snapshot took their place.
    :param record: of ``GroupState``; empty if the entry is none and causes none.
    :param before: the state before it; not to be changed.
    :param beats: number of the last beat of each member.
    :param counted: ``session`` is a member now.
    """

    position: int
    kind: Kind
    session: bytes
    record: bytes
    number: int
    before: GroupState
    beats: dict[bytes, int]
    counted: bool


def record_entry(record: bytes) -> bytes:
    return cbor2.dumps([ENTRY_VERSION, Kind.RECORD, record])


def beat_entry(session: bytes, number: int) -> bytes:
    return cbor2.dumps([ENTRY_VERSION, Kind.BEAT, session, number])


def death_entry(session: bytes, number: int) -> bytes:
    return cbor2.dumps([ENTRY_VERSION, Kind.DEATH, session, number])


class ReplicatedLog(SyncObj):  # type: ignore[misc]  # the library is not typed
    """What every server computes from the log. Attributes set after ``super().__init__`` are part of snapshots."""

    def __init__(self, options: RaftOptions, applied: Callable[[Applied], None]) -> None:
        self._applied = applied
        directory = options.directory
        conf = SyncObjConf(
            autoTick=False,
            password=options.password,
            raftMinTimeout=options.election_s,
            raftMaxTimeout=3.5 * options.election_s,
            appendEntriesPeriod=TICK_S,
            appendEntriesUseBatch=True,
            appendEntriesBatchSizeBytes=BATCH_BYTES,
            commandsWaitLeader=False,
            connectionRetryTime=0.3,
            leaderFallbackTimeout=1.5,
            journalFile=os.path.join(directory, "journal") if directory else None,
            fullDumpFile=os.path.join(directory, "snapshot") if directory else None,
            useFork=False,
            maxBindRetries=3,
            bindRetryTime=0.3,
        )
        others = [voter for voter in options.voters if voter != options.self_address]
        super().__init__(options.self_address, others, conf)
        self.position = 0
        self.state = GroupState()
        self.beats: dict[bytes, int] = {}
        self.ended: dict[bytes, None] = {}  # sessions whose late entries mean nothing, oldest first

    @replicated  # type: ignore[untyped-decorator]  # the library is not typed
    def put(self, entry: bytes) -> bool:
        """Runs on every server, for every entry, in the order of the log. Whether the session is a member then."""
        self.position += 1
        before, beats = self.state, dict(self.beats)
        kind, session, record, number = Kind.BEAT, b"", b"", 0
        try:
            version, code, content, *rest = cbor2.loads(entry)
            if version != ENTRY_VERSION:
                raise ValueError(f"entry version {version} is unknown")
            kind = Kind(code)
            if kind is Kind.RECORD:
                session, record = self._record(content)
            else:
                session, number = content, int(rest[0])
                if kind is Kind.BEAT and session in before.members:
                    self.beats[session] = number
                elif kind is Kind.DEATH and session in before.members and self.beats.get(session, 0) == number:
                    session, record = self._record(GroupState.leave_record(session))
        except (cbor2.CBORDecodeError, TypeError, ValueError, IndexError, RecordDamaged) as error:
            # Everybody ignores it, so everybody agrees.
            logger.error("raft log entry %d is not understood: %s", self.position, error)
        counted = session in self.state.members
        self._applied(Applied(self.position, kind, session, record, number, before, beats, counted))
        return counted

    def _record(self, record: bytes) -> tuple[bytes, bytes]:
        """The record took effect: its session, and the record itself or nothing if it comes too late."""
        after = self.state.copy()
        after.apply(record)
        session = after.session
        if session in self.ended:
            return session, b""
        if session in self.state.members and session not in after.members:
            self.beats.pop(session, None)
            self.ended[session] = None
            if len(self.ended) > ENDED_MAX:
                del self.ended[next(iter(self.ended))]
        self.state = after
        return session, record


class Server:
    """A :class:`ReplicatedLog` and the thread that runs it."""

    def __init__(self, options: RaftOptions) -> None:
        self._options = options
        self._stopping = False
        self._log: ReplicatedLog | None = None
        self._started = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="sheepdog-raft", daemon=True)
        self._applied: Callable[[Applied], None] = lambda _: None

    def start(self, applied: Callable[[Applied], None] | None = None) -> None:
        """The server runs. Blocks for about a second at most. ``applied`` is called in its thread.

        :raises ConfigError: the directory or the address cannot be used.
        """
        if applied is not None:
            self._applied = applied
        if self._options.directory:
            try:
                os.makedirs(self._options.directory, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"cannot use raft directory {self._options.directory}: {error.strerror}") from error
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            raise ConfigError(
                f"cannot start the raft server {self._options.self_address} in {self._options.directory}: "
                f"{self._failure}"
            ) from self._failure

    def _run(self) -> None:
        try:
            log = ReplicatedLog(self._options, self._applied)
        except Exception as error:
            # Whatever a damaged journal makes the library raise: who waits for the start must be told.
            self._failure = error
            self._started.set()
            return
        self._log = log
        self._started.set()
        while not self._stopping:
            try:
                log.doTick(TICK_S)
            except Exception:
                # The library goes on after its own errors as well; a dead server would help nobody.
                logger.exception("raft server %s", self._options.self_address)
        with contextlib.suppress(Exception):
            log.destroy()

    def put(self, entry: bytes, done: Callable[[bool, bool], None]) -> None:
        """The entry is on its way. ``done(applied, member)`` is called in the server's thread, perhaps never.

        Not applied means: not yet; most reasons do not exclude that it is later.

        :raises ClusterUnavailable: the server does not run.
        """
        if self._log is None or self._stopping:
            raise ClusterUnavailable("the raft server does not run")
        self._log.put(entry, callback=lambda member, reason: done(reason == FAIL_REASON.SUCCESS, bool(member)))

    def status(self) -> dict[str, Any]:  # Any: as the contract
        """Leader and size of the log; momentary values, taken from another thread."""
        log = self._log
        if log is None:
            return {}
        leader = log._getLeader()
        return {
            "leader": leader.id if leader is not None else None,
            "quorum": bool(log.hasQuorum),
            "applied": int(log.raftLastApplied),
            "log": int(log._getRaftLogSize()),
        }

    def request_stop(self) -> None:
        """The thread ends soon."""
        self._stopping = True

    def stop(self) -> None:
        """The thread has ended, if it was ever started; one that hangs is left behind after ``JOIN_S``."""
        self._stopping = True
        if self._thread.ident is not None:
            self._thread.join(JOIN_S)
