"""The replicated log: one Raft server, or a follower of the servers, in a thread of its own.

Entries are CBOR arrays ``[version, kind, ...]``:

* ``RECORD``: a record of ``sheepdog.api.GroupState``.
* ``BEAT session n position digest``: the session lives; its n-th sign of life. When it said so, the digest of all
  entries up to that position was this one.
* ``DEATH session n``: nobody heard of the session after its n-th beat. It counts only if that is still its last beat in
  the log, so a sign of life that was merely late voids the report.

Notes on pysyncobj 0.3.17: batches stay on (without them a paused follower applied entries twice); the batch size is
above our largest entry, because larger ones are cut into pieces whose last one is recognised by the wrong length;
an entry without an answer may still be appended later, so everything that we append may come twice. A leader whose
connections break sends entries again, and the library cuts off whatever a server has behind the place where they begin,
though it may have promised to keep that; and answers do not say which leader they were meant for. Both are mended on
the way in (``_SyncObj__onMessageReceived``). Should copies of the log differ all the same, the digests tell.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import logging
import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import cbor2
import pysyncobj.encryptor
import pysyncobj.journal
import pysyncobj.syncobj
import pysyncobj.utility
from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf, replicated

from sheepdog.api import PAYLOAD_BYTES_MAX, ClusterUnavailable, ConfigError, GroupState, RecordDamaged
from sheepdog_cluster_raft.journal import DurableJournal, JournalDamaged, read_snapshot, write_snapshot
from sheepdog_cluster_raft.options import RaftOptions
from sheepdog_cluster_raft.transport import WHO_VOTES, GuardedTransport

logger = logging.getLogger(__name__)

ENTRY_VERSION = 1
TICK_S = 0.01
JOIN_S = 15.0  # an abandoned join must not keep its own thread, and with it the process, for ever
ENDED_MAX = 1024
BATCH_BYTES = 8 * PAYLOAD_BYTES_MAX
DIGEST_BYTES = 16
DIGESTS_MAX = 4096  # entries that can be compared; a beat is applied long before so many others

pysyncobj.syncobj.createJournal = lambda journal: pysyncobj.journal.MemoryJournal() if journal is None else journal
"""We hand over a journal where the library expects the name of a file."""
_encryptor = functools.lru_cache(maxsize=8)(pysyncobj.encryptor.getEncryptor)
pysyncobj.syncobj.getEncryptor = pysyncobj.utility.getEncryptor = _encryptor
"""The key is derived slowly on purpose; once for each secret is enough."""


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
    :param agrees: whether the sender's copy of the log was like ours when it sent this beat; None if that is unknown.
    """

    position: int
    kind: Kind
    session: bytes
    record: bytes
    number: int
    before: GroupState
    beats: dict[bytes, int]
    counted: bool
    agrees: bool | None = None


def record_entry(record: bytes) -> bytes:
    return cbor2.dumps([ENTRY_VERSION, Kind.RECORD, record])


def beat_entry(session: bytes, number: int, mark: tuple[int, bytes]) -> bytes:
    return cbor2.dumps([ENTRY_VERSION, Kind.BEAT, session, number, *mark])


def death_entry(session: bytes, number: int) -> bytes:
    return cbor2.dumps([ENTRY_VERSION, Kind.DEATH, session, number])


