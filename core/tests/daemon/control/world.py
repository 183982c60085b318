"""Several control planes in one process: a memory cluster, a shared object space, and the disks that outlive a sheep.

Objects live in one place instead of on nodes, because placement is not what is tested here; each sheep's disks see all
of them. Map writes drop references as the data path does.
"""

from __future__ import annotations

import random
from contextlib import asynccontextmanager

import anyio

from sheepdog.contracts.services import Services
from sheepdog.contracts.store import REPLICA, ShardKey, Usage
from sheepdog.daemon.control import Control
from sheepdog.daemon.disk_list import with_disks
from sheepdog.daemon.interfaces import RecoveryStatus
from sheepdog.daemon.state import SheepState
from sheepdog.errors import ObjectNotFound, SheepdogError, TransportError
from sheepdog.model.clusterinfo import ClusterStatus
from sheepdog.model.ids import data_oid, is_inode, ledger_oid
from sheepdog.model.inode import HEADER_BYTES, MAP_OFFSET, REFS_OFFSET, InodeHeader
from sheepdog.model.ledger import UNSHARED, drop
from sheepdog.model.node import Node, NodeId, VnodeMode
from sheepdog.testing.memory_cluster import MemoryCluster
from sheepdog.wire.header import Request, Response
from sheepdog.wire.opcodes import OP_TABLE, SHEEP_PROTO_VER, Op
from sheepdog.wire.payloads import ClusterRequest, VdiRequest, VdiResponse, pack_names
from sheepdog.wire.results import Result

GiB = 1 << 30
PAGE = 4096
AUTO = 0x04


class Clock:
    """The event loop's time; the calendar starts at a fixed day."""

    def monotonic(self):
        return anyio.current_time()

    def time(self):
        return 1_700_000_000 + anyio.current_time() % 1_000_000


class InlineExecutor:
    """Runs work on the loop, after a turn of it."""

    async def run(self, work):
        await anyio.lowlevel.checkpoint()
        return work()


class ObjectSpace:
    """All objects of the cluster, in pages."""

    def __init__(self):
        self.pages = {}  # oid -> {page number: bytearray}
        self.ledgers = {}
        self.fail = None  # called with (operation, oid); raises what the operation shall raise
        self.log = []

    def _check(self, operation, oid):
        self.log.append((operation, oid))
        if self.fail is not None:
            self.fail(operation, oid)

    async def read(self, oid, offset, length):
        await anyio.lowlevel.checkpoint()
        self._check("read", oid)
        return self.peek(oid, offset, length)

    def peek(self, oid, offset, length):
        if oid not in self.pages:
            raise ObjectNotFound(f"{oid:016x}")
        pages = self.pages[oid]
        first = offset // PAGE
        last = (offset + length + PAGE - 1) // PAGE
        whole = b"".join(bytes(pages.get(number, bytes(PAGE))) for number in range(first, last))
        return whole[offset - first * PAGE :][:length]

    def poke(self, oid, offset, data):
        pages = self.pages[oid]
        view = memoryview(bytes(data))
        while len(view):
            number, start = divmod(offset, PAGE)
            piece = view[: PAGE - start]
            pages.setdefault(number, bytearray(PAGE))[start : start + len(piece)] = piece
            view = view[len(piece) :]
            offset += len(piece)

    async def write(self, oid, offset, data):
        await anyio.lowlevel.checkpoint()
        self._check("write", oid)
        if oid not in self.pages:
            raise ObjectNotFound(f"{oid:016x}")
        if is_inode(oid) and offset >= MAP_OFFSET and offset + len(data) <= REFS_OFFSET:
            self._write_map(oid, offset, data)
        else:
            self.poke(oid, offset, data)

    def _write_map(self, oid, offset, data):
        first = (offset - MAP_OFFSET) // 4
        old = memoryview(self.peek(oid, offset, len(data))).cast("I")
        new = memoryview(bytes(data)).cast("I")
        pairs = memoryview(self.peek(oid, REFS_OFFSET + 8 * first, 8 * len(new))).cast("i")
        self.poke(oid, offset, data)
        for step in range(len(new)):
            if old[step] == new[step]:
                continue
            self.poke(oid, REFS_OFFSET + 8 * (first + step), bytes(8))
            if old[step]:
                self._drop(data_oid(old[step], first + step), pairs[2 * step], pairs[2 * step + 1])

    def _drop(self, oid, generation, count):
        if not generation and not count:
            self.pages.pop(oid, None)
            return
        left = drop(self.ledgers.get(oid, UNSHARED), generation, count)
        self.ledgers[oid] = left
        if not left:
            del self.ledgers[oid]
            self.pages.pop(oid, None)

    async def create(self, oid, offset, data, cow_oid=0, copies=0, policy=0):
        await anyio.lowlevel.checkpoint()
        self._check("create", oid)
        self.pages[oid] = {}
        self.poke(oid, offset, data)

    async def remove(self, oid):
        await anyio.lowlevel.checkpoint()
        self._check("remove", oid)
        if self.pages.pop(oid, None) is None:
            raise ObjectNotFound(f"{oid:016x}")

    def data_objects(self):
        """Oids of all data objects, ascending."""
        return sorted(oid for oid in self.pages if not oid >> 59)

    def header(self, vid):
        return InodeHeader.unpack(self.peek(1 << 63 | vid << 32, 0, HEADER_BYTES))

    def ledger(self, oid):
        return self.ledgers.get(oid), ledger_oid(oid)


