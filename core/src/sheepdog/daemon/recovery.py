"""Brings back to this sheep what it should hold and does not.

After each change of membership, disks or number of copies:

1. *Set aside.* What the ring does not assign to this sheep any more goes to the stale area, under the last epoch in
   which it was valid. If several epochs went by before that was done, a shard must have belonged here in each of
   them: it missed changes otherwise. Until this is checked, requests for such shards are answered "try again"
   (``Shards.gate``).
2. *List.* All members say what they have, live and set aside. What belongs here and is not here is to be recovered.
3. *Recover.* Each shard is found (``recovery_fetch``) and stored, inodes first; strips are mended by their primary
   (``recovery_settle``). A request that needs a shard that is still missing has it fetched at once, out of turn.
4. *Finish.* Every member announces when nothing it should have is missing. When all have, what was set aside goes
   (``recovery_purge``).

A fetched shard never replaces one that appeared meanwhile: a write that missed us was not acknowledged, and is settled
by its primary. A removal that comes while a shard is fetched, or after it was set aside, wins over the old versions.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

import anyio

from sheepdog.contracts.services import Clock, Executor
from sheepdog.contracts.store import REPLICA, ObjectStore, ShardKey
from sheepdog.daemon.awaiting import result_of
from sheepdog.daemon.interfaces import RecoveryStatus
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.placement import Placement, Placer
from sheepdog.daemon.recovery_aside import Aside
from sheepdog.daemon.recovery_fetch import LIVE, Finder, Found, RingOf, StaleIndex, VersionReader
from sheepdog.daemon.recovery_keep import Keeper
from sheepdog.daemon.recovery_list import LIST_RETRY_S, Lister
from sheepdog.daemon.recovery_notes import Notes, Progress
from sheepdog.daemon.recovery_pace import Pace
from sheepdog.daemon.recovery_purge import Purger
from sheepdog.daemon.recovery_serve import VersionServer
from sheepdog.daemon.recovery_settle import Mender, digest_at
from sheepdog.daemon.recovery_wanted import Wanted
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.sweep import Sweeper
from sheepdog.daemon.unsettled import Unsettled
from sheepdog.errors import ObjectNotFound, RequestError, SheepdogError, StoreDeviceError
from sheepdog.model.ids import is_sparse
from sheepdog.model.node import NodeId
from sheepdog.model.ring import Ring
from sheepdog.wire.extensions import SETTLE
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.gateway import Gateway

logger = logging.getLogger(__name__)

PREPARING, RECOVERING, NOTIFYING = 0, 1, 2
PARALLEL_PER_DISK = 4  # objects; each of them in pieces, one after the other
RETRY_S = 0.5
ROOM_RETRY_S = 5.0  # for what found no space on our disks, until somebody makes some
COMPARE_BYTES_MIN = 64 << 10  # from here on asking for a digest is cheaper than fetching what we may have already

Fetched: TypeAlias = Callable[[int], None]


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
        notes: Notes | None = None,
        delay_s: float = 0.0,
    ) -> None:
        """
        :param wildcard: the first recovery takes the newest version that any member has, in doubt too.
        :param delay_s: wait so long before moving data after a member left; it may be back soon.
        """
        self._state = state
        self._shards = shards
        self._placer = placer
        self._peers = peers
        self._executor = executor
        self._clock = clock
        self._outbox = outbox
        self._spawn = spawn
        self._parallel = PARALLEL_PER_DISK * max(1, disks)
        self.wildcard = wildcard
        self.unsettled = Unsettled()  # that of the primary, once there is one
        self._notes = notes if notes is not None else Notes()
        self._delay_s = delay_s
        self._keep = Keeper(shards, outbox)
        self.store_shard = self._keep.store
        self._index = StaleIndex(self._store)
        reader = VersionReader(self._store, self._index) if shards is not None else None
        answers = VersionServer(
            state, shards, reader, lambda: self._progress, lambda oid: self._notes.removed.get(oid, 0),
            lambda: self.pace.busy_here(),
        )  # fmt: skip
        self.serve, self.point = answers.serve, answers.point
        self.requests: Callable[[], int] = int  # of clients and other sheep, so far
        self.pace = Pace(clock, lambda: self.requests() - answers.served, self._parallel)
        self.throttle, self.set_throttle = self.pace.throttle, self.pace.set_throttle
        self.finder = Finder(state, peers, executor, outbox, reader, lambda: self._progress.lossy, self.pace)
        self.wanted_objects = Wanted(state, outbox)
        self._lister = Lister(state, peers, placer, self.finder)
        self.mender: Mender | None = None
        self._aside: Aside | None = None
        self._purger: Purger | None = None
        self.sweeper: Sweeper | None = None
        if shards is not None:
            self.finder.corrupt = lambda error: shards.corrupt(error)
            self._purger = Purger(
                state, placer, executor, self._index, self.finder, self.wanted, lambda: self._generation
            )
            self._aside = Aside(state, shards, placer, executor, self._index, self.finder.ring, self._keep.in_lane)
            self.mender = Mender(self, self.finder, state, placer, shards, executor, outbox, spawn)
            self.sweeper = Sweeper(self, state, placer, shards, executor, outbox, spawn)
            shards.removed = self._shard_removed
            shards.created = self._shard_created
            shards.before_flush = self._notes.flush
        self.announce: Callable[[int], Awaitable[None]] = _announce_nothing
        self._progress = Progress()
        self._started = False  # membership was given once
        self._fresh = False  # everything here was set aside when we joined
        self._wake = anyio.Event()
        self._pending: tuple[Ring, bool] | None = None  # (old ring, lifted) of the cause that is not taken up yet
        self._generation = 0  # changes when what is fetched may not belong here any more
        self._active = False
        self._held = False  # there is no room for what would have to be recovered
        self._no_room: dict[ShardKey, None] = {}  # found no space here when they were tried last
        self._not_before = 0.0
        self._phase = PREPARING
        self._todo: dict[ShardKey, None] = {}
        self._missing: dict[ShardKey, None] = {}  # looked for in vain, though they should exist
        self._total = 0
        self._fetching: dict[ShardKey, list[Fetched]] = {}
        self._mended: set[int] = set()  # objects whose strips are whole in the present epoch
        self._mended_epoch = 0
        self._complete: dict[int, set[NodeId]] = {}

    @property
    def gateway(self) -> Gateway | None:
        return self.wanted_objects.gateway

    @gateway.setter
    def gateway(self, gateway: Gateway | None) -> None:
        self.wanted_objects.gateway = gateway
        if gateway is not None:
            self.unsettled = gateway.primary.unsettled

    @property
    def ring_of(self) -> RingOf:
        """How rings of earlier epochs are known."""
        return self.finder.ring_of

    @ring_of.setter
    def ring_of(self, ring_of: RingOf) -> None:
        self.finder.ring_of = ring_of

    @property
    def gathered(self) -> int:
        """The last epoch of which every member had all it should have; 0 for none."""
        return self._progress.gathered

    def _store(self) -> ObjectStore:
        assert self._shards is not None, "only a sheep with a store holds objects"
        return self._shards.store

    # ---- for the control plane

    def status(self) -> RecoveryStatus:
        """Where the current recovery stands. One that was switched off and has listed what is missing is none."""
        if not self._active:
            return RecoveryStatus(unfinished=bool(self._missing))
        if self._phase == RECOVERING and (self._state.recovery_disabled or self._held):
            return RecoveryStatus(unfinished=True)
        return RecoveryStatus(True, self._phase, self._total - len(self._todo), self._total, unfinished=True)

    def copies_changed(self, vid: int, before: int, after: int) -> None:
        """The volume has another number of copies now."""
        if after < before and self._aside is not None:
            self._aside.add((vid, after))
        self.membership_changed(self._state.ring, False)

    def volume_deleted(self) -> None:
        """What it left behind is to be removed."""
        if self.sweeper is not None:
            self.sweeper.soon()

    def membership_changed(self, old_ring: Ring, lifted: bool) -> None:
        """Recovery towards the present ring starts, or the running one is replaced."""
        state = self._state
        if not self._started:
            self._start()
        self._progress.disabled = state.recovery_disabled  # it may have been changed in our absence
        if self._aside is not None:
            self._aside.add()
        self._fresh = False
        self._generation += 1
        self._pending = (old_ring, lifted or (self._pending is not None and self._pending[1]))
        left = {node.id for node in old_ring.storage} - {node.id for node in state.ring.storage}
        self._not_before = self._clock.monotonic() + (self._delay_s if lifted and left else 0.0)
        self._active = True
        self._held = False
        self._phase = PREPARING
        self._wake.set()

    def _start(self) -> None:
        """Takes up what an earlier process noted, if it is about this cluster."""
        self._started = True
        state = self._state
        noted = self._notes.progress
        if noted.ctime != state.ctime:
            self._progress = self._notes.progress = Progress(ctime=state.ctime, disabled=state.recovery_disabled)
            self._notes.forget_removals()
            self._look_for_disks()
        else:
            self._progress = noted
            if noted.retired and not self._fresh and self._aside is not None:
                # Epochs may have begun that this sheep did not live to act upon.
                self._aside.missed(range(noted.retired + 1, state.epoch))
            self._look_for_disks()
            if not self._fresh:
                marked = self._notes.recall()
                self.unsettled.be_cautious(marked)
                if marked:
                    logger.info("%d objects may differ between their holders", len(marked))

    async def retire_all(self, epoch: int) -> None:
        """Every live shard is in the stale area of ``epoch``."""
        self._fresh = True
        self._generation += 1
        if self._aside is not None:
            self._aside.clear()
            while True:
                try:
                    await self._aside.retire(lambda _: epoch)
                    return
                except StoreDeviceError as error:
                    await self._disk_failed(error)
                except SheepdogError as error:
                    logger.warning("setting aside has to be tried again: %s", error)
                    await anyio.sleep(RETRY_S)

    def enabled_changed(self) -> None:
        """Recovery was switched on or off for the whole cluster."""
        self._progress.disabled = self._state.recovery_disabled
        self._save_soon()
        self._wake.set()

    def completed(self, epoch: int, node: NodeId) -> None:
        """``node`` has everything it should have at ``epoch``; when all have, older copies are not needed any more."""
        done = self._complete.setdefault(epoch, set())
        done.add(node)
        state = self._state
        if epoch != state.epoch or not done.issuperset(member.id for member in state.ring.nodes):
            return
        self._complete = {}
        self._notes.forget_removals()
        logger.info("all nodes are recovered, epoch %d", epoch)
        again = self._progress.gathered == epoch
        self._progress.gathered = epoch
        self.unsettled.trust()
        if not self._active:
            self._purge_soon(again)
        self._save_soon()

    def whole(self) -> bool:
        """Everybody has everything in the present epoch, as far as we know."""
        return not self._active and not self._missing and self._progress.gathered == self._state.epoch

    def reset(self) -> None:
        """The cluster was formatted."""
        self._started = self._fresh = True
        self._complete = {}
        self._notes.forget_removals()
        self._missing = {}
        self._pending = None
        self._active = False
        self._todo = {}
        self.finder.forget_rings()
        self._index.forget()
        self.unsettled.forget()
        self.unsettled.turn(())
        self.unsettled.turn(())
        if self._aside is not None:
            self._aside.clear()
        self._progress = self._notes.progress = Progress(ctime=self._state.ctime, gathered=1, retired=1)
        self._look_for_disks()
        self._save_soon()

    async def cleanup(self) -> None:
        """The stale area is emptied, unless some node turns out to need what is in it.

        :raises RequestError: NODE_IN_RECOVERY; some node may still need what is set aside here.
        """
        if not self.whole():
            raise RequestError("the cluster is recovering", result=Result.NODE_IN_RECOVERY)
        # Another sheep may recover within the epoch that was gathered, and look for what is set aside here.
        self._purge_soon(True)

    def _purge_soon(self, again: bool) -> None:
        """:param again: the epoch was gathered before, so that members without a cause since announce nothing."""
        if self._purger is not None:
            self._spawn(self._purger.purge_unneeded if again else self._purger.purge, self._generation)
        self.volume_deleted()  # before, or while we recovered

    def _save_soon(self) -> None:
        self._spawn(self._executor.run, self._notes.save)

    # ---- disks

    def _look_for_disks(self) -> None:
        """Without a disk that an earlier process had, that something is missing here proves nothing."""
        progress = self._progress
        disks = list(self._store().weights()) if self._shards is not None else []
        gone = sorted(set(progress.disks).difference(disks))
        if gone:
            logger.warning("disks that were in use are not there any more: %s", ", ".join(gone))
            progress.lossy = self._state.epoch
        if disks != progress.disks:
            progress.disks = disks
            self._save_soon()

    def lost_disk(self) -> None:
        """A disk and what was on it is gone: that something is missing here proves nothing about the epochs so far."""
        self._progress.lossy = self._state.epoch
        self._save_soon()
        self.disks_changed()

    def disks_changed(self) -> None:
        """Objects are to be looked for anew."""
        self._look_for_disks()
        self._index.forget()
        self.membership_changed(self._state.ring, False)

    # ---- for the data path

    def may_find(self, oid: int) -> bool:
        """Whether an object that is missing here may still turn up by ``fetch``."""
        if not self._active:
            return False
        if self._phase == PREPARING:
            return True
        placement = self._placer.placement(oid)
        key = ShardKey(oid, REPLICA if placement.identical else placement.index)
        return key in self._todo or key in self._fetching

    def has_no_room(self, key: ShardKey) -> bool:
        """The shard belongs here and is missing for want of space: to bring it again would fail again."""
        return key in self._no_room

    def fetch(self, oid: int, index: int, done: Fetched, *, urgent: bool = True) -> None:
        """The shard is here, brought from wherever it exists; ``done(result)``, NO_OBJ when nobody has it."""
        key = ShardKey(oid, index)
        if urgent:
            self.pace.hurry(oid)
        waiting = self._fetching.get(key)
        if waiting is not None:
            waiting.append(done)
            return
        self._fetching[key] = [done]
        self._spawn(self._fetch_task, key)

    async def fetched(self, oid: int, index: int, *, urgent: bool = True) -> int:
        """As ``fetch``, awaited."""
        return await result_of(self._outbox, lambda done: self.fetch(oid, index, done, urgent=urgent))

    def must_mend(self, oid: int) -> bool:
        """Whether strips of the object may be missing or out of step, so that it is to be mended before a change."""
        epoch = self._state.epoch
        if oid in self.unsettled.oids:
            return True
        return self._progress.gathered != epoch and not (self._mended_epoch == epoch and oid in self._mended)

    def mended(self, oid: int) -> None:
        """All shards of the object are where they belong."""
        if self._mended_epoch != self._state.epoch:
            self._mended_epoch = self._state.epoch
            self._mended = set()
        self._mended.add(oid)

    def mend(self, oid: int, done: Fetched) -> None:
        """All shards of the object are where they belong, which its primary sees to."""
        placement = self._placer.placement(oid)
        if placement.primary is None:
            done(Result.HALT)
        elif placement.here:
            assert self.gateway is not None
            self.gateway.primary.settle(oid, done)
        else:
            self._peers.link(placement.primary).object_request(
                SETTLE, self._state.epoch, oid, lambda response: done(response.result)
            )

    # ---- removals

    def _shard_removed(self, key: ShardKey) -> None:
        """A removal is about to be made: older versions of the object must not come back."""
        if self._progress.gathered != self._state.epoch or self._active:
            self._notes.note_removal(key.oid, self._state.epoch)
        self._todo.pop(key, None)
        self._no_room.pop(key, None)

    def _shard_created(self, key: ShardKey) -> None:
        if key.oid in self._notes.removed:
            self._notes.forget_removal(key.oid)

    def removed_here(self, oid: int) -> bool:
        """The object was removed from here in this epoch."""
        return self._notes.removed.get(oid, 0) >= self._state.epoch

    async def wanted(self, oid: int, version: int) -> bool:
        """Whether what was found may be live again: it was not removed since, and some volume uses it."""
        if self._notes.removed.get(oid, 0) >= min(version, self._state.epoch):
            return False
        return version == LIVE or await self.wanted_objects.referenced(oid)

    # ---- fetching

    async def _fetch_task(self, key: ShardKey) -> None:
        result: int = Result.NETWORK_ERROR
        try:
            result = await self._fetch(key)
        except StoreDeviceError as error:
            await self._disk_failed(error)
        except SheepdogError as error:
            logger.warning("cannot recover oid=%016x: %s", key.oid, error)
            result = error.result
        finally:
            with self._outbox:
                self.pace.calm(key.oid)
                self._no_room.pop(key, None)
                if result == Result.NO_SPACE:
                    self._no_room[key] = None
                if result not in _AGAIN:
                    if result and result != Result.NO_OBJ:
                        # It exists and is not here: nobody may clean up yet.
                        self._missing[key] = None
                    self._todo.pop(key, None)
                    if not self._todo:
                        self._wake.set()
                for done in self._fetching.pop(key, ()):
                    done(result)
                if not self._fetching:
                    self.finder.rest()

    async def _fetch(self, key: ShardKey) -> int:
        store = self._store()
        here, newest = await self._executor.run(lambda: (store.exists(key), self._index.newest(key)))
        if here:
            return 0
        generation = self._generation
        oid = key.oid
        placement = self._placer.placement(oid)
        if self.removed_here(oid):
            return Result.NO_OBJ
        if not placement.local:
            return Result.OLD_NODE_VER
        if not placement.identical:
            return await self._fetch_strip(oid, placement)
        key = ShardKey(oid)
        if newest and placement.object_bytes >= COMPARE_BYTES_MIN and await self._revive(key, placement, newest):
            return 0
        receive = partial(store.receive, key, placement.object_bytes, sparse=is_sparse(oid))
        found = await self.finder.find(oid, placement, 1, self._progress.gathered, skip_own=True, receive=receive)
        if not found.parts and self.wildcard:
            anything = await self.finder.find_wildcard(oid, REPLICA, placement)
            found = anything if anything.parts else found  # else what is in doubt stays so
        if not found.parts:
            return self._not_found(key, found)
        try:
            return await self._take(key, found, placement, generation)
        finally:
            self.finder.drop(found.incoming)

    async def _take(self, key: ShardKey, found: Found, placement: Placement, generation: int) -> int:
        """What was found is stored, if it still belongs here."""
        if not await self.wanted(key.oid, found.version):
            return Result.NO_OBJ
        if self._generation != generation:
            return Result.OLD_NODE_VER
        # No await from this look to the lane of the shard: a removal that comes later waits there.
        if self.removed_here(key.oid):
            return Result.NO_OBJ
        if found.incoming is not None:
            incoming, found.incoming = found.incoming, None
            return await self._keep.finish(key, incoming, vouched=found.vouched)
        return await self.store_shard(key, found.parts[REPLICA], placement.object_bytes, vouched=found.vouched)

    def _not_found(self, key: ShardKey, found: Found) -> int:
        if not found.doubtful:
            return Result.NO_OBJ
        if key not in self._missing:
            why = "what is left of it is corrupt" if found.corrupt else "the nodes that may have it are absent"
            logger.warning("cannot recover oid=%016x: %s", key.oid, why)
        self._missing[key] = None
        return Result.EIO

    async def _fetch_strip(self, oid: int, placement: Placement) -> int:
        """The primary brings the strip."""
        result = await result_of(self._outbox, lambda done: self.mend(oid, done))
        if result == Result.EIO:
            self._missing[ShardKey(oid, placement.index)] = None
        return result

    async def _revive(self, key: ShardKey, placement: Placement, newest: int) -> bool:
        """What was set aside here last, in epoch ``newest``, is live again, if a present holder has exactly that."""
        generation, store = self._generation, self._store()
        for node in placement.others:
            theirs = await digest_at(self.finder, self._state, node, key.oid)
            if theirs is None:
                continue
            try:
                ours = await self._executor.run(lambda: store.digest(key, epoch=newest))
            except ObjectNotFound:
                return False
            if ours != theirs or self._generation != generation or self.removed_here(key.oid):
                return False
            return not await self._keep.in_lane(key, lambda: store.revive(key, newest))
        return False

    # ---- the background task

    async def run(self) -> None:
        """Recovers whenever there is a cause, until cancelled."""
        while True:
            if self._pending is None:
                await self._wake.wait()
            self._wake = anyio.Event()
            while self._pending is not None:
                old_ring, lifted = self._pending
                self._pending = None
                if not await self._try(partial(self._prepare, lifted)):
                    await anyio.sleep(RETRY_S)
                    if self._pending is None:
                        self._pending = (old_ring, lifted)
            if self._active and self._phase == RECOVERING:
                await self._recover()
                if not self._replaced() and not self._todo and not await self._try(self._finish):
                    self._wake.set()

    async def _try(self, step: Callable[[], Awaitable[bool]]) -> bool:
        """What ``step()`` says; False after an error, which has been dealt with as far as possible."""
        try:
            return await step()
        except StoreDeviceError as error:
            await self._disk_failed(error)
        except SheepdogError as error:
            logger.warning("recovery has to try again: %s", error)
            await anyio.sleep(RETRY_S)
        return False

    async def _disk_failed(self, error: StoreDeviceError) -> None:
        """The disk is taken out. Without any other the sheep is ending, and this waits for that."""
        assert self._shards is not None
        with self._outbox:
            left = self._shards.disk_failed(error)
        if not left:
            await anyio.sleep_forever()

    def _replaced(self) -> bool:
        """A newer cause is waiting."""
        return self._pending is not None

    # ---- listing

    async def _prepare(self, lifted: bool) -> bool:
        """Sets aside what left us and lists what is missing; False: try again."""
        epoch = self._state.epoch
        aside = self._aside
        if aside is None:
            self._todo, self._missing, self._total = {}, {}, 0
            self._phase = RECOVERING
            return True
        checked = await aside.check(lifted)
        if checked > self._progress.retired:
            self._progress.retired = checked
            await self._executor.run(self._notes.save)
        if self._replaced():
            return True
        wanted = await self._lister.others()
        if self._state.epoch != epoch or self._replaced():
            return True
        if wanted is None:
            return False
        store = self._store()
        here, mine = await self._executor.run(lambda: (set(store.keys()), self._index.oids()))
        wanted.update(mine, (key.oid for key in here))
        self._progress.gathered = max(self._progress.gathered, await self._lister.gathered())
        todo = await self._lister.lacking(wanted, here, self.wanted_objects.heirless)
        if self._state.epoch != epoch or self._replaced():
            return True
        # What came or went since the list was made is sorted out when its turn comes.
        self._todo = {key: None for key in todo if not self.removed_here(key.oid)}
        self._no_room = {}
        self._missing = {}
        self._total = len(self._todo)
        self._held = self._lister.overfull(wanted)
        self._phase = RECOVERING
        logger.info("recovery for epoch %d: %d objects to recover", epoch, self._total)
        return True

    # ---- recovering

    async def _recover(self) -> None:
        """Fetches everything listed, a few at a time, until done, switched off or replaced."""
        while (wait_s := self._not_before - self._clock.monotonic()) > 0 and self._todo and not self._replaced():
            with anyio.move_on_after(wait_s):
                await self._wake.wait()
            self._wake = anyio.Event()
        while self._todo and not self._halted():
            await self._recover_once()
            if self._no_room:
                logger.warning("no space for %d objects that belong here, trying again", len(self._no_room))
            # What is left: some holder does not answer at the moment, or it is to be waited for space.
            until = self._clock.monotonic() + (ROOM_RETRY_S if self._no_room else RETRY_S)
            while self._todo and not self._halted() and self._clock.monotonic() < until:
                await anyio.sleep(RETRY_S)

    def _halted(self) -> bool:
        return self._replaced() or self._state.recovery_disabled or self._held

    async def _recover_once(self) -> None:
        keys = iter(list(self._todo))

        async def work() -> None:
            for key in keys:
                await self.pace.turn(self._halted)
                if self._halted():
                    return
                if key in self._todo:
                    await self.fetched(key.oid, key.index, urgent=False)

        async with anyio.create_task_group() as tasks:
            for _ in range(self._parallel):
                tasks.start_soon(work)

    # ---- finishing

    async def _finish(self) -> bool:
        epoch = self._state.epoch
        again = self._progress.gathered == epoch
        if self._missing:
            logger.warning("%d objects are missing; what was set aside is kept", len(self._missing))
        elif not await self._settled():
            return True
        else:
            self._phase = NOTIFYING
            try:
                await self.announce(epoch)
            except SheepdogError as error:
                logger.warning("completion of recovery could not be announced: %s", error)
        if self._replaced():
            return True
        self._active = False
        self.wildcard = False
        if self._progress.gathered == self._state.epoch and not self._missing:
            self._purge_soon(again)
        return True

    async def _settled(self) -> bool:
        """What may differ since an end without warning is in step again; False: replaced before it was."""
        while self.unsettled.cautious and len(self.unsettled.oids) > len(self.unsettled.hopeless):
            await anyio.sleep(LIST_RETRY_S)
            if self._replaced():
                return False
        return True


# After these the shard is still to be recovered: forgotten, it would be short of a copy that everybody believes in.
_AGAIN = frozenset(map(int, (Result.NETWORK_ERROR, Result.OLD_NODE_VER, Result.NEW_NODE_VER, Result.NO_SPACE)))


async def _announce_nothing(_: int) -> None:
    return None
