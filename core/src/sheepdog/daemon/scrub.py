"""The scrub: reads everything that this sheep stores, slowly, and has repaired what is wrong.

A pass goes through all shards in order. What has checksums is compared with them, here alone. What has none is compared
with the other holders' by the object's primary, and gets checksums if they agree (``repair``). Where anything reads a
corrupt shard, a client for example, it is handed to the same repair at once, pass or no pass.

A pass keeps to a rate, waits while requests are under way (for a while), and stands still during recovery. How far it
came is kept in ``scrub.state`` of the base directory, so a restarted sheep goes on where it was. The original ignores
the file.

After ``kill -9`` or a power loss the shards that had just changed have no checksums. If all holders end like that, no
copy is known, and one that goes bad counts as much as any other. So a sheep that has started compares these soon, and
does not leave them to the next pass (``_catch_up``).
"""

from __future__ import annotations

import json
import logging
import os
import random
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from struct import Struct
from typing import Any

import anyio

from sheepdog.contracts.services import Clock, Executor
from sheepdog.contracts.store import REPLICA, ShardKey
from sheepdog.daemon.config import ScrubConfig
from sheepdog.daemon.placement import Placer
from sheepdog.daemon.recovery import Recovery
from sheepdog.daemon.repair import Repairs
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.stats import Stats
from sheepdog.errors import ObjectNotFound, ShardCorrupt, SheepdogError, StoreDeviceError
from sheepdog.model.clusterinfo import ClusterStatus
from sheepdog.wire.header import Request, Response
from sheepdog.wire.results import Result

logger = logging.getLogger(__name__)

STATE_FILE = "scrub.state"
UPKEEP_S = 30.0  # a shard that did not change for one to two of these has its checksums written down
FIRST_S = 600.0  # after its start a sheep that never scrubbed begins, so that old stores get checksums soon
CATCH_UP_S = 60.0  # after its start a sheep compares what has no checksums, or after a tenth of a shorter interval
PART_BYTES = 1 << 20
BUSY_S = 0.01  # while clients wait: looked at again after so long,
BUSY_MAX = 20  # so many times for each part, which leaves 5 MB/s in the worst case
RETRY_S = 1.0  # of a repair that cannot be made now; doubled each time
RETRY_MAX_S = 60.0
SAVE_S = 60.0
LIST_MAX = 1000  # unrepairable shards that are named

COMMAND = Struct("<II")  # of a SCRUB request: what to do, MB/s (0: as configured)
STATUS, START, STOP = 0, 1, 2


@dataclass(slots=True)
class ScrubState:
    """Of the last pass, or the one that runs. Times are seconds since 1970, 0 for never.

    :param ctime: of the cluster that this is about.
    :param cursor: the last shard that was done, (0, 0) before the first; both are kept when a pass is stopped.
    :param unrepairable: (oid, strip or -1, what is wrong), of this pass and from outside of passes.
    """

    ctime: int = 0
    started: float = 0.0
    finished: float = 0.0
    cursor: list[int] = field(default_factory=lambda: [0, 0])
    objects: int = 0
    bytes: int = 0
    found: int = 0
    repaired: int = 0
    unrepairable: list[list[Any]] = field(default_factory=list)  # Any: two numbers and a text

    @property
    def unfinished(self) -> bool:
        return self.started > self.finished


class _Keys:
    """Kept for days: numbers, of which a million take 9 MB, and not keys, which take 150."""

    def __init__(self) -> None:
        self._oids, self._indexes = array("Q"), array("b")

    def __len__(self) -> int:
        return len(self._oids)

    def __iter__(self) -> Iterator[ShardKey]:
        return map(ShardKey, self._oids, self._indexes)

    def add(self, key: ShardKey) -> None:
        self._oids.append(key.oid)
        self._indexes.append(min(key.index, 127))  # no object has so many strips; they belong nowhere


class ScrubNotes:
    """Keeps the state over restarts; without a base directory only as long as this value."""

    def __init__(self, base: str | None = None) -> None:
        self._path = os.path.join(base, STATE_FILE) if base is not None else None
        self.state = ScrubState()
        if self._path is not None:
            try:
                with open(self._path, encoding="ascii") as file:
                    found = json.load(file)
                known = {item.name: found[item.name] for item in fields(ScrubState) if item.name in found}
                blank = asdict(self.state)
                if all(type(value) is type(blank[name]) for name, value in known.items()):
                    self.state = ScrubState(**known)
            except (OSError, ValueError, TypeError):
                pass  # none yet, or damaged: the next pass begins at the front

    def save(self) -> None:
        """May block."""
        if self._path is None:
            return
        temporary = f"{self._path}.tmp"
        try:
            with open(temporary, "w", encoding="ascii") as file:
                json.dump(asdict(self.state), file)
            os.rename(temporary, self._path)
        except OSError as error:
            logger.warning("cannot write %s: %s", self._path, error.strerror)


