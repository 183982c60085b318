"""Sessions on etcd.

The total order is that of etcd's revisions below one prefix; a watch delivers it. Transactions decide everything:

=====================  ==========================================================================================
``PREFIX/member/ID``   the record of a member, bound to its lease. Its deletion is the ``Left``, so a death needs
                       nobody to report it. Its create revision is the age of the member.
``PREFIX/join/ID``     created together with the former; this is the ``Joined``, with the greeting, which may be large
                       and which nobody needs later
``PREFIX/number/ID``   number of the member's last broadcast or update; makes a repeated attempt harmless
``PREFIX/log``         the last broadcast or update; each is one revision of this key
=====================  ==========================================================================================

A broadcast is placed only if the member key still has our create revision, so nothing of us follows our ``Left``. Who
joins reads all members in the transaction that creates its own key, and watches from the next revision. Nothing
accumulates below the prefix; old revisions go when etcd compacts. A watch that broke and cannot be continued because
of a compaction ends the session, since what it missed cannot be known.

The library blocks, so its calls run on worker threads; its watch thread only posts to the mailbox.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import anyio.abc
import anyio.to_thread
import cbor2
import grpc
from etcd3.client import Endpoint, MultiEndpointEtcd3Client
from etcd3.events import DeleteEvent
from etcd3.exceptions import Etcd3Exception, RevisionCompactedError
from etcd3.utils import prefix_range_end, to_bytes

from sheepdog.api import (
    ClusterUnavailable,
    ConfigError,
    GroupMember,
    GroupState,
    Node,
    RecordDamaged,
    ServiceDriver,
    ServiceSession,
    SessionLost,
)
from sheepdog_cluster_etcd.options import EtcdOptions

logger = logging.getLogger(__name__)

EXPIRY_S = 1.5  # at most between the end of a lease and its removal: etcd looks for them twice a second
RETRY_DELAY_S = 0.1
SILENT_BEATS = 3
BOUND_EXTRA_S = 3.0  # etcd looks for expired leases twice a second, and may be slow
ENDPOINT_RETRY_S = 0.3  # the library's default of 300 s would outlast any lease
THREADS_MAX = 6
BACKLOG_MAX = 10_000  # watch responses that wait for the caller of events()
CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", -1),  # what a watch has to catch up with comes in one message
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 1000),  # the default of two minutes would outlast any lease
    ("grpc.use_local_subchannel_pool", 1),  # two sessions of one process share no fate
]
REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT)


class EtcdDriver(ServiceDriver):
    """The cluster below one prefix of an etcd."""

    name = "etcd"

    def __init__(self, options: EtcdOptions) -> None:
        super().__init__()
        self.options = options
        self.detection_s = options.ttl_s + EXPIRY_S

    def session(self, me: Node) -> EtcdSession:
        return EtcdSession(self.options, me, self.ended)


class EtcdSession(ServiceSession):
    """One member; one lease, never a second one."""

    def __init__(self, options: EtcdOptions, me: Node, ended: set[bytes]) -> None:
        super().__init__(me, f"etcd {options.text}", options.ttl_s, ended)
        self._options = options
        self._client: Any = None  # Any: the library is not typed
        self._limiter = anyio.CapacityLimiter(THREADS_MAX)
        self._lease: int | None = None
        self._revision = 0  # at which our member key was created
        self._seen = 0  # revision up to which everything was taken
        self._placed = 0  # value of our number key, as far as we know
        self._taking = False
        self._joining: anyio.CancelScope | None = None  # ends the attempt to join
        self._trouble = ""  # what the last attempt to reach etcd ended with
        self._arrived = anyio.Event()
        self._backlog: deque[tuple[object, Any]] = deque()  # (watch, response or error); Any: the library is not typed
        self._watch: object = None
        self._watch_id: int | None = None
        self._watching = threading.Lock()
        self._member_key = self._key("member", me)
        self._join_key = self._key("join", me)
        self._number_key = self._key("number", me)
        self._log_key = f"{options.prefix}/log"

    def _key(self, kind: str, node: Node) -> str:
        return f"{self._options.prefix}/{kind}/{node.id.text}"

    # -- the library --------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """Runs on a worker thread."""
        options = self._options
        credentials = None
        if options.ca:
            try:
                credentials = MultiEndpointEtcd3Client.get_secure_creds(options.ca, options.key, options.cert)
            except OSError as error:
                raise ConfigError(f"cannot read the certificate files for etcd: {error}") from error
        endpoints = [
            Endpoint(
                host,
                port,
                secure=credentials is not None,
                creds=credentials,
                time_retry=ENDPOINT_RETRY_S,
                opts=CHANNEL_OPTIONS,
            )
            for host, port in options.endpoints
        ]
        self._client = MultiEndpointEtcd3Client(
            endpoints,
            timeout=max(1.0, self.session_s / 3),
            user=options.user,
            password=options.password,
            failover=True,
        )

    async def _thread(self, work: Callable[[], Any]) -> Any:  # Any: the library is not typed
        """The result of ``work``, run on a worker thread. Cancelled, the work goes on and its result is dropped."""
        return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limiter)

    async def _insist(self, work: Callable[[], Any]) -> Any:  # Any: the library is not typed
        """As ``_thread``, repeated while etcd does not answer.

        :raises SessionLost: the session is over.
        :raises ConfigError: etcd refuses us.
        :raises RevisionCompactedError: as the library.
        """
        while True:
            self.check_lost()
            try:
                return await self._thread(work)
            except RevisionCompactedError:
                raise
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.UNAUTHENTICATED and self._lease is not None:
                    await self._thread(self._connect)  # tokens do not survive a restart of etcd
                elif error.code() in REFUSED:
                    raise ConfigError(f"etcd {self._options.text} refuses us: {error.details()}") from error
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    self.lose("the etcd lease is gone")
                    self.check_lost()
                self._note(error)
            except (Etcd3Exception, ValueError) as error:  # ValueError: a channel closed by another thread
                self._note(error.__context__ or error)
            await anyio.sleep(RETRY_DELAY_S)

    def _note(self, error: BaseException) -> None:
        """Kept for the message with which a join gives up; the library's own exceptions have no words."""
        if isinstance(error, grpc.RpcError) and error.details():
            self._trouble = f": {error.details()}"
        logger.debug("%s: %r", self.service, error)

    def _list(self, prefix: str, **options: Any) -> list[Any]:  # Any: the library is not typed
        """Runs on a worker thread; the library's generator asks only while it is read."""
        return list(self._client.get_prefix(prefix, **options))

    def _disconnect(self) -> None:
        """Runs on a worker thread."""
        with self._watching:  # the library's watch thread cannot stand a channel that closes while it starts
            self._client.close()

    async def _transact(self, compare: list[Any], success: list[Any], failure: list[Any]) -> tuple[bool, list[Any]]:
        """Any: the library is not typed."""
        succeeded, answers = await self._insist(
            lambda: self._client.transaction(compare=compare, success=success, failure=failure)
        )
        return bool(succeeded), list(answers)

    # -- joining and leaving ------------------------------------------------------------------------------------

    @property
    def detection_s(self) -> float:
        return self.session_s + EXPIRY_S

    async def begin(self, tasks: anyio.abc.TaskGroup, greeting: bytes) -> None:
        try:
            with anyio.move_on_after(self._options.connect_timeout_s) as self._joining:
                await self._open(greeting)
        except RecordDamaged as error:
            raise ConfigError(
                f"keys below {self._options.prefix} in {self.service} were not written by this driver ({error}); "
                "name another prefix"
            ) from error
        if self._joining.cancelled_caught:
            raise ClusterUnavailable(f"{self.service} does not answer{self._trouble}")
        tasks.start_soon(self.follow)
        tasks.start_soon(self.beat)

    async def _open(self, greeting: bytes) -> None:
        """We are a member, and know all the others at this revision.

        :raises ConfigError: another session has our identity.
        :raises RecordDamaged: somebody else uses the prefix.
        """
        await self._insist(self._connect)
        asked_s = time.monotonic()
        lease = await self._insist(lambda: self._client.lease(self._options.ttl_s))
        self._lease, self.session_s = lease.id, lease.ttl
        self.contact(asked_s)
        record = GroupState.join_record(GroupMember(self.id, self.me), b"")
        entry = GroupState.join_record(GroupMember(self.id, self.me), greeting)
        do = self._client.transactions
        members = f"{self._options.prefix}/member/"
        while True:
            succeeded, answers = await self._transact(
                [do.create(self._member_key) == 0],
                [
                    do.put(self._join_key, entry, lease.id),
                    do.put(self._member_key, record, lease.id),
                    do.put(self._number_key, b"0", lease.id),
                    do.get(members, prefix_range_end(to_bytes(members))),
                ],
                [do.get(self._member_key)],
            )
            if succeeded:
                found = answers[-1]
                break
            (value, held), *_ = answers[0] or [(None, None)]
            if held is None:
                continue  # gone in between
            session = _session_of(value)
            if session == self.id:  # our own attempt, whose answer was lost; the view of that moment is history
                found = await self._insist(partial(self._list, members, revision=held.create_revision))
                break
            if session not in self._ended:
                await self._outlast(held)
                continue
            await self._transact(
                [do.create(self._member_key) == held.create_revision], [do.delete(self._member_key)], []
            )
        for value, kv in sorted(found, key=lambda item: item[1].create_revision):
            if kv.key == self._member_key.encode():
                self._revision = self._seen = kv.create_revision
            else:
                self.state.apply(value)
        assert self._revision, "our own key is not among the members"
        await self.take(entry)

    async def _outlast(self, held: Any) -> None:  # Any: the library is not typed
        """The member key that stands in our way is gone, because the lease of a dead session ended.

        It may be our own from before a crash. Our own new lease is kept meanwhile.

        :raises ConfigError: the lease is kept by somebody who lives.
        """
        started_s = time.monotonic()
        left_s: float | None = None
        renewals = 0
        bound_s = 1.5 * self.session_s + BOUND_EXTRA_S
        logger.info("%s was in use a moment ago, waiting for the end of its lease", self.me.id.text)
        while True:
            asked_s = time.monotonic()
            answers = await self._insist(lambda: list(self._client.refresh_lease(self._lease)))
            if answers and answers[0].TTL > 0:
                self.contact(asked_s)
            found = await self._insist(lambda: self._client.get_response(self._member_key).kvs)
            if not found or found[0].create_revision != held.create_revision:
                return
            lease = await self._insist(partial(self._client.get_lease_info, found[0].lease))
            # A dead lease shrinks, but a new leader of etcd gives all of them their full time once more.
            renewals += left_s is not None and left_s < lease.TTL
            bound_s = max(bound_s, 1.5 * lease.grantedTTL + BOUND_EXTRA_S)
            if renewals >= 2 or asked_s - started_s > bound_s:
                raise ConfigError(
                    f"{self.me.id.text} is in use by another sheep below {self._options.prefix} of etcd "
                    f"{self._options.text}, which is alive"
                )
            left_s = lease.TTL
            if self._joining is not None:  # etcd answers; this wait has a bound of its own
                self._joining.deadline = anyio.current_time() + self._options.connect_timeout_s
            await anyio.sleep(RETRY_DELAY_S)

    async def say_goodbye(self) -> None:
        """Nothing to do: the lease, which ``disconnect`` gives back, holds our keys."""

    async def disconnect(self) -> None:
        if self._client is not None:
            if self._lease is not None:
                with contextlib.suppress(Etcd3Exception, grpc.RpcError, ValueError):
                    await self._thread(partial(self._client.revoke_lease, self._lease))
            await self._thread(self._disconnect)

    # -- the order ----------------------------------------------------------------------------------------------

    async def append(self, record: bytes) -> None:
        await self._place(record, [])

    async def update(self, node: Node) -> None:
        # Who joins later reads the member key; so it changes together with the event.
        assert node.id == self.me.id, f"{node.id.text} is not {self.me.id.text}"
        async with self._sending:
            self.check_lost()
            self._number += 1
            member = GroupState.join_record(GroupMember(self.id, node), b"")
            put = self._client.transactions.put(self._member_key, member, self._lease)
            await self._place(GroupState.update_record(self.id, self._number, node), [put])

    async def _place(self, record: bytes, more: list[Any]) -> None:  # Any: the library is not typed
        """The record of number ``self._number`` is placed. One call at a time.

        An attempt expects the number key as the last attempt that came through has left it. So of several attempts,
        also abandoned ones that etcd comes to late, exactly one can win.
        """
        do = self._client.transactions
        number = self._number
        while True:
            succeeded, answers = await self._transact(
                [
                    do.create(self._member_key) == self._revision,
                    do.value(self._number_key) == b"%d" % self._placed,
                ],
                [do.put(self._number_key, b"%d" % number, self._lease), do.put(self._log_key, record), *more],
                [do.get(self._member_key), do.get(self._number_key)],
            )
            if not succeeded:
                members, numbers = answers
                if not members or members[0][1].create_revision != self._revision or not numbers:
                    self.lose("the etcd lease ended")
                    self.check_lost()
                # an attempt whose answer we have not seen: of this call, or of one that was cancelled
                self._placed = int(numbers[0][0])
            if succeeded or self._placed == number:
                self._placed = number
                return

    async def follow(self) -> None:
        """Everything below the prefix is taken, in order of revisions, until the session is lost."""
        try:
            while True:
                await self._add_watch()
                while await self._next_response():
                    pass
                await anyio.sleep(RETRY_DELAY_S)
        except SessionLost:
            pass
        except RevisionCompactedError:
            self.lose("etcd was compacted while our watch was broken; what we missed is unknown")
        except (RecordDamaged, ConfigError) as error:
            logger.error("etcd keys below %s cannot be followed: %s", self._options.prefix, error)
            self.lose(str(error))

    async def _add_watch(self) -> None:
        self._backlog.clear()
        watch = self._watch = object()
        arrive = self._arrive  # runs on the loop; the lambda on the library's thread

        old_id = self._watch_id

        def start() -> Any:  # Any: the library is not typed
            with self._watching:
                if old_id is not None:
                    self._client.cancel_watch(old_id)
                return self._client.add_watch_prefix_callback(
                    f"{self._options.prefix}/",
                    lambda response: self.mailbox.post(partial(arrive, watch, response)),
                    start_revision=self._seen + 1,
                )

        self._watch_id = await self._insist(start)

    def _arrive(self, watch: object, response: Any) -> None:  # Any: the library is not typed
        if watch is self._watch:
            if len(self._backlog) >= BACKLOG_MAX:
                self.lose("too far behind")
            else:
                self._backlog.append((watch, response))
            self._arrived.set()

    async def _next_response(self) -> bool:
        """What the watch delivers next was taken. False if the watch broke."""
        while not self._backlog:
            self._arrived = anyio.Event()
            self.check_lost()
            await self._arrived.wait()
        watch, response = self._backlog.popleft()
        if isinstance(response, RevisionCompactedError):
            raise response
        if watch is not self._watch or not hasattr(response, "events"):
            return False  # the library hands over an error, or None, once
        self._taking = True
        for event in response.events:
            if event.mod_revision > self._seen:
                record = self._record(event)
                if record is not None:
                    await self.take(record)
        self._seen = max([self._seen, *(event.mod_revision for event in response.events)])
        self._taking = False
        return True

    def _record(self, event: Any) -> bytes | None:  # Any: the library is not typed
        """What an event of etcd is in the order; None if nothing."""
        key = event.key.decode(errors="replace")
        if isinstance(event, DeleteEvent):
            # by key, because that of a member is all that is left of it
            for member in self.state.members.values():
                if self._key("member", member.node) == key:
                    return GroupState.leave_record(member.session)
            return None
        if key == self._log_key or key.startswith(f"{self._options.prefix}/join/"):
            return bytes(event.value)
        return None

    # -- who lives ----------------------------------------------------------------------------------------------

    async def beat(self) -> None:
        """Keeps the lease, and notices a watch that is silent although there is something to tell."""
        interval_s = self.session_s / 4
        behind = 0
        while self.lost is None:
            asked_s = time.monotonic()
            try:
                with anyio.move_on_after(interval_s * 2):
                    answers = await self._thread(lambda: list(self._client.refresh_lease(self._lease)))
                    if answers and answers[0].TTL <= 0:
                        self.lose("the etcd lease ended")
                    elif answers:
                        self.contact(asked_s)
                    behind = behind + 1 if await self._behind() else 0
                    if behind >= SILENT_BEATS:
                        behind = 0
                        logger.info("the etcd watch of %s is silent; watching again", self._options.prefix)
                        self._arrive(self._watch, None)
            except (Etcd3Exception, grpc.RpcError, ValueError) as error:
                logger.debug("etcd heartbeat: %r", error)
            self.give_up()
            await anyio.sleep(max(0.0, interval_s - (time.monotonic() - asked_s)))

    async def _behind(self) -> bool:
        """Whether etcd knows more than we do, although nothing waits to be taken."""
        prefix = f"{self._options.prefix}/"
        found = await self._thread(partial(self._list, prefix, keys_only=True))
        keys = {kv.key.decode(errors="replace"): kv.mod_revision for _, kv in found}
        present = {key for key in keys if key.startswith(f"{prefix}member/")}
        known = {self._key("member", member.node) for member in self.state.members.values()}
        more = present != known or keys.get(self._log_key, 0) > self._seen
        return more and not self._taking and not self._backlog

    async def status(self) -> dict[str, Any]:
        return {
            "endpoints": self._options.text,
            "prefix": self._options.prefix,
            "state": "alive" if self.alive() else f"lost: {self.lost}" if self.lost else "no contact",
            "lease": f"{self._lease or 0:x}",
            "ttl": self.session_s,
            "members": len(self.state.members),
            "revision": self._seen,
        }


def _session_of(value: bytes) -> bytes:
    """The session of a member key; empty if it is not ours to understand."""
    try:
        return bytes(cbor2.loads(value)[2])
    except (cbor2.CBORDecodeError, TypeError, ValueError, IndexError):
        return b""
