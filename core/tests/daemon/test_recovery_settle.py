"""Holders of one object give one answer: strips, settling, and what is noted over a crash."""

from __future__ import annotations

from collections import deque

import anyio
import pytest

from sheepdog.contracts.store import ShardKey
from sheepdog.daemon.recovery_notes import MARKS_MAX, FileNotes, Notes, Progress
from sheepdog.daemon.striped_undo import StripState, StripUndo
from sheepdog.daemon.unsettled import Unsettled
from sheepdog.errors import SheepdogError
from sheepdog.model.ids import data_oid
from sheepdog.model.node import NodeId
from sheepdog.wire.results import Result
from sheepdog_redundancy_ec import sheepdog_redundancy

from .data_plane import random_bytes
from .recovery_world import OBJECT, VID, digest, world

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]
POLICY = 0x11  # 2 data strips, 1 parity strip
STRIP = OBJECT // 2


@pytest.fixture
def anyio_backend():
    """The loop that sheep run on; settling over a simulated network on trio is tested by the simulation."""
    return "asyncio"


def striped(make_store, count):
    return world(count, make_store, copies=3, factories=(sheepdog_redundancy(),), policy=POLICY)


def strips(w, oid):
    """Strip index -> content, as the present holders have them."""
    holders = w.rings[w.epoch].holders(oid, 3)
    numbers = {plane.node.id: number for number, plane in enumerate(w.sheep)}
    return {
        index: w.content(numbers[node.id], oid, index, STRIP)
        for index, node in enumerate(holders)
        if w.has(numbers[node.id], oid, index)
    }


def whole(w, oid):
    """All strips are there and agree."""
    parts = strips(w, oid)
    scheme = w.sheep[w.members[0]].placer.placement(oid).scheme
    return len(parts) == 3 and scheme.verify(parts)


async def until(condition, limit_s=15):
    with anyio.fail_after(limit_s):
        while not condition():
            await anyio.sleep(0.01)


async def test_strips_follow_the_ring(make_store):
    """After every change each holder has the strip of its place, also those that had another one before."""
    async with striped(make_store, 5) as w:
        contents = {data_oid(VID, index): random_bytes(index, OBJECT) for index in range(5)}
        for oid, content in contents.items():
            await w.sheep[0].objects.create(oid, 0, content)

        for members in ((0, 1, 2, 3), (1, 2, 3), (1, 2, 3, 4), (0, 1, 2, 3, 4)):
            await w.change(*members)
            await w.recovered()
            for oid, content in contents.items():
                assert whole(w, oid)
                assert digest(await w.sheep[2].objects.read(oid, 0, OBJECT)) == digest(content)


async def test_striped_io_right_after_a_change(make_store):
    """Reads and partial writes need not wait for recovery, and leave strips that agree."""
    async with striped(make_store, 5) as w:
        contents = {data_oid(VID, index): bytearray(random_bytes(index, OBJECT)) for index in range(5)}
        for oid, content in contents.items():
            await w.sheep[0].objects.create(oid, 0, content)
        await w.change(0, 1, 2, 3)
        for oid, content in contents.items():
            await w.sheep[1].objects.write(oid, 777, b"partial" * 100)
            content[777:1477] = b"partial" * 100
            assert digest(await w.sheep[3].objects.read(oid, 0, OBJECT)) == digest(content)
        await w.change(1, 2, 3)
        for oid, content in contents.items():
            assert digest(await w.sheep[1].objects.read(oid, 0, OBJECT)) == digest(content)
        await w.recovered()

        assert all(whole(w, oid) for oid in contents)


