"""Power loss on files: what was acknowledged is there, in the plain and the tree store, with journal, log or neither.

``test_power_loss`` asks the same of the data path on disks that are modelled as a whole. Here the real stores and the
real journals run on real files, and what a power loss leaves is worked out from the flushes that they asked for: a file
that was written and not flushed, a name that was made and whose directory was not flushed, may be gone.
"""

from __future__ import annotations

import random
import shutil

import anyio
import pytest

from sheepdog.builtin.tcp import sheepdog_transport
from sheepdog.contracts.store import StoreOptions
from sheepdog.daemon.checksum_files import ChecksumFiles
from sheepdog.daemon.checksums import ChecksummedStore
from sheepdog.daemon.journal import Journal
from sheepdog.daemon.journal_files import replay
from sheepdog.daemon.journaled_store import JournaledStore
from sheepdog.daemon.strip_store import StripLog, StripStore
from sheepdog.model.ids import data_oid, inode_oid
from sheepdog_redundancy_ec import sheepdog_redundancy
from sheepdog_store_plain import sheepdog_object_store as plain
from sheepdog_store_tree import sheepdog_object_store as tree

from .data_plane import planes
from .lossy_files import SECTOR, LossyFiles

pytestmark = pytest.mark.anyio
VID = 0x777777
OBJECTS = 3
SECTORS = 8  # of each object
LATER_MAX = 60  # values that a writer may have added between the look at what was acknowledged and the image


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Machines:
    """The directories of three sheep, as they run or as a power loss left them.

    :param boot: differs after a loss.
    """

    def __init__(self, base, make_store, journal, direct, boot):
        self.base = base
        self._boot = boot
        self._make_store = make_store
        self._journal = journal
        self._direct = direct
        self.journals = []
        self.logs = []
        self.stores = []

    def start(self, number):
        directory = self.base / f"sheep{number}"
        (directory / "obj").mkdir(parents=True, exist_ok=True)
        files = ChecksumFiles(str(directory), durable=True, boot_id=self._boot)
        made = self._make_store(StoreOptions((str(directory / "obj"),), direct_io=self._direct))
        store = ChecksummedStore(made, files)
        self.stores.append(store)
        if not self._journal:
            return store
        store.distrust = True
        if self._journal == "log":
            log = StripLog(str(directory), synced=True, size_bytes=1 << 18)
            log.replay(store, block_size_shift=22)
            store.distrust = False
            log.begin()
            self.logs.append(log)
            return StripStore(store, log)
        replay(str(directory), store, block_size_shift=22)
        store.distrust = False
        self.journals.append(Journal(str(directory), 1 << 20))
        return JournaledStore(store, self.journals[-1])

    def rest(self):
        """What is not being changed at this moment rests: its checksums are written down."""
        for store in self.stores:
            store.upkeep()
            store.upkeep()

    def close(self):
        for journal in (*self.journals, *(log.made for log in self.logs if log.made is not None)):
            journal.close(remove=False)


class Work:
    """What clients do, and what of it was acknowledged."""

    def __init__(self, sheep):
        self.sheep = sheep
        self.values = {}  # (oid, sector) -> acknowledged value
        self.created = {}  # oid -> its content
        self.removed = set()
        self.count = 0

    async def overwrite(self, oid, sector):
        value = 0
        while True:
            value += 1
            plane = self.sheep[(sector + value) % len(self.sheep)]
            await plane.objects.write(oid, sector * SECTOR, bytes([value % 256]) * SECTOR)
            self.values[oid, sector] = value
            self.count += 1

    async def come_and_go(self, number):
        """Objects are made; every second one is removed again."""
        index = 100 * (number + 1)
        while True:
            index += 1
            oid = data_oid(VID, index)
            content = bytes([index % 255 + 1]) * SECTOR
            await self.sheep[index % len(self.sheep)].objects.create(oid, 0, content)
            if index % 2:
                self.created[oid] = content
            else:
                await self.sheep[number].objects.remove(oid)
                self.removed.add(oid)
            self.count += 1


