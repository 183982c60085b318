"""What only the ZooKeeper driver can get wrong: sessions, connections, the queue, the options."""

from __future__ import annotations

import itertools
import socket
import time
from contextlib import ExitStack

import anyio
import pytest
from kazoo.client import KazooClient
from kazoo.exceptions import NoAuthError

from sheepdog.api import ConfigError, Joined, SessionLost
from sheepdog.testing import services
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
    until_joined,
    until_left,
)
from sheepdog.testing.cluster_worker import SessionMember, driver_cluster
from sheepdog_cluster_zk.driver import ZookeeperDriver
from sheepdog_cluster_zk.options import ZookeeperOptions

COUNTER = itertools.count()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def root() -> str:
    return f"/faults/{next(COUNTER)}"


@pytest.fixture
def cluster(zookeeper, root):
    return driver_cluster(
        "sheepdog_cluster_zk", f"{zookeeper.address}{root},timeout=1200", backend="uvloop", pause_s=2.0
    )


@pytest.fixture
def own_server(tmp_path):
    """A server that the test may stop and restart."""
    with ExitStack() as stack:
        yield services.start_zookeeper(tmp_path, stack)


@pytest.fixture
def client(zookeeper):
    """Another client of the server, to look and to meddle."""
    client = KazooClient(zookeeper.address)
    client.start()
    yield client
    client.stop()
    client.close()


async def wait_for(holds, within_s: float = PATIENCE_S) -> None:
    with anyio.fail_after(within_s):
        while not holds():
            await anyio.sleep(0.02)


# -- options --


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", (("a:2181",), "/sheepdog", 30.0)),
        ("a:1,b:2", (("a:1", "b:2"), "/sheepdog", 30.0)),
        ("a:1,b:2/x/y", (("a:1", "b:2"), "/x/y", 30.0)),
        ("a:1,b:2,timeout=3000", (("a:1", "b:2"), "/sheepdog", 3.0)),
        ("[::1]:5/c,timeout=3000", (("[::1]:5",), "/c", 3.0)),
        ("[::1]", (("[::1]:2181",), "/sheepdog", 30.0)),
        ("a:1//x//y/", (("a:1",), "/x/y", 30.0)),
    ],
)
def test_options(text, expected):
    """Servers, path and session time, with the defaults of the original."""
    options = ZookeeperOptions.parse(text)

    assert (options.servers, options.root, options.timeout_s) == expected


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "You must specify zookeeper servers"),
        (",timeout=5000", "You must specify zookeeper servers"),
        ("/x", "You must specify zookeeper servers"),
        ("a:b", "invalid zookeeper server"),
        ("a:1,b:65536", "invalid zookeeper server"),
        ("::1", "invalid zookeeper server"),
        (":1", "invalid zookeeper server"),
        ("a:1/../x", "cannot be a path"),
        ("a:1/x/./y", "cannot be a path"),
        ("a:1/x\x01", "cannot be a path"),
        ("a:1/zookeeper", "cannot be a path"),
        ("a:1,timeout=abc", "Invalid parameter for timeout"),
        ("a:1,timeout=5", "Invalid parameter for timeout"),
        ("a:1,speed=5", "unknown zookeeper option"),
        ("a:1/", "cluster id"),
        ("a:1,timeout=5000,b:1", "before the options"),
        ("a:1,auth=me", "user:password"),
        ("a:1,auth-file=/none", "cannot read"),
        ("a:1,tls=yes", "0 or 1"),
        ("a:1,ca=/c", "tls=1"),
        ("a:1,verify=0", "tls=1"),
        ("a:1,tls=1,cert=/c", "together"),
    ],
)
def test_options_refused(text, match):
    """What cannot be understood is a ConfigError that says so."""
    with pytest.raises(ConfigError, match=match):
        ZookeeperOptions.parse(text)


def test_auth_file(tmp_path):
    """Credentials can be kept off the command line, and TLS files may have slashes in their names."""
    (tmp_path / "auth").write_text("me:secret\n")
    options = ZookeeperOptions.parse(f"a:1/c,auth-file={tmp_path}/auth,tls=1,ca=/etc/ca.pem,verify=0")

    assert (options.auth, options.tls, options.ca, options.verify) == ("me:secret", True, "/etc/ca.pem", False)
    assert options.root == "/c"