class Disks:
    """What outlives a sheep: config, epochs, and a store that shows the shared objects."""

    def __init__(self, space):
        self._space = space
        self.config = None
        self.records = {}
        self.usage_bytes = 10 * GiB
        self.sizes = {}  # path -> size of each disk, where vnodes belong to disks
        self.wiped = 0

    # StoreDirectory
    def read_config(self):
        return self.config

    def write_config(self, config):
        self.config = config

    def epochs(self):
        return sorted(self.records)

    def read_epoch(self, epoch):
        return self.records.get(epoch)

    def write_epoch(self, epoch, record):
        self.records[epoch] = record

    def remove_epochs(self, after=0):
        self.records = {epoch: record for epoch, record in self.records.items() if epoch <= after}

    # the part of ObjectStore that the control plane uses
    def keys(self):
        return [ShardKey(oid, REPLICA) for oid in sorted(self._space.pages)]

    def stale_keys(self):
        return []

    def read_into(self, key, buffer, *, offset_bytes):
        buffer[:] = self._space.peek(key.oid, offset_bytes, len(buffer))
        return len(buffer)

    def exists(self, key):
        return key.oid in self._space.pages

    def digest(self, key, *, epoch=None, cache=False):
        if key.oid not in self._space.pages:
            raise ObjectNotFound("")
        return bytes([7]) * 20

    def remove(self, key):
        if self._space.pages.pop(key.oid, None) is None:
            raise ObjectNotFound("")

    def usage(self):
        return Usage(GiB, self.usage_bytes - GiB, self.usage_bytes)

    reweigh = usage

    def disks(self):
        return ()

    def weights(self):
        return dict(sorted(self.sizes.items()))


class Recorder:
    """Recovery that only remembers what it was told."""

    def __init__(self):
        self.changes = []  # (epochs lifted?, nodes of the old ring)
        self.altered = []  # (volume, copies)
        self.retired = []
        self.completions = []
        self.running = False
        self.resets = 0

    def status(self):
        return RecoveryStatus(in_recovery=self.running)

    def volume_deleted(self):
        pass

    def copies_changed(self, vid, before, after):
        self.altered.append((vid, after))

    def membership_changed(self, old_ring, lifted):
        self.changes.append((lifted, len(old_ring.nodes)))

    async def retire_all(self, epoch):
        self.retired.append(epoch)

    def enabled_changed(self):
        pass

    def completed(self, epoch, node):
        self.completions.append((epoch, node))

    def reset(self):
        self.resets += 1

    async def cleanup(self):
        pass

    def throttle(self):
        return (0, 0, False)

    def set_throttle(self, count, interval_ms, on):
        pass


class Backend:
    def __init__(self, disks, executor, gateway):
        self.storedir = disks
        self.executor = executor
        self.store = None if gateway else disks
        self.store_name = "plain"
        self.store_names = ("tree", "plain")
        self.recovery = Recorder()
        self.stats = self

    def counters(self):
        return range(15)

    async def use(self, work):
        return await self.executor.run(lambda: work(self.store))

    async def switch(self, name):
        self.storedir.wiped += 1
        self.store_name = name


