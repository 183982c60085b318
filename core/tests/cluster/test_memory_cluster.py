"""The in-memory cluster against the conformance kit, and its faults."""

from __future__ import annotations

from contextlib import asynccontextmanager

import anyio
import pytest

from sheepdog.contracts.cluster import ClusterDriver, Delivered, Joined, Left
from sheepdog.errors import ClusterUnavailable, ConfigError, SessionLost
from sheepdog.model.node import Node
from sheepdog.testing.cluster_kit import ClusterFactory, ClusterKit, assert_one_order, kit_node, payloads, settle
from sheepdog.testing.cluster_worker import KitCluster, SessionMember
from sheepdog.testing.memory_cluster import MemoryCluster, nodes_of

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class MemoryMember(SessionMember):
    """A member whose faults the hub makes."""

    def __init__(self, node: Node, hub: MemoryCluster) -> None:
        super().__init__(node)
        self.hub = hub

    async def kill(self) -> None:
        if self.node in self.hub.view:
            self.hub.kill(self.node.id)
        await self.leave()

    async def pause(self) -> None:
        self.hub.pause(self.node.id)

    async def resume(self) -> None:
        self.hub.resume(self.node.id)


class MemoryKitCluster(KitCluster):
    def __init__(self, tasks: anyio.abc.TaskGroup, **options) -> None:
        self.hub = MemoryCluster(**options)
        self.tasks = tasks
        self.detection_s = self.hub.detection_s
        self.pause_s = self.hub.session_s

    def driver(self) -> ClusterDriver:
        return self.hub.driver()

    async def spawn(self, node: Node, greeting: bytes = b"") -> MemoryMember:
        member = MemoryMember(node, self.hub)
        await member.start(self.tasks, self.hub.driver(), greeting)
        return member


@asynccontextmanager
async def memory_cluster(**options):
    async with anyio.create_task_group() as tasks:
        yield MemoryKitCluster(tasks, **options)
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("delay_s_max", [0.0, 0.003])
class TestMemory(ClusterKit):
    """All guarantees of the contract, with deliveries at once and at random times."""

    @pytest.fixture
    def cluster_factory(self, delay_s_max) -> ClusterFactory:
        return lambda: memory_cluster(seed=1, delay_s_max=delay_s_max, session_s=0.1, detection_s=0.05)


@pytest.fixture
def cluster():
    return memory_cluster(seed=3, session_s=0.1, detection_s=0.05)


async def test_partition(cluster):
    """A node cut off is lost, and cannot join until the partition heals; the others go on."""
    async with cluster as cluster:
        a, b = [await cluster.spawn(kit_node(i)) for i in range(2)]
        cluster.hub.partition(b.node.id)
        await a.until(lambda: Left(b.node, (a.node,)) in a.seen, 5)
        alive = await b.alive()
        with pytest.raises(SessionLost):
            await b.broadcast(b"x")
        with pytest.raises(ClusterUnavailable):
            await cluster.spawn(b.node)
        cluster.hub.heal()
        again = await cluster.spawn(b.node)
        await settle([a, again], b"mark")

        assert not alive and payloads(a) == [b"mark"]


async def test_short_partition(cluster):
    """A broadcast that meets a short partition is placed once the partition has healed."""
    async with cluster as cluster:
        a, b = [await cluster.spawn(kit_node(i)) for i in range(2)]
        cluster.hub.partition(b.node.id)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(b.broadcast, b"late")
            await a.broadcast(b"early")
            cluster.hub.heal()
        await settle([a, b], b"mark")

        assert payloads(a) == payloads(b) == [b"early", b"late", b"mark"]


async def test_expire(cluster):
    """An expired session is reported at once, and its owner learns it without a pause."""
    async with cluster as cluster:
        a, b = [await cluster.spawn(kit_node(i)) for i in range(2)]
        cluster.hub.expire(b.node.id)
        alive = await b.alive()
        await b.until(lambda: b.lost, 5)
        await settle([a], b"mark")

        assert not alive and nodes_of(a.seen) == (a.node,)


async def test_outage(cluster):
    """During an outage nothing is sent; afterwards the same session works."""
    async with cluster as cluster:
        a = await cluster.spawn(kit_node(0))
        cluster.hub.outage(True)
        with pytest.raises(ClusterUnavailable):
            await a.broadcast(b"lost")
        cluster.hub.outage(False)
        await settle([a], b"mark")

        assert payloads(a) == [b"mark"]


async def test_delay(cluster):
    """A slow member sees the same order later than the others."""
    async with cluster as cluster:
        a, slow = [await cluster.spawn(kit_node(i)) for i in range(2)]
        await slow.until(lambda: slow.seen, 5)
        cluster.hub.delay(slow.node.id, 0.05)
        await a.broadcast(b"x")
        await a.until(lambda: payloads(a), 5)
        early = payloads(slow)
        await slow.until(lambda: payloads(slow), 5)

        assert early == [] and payloads(slow) == [b"x"]


async def test_long_history(cluster):
    """What everybody has read is dropped from memory; who joins later still gets everything from then on."""
    async with cluster as cluster:
        a = await cluster.spawn(kit_node(0))
        for i in range(3000):
            await a.broadcast(b"%d" % i)
        await settle([a], b"mark")
        b = await cluster.spawn(kit_node(1))
        await settle([a, b], b"end")

        assert len(cluster.hub._log) < 2500
        assert b.seen[0] == Joined(b.node, b"", (a.node, b.node))
        assert_one_order([a, b], b"end")


async def test_same_seed_same_order():
    """With one seed and one schedule the deliveries come in the same order and at the same times."""
    runs = []
    for _ in range(2):
        hub = MemoryCluster(seed=11, delay_s_max=0.001)
        paces = [hub.random_delay_s() for _ in range(5)]
        runs.append((paces, hub.fork_random().random()))

    assert runs[0] == runs[1]
    assert runs[0] != ([MemoryCluster(seed=12, delay_s_max=0.001).random_delay_s()], 0)


async def test_options():
    """The fake takes no options and says so."""
    with pytest.raises(ConfigError):
        MemoryCluster().driver("x")


async def test_sender_in_view(cluster):
    """A broadcast carries the identity of its sender."""
    async with cluster as cluster:
        a = await cluster.spawn(kit_node(4))
        await settle([a], b"mark")

        assert a.seen[-1] == Delivered(a.node.id, b"mark")
