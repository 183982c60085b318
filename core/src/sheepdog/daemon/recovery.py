"""Brings back to this sheep what it should hold and does not.

After each change of membership: what the new ring no longer assigns here is set aside in the stale area, the other members'
object lists tell what exists, and every object that belongs here and is missing is fetched. A live copy at a present
holder is the best source, for it receives every write; then come the holders of older epochs, newest first, and their
stale copies; last, any stale copy that any member has, if a volume still refers to the object.

A request that needs an object which is still missing has it fetched at once, out of turn. A fetched object never replaces
one that appeared meanwhile: a write that missed us was not acknowledged, and is settled by its primary.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from struct import iter_unpack
from typing import TYPE_CHECKING, Any, TypeAlias

import anyio

from sheepdog.contracts.services import Clock, Executor
from sheepdog.contracts.store import REPLICA, Buffer, ShardKey
from sheepdog.daemon.interfaces import RecoveryStatus
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.placement import Placement, Placer
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.state import SheepState
from sheepdog.errors import ObjectNotFound, RequestError, SheepdogError, TransportError
from sheepdog.model.ids import index_of, inode_oid, is_data, is_ledger, is_sparse, vid_of
from sheepdog.model.inode import MAP_OFFSET
from sheepdog.model.node import NodeId
from sheepdog.model.ring import Ring
from sheepdog.wire.header import Request, Response
from sheepdog.wire.opcodes import Flag, Op
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.gateway import Gateway

logger = logging.getLogger(__name__)

PREPARING, RECOVERING, NOTIFYING = 0, 1, 2
PARALLEL_PER_DISK = 2
LIST_BYTES_FIRST = 1 << 20
LIST_BYTES_MAX = 64 << 20
RETRY_S = 0.5
LIST_RETRY_S = 0.05
PIECE_BYTES = 4 << 20
STORE_POLICY_OFFSET = 553  # in the inode; not 0 for a hyper volume

Fetched: TypeAlias = Callable[[int], None]
RingOf: TypeAlias = Callable[[int], Awaitable[Ring | None]]  # of an epoch; None when nobody knows it


class Recovery:
    """The recovery of one sheep. ``run`` is its background task."""

    def __init__(
        self,
        state: SheepState,
        shards: Shards | None,
        placer: Placer,
        peers: PeerPool,
        executor: Executor,
        clock: Clock,
        outbox: Outbox,
        spawn: Callable[..., None],
        *,
        disks: int = 1,
        wildcard: bool = False,
    ) -> None:
        self._state = state
        self._shards = shards
        self._placer = placer
        self._peers = peers
        self._executor = executor
        self._clock = clock
        self._outbox = outbox
        self._spawn = spawn
        self._parallel = PARALLEL_PER_DISK * max(1, disks)
        self._wildcard = wildcard
        self.gateway: Gateway | None = None
        self.ring_of: RingOf = _no_ring
        self.announce: Callable[[int], Awaitable[None]] = _announce_nothing
        self._wake = anyio.Event()
        self._pending: tuple[Ring, bool] | None = None  # (old ring, lifted) of the cause that is not taken up yet
        self._duty = False  # the next completion is to be announced
        self._active = False
        self._phase = PREPARING
        self._todo: dict[ShardKey, None] = {}
        self._finished = 0
        self._total = 0
        self._fetching: dict[ShardKey, list[Fetched]] = {}
        self._gathered = 0  # the last epoch to which all members had recovered
        self._complete: dict[int, set[NodeId]] = {}
        self._throttle = (0, 0, False)

    # ---- for the control plane

    def status(self) -> RecoveryStatus:
        """Where the current recovery stands."""
        if not self._active:
            return RecoveryStatus()
        return RecoveryStatus(True, self._phase, self._finished, self._total)

    def membership_changed(self, old_ring: Ring, lifted: bool) -> None:
        """Recovery towards the present ring starts, or the running one is replaced."""
        self._duty = self._duty or lifted
        self._pending = (old_ring, lifted or (self._pending is not None and self._pending[1]))
        self._active = True
        self._phase = PREPARING
        self._finished = self._total = 0
        self._wake.set()

    async def retire_all(self, epoch: int) -> None:
        """Every live shard is in the stale area of ``epoch``."""
        if self._shards is None:
            return
        store = self._shards.store

        def work() -> None:
            for key in list(store.keys()):
                store.retire(key, epoch)

        await self._executor.run(work)

    def enabled_changed(self) -> None:
        """Recovery was switched on or off for the whole cluster."""
        self._wake.set()

    def completed(self, epoch: int, node: NodeId) -> None:
        """``node`` has everything it should have at ``epoch``; when all have, older copies are not needed any more."""
        done = self._complete.setdefault(epoch, set())
        done.add(node)
        if epoch != self._state.epoch or not done.issuperset(member.id for member in self._state.ring.nodes):
            return
        self._gathered = epoch
        self._complete = {}
        logger.info("all nodes are recovered, epoch %d", epoch)
        if self._shards is not None and not self._active:
            self._spawn(self._purge)

    def reset(self) -> None:
        """The cluster was formatted."""
        self._gathered = 0
        self._complete = {}
        self._pending = None
        self._duty = self._active = False
        self._todo = {}

    async def cleanup(self) -> None:
        """The stale area is empty.

        :raises RequestError: NODE_IN_RECOVERY.
        """
        if self._active:
            raise RequestError("this node is recovering", result=Result.NODE_IN_RECOVERY)
        await self._purge()

    def throttle(self) -> tuple[int, int, bool]:
        """(objects, milliseconds, on)."""
        return self._throttle

    def set_throttle(self, count: int, interval_ms: int, on: bool) -> None:
        """At most ``count`` objects start per ``interval_ms``."""
        self._throttle = (count, interval_ms, on)

    async def _purge(self) -> None:
        if self._shards is not None:
            await self._executor.run(self._shards.store.purge_stale)

    # ---- for the data path

    def may_find(self, oid: int) -> bool:
        """Whether an object that is missing here may still turn up by ``fetch``."""
        if not self._active:
            return False
        if self._phase == PREPARING:
            return True
        return any(key.oid == oid for key in self._fetching) or ShardKey(oid) in self._todo or self._strip_todo(oid)

    def _strip_todo(self, oid: int) -> bool:
        placement = self._placer.placement(oid)
        return not placement.scheme.identical and ShardKey(oid, placement.index) in self._todo

    def fetch(self, oid: int, index: int, done: Fetched) -> None:
        """The shard is here, brought from wherever it exists; ``done(result)``, NO_OBJ when nobody has it."""
        key = ShardKey(oid, index)
        waiting = self._fetching.get(key)
        if waiting is not None:
            waiting.append(done)
            return
        self._fetching[key] = [done]
        self._spawn(self._fetch_task, key)

    def serve(self, key: ShardKey, request: Request, answer: Callable[[int, Any], None]) -> None:
        """Another sheep recovers: our live version, else the stale one of the epoch that it asks for.

        The range that was asked for is answered, shorter at the end of the object.
        """
        assert self._shards is not None, "asked of a sheep with a store"
        store = self._shards.store
        epoch = request.tgt_epoch
        wildcard = bool(request.flags & Flag.WILDCARD)
        offset, length = request.offset, request.data_length

        def work() -> memoryview:
            view = memoryview(bytearray(length))
            try:
                return view[: store.read_into(key, view, offset_bytes=offset)]
            except ObjectNotFound:
                found = epoch
                if wildcard:
                    found = max((e for stale, e in store.stale_keys() if stale == key), default=epoch)
                return view[: store.read_stale_into(key, found, view, offset_bytes=offset)]

        self._shards.submit(work, answer)

    # ---- fetching

    async def _fetch_task(self, key: ShardKey) -> None:
        result: int = Result.NETWORK_ERROR
        try:
            result = await self._fetch(key)
        except SheepdogError as error:
            logger.warning("cannot recover oid=%016x: %s", key.oid, error)
            result = error.result
        finally:
            with self._outbox:
                self._todo.pop(key, None)
                for done in self._fetching.pop(key, ()):
                    done(result)

    async def _fetch(self, key: ShardKey) -> int:
        assert self._shards is not None, "only a sheep with a store recovers"
        store = self._shards.store
        if await self._executor.run(lambda: store.exists(key)):
            return 0
        epoch = self._state.epoch
        placement = self._placer.placement(key.oid)
        if key.index != REPLICA and placement.scheme.identical:
            key = ShardKey(key.oid)
        if is_data(key.oid) and self._deleted(vid_of(key.oid)) and not await self._referenced(key.oid):
            return Result.NO_OBJ
        content = await self._find(key, epoch, placement)
        if content is None and key.index != REPLICA:
            content = await self._rebuild(key, epoch, placement)
        if content is None and await self._referenced(key.oid):
            content = await self._find_anywhere(key, epoch)
        if content is None:
            return Result.NO_OBJ
        if self._state.epoch != epoch:
            return Result.OLD_NODE_VER
        return await self._put(key, content)

    async def _find(self, key: ShardKey, epoch: int, placement: Placement) -> Buffer | None:
        """The shard from its holders, of this epoch and then of older ones."""
        me = self._state.me.id
        asked: set[tuple[NodeId, int]] = set()
        trouble: SheepdogError | None = None
        for older in range(epoch, max(0, self._gathered - 1, epoch - 1024), -1):
            ring = self._state.ring if older == epoch else await self.ring_of(older)
            if ring is None:
                logger.warning("epoch=%d is unknown here, clients may see old data", older)
                continue
            members = {node.id for node in self._state.ring.nodes}
            holders = [node.id for node in ring.holders(key.oid, placement.scheme.shards)]
            if key.index != REPLICA:
                holders = holders[key.index : key.index + 1]
            for node in holders:
                if node not in members or (node, older) in asked:
                    continue
                asked.add((node, older))
                try:
                    if node == me:
                        content = await self._own_stale(key, older)
                    else:
                        content = await self._read_whole(node, key, epoch, older)
                except TransportError as error:
                    trouble = error
                    continue
                if content is not None:
                    return content
        if trouble is not None:
            raise trouble
        return None

    async def _find_anywhere(self, key: ShardKey, epoch: int) -> Buffer | None:
        for node in self._state.ring.storage:
            if node.id != self._state.me.id:
                try:
                    content = await self._read_whole(node.id, key, epoch, 0, Flag.WILDCARD)
                except TransportError:
                    continue
            else:
                content = await self._own_stale(key, None)
            if content is not None:
                logger.warning("oid=%016x was found only in the stale area of node=%s", key.oid, node.id.text)
                return content
        return None

    async def _own_stale(self, key: ShardKey, epoch: int | None) -> Buffer | None:
        assert self._shards is not None
        store = self._shards.store

        def work() -> Buffer | None:
            try:
                found = epoch
                if found is None:
                    found = max((e for stale, e in store.stale_keys() if stale == key), default=0)
                buffer = bytearray(store.stale_size(key, found))
                store.read_stale_into(key, found, memoryview(buffer), offset_bytes=0)
                return buffer
            except ObjectNotFound:
                return None

        return await self._executor.run(work)

    async def _read_whole(self, node: NodeId, key: ShardKey, epoch: int, older: int, flags: int = 0) -> Buffer | None:
        """The whole shard from ``node``, ``None`` if it has none.

        :raises TransportError: no answer, or not now.
        :raises RequestError: the epoch moved on.
        """
        placement = self._placer.placement(key.oid)
        length = placement.object_bytes
        if key.index != REPLICA:
            length = placement.scheme.shard_bytes(length)
        event = anyio.Event()
        answers: list[Response] = []

        def answered(response: Response) -> None:
            answers.append(response)
            event.set()

        with self._outbox:
            self._peers.link(node).object_request(
                Op.READ_PEER, epoch, key.oid, answered, flags=Flag.RECOVERY | flags, tgt_epoch=older,
                length=length, ec_index=max(key.index, 0), copy_policy=placement.policy,
            )  # fmt: skip
        await event.wait()
        response = answers[0]
        if response.result == Result.NO_OBJ:
            return None
        if response.result == Result.OLD_NODE_VER:
            raise RequestError("the epoch moved on", result=Result.OLD_NODE_VER)
        if response.result:
            raise TransportError(f"node {node.text} answers 0x{response.result:02x} for oid={key.oid:016x}")
        return response.body

    async def _rebuild(self, key: ShardKey, epoch: int, placement: Placement) -> Buffer | None:
        """Computes a strip from enough others."""
        scheme = placement.scheme
        parts: dict[int, Buffer] = {}
        for index in range(scheme.shards):
            if index == key.index:
                continue
            content = await self._find(ShardKey(key.oid, index), epoch, placement)
            if content is not None:
                parts[index] = content
            if len(parts) == scheme.shards_to_read:
                return await self._executor.run(lambda: scheme.rebuild(key.index, parts))
        return None

    def _deleted(self, vid: int) -> bool:
        state = self._state.vdis.get(vid)
        return state is not None and state.deleted

    def _heirs(self, vid: int) -> list[int]:
        """The live volumes that may name data objects of ``vid``: itself and what descends from it."""
        states = {state.vid: state for state in self._state.vdis.states()}
        found = []
        for state in states.values():
            if state.deleted:
                continue
            ancestor = state.vid
            while ancestor != vid and ancestor in states and states[ancestor].parent_vid:
                ancestor = states[ancestor].parent_vid
            # Where the line breaks off, relationship cannot be ruled out.
            if ancestor == vid or ancestor not in states:
                found.append(state.vid)
        return found

    async def _referenced(self, oid: int) -> bool:
        """Whether any live volume names this object; old copies of what was given up must not come back."""
        if not is_data(oid):
            return not self._deleted(vid_of(oid)) and self._state.vdis.get(vid_of(oid)) is not None
        if self.gateway is None:
            return False
        for heir in self._heirs(vid_of(oid)):
            try:
                if await self._names(heir, oid):
                    return True
            except SheepdogError:
                return True  # cannot be ruled out
        return False

    async def _names(self, volume: int, oid: int) -> bool:
        """Whether the map of ``volume`` has this object; always of a hyper volume, whose tree is not searched."""
        if any(await self._read_object(inode_oid(volume), STORE_POLICY_OFFSET, 1)):
            return True
        entry = await self._read_object(inode_oid(volume), MAP_OFFSET + 4 * index_of(oid), 4)
        return int.from_bytes(entry, "little") == vid_of(oid)

    async def _read_object(self, oid: int, offset: int, length: int) -> Buffer:
        assert self.gateway is not None
        event = anyio.Event()
        outcome: list[tuple[int, Any]] = []

        def done(result: int, data: Any) -> None:  # Any: the bytes on success
            outcome.append((result, data))
            event.set()

        with self._outbox:
            self.gateway.submit_read(oid, offset, length, done)
        await event.wait()
        result, data = outcome[0]
        if result:
            raise RequestError(f"oid={oid:016x} cannot be read", result=result)
        content: Buffer = data
        return content

    async def _put(self, key: ShardKey, content: Buffer) -> int:
        """The shard is stored, unless one appeared meanwhile."""
        shards = self._shards
        assert shards is not None
        store = shards.store
        placement = self._placer.placement(key.oid)
        size = placement.object_bytes
        if key.index != REPLICA:
            size = placement.scheme.shard_bytes(size)
        durable = shards.durable

        def work() -> None:
            if not store.exists(key):
                store.create(
                    key, content, offset_bytes=0, size_bytes=max(size, len(content)), sparse=is_sparse(key.oid),
                    durable=durable,
                )  # fmt: skip

        event = anyio.Event()
        results: list[int] = []

        def done(result: int, _: object) -> None:
            results.append(result)
            event.set()

        with self._outbox:
            shards.run(key, work, done)
        await event.wait()
        return results[0]

    # ---- the background task

    async def run(self) -> None:
        """Recovers whenever there is a cause, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = anyio.Event()
            while self._pending is not None or self._todo:
                if self._pending is not None:
                    old_ring, lifted = self._pending
                    self._pending = None
                    if not await self._prepare(old_ring, lifted):
                        await anyio.sleep(RETRY_S)
                        if self._pending is None:
                            self._pending = (old_ring, lifted)
                        continue
                if self._state.recovery_disabled and self._todo:
                    break
                await self._recover()
                if not self._replaced() and not self._todo:
                    await self._finish()

    async def _prepare(self, old_ring: Ring, lifted: bool) -> bool:
        """Sets aside what left us and lists what is missing; False: try again."""
        epoch = self._state.epoch
        self._todo = {}
        if self._shards is None:
            return True
        target = epoch - 1 if lifted else epoch
        store = self._shards.store
        me = self._state.me.id

        def belongs(key: ShardKey) -> bool:
            placement = self._placer.placement(key.oid)
            if placement.scheme.identical:
                return placement.local
            return placement.index == key.index

        keys = await self._executor.run(lambda: list(store.keys()))
        here = set(keys)
        for key in keys:
            if not belongs(key) and not self._shards.busy(key):
                await self._executor.run(partial(_retire, store, key, target))
                here.discard(key)
            if self._state.epoch != epoch:
                return True  # a newer cause is pending
        wanted: dict[int, None] = {}
        for node in self._state.ring.storage:
            if node.id == me:
                oids: Sequence[int] = sorted(
                    {key.oid for key in keys}
                    | await self._executor.run(lambda: {key.oid for key, _ in store.stale_keys()})
                )
            else:
                listed = await self._list(node.id, epoch)
                if listed is None:
                    return self._state.epoch != epoch  # without it something could be overlooked: again, unless replaced
                oids = listed
            for oid in oids:
                wanted[oid] = None
        todo: dict[ShardKey, None] = {}
        heirless: dict[int, bool] = {}
        for oid in sorted(wanted):
            placement = self._placer.placement(oid)
            if not placement.local:
                continue
            if is_data(oid) or is_ledger(oid):
                # A node that was away while a volume was deleted still has its objects: nobody wants them back.
                vid = vid_of(oid)
                if vid not in heirless:
                    heirless[vid] = self._deleted(vid) and not self._heirs(vid)
                if heirless[vid]:
                    continue
            key = ShardKey(oid, REPLICA if placement.scheme.identical else placement.index)
            if key not in here:
                todo[key] = None
        if self._state.epoch != epoch:
            return True
        # Inodes first: without them nothing can be opened.
        self._todo = dict.fromkeys(sorted(todo, key=lambda key: (is_data(key.oid), key)))
        self._total = len(todo)
        self._finished = 0
        self._phase = RECOVERING
        return True

    async def _list(self, node: NodeId, epoch: int) -> list[int] | None:
        """What ``node`` holds, live and stale. Asked until it answers or the epoch is over (``None``)."""
        room = LIST_BYTES_FIRST
        asked = 0
        while self._state.epoch == epoch and room <= LIST_BYTES_MAX:
            try:
                response = await self._peers.call(node, Request(Op.GET_OBJ_LIST, epoch=epoch, data_length=room))
            except TransportError:
                result: int = Result.NETWORK_ERROR
            else:
                result = response.result
            if result == Result.BUFFER_SMALL:
                room *= 4
            elif result:
                asked += 1
                if asked % 20 == 0:
                    logger.warning("node=%s does not give its object list: result=0x%02x", node.text, result)
                await anyio.sleep(LIST_RETRY_S)
            else:
                return [oid for (oid,) in iter_unpack("<Q", bytes(response.body))]
        return None

    async def _recover(self) -> None:
        """Fetches everything listed, a few at a time, until done or replaced."""
        epoch = self._state.epoch
        started = 0
        window_began = self._clock.monotonic()
        limiter = anyio.CapacityLimiter(self._parallel)

        async def one(key: ShardKey) -> None:
            async with limiter:
                if key not in self._todo or self._pending is not None:
                    return
                result = await self._wait_fetch(key)
                if result and result != Result.NO_OBJ and self._state.epoch == epoch and self._pending is None:
                    self._todo[key] = None  # again, after a pause
                else:
                    self._finished += 1

        async with anyio.create_task_group() as tasks:
            for key in list(self._todo):
                if self._replaced() or self._state.recovery_disabled:
                    break
                count, interval_ms, on = self._throttle
                if on and count and started and started % count == 0:
                    pause = window_began + interval_ms / 1000 - self._clock.monotonic()
                    if pause > 0:
                        await anyio.sleep(pause)
                    window_began = self._clock.monotonic()
                started += 1
                while limiter.statistics().tasks_waiting > self._parallel:
                    await anyio.sleep(0.001)
                tasks.start_soon(one, key)
                if started % 64 == 0 and self._total:
                    logger.info("object recovery progress %3.0f%% ", 100 * self._finished / self._total)
        if self._todo and self._pending is None and not self._state.recovery_disabled:
            await anyio.sleep(RETRY_S)

    def _replaced(self) -> bool:
        """A newer cause is waiting."""
        return self._pending is not None

    async def _wait_fetch(self, key: ShardKey) -> int:
        event = anyio.Event()
        results: list[int] = []

        def done(result: int) -> None:
            results.append(result)
            event.set()

        self.fetch(key.oid, key.index, done)
        await event.wait()
        return results[0]

    async def _finish(self) -> None:
        epoch = self._state.epoch
        self._phase = NOTIFYING
        if self._duty:
            try:
                await self.announce(epoch)
            except SheepdogError as error:
                logger.warning("completion of recovery could not be announced: %s", error)
            if self._pending is not None:
                return
            self._duty = False
        self._active = False
        if self._gathered == self._state.epoch:
            await self._purge()


def _retire(store: Any, key: ShardKey, epoch: int) -> None:  # Any: an ObjectStore
    try:
        store.retire(key, epoch)
    except ObjectNotFound:
        pass  # removed meanwhile


async def _no_ring(_: int) -> Ring | None:
    return None


async def _announce_nothing(_: int) -> None:
    return None
