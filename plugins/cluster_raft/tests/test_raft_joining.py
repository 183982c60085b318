"""Who is asked which sheep vote, by those who come, and what else is at such an address."""

from __future__ import annotations

import logging
import socket
import struct
import threading
from contextlib import ExitStack

import anyio
import pytest

from sheepdog.api import ClusterUnavailable, ConfigError, Node, NodeId
from sheepdog.testing.cluster_kit import PATIENCE_S, assert_one_order, kit_node, payloads, settle
from sheepdog.testing.cluster_worker import SessionMember
from sheepdog.testing.services import hold_ports
from sheepdog_cluster_raft.asking import agreed_voters, ask_voters, voters_of
from sheepdog_cluster_raft.driver import RaftDriver
from sheepdog_cluster_raft.options import RaftOptions
from sheepdog_cluster_raft.server import Server

SECRET = "for tests"
ABC = ["a:1", "b:1", "c:1"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def voter(tmp_path, make_voters):
    """A cluster with a single voter, which stands in for all where their number does not matter."""
    return make_voters(tmp_path / "voter", 1)


def listed(voters, address: str) -> RaftDriver:
    """A sheep that is in the list behind the voters, with that address."""
    peers = (*voters.addresses, address)
    return RaftDriver(RaftOptions(peers, SECRET, address, voters_max=len(voters.addresses), timeout_s=10))


def newcomer(*peers: str, secret: str = SECRET, connect_s: float = 10.0) -> RaftDriver:
    return RaftDriver(RaftOptions(peers, secret, "none", timeout_s=10, connect_timeout_s=connect_s))


async def until_answers(address: str) -> list[str]:
    """What the member there knows, as soon as one answers."""
    with anyio.fail_after(PATIENCE_S):
        while (answer := await anyio.to_thread.run_sync(voters_of, address, SECRET)) is None:
            await anyio.sleep(0.02)
    return answer


# -- joining by any member --


@pytest.mark.anyio
async def test_by_a_voter(voters):
    """Who knows one voter of a running cluster learns the others from it, and does not need that one any more."""
    async with anyio.create_task_group() as tasks:
        member = SessionMember(kit_node(0))
        await member.start(tasks, newcomer(voters.addresses[1]), b"")
        await anyio.to_thread.run_sync(voters.stop, 1)
        await settle([member], b"mark")
        status = await member.status()
        tasks.cancel_scope.cancel()

    assert set(status["voters"].split(",")) == set(voters.addresses)


@pytest.mark.anyio
@pytest.mark.parametrize("mixed", [False, True])
async def test_by_a_follower(voters, ports, mixed):
    """Who knows only sheep that do not vote, or these among others that may be dead, learns from them who votes.

    What it learned it remembers: when its session ends it joins again, though that sheep is gone.
    """
    address, dead = (f"127.0.0.1:{port}" for port in hold_ports(2, ports))
    driver = newcomer(*((dead, address, voters.addresses[2]) if mixed else (address,)))
    async with anyio.create_task_group() as tasks:
        first, second = SessionMember(kit_node(0)), SessionMember(kit_node(1))
        await first.start(tasks, listed(voters, address), b"")
        await second.start(tasks, driver, b"")
        await settle([first, second], b"both")
        status = await second.status()
        await first.leave()
        if mixed:
            await anyio.to_thread.run_sync(voters.stop, 2)  # of those that it was told of, nobody is left
        await second.leave()
        again = SessionMember(kit_node(1))
        await again.start(tasks, driver, b"")
        await settle([again], b"mark")
        tasks.cancel_scope.cancel()

    assert payloads(first) == payloads(second) == [b"both"] and payloads(again) == [b"mark"]
    assert status["role"] == "follower" and set(status["voters"].split(",")) == set(voters.addresses)


@pytest.mark.anyio
async def test_not_in_the_list(voter, ports):
    """A sheep that is not in the list can be asked as well: at its own address, and the port of the others."""
    (port,) = hold_ports(1, ports)
    driver = RaftDriver(RaftOptions((f"127.0.0.9:{port}", *voter.addresses), SECRET, timeout_s=10))
    async with anyio.create_task_group() as tasks:
        first = SessionMember(Node(NodeId.of("127.0.0.2", 7000), 128, 0, 0))
        await first.start(tasks, driver, b"")
        second = SessionMember(kit_node(1))
        await second.start(tasks, newcomer(f"127.0.0.2:{port}"), b"")
        await settle([first, second], b"mark")
        status = await first.status()
        tasks.cancel_scope.cancel()

    assert (status["role"], status["answers_at"]) == ("follower", f"127.0.0.2:{port}")
    assert_one_order([first, second], b"mark")


@pytest.mark.anyio
async def test_ipv6(tmp_path):
    """Addresses may be of IPv6, in brackets."""
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as free:
            port = free.getsockname()[1]
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    (tmp_path / "secret").write_text(SECRET)
    options = f"[::1]:{port},password-file={tmp_path}/secret"
    async with anyio.create_task_group() as tasks:
        first = SessionMember(Node(NodeId.of("::1", 7000), 128, 0, 0))
        await first.start(tasks, RaftDriver(RaftOptions.parse(options, str(tmp_path / "raft"))), b"")
        second = SessionMember(kit_node(1))
        await second.start(tasks, RaftDriver(RaftOptions.parse(options)), b"")
        await settle([first, second], b"mark")
        status = await first.status()
        tasks.cancel_scope.cancel()

    assert (status["role"], status["leader"]) == ("voter", f"::1:{port}")
    assert_one_order([first, second], b"mark")


@pytest.mark.anyio
async def test_follower_that_is_not_ready(voter, ports):
    """Who comes before the only sheep that it knows waits for it, as at a restart of all."""
    address = f"127.0.0.1:{hold_ports(1, ports)[0]}"
    async with anyio.create_task_group() as tasks:
        first, second = SessionMember(kit_node(0)), SessionMember(kit_node(1))
        async with anyio.create_task_group() as starting:
            starting.start_soon(second.start, tasks, newcomer(address), b"")
            await anyio.sleep(0.3)
            await first.start(tasks, listed(voter, address), b"")
        await settle([first, second], b"mark")
        tasks.cancel_scope.cancel()

    assert_one_order([first, second], b"mark")


@pytest.mark.anyio
async def test_wrong_secret(voter, ports):
    """A follower says nothing to who has another secret."""
    address = f"127.0.0.1:{hold_ports(1, ports)[0]}"
    async with anyio.create_task_group() as tasks:
        member = SessionMember(kit_node(0))
        await member.start(tasks, listed(voter, address), b"")
        assert await until_answers(address) == list(voter.addresses)
        with anyio.fail_after(PATIENCE_S), pytest.raises(ClusterUnavailable, match="same secret"):
            await SessionMember(kit_node(1)).start(tasks, newcomer(address, secret="guess", connect_s=1.0), b"")
        tasks.cancel_scope.cancel()

    assert len(member.seen) == 1


@pytest.mark.anyio
async def test_no_server(voter, ports):
    """A follower answers who votes and nothing else: whoever takes it for a voter is sent away."""
    address = f"127.0.0.1:{hold_ports(1, ports)[0]}"
    async with anyio.create_task_group() as tasks:
        member = SessionMember(kit_node(0))
        await member.start(tasks, listed(voter, address), b"")
        await until_answers(address)
        mistaken = Server(RaftOptions((address,), SECRET, "none"))
        await anyio.to_thread.run_sync(mistaken.start)
        for _ in range(20):
            transport = member.session._server._log._SyncObj__transport
            assert not transport._readonlyNodes, "it has followers"
            await anyio.sleep(0.02)
        leader = mistaken.status()["leader"]
        await anyio.to_thread.run_sync(mistaken.stop)
        await settle([member], b"mark")
        tasks.cancel_scope.cancel()

    assert leader is None


@pytest.mark.anyio
async def test_taken_port(voter, caplog):
    """A follower whose port is taken is a member all the same, says so, and answers as soon as the port is free."""
    with caplog.at_level(logging.WARNING), socket.create_server(("0.0.0.0", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with anyio.create_task_group() as tasks:
            member = SessionMember(kit_node(0))
            await member.start(tasks, listed(voter, address), b"")
            await settle([member], b"mark")
            taken.close()
            answer = await until_answers(address)
            tasks.cancel_scope.cancel()

    assert f"cannot listen at {address}" in caplog.text
    assert answer == list(voter.addresses)


@pytest.mark.anyio
async def test_listens_again(voter):
    """The library closes its port when it cannot accept a connection, as without free descriptors; it comes back."""
    voter.servers[0]._log._SyncObj__transport._server.unbind()

    assert await until_answers(voter.addresses[0]) == list(voter.addresses)


# -- who votes, by hearsay --


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("known", "says", "lists"),
    [
        (["a:1"], {"a:1": ABC}, [ABC]),
        (["f:1"], {"f:1": ABC, "a:1": ABC, "c:1": ABC}, [ABC, ABC]),
        # what a follower knows may be old; voters know better
        (["f:1"], {"f:1": ABC, "b:1": ["a:2", "b:1", "c:1"]}, [["a:2", "b:1", "c:1"]]),
        # by another name
        (["10.0.0.1:1"], {"10.0.0.1:1": ABC, "a:1": ABC}, [ABC]),
        # a follower of a follower
        (["g:1"], {"g:1": ["f:1"], "f:1": ABC, "b:1": ABC}, [ABC]),
        # nobody who votes
        (["f:1", "g:1"], {"f:1": ["g:1"], "g:1": ["f:1"]}, []),
        (["f:1"], {}, []),
    ],
)
async def test_hearsay(known, says, lists):
    """Only what voters say of themselves counts; what others say leads to them."""
    options = RaftOptions(tuple(known), SECRET, "none")

    assert await ask_voters(known, options, lambda address, _: says.get(address)) == lists


def test_counted_on():
    """A sheep on whose vote the others count does not join without giving it: the cluster would miss it unnoticed."""
    follower = RaftOptions(("a:1", "b:1", "c:1"), SECRET, "c:1", voters_max=2)
    with pytest.raises(ConfigError, match=r"go by a:1,b:1,c:1, and c:1 is this sheep.*give it that list"):
        agreed_voters(follower, [ABC])
    unlisted = RaftOptions(("10.0.0.9:1",), SECRET).placed("10.0.0.3")
    with pytest.raises(ConfigError, match=r"10\.0\.0\.3:7 is this sheep.*self=none"):
        agreed_voters(unlisted, [["10.0.0.1:7", "10.0.0.3:7"]])

    assert agreed_voters(unlisted, [["10.0.0.1:7"]]).voters == ("10.0.0.1:7",)
    assert agreed_voters(RaftOptions(("10.0.0.9:1",), SECRET, "none"), [["10.0.0.3:7"]]).voters == ("10.0.0.3:7",)


# -- an impostor --


class Impostor:
    """A server without the secret that sends for ever to whoever comes, and counts."""

    def __init__(self, stack: ExitStack) -> None:
        self.listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        stack.callback(self.listener.shutdown, socket.SHUT_RDWR)
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.sent: list[int] = []  # by each connection that has ended
        threading.Thread(target=self._serve, daemon=True).start()

    async def ended(self, count: int) -> None:
        """So many connections have ended."""
        with anyio.fail_after(PATIENCE_S):
            while len(self.sent) < count:
                await anyio.sleep(0.02)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
                sent = 0
                try:
                    connection.sendall(struct.pack("=i", 1 << 30))
                    while sent < 1 << 27:
                        sent += connection.send(b"x" * (1 << 14))
                except OSError:
                    pass
                self.sent.append(sent)


@pytest.mark.anyio
async def test_impostor(ports):
    """Somebody at the address of a member who does not know the secret cannot make us keep what he sends."""
    impostor = Impostor(ports)
    follower = Server(RaftOptions((impostor.address,), SECRET, "none"))
    assert await anyio.to_thread.run_sync(voters_of, impostor.address, SECRET) is None
    await impostor.ended(1)
    await anyio.to_thread.run_sync(follower.start)
    await impostor.ended(2)
    await anyio.to_thread.run_sync(follower.stop)

    assert max(impostor.sent) < 1 << 20
