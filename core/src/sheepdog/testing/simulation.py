"""A whole cluster in one process, in virtual time, repeatable from one seed.

``simulate(seed, scenario)`` runs ``await scenario(simulation)`` under trio with a mock clock and a seeded scheduler.
Each sheep is the real ``daemon.sheep.Sheep`` on an in-memory network, cluster service and disk; its worker threads are
replaced by an executor that does the work after a random virtual delay. A failure says which seed repeats it. ::

    async def scenario(simulation):
        await simulation.start(3)
        await simulation.format(copies=3)
        client = simulation.client("vm0")
        ...
        await simulation.kill(1)
        await simulation.restart(1)
        await simulation.settled()

    simulate(7, scenario)

Everything random comes from the seed. Hashes of texts and bytes differ from process to process unless PYTHONHASHSEED is
set, so code under simulation must not iterate sets of them where the order shows.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from struct import Struct
from typing import Any, TypeVar

import anyio
import trio
import trio.testing

from sheepdog.builtin.copies import sheepdog_redundancy
from sheepdog.contracts.services import Services
from sheepdog.contracts.store import REPLICA, ShardKey, StoreOptions
from sheepdog.contracts.transport import Accept, Address, Channel, Listener, Transport
from sheepdog.daemon.config import SheepConfig
from sheepdog.daemon.disk_list import with_disks
from sheepdog.daemon.recovery_notes import Notes, Progress
from sheepdog.daemon.sheep import Sheep, SheepParts
from sheepdog.errors import SheepdogError
from sheepdog.model.clusterinfo import ClusterFlag, ClusterStatus, DiskConfig
from sheepdog.model.epochs import EpochRecord
from sheepdog.model.node import Node, NodeId, VnodeMode
from sheepdog.testing.memory_cluster import MemoryCluster
from sheepdog.testing.memory_store import MemoryMedium, MemoryStore
from sheepdog.testing.memory_transport import MemoryNetwork, Timers
from sheepdog.testing.simulation_client import SimulatedClient
from sheepdog.wire.header import FLAG_WRITE, Request
from sheepdog.wire.opcodes import Op

logger = logging.getLogger(__name__)

T = TypeVar("T")

MiB = 1024 * 1024
START_TIME = 1_600_000_000.0  # of the simulated world, seconds since 1970
PORT = 7000
DISK = "/simulated/obj"
NODE_SPACE = 64 * 1024 * MiB
SETTLE_S = 300.0  # virtual; then the cluster is taken for stuck
IDLE_S = 60.0  # virtual; longer than a sheep waits for another one's answer

_CLUSTER_VARIANT = Struct("<8xQBBHIIB3x")


class SimulationFailed(AssertionError):
    """The seed in the message repeats the failure."""


def simulate(seed: int, scenario: Callable[[Simulation], Awaitable[T]], **options: Any) -> T:  # Any: of Simulation
    """The result of ``scenario`` in a fresh world made of ``seed``.

    :raises SimulationFailed: whatever went wrong is its cause.
    """
    scheduler: Any = trio._core._run  # Any: two private switches, for want of public ones
    before = scheduler._ALLOW_DETERMINISTIC_SCHEDULING
    scheduler._ALLOW_DETERMINISTIC_SCHEDULING = True
    scheduler._r.seed(seed)

    async def main() -> T:
        async with Simulation(seed, **options) as simulation:
            result = await scenario(simulation)
            simulation.check()
        return result

    try:
        return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    except Exception as error:
        raise SimulationFailed(f"seed {seed}: {_first_line(error)}") from error
    finally:
        scheduler._ALLOW_DETERMINISTIC_SCHEDULING = before


def _first_line(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


class SimulatedClock:
    """``services.Clock`` in virtual time."""

    def monotonic(self) -> float:
        return trio.current_time()

    def time(self) -> float:
        return START_TIME + trio.current_time()


class SimulatedExecutor:
    """``services.Executor`` without threads: work is done at once after a random delay; pieces may overtake."""

    def __init__(self, timers: Timers, rng: random.Random, delay_s: tuple[float, float] = (0.00005, 0.002)) -> None:
        self._timers = timers
        self._random = rng
        self._delay_s = delay_s
        self.dead = False

    def submit(self, work: Callable[[], T], done: Callable[[Exception | None, T | None], None]) -> None:
        self._timers.after(self._random.uniform(*self._delay_s), lambda: self._finish(work, done))

    def _finish(self, work: Callable[[], T], done: Callable[[Exception | None, T | None], None]) -> None:
        if self.dead:
            return
        try:
            result = work()
        except SheepdogError as error:
            done(error, None)
        else:
            done(None, result)

    async def run(self, work: Callable[[], T]) -> T:
        event = anyio.Event()
        outcome: list[tuple[Exception | None, T | None]] = []

        def done(error: Exception | None, result: T | None) -> None:
            outcome.append((error, result))
            event.set()

        self.submit(work, done)
        await event.wait()
        error, result = outcome[0]
        if error is not None:
            raise error
        return result  # type: ignore[return-value]  # without an error it is the T that work() returned


class SimulatedStoreDirectory:
    """Config and epoch files that survive a simulated sheep."""

    def __init__(self, mode: VnodeMode) -> None:
        self._mode = mode
        self._config: bytes | None = None
        self._epochs: dict[int, bytes] = {}

    def read_config(self) -> DiskConfig | None:
        return DiskConfig.unpack(self._config) if self._config is not None else None

    def write_config(self, config: DiskConfig) -> None:
        self._config = config.pack()

    def epochs(self) -> list[int]:
        return sorted(self._epochs)

    def read_epoch(self, epoch: int) -> EpochRecord | None:
        return EpochRecord.unpack(self._epochs[epoch], self._mode) if epoch in self._epochs else None

    def write_epoch(self, epoch: int, record: EpochRecord) -> None:
        self._epochs[epoch] = record.pack(self._mode)

    def remove_epochs(self, after: int = 0) -> None:
        self._epochs = {epoch: data for epoch, data in self._epochs.items() if epoch <= after}


class SimulatedNotes(Notes):
    """Notes of recovery that survive a simulated sheep, as far as they would on a real disk."""

    def __init__(self) -> None:
        super().__init__()
        self._saved = Progress()
        self._safe = [dict(half) for half in self._halves]
        self._safe_removed: dict[int, int] = {}

    def save(self) -> None:
        self._saved = replace(self.progress, disks=list(self.progress.disks))

    def flush(self) -> None:
        self._safe = [dict(half) for half in self._halves]
        self._safe_removed = dict(self.removed)

    def ended(self, *, power: bool) -> None:
        """The process that made the notes is gone; with ``power``, so is what was not flushed."""
        self.progress = replace(self._saved)
        if power:
            self._halves = [dict(half) for half in self._safe]
            self.removed = dict(self._safe_removed)


class _TwoNetworks(Transport):
    """What a machine with two interfaces uses: the second for whatever has an address there."""

    def __init__(self, main: Transport, second: Transport, second_host: str) -> None:
        self._main = main
        self._second = second
        self._prefix = second_host.rpartition(".")[0]

    def _of(self, address: Address) -> Transport:
        return self._second if address.startswith(self._prefix) else self._main

    async def connect(self, address: Address, make_receiver: Accept) -> Channel:
        return await self._of(address).connect(address, make_receiver)

    async def listen(self, address: Address, accept: Accept) -> Listener:
        return await self._of(address).listen(address, accept)

    async def aclose(self) -> None:
        await self._main.aclose()
        await self._second.aclose()


class SimulatedSheep:
    """One machine: its disk outlives the sheep that runs on it."""

    def __init__(self, simulation: Simulation, number: int) -> None:
        self.simulation = simulation
        self.number = number
        self.host = f"10.0.0.{number + 1}"
        self.io_host = f"10.1.0.{number + 1}"  # on the second network, if there is one
        identity = NodeId.of(self.host, PORT)
        if simulation.second_network:
            identity = NodeId.of(self.host, PORT, self.io_host, PORT)
        self.node = Node(identity, 128, number, NODE_SPACE)
        self.medium = MemoryMedium()
        self.paths: list[str] = list(simulation.disks)
        self.storedir = SimulatedStoreDirectory(simulation.mode)
        self.notes = SimulatedNotes()
        self.sheep: Sheep | None = None
        self._scope: trio.CancelScope | None = None
        self._executor: SimulatedExecutor | None = None
        self._ended = trio.Event()

    @property
    def address(self) -> str:
        return f"{self.host}:{PORT}"

    @property
    def running(self) -> bool:
        return self.sheep is not None

    def open_store(self) -> MemoryStore:
        """A store on this machine's disk, for the sheep or for a checker."""
        return MemoryStore(StoreOptions(tuple(self.paths)), self.medium)

    async def start(self) -> None:
        """A sheep runs here and listens."""
        assert self.sheep is None, f"node {self.number} runs already"
        simulation = self.simulation
        rng = simulation.fork_random()
        executor = SimulatedExecutor(simulation.network.timers, simulation.fork_random())
        transport: Transport = simulation.network.transport(self.host)
        listen: tuple[str, ...] = (self.address,)
        if simulation.second_network:
            transport = _TwoNetworks(transport, simulation.network.transport(self.io_host), self.io_host)
            listen = (self.address, f"{self.io_host}:{PORT}")
        services = Services(SimulatedClock(), rng, executor, transport)
        store = self.open_store()
        node = with_disks(self.node, store.weights()) if simulation.mode is VnodeMode.DISK else self.node
        parts = SheepParts(
            services=services,
            driver=simulation.cluster.driver(),
            storedir=self.storedir,
            store=store,
            store_name="plain",
            store_names=("plain",),
            make_store=lambda name: self.open_store(),
            redundancies=(sheepdog_redundancy(),),
            listen=listen,
            notes=self.notes,
        )
        config = SheepConfig(
            base="/simulated", disks=tuple(self.paths), nosync=simulation.nosync, vnode_mode=simulation.mode
        )
        self.sheep = Sheep(node, config, parts)
        self._executor = executor
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        await simulation.nursery.start(self._run, self.sheep, self._scope, self._ended)

    async def _run(
        self,
        sheep: Sheep,
        scope: trio.CancelScope,
        ended: trio.Event,
        *,
        task_status: trio.TaskStatus[Any] = trio.TASK_STATUS_IGNORED,  # Any: addresses
    ) -> None:
        try:
            with scope:
                await sheep.run(task_status=task_status)
            if not scope.cancelled_caught:
                raise AssertionError(f"node {self.number} ended by itself: {sheep._reason or sheep.exit_code}")
        finally:
            ended.set()

    async def plug(self, path: str, weight_bytes: int) -> None:
        """Another disk, which counts as one of that size."""
        assert self.sheep is not None
        self.simulation.trace(f"plug {self.number} {path}")
        self.paths.append(path)
        self.medium.weigh(path, weight_bytes)
        await self.sheep.backend.plug(path)

    async def unplug(self, path: str) -> None:
        """One of several disks goes."""
        assert self.sheep is not None
        self.simulation.trace(f"unplug {self.number} {path}")
        self.paths.remove(path)
        await self.sheep.backend.unplug(path)

    async def kill(self, *, power: bool = False) -> None:
        """The sheep is gone in the middle of whatever it did. With ``power``, so is what its disk had not flushed."""
        assert self.sheep is not None and self._scope is not None and self._executor is not None
        simulation = self.simulation
        simulation.trace(f"kill {self.number}{' (power)' if power else ''}")
        self._executor.dead = True
        simulation.network.kill(self.host)
        simulation.network.kill(self.io_host)
        if any(node.id == self.node.id for node in simulation.cluster.view):
            simulation.cluster.kill(self.node.id)
        self._scope.cancel()
        self.sheep = None
        await self._ended.wait()
        self.notes.ended(power=power)
        if power:
            self.medium.lose_power(simulation.random)


