"""Guests that write and read blocks of one volume, and a judge that knows what each read may return.

Each block is a register. A block has one writer at a time (a disk has one guest), any number of readers. A read may
return the last value whose write was acknowledged before the read began, or any value whose write overlapped the read.
A value older than that is a lost write, anything else is corruption. At the end all copies must be equal and hold the
last values.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import trio

from sheepdog.model.ids import data_oid, inode_oid
from sheepdog.model.inode import MAP_OFFSET
from sheepdog.testing.simulation import SimulatedClient, Simulation

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


class Workload:
    """A volume of ``objects`` objects with ``blocks`` registers in them, and the guests that use it.

    Objects are created by the guest that first writes to them, then their map entry is written, as block drivers do.

    :param rate: requests per virtual second of each of a guest's ``LANES``.
    :param abrupt: guests that change to another sheep do so with requests in flight.
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
        abrupt: bool = False,
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
        self._next_value = 1
        self._blocks = self._place(blocks)
        self._created: set[int] = set()
        self._creating = [trio.Lock() for _ in range(objects)]

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
        self.vid = await self._clients[0].create_volume("disk", self.objects << self.shift)

    async def run(self, nursery: trio.Nursery) -> None:
        """The guests work in ``nursery`` until ``finish``."""
        for number, client in enumerate(self._clients):
            own = [block for block in self._blocks if block.object_index % len(self._clients) == number]
            # Requests of one guest overlap, those to one object that it has yet to create do not.
            lanes: dict[int, list[_Block]] = {}
            for position, block in enumerate(own):
                lanes.setdefault(position % LANES, []).append(block)
            for lane in lanes.values():
                nursery.start_soon(self._guest, client, lane)

    def finish(self) -> None:
        """Each guest ends after its current request."""
        self.done = True

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

    async def _write(self, client: SimulatedClient, block: _Block) -> None:
        value = self._next_value
        self._next_value += 1
        write = _Write(value, trio.current_time())
        block.writes.append(write)
        content = self._content(value, block.length)
        oid = data_oid(self.vid, block.object_index)
        async with self._creating[block.object_index]:
            create = block.object_index not in self._created
            if create:
                await client.create(oid, content, block.offset)
                entry = MAP_OFFSET + 4 * block.object_index
                await client.write(inode_oid(self.vid), entry, self.vid.to_bytes(4, "little"))
                self._created.add(block.object_index)
        if not create:
            await client.write(oid, block.offset, content)
        write.ended = trio.current_time()

    async def _read(self, client: SimulatedClient, block: _Block) -> None:
        if block.object_index not in self._created:
            return
        began = trio.current_time()
        content = await client.read(data_oid(self.vid, block.object_index), block.offset, block.length)
        ended = trio.current_time()
        self._judge(block, content, block.allowed(began, ended), f"{client.host} at {began:.6f}")

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
        for index in sorted(self._created):
            content = self.simulation.check_copies(data_oid(self.vid, index), self.copies)
            for block in self._blocks:
                if block.object_index == index:
                    part = content[block.offset : block.offset + block.length]
                    self._judge(block, part, block.allowed(now, now), "the judge, from the disks")

    async def check_reads(self) -> None:
        """Every block reads as it was acknowledged last, through whatever sheep."""
        for client in self._clients:
            for block in self._blocks:
                await self._read(client, block)