async def test_writes_during_striped_recovery(make_store):
    """Writers that go on while strips move lose nothing and leave strips that agree."""
    async with striped(make_store, 4) as w:
        oids = [data_oid(VID, index) for index in range(4)]
        contents = {oid: bytearray(OBJECT) for oid in oids}
        for oid in oids:
            await w.sheep[0].objects.create(oid, 0, b"")

        async def writer(number):
            for step in range(12):
                oid = oids[(step + number) % 4]
                offset = number * 1_000_000 + step * 3001
                data = random_bytes(number * 100 + step, 2222)
                contents[oid][offset : offset + len(data)] = data
                await w.sheep[1 + number % 2].objects.write(oid, offset, data)

        async with anyio.create_task_group() as tasks:
            for number in range(3):
                tasks.start_soon(writer, number)
            await anyio.sleep(0.02)
            await w.change(1, 2, 3)
            await anyio.sleep(0.05)
            await w.change(0, 1, 2, 3)
        await w.recovered()
        await until(lambda: not any(plane.unsettled.oids for plane in w.sheep))

        for oid in oids:
            assert digest(await w.sheep[1].objects.read(oid, 0, OBJECT)) == digest(contents[oid])
            assert whole(w, oid)


async def test_too_few_strips_fail_and_come_back(make_store):
    """With fewer strips than data strips a read fails cleanly; with the nodes back the data is as before."""
    async with striped(make_store, 3) as w:
        oid = data_oid(VID, 1)
        content = random_bytes(1, OBJECT)
        await w.sheep[0].objects.create(oid, 0, content)
        await w.change(0, 1)
        await w.change(0)
        await w.recovered()
        with pytest.raises(SheepdogError), anyio.fail_after(10):
            await w.sheep[0].objects.read(oid, 0, 512)

        await w.change(0, 1)
        await w.change(0, 1, 2)
        await w.recovered()

        assert digest(await w.sheep[1].objects.read(oid, 0, OBJECT)) == digest(content)
        assert whole(w, oid)


async def test_interrupted_striped_write_is_settled(make_store):
    """Parity that does not belong to the data, as an interrupted write leaves it, is computed anew."""
    async with striped(make_store, 3) as w:
        oid = data_oid(VID, 1)
        content = random_bytes(1, OBJECT)
        await w.sheep[0].objects.create(oid, 0, content)
        placement = w.sheep[0].placer.placement(oid)
        victim = next(plane for plane in w.sheep if plane.node.id == placement.holders[2])
        victim.store.write(ShardKey(oid, 2), b"?" * 4096, offset_bytes=100, durable=False)
        assert not whole(w, oid)

        w.sheep[0].unsettled.oids[oid] = None
        await until(lambda: not w.sheep[0].unsettled.oids)

        assert whole(w, oid)
        assert digest(await w.sheep[1].objects.read(oid, 0, OBJECT)) == digest(content)


async def test_missing_and_different_copies_are_settled(make_store):
    """Settling gives every holder the primary's content, whether it had another one or none."""
    async with world(3, make_store, copies=3) as w:
        oid = w.object_on(0, 1, 2, copies=3)
        for number, content in enumerate((b"a", b"b")):
            w.put(number, oid, content * OBJECT)
        w.sheep[1].unsettled.oids[oid] = None
        await until(lambda: not w.sheep[1].unsettled.oids)

        assert [w.content(number, oid)[:1] for number in range(3)] == [b"a"] * 3


class Held:
    """Lets what was done be known only after ``go``."""

    def __init__(self):
        self.done = anyio.Event()
        self.go = anyio.Event()

    def after(self, work):
        """``work``, an asynchronous function, held."""

        async def held(*arguments):
            result = await work(*arguments)
            self.done.set()
            await self.go.wait()
            return result

        return held


async def test_settled_copies_stay_in_their_epoch(make_store):
    """What settling found under one epoch it brings to nobody under the next: who is no holder then keeps no copy."""
    async with world(3, make_store) as w:
        oid = w.object_on(0, 2)
        await w.change(0, 1)
        await w.recovered()
        w.put(0, oid, b"a" * OBJECT)
        w.put(1, oid, b"b" * OBJECT)
        mender, held = w.sheep[0].recovery.mender, Held()
        mender._digest = held.after(mender._digest)
        w.sheep[0].unsettled.oids[oid] = None
        await held.done.wait()
        await w.change(0, 1, 2)
        await until(lambda: not w.has(1, oid))  # set aside
        held.go.set()
        await w.recovered()
        await until(lambda: not w.sheep[0].unsettled.oids)

        assert w.holders(oid) == [0, 2]
        assert w.content(2, oid)[:1] == b"a"


