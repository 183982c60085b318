"""What only the Raft driver can get wrong: voters, quorum, the log, strangers."""

from __future__ import annotations

import os
import pickle
import shutil
import socket
import struct
import sys
import zlib
from contextlib import ExitStack, suppress
from dataclasses import replace

import anyio
import cbor2
import pytest

from sheepdog.api import ClusterUnavailable, ConfigError, GroupMember, GroupState, Joined
from sheepdog.testing.cluster_kit import (
    PATIENCE_S,
    assert_one_order,
    assert_sound,
    kit_node,
    left,
    payloads,
    settle,
    start_members,
    until_left,
)
from sheepdog.testing.cluster_worker import ProcessMember, SessionMember, driver_cluster
from sheepdog.testing.service_kit import rejoin
from sheepdog.testing.services import hold_ports
from sheepdog_cluster_raft import transport
from sheepdog_cluster_raft.asking import agreed_voters, voters_of
from sheepdog_cluster_raft.driver import RaftDriver
from sheepdog_cluster_raft.journal import DurableJournal
from sheepdog_cluster_raft.options import RaftOptions
from sheepdog_cluster_raft.server import Server, death_entry, record_entry

SECRET = "for tests"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def follower(voters, timeout_s: float = 1.5) -> RaftDriver:
    return RaftDriver(RaftOptions(voters.addresses, SECRET, "none", timeout_s=timeout_s))