class Scrubber:
    """The scrub of one sheep."""

    def __init__(
        self,
        config: ScrubConfig,
        notes: ScrubNotes,
        state: SheepState,
        shards: Shards | None,
        placer: Placer,
        repairs: Repairs,
        recovery: Recovery,
        executor: Executor,
        clock: Clock,
        rng: random.Random,
        stats: Stats,
        announce: Callable[[int, int, str], None],
    ) -> None:
        """:param announce: told of each corrupt shard: oid, strip or -1, what is wrong."""
        self._config = config
        self._notes = notes
        self._state = state
        self._shards = shards
        self._placer = placer
        self._repairs = repairs
        self._recovery = recovery
        self._executor = executor
        self._clock = clock
        self._random = rng
        self._stats = stats
        self._announce = announce
        self._running = False
        self._rate = config.rate_bytes
        self._total = 0
        self._start_asked = anyio.Event()
        self._stop_asked = False
        self._queue: dict[ShardKey, str] = {}  # corrupt, to be repaired
        self._queued = anyio.Event()
        self._unknown = 0  # shards without checksums that are still to be compared after the start
        self._told: set[tuple[ShardKey, int]] = set()  # versions set aside of which was said that they are corrupt
        self._due = 0.0  # by clock.time()
        self._saved_at = 0.0
        self._debt_s = 0.0
        self._ring = state.ring
        if shards is not None:
            shards.corrupt = self.found
            state.observe(self._state_changed)

    def _state_changed(self) -> None:
        """Members that came may have what is right."""
        if self._state.ring is not self._ring:
            self._ring = self._state.ring
            for oid, index, reason in self._notes.state.unrepairable:
                self._queue[ShardKey(oid, index)] = reason
            if self._queue:
                self._queued.set()

    # ---- what others call

    def found(self, error: ShardCorrupt) -> None:
        """A corrupt shard was met. Called on the event loop."""
        key = ShardKey(error.oid, error.index)
        if error.epoch is None:
            if key in self._queue or self._listed(key) is not None:
                return
        elif (key, error.epoch) in self._told:
            return
        else:
            if len(self._told) >= LIST_MAX:
                self._told.clear()
            self._told.add((key, error.epoch))
        logger.error("%s", error)
        self._announce(error.oid, error.index, error.reason)
        self._notes.state.found += 1
        if error.epoch is None:  # what was set aside is only not used
            self._queue[key] = error.reason
            self._queued.set()

    def start(self, rate_bytes: int = 0) -> None:
        """A pass runs: a new one, or the one that was interrupted goes on. One that runs takes the new rate."""
        self._rate = rate_bytes or self._config.rate_bytes
        self._stop_asked = False
        self._start_asked.set()

    def stop(self) -> None:
        """No pass runs. ``start`` goes on where it was."""
        self._stop_asked = True

    def status(self) -> dict[str, Any]:  # Any: a CBOR map
        """For ``dog node scrub status``."""
        state = self._notes.state
        return {
            "running": self._running,
            "waiting": self._running and self._waits(),
            "rate": self._rate if self._running else self._config.rate_bytes,
            "interval": self._config.interval_s,
            "next": 0 if self._running or not self._config.interval_s else int(self._due),
            "started": int(state.started),
            "finished": int(state.finished),
            "stopped": not self._running and state.unfinished,
            "done": state.objects,
            "total": max(self._total, state.objects) if self._running else state.objects,
            "bytes": state.bytes,
            "found": state.found,
            "repaired": state.repaired,
            "repairing": len(self._queue),
            "unknown": self._unknown,
            "unrepairable": [[f"{oid:016x}", index, reason] for oid, index, reason in state.unrepairable],
        }

    async def serve(self, request: Request) -> Response:
        """SCRUB."""
        import cbor2

        if self._shards is None:
            return Response(Result.NO_SUPPORT)
        command, rate = COMMAND.unpack_from((request.variant or b"").ljust(COMMAND.size, b"\0"))
        if command == START:
            self.start(rate * 1_000_000)
        elif command == STOP:
            self.stop()
        elif command != STATUS:
            return Response(Result.INVALID_PARMS)
        body = cbor2.dumps(self.status())
        if len(body) > request.data_length:
            return Response(Result.BUFFER_SMALL)
        return Response(body=body)

    # ---- the tasks

    async def run(self) -> None:
        """Until cancelled."""
        if self._shards is None:
            return
        now = self._clock.time()
        state = self._notes.state
        last = state.started
        if state.unfinished or not last:
            self._due = now + FIRST_S
        else:
            self._due = max(now + FIRST_S, last + self._config.interval_s)
        # All sheep of a cluster are often started together; they need not read together.
        self._due += self._random.random() * 0.1 * (self._due - now)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._upkeep)
            tasks.start_soon(self._repair_all)
            if self._config.interval_s:
                tasks.start_soon(self._catch_up)
            while True:
                with anyio.move_on_after(self._idle_s()):
                    await self._start_asked.wait()
                if self._start_asked.is_set() or (self._config.interval_s and self._clock.time() >= self._due):
                    self._start_asked = anyio.Event()
                    await self._pass()

    def _idle_s(self) -> float:
        if not self._config.interval_s:
            return float("inf")
        return max(1.0, self._due - self._clock.time())

    async def _upkeep(self) -> None:
        while True:
            await anyio.sleep(UPKEEP_S)
            assert self._shards is not None
            store = self._shards.store
            try:
                await self._executor.run(store.upkeep)
            except SheepdogError as error:
                if isinstance(error, StoreDeviceError) and error.path is not None:
                    self._shards.disk_failed(error)
                logger.warning("checksums cannot be written: %s", error)

    # ---- what has no checksums

    async def _catch_up(self) -> None:
        """Once after the start: compares what has no checksums with other holders. Stands still during a pass."""
        assert self._shards is not None
        store = self._shards.store
        # Holders that started together do not ask for the same comparison at the same moment.
        await anyio.sleep(min(CATCH_UP_S, self._config.interval_s / 10) * (1 + 0.5 * self._random.random()))

        def look_up() -> _Keys:
            found = _Keys()
            for key in store.keys():  # noqa: SIM118  # no mapping
                if not store.known(key):
                    found.add(key)
            return found

        await self._calm()
        try:
            unknown = await self._executor.run(look_up)
        except StoreDeviceError as error:
            self._shards.disk_failed(error)
            return
        self._unknown = len(unknown)
        logger.info("scrub: %d objects have no checksums", len(unknown))
        for done, key in enumerate(unknown):
            self._unknown = len(unknown) - done
            await self._calm()
            if self._shards.store is not store:
                break
            if not await self._executor.run(partial(store.known, key)):
                await self._look_at(key, ScrubState())
        self._unknown = 0
        if unknown:
            logger.info("scrub: what had no checksums was compared")

    async def _calm(self) -> None:
        while self._running or self._waits():
            await anyio.sleep(1.0)

    # ---- a pass

    def _waits(self) -> bool:
        return self._state.status is not ClusterStatus.OK or self._recovery.status().in_recovery

    async def _pass(self) -> None:
        assert self._shards is not None
        state = self._notes.state
        if state.ctime != self._state.ctime:
            state = self._notes.state = ScrubState(ctime=self._state.ctime)
        if not state.unfinished:
            state = self._notes.state = ScrubState(
                ctime=self._state.ctime, started=self._clock.time(), unrepairable=state.unrepairable
            )
        self._running = True
        self._debt_s = 0.0
        logger.info("scrub: %s", "going on" if state.objects else "started")
        try:
            ended = await self._go_through(state)
        finally:
            self._running = False
            self._stop_asked = False
        now = self._clock.time()
        if ended:
            state.finished = max(now, state.started)
            state.cursor = [0, 0]
            logger.info(
                "scrub: done, %d objects, %d bytes, %d found corrupt or different, %d repaired, %d unrepairable",
                state.objects, state.bytes, state.found, state.repaired, len(state.unrepairable),
            )  # fmt: skip
        else:
            logger.info("scrub: stopped after %d objects", state.objects)
        self._due = now + self._config.interval_s
        await self._executor.run(self._notes.save)

    async def _go_through(self, state: ScrubState) -> bool:
        """False when it was stopped, or the cluster was formatted."""
        shards = self._shards
        assert shards is not None
        store = shards.store
        position = (state.cursor[0], state.cursor[1])
        keys = _Keys()
        listed: set[ShardKey] = set()
        candidates = {ShardKey(entry[0], entry[1]) for entry in state.unrepairable}

        def look_up() -> None:
            for key in store.keys():  # noqa: SIM118  # no mapping
                if key in candidates:
                    listed.add(key)
                if key > position or position == (0, 0):
                    keys.add(key)

        try:
            await self._executor.run(look_up)
        except StoreDeviceError as error:
            shards.disk_failed(error)
            return False
        gone = candidates - listed
        state.unrepairable = [entry for entry in state.unrepairable if ShardKey(entry[0], entry[1]) not in gone]
        self._total = state.objects + len(keys)
        for key in keys:
            while self._waits() and not self._stop_asked:
                await anyio.sleep(1.0)
            if self._stop_asked or shards.store is not store or self._state.ctime != state.ctime:
                return False
            await self._look_at(key, state)
            state.objects += 1
            state.cursor = [key.oid, key.index]
            if self._clock.monotonic() - self._saved_at > SAVE_S:
                self._saved_at = self._clock.monotonic()
                await self._executor.run(self._notes.save)
        return True

    async def _look_at(self, key: ShardKey, state: ScrubState) -> None:
        assert self._shards is not None
        store = self._shards.store
        placement = self._placer.placement(key.oid)
        if not placement.local or key.index != (REPLICA if placement.identical else placement.index):
            return  # waits to be set aside
        offset, complete = 0, True
        try:
            while True:
                part = await self._executor.run(
                    partial(store.verify, key, offset_bytes=offset, length_bytes=PART_BYTES)
                )
                offset += part.count
                complete = complete and part.complete
                if part.complete:
                    state.bytes += part.count
                    await self._pace(part.count)
                if part.count < PART_BYTES:
                    break
        except ShardCorrupt as error:
            self._unlist(key)  # looked at anew
            self.found(error)
            return
        except ObjectNotFound:
            return
        except StoreDeviceError as error:
            self._shards.disk_failed(error)
            return
        except SheepdogError as error:
            logger.warning("scrub: oid=%016x is left out: %s", key.oid, error)
            return
        if complete:
            self._unlist(key)
            return
        state.bytes += offset
        await self._pace(offset * len(placement.holders))  # all of them read it
        await self._compare(key, "some of it has no checksum, and it differs from the other holders'")

    async def _pace(self, count: int) -> None:
        for _ in range(BUSY_MAX):
            if not self._stats.gateway.active and not self._stats.peer.active:
                break
            await anyio.sleep(BUSY_S)
        # Sleeping is not exact: what was slept too long is taken off the next time.
        self._debt_s += count / self._rate
        if self._debt_s > 0.005:
            began = self._clock.monotonic()
            await anyio.sleep(self._debt_s)
            self._debt_s = max(-1.0, self._debt_s - (self._clock.monotonic() - began))

    # ---- repair

    async def _repair_all(self) -> None:
        """Has repaired what is found, one after the other."""
        delay_s = RETRY_S
        while True:
            if not self._queue:
                self._queued = anyio.Event()
                await self._queued.wait()
                delay_s = RETRY_S
            waiting = 0
            for key, reason in list(self._queue.items()):
                if await self._compare(key, reason):
                    self._queue.pop(key, None)
                else:
                    waiting += 1
            await self._executor.run(self._notes.save)
            if waiting:
                await anyio.sleep(delay_s)
                delay_s = min(2 * delay_s, RETRY_MAX_S)

    async def _compare(self, key: ShardKey, reason: str) -> bool:
        """The object was compared among its holders; False: not now."""
        try:
            outcome = await self._repairs.compare(key.oid)
        except StoreDeviceError as error:
            assert self._shards is not None
            self._shards.disk_failed(error)
            return False
        except SheepdogError as error:
            logger.info("scrub: oid=%016x has to wait: %s", key.oid, error)
            return False
        state = self._notes.state
        if key not in self._queue:
            state.found += outcome.damaged
            state.repaired += outcome.repaired
        elif not outcome.undecided:  # maybe by the comparison of another holder
            state.repaired += 1
        if outcome.undecided:
            if self._listed(key) is None:
                logger.error("oid=%016x cannot be repaired: no good copy is known (%s)", key.oid, reason)
                if len(state.unrepairable) < LIST_MAX:
                    state.unrepairable.append([key.oid, key.index, reason])
        else:
            self._unlist(key)
        return True

    def _listed(self, key: ShardKey) -> list[Any] | None:  # Any: an entry of the list
        return next((entry for entry in self._notes.state.unrepairable if tuple(entry[:2]) == key), None)

    def _unlist(self, key: ShardKey) -> None:
        entry = self._listed(key)
        if entry is not None:
            self._notes.state.unrepairable.remove(entry)
