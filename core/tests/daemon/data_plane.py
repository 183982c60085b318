"""A few data planes in one process, with a ring that the test sets: no cluster driver, no control plane."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager

import anyio

from sheepdog.builtin.copies import CopiesFactory
from sheepdog.daemon.changes import Changes
from sheepdog.daemon.clock import SystemClock
from sheepdog.daemon.dispatch import Dispatcher
from sheepdog.daemon.executor import ThreadExecutor
from sheepdog.daemon.fencing import Fences
from sheepdog.daemon.gateway import Gateway
from sheepdog.daemon.objects import ObjectAccess
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.peer import ObjectOperations
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.placement import Placer, scheme_finder
from sheepdog.daemon.primary import Primary
from sheepdog.daemon.recovery import Recovery
from sheepdog.daemon.references import References
from sheepdog.daemon.server import Server
from sheepdog.daemon.settler import Settler
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.spawner import Spawner
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.stats import Stats
from sheepdog.daemon.striped import Striped
from sheepdog.daemon.unsettled import Unsettled
from sheepdog.model.clusterinfo import ClusterStatus
from sheepdog.model.node import Node, NodeId
from sheepdog.model.ring import Ring


class Plane:
    """The data path of one sheep."""

    def __init__(self, transport, store, executor, spawn, *, durable=False, factories=(), start=0):
        self.transport = transport
        self.executor = executor
        self.state = SheepState(Node(NodeId.of("127.0.0.1", 1), 128, 0, 1 << 30))
        self.outbox = Outbox()
        self.stats = Stats()
        self.unsettled = Unsettled()
        self.clock = clock = SystemClock()
        self.dispatcher = Dispatcher(self.state, self.outbox, spawn)
        self.server = Server(self.dispatcher, self.outbox, self.unsettled.abandon)
        self.peers = PeerPool(transport, self.outbox, clock, spawn)
        self.placer = Placer(self.state, scheme_finder((CopiesFactory(), *factories)), self.peers)
        self.store = store
        shards = Shards(store, executor, self.outbox, clock, spawn, durable=durable, device_failed=lambda error: False)
        self.shards = shards
        self.recovery = Recovery(self.state, shards, self.placer, self.peers, executor, clock, self.outbox, spawn)
        self.primary = Primary(self.state, shards, self.peers, self.placer, self.unsettled, self.recovery)
        self.gateway = Gateway(self.state, self.placer, self.primary, self.peers, shards, self.outbox, clock)
        striped = Striped(self.state, self.primary, self.peers, shards, start=start)
        self.references = References(self.primary, self.gateway, drop_first=lambda: True)
        self.gateway.changes = Changes(self.primary, self.gateway, self.references, striped)
        self.gateway.striped = striped
        self.gateway.recovery = self.recovery
        self.fences = Fences(self.state, self.peers, self.dispatcher, clock)
        self.gateway.fences = self.fences
        self.server.gone = self.fences.closed
        self.recovery.gateway = self.gateway
        self.operations = ObjectOperations(
            self.state, self.dispatcher, self.gateway, self.primary, self.gateway.changes, shards, self.unsettled,
            self.stats, self.outbox, self.fences,
        )  # fmt: skip
        self.operations.recover_by(self.recovery)
        self.settler = Settler(self.state, self.unsettled, self.primary, self.placer, self.peers, self.outbox)
        self.objects = ObjectAccess(self.gateway, self.outbox)
        self.listener = None
        self.node = None

    async def listen(self, zone, port=0):
        self.listener = await self.transport.listen(f"127.0.0.1:{port}", self.server.accept)
        port = int(self.listener.addresses[0].rpartition(":")[2])
        self.node = Node(NodeId.of("127.0.0.1", port), 128, zone, 1 << 30)
        self.state.me = self.node

    def join(self, nodes, epoch, copies):
        self.state.copies = copies
        self.state.block_size_shift = 22
        self.state.ctime = 1
        self.state.install(status=ClusterStatus.OK, epoch=epoch, members=tuple(nodes), ring=Ring(nodes))

    async def tick(self):
        clock = SystemClock()
        while True:
            await anyio.sleep(0.02)
            with self.outbox:
                self.peers.tick()
                self.gateway.tick(clock.monotonic())
                self.primary.tick()
                self.fences.tick(clock.monotonic())


@asynccontextmanager
async def planes(count, make_store, make_transport, *, copies=None, durable=False, factories=(), start=0, ports=None):
    """``count`` data planes that know each other, epoch 1.

    :param start: greater than that of the planes that had the same stores and ports before.
    """
    async with ThreadExecutor(4) as executor, anyio.create_task_group() as tasks:
        made = []
        spawn = Spawner()
        tasks.start_soon(spawn.run)
        for zone in range(count):
            plane = Plane(
                make_transport(), make_store(zone), executor, spawn, durable=durable, factories=factories, start=start
            )
            await plane.listen(zone, ports[zone] if ports else 0)
            made.append(plane)
            tasks.start_soon(plane.tick)
            tasks.start_soon(plane.settler.run)
        nodes = [plane.node for plane in made]
        for plane in made:
            plane.join(nodes, 1, copies or count)
        try:
            yield made
        finally:
            for plane in made:
                await plane.listener.aclose()
                plane.peers.close()
                plane.server.close()
            tasks.cancel_scope.cancel()


def random_bytes(seed, length):
    return random.Random(seed).randbytes(length)