@pytest.mark.anyio
async def test_address_in_use(tmp_path):
    """A voter whose port is taken says so."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        driver = RaftDriver(RaftOptions((address,), SECRET, address, str(tmp_path)))
        with pytest.raises(ConfigError, match="cannot start the raft server"):
            async with driver.join(kit_node(0), b""):
                pass


@pytest.mark.anyio
async def test_bad_directory(tmp_path):
    """A directory that cannot be made is a ConfigError."""
    (tmp_path / "file").write_text("")
    driver = RaftDriver(RaftOptions(("127.0.0.1:1",), SECRET, "127.0.0.1:1", str(tmp_path / "file" / "x")))
    with pytest.raises(ConfigError, match="cannot use raft directory"):
        async with driver.join(kit_node(0), b""):
            pass


def test_directory_in_use(voters, ports):
    """Two voters never share a directory: the second one says so before it touches anything."""
    options = replace(voters.options(0), peers=(f"127.0.0.1:{hold_ports(1, ports)[0]}",))
    options = replace(options, self_address=options.peers[0])
    before = (voters.directory / "0" / "journal").stat().st_ino
    with pytest.raises(ConfigError, match="another process uses it"):
        Server(options).start()

    assert (voters.directory / "0" / "journal").stat().st_ino == before


# -- identities --


@pytest.mark.anyio
async def test_early_return(voters):
    """Who returns before its old session is reported dead waits for that, and joins then."""
    options = f"{voters.text},timeout=1500"
    async with driver_cluster("sheepdog_cluster_raft", options, backend="uvloop", pause_s=2.5) as cluster:
        first = await cluster.spawn(kit_node(0))
        victim = await cluster.spawn_killable(kit_node(1))
        await victim.kill()
        again = await cluster.spawn(victim.node)
        await settle([first, again], b"mark")

        assert left(first, victim.node) == 1
        assert_sound(first.seen)


@pytest.mark.anyio
async def test_all_return(voters):
    """After all members died at once nobody is left to report them; they come back all the same."""
    options = f"{voters.text},timeout=1500"
    async with driver_cluster("sheepdog_cluster_raft", options, backend="uvloop", pause_s=2.5) as cluster:
        victims = [await cluster.spawn_killable(kit_node(i)) for i in range(2)]
        for victim in victims:
            await victim.kill()
        again = [await cluster.spawn(kit_node(i)) for i in range(2)]
        await settle(again, b"mark")

        assert again[1].seen[0].view[-1] == kit_node(1)
        assert_one_order(again, b"mark")


# -- voters --


@pytest.mark.anyio
async def test_members_that_vote(tmp_path, ports):
    """Three sheep are all there is: the leader is killed, the others go on, and it comes back with its log."""
    addresses = [f"127.0.0.1:{port}" for port in hold_ports(3, ports)]
    (tmp_path / "secret").write_text(SECRET)

    def command(index: int) -> list[str]:
        options = f"{','.join(addresses)},self={addresses[index]},dir={tmp_path}/{index},timeout=1500"
        options += f",password-file={tmp_path}/secret"
        return [sys.executable, "-m", "sheepdog.testing.cluster_worker", "sheepdog_cluster_raft", options, "uvloop"]

    async with anyio.create_task_group() as tasks:
        members = [ProcessMember(kit_node(i)) for i in range(3)]
        async with anyio.create_task_group() as starting:
            for index, member in enumerate(members):
                starting.start_soon(member.start, tasks, command(index), b"")
        await settle(members, b"before")
        leader = addresses.index((await members[0].status())["leader"])
        survivors = [member for index, member in enumerate(members) if index != leader]
        await members[leader].kill()
        for member in survivors:
            await until_left(member, members[leader].node)
        await settle(survivors, b"without")
        again = ProcessMember(members[leader].node)
        await again.start(tasks, command(leader), b"")
        await settle([*survivors, again], b"mark")
        tasks.cancel_scope.cancel()

    assert_one_order([*survivors, again], b"mark")
    for member in survivors:
        assert left(member, again.node) == 1
        assert_sound(member.seen)


@pytest.mark.anyio
async def test_power_loss(voters, make_voters, tmp_path):
    """What was broadcast is on the disks of a majority when the call returns, not only in their memories."""
    driver = follower(voters)
    async with anyio.create_task_group() as tasks:
        member = SessionMember(kit_node(0))
        await member.start(tasks, driver, b"")
        for i in range(10):
            await member.broadcast(b"%d" % i)
        # what is not in the files at this moment is lost with the power
        shutil.copytree(voters.directory, tmp_path / "after")
        tasks.cancel_scope.cancel()
    logs = []
    for index, address in enumerate(voters.addresses):
        journal = DurableJournal(tmp_path / "after" / str(index), address)
        # the library's way to write down a call: a zero, and the pickled number of the method and its arguments
        logs.append([pickle.loads(command[1:])[1][0] for command, _, _ in journal[:] if command[:1] == b"\0"])
        journal._destroy()

    for i in range(10):
        entry = record_entry(GroupState.send_record(member.session.id, i + 1, b"%d" % i))
        assert sum(entry in log for log in logs) >= 2, f"broadcast {i}"


@pytest.mark.anyio
async def test_replace_a_voter(voters, ports):
    """A dead voter is replaced by one of another address: the list is changed on one voter after the other.

    The majority never changes its mind: who was a member before is one after, and the new voter counts.
    """
    driver = follower(voters, timeout_s=30)
    async with anyio.create_task_group() as tasks:
        first = SessionMember(kit_node(0))
        await first.start(tasks, driver, b"")
        await settle([first], b"before")
        await anyio.to_thread.run_sync(voters.stop, 2)
        voters.addresses = (*voters.addresses[:2], f"127.0.0.1:{hold_ports(1, ports)[0]}")
        voters.directory = voters.directory.with_name("new")
        (voters.directory).mkdir()
        for index in range(2):
            shutil.copytree(voters.directory.with_name("voters") / str(index), voters.directory / str(index))
        agreed_voters(voters.options(2), [list(driver.options.voters)])  # one address differs, which is allowed
        for index in range(2):
            await anyio.to_thread.run_sync(voters.stop, index)
            shutil.rmtree(voters.directory / str(index))
            shutil.copytree(voters.directory.with_name("voters") / str(index), voters.directory / str(index))
            await anyio.to_thread.run_sync(voters.start, index)
        await anyio.to_thread.run_sync(voters.start, 2)
        await anyio.to_thread.run_sync(voters.stop, 0)  # now the new one is needed for a majority
        second = await rejoin(tasks, follower(voters, timeout_s=30), kit_node(1))
        await settle([second], b"mark")
        tasks.cancel_scope.cancel()

    assert second.seen[0] == Joined(kit_node(1), b"", (kit_node(0), kit_node(1)))


@pytest.mark.anyio
async def test_not_counted_yet(voters, ports):
    """A voter of a new list waits until those that run go by it too, disturbs nobody, and says what it waits for."""
    new = f"127.0.0.1:{hold_ports(1, ports)[0]}"
    options = RaftOptions((*voters.addresses[:2], new), SECRET, new, str(voters.directory / "x"), connect_timeout_s=1.0)
    async with anyio.create_task_group() as tasks:
        member = SessionMember(kit_node(0))
        await member.start(tasks, follower(voters), b"")
        terms = {server._log.raftCurrentTerm for server in voters.servers.values()}
        with pytest.raises(ClusterUnavailable, match=rf"without {new}; start them with the new list"):
            async with RaftDriver(options).join(kit_node(1), b""):
                pass
        await settle([member], b"mark")
        tasks.cancel_scope.cancel()

    assert {server._log.raftCurrentTerm for server in voters.servers.values()} == terms and len(terms) == 1


@pytest.mark.anyio
async def test_another_list(voters, ports):
    """A voter whose list differs in more than one address from that of those who run is refused."""
    strange = tuple(f"127.0.0.1:{port}" for port in hold_ports(2, ports))
    options = RaftOptions((voters.addresses[0], *strange), SECRET, strange[0], str(voters.directory / "x"))
    with pytest.raises(ConfigError, match="change one voter at a time"):
        async with RaftDriver(options).join(kit_node(0), b""):
            pass


@pytest.mark.anyio
async def test_partition(voters):
    """A voter that is cut off stops in time and knows that it is lost; the majority sees it leave once and goes on."""
    driver = RaftDriver(replace(voters.options(0), timeout_s=1.5))
    await anyio.to_thread.run_sync(voters.stop, 0)
    async with anyio.create_task_group() as tasks:
        minority = SessionMember(kit_node(0))
        await minority.start(tasks, driver, b"")
        majority = [SessionMember(kit_node(i)) for i in (1, 2)]
        for member in majority:
            others = RaftOptions(voters.addresses[1:], SECRET, "none", timeout_s=1.5, voters_max=2)
            await member.start(tasks, RaftDriver(others), b"")
        await settle([minority, *majority], b"before")
        connections = minority.session._server._log._SyncObj__transport
        connections.send = lambda *_: False
        connections.setOnMessageReceivedCallback(lambda *_: None)
        cut_s = anyio.current_time()
        with anyio.fail_after(PATIENCE_S):
            while await minority.alive():
                await anyio.sleep(0.01)
        doubt_s = anyio.current_time() - cut_s
        for member in majority:
            await until_left(member, minority.node)
        await settle(majority, b"without")
        await minority.until(lambda: minority.lost, PATIENCE_S)
        await minority.leave()
        again = await rejoin(tasks, driver, minority.node)
        await settle([*majority, again], b"mark")
        tasks.cancel_scope.cancel()

    assert doubt_s < 1.5
    assert payloads(minority) == [b"before"]
    for member in majority:
        assert left(member, minority.node) == 1
        assert_sound(member.seen)
    assert_one_order([*majority, again], b"mark")


# -- strangers --


@pytest.mark.anyio
async def test_password(voters):
    """Who has another secret gets no answer, as if nobody were there."""
    async with anyio.create_task_group() as tasks:
        member = SessionMember(kit_node(0))
        await member.start(tasks, follower(voters), b"")
        wrong = RaftDriver(RaftOptions(voters.addresses, "guess", "none", connect_timeout_s=1.0))
        with pytest.raises(ClusterUnavailable, match="same secret"):
            await SessionMember(kit_node(1)).start(tasks, wrong, b"")
        await settle([member], b"mark")
        tasks.cancel_scope.cancel()

    assert payloads(member) == [b"mark"] and len(member.seen) == 2


class Bomb:
    """Unpickled, it leaves a trace."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def closed(connection: socket.socket) -> bool:
    """The other side closed the connection, within the time of the socket."""
    with suppress(ConnectionError):
        return connection.recv(1) == b""
    return True