async def test_settled_copies_replace_nothing_newer(make_store):
    """A primary that is none any more does not bring what it read before to a holder that has a newer change."""
    async with world(4, make_store, copies=3) as w:
        oid = w.object_on(3, 0, 1, copies=3)
        await w.change(0, 1, 2)
        await w.recovered()
        for number, content in enumerate((b"a", b"b", b"a")):
            w.put(number, oid, content * OBJECT)
        mender, held = w.sheep[0].recovery.mender, Held()
        mender._digest = held.after(mender._digest)
        w.sheep[0].unsettled.oids[oid] = None
        await held.done.wait()
        await w.change(0, 1, 2, 3)
        await w.recovered()
        await w.sheep[1].objects.write(oid, 0, b"new")
        pushed = []
        settled = mender.push_copy

        async def push(*arguments):
            pushed.append(await settled(*arguments))
            return pushed[-1]

        mender.push_copy = push
        held.go.set()
        await until(lambda: pushed)

        assert w.content(1, oid)[:3] == b"new"


async def test_settled_strips_stay_in_their_epoch(make_store):
    """A strip that its primary computed for itself is not stored where another strip belongs by now."""
    async with striped(make_store, 4) as w:
        oid = w.object_on(3, 0, 1, 2, copies=4)
        await w.change(0, 1, 2)
        await w.recovered()
        content = random_bytes(1, OBJECT)
        await w.sheep[1].objects.create(oid, 0, content)
        w.sheep[0].store.remove(ShardKey(oid, 0))
        mender, held = w.sheep[0].recovery.mender, Held()

        class Executor:
            run = staticmethod(held.after(mender._executor.run))

        mender._executor = Executor()
        w.sheep[0].unsettled.oids[oid] = None
        await held.done.wait()
        await w.change(0, 1, 2, 3)
        await until(lambda: not w.sheep[0].recovery._aside._rings)  # what does not belong here was set aside
        held.go.set()
        await w.recovered()
        await until(lambda: whole(w, oid))

        assert not w.has(0, oid, 0)
        assert digest(await w.sheep[1].objects.read(oid, 0, OBJECT)) == digest(content)


async def test_decision_stays_in_its_epoch():
    """What becomes of a change that is half-way is told to nobody after the epoch in which it was found out."""
    nodes = [NodeId.of("127.0.0.1", port) for port in (1, 2)]
    waiting, told, results = [], [], []

    class Undo:
        epoch = 1

        def members(self):
            return nodes

        def ask(self, node, oid, number, done):
            waiting.append((node, done))

        def tell(self, node, *arguments):
            told.append(node)

    undo = Undo()
    StripUndo.resolve(undo, 7, results.append)
    for node, done in waiting:
        undo.epoch = 2
        number = 5 if node == nodes[0] else 0
        done(0, StripState(number, 1, 1, whole=True, knows=True, complete=False, holders=tuple(nodes)))

    assert results == [Result.OLD_NODE_VER] and not told and len(waiting) == 2


