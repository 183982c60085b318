"""Power loss: what was acknowledged is there, whatever the disks had in their caches.

Several data planes write to disks that remember what was flushed (``forgetful_disk``). At some moment an image is taken
of every disk as a power loss would leave it: what was flushed is there; of the rest each sector is there or not, by
chance. New data planes start on the images and every place must have its last acknowledged value, or one that was under
way. With strips, as many disks as there are parity strips are lost at the same moment.
"""

from __future__ import annotations

import random

import anyio
import pytest

from sheepdog.builtin.tcp import sheepdog_transport
from sheepdog.daemon import strip_store
from sheepdog.errors import SheepdogError
from sheepdog.model.ids import data_oid
from sheepdog_redundancy_ec import sheepdog_redundancy

from .data_plane import planes
from .forgetful_disk import Machines

pytestmark = pytest.mark.anyio
OBJECTS = 3
PLACE = 256  # bytes that one writer changes: with strips, half of a stripe
PLACES = 16  # per object that the writers use
LATER_MAX = 60  # values that a writer may have added between the look at what was acknowledged and the image
COPIES, TWO_ONE, FOUR_TWO = 0, 0x11, 0x22
NODES = {COPIES: 3, TWO_ONE: 3, FOUR_TWO: 6}
LOST = {COPIES: 0, TWO_ONE: 1, FOUR_TWO: 2}


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Writers:
    """One task per place; each writes its next value when the last one was acknowledged."""

    def __init__(self):
        self.acknowledged = {}
        self.count = 0

    async def run(self, sheep, oid, place):
        value = 0
        while True:
            value += 1
            data = bytes([value % 256]) * PLACE
            await sheep[(place + value) % len(sheep)].objects.write(oid, place * PLACE, data)
            self.acknowledged[oid, place] = value
            self.count += 1


class Outcome:
    """What is found after the power came back."""

    def __init__(self):
        self.wrong = []

    def look(self, acknowledged, oid, content):
        for place in range(PLACES):
            value = acknowledged.get((oid, place), 0)
            found = set(content[place * PLACE : (place + 1) * PLACE])
            allowed = {(value + more) % 256 for more in range(LATER_MAX)}
            if not found <= allowed:
                self.wrong.append((f"{oid:x}", place, value, sorted(found)[:4]))


async def readable(plane, oid):
    """The content, as soon as it can be had."""
    with anyio.fail_after(30):
        while True:
            try:
                return bytes(await plane.objects.read(oid, 0, PLACES * PLACE))
            except SheepdogError:
                await anyio.sleep(0.02)


async def power_goes(tmp_path, seed, policy, *, images=2, **kind):
    """Writers work, and the power goes ``images`` times; returns what is found wrong after it."""
    dice = random.Random(seed)
    count = NODES[policy]
    machines = Machines(tmp_path, count, **kind)
    oids = [data_oid(0x777777, index) for index in range(OBJECTS)]
    removed = data_oid(0x777777, 1000)
    writers = Writers()
    taken = []

    def start(these, **more):
        return planes(
            count, these.make_store, sheepdog_transport, copies=count, durable=True,
            factories=(sheepdog_redundancy(),), **more,
        )  # fmt: skip

    async with start(machines) as sheep:
        ports = [plane.node.id.port for plane in sheep]
        for plane in sheep:
            plane.state.copy_policy = policy
        for oid in (*oids, removed):
            await sheep[0].objects.create(oid, 0, bytes(PLACES * PLACE))
        await sheep[1].objects.remove(removed)
        async with anyio.create_task_group() as tasks:
            for oid in oids:
                for place in range(PLACES):
                    tasks.start_soon(writers.run, sheep, oid, place)
            for round_ in range(images):
                with anyio.fail_after(30):
                    while writers.count < (round_ + 1) * 150:
                        await anyio.sleep(0.001)
                acknowledged = dict(writers.acknowledged)
                taken.append((machines.image(dice), acknowledged))
            tasks.cancel_scope.cancel()
    machines.close()

    outcome = Outcome()
    for image, acknowledged in taken:
        lost = dice.sample(range(count), LOST[policy])
        for number in lost:
            image.lose(number)
        async with start(image, start=1, ports=ports) as sheep:
            for plane in sheep:
                plane.state.copy_policy = policy
                plane.unsettled.be_cautious(oids)
            for plane in sheep:
                assert removed not in {key.oid for key in plane.store.keys()}, "an acknowledged removal was undone"  # noqa: SIM118
            for oid in oids:
                contents = {await readable(plane, oid) for plane in sheep}
                assert len(contents) == 1, "two sheep answer differently"
                outcome.look(acknowledged, oid, contents.pop())
        image.close()
    return outcome.wrong


@pytest.mark.parametrize("kind", ["plain", "tree"])
@pytest.mark.parametrize("journal", [False, True], ids=["direct", "journal"])
@pytest.mark.parametrize("policy", [COPIES, TWO_ONE, FOUR_TWO], ids=["copies", "2:1", "4:2"])
async def test_nothing_acknowledged_is_lost(tmp_path, kind, journal, policy):
    """Writes, creates and removals that were acknowledged before the power went are as they were acknowledged.

    Of strips also when P disks are lost with the power: no stripe that was being changed is neither old nor new.
    """
    assert await power_goes(tmp_path, 1, policy, kind=kind, journal=journal) == []


@pytest.mark.parametrize("policy", [TWO_ONE, FOUR_TWO], ids=["2:1", "4:2"])
async def test_large_changes(tmp_path, policy, monkeypatch):
    """The same for changes of which only the old bytes are logged, as it is done with large ones."""
    monkeypatch.setattr(strip_store, "REDO_BYTES_MAX", 0)
    assert await power_goes(tmp_path, 5, policy) == []


async def test_without_a_log_there_is_the_hole(tmp_path):
    """What the log of strips is for: without it, a stripe that was being changed is garbage when a disk is lost."""
    wrong = []
    for seed in range(60):  # it shows in most of them, not in each
        base = tmp_path / str(seed)
        base.mkdir()
        wrong += await power_goes(base, seed, TWO_ONE, logged=False)
        if wrong:
            break

    assert wrong
