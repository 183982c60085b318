"""What only the etcd driver can get wrong: leases, watches, compaction, the options."""

from __future__ import annotations

import itertools
import json
import ssl
import urllib.request
from contextlib import ExitStack

import anyio
import etcd3
import pytest

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
    until_left,
)
from sheepdog.testing.cluster_worker import SessionMember, driver_cluster
from sheepdog_cluster_etcd.driver import EtcdDriver
from sheepdog_cluster_etcd.options import EtcdOptions

COUNTER = itertools.count()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def prefix() -> str:
    return f"/faults/{next(COUNTER)}"


@pytest.fixture
def cluster(etcd, prefix):
    return driver_cluster("sheepdog_cluster_etcd", f"{etcd.address}{prefix},ttl=1", backend="uvloop", pause_s=2.5)


@pytest.fixture
def client(etcd):
    """Another client of the server, to look and to meddle."""
    client = etcd3.client("127.0.0.1", etcd.port)
    yield client
    client.close()


# -- options --


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a", ((("a", 2379),), "/sheepdog", 10)),
        ("a:1,b:2", ((("a", 1), ("b", 2)), "/sheepdog", 10)),
        ("a:1,b:2/x/y,ttl=3", ((("a", 1), ("b", 2)), "/x/y", 3)),
        ("[::1]:5,ttl=3", ((("[::1]", 5),), "/sheepdog", 3)),
        ("[::1]", ((("[::1]", 2379),), "/sheepdog", 10)),
    ],
)
def test_options(text, expected):
    """Endpoints, prefix and lease time, with defaults."""
    options = EtcdOptions.parse(text)

    assert (options.endpoints, options.prefix, options.ttl_s) == expected


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no etcd endpoint"),
        ("ttl=4", "no etcd endpoint"),
        ("a:x", "invalid etcd endpoint"),
        ("a:1/", "prefix"),
        ("a:1,ttl=0", "ttl"),
        ("a:1,ttl=1.5", "ttl"),
        ("a:1,ttl=5,b:1", "before the options"),
        ("a:1,speed=5", "unknown etcd option"),
        ("a:1,user=me", "both user= and password-file="),
        ("a:1,user=me,password-file=/none", "cannot read"),
        ("a:1,user=me,password-file=/dev/null", "encrypted connection"),
        ("a:1,cert=/c", "together"),
    ],
)
def test_options_refused(text, match):
    """What cannot be understood is a ConfigError that says so."""
    with pytest.raises(ConfigError, match=match):
        EtcdOptions.parse(text)


@pytest.mark.anyio
async def test_no_certificate(tmp_path):
    """A certificate file that is not there is named before anything is tried."""
    driver = EtcdDriver(EtcdOptions((("127.0.0.1", 1),), ca=str(tmp_path / "none.pem")))
    with pytest.raises(ConfigError, match="certificate"):
        async with driver.join(kit_node(0), b""):
            pass


# -- sessions --


@pytest.mark.anyio
async def test_early_return(cluster):
    """Who returns before its old lease has ended waits for that, and joins then."""
    async with cluster as cluster:
        first = await cluster.spawn(kit_node(0))
        victim = await cluster.spawn_killable(kit_node(1))
        await victim.kill()
        again = await cluster.spawn(victim.node)
        await settle([first, again], b"mark")

        assert left(first, victim.node) == 1
        assert_sound(first.seen)


@pytest.mark.anyio
async def test_lease_revoked(cluster, client):
    """A session whose lease was taken away is lost, nothing of it is delivered, and its owner can join again."""
    async with cluster as cluster:
        members = [await cluster.spawn(kit_node(i)) for i in range(2)]
        await settle(members, b"before")
        client.revoke_lease(members[0].session._lease)
        with pytest.raises(SessionLost):
            await members[0].broadcast(b"ghost")
        await members[0].until(lambda: members[0].lost, PATIENCE_S)
        alive = await members[0].alive()
        await until_left(members[1], members[0].node)
        again = await cluster.spawn(members[0].node)
        await settle([members[1], again], b"mark")

        assert not alive
        assert left(members[1], members[0].node) == 1
        assert payloads(members[1]) == [b"before", b"mark"]
        assert_sound(members[1].seen)


@pytest.mark.anyio
async def test_large_greetings(cluster):
    """Members with the largest greetings do not make later joins fail."""
    async with cluster as cluster:
        members = [await cluster.spawn(kit_node(i), bytes(128 * 1024)) for i in range(8)]
        await settle(members, b"mark")

        assert len(members[-1].seen[0].view) == 8


# -- who may --


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")


@pytest.fixture
def tls_server(tmp_path, authority):
    with ExitStack() as stack:
        yield services.start_etcd(tmp_path, stack, tls=services.Tls(authority.ca, *authority.issue("server")))