async def test_crash_of_all_holders(make_store):
    """Copies that differ when all were killed in the middle of a write are never served in two versions."""
    async with world(3, make_store, copies=3) as w:
        oid, other = w.object_on(0, 1, 2, copies=3), w.object_on(2, 1, 0, copies=3)
        for number, content in enumerate((b"old", b"new", b"old")):
            w.put(number, oid, (content * 1000).ljust(OBJECT))
        for number, content in enumerate((b"new", b"old", b"new")):
            w.put(number, other, (content * 1000).ljust(OBJECT))
        w.sheep[1].recovery._notes.mark(oid)  # only one of them had begun to apply it
        w.sheep[2].recovery._notes.mark(other)
        w.restart()

        assert all(plane.unsettled.cautious for plane in w.sheep)
        for plane in w.sheep:
            assert bytes(await plane.objects.read(oid, 0, 3)) == b"old"  # the primary's
            assert bytes(await plane.objects.read(other, 0, 3)) == b"new"
        await w.recovered()
        assert {digest(w.content(number, oid)) for number in range(3)} == {digest((b"old" * 1000).ljust(OBJECT))}
        assert {digest(w.content(number, other)) for number in range(3)} == {digest((b"new" * 1000).ljust(OBJECT))}
        assert not any(plane.unsettled.cautious for plane in w.sheep)


async def test_silent_primary_leaves(make_store):
    """Changes of a primary that left are marked although its connection still stands."""
    async with world(3, make_store, copies=3) as w:
        oid = w.object_on(0, 1, 2, copies=3)
        await w.sheep[0].objects.create(oid, 0, b"x" * 512)
        holder = w.sheep[1]
        log = next(connection.applied for connection in holder.server.connections)
        log.clear()
        log.append((99, oid))
        holder.settler._logs = lambda: [log]
        seen = []
        abandon = holder.unsettled.abandon
        holder.settler._unsettled = holder.unsettled

        def spy(entries):
            seen.extend(entries)
            abandon(entries)

        class Spy:
            hopeless = holder.unsettled.hopeless
            abandon = staticmethod(spy)

        holder.settler._unsettled = Spy()
        await w.change(1, 2)
        holder.settler._unsettled = holder.unsettled

        assert seen == [(99, oid)] and not log


# ---- notes


@pytest.mark.parametrize("make", [lambda path: Notes(), lambda path: FileNotes(str(path))], ids=["memory", "file"])
def test_marks_outlive_their_change(tmp_path, make):
    """A marked object is listed until two periods are over, and for as long as it is said to be under way."""
    notes = make(tmp_path)
    unsettled = Unsettled(notes)
    log = unsettled.begin(7)
    applied = deque()
    unsettled.applied(applied, 5, 8, 1)
    assert notes.recall() == [7, 8]

    unsettled.turn([applied])
    unsettled.turn([applied])
    assert notes.recall() == [7, 8]
    unsettled.end(log, True)
    applied.clear()
    unsettled.begin(9)
    unsettled.turn([applied])
    assert notes.recall() == [7, 8, 9]
    unsettled.turn([applied])
    unsettled.turn([applied])

    assert notes.recall() == [9]


def test_files_survive_the_process(tmp_path):
    """Marks and progress are found by the next process without any orderly end."""
    notes = FileNotes(str(tmp_path))
    notes.progress = Progress(ctime=5, gathered=3, retired=4, lossy=1, disabled=True, disks=["/a", "/b c"])
    notes.save()
    notes.mark(0x80AA)
    notes.turn([0x80AA, 0x11])
    notes.mark(0x22)
    notes.flush()

    again = FileNotes(str(tmp_path))

    assert again.progress == notes.progress
    assert again.recall() == [0x11, 0x22, 0x80AA]


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"gathered": "x"}', b'{"disks": [1]}', b"\xff\xfe"])
def test_damaged_state_is_no_state(tmp_path, damage):
    """A damaged file is taken for none: recovery then searches more and trusts less."""
    (tmp_path / "recovery.state").write_bytes(damage)

    assert FileNotes(str(tmp_path)).progress == Progress()


def test_more_marks_than_fit(tmp_path):
    """A full table is an error in the log, not of the write."""
    notes = FileNotes(str(tmp_path))
    for oid in range(1, MARKS_MAX + 3):
        notes.mark(oid)

    assert len(FileNotes(str(tmp_path)).recall()) == MARKS_MAX