class Dispatch:
    """The opcode table with the gates of the real one."""

    def __init__(self, state):
        self._state = state
        self._handlers = {}
        self._force = set()

    def fast(self, opcode, handler, *, force=None):
        async def run(request):
            return handler(request)

        self.task(opcode, run, force=force)

    def task(self, opcode, handler, *, force=None, unlimited=False):
        assert opcode not in self._handlers
        self._handlers[opcode] = handler
        if force or (force is None and opcode in OP_TABLE and OP_TABLE[opcode].force):
            self._force.add(opcode)

    async def call(self, request):
        state = self._state
        if request.opcode not in self._handlers:
            return Response(Result.INVALID_PARMS)
        if state.status is ClusterStatus.SHUTDOWN:
            return Response(Result.SHUTDOWN)
        if state.status is ClusterStatus.KILLED:
            return Response(Result.KILLED)
        if state.status is ClusterStatus.WAIT and request.opcode not in self._force:
            return Response(Result.WAIT_FOR_JOIN if state.formatted else Result.WAIT_FOR_FORMAT)
        try:
            return await self._handlers[request.opcode](request)
        except SheepdogError as error:
            return Response(error.result)


class Sheep:
    """One control plane, from start to end."""

    def __init__(self, world, node, *, auto, mode):
        self.world = world
        self.disks = world.disks.setdefault(node.id, Disks(world.space))
        if mode is VnodeMode.DISK and not node.gateway:
            node = with_disks(node, self.disks.weights())
        self.node = node
        self.state = SheepState(node, mode)
        self.backend = Backend(self.disks, InlineExecutor(), node.gateway)
        self.dispatch = Dispatch(self.state)
        self.stopped = None  # (exit code, reason)
        self.error = None
        self.scope = anyio.CancelScope()
        self.ended = anyio.Event()
        self.drained = []
        self.control = Control(
            state=self.state,
            driver=world.hub.driver(),
            backend=self.backend,
            peers=self,
            objects=world.space,
            gateway=self,
            dispatcher=self.dispatch,
            lifecycle=self,
            services=Services(Clock(), random.Random(node.id.port), InlineExecutor(), None),
            spawn=lambda function, *args: world.tasks.start_soon(function, *args),
            auto_vnodes=auto,
        )

    async def run(self):
        with self.scope:
            try:
                await self.control.run()
            except SheepdogError as error:
                self.error = error
        self.world.live.pop(self.node.id, None)
        self.ended.set()

    # Lifecycle
    def stop(self, exit_code, reason):
        self.stopped = (exit_code, reason)
        self.scope.cancel()

    # Gateway
    async def drain(self, vid):
        await anyio.lowlevel.checkpoint()
        self.drained.append(vid)

    # PeerCaller
    async def call(self, node, request):
        await anyio.lowlevel.checkpoint()
        target = self.world.live.get(node)
        if target is None or node in self.world.cut or self.node.id in self.world.cut:
            raise TransportError(f"{node.text} is not there")
        response = await target.dispatch.call(request)
        if node not in self.world.live or node in self.world.cut:
            raise TransportError(f"{node.text} is gone")
        return response

    # what tests ask for
    async def ask(self, opcode, variant=None, *, flags=0, data_length=0, body=b"", **fields):
        packed = variant.pack() if variant is not None else None
        proto = 2 if opcode < 0x80 else SHEEP_PROTO_VER
        request = Request(
            opcode, proto=proto, flags=flags, data_length=data_length or len(body), variant=packed, body=body, **fields
        )
        return await self.dispatch.call(request)

    async def format(self, *, copies=1, flags=AUTO, store="plain", ctime=0):
        return await self.ask(
            Op.MAKE_FS,
            ClusterRequest(ctime=ctime, copies=copies, flags=flags),
            body=store.encode() + b"\0",
        )

    async def new_vdi(self, name, *, size=4 * GiB, base=0, snapid=0, **fields):
        response = await self.ask(
            Op.NEW_VDI, VdiRequest(vdi_size=size, base_vdi_id=base, snapid=snapid, **fields), body=pack_names(name)
        )
        return response.result, vid_in(response)

    async def find(self, name, tag=b"", snapid=0):
        response = await self.ask(Op.GET_VDI_INFO, VdiRequest(snapid=snapid), body=pack_names(name, tag))
        return response.result, vid_in(response)

    async def delete(self, name, tag=b"", snapid=0):
        response = await self.ask(Op.DEL_VDI, VdiRequest(snapid=snapid), body=pack_names(name, tag))
        return response.result

    async def lock(self, name, kind=0, tag=b""):
        response = await self.ask(Op.LOCK_VDI, VdiRequest(lock_type=kind), body=pack_names(name, tag))
        return response.result

    async def snapshot(self, name, tag):
        """As dog does it: the tag goes into the inode first."""
        _, vid = await self.find(name)
        await self.world.space.write(1 << 63 | vid << 32, 256, tag.ljust(256, b"\0"))
        return await self.new_vdi(name, base=vid, snapid=1)

    @property
    def epochs(self):
        """epoch -> (node texts, time), as stored."""
        return {
            epoch: (tuple(node.id.text for node in record.nodes), record.time)
            for epoch, record in self.disks.records.items()
        }

    @property
    def view(self):
        """What ``all agree`` compares."""
        state = self.state
        return (
            state.status, state.epoch, state.ctime, state.flags, state.copies, self.epochs,
            [node.id.text for node in state.ring.nodes],
        )  # fmt: skip