@pytest.mark.parametrize("policy", [0, 0x11], ids=["copies", "strips"])
@pytest.mark.parametrize("journal", ["", "log", "journal"], ids=["flushes", "log", "journal"])
@pytest.mark.parametrize(("make_store", "direct"), [(plain, False), (tree, False), (tree, True)])
async def test_nothing_acknowledged_is_lost(tmp_path, monkeypatch, make_store, direct, journal, policy):
    """Creates, writes and removals that were acknowledged are there after a power loss, at every holder, and nothing
    that the loss left, old or new, is taken for corrupt."""
    dice = random.Random(7)
    disks = LossyFiles(tmp_path / "now", monkeypatch, limit=SECTORS * SECTOR)
    machines = Machines(tmp_path / "now", make_store, journal, direct, "before")
    oids = [inode_oid(VID), *(data_oid(VID, index) for index in range(OBJECTS))]
    losses = []
    async with planes(
        3, machines.start, sheepdog_transport, copies=3, durable=True, factories=(sheepdog_redundancy(),)
    ) as sheep:
        for plane in sheep:
            plane.state.copy_policy = policy
        work = Work(sheep)
        for oid in oids:
            await sheep[0].objects.create(oid, 0, bytes(SECTORS * SECTOR))
        async with anyio.create_task_group() as tasks:
            for oid in oids:
                for sector in range(0, SECTORS, 2):
                    tasks.start_soon(work.overwrite, oid, sector)
            for number in range(3):
                tasks.start_soon(work.come_and_go, number)
            for loss in range(3):
                with anyio.fail_after(60):
                    while work.count < (loss + 1) * 80:
                        machines.rest()
                        await anyio.sleep(0.001)
                promised = dict(work.values), dict(work.created), set(work.removed)
                disks.image(tmp_path / f"loss{loss}", dice)
                for number in range(3):  # written once, when the sheep started
                    state = f"sheep{number}/sums/state"
                    shutil.copyfile(tmp_path / "now" / state, tmp_path / f"loss{loss}" / state)
                losses.append((tmp_path / f"loss{loss}", promised))
            tasks.cancel_scope.cancel()
    machines.close()
    monkeypatch.undo()

    for base, (values, created, removed) in losses:
        after = Machines(base, make_store, journal, direct, "after")
        stores = [after.start(number) for number in range(3)]
        assert any((base / f"sheep{number}/sums").glob("??/*.sums") for number in range(3))
        found = {key.oid for store in stores for key in store.keys()}  # noqa: SIM118
        assert not removed & found, "an acknowledged removal was undone"
        for (oid, sector), value in values.items():
            for content in contents(stores, oid, policy):
                seen = set(content[sector * SECTOR : (sector + 1) * SECTOR])
                # Later values may have got through, of a sector in strips perhaps in one strip alone.
                allowed = {(value + more) % 256 for more in range(LATER_MAX)}
                assert seen <= allowed, f"{oid:016x} sector {sector} has {seen}, acknowledged was {value}"
        for oid, content in created.items():
            assert all(one[:SECTOR] == content for one in contents(stores, oid, policy)), f"{oid:016x}"
        after.close()


def contents(stores, oid, policy):
    """The beginning of the object as each holder has it; of strips once, put together."""
    parts = {}
    for store in stores:
        for key in store.keys():  # noqa: SIM118
            if key.oid == oid:
                buffer = bytearray(SECTORS * SECTOR)
                store.read_into(key, memoryview(buffer), offset_bytes=0)
                parts.setdefault(key.index, []).append(bytes(buffer))
    if not policy or oid == inode_oid(VID):
        assert {index: len(found) for index, found in parts.items()} == {-1: len(stores)}, f"{oid:016x}"
        return parts[-1]
    assert {index: len(found) for index, found in parts.items()} == {0: 1, 1: 1, 2: 1}, f"{oid:016x}"
    half = SECTOR // 2
    pieces = (parts[index][0][at : at + half] for at in range(0, SECTORS * half, half) for index in (0, 1))
    return [b"".join(pieces)]
