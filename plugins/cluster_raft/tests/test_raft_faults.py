"""What only the Raft driver can get wrong: voters, quorum, the log, the options."""

from __future__ import annotations

import socket
import sys

import anyio
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
    until_left,
)
from sheepdog.testing.cluster_worker import ProcessMember, SessionMember, driver_cluster
from sheepdog_cluster_raft.driver import RaftDriver
from sheepdog_cluster_raft.options import RaftOptions
from sheepdog_cluster_raft.server import death_entry, record_entry

LOOPBACK = "127.0.0.1:1,127.0.0.1:2"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def follower(voters, timeout_s: float = 1.5) -> RaftDriver:
    return RaftDriver(RaftOptions(voters.addresses, timeout_s=timeout_s))


async def rejoin(tasks, driver, node) -> SessionMember:
    """A member, once there is a quorum and its old session has ended."""
    with anyio.fail_after(2 * PATIENCE_S):
        while True:
            member = SessionMember(node)
            try:
                await member.start(tasks, driver, b"")
            except (ClusterUnavailable, ConfigError):
                await anyio.sleep(0.1)
            else:
                return member


# -- options --


def test_options(tmp_path):
    """Voters, our own part, the directory, the time and the password."""
    (tmp_path / "secret").write_text("abc\n")
    text = f"10.0.0.1:4,10.0.0.2:4,self=10.0.0.2:4,dir={tmp_path},timeout=3000,password-file={tmp_path}/secret"
    options = RaftOptions.parse(text)

    assert options.voters == ("10.0.0.1:4", "10.0.0.2:4")
    assert (options.self_address, options.directory) == ("10.0.0.2:4", str(tmp_path))
    assert (options.timeout_s, options.password) == (3.0, "abc")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no raft voter"),
        ("a", "HOST:PORT"),
        ("127.0.0.1:1,127.0.0.1:1", "twice"),
        (f"{LOOPBACK},timeout=10", "timeout"),
        (f"{LOOPBACK},self=127.0.0.1:3,dir=/x", "none of the voters"),
        (f"{LOOPBACK},self=127.0.0.1:2", "self= and dir="),
        (f"{LOOPBACK},dir=/x", "self= and dir="),
        (f"{LOOPBACK},speed=1", "unknown raft option"),
        (f"timeout=3000,{LOOPBACK}", "before the options"),
        (f"{LOOPBACK},password-file=/none", "cannot read"),
        ("10.0.0.1:4,10.0.0.2:4", "password-file"),
    ],
)
def test_options_refused(text, match):
    """What cannot be understood, or would let strangers run code, is a ConfigError that says so."""
    with pytest.raises(ConfigError, match=match):
        RaftOptions.parse(text)


@pytest.mark.anyio
async def test_address_in_use(tmp_path):
    """A voter whose port is taken says so."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        driver = RaftDriver(RaftOptions((address,), address, str(tmp_path)))
        with pytest.raises(ConfigError, match="cannot start the raft server"):
            async with driver.join(kit_node(0), b""):
                pass


@pytest.mark.anyio
async def test_bad_directory(tmp_path):
    """A directory that cannot be made is a ConfigError."""
    (tmp_path / "file").write_text("")
    driver = RaftDriver(RaftOptions(("127.0.0.1:1",), "127.0.0.1:1", str(tmp_path / "file" / "x")))
    with pytest.raises(ConfigError, match="cannot use raft directory"):
        async with driver.join(kit_node(0), b""):
            pass


@pytest.mark.anyio
async def test_nobody_there():
    """A join without a leader ends in bounded time with ClusterUnavailable."""
    driver = RaftDriver(RaftOptions(("127.0.0.1:1", "127.0.0.1:2"), connect_timeout_s=0.5))
    with anyio.fail_after(8), pytest.raises(ClusterUnavailable, match="no raft leader"):
        async with driver.join(kit_node(0), b""):
            pass


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
async def test_members_that_vote(tmp_path):
    """Three sheep are all there is: the leader is killed, the others go on, and it comes back with its log."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    addresses = [f"127.0.0.1:{listener.getsockname()[1]}" for listener in listeners]
    for listener in listeners:
        listener.close()

    def command(index: int) -> list[str]:
        options = f"{','.join(addresses)},self={addresses[index]},dir={tmp_path}/{index},timeout=1500"
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
async def test_quorum_lost(voters):
    """Without a quorum no member says that it is alive; with it again, members can join and talk."""
    driver = follower(voters)
    async with anyio.create_task_group() as tasks:
        members = [SessionMember(kit_node(i)) for i in range(2)]
        for member in members:
            await member.start(tasks, driver, b"")
        await settle(members, b"before")
        await anyio.to_thread.run_sync(voters.stop, 0, 1)
        for member in members:
            with anyio.fail_after(PATIENCE_S):
                while await member.alive():
                    await anyio.sleep(0.02)
            await member.until(lambda member=member: member.lost, PATIENCE_S)
            await member.leave()
        await anyio.to_thread.run_sync(voters.start, 0, 1)
        again = await rejoin(tasks, driver, kit_node(0))
        await settle([again], b"mark")
        tasks.cancel_scope.cancel()

    assert payloads(again) == [b"mark"]


@pytest.mark.anyio
async def test_voters_restart(voters):
    """All voters restart one after the other from their directories; the sessions go on and nothing is lost."""
    driver = follower(voters, timeout_s=30)
    async with anyio.create_task_group() as tasks:
        members = [SessionMember(kit_node(i)) for i in range(2)]
        for member in members:
            await member.start(tasks, driver, b"")
        for index in range(3):
            await anyio.to_thread.run_sync(voters.stop, index)
            await members[0].broadcast(b"%d" % index)
            await anyio.to_thread.run_sync(voters.start, index)
        await settle(members, b"mark")
        tasks.cancel_scope.cancel()

    assert payloads(members[1]) == [b"0", b"1", b"2", b"mark"]


@pytest.mark.anyio
async def test_password(tmp_path, make_voters):
    """Who has the password joins over encrypted connections; who has none, or another one, gets no answer."""
    voters = await anyio.to_thread.run_sync(make_voters, tmp_path / "voters", "secret")
    right = RaftDriver(RaftOptions(voters.addresses, timeout_s=1.5, password="secret"))
    async with anyio.create_task_group() as tasks:
        member = SessionMember(kit_node(0))
        await member.start(tasks, right, b"")
        for password in (None, "guess"):
            wrong = RaftDriver(RaftOptions(voters.addresses, password=password, connect_timeout_s=1.0))
            with pytest.raises(ClusterUnavailable):
                await SessionMember(kit_node(1)).start(tasks, wrong, b"")
        await settle([member], b"mark")
        tasks.cancel_scope.cancel()

    assert payloads(member) == [b"mark"] and len(member.seen) == 2


# -- the log --


@pytest.mark.anyio
async def test_snapshot(voters):
    """Who joins after the log was replaced by a snapshot has the right view; sessions that stand do not notice."""
    driver = follower(voters)
    async with anyio.create_task_group() as tasks:
        members = [SessionMember(kit_node(i)) for i in range(2)]
        for member in members:
            await member.start(tasks, driver, b"")
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
async def test_status(voters):
    """The status names the leader and our part."""
    async with follower(voters).join(kit_node(0), b"") as session:
        status = await session.status()

    assert status["leader"] in voters.addresses
    assert status["role"] == "follower" and status["state"] == "alive" and status["members"] == 1