# -- sessions --


@pytest.mark.anyio
async def test_early_return(cluster):
    """Who returns before its old session has expired is told to wait, in the original's words; then it may join."""
    async with cluster as cluster:
        first = await cluster.spawn(kit_node(0))
        victim = await cluster.spawn_killable(kit_node(1))
        await victim.kill()
        with pytest.raises(ConfigError, match=r"Previous zookeeper session exist.*wait for 1 seconds"):
            await cluster.spawn(victim.node)
        await until_left(first, victim.node)
        again = await cluster.spawn(victim.node)
        await settle([first, again], b"mark")

        assert_sound(first.seen)


@pytest.mark.anyio
@pytest.mark.parametrize("victim_index", [0, 1])
async def test_expiry(cluster, zookeeper, victim_index):
    """A session that the ensemble dropped is lost at once; its owner can join again under the same identity.

    This holds for the oldest member, who does the housekeeping, as for any other.
    """
    async with cluster as cluster:
        members = [await cluster.spawn(kit_node(i)) for i in range(2)]
        await settle(members, b"before")
        victim, other = members[victim_index], members[1 - victim_index]
        thief = KazooClient(zookeeper.address, client_id=victim.session._client.client_id)
        thief.start()
        thief.stop()
        thief.close()
        await until_left(other, victim.node)
        await victim.until(lambda: victim.lost, PATIENCE_S)
        alive = await victim.alive()
        with pytest.raises(SessionLost):
            await victim.broadcast(b"ghost")
        again = await cluster.spawn(victim.node)
        await settle([other, again], b"mark")

        assert not alive
        assert left(other, victim.node) == 1 and payloads(other) == [b"before", b"mark"]
        assert_sound(other.seen)


@pytest.mark.anyio
async def test_silent_server(own_server):
    """A server that takes connections and does not answer, as one does that is just starting, costs no session."""
    options = f"{own_server.address}/x,timeout=20000"
    async with driver_cluster("sheepdog_cluster_zk", options, backend="uvloop", pause_s=20) as cluster:
        member = await cluster.spawn(kit_node(0))
        await settle([member], b"before")
        own_server.stop()
        with socket.create_server(("127.0.0.1", own_server.port)) as silent:
            connection, _ = await anyio.to_thread.run_sync(silent.accept)
        with connection:
            own_server.start()
            await anyio.to_thread.run_sync(own_server.wait)
            serving_s = time.monotonic()
            await settle([member], b"mark")
            took_s = time.monotonic() - serving_s

        assert took_s < 10, f"the member tried the next time after {took_s:.1f} s"


# -- the queue --


@pytest.mark.anyio
async def test_collection(zookeeper, root, client):
    """What everybody has read is removed from the ensemble, and later joiners have the right view."""
    driver = ZookeeperDriver(ZookeeperOptions((zookeeper.address,), root, 1.2, collect_interval=20))
    async with anyio.create_task_group() as tasks:
        members = await start_members(tasks, 3, lambda: driver)
        await members[1].update(kit_node(1, space=5))
        await members[0].leave()  # another one becomes the oldest
        for i in range(200):
            await members[1].broadcast(b"%d" % i)
            if i % 50 == 49:
                await anyio.sleep(0.25)  # heartbeats carry the positions
        await wait_for(lambda: len(client.get_children(f"{root}/queue")) < 120)
        late = SessionMember(kit_node(3))
        await late.start(tasks, driver, b"")
        await settle([members[1], members[2], late], b"mark")
        tasks.cancel_scope.cancel()

    assert late.seen[0] == Joined(kit_node(3), b"", (kit_node(1, space=5), kit_node(2), kit_node(3)))
    assert payloads(members[2]) == [*(b"%d" % i for i in range(200)), b"mark"]
    assert_one_order([members[1], members[2], late], b"mark")