class ReplicatedLog(SyncObj):  # type: ignore[misc]  # the library is not typed
    """What every server computes from the log.

    :param directory: of a follower a scratch directory, of a voter its own.
    :raises JournalDamaged: what is in the directory cannot be used.
    """

    def __init__(self, options: RaftOptions, directory: Path, applied: Callable[[Applied], None]) -> None:
        self._applied = applied
        self.position = 0
        self.digest = bytes(DIGEST_BYTES)
        self.mark = (self.position, self.digest)  # the two together, for other threads
        self.digests: deque[tuple[int, bytes]] = deque(maxlen=DIGESTS_MAX)
        self.state = GroupState()
        self.beats: dict[bytes, int] = {}
        self.ended: dict[bytes, None] = {}  # sessions whose late entries mean nothing, oldest first
        self.failure: str | None = None  # why this copy of the log is none any more
        self._keep_tail = False
        self._journal = DurableJournal(directory, options.self_address) if options.votes else None
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
            journalFile=self._journal,
            fullDumpFile=str(directory / "snapshot"),
            serializer=self._save,
            deserializer=self._restore,
            useFork=False,
            maxBindRetries=3,
            bindRetryTime=0.3,
        )
        others = [voter for voter in options.voters if voter != options.self_address]
        super().__init__(options.self_address if options.votes else None, others, conf, transportClass=GuardedTransport)
        transport: Any = self._SyncObj__transport  # Any: the library is not typed
        transport.setOnUtilityMessageCallback(WHO_VOTES, lambda _, answer: answer(list(options.voters), None))
        if self._journal is not None:
            transport.sync = self._journal.sync
            self.addOnTickCallback(self._journal.sync)  # also where nobody is there to be sent anything
        elif options.answers_at is not None:
            transport.listen(options.answers_at)

    # -- snapshots ----------------------------------------------------------------------------------------------

    def _save(self, path: str, entries: tuple[Any, ...]) -> None:  # Any: entries of the library, and its cluster
        last, before, _ = entries
        record = self.state.snapshot_record(b"", self.position)
        fields = [before, last, self.position, self.digest, record, self.beats, list(self.ended)]
        write_snapshot(Path(path), fields)

    def _restore(self, path: str) -> tuple[Any, ...]:  # Any: as _save
        try:
            before, last, position, digest, record, beats, ended = read_snapshot(Path(path))
            state, _ = GroupState.from_snapshot(record)
        except (JournalDamaged, RecordDamaged, TypeError, ValueError) as error:
            # The library logs it and goes on, with a state that is not that of the log. We do not.
            self.failure = str(error)
            raise
        state.snapshot_at = 0  # of no meaning here, and not in the state of who applied everything itself
        self.position, self.digest, self.state = position, digest, state
        self.beats, self.ended = dict(beats), dict.fromkeys(ended)
        self.digests.clear()
        self._note_digest()
        return tuple(last), tuple(before), ()

    def _note_digest(self) -> None:
        self.digests.append((self.position, self.digest))
        self.mark = (self.position, self.digest)

    def _agrees(self, position: int, digest: bytes) -> bool | None:
        at = position - self.digests[0][0] if self.digests else -1
        return self.digests[at][1] == digest if 0 <= at < len(self.digests) else None

    # -- messages -----------------------------------------------------------------------------------------------

    def _SyncObj__onMessageReceived(self, node: Any, message: dict[str, Any]) -> None:  # Any: the library is not typed
        """The name is what the library calls its own method."""
        if message["type"] == "append_entries" and "entries" in message:
            message = self._only_news(message)
        elif message["type"] == "next_node_idx" and message.get("term", self.raftCurrentTerm) != self.raftCurrentTerm:
            return  # what it had in an earlier term it may not have any more
        try:
            super()._SyncObj__onMessageReceived(node, message)
        finally:
            self._keep_tail = False

    def _only_news(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message without what we have: entries are cut off only from the first one on that is another than ours.

        That is what Raft says (section 5.3 of the paper by Ongaro and Ousterhout).
        """
        log = self._SyncObj__raftLog
        at = message["prevLogIdx"] - log[0][1]
        entries = list(message["entries"])
        if not 0 <= at < len(log) or log[at][2] != message["prevLogTerm"] or message["term"] < self.raftCurrentTerm:
            return message  # the library asks for other entries, or does nothing
        known = 0
        while known < len(entries) and at + 1 < len(log) and tuple(log[at + 1][1:]) == tuple(entries[known][1:]):
            known, at = known + 1, at + 1
        message = {**message, "entries": entries[known:], "prevLogIdx": log[at][1], "prevLogTerm": log[at][2]}
        if known == len(entries) and at + 1 < len(log):
            # All of it is here, and more, of which nothing is said: neither that it is wrong nor that it is right.
            message["commit_index"] = min(message["commit_index"], log[at][1])
            self._keep_tail = True
        return message

    def _SyncObj__getEntries(self, first: int, count: int | None = None, size_max: int | None = None) -> Any:
        """The library cuts off what it finds behind the first entry of a message."""
        if self._keep_tail and count is None and size_max is None:
            count = 1
        return super()._SyncObj__getEntries(first, count, size_max)

    # -- entries ------------------------------------------------------------------------------------------------

    @replicated  # type: ignore[untyped-decorator]  # the library is not typed
    def put(self, entry: bytes) -> bool:
        """Runs on every server, for every entry, in the order of the log. Whether the session is a member then."""
        self.position += 1
        self.digest = hashlib.blake2b(self.digest + entry, digest_size=DIGEST_BYTES).digest()
        self._note_digest()
        before, beats = self.state, dict(self.beats)
        kind, session, record, number = Kind.BEAT, b"", b"", 0
        agrees: bool | None = None
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
                    agrees = self._agrees(*rest[1:])
                elif kind is Kind.DEATH and session in before.members and self.beats.get(session, 0) == number:
                    session, record = self._record(GroupState.leave_record(session))
        except (cbor2.CBORDecodeError, TypeError, ValueError, IndexError, RecordDamaged) as error:
            # Everybody ignores it, so everybody agrees.
            logger.error("raft log entry %d is not understood: %s", self.position, error)
        counted = session in self.state.members
        self._applied(Applied(self.position, kind, session, record, number, before, beats, counted, agrees))
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


def lock(directory: Path) -> int:
    """A descriptor; until it is closed, no other process can vote with this directory.

    :raises OSError: one does, or the directory cannot be written.
    """
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise OSError(error.errno, "another process uses it") from error
    return descriptor


class Server:
    """A :class:`ReplicatedLog` and the thread that runs it."""

    def __init__(self, options: RaftOptions) -> None:
        self._options = options
        self._stopping = False
        self._log: ReplicatedLog | None = None
        self._lock: int | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
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
        if self._options.votes:
            assert self._options.directory is not None, "a voter without a directory"
            directory = Path(self._options.directory)
            try:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock = lock(directory)
            except OSError as error:
                raise ConfigError(f"cannot use raft directory {directory}: {error.strerror}") from error
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="sheepdog-raft-")
            directory = Path(self._scratch.name)
        self._directory = directory
        self._thread.start()
        self._started.wait()
        if isinstance(self._failure, JournalDamaged):
            raise ConfigError(
                f"{self._failure}. While all other voters run, this one can start again with an empty {directory}"
            ) from self._failure
        if self._failure is not None:
            raise ConfigError(
                f"cannot start the raft server {self._options.self_address} in {directory}: {self._failure}; "
                "is another sheep of this host that voter?"
            ) from self._failure

    def _run(self) -> None:
        try:
            log = ReplicatedLog(self._options, self._directory, self._applied)
        except Exception as error:
            # Whatever the library raises: who waits for the start must be told.
            self._failure = error
            self._release()
            self._started.set()
            return
        self._log = log
        self._started.set()
        while not self._stopping and log.failure is None:
            try:
                log.doTick(TICK_S)
            except Exception:
                # The library goes on after its own errors as well; a dead server would help nobody.
                logger.exception("raft server %s", self._options.self_address)
        if log.failure is not None:
            logger.error("raft server %s stops: %s", self._options.self_address, log.failure)
        with contextlib.suppress(Exception):
            log.destroy()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
        if self._scratch is not None:
            self._scratch.cleanup()

    @property
    def mark(self) -> tuple[int, bytes]:
        """Position and digest of the last entry that was applied. Callable from any thread."""
        return self._log.mark if self._log is not None else (0, b"")

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
