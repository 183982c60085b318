"""Sessions on ZooKeeper.

The total order is ``ROOT/queue``: persistent sequential znodes, one record each (see ``sheepdog.api.GroupState``). Who
lives is ``ROOT/member``: ephemeral znodes, named by identity, which also makes an identity unique. A vanished member
znode is turned into a leave record by the oldest of the living; the next oldest follow after a moment, in case that one
hangs. ``ROOT/state`` is a snapshot of the membership; what lies before it and was read by everybody is removed.

A snapshot is safe to load, because the joiner creates its member znode first, at no position: a newer snapshot is
written after that, and the one who wrote it sees the znode and removes nothing.

Kazoo's threads only post to the mailbox; every wait is on the event loop. Its session outlives a stopped event loop,
and it learns of an expiry only when it reaches a server again. So ``alive`` trusts neither: it is a clock that moves on
only when a request sent at some moment was answered, because the ensemble keeps the session for the session time from
the arrival of that request.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import cbor2
from kazoo.client import KazooClient, KazooState
from kazoo.exceptions import (
    AuthFailedError,
    BadVersionError,
    ConnectionClosedError,
    ConnectionLoss,
    KazooException,
    NoAuthError,
    NodeExistsError,
    NoNodeError,
    OperationTimeoutError,
    SessionExpiredError,
    SessionMovedError,
)
from kazoo.protocol.states import KeeperState
from kazoo.security import make_digest_acl

from sheepdog.api import (
    ClusterUnavailable,
    ConfigError,
    GroupState,
    Joined,
    Node,
    RecordDamaged,
    ServiceDriver,
    ServiceSession,
    SessionLost,
)
from sheepdog_cluster_zk.options import ZookeeperOptions
from sheepdog_cluster_zk.tls import handshake_failure, tls_context

logger = logging.getLogger(__name__)

ATTEMPT = 0.25  # of the session time, for one attempt to connect to one server
ATTEMPT_S_MIN = 1.0  # a busy server needs a moment
FETCH_BATCH = 32  # requests in flight while reading the queue
RANK_DELAY_S = 0.3  # by which each next oldest member is slower to report a death
GUARD_INTERVAL_S = 5.0  # between two looks at the members without a reason
RETRY_DELAY_S = 0.05
DELETE_BATCH = 100


class ZookeeperDriver(ServiceDriver):
    """The cluster below one path of an ensemble."""

    name = "zookeeper"

    def __init__(self, options: ZookeeperOptions) -> None:
        super().__init__()
        self.options = options
        self.detection_s = detection_s(options.timeout_s)

    def session(self, me: Node) -> ZookeeperSession:
        return ZookeeperSession(self.options, me, self.ended)


def detection_s(session_s: float) -> float:
    """An ensemble drops sessions at its tick, which is at most half of the least session time it grants."""
    return 1.5 * session_s + 1.0


class ZookeeperSession(ServiceSession):
    """One member; one ZooKeeper session, never a second one."""

    def __init__(self, options: ZookeeperOptions, me: Node, ended: set[bytes]) -> None:
        super().__init__(me, f"zookeeper {options.hosts}", options.timeout_s, ended)
        self._options = options
        self._session_id = 0
        self._over = False  # set by kazoo's thread: the ensemble dropped the session
        self._connected = anyio.Event()
        self._queue_dirty = anyio.Event()
        self._members_dirty = anyio.Event()
        self._position = 0  # number of the next queue entry to read
        self._position_told = -1
        self._state_at = 0  # position of the snapshot in ROOT/state, as far as we know
        user, _, password = (options.auth or "").partition(":")
        self._client = KazooClient(
            hosts=options.hosts,
            timeout=options.timeout_s,
            connection_retry={"max_tries": -1, "delay": 0.05, "max_delay": 1.0},
            auth_data=[("digest", options.auth)] if options.auth else None,
            default_acl=[make_digest_acl(user, password, all=True)] if options.auth else None,
            use_ssl=options.tls,
            ca=options.ca,
            certfile=options.cert,
            keyfile=options.key,
            verify_certs=options.verify,
            check_hostname=options.verify,
        )
        self._member_path = f"{options.root}/member/{member_name(me)}"
        self._queue_path = f"{options.root}/queue"
        self._state_path = f"{options.root}/state"

    # -- kazoo --------------------------------------------------------------------------------------------------

    async def _call(self, start: Callable[[], Any]) -> Any:  # Any: kazoo is not typed
        """The result of an asynchronous kazoo call. Cancelled, the call still goes on."""
        result = start()
        done = anyio.Event()
        result.rawlink(lambda _: self.mailbox.post(done.set))
        await done.wait()
        return result.get(block=False)

    async def _insist(self, start: Callable[[], Any]) -> Any:  # Any: kazoo is not typed
        """As ``_call``, repeated while the connection is down.

        :raises SessionLost: the session is over.
        :raises ConfigError: the ensemble refuses us.
        """
        while True:
            self.check_lost()
            try:
                return await self._call(start)
            except (ConnectionLoss, OperationTimeoutError, SessionMovedError):
                await anyio.sleep(RETRY_DELAY_S)
            except (SessionExpiredError, ConnectionClosedError) as error:
                self.lose("the zookeeper session expired")
                raise SessionLost(self.lost) from error
            except (NoAuthError, AuthFailedError) as error:
                raise ConfigError(
                    f"zookeeper {self._options.hosts} denies access to {self._options.root}; check auth="
                ) from error

    def _listen(self, state: str) -> None:
        """Runs in kazoo's thread."""
        if state == KazooState.LOST:
            self._over = True  # alive() must know before the loop comes to it
            self.mailbox.post(self._lost_session)
        elif state == KazooState.CONNECTED:
            self.mailbox.post(self._connected.set)

    def _lost_session(self) -> None:
        self._connected.set()
        self.lose("the zookeeper session expired")

    def _queue_changed(self, _: object) -> None:
        """Runs in kazoo's thread, also when the connection breaks; then the watch is gone and must be set again."""
        self.mailbox.post(lambda: self._queue_dirty.set())

    def _members_changed(self, _: object) -> None:
        """Runs in kazoo's thread."""
        self.mailbox.post(lambda: self._members_dirty.set())

    def _adjust_kazoo(self) -> None:
        """Two things that kazoo has no option for.

        It keeps the granted session time to itself; it is 3/2 of the read timeout that its connect returns. And it
        waits a whole session time for a server that does not answer, be it switched off or just starting; by then the
        session is over, although the next server, or the next attempt, would have answered at once.
        """
        connection: Any = self._client._connection  # Any: kazoo is not typed
        handler = self._client.handler
        connect, invoke, create_connection = connection._connect, connection._invoke, handler.create_connection

        def limit_s() -> float:
            return max(ATTEMPT_S_MIN, self.session_s * ATTEMPT)

        def noting(*args: Any) -> Any:  # Any: passed through
            read_timeout_ms, connect_timeout_ms = connect(*args)
            self.session_s = read_timeout_ms * 1.5 / 1000
            return read_timeout_ms, connect_timeout_ms

        def impatient(timeout_s: float, *args: Any, **options: Any) -> Any:  # Any: passed through
            return invoke(min(timeout_s, limit_s()), *args, **options)

        def create(*args: Any, timeout: float, **options: Any) -> Any:  # Any: passed through
            return create_connection(*args, timeout=min(timeout, limit_s()), **options)

        connection._connect, connection._invoke, handler.create_connection = noting, impatient, create

    # -- joining and leaving ------------------------------------------------------------------------------------

    @property
    def detection_s(self) -> float:
        return detection_s(self.session_s)

    async def begin(self, tasks: anyio.abc.TaskGroup, greeting: bytes) -> None:
        await self._open()
        tasks.start_soon(self.follow)
        with anyio.move_on_after(self._options.connect_timeout_s) as scope:
            await self.enter(greeting)
        if scope.cancelled_caught:
            raise ClusterUnavailable(f"{self.service} does not answer")
        tasks.start_soon(self.beat)
        tasks.start_soon(self.guard)

    async def _open(self) -> None:
        """Connected; our identity is ours; the state is that of some moment in the past, from which to follow."""
        context = tls_context(self._options)  # before kazoo, whose thread would die of a bad file without a word
        self._client.add_listener(self._listen)
        self._adjust_kazoo()
        self._client.start_async()
        with anyio.move_on_after(self._options.connect_timeout_s):
            await self._connected.wait()
            if not self._over:
                self._session_id = self._client.client_id[0]
                for path in (self._queue_path, f"{self._options.root}/member"):
                    with contextlib.suppress(NodeExistsError):
                        await self._insist(partial(self._client.create_async, path, makepath=True))
                await self._claim_identity()
                await self._load()
                return
        if self._client.client_state == KeeperState.AUTH_FAILED:
            raise ConfigError(f"zookeeper {self._options.hosts} does not accept auth=")
        reason = await anyio.to_thread.run_sync(handshake_failure, self._options, context) if context else ""
        raise ClusterUnavailable(
            f"failed to connect to zk server {self._options.hosts} after {self._options.connect_timeout_s:.0f} seconds"
            f"{reason}"
        )

    async def _claim_identity(self) -> None:
        """The ephemeral znode of our identity is ours.

        :raises ConfigError: another session has it.
        """
        asked_s = time.monotonic()
        data = cbor2.dumps([1, self.id, -1])
        while True:
            try:
                await self._insist(lambda: self._client.create_async(self._member_path, data, ephemeral=True))
                break
            except NodeExistsError:
                pass
            try:
                content, stat = await self._insist(lambda: self._client.get_async(self._member_path))
                if stat.ephemeralOwner == self._session_id:
                    break  # our own create, whose answer was lost
                if _member_fields(content)[0] not in self._ended:
                    raise ConfigError(
                        f"Previous zookeeper session exist, shoot myself. Please wait for {self.session_s:.0f} "
                        f"seconds to join me again. ({self.me.id.text} is in use below {self._options.root})"
                    )
                await self._insist(partial(self._client.delete_async, self._member_path, stat.version))
            except (NoNodeError, BadVersionError):
                pass
        self.contact(asked_s)

    async def _load(self) -> None:
        """The state is that of ``ROOT/state``."""
        self.state = GroupState()
        self._position = 0
        with contextlib.suppress(NoNodeError):
            content, _ = await self._insist(lambda: self._client.get_async(self._state_path))
            try:
                self.state, self._position = GroupState.from_snapshot(content)
            except RecordDamaged as error:
                raise ConfigError(
                    f"znode {self._state_path} was not written by this driver ({error}); name another path"
                ) from error
        self._state_at = self._position

    async def say_goodbye(self) -> None:
        with contextlib.suppress(KazooException):
            await super().say_goodbye()

    async def disconnect(self) -> None:
        await anyio.to_thread.run_sync(self._stop, abandon_on_cancel=True)

    def _stop(self) -> None:
        self._client.stop()
        with contextlib.suppress(Exception):  # kazoo raises a bare Exception if its thread is still connecting
            self._client.close()

    # -- the log ------------------------------------------------------------------------------------------------

    async def append(self, record: bytes) -> None:
        started_s = time.monotonic()
        await self._insist(lambda: self._client.create_async(f"{self._queue_path}/", record, sequence=True))
        self.contact(started_s)

    async def follow(self) -> None:
        """Everything in the queue is taken, in order, until the session is lost."""
        try:
            while True:
                self._queue_dirty = anyio.Event()
                names = await self._insist(
                    lambda: self._client.get_children_async(self._queue_path, watch=self._queue_changed)
                )
                new = sorted(name for name in names if int(name) >= self._position)
                for begin in range(0, len(new), FETCH_BATCH):
                    await self._read(new[begin : begin + FETCH_BATCH])
                if not new:
                    if self._is_oldest() and self._position - self._state_at >= self._options.collect_interval:
                        await self._collect()
                    await self._queue_dirty.wait()
        except SessionLost:
            pass
        except (RecordDamaged, KazooException, ConfigError) as error:
            logger.error("zookeeper queue %s cannot be followed: %r", self._queue_path, error)
            self.lose(str(error) or type(error).__name__)

    async def _read(self, names: list[str]) -> None:
        """The entries took effect. They are asked for together and taken in order."""
        results = [self._client.get_async(f"{self._queue_path}/{name}") for name in names]
        for name, result in zip(names, results, strict=True):
            try:
                content = await self._content(f"{self._queue_path}/{name}", result)
            except NoNodeError:
                self.lose("too far behind: what comes next was removed")
                self.check_lost()
            event = await self.take(content)
            self._position = int(name) + 1
            if isinstance(event, Joined):
                self._members_dirty.set()  # it may have died before we knew that it was there

    async def _content(self, path: str, result: Any) -> bytes:  # Any: kazoo is not typed
        try:
            content, _ = await self._call(lambda: result)
        except (ConnectionLoss, OperationTimeoutError, SessionExpiredError, ConnectionClosedError):
            content, _ = await self._insist(partial(self._client.get_async, path))
        return bytes(content)

    # -- who lives ----------------------------------------------------------------------------------------------

    def alive(self) -> bool:
        return not self._over and super().alive()

    async def beat(self) -> None:
        """Asks the ensemble whether our member znode stands, several times per session time."""
        interval_s = self.session_s / 6
        while self.lost is None:
            asked_s = time.monotonic()
            try:
                with anyio.move_on_after(2 * interval_s) as scope:
                    if self._position != self._position_told:
                        position = self._position
                        data = cbor2.dumps([1, self.id, position])
                        stat = await self._call(partial(self._client.set_async, self._member_path, data))
                        self._position_told = position
                    else:
                        stat = await self._call(lambda: self._client.exists_async(self._member_path))
                        if stat is None:
                            raise NoNodeError
                if not scope.cancelled_caught:
                    if stat.ephemeralOwner != self._session_id:
                        raise NoNodeError
                    self.contact(asked_s)
            except NoNodeError:
                self.lose("our member znode is gone")
            except (SessionExpiredError, ConnectionClosedError, AuthFailedError):
                self.lose("the zookeeper session expired")
            except KazooException as error:
                logger.debug("zookeeper heartbeat: %r", error)
            self.give_up()
            await anyio.sleep(max(0.0, interval_s - (time.monotonic() - asked_s)))

    async def guard(self) -> None:
        """Every death is reported: at once by the oldest of the living, by the others if that one does not."""
        missing_since_s: dict[bytes, float] = {}
        try:
            while True:
                self._members_dirty = anyio.Event()
                members = list(self.state.members.values())  # before the list of znodes, which is then at least as new
                names = await self._insist(
                    lambda: self._client.get_children_async(f"{self._options.root}/member", watch=self._members_changed)
                )
                present = set(names)
                living = [member for member in members if member_name(member.node) in present]
                dead = [member for member in members if member_name(member.node) not in present]
                rank = next((i for i, member in enumerate(living) if member.session == self.id), len(living))
                now_s = time.monotonic()
                missing_since_s = {m.session: missing_since_s.get(m.session, now_s) for m in dead}
                for member in dead:
                    if now_s - missing_since_s[member.session] >= rank * RANK_DELAY_S:
                        logger.info("%s is dead: its zookeeper session is gone", member.node.id.text)
                        await self.append(GroupState.leave_record(member.session))
                        missing_since_s[member.session] = time.monotonic() + 1.0  # not again while it is on its way
                with anyio.move_on_after(RANK_DELAY_S / 3 if dead else GUARD_INTERVAL_S):
                    await self._members_dirty.wait()
        except SessionLost:
            pass
        except (KazooException, ConfigError) as error:
            logger.error("zookeeper members of %s cannot be watched: %r", self._options.root, error)
            self.lose(str(error) or type(error).__name__)

    # -- collecting what everybody has read ---------------------------------------------------------------------

    def _is_oldest(self) -> bool:
        return next(iter(self.state.members), None) == self.id

    async def _collect(self) -> None:
        """The snapshot is that of our position; queue entries before it that every member has read are gone."""
        position = self._position
        record = self.state.snapshot_record(self.id, position)
        try:
            try:
                content, stat = await self._insist(lambda: self._client.get_async(self._state_path))
                if GroupState.from_snapshot(content)[1] < position:
                    # another one that thinks it is the oldest must not be overwritten
                    await self._insist(partial(self._client.set_async, self._state_path, record, stat.version))
            except NoNodeError:
                await self._insist(lambda: self._client.create_async(self._state_path, record))
            self._state_at = position
            # after the snapshot: whoever joins from now on and is not listed yet finds the new one
            needed = position
            member_root = f"{self._options.root}/member"
            for name in await self._insist(lambda: self._client.get_children_async(member_root)):
                path = f"{member_root}/{name}"
                with contextlib.suppress(NoNodeError):
                    content, _ = await self._insist(partial(self._client.get_async, path))
                    if name != member_name(self.me):
                        needed = min(needed, _member_fields(content)[1])
            names = await self._insist(lambda: self._client.get_children_async(self._queue_path))
            old = sorted(name for name in names if int(name) < needed)
            for begin in range(0, len(old), DELETE_BATCH):
                transaction = self._client.transaction()
                for name in old[begin : begin + DELETE_BATCH]:
                    transaction.delete(f"{self._queue_path}/{name}")
                await self._insist(partial(_commit_once, transaction))
        except (NodeExistsError, BadVersionError, NoNodeError) as error:
            logger.debug("somebody else collects the queue: %r", error)

    async def status(self) -> dict[str, Any]:
        return {
            "servers": self._options.hosts,
            "path": self._options.root,
            "state": "alive" if self.alive() else f"lost: {self.lost}" if self.lost else "no contact",
            "session": f"{self._session_id:x}",
            "timeout_ms": round(self.session_s * 1000),
            "members": len(self.state.members),
            "position": self._position,
        }


def _commit_once(transaction: Any) -> Any:  # Any: kazoo is not typed
    """A transaction object can be committed once; after a lost connection the rest is left to the next collection."""
    if transaction.committed:
        raise NoNodeError
    return transaction.commit_async()


def member_name(node: Node) -> str:
    """How an identity is named below ``ROOT/member``."""
    family = "IPv6" if ":" in node.id.host else "IPv4"
    return f"{family} ip:{node.id.host} port:{node.id.port}"


def _member_fields(content: bytes) -> tuple[bytes, int]:
    """Session and position of a member znode; a foreign one is somebody's, at no position."""
    try:
        _, session, position = cbor2.loads(content)
        return bytes(session), int(position)
    except (cbor2.CBORDecodeError, TypeError, ValueError):
        return b"", -1
