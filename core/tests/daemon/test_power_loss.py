"""Power loss: what was acknowledged is there, whatever the disks had in their caches.

Several data planes write to disks that remember what was flushed. At some moment an image is taken of every disk as a
power loss would leave it: what was flushed is there; of the rest each sector is there or not, by chance. New data
planes start on the images and every sector must have its last acknowledged value, or one that was under way.
"""

from __future__ import annotations

import random
import shutil

import anyio
import pytest

from sheepdog.builtin.tcp import sheepdog_transport
from sheepdog.contracts.store import StoreOptions
from sheepdog.daemon.journal import Journal, JournaledStore
from sheepdog.daemon.journal_files import replay
from sheepdog.model.ids import data_oid
from sheepdog.testing.memory_store import MemoryMedium, MemoryStore
from sheepdog_redundancy_ec import sheepdog_redundancy

from .data_plane import planes

pytestmark = pytest.mark.anyio
SECTOR = 512
OBJECT_BYTES = 4 << 20
OBJECTS = 3
SECTORS = 8  # per object that the writers use
OPTIONS = StoreOptions(("/d",))


@pytest.fixture
def anyio_backend():
    return "asyncio"


def after_power_loss(medium, dice):
    """What a disk holds: the flushed bytes, and by chance sectors that were not."""
    image = MemoryMedium()
    with medium.lock:
        disk = medium.disk("/d")
        target = image.disk("/d")
        for name in sorted(disk.now.keys() | disk.safe.keys()):
            safe, now = disk.safe.get(name), disk.now.get(name)
            if safe is None or now is None or len(safe) != len(now):
                kept = dice.choice((safe, now))
                # A name that came through without having been flushed says nothing about the bytes.
                if kept is now and now is not None:
                    kept = bytes(len(now)) if dice.random() < 0.5 else now
            else:
                kept = bytearray(safe)
                if safe != now:
                    for at in range(0, len(safe), SECTOR):
                        if dice.random() < 0.5:
                            kept[at : at + SECTOR] = now[at : at + SECTOR]
            if kept is not None:
                target.now[name] = bytearray(kept)
                target.safe[name] = bytes(kept)
        target.weight_bytes = disk.weight_bytes
    return image


class Machines:
    """The disks and journals of all sheep."""

    def __init__(self, base, count, journal):
        self.base = base
        self.journal = journal
        self.media = [MemoryMedium() for _ in range(count)]
        self.journals = []
        self.generation = self.images = 0

    def directory(self, number):
        return self.base / f"journal{self.generation}.{number}"

    def make_store(self, number):
        store = MemoryStore(OPTIONS, self.media[number])
        if not self.journal:
            return store
        directory = self.directory(number)
        directory.mkdir(exist_ok=True)
        replay(str(directory), store, block_size_shift=22)
        made = Journal(str(directory), 8 << 20)
        self.journals.append(made)
        return JournaledStore(store, made)

    def image(self, dice):
        """All machines as they are after a power loss at this moment."""
        made = Machines(self.base, len(self.media), self.journal)
        self.images += 1
        made.generation = self.images
        if self.journal:  # before the disks: what leaves the journal is on the disk by then
            for number in range(len(self.media)):
                shutil.copytree(self.directory(number), made.directory(number))
        made.media = [after_power_loss(medium, dice) for medium in self.media]
        return made

    def close(self):
        for journal in self.journals:
            journal.close(remove=True)


class Writers:
    """One task per sector; each writes its next value when the last one was acknowledged."""

    def __init__(self):
        self.acknowledged = {}
        self.count = 0

    async def run(self, sheep, oid, sector):
        place = oid, sector
        value = 0
        while True:
            value += 1
            await sheep[(sector + value) % len(sheep)].objects.write(
                oid, sector * SECTOR, bytes([value % 256]) * SECTOR
            )
            self.acknowledged[place] = value
            self.count += 1


@pytest.mark.parametrize("journal", [False, True], ids=["plain", "journal"])
@pytest.mark.parametrize("policy", [0, 0x11], ids=["copies", "strips"])
@pytest.mark.parametrize("seed", [1, 2])
async def test_nothing_acknowledged_is_lost(tmp_path, journal, policy, seed):
    """Writes, creates and removals that were acknowledged before the power went are as they were acknowledged."""
    dice = random.Random(seed)
    machines = Machines(tmp_path, 3, journal)
    oids = [data_oid(0x777777, index) for index in range(OBJECTS)]
    removed = data_oid(0x777777, 1000)
    writers = Writers()
    images = []

    def start(these):
        factories = (sheepdog_redundancy(),)
        return planes(3, these.make_store, sheepdog_transport, copies=3, durable=True, factories=factories)

    def prepare(sheep):
        for plane in sheep:
            plane.state.copy_policy = policy

    async with start(machines) as sheep:
        prepare(sheep)
        for oid in (*oids, removed):
            await sheep[0].objects.create(oid, 0, bytes(SECTORS * SECTOR))
        await sheep[1].objects.remove(removed)
        async with anyio.create_task_group() as tasks:
            for oid in oids:
                for sector in range(SECTORS):
                    tasks.start_soon(writers.run, sheep, oid, sector)
            for round_ in range(3):
                with anyio.fail_after(30):
                    while writers.count < (round_ + 1) * 100:
                        await anyio.sleep(0.001)
                acknowledged = dict(writers.acknowledged)
                images.append((machines.image(dice), acknowledged))
            tasks.cancel_scope.cancel()
    machines.close()

    for image, acknowledged in images:
        stores = [image.make_store(number) for number in range(3)]
        for store in stores:
            oids_here = {key.oid for key in store.keys()}  # noqa: SIM118
            assert removed not in oids_here, "an acknowledged removal was undone"
        for oid in oids:
            for content in contents(stores, oid, policy):
                for sector in range(SECTORS):
                    value = acknowledged.get((oid, sector), 0)
                    found = set(content[sector * SECTOR : (sector + 1) * SECTOR])
                    # Later ones may have got through, of a sector in strips perhaps one strip.
                    allowed = {(value + more) % 256 for more in range(LATER_MAX)}
                    assert found <= allowed, f"seed {seed}: sector {sector} has {found}, acknowledged was {value}"
                    assert policy or len(found) == 1
        image.close()


LATER_MAX = 40  # values that a writer may have added between the look at what was acknowledged and the last image


def contents(stores, oid, policy):
    """The object as each holder has it; for strips, once, put together from the data strips."""
    parts = {}
    for store in stores:
        for key in store.keys():  # noqa: SIM118
            if key.oid == oid:
                buffer = bytearray(store.size(key))
                store.read_into(key, memoryview(buffer), offset_bytes=0)
                parts.setdefault(key.index, []).append(bytes(buffer))
    if not policy:
        assert len(parts[-1]) == len(stores)
        return parts[-1]
    assert {index: len(found) for index, found in parts.items()} == {0: 1, 1: 1, 2: 1}
    half = SECTOR // 2
    pieces = (parts[index][0][at : at + half] for at in range(0, SECTORS * half, half) for index in (0, 1))
    return [b"".join(pieces)]