class Simulation:
    """The world: ``nodes``, a network, a cluster service, virtual time and one source of randomness.

    :param latency_s: of each write on the network.
    :param tear: probability that a delivery is torn.
    :param nosync: sheep run with ``-n``.
    :param disks: of each sheep at first.
    :param mode: what vnodes belong to.
    :param second_network: sheep have a second interface for their traffic among each other (``-i``).
    """

    def __init__(
        self,
        seed: int,
        *,
        second_network: bool = False,
        latency_s: tuple[float, float] = (0.0001, 0.003),
        tear: float = 0.05,
        cluster_delay_s: float = 0.01,
        nosync: bool = True,
        disks: Sequence[str] = (DISK,),
        mode: VnodeMode = VnodeMode.NODE,
    ) -> None:
        self.seed = seed
        self.disks = tuple(disks)
        self.mode = mode
        self.random = random.Random(seed)
        self.network = MemoryNetwork(self.fork_random(), latency_s=latency_s, tear=tear)
        self.cluster = MemoryCluster(seed=self.random.getrandbits(32), delay_s_max=cluster_delay_s)
        self.nosync = nosync
        self.second_network = second_network
        self.nodes: list[SimulatedSheep] = []
        self.clients: list[SimulatedClient] = []
        self.history: list[tuple[float, str]] = []
        self.nursery: trio.Nursery
        self._manager: Any = None  # Any: trio's type for it is private

    async def __aenter__(self) -> Simulation:
        self._manager = trio.open_nursery()
        self.nursery = await self._manager.__aenter__()
        await self.network.timers.start()
        return self

    async def __aexit__(self, *exc_info: Any) -> Any:  # Any: what a context manager gets and gives
        self.nursery.cancel_scope.cancel()
        try:
            return await self._manager.__aexit__(*exc_info)
        finally:
            with trio.CancelScope(shield=True):
                await self.network.aclose()

    def fork_random(self) -> random.Random:
        """A source of its own for one part, so that the parts do not disturb each other."""
        return random.Random(self.random.getrandbits(64))

    def trace(self, event: str) -> None:
        """Remembers what happened when; two runs from one seed have the same history."""
        self.history.append((round(trio.current_time(), 9), event))
        logger.debug("%.6f %s", trio.current_time(), event)

    def check(self) -> None:
        """Nothing failed in the background."""
        if self.network.failures:
            raise self.network.failures[0]

    # ---- nodes

    async def start(self, count: int) -> None:
        """``count`` more sheep run and are members."""
        for _ in range(count):
            node = SimulatedSheep(self, len(self.nodes))
            self.nodes.append(node)
            await node.start()
        await self.until(self._all_joined, "all sheep to join")

    def _all_joined(self) -> bool:
        running = self.running()
        return all(node.sheep is not None and len(node.sheep.state.members) == len(running) for node in running)

    def running(self) -> list[SimulatedSheep]:
        return [node for node in self.nodes if node.running]

    async def kill(self, number: int, *, power: bool = False) -> None:
        await self.nodes[number].kill(power=power)

    async def restart(self, number: int) -> None:
        self.trace(f"start {number}")
        await self.nodes[number].start()

    def isolate(self, number: int) -> None:
        """The node reaches nobody, the cluster service included, until ``heal``."""
        self.trace(f"isolate {number}")
        hosts = [node.host for node in self.nodes if node.number != number]
        self.network.isolate(self.nodes[number].host, hosts + [client.host for client in self.clients])
        self.cluster.partition(self.nodes[number].node.id)

    def heal(self) -> None:
        """Everybody reaches everybody."""
        self.trace("heal")
        self.network.heal()
        self.cluster.heal()

    # ---- waiting

    async def until(self, condition: Callable[[], object], what: str, limit_s: float = SETTLE_S) -> None:
        """``condition()`` is true.

        :raises AssertionError: not within ``limit_s`` virtual seconds.
        """
        deadline = trio.current_time() + limit_s
        while not condition():
            self.check()
            if trio.current_time() > deadline:
                raise AssertionError(f"after {limit_s:.0f} virtual seconds still waiting for {what}; {self.describe()}")
            await trio.sleep(0.05)

    def is_settled(self) -> bool:
        """All running sheep are in one epoch, have recovered and know of no object that may differ."""
        running = self.running()
        sheep = [node.sheep for node in running if node.sheep is not None]
        if not sheep or len({one.state.epoch for one in sheep}) != 1:
            return False
        members = [node.node.id for node in running]
        return all(
            one.state.status is ClusterStatus.OK
            and sorted(node.id for node in one.state.ring.nodes) == members
            and not one.recovery.status().in_recovery
            and not one.unsettled.oids
            for one in sheep
        )

    async def settled(self) -> None:
        """``is_settled`` holds, and did for a while."""
        await self.until(self.is_settled, "the cluster to recover")
        await trio.sleep(1)
        await self.until(self.is_settled, "the cluster to recover")

    def leftovers(self) -> list[str]:
        """What a sheep still remembers of requests though none is under way."""
        found = []
        for node in self.nodes:
            if node.sheep is None:
                continue
            sheep = node.sheep
            for what, value in (
                ("lanes", sheep.primary.lanes),
                ("changes", sheep.gateway.changes_in_flight),
                ("requests that wait", sheep.gateway.waiting),
                ("requests of clients", sheep.stats.gateway.active),
                ("requests of sheep", sheep.stats.peer.active),
                ("incomplete changes", sheep.unsettled.in_flight),
                ("objects to settle", len(sheep.unsettled.oids)),
                ("applied changes", sum(len(connection.applied) for connection in sheep.server.connections)),
            ):
                if value:
                    found.append(f"node {node.number}: {value} {what}")
        return found

    async def idle(self) -> None:
        """No request is under way, and no sheep keeps anything of those that were.

        :raises AssertionError: some does.
        """
        deadline = trio.current_time() + IDLE_S
        while found := self.leftovers():
            assert trio.current_time() < deadline, f"after {IDLE_S:.0f} virtual seconds without requests: {found}"
            await trio.sleep(0.05)

    def describe(self) -> str:
        """The state of each node, for failure messages."""
        lines = []
        for node in self.nodes:
            if node.sheep is None:
                lines.append(f"{node.number}: down")
                continue
            state = node.sheep.state
            recovery = node.sheep.recovery.status()
            lines.append(
                f"{node.number}: {state.status.name} epoch {state.epoch} of {len(state.ring.nodes)}"
                f"{f' recovering {recovery.finished}/{recovery.total}' if recovery.in_recovery else ''}"
                f"{f' unsettled {len(node.sheep.unsettled.oids)}' if node.sheep.unsettled.oids else ''}"
            )
        return "; ".join(lines)

    # ---- clients

    def client(self, name: str) -> SimulatedClient:
        """A client on a machine of its own."""
        client = SimulatedClient(self, name)
        self.clients.append(client)
        return client

    async def format(self, copies: int = 3, flags: int = ClusterFlag.AUTO_VNODES, shift: int = 22) -> None:
        """The cluster is formatted and serves."""
        ctime = int(START_TIME) << 32
        variant = _CLUSTER_VARIANT.pack(ctime, copies, 0, flags, 0, 0, shift)
        request = Request(Op.MAKE_FS, variant=variant, flags=FLAG_WRITE, body=b"plain\0")
        await self.client("admin").succeed(request)
        await self.until(self.is_settled, "the format")

    # ---- what is on the disks

    def copies_of(self, oid: int, copies: int) -> dict[int, bytes | None]:
        """The live copy of each holder of ``oid`` by node number, as its disk has it; ``None`` where it is missing."""
        running = self.running()
        assert running and running[0].sheep is not None
        found: dict[int, bytes | None] = {}
        for holder in running[0].sheep.state.ring.holders(oid, copies):
            node = next(node for node in self.nodes if node.node.id == holder.id)
            store, key = node.open_store(), ShardKey(oid, REPLICA)
            found[node.number] = None
            if store.exists(key):
                content = bytearray(store.size(key))
                store.read_into(key, memoryview(content), offset_bytes=0)
                found[node.number] = bytes(content)
        return found

    def check_copies(self, oid: int, copies: int) -> bytes:
        """The one content that all holders of ``oid`` have.

        :raises AssertionError: one lacks it, or they differ.
        """
        found = self.copies_of(oid, copies)
        missing = [number for number, content in found.items() if content is None]
        assert not missing, f"oid={oid:016x} is missing on nodes {missing}, holders are {list(found)}"
        contents = {number: content for number, content in found.items() if content is not None}
        first = next(iter(contents.values()))
        for number, content in contents.items():
            if content != first:
                at = next(i for i, (a, b) in enumerate(zip(content, first, strict=True)) if a != b)
                raise AssertionError(f"oid={oid:016x} differs on node {number} from byte {at} on")
        return first
