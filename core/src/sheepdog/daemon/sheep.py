"""One sheep, put together: everything is made here and handed to whoever needs it.

``main`` is what the command line calls: it resolves the names of plugins to objects and runs the event loop. ``Sheep``
is the same daemon with everything nondeterministic as an argument, which is how a simulation runs many in one process.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import anyio
from anyio.abc import TaskStatus

from sheepdog.contracts.cluster import ClusterDriver
from sheepdog.contracts.frontend import FrontEnd, FrontEndContext
from sheepdog.contracts.redundancy import RedundancyFactory
from sheepdog.contracts.services import Services
from sheepdog.contracts.store import ObjectStore
from sheepdog.contracts.transport import Listener
from sheepdog.daemon.backend import LocalBackend
from sheepdog.daemon.changes import Changes
from sheepdog.daemon.coherence import Coherence
from sheepdog.daemon.config import POOLS, POOLS_RENAMED, SheepConfig
from sheepdog.daemon.control import Control
from sheepdog.daemon.dispatch import Dispatcher
from sheepdog.daemon.fencing import Fences
from sheepdog.daemon.gateway import Gateway
from sheepdog.daemon.memory import give_back, keep_freed
from sheepdog.daemon.objects import ObjectAccess
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.peer import ObjectOperations
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.placement import Placer, scheme_finder
from sheepdog.daemon.primary import Primary
from sheepdog.daemon.recovery import Recovery
from sheepdog.daemon.recovery_notes import Notes
from sheepdog.daemon.recovery_progress import ProgressReport
from sheepdog.daemon.references import References
from sheepdog.daemon.repair import Repairs
from sheepdog.daemon.scrub import Scrubber, ScrubNotes
from sheepdog.daemon.server import Server
from sheepdog.daemon.settler import Settler
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.spawner import Spawner
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.stats import Stats
from sheepdog.daemon.striped import Striped
from sheepdog.daemon.unsettled import Unsettled
from sheepdog.daemon.volumes import GatewayVolumes
from sheepdog.errors import ConfigError, SheepdogError, TransportError
from sheepdog.model.clusterinfo import ClusterFlag, ClusterStatus
from sheepdog.model.node import Node, NodeId, VnodeMode
from sheepdog.plugins import Announcer
from sheepdog.wire.extensions import SCRUB
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.interfaces import StoreDirectory
    from sheepdog.daemon.journal import Journal

logger = logging.getLogger(__name__)

TICK_S = 0.05
DRAIN_S = 10.0  # requests in flight get this long to end when the sheep stops
REST_S = 30.0  # without requests
WORKERS_MAX = 16


@dataclass(frozen=True, slots=True)
class SheepParts:
    """What a sheep is made of, already resolved.

    :param store: open, or ``None`` for a gateway.
    :param make_store: opens another store plugin on the same disks (format).
    :param listen: addresses for the wire protocol, in the transport's notation.
    :param started: called when the sheep listens and has asked to join; what it raises ends the sheep.
    """

    services: Services
    driver: ClusterDriver
    storedir: StoreDirectory
    store: ObjectStore | None
    store_name: str
    store_names: Sequence[str]
    make_store: Callable[[str], ObjectStore]
    redundancies: Sequence[RedundancyFactory]
    front_ends: Sequence[FrontEnd] = ()
    listen: Sequence[str] = ()
    fixed_store: str | None = None
    announcer: Announcer = field(default_factory=Announcer)
    notes: Notes = field(default_factory=Notes)
    started: Callable[[], None] = lambda: None
    scrub_notes: ScrubNotes = field(default_factory=ScrubNotes)
    resting: Callable[[], None] = lambda: None  # called on a worker thread, when no request came for a while


class Sheep:
    """The running daemon."""

    def __init__(self, me: Node, config: SheepConfig, parts: SheepParts) -> None:
        self.config = config
        self.parts = parts
        self.exit_code = 0
        self._stopping = anyio.Event()
        self._reason = ""
        self.spawn = Spawner()
        services = parts.services
        clock = services.clock
        self.outbox = Outbox()
        self.state = SheepState(me, config.vnode_mode)
        self.stats = Stats()
        self.unsettled = Unsettled(parts.notes)
        self.state.recovery_disabled = parts.notes.progress.disabled
        self.dispatcher = Dispatcher(self.state, self.outbox, self.spawn)
        self.server = Server(self.dispatcher, self.outbox, self.unsettled.abandon)
        self.peers = PeerPool(services.transport, self.outbox, clock, self.spawn, self.state.object_bytes_max)
        self.placer = Placer(self.state, scheme_finder(parts.redundancies), self.peers)
        self.backend = LocalBackend(
            self.state, parts.storedir, services.executor, self.stats, self,
            make_store=parts.make_store, store_names=parts.store_names, store=parts.store,
            store_name=parts.store_name, fixed_name=parts.fixed_store,
        )  # fmt: skip
        shards: Shards | None = None
        if parts.store is not None:
            shards = Shards(
                parts.store, services.executor, self.outbox, clock, self.spawn,
                durable=not config.nosync or config.journal is not None,
                direct=config.directio,
                device_failed=self.backend.device_failed,
            )  # fmt: skip
        self.backend.shards = shards
        self.recovery = Recovery(
            self.state, shards, self.placer, self.peers, services.executor, clock, self.outbox, self.spawn,
            disks=len(parts.store.weights()) if parts.store is not None else 1, wildcard=config.wildcard_recovery,
            notes=parts.notes, delay_s=config.recovery_delay_s,
        )  # fmt: skip
        self.recovery.requests = self.stats.client_requests
        throttle = config.recovery_throttle
        self.recovery.set_throttle(throttle.max_exec_count, throttle.interval_ms, throttle.active)
        self.backend.recovery = self.recovery
        self.primary = Primary(self.state, shards, self.peers, self.placer, self.unsettled, self.recovery)
        self.gateway = Gateway(self.state, self.placer, self.primary, self.peers, shards, self.outbox, clock)
        striped = Striped(self.state, self.primary, self.peers, shards, int(clock.time()) & 0xFFFFFFFF)
        references = References(
            self.primary, self.gateway, drop_first=lambda: bool(self.state.flags & ClusterFlag.RECYCLE_VID)
        )
        self.changes = Changes(self.primary, self.gateway, references, striped)
        self.gateway.changes = self.changes
        self.gateway.striped = striped
        self.gateway.recovery = self.recovery
        self.fences = Fences(self.state, self.peers, self.dispatcher, clock)
        self.gateway.fences = self.fences
        self.server.gone = self.fences.closed
        self.recovery.gateway = self.gateway
        self.operations = ObjectOperations(
            self.state, self.dispatcher, self.gateway, self.primary, self.changes, shards, self.unsettled,
            self.stats, self.outbox, self.fences,
        )  # fmt: skip
        self.operations.recover_by(self.recovery)
        self.settler = Settler(
            self.state, self.unsettled, self.primary, self.placer, self.peers, self.outbox,
            lambda: (connection.applied for connection in self.server.connections),
        )  # fmt: skip
        self.objects = ObjectAccess(self.gateway, self.outbox)
        self.control = Control(
            state=self.state, driver=parts.driver, backend=self.backend, peers=self.peers, objects=self.objects,
            gateway=self.gateway, dispatcher=self.dispatcher, lifecycle=self, services=services, spawn=self.spawn,
            auto_vnodes=config.vnodes is None,
        )  # fmt: skip
        repairs = Repairs(
            self.state, self.primary, shards, self.placer, self.peers, services.executor, self.outbox, self.dispatcher,
            self.recovery, striped,
        )  # fmt: skip
        self.control.info.repairs = repairs
        self.backend.disks_changed = self.control.disk_list.changed
        self.scrubber = Scrubber(
            config.scrub, parts.scrub_notes, self.state, shards, self.placer, repairs, self.recovery,
            services.executor, clock, services.random, self.stats, parts.announcer.object_corrupt,
        )  # fmt: skip
        self.dispatcher.task(SCRUB, self.scrubber.serve, force=True)
        self.operations.coherence = Coherence(self.state, self.control.coherence, self.spawn, self.outbox)
        self.recovery.ring_of = self.control.epoch_ring
        self.recovery.announce = self.control.announce_recovered
        self.volumes = GatewayVolumes(self.gateway, self.control, self.spawn)
        self.progress = ProgressReport(self.recovery.status, self.state, parts.announcer)
        self._epoch_told = 0
        self.state.observe(self._state_changed)

    # ---- what others call

    def stop(self, exit_code: int, reason: str) -> None:
        """The sheep ends in order: no new connections, requests in flight end, the cluster is left. Returns at once."""
        if not self._stopping.is_set():
            logger.info("%s", reason)
            self.exit_code = exit_code
            self._stopping.set()

    def _state_changed(self) -> None:
        state = self.state
        if state.status is ClusterStatus.WAIT and not state.joining and not state.has_served and self.gateway.waiting:
            with self.outbox:  # the cluster runs only when somebody else comes, which may take for ever
                self.gateway.fail_parked(Result.WAIT_FOR_JOIN if state.formatted else Result.WAIT_FOR_FORMAT)
        self.peers.forget({node.id for node in state.members} | {node.id for node in state.ring.nodes})
        if state.epoch != self._epoch_told and state.status is ClusterStatus.OK:
            self._epoch_told = state.epoch
            self.parts.announcer.epoch_changed(state.epoch, state.ring.nodes)

    # ---- life

    async def run(self, *, task_status: TaskStatus[tuple[str, ...]] = anyio.TASK_STATUS_IGNORED) -> int:
        """Serves until ``stop`` or cancellation; returns the exit code.

        ``task_status.started(addresses)`` is called once it listens and its membership task runs.

        :raises TransportError: an address cannot be bound.
        :raises JoinRefused: the cluster does not want this sheep.
        """
        transport = self.parts.services.transport
        async with AsyncExitStack() as stack:
            stack.push_async_callback(transport.aclose)
            listeners: list[Listener] = []
            for address in self.parts.listen:
                try:
                    listener = await transport.listen(address, self.server.accept)
                except TransportError as error:
                    if isinstance(error.__cause__, OSError):  # the words that scripts look for in the log
                        logger.error("failed to bind server socket: %s", error.__cause__.strerror)
                    logger.error("failed to create a listening port")
                    raise
                listeners.append(listener)
                stack.push_async_callback(listener.aclose)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self.spawn.run)
                tasks.start_soon(self._tick)
                tasks.start_soon(self._rest)
                tasks.start_soon(self.recovery.run)
                tasks.start_soon(self.settler.run)
                tasks.start_soon(self.scrubber.run)
                tasks.start_soon(self._run_membership)
                context = FrontEndContext(self.parts.services, self.volumes)
                addresses = [address for listener in listeners for address in listener.addresses]
                for front_end in self.parts.front_ends:
                    bound = await tasks.start(front_end.serve, context)
                    addresses.extend(bound)
                self.parts.started()
                logger.info("sheepdog daemon (version %s) started", self.config.version)
                self.parts.announcer.started(self.state.me, self.state.epoch)
                task_status.started(tuple(addresses))
                await self._stopping.wait()
                for listener in listeners:
                    await listener.aclose()
                with anyio.move_on_after(DRAIN_S):
                    # What waits to be tried again will not be: its client resends it to another sheep.
                    while self.stats.gateway.active > self.gateway.waiting or self.dispatcher.tasks_active:
                        await anyio.sleep(0.01)
                tasks.cancel_scope.cancel()
            self.server.close()
            self.peers.close()
        self.parts.announcer.stopped(self.state.me)
        return self.exit_code

    async def _run_membership(self) -> None:
        await self.control.run()
        self.stop(self.exit_code, "shutdown")

    async def _tick(self) -> None:
        clock = self.parts.services.clock
        while True:
            await anyio.sleep(TICK_S)
            with self.outbox:
                now = clock.monotonic()
                self.peers.tick()
                self.gateway.tick(now)
                self.primary.tick()
                self.fences.tick(now)
                self.progress.tick()
                self.recovery.pace.look()

    async def _rest(self) -> None:
        """Large buffers are kept for the next requests only as long as there are some."""
        served = rested = 0
        while True:
            await anyio.sleep(REST_S)
            before, served = served, self.stats.requests()
            if served == before != rested:
                rested = served
                await self.parts.services.executor.run(self.parts.resting)


# ---- the process


def main(config: SheepConfig, started: Callable[[], None] = lambda: None) -> int:
    """Runs one sheep until it ends; returns the exit code. Errors are in the log.

    :param started: as in ``SheepParts``.
    """
    from sheepdog import plugins

    keep_freed()
    try:
        driver = plugins.make_cluster_driver(config.cluster, config.base)
        front_ends = [plugins.make_front_end(front.name, front.options) for front in config.front_ends]
        redundancies = plugins.make_redundancies()
        if config.redundancy is not None:
            plugins.load("redundancy", config.redundancy)
    except SheepdogError as error:
        logger.error("%s", error)
        return 1
    backend_options: dict[str, Any] = {"use_uvloop": _uvloop_installed()}  # Any: options of anyio's backend
    return anyio.run(_run, config, started, driver, front_ends, redundancies, backend_options=backend_options)


def _uvloop_installed() -> bool:
    from importlib.util import find_spec

    return find_spec("uvloop") is not None


async def _run(
    config: SheepConfig,
    started: Callable[[], None],
    driver: ClusterDriver,
    front_ends: Sequence[FrontEnd],
    redundancies: Sequence[RedundancyFactory],
) -> int:
    try:
        return await _run_sheep(config, started, driver, front_ends, redundancies)
    except SheepdogError as error:
        _log_failure(error)
    except ExceptionGroup as group:
        known, unknown = group.split(SheepdogError)
        if unknown is not None:
            raise
        assert known is not None
        for leaf in _leaves(known):
            _log_failure(leaf)
    return 1


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:  # Any: whatever exceptions it holds
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found


def _log_failure(error: BaseException) -> None:
    for line in str(error).splitlines() or [type(error).__name__]:
        logger.error("%s", line)


async def _run_sheep(
    config: SheepConfig,
    started: Callable[[], None],
    driver: ClusterDriver,
    front_ends: Sequence[FrontEnd],
    redundancies: Sequence[RedundancyFactory],
) -> int:
    from random import SystemRandom

    from sheepdog import plugins
    from sheepdog.contracts.store import StoreOptions
    from sheepdog.daemon.checksum_files import ChecksumFiles
    from sheepdog.daemon.checksums import ChecksummedStore
    from sheepdog.daemon.clock import SystemClock
    from sheepdog.daemon.disk_list import with_disks
    from sheepdog.daemon.executor import ThreadExecutor
    from sheepdog.daemon.journal import start_journal
    from sheepdog.daemon.journal_files import Left
    from sheepdog.daemon.journaled_store import JournaledStore
    from sheepdog.daemon.recovery_notes import FileNotes
    from sheepdog.daemon.storedir import StoreDirectory, same_device, usable_disks
    from sheepdog.daemon.strip_store import StripLog, StripStore
    from sheepdog.model.limits import NODE_DISKS_MAX
    from sheepdog.model.node import default_zone

    by_disk = config.vnode_mode is VnodeMode.DISK
    storedir = StoreDirectory(config.base, config.vnode_mode)
    storedir.prepare()
    notes = FileNotes(config.base)
    identity = node_id(config, driver)
    disk_config = storedir.read_config(upgrade=config.upgrade)
    _check_start(config, storedir, disk_config, identity)
    fixed = config.store or storedir.read_node_config()
    store_names = sorted({row.name for row in plugins.list_plugins(["store"])}, reverse=True)
    store: ObjectStore | None = None
    store_name = fixed or (disk_config.default_store if disk_config is not None else "") or "plain"

    journal: Journal | None = None
    strips = StripLog(config.base, synced=not config.nosync)

    def make_inner(name: str, *, replacing: bool = True) -> ChecksummedStore:
        options = StoreOptions(
            disks, direct_io=config.directio, replacing=replacing, node=identity if by_disk else None
        )
        return ChecksummedStore(plugins.make_object_store(name, options), checksum_files)

    def make_store(name: str) -> ObjectStore:
        made = make_inner(name)
        return StripStore(made, strips) if journal is None else JournaledStore(made, journal)

    space = 0
    if not config.gateway:
        disks = usable_disks(config.disks, config.base)
        # Small writes to fast disks are not to wait for a slower one, nor to depend on it after a loss of power.
        strips.of_copies &= same_device(config.base, disks)
        if by_disk and len(disks) > NODE_DISKS_MAX:
            raise ConfigError(f"{len(disks)} disks; with --disk-vnodes a sheep has at most {NODE_DISKS_MAX}")
        checksum_files = ChecksumFiles(
            config.base,
            durable=not config.nosync or config.journal is not None,
            started_ns=int(SystemClock().time() * 1e9),
            used_elsewhere=strips.give_up,
        )
        storedir.config_follows = checksum_files.config_follows
        storedir.config_written = checksum_files.config_written
        inner = make_inner(store_name, replacing=disk_config is None or not disk_config.ctime)
        shift = disk_config.block_size_shift if disk_config is not None else 0
        inner.distrust = True
        strips.replay(inner, block_size_shift=shift)
        left = Left(strips=strips.left.strips)
        journal = start_journal(config, inner, block_size_shift=shift, left=left, leaving=strips.begin)
        inner.distrust = False
        if journal is None:
            strips.begin()
            store = StripStore(inner, strips)
        else:
            strips.remove()
            store = JournaledStore(inner, journal)
        space = (disk_config.space if disk_config is not None else 0) or store.usage().weight_bytes
    vnodes = 0 if config.gateway else config.vnodes or 128
    zone = config.zone if config.zone is not None else default_zone(identity.address)
    me = Node(identity, vnodes, zone, space)
    if by_disk and store is not None:
        me = with_disks(me, store.weights())
    _log_pools(config)
    workers = min(WORKERS_MAX, config.threads_max or WORKERS_MAX)
    async with ThreadExecutor(workers) as executor:
        services = Services(SystemClock(), SystemRandom(), executor, plugins.make_transport(config.transport))
        parts = SheepParts(
            services=services,
            driver=driver,
            storedir=storedir,
            store=store,
            store_name=store_name,
            store_names=store_names,
            make_store=make_store,
            redundancies=redundancies,
            front_ends=front_ends,
            listen=_listen_addresses(config),
            fixed_store=fixed,
            announcer=plugins.load_observers(),
            notes=notes,
            started=started,
            scrub_notes=ScrubNotes(config.base),
            resting=give_back,
        )
        sheep = Sheep(me, config, parts)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_stop_on_signal, sheep)
            code = await sheep.run()
            tasks.cancel_scope.cancel()
    if store is not None and sheep.backend.store is not None:
        if journal is not None:
            journal.finish()
        strips.finish()
        sheep.backend.store.close()
    notes.close()
    logger.info("shutdown")
    return code


def _log_pools(config: SheepConfig) -> None:
    """The lines that scripts know; one set of worker threads does what all these pools were for."""
    counts = dict(config.thread_counts)
    for pool in POOLS:
        if counts.get(pool):
            logger.info("# of threads in %s workqueue: %d", POOLS_RENAMED.get(pool, pool), counts[pool])
        else:
            logger.info("%s workqueue is created as dynamic", pool)


async def _stop_on_signal(sheep: Sheep) -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            sheep.control.killed()
            sheep.stop(0, "stopping on SIGTERM")


def _listen_addresses(config: SheepConfig) -> list[str]:
    host = config.bind_address or ""
    text = f"[{host}]" if ":" in host else host
    addresses = [f"{text}:{config.port}", f"unix:{config.base}/sock"]
    if config.io_address is not None:
        io_host = config.io_address.host
        addresses.append(f"{f'[{io_host}]' if ':' in io_host else io_host}:{config.io_address.port}")
    return addresses


def node_id(config: SheepConfig, driver: ClusterDriver) -> NodeId:
    """The identity this sheep announces: ``-y``, else what the driver says, else the first real interface's address."""
    host = config.my_address or driver.default_host or first_interface_address()
    me = NodeId.of(host, config.port)
    if config.io_address is None:
        return me
    io = NodeId.of(config.io_address.host, config.io_address.port)
    return NodeId(me.address, me.port, io.address, io.port)


def first_interface_address() -> str:
    """The IPv4 address of the first interface that is up and not loopback; 127.0.0.1 without one."""
    import fcntl
    import socket
    import struct

    query_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("16s240x", name.encode()[:15])
            try:
                answer = fcntl.ioctl(probe, query_address, request)
            except OSError:
                continue  # no IPv4 address
            address = socket.inet_ntoa(answer[20:24])
            if not address.startswith("127."):
                return address
    return "127.0.0.1"


def _check_start(config: SheepConfig, storedir: Any, disk_config: Any, identity: NodeId) -> None:  # Any: late imports
    from sheepdog.daemon.storedir import check_config, check_vnodes

    if disk_config is None:
        return
    check_config(disk_config, fixed_vnodes=config.vnodes is not None, gateway=config.gateway, mode=config.vnode_mode)
    if config.vnodes is not None:
        latest = storedir.latest_epoch()
        record = storedir.read_epoch(latest) if latest else None
        check_vnodes([record] if record is not None else [], identity, config.vnodes)