def test_hostile_bytes(voters, tmp_path):
    """Bytes of somebody without the secret are never unpickled, never kept in mass, and cost the connection."""
    host, _, port = voters.addresses[0].rpartition(":")
    pickled = zlib.compress(pickle.dumps(Bomb(str(tmp_path / "executed"))))
    attacks = [
        struct.pack("=i", len(pickled)) + pickled,
        struct.pack("=i", 1 << 30) + b"x" * 1000,
        struct.pack("=i", -5) + b"x" * 1000,
        b"\xff" * 4 + b"y" * (1 << 20),
        b"GET / HTTP/1.1\r\n\r\n",
    ]
    for attack in attacks:
        with socket.create_connection((host, int(port)), 10) as connection:
            with suppress(ConnectionError):
                connection.sendall(attack)
            assert closed(connection), attack[:10]

    assert not (tmp_path / "executed").exists()
    assert voters_of(voters.addresses[0], SECRET) == list(voters.addresses)


def test_many_strangers(voters, monkeypatch):
    """Connections that say nothing do not keep others out, and do not stay."""
    monkeypatch.setattr(transport, "STRANGERS_MAX", 5)
    monkeypatch.setattr(transport, "STRANGER_S", 1.0)
    host, _, port = voters.addresses[0].rpartition(":")
    with ExitStack() as stack:
        connections = [stack.enter_context(socket.create_connection((host, int(port)), 20)) for _ in range(20)]
        answer = voters_of(voters.addresses[0], SECRET)
        assert all(map(closed, connections))

    assert answer == list(voters.addresses)