@pytest.mark.anyio
async def test_password(tls_server, authority, tmp_path):
    """Where etcd wants a password, who knows it is a member also after a restart of etcd; others are told so."""
    cert, key = authority.issue("sheep")
    context = ssl.create_default_context(cafile=str(authority.ca))
    context.load_cert_chain(cert, key)

    def administer(path: str, **fields: object) -> None:
        data = json.dumps(fields).encode()
        request = urllib.request.Request(f"https://{tls_server.address}/v3/auth/{path}", data)
        with urllib.request.urlopen(request, timeout=PATIENCE_S, context=context) as answer:
            answer.read()

    administer("user/add", name="root", password="secret")
    administer("role/add", name="root")
    administer("user/grant", user="root", role="root")
    administer("enable")
    (tmp_path / "right").write_text("secret\n")
    (tmp_path / "wrong").write_text("guess\n")
    plain = f"{tls_server.address}/x,ttl=15,ca={authority.ca},cert={cert},key={key}"
    text = f"{plain},user=root,password-file={tmp_path}"
    for options in (plain, f"{text}/wrong"):
        with pytest.raises(ConfigError, match="refuses us"):
            async with EtcdDriver(EtcdOptions.parse(options)).join(kit_node(0), b""):
                pass
    async with anyio.create_task_group() as tasks:
        member = SessionMember(kit_node(0))
        await member.start(tasks, EtcdDriver(EtcdOptions.parse(f"{text}/right")), b"")
        await settle([member], b"before")
        tls_server.stop()
        tls_server.start()
        await anyio.to_thread.run_sync(tls_server.wait)
        await settle([member], b"mark")
        tasks.cancel_scope.cancel()

    assert payloads(member) == [b"before", b"mark"]


# -- the order --


@pytest.mark.anyio
async def test_compaction(cluster, client):
    """Sessions whose watch stands do not notice a compaction, and members can join after it."""
    async with cluster as cluster:
        members = [await cluster.spawn(kit_node(i)) for i in range(2)]
        for i in range(20):
            await members[0].broadcast(b"%d" % i)
        await settle(members, b"before")
        client.compact(client.get_response("x").header.revision, physical=True)
        late = await cluster.spawn(kit_node(2))
        await settle([*members, late], b"mark")

        assert late.seen[0] == Joined(kit_node(2), b"", tuple(kit_node(i) for i in range(3)))
        assert_one_order([*members, late], b"mark")


@pytest.mark.anyio
async def test_compaction_behind_a_broken_watch(cluster, client):
    """A session that cannot know what it missed is lost, and its owner can join again."""
    async with cluster as cluster:
        members = [await cluster.spawn(kit_node(i)) for i in range(2)]
        await settle(members, b"before")
        session = members[0].session
        session._watch = object()  # responses of the watch are ignored from now on
        for _ in range(2):  # a compaction keeps the last revision
            await members[1].broadcast(b"missed")
        client.compact(client.get_response("x").header.revision, physical=True)
        session._arrive(session._watch, None)  # the watch breaks
        await members[0].until(lambda: members[0].lost, PATIENCE_S)
        await members[0].leave()
        again = await cluster.spawn(members[0].node)
        await settle([members[1], again], b"mark")

        assert "compacted" in members[0].lost
        assert_sound(members[1].seen)


@pytest.mark.anyio
async def test_silent_watch(cluster):
    """A watch that delivers nothing although there is something is replaced; nothing is missed or repeated."""
    async with cluster as cluster:
        members = [await cluster.spawn(kit_node(i)) for i in range(2)]
        await settle(members, b"before")
        members[0].session._watch = object()
        await members[1].broadcast(b"unheard")
        await settle(members, b"mark")

        assert payloads(members[0]) == [b"before", b"unheard", b"mark"]


@pytest.mark.anyio
async def test_abandoned_attempts(cluster):
    """Broadcasts abandoned while etcd works on them come through at most once, whatever is sent meanwhile."""
    async with cluster as cluster:
        members = [await cluster.spawn(kit_node(i)) for i in range(2)]
        for i in range(30):
            with anyio.move_on_after(0.0005):
                await members[0].broadcast(b"maybe %d" % i)
            await members[0].broadcast(b"sure %d" % i)
        await settle(members, b"mark")
        seen = payloads(members[1])

        assert [p for p in seen if p.startswith(b"sure")] == [b"sure %d" % i for i in range(30)]
        assert len(set(seen)) == len(seen)
        assert_one_order(members, b"mark")


@pytest.mark.anyio
async def test_foreign_record(cluster, prefix, client):
    """A record that no sheep wrote ends the sessions that meet it."""
    async with cluster as cluster:
        member = await cluster.spawn(kit_node(0))
        client.put(f"{prefix}/log", "garbage")
        await member.until(lambda: member.lost, PATIENCE_S)

        assert "not understood" in member.lost


@pytest.mark.anyio
async def test_nothing_stays(cluster, prefix, client):
    """After the last member left only the last record stays; a new cluster does not see it."""
    async with cluster as cluster:
        member = await cluster.spawn(kit_node(0))
        await settle([member], b"old")
        await member.leave()
        keys = [kv.key.decode() for _, kv in client.get_prefix(prefix)]
        fresh = await cluster.spawn(kit_node(0))
        await settle([fresh], b"mark")
        status = await fresh.status()

        assert keys == [f"{prefix}/log"]
        assert payloads(fresh) == [b"mark"]
        assert status["state"] == "alive" and status["members"] == 1