def vid_in(response):
    return VdiResponse.unpack(response.variant.ljust(28, b"\0")).vdi_id


class World:
    """The machines."""

    def __init__(self, tasks, seed=0, delay_s_max=0.0):
        self.tasks = tasks
        self.hub = MemoryCluster(seed=seed, delay_s_max=delay_s_max, session_s=0.5, detection_s=0.2)
        self.space = ObjectSpace()
        self.disks = {}
        self.live = {}
        self.cut = set()  # nodes that no peer request reaches

    def start(self, number, *, gateway=False, auto=True, vnodes=128, space=10 * GiB, host="127.0.0.1", sizes=None):
        """A sheep on the disks of that number.

        :param sizes: path and size of each disk; with them, even without any, vnodes belong to disks.
        """
        node = Node(NodeId.of(host, 7000 + number), 0 if gateway else vnodes, number, 0 if gateway else space)
        if sizes:
            self.disks.setdefault(node.id, Disks(self.space)).sizes = sizes
        sheep = Sheep(self, node, auto=auto, mode=VnodeMode.NODE if sizes is None else VnodeMode.DISK)
        self.live[node.id] = sheep
        self.tasks.start_soon(sheep.run)
        return sheep

    async def start_all(self, *numbers, **options):
        """Sheep that joined one after the other."""
        sheep = []
        for number in numbers:
            sheep.append(self.start(number, **options))
            await self.until(lambda: sheep[-1].control.membership.admitted, "join")
        return sheep

    async def kill(self, *sheep):
        """The processes die without a word."""
        for one in sheep:
            if one.node.id in {node.id for node in self.hub.view}:
                self.hub.kill(one.node.id)
            one.scope.cancel()
        for one in sheep:
            await one.ended.wait()

    async def stop(self, *sheep):
        """The processes end in order."""
        for one in sheep:
            one.scope.cancel()
            await one.ended.wait()

    async def until(self, condition, what="condition", seconds=30):
        """Waits until ``condition()`` is true."""
        deadline = anyio.current_time() + seconds
        while not condition():
            assert anyio.current_time() < deadline, f"{what} did not come true within {seconds} s"
            await anyio.sleep(0.01)

    async def agreed(self, *sheep, status=ClusterStatus.OK, members=None, epoch=None):
        """Waits until these sheep report the same, and (if given) that many members and that epoch."""
        members = len(sheep) if members is None else members

        def same():
            views = [one.view for one in sheep]
            return (
                all(view == views[0] for view in views)
                and views[0][0] is status
                and len(views[0][6]) == members
                and (epoch is None or views[0][1] == epoch)
            )

        try:
            await self.until(same, "agreement")
        except AssertionError as error:
            raise AssertionError("\n".join(str(one.view) for one in sheep)) from error


@asynccontextmanager
async def machines(**options):
    """A world whose sheep end with the test."""
    async with anyio.create_task_group() as tasks:
        try:
            yield World(tasks, **options)
        finally:
            tasks.cancel_scope.cancel()