# -- the log --


@pytest.mark.anyio
async def test_snapshot(voters):
    """Who joins after the log was replaced by a snapshot has the right view; sessions that stand do not notice."""
    driver = follower(voters)
    async with anyio.create_task_group() as tasks:
        members = await start_members(tasks, 2, lambda: driver)
        await members[1].update(kit_node(1, space=5))
        for i in range(20):
            await members[0].broadcast(b"%d" % i)
        for server in voters.servers.values():
            server._log.forceLogCompaction()
        with anyio.fail_after(PATIENCE_S):
            while max(server.status()["log"] for server in voters.servers.values()) > 20:
                await anyio.sleep(0.02)
        late = SessionMember(kit_node(2))
        await late.start(tasks, driver, b"")
        await settle([*members, late], b"mark")
        tasks.cancel_scope.cancel()

    assert late.seen[0] == Joined(kit_node(2), b"", (kit_node(0), kit_node(1, space=5), kit_node(2)))
    assert_one_order([*members, late], b"mark")


@pytest.mark.anyio
async def test_repeated_and_late_entries(voters):
    """Entries that come twice, too late, or from nowhere change nothing."""
    driver = follower(voters)
    async with anyio.create_task_group() as tasks:
        member = SessionMember(kit_node(0))
        await member.start(tasks, driver, b"")
        gone = SessionMember(kit_node(1))
        await gone.start(tasks, driver, b"")
        await member.until(lambda: len(member.seen) == 2, PATIENCE_S)
        await gone.leave()
        await until_left(member, gone.node)
        mine, theirs = member.session.id, gone.session.id
        await member.broadcast(b"once")
        with anyio.fail_after(PATIENCE_S):
            while not member.session._heard.get(mine, (0, 0))[0]:
                await anyio.sleep(0.02)
        for entry in (
            record_entry(GroupState.send_record(mine, 1, b"once")),
            record_entry(GroupState.send_record(theirs, 7, b"ghost")),
            record_entry(GroupState.join_record(GroupMember(theirs, gone.node), b"ghost")),
            record_entry(b"garbage"),
            cbor2.dumps([1, 2, mine]),  # a beat that says nothing
            death_entry(mine, 0),  # void: signs of life came after that
            b"\xff" * 10,
        ):
            member.session._send(entry)
        await settle([member], b"mark")
        tasks.cancel_scope.cancel()

    assert payloads(member) == [b"once", b"mark"]
    assert len(member.seen) == 5
    assert_sound(member.seen)


@pytest.mark.anyio
async def test_copies_that_differ(voters):
    """A member whose copy of the log is not that of the others stops, and can come back; the others go on."""
    driver = follower(voters)
    async with anyio.create_task_group() as tasks:
        members = await start_members(tasks, 3, lambda: driver)
        await settle(members, b"before")
        broken = members[1]
        log = broken.session._server._log
        log.digest = bytes(len(log.digest))  # as if an entry had been applied twice
        await broken.until(lambda: broken.lost, PATIENCE_S)
        alive = await broken.alive()
        await broken.leave()
        again = await rejoin(tasks, driver, broken.node)
        await settle([members[0], members[2], again], b"mark")
        tasks.cancel_scope.cancel()

    assert "is not that of the others" in broken.lost and not alive
    assert members[0].lost is None and members[2].lost is None
    assert_one_order([members[0], members[2], again], b"mark")


@pytest.mark.anyio
async def test_status(voters):
    """The status names the leader and our part."""
    async with follower(voters).join(kit_node(0), b"") as session:
        status = await session.status()

    assert status["leader"] in voters.addresses
    assert status["role"] == "follower" and status["state"] == "alive" and status["members"] == 1
