"""More checks of the cluster driver contract, for drivers that depend on servers.

:class:`ServersKit` lets servers restart, fail and lose their majority. :class:`ServiceKit` is for services outside of
sheep: besides, a member is cut off together with a server, and other programs write where the cluster is to be.
:class:`TlsKit` is for drivers that can talk to their service over TLS. A driver's test class inherits what fits it
beside :class:`~sheepdog.testing.cluster_kit.ClusterKit`, and supplies the fixtures::

    class TestMyDriver(ClusterKit, ServiceKit):
        @pytest.fixture
        def start_service(self, tmp_path):
            with ExitStack() as stack:
                yield lambda count: KitService(start_my_servers(count, tmp_path, stack), my_driver, spoil)

Each check starts servers of its own. Most of them wait for session times, so one event loop is enough for those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import anyio
import anyio.abc
import pytest
from anyio.to_thread import run_sync

from sheepdog.contracts.cluster import ClusterDriver
from sheepdog.errors import ClusterUnavailable, ConfigError, SessionLost, SheepdogError
from sheepdog.model.node import Node
from sheepdog.testing.certificates import Authority
from sheepdog.testing.cluster_kit import (
    PATIENCE_S,
    assert_one_order,
    assert_sound,
    kit_node,
    left,
    payloads,
    settle,
    start_members,
    timing_bound,
    until_left,
)
from sheepdog.testing.cluster_worker import SessionMember
from sheepdog.testing.services import Server, Tls

SHORT_S = 2.0  # session time where its end is waited for
LONG_S = 20.0  # session time that a restart of a server does not exhaust
CONNECT_S = 10.0  # for a join where there is somebody
IN_VAIN_S = 0.5  # for a join where there is nobody


class Stoppable(Protocol):
    """One server. All calls block."""

    def start(self) -> None:
        """It runs, with what it had on its disk; it need not serve yet."""

    def wait(self) -> None:
        """It serves, or does so as soon as enough others run."""

    def stop(self) -> None:
        """It died."""


ServerT = TypeVar("ServerT", bound=Stoppable)


@dataclass
class KitServers(Generic[ServerT]):
    """Servers under a check.

    :param servers: they run.
    :param driver: makes a driver, for one cluster each time: session time in seconds (the servers may grant another
        one), servers to know, how long a join tries to reach them.
    """

    servers: Sequence[ServerT]
    driver: Callable[[float, Sequence[ServerT], float], ClusterDriver]

    def all(self, session_s: float) -> ClusterDriver:
        """A driver that knows all servers."""
        return self.driver(session_s, self.servers, CONNECT_S)


@dataclass
class KitService(KitServers[Server]):
    """A service outside of sheep, of servers that ``sheepdog.testing.services`` started.

    :param spoil: another program writes its own where the driver's cluster is to be. Blocks.
    """

    spoil: Callable[[], None]


StartServers: TypeAlias = Callable[[int], KitServers[Any]]  # Any: some kind of Stoppable
StartService: TypeAlias = Callable[[int], KitService]


async def rejoin(
    tasks: anyio.abc.TaskGroup,
    driver: ClusterDriver,
    node: Node,
    unless: tuple[type[SheepdogError], ...] = (ClusterUnavailable, ConfigError),
) -> SessionMember:
    """A member, once the service is back and the old session of ``node`` has ended."""
    with anyio.fail_after(2 * PATIENCE_S):
        while True:
            member = SessionMember(node)
            try:
                await member.start(tasks, driver, b"")
            except unless:
                await anyio.sleep(0.1)
            else:
                return member


async def until_dead(member: SessionMember) -> float:
    """It does not say that it is alive any more; returns for how many seconds it did."""
    started_s = last_s = anyio.current_time()
    with anyio.fail_after(PATIENCE_S):
        while await member.alive():
            last_s = anyio.current_time()
            await anyio.sleep(0.01)
    return last_s - started_s


async def until_lost(member: SessionMember) -> None:
    """Its session is over, and it can send nothing more."""
    await member.until(lambda: member.lost, PATIENCE_S)
    with pytest.raises(SessionLost):
        await member.broadcast(b"ghost")


class ServersKit:
    """What must hold when servers fail."""

    @pytest.fixture
    def start_servers(self) -> StartServers:
        """Starts so many servers, one or three. Supplied by the subclass; they end with the check."""
        raise AssertionError("a subclass of ServersKit supplies the fixture start_servers")

    @timing_bound
    @pytest.mark.anyio
    async def test_restart(self, start_servers: StartServers) -> None:
        """A short restart of the only server, while all talk, costs time: same sessions, same order, nothing is lost or
        repeated, whether it was on its way when the server stopped or was said while it was not there."""
        servers = await run_sync(start_servers, 1)
        only = servers.servers[0]
        back = anyio.Event()
        said: list[list[bytes]] = [[], []]

        async def talk(member: SessionMember, words: list[bytes]) -> None:
            while not back.is_set() or len(words) < 5:
                words.append(b"%d of %d" % (len(words), member.node.id.port))
                await member.broadcast(words[-1])

        async with anyio.create_task_group() as tasks:
            members = await start_members(tasks, 2, lambda: servers.all(LONG_S))
            async with anyio.create_task_group() as talking:
                for member, words in zip(members, said, strict=True):
                    talking.start_soon(talk, member, words)
                await members[0].until(lambda: len(payloads(members[0])) >= 4, PATIENCE_S)
                await run_sync(only.stop)
                await run_sync(only.start)
                await run_sync(only.wait)
                back.set()
            await settle(members, b"after")
            late = SessionMember(kit_node(2))
            await late.start(tasks, servers.all(LONG_S), b"")
            await settle([*members, late], b"mark")
            tasks.cancel_scope.cancel()

        for member, words in zip(members, said, strict=True):
            port = b" of %d" % member.node.id.port
            assert [payload for payload in payloads(members[0]) if payload.endswith(port)] == words
            assert member.lost is None
        assert len(payloads(members[0])) == len(said[0]) + len(said[1]) + 2
        assert_one_order([*members, late], b"mark")

    @timing_bound
    @pytest.mark.anyio
    async def test_each_server_fails(self, start_servers: StartServers) -> None:
        """With a majority left, sessions outlive any server, also the leader and the one that they talk to."""
        servers = await run_sync(start_servers, 3)
        async with anyio.create_task_group() as tasks:
            members = await start_members(tasks, 2, lambda: servers.all(LONG_S))
            for index, server in enumerate(servers.servers):
                await run_sync(server.stop)
                await members[index % 2].broadcast(b"%d" % index)
                await run_sync(server.start)
                await run_sync(server.wait)
            await settle(members, b"mark")
            tasks.cancel_scope.cancel()

        for member in members:
            assert payloads(member) == [b"0", b"1", b"2", b"mark"] and member.lost is None

    @timing_bound
    @pytest.mark.anyio
    async def test_majority_lost(self, start_servers: StartServers) -> None:
        """Without a majority of servers no member says that it is alive, and none can join; with it they can again."""
        servers = await run_sync(start_servers, 3)
        async with anyio.create_task_group() as tasks:
            members = await start_members(tasks, 2, lambda: servers.all(SHORT_S))
            await settle(members, b"before")
            for server in servers.servers[1:]:
                await run_sync(server.stop)
            for member in members:
                await until_dead(member)
                await until_lost(member)
                await member.leave()
            with anyio.fail_after(PATIENCE_S), pytest.raises(ClusterUnavailable):
                await SessionMember(kit_node(0)).start(tasks, servers.driver(SHORT_S, servers.servers, IN_VAIN_S), b"")
            await run_sync(servers.servers[1].start)
            await run_sync(servers.servers[1].wait)
            again = await rejoin(tasks, servers.all(SHORT_S), kit_node(0))
            await settle([again], b"mark")
            tasks.cancel_scope.cancel()

        assert payloads(again) == [b"mark"]

    @pytest.mark.anyio
    async def test_nobody_there(self, start_servers: StartServers) -> None:
        """A join where nobody answers ends in bounded time with ``ClusterUnavailable``, which names the servers."""
        servers = await run_sync(start_servers, 1)
        await run_sync(servers.servers[0].stop)
        driver = servers.driver(SHORT_S, servers.servers, IN_VAIN_S)
        with anyio.fail_after(IN_VAIN_S + PATIENCE_S), pytest.raises(ClusterUnavailable, match=r"127\.0\.0\.1:\d"):
            async with driver.join(kit_node(0), b""):
                pass


class ServiceKit(ServersKit):
    """What must hold besides when the servers are no part of sheep."""

    @pytest.fixture
    def start_service(self) -> StartService:
        """Starts a service of so many servers, one or three. Supplied by the subclass; it ends with the check."""
        raise AssertionError("a subclass of ServiceKit supplies the fixture start_service")

    @pytest.fixture
    def start_servers(self, start_service: StartService) -> StartServers:
        return start_service

    @timing_bound
    @pytest.mark.anyio
    async def test_partition(self, start_service: StartService) -> None:
        """A member that is cut off from the majority stops before it is seen to leave, and can come back; the others
        see it leave once, and go on."""
        service = await run_sync(start_service, 3)
        servers = service.servers
        own = service.driver(SHORT_S, servers[:1], CONNECT_S)
        async with anyio.create_task_group() as tasks:
            minority = SessionMember(kit_node(0))
            await minority.start(tasks, own, b"")
            majority = [SessionMember(kit_node(i)) for i in (1, 2)]
            for member in majority:
                await member.start(tasks, service.driver(LONG_S, servers[1:], CONNECT_S), b"")
            await settle([minority, *majority], b"before")
            await run_sync(servers[0].pause)  # with whoever knows only this one
            await until_dead(minority)
            early = [left(member, minority.node) for member in majority]
            for member in majority:
                await until_left(member, minority.node)
            await settle(majority, b"without")
            await until_lost(minority)
            await minority.leave()
            await run_sync(servers[0].resume)
            again = await rejoin(tasks, own, minority.node)
            await settle([*majority, again], b"mark")
            tasks.cancel_scope.cancel()

        assert early == [0, 0], "it thought that it was alive when the others saw it leave"
        assert payloads(minority) == [b"before"]
        for member in majority:
            assert left(member, minority.node) == 1 and payloads(member) == [b"before", b"without", b"mark"]
            assert_sound(member.seen)
        assert_one_order([*majority, again], b"mark")

    @timing_bound
    @pytest.mark.anyio
    async def test_hang(self, start_service: StartService) -> None:
        """While the service does not answer, a member distrusts itself in time, and is lost in the end. It can join
        again as soon as there are answers, though the service may believe in its old session still."""
        service = await run_sync(start_service, 1)
        driver = service.all(SHORT_S)
        async with anyio.create_task_group() as tasks:
            member = SessionMember(kit_node(0))
            await member.start(tasks, driver, b"")
            await run_sync(service.servers[0].pause)
            alive_s = await until_dead(member)
            await until_lost(member)
            await member.leave()
            with anyio.fail_after(PATIENCE_S), pytest.raises(ClusterUnavailable):
                await SessionMember(member.node).start(tasks, service.driver(SHORT_S, service.servers, IN_VAIN_S), b"")
            await run_sync(service.servers[0].resume)
            again = await rejoin(tasks, driver, member.node, unless=(ClusterUnavailable,))
            await settle([again], b"mark")
            tasks.cancel_scope.cancel()

        assert alive_s < SHORT_S
        assert payloads(again) == [b"mark"]

    @pytest.mark.anyio
    async def test_foreign_path(self, start_service: StartService) -> None:
        """Where another program has its own, a join is refused at once, with a message that says what to do."""
        service = await run_sync(start_service, 1)
        await run_sync(service.spoil)
        with (
            anyio.fail_after(PATIENCE_S),
            pytest.raises(ConfigError, match=r"not written by this driver.*name another"),
        ):
            async with service.all(SHORT_S).join(kit_node(0), b""):
                pass


# whom it talks to, whom it trusts, its own certificate and key, how long a join tries
TlsDriver: TypeAlias = Callable[[Server, Path, tuple[Path, Path] | None, float], ClusterDriver]
StartTls: TypeAlias = Callable[[Path, ExitStack, Tls], Server]


class TlsKit:
    """Connections to the service over which both sides show certificates."""

    wrong_name: str
    """What the message says of a server whose certificate is for another name."""
    strange_client = ""
    """What it says when the server does not accept our certificate, as far as the library tells."""

    @pytest.fixture
    def start_tls(self) -> StartTls:
        """Starts a server that wants certificates of clients, in a directory. Supplied by the subclass."""
        raise AssertionError("a subclass of TlsKit supplies the fixture start_tls")

    @pytest.fixture
    def tls_driver(self) -> TlsDriver:
        """Makes drivers. Supplied by the subclass."""
        raise AssertionError("a subclass of TlsKit supplies the fixture tls_driver")

    @timing_bound
    @pytest.mark.anyio
    async def test_tls(self, start_tls: StartTls, tls_driver: TlsDriver, tmp_path: Path) -> None:
        """With the right certificates members talk as over any other connection."""
        authority = Authority(tmp_path / "authority")
        with ExitStack() as stack:
            server = await run_sync(start_tls, tmp_path, stack, Tls(authority.ca, *authority.issue("server")))
            async with anyio.create_task_group() as tasks:
                sheep = authority.issue("sheep")
                members = await start_members(tasks, 2, lambda: tls_driver(server, authority.ca, sheep, CONNECT_S))
                await settle(members, b"mark")
                await members[1].leave()
                await until_left(members[0], kit_node(1))
                tasks.cancel_scope.cancel()

        assert payloads(members[0]) == [b"mark"]

    @timing_bound
    @pytest.mark.anyio
    async def test_tls_refused(self, start_tls: StartTls, tls_driver: TlsDriver, tmp_path: Path) -> None:
        """Whom one side does not trust the other side does not talk to, and the message says so.

        That holds for a server of another authority or with another name, and for a client with a strange certificate
        or none.
        """
        authority, stranger = Authority(tmp_path / "authority"), Authority(tmp_path / "stranger")
        mine = authority.issue("sheep")
        with ExitStack() as stack:
            server = await run_sync(start_tls, tmp_path, stack, Tls(authority.ca, *authority.issue("server")))
            misnamed = Tls(authority.ca, *authority.issue("misnamed", "127.0.0.2"))
            elsewhere = await run_sync(start_tls, tmp_path / "misnamed", stack, misnamed)
            for who, ca, certificate, words in (
                (server, stranger.ca, mine, "CERTIFICATE_VERIFY_FAILED"),
                (elsewhere, authority.ca, mine, self.wrong_name),
                (server, authority.ca, stranger.issue("thief"), self.strange_client),
                (server, authority.ca, None, self.strange_client),
            ):
                message, limit_s = "", 1.0
                with anyio.move_on_after(PATIENCE_S):
                    # On a busy machine a short attempt ends before anybody knows what is wrong.
                    while not message or words not in message:
                        with pytest.raises(ClusterUnavailable) as refusal:
                            async with tls_driver(who, ca, certificate, limit_s).join(kit_node(0), b""):
                                pass
                        message, limit_s = str(refusal.value), 2 * limit_s
                assert message and words in message
