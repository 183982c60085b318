"""Guests that write and read blocks of one volume, and a judge that knows what each read may return.

Each block is a register. A block has one writer at a time (a disk has one guest), any number of readers. A read may
return the last value whose write was acknowledged before the read began, or any value whose write overlapped the read.
A value older than that is a lost write, anything else is corruption. At the end all copies must be equal and hold the
last values.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import trio

from sheepdog.model.ids import data_oid, inode_oid
from sheepdog.model.inode import MAP_OFFSET
from sheepdog.testing.simulation import Simulation
from sheepdog.testing.simulation_client import SimulatedClient
from sheepdog.wire.header import Request
from sheepdog.wire.opcodes import Op
from sheepdog.wire.results import Result

NAME = "disk"
ALIGN = 512
LANES = 4  # requests of one guest at a time


@dataclass
class _Write:
    value: int
    began: float
    ended: float = float("inf")


@dataclass
class _Block:
    """One register: where it is, and every write to it."""

    object_index: int
    offset: int
    length: int
    writes: list[_Write] = field(default_factory=list)

    def allowed(self, began: float, ended: float) -> set[int]:
        """The values that a read in this time may return."""
        done = [write for write in self.writes if write.ended < began]
        last = max(done, key=lambda write: write.ended, default=None)
        overlapping = {write.value for write in self.writes if write.began <= ended and write.ended >= began}
        return overlapping | {last.value if last is not None else 0}


@dataclass
class _Snapshot:
    """What the volume was when it got another vid, some time between ``began`` and ``ended``."""

    began: float
    ended: float
    owners: dict[int, int]


class Workload:
    """A volume of ``objects`` objects with ``blocks`` registers in them, and the guests that use it.

    Blocks of one object belong to different guests. Whoever first writes to an object creates it, a copy of the
    snapshot's if there is one, and then writes its map entry, as block drivers do.

    :param rate: requests per virtual second of each of a guest's ``LANES``.
    :param abrupt: guests that change to another sheep do so with requests in flight.
    :param snapshots: snapshots of the volume that are made while the guests work.
    :param discards: objects that are given up while the guests work, and then written again.
    """

    def __init__(
        self,
        simulation: Simulation,
        *,
        guests: int = 3,
        objects: int = 4,
        blocks: int = 24,
        shift: int = 20,
        rate: float = 8.0,
        abrupt: bool = True,
        snapshots: int = 1,
        discards: int = 2,
    ) -> None:
        self.simulation = simulation
        self.random = simulation.fork_random()
        self.objects = objects
        self.shift = shift
        self.rate = rate
        self.abrupt = abrupt
        self.vid = 0
        self.copies = 0
        self.done = False
        self.requests = 0
        self._clients: list[SimulatedClient] = [simulation.client(f"vm{number}") for number in range(guests)]
        self._admin = simulation.client("dog")
        self._reader = simulation.client("reader")
        self._snapshots_left = snapshots
        self._discards_left = discards
        self._next_value = 1
        self._blocks = self._place(blocks)
        self.owners: dict[int, int] = {}  # object index -> the vid in whose name it exists; as the volume's map says
        self._locks = [trio.Lock() for _ in range(objects)]
        self._writing = [0] * objects
        self._snapshots: list[_Snapshot] = []

    def _place(self, count: int) -> list[_Block]:
        """Blocks that do not overlap, of a sector to some pages, anywhere in the objects."""
        taken: dict[int, set[int]] = {index: set() for index in range(self.objects)}
        sectors = (1 << self.shift) // ALIGN
        blocks: list[_Block] = []
        while len(blocks) < count:
            index = self.random.randrange(self.objects)
            length = self.random.choice((1, 1, 8, 8, 16, 200))
            first = self.random.choice((0, sectors - length, self.random.randrange(sectors - length)))
            wanted = set(range(first, first + length))
            if not wanted & taken[index]:
                taken[index] |= wanted
                blocks.append(_Block(index, first * ALIGN, length * ALIGN))
        return blocks

    async def prepare(self, copies: int) -> None:
        """The volume exists."""
        self.copies = copies
        self.vid = await self._admin.create_volume(NAME, self.objects << self.shift)

    async def run(self, nursery: trio.Nursery) -> None:
        """The guests work in ``nursery`` until ``finish``."""
        guests = len(self._clients)
        for number, client in enumerate(self._clients):
            own = self._blocks[number::guests]
            for lane in range(LANES):
                if own[lane::LANES]:
                    nursery.start_soon(self._guest, client, own[lane::LANES])
        nursery.start_soon(self._other_reader)
        nursery.start_soon(self._administrator)

    def finish(self) -> None:
        """Each guest ends after its current request."""
        self.done = True

    # ---- who does something

    async def _guest(self, client: SimulatedClient, own: list[_Block]) -> None:
        rng = self.simulation.fork_random()
        while not self.done:
            self.requests += 1
            await trio.sleep(rng.expovariate(self.rate))
            if rng.random() < 0.6:
                await self._write(client, rng.choice(own))
            else:
                await self._read(client, rng.choice(self._blocks))
            if rng.random() < 0.01:
                client.move(abruptly=self.abrupt)

    async def _other_reader(self) -> None:
        """Reads through one sheep after the other."""
        rng = self.simulation.fork_random()
        while not self.done:
            await trio.sleep(rng.expovariate(self.rate))
            self._reader.move()
            block = rng.choice(self._blocks)
            for _ in range(3):
                await self._read(self._reader, block)

    async def _administrator(self) -> None:
        rng = self.simulation.fork_random()
        while not self.done and self._snapshots_left + self._discards_left:
            await trio.sleep(rng.uniform(0.3, 1.5))
            if rng.randrange(self._snapshots_left + self._discards_left) < self._snapshots_left:
                self._snapshots_left -= 1
                await self._snapshot()
            else:
                self._discards_left -= 1
                await self._discard(self._admin, rng.randrange(self.objects))

    # ---- what they do

    async def _write(self, client: SimulatedClient, block: _Block) -> None:
        value = self._next_value
        self._next_value += 1
        write = _Write(value, trio.current_time())
        block.writes.append(write)
        content = self._content(value, block.length)
        index = block.object_index
        while True:
            async with self._locks[index]:
                if self.owners.get(index) != self.vid:
                    await self._create(client, index, content, block.offset)
                    break
                oid = data_oid(self.vid, index)
                self._writing[index] += 1
            try:
                response = await client.request(Request(Op.WRITE_OBJ, oid=oid, offset=block.offset, body=content))
            finally:
                self._writing[index] -= 1
            if response.result == Result.SUCCESS:
                break
            # A snapshot is being made. When it is there, a copy of the object can be written to.
            assert response.result == Result.READONLY, Result(response.result).name
            await trio.sleep(0.05)
        write.ended = trio.current_time()

    async def _create(self, client: SimulatedClient, index: int, content: bytes, offset: int) -> None:
        source = self.owners.get(index)
        cow_oid = data_oid(source, index) if source is not None else 0
        await client.create(data_oid(self.vid, index), content, offset, cow_oid=cow_oid)
        await self._write_map(client, index, self.vid)
        self.owners[index] = self.vid

    async def _write_map(self, client: SimulatedClient, index: int, owner: int) -> None:
        await client.write(inode_oid(self.vid), MAP_OFFSET + 4 * index, owner.to_bytes(4, "little"))

    async def _discard(self, client: SimulatedClient, index: int) -> None:
        """The object is given up; its blocks are zeros."""
        async with self._locks[index]:
            while self._writing[index]:
                await trio.sleep(0.01)
            if index not in self.owners:
                return
            self.simulation.trace(f"discard {index}")
            zeros = _Write(0, trio.current_time())
            for block in self._blocks:
                if block.object_index == index:
                    block.writes.append(zeros)
            await self._write_map(client, index, 0)
            zeros.ended = trio.current_time()
            del self.owners[index]

    async def _snapshot(self) -> None:
        """Writes to objects go on meanwhile, but none is created or given up."""
        async with AsyncExitStack() as stack:
            for lock in self._locks:
                await stack.enter_async_context(lock)
            self.simulation.trace("snapshot")
            snapshot = _Snapshot(trio.current_time(), 0.0, dict(self.owners))
            self.vid = await self._admin.snapshot(NAME, self.vid, self.objects << self.shift)
            snapshot.ended = trio.current_time()
            self._snapshots.append(snapshot)

    async def _read(self, client: SimulatedClient, block: _Block) -> None:
        index = block.object_index
        owner = self.owners.get(index)
        if owner is None:
            return
        began = trio.current_time()
        request = Request(Op.READ_OBJ, oid=data_oid(owner, index), offset=block.offset, data_length=block.length)
        response = await client.request(request)
        ended = trio.current_time()
        if self.owners.get(index) != owner:
            return  # somebody has made a copy or given it up: the guests would not have looked there
        allowed = block.allowed(began, ended)
        content = bytes(response.body)
        if response.result == Result.NO_OBJ:
            content = bytes(block.length)  # just given up, if that is allowed
        else:
            assert response.result == Result.SUCCESS, f"{request!r}: {Result(response.result).name}"
        self._judge(block, content, allowed, f"{client.host} at {began:.6f}")

    # ---- the judge

    def _content(self, value: int, length: int) -> bytes:
        return value.to_bytes(8, "little") * (length // 8)

    def _judge(self, block: _Block, content: bytes, allowed: set[int], reader: str) -> None:
        value = int.from_bytes(content[:8], "little")
        where = f"object {block.object_index} offset {block.offset} length {block.length}, read by {reader}"
        if content != self._content(value, block.length):
            # A write is not atomic for a reader that overlaps it, but each sector is one of the allowed values.
            for start in range(0, block.length, ALIGN):
                sector = content[start : start + ALIGN]
                value = int.from_bytes(sector[:8], "little")
                assert sector == self._content(value, ALIGN), f"torn sector at {start} of {where}"
                assert value in allowed, f"sector at {start} of {where}: value {value}, allowed {sorted(allowed)}"
        assert value in allowed, f"{where}: value {value}, allowed {sorted(allowed)}"

    def check_disks(self) -> None:
        """All copies of everything are equal and hold what was acknowledged last. Only when the cluster is settled.

        :raises AssertionError: they do not.
        """
        now = trio.current_time()
        self.simulation.check_copies(inode_oid(self.vid), self.copies)
        self._check_objects(self.owners, now, now, "the judge, from the disks")
        for snapshot in self._snapshots:
            self._check_objects(snapshot.owners, snapshot.began, snapshot.ended, "the judge, from the snapshot")

    def _check_objects(self, owners: dict[int, int], began: float, ended: float, reader: str) -> None:
        for index, owner in sorted(owners.items()):
            content = self.simulation.check_copies(data_oid(owner, index), self.copies)
            for block in self._blocks:
                if block.object_index == index:
                    part = content[block.offset : block.offset + block.length]
                    self._judge(block, part, block.allowed(began, ended), reader)

    async def check_reads(self) -> None:
        """Every block reads as it was acknowledged last, through whatever sheep."""
        for client in self._clients:
            for block in self._blocks:
                await self._read(client, block)