@pytest.mark.anyio
async def test_leaves_and_joins_across_collections(zookeeper, root):
    """Joins that race collections never miss or repeat anything."""
    driver = ZookeeperDriver(ZookeeperOptions((zookeeper.address,), root, 1.2, collect_interval=5))
    async with anyio.create_task_group() as tasks:
        first = SessionMember(kit_node(0))
        await first.start(tasks, driver, b"")
        for i in range(12):
            member = SessionMember(kit_node(1 + i % 3))
            async with anyio.create_task_group() as racing:
                racing.start_soon(member.start, tasks, driver, b"")
                for j in range(6):
                    await first.broadcast(b"%d %d" % (i, j))
            await settle([first, member], b"mark %d" % i)
            assert_one_order([first, member], b"mark %d" % i)
            await member.leave()
        tasks.cancel_scope.cancel()

    assert_sound(first.seen)


@pytest.mark.anyio
async def test_foreign_entry(cluster, root, client):
    """An entry that no sheep wrote ends the sessions that meet it."""
    async with cluster as cluster:
        member = await cluster.spawn(kit_node(0))
        client.create(f"{root}/queue/", b"garbage", sequence=True)
        await member.until(lambda: member.lost, PATIENCE_S)

        assert "not understood" in member.lost


@pytest.mark.anyio
async def test_digest(zookeeper, root, client):
    """With auth= nobody else can touch the cluster, and who has another password is told so."""
    mine = ZookeeperDriver(ZookeeperOptions((zookeeper.address,), f"/secret{root}", 1.2, auth="me:secret"))
    other = ZookeeperDriver(ZookeeperOptions((zookeeper.address,), f"/secret{root}", 1.2, auth="me:guess"))
    async with anyio.create_task_group() as tasks:
        member = SessionMember(kit_node(0))
        await member.start(tasks, mine, b"")
        await settle([member], b"mark")
        with pytest.raises(ConfigError, match="denies access"):
            await SessionMember(kit_node(1)).start(tasks, other, b"")
        with pytest.raises(NoAuthError):
            client.get_children(f"/secret{root}/queue")
        tasks.cancel_scope.cancel()

    assert payloads(member) == [b"mark"]


@pytest.mark.anyio
async def test_server_not_verified(tmp_path):
    """With ``verify=0`` the server may be anybody; the connection is encrypted all the same."""
    authority, stranger = Authority(tmp_path / "authority"), Authority(tmp_path / "stranger")
    cert, key = authority.issue("sheep")
    with ExitStack() as stack:
        tls = services.Tls(authority.ca, *authority.issue("server", "127.0.0.2"))
        server = await anyio.to_thread.run_sync(lambda: services.start_zookeeper(tmp_path, stack, tls=tls))
        text = f"{server.address},timeout=4000,tls=1,ca={stranger.ca},cert={cert},key={key},verify=0"
        async with ZookeeperDriver(ZookeeperOptions.parse(text)).join(kit_node(0), b"") as session:
            assert session.alive()


@pytest.mark.anyio
@pytest.mark.parametrize("name", ["none.pem", "empty.pem"])
async def test_bad_certificate_file(tmp_path, name):
    """A certificate file that is not there, or holds no certificate, is named before anything is tried."""
    (tmp_path / "empty.pem").write_text("")
    driver = ZookeeperDriver(ZookeeperOptions(("127.0.0.1:1",), tls=True, ca=str(tmp_path / name)))
    with pytest.raises(ConfigError, match=f"cannot use the certificate files.*{name}"):
        async with driver.join(kit_node(0), b""):
            pass


@pytest.mark.anyio
async def test_status_and_names(cluster, root, client):
    """Member znodes have the names that operators know, and the status tells the granted session time."""
    async with cluster as cluster:
        member = await cluster.spawn(kit_node(0))
        await until_joined(member, kit_node(0))
        status = await member.status()

        assert client.get_children(f"{root}/member") == ["IPv4 ip:127.0.0.1 port:7000"]
        assert status["timeout_ms"] == 1200 and status["state"] == "alive"


@pytest.mark.anyio
async def test_granted_time(zookeeper, root):
    """The driver goes by the session time that the ensemble grants, not by the one it asked for."""
    driver = ZookeeperDriver(ZookeeperOptions((zookeeper.address,), root, 100.0))
    async with driver.join(kit_node(0), b"") as session:
        status = await session.status()

    assert status["timeout_ms"] == 20000
    assert driver.detection_s == 31.0
