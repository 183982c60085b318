"""Which shard is right, and that nothing else is ever copied: judged by values, and by real data planes."""

import hashlib
import random

import anyio
import pytest

from sheepdog.builtin.copies import CopiesFactory
from sheepdog.contracts.store import REPLICA, ShardKey, StoreOptions
from sheepdog.daemon.checksum_files import ChecksumFiles
from sheepdog.daemon.checksums import ChecksummedStore
from sheepdog.daemon.config import ScrubConfig
from sheepdog.daemon.repair import Repairs
from sheepdog.daemon.scrub import Scrubber, ScrubNotes
from sheepdog.daemon.verdicts import Look, Outcome, Verdict, best_of, judge_strips
from sheepdog.errors import SheepdogError
from sheepdog.testing.memory_store import MemoryMedium, MemoryStore

from .recovery_world import OBJECT, world

pytestmark = pytest.mark.timeout(60)

MISSING, UNKNOWN, RIGHT, CORRUPT = Verdict.MISSING, Verdict.UNKNOWN, Verdict.RIGHT, Verdict.CORRUPT
A, B, C = (bytes([number]) * 20 for number in (1, 2, 3))


@pytest.mark.parametrize(
    ("looks", "best"),
    [
        ([(RIGHT, A), (RIGHT, A), (RIGHT, A)], A),
        ([(RIGHT, A), (CORRUPT, B), (CORRUPT, B)], A),
        ([(RIGHT, A), (UNKNOWN, B), (UNKNOWN, B)], A),
        ([(RIGHT, A), (RIGHT, B), (UNKNOWN, B)], B),
        ([(RIGHT, A), (RIGHT, B), (MISSING, b"")], None),
        ([(UNKNOWN, A), (UNKNOWN, A), (UNKNOWN, B)], A),
        ([(UNKNOWN, A), (UNKNOWN, B), (UNKNOWN, C)], None),
        ([(UNKNOWN, A), (UNKNOWN, B), (CORRUPT, C)], None),
        ([(UNKNOWN, A), (CORRUPT, B), (CORRUPT, C)], A),
        ([(UNKNOWN, A), (UNKNOWN, B), (CORRUPT, A)], B),
        ([(UNKNOWN, A), (CORRUPT, A), (CORRUPT, A)], None),
        ([(CORRUPT, A), (CORRUPT, A), (CORRUPT, A)], None),
        ([(CORRUPT, A)], None),
        ([(UNKNOWN, A), (MISSING, b""), (MISSING, b"")], A),
        ([(MISSING, b""), (MISSING, b"")], None),
    ],
)
def test_best_of(looks, best):
    """A checksum decides, then the majority; what a checksum calls wrong is not right only because two have it."""
    found = {number: Look(verdict, digest) for number, (verdict, digest) in enumerate(looks)}

    assert best_of(found) == best


@pytest.mark.parametrize(
    ("looks", "best"),
    [
        ([(RIGHT, A), (RIGHT, A), (UNKNOWN, B)], A),
        ([(RIGHT, A), (UNKNOWN, B), (UNKNOWN, B)], B),
        ([(RIGHT, A), (RIGHT, A), *[(UNKNOWN, B)] * 4, (UNKNOWN, C)], B),
        ([(RIGHT, A), (CORRUPT, B), (CORRUPT, B)], A),
        ([(RIGHT, A), (UNKNOWN, B), (CORRUPT, B)], A),
        ([(RIGHT, A), (UNKNOWN, B), (UNKNOWN, C)], A),
        ([(UNKNOWN, A), (UNKNOWN, B)], None),
    ],
)
def test_best_of_by_majority(looks, best):
    """CHK-7: asked by ``vdi check``, what most holders have wins over checksums, unless it is known to be corrupt."""
    found = {number: Look(verdict, digest) for number, (verdict, digest) in enumerate(looks)}

    assert best_of(found, by_majority=True) == best


def test_outcome_travels():
    """What a comparison came to arrives as it was sent."""
    for outcome in (Outcome(), Outcome(2, 1, True), Outcome(31, 31, False)):
        assert Outcome.unpack(outcome.pack()) == outcome


def strips_of(scheme, seed):
    data = random.Random(seed).randbytes(512 * 8)
    return {write.index: bytes(write.data) for write in scheme.split(data, offset_bytes=0)}


def spoilt(strip, at=100):
    return strip[:at] + bytes([strip[at] ^ 1]) + strip[at + 1 :]


@pytest.fixture(params=[(0x11, 3), (0x22, 6)], ids=["2:1", "4:2"])
def scheme(request):
    ec = pytest.importorskip("sheepdog_redundancy_ec")
    return ec.sheepdog_redundancy().scheme(*request.param)


def test_strips_that_fit(scheme):
    """Strips that fit together are right, with and without checksums; a missing one is computed."""
    whole = strips_of(scheme, 1)

    assert judge_strips(scheme, whole, set(), scheme.shards) == {}
    assert judge_strips(scheme, whole, set(whole), scheme.shards) == {}
    rest = {index: strip for index, strip in whole.items() if index != 1}
    assert {index: bytes(strip) for index, strip in judge_strips(scheme, rest, set(), scheme.shards).items()} == {
        1: whole[1]
    }


def test_strips_by_checksum(scheme):
    """Strips that are known to be right tell what each other one should be."""
    whole = strips_of(scheme, 2)
    right = set(range(1, scheme.shards_to_read + 1))
    parts = {**whole, 0: spoilt(whole[0])}

    wrong = judge_strips(scheme, parts, right, scheme.shards)

    assert {index: bytes(strip) for index, strip in wrong.items()} == {0: whole[0]}


def test_strips_that_nothing_tells(scheme):
    """Too few strips, or right ones of different changes, are left alone."""
    whole = strips_of(scheme, 3)
    few = {index: whole[index] for index in range(scheme.shards_to_read - 1)}

    assert judge_strips(scheme, few, set(), scheme.shards) is None
    assert judge_strips(scheme, {**whole, 0: strips_of(scheme, 4)[0]}, set(whole), scheme.shards) is None


def test_strips_by_parity(scheme):
    """Without checksums one wrong strip is found if there is parity to spare, else nothing is touched."""
    whole = strips_of(scheme, 5)
    for bad in whole:
        wrong = judge_strips(scheme, {**whole, bad: spoilt(whole[bad])}, set(), scheme.shards)
        if scheme.shards - scheme.shards_to_read < 2:
            assert wrong is None
        else:
            assert {index: bytes(strip) for index, strip in wrong.items()} == {bad: whole[bad]}


# ---- data planes


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Scene:
    """Sheep with checksums and a scrub each, whose media the test can spoil."""

    def __init__(self, sheep, found):
        self.world = sheep
        self.found = found
        self.scrubbers = [plane.scrubber for plane in sheep.sheep]

    def plane(self, number):
        return self.world.sheep[number]

    def spoil(self, number, oid, at=5000, index=REPLICA):
        inner = self.plane(number).store.inner
        byte = bytearray(1)
        inner.read_into(ShardKey(oid, index), memoryview(byte), offset_bytes=at)
        inner.write(ShardKey(oid, index), bytes([byte[0] ^ 1]), offset_bytes=at, durable=False)

    def forget(self, *numbers):
        """As after kill -9 of these, or before they ever kept checksums."""
        for number in numbers:
            store = self.plane(number).store
            with store._lock:
                for key in list(store._states):
                    store._files.drop(key)
                    store._forget(key)

    def stored(self, number, oid, index=REPLICA):
        inner = self.plane(number).store.inner
        content = bytearray(inner.size(ShardKey(oid, index)))
        inner.read_into(ShardKey(oid, index), memoryview(content), offset_bytes=0)
        return bytes(content)

    def known(self, number, oid):
        store = self.plane(number).store
        return store.verify(ShardKey(oid), offset_bytes=0, length_bytes=OBJECT).complete

    async def scrub(self):
        for scrubber in self.scrubbers:
            scrubber.start(1 << 40)
        with anyio.fail_after(20):
            await anyio.sleep(0.02)
            while any(s.status()["running"] or s.status()["repairing"] for s in self.scrubbers):
                await anyio.sleep(0.01)
        return [scrubber.status() for scrubber in self.scrubbers]


@pytest.fixture
async def scene(tmp_path):
    found = []

    def make_store(zone):
        base = tmp_path / str(zone)
        base.mkdir()
        inner = MemoryStore(StoreOptions((str(base),)), MemoryMedium())
        return ChecksummedStore(inner, ChecksumFiles(str(base), durable=True, boot_id="b"))

    async with world(4, make_store, copies=3, factories=(CopiesFactory(),)) as made, anyio.create_task_group() as tasks:
        for number, plane in enumerate(made.sheep):
            repairs = Repairs(
                plane.state, plane.primary, plane.shards, plane.placer, plane.peers, plane.executor, plane.outbox,
                plane.dispatcher, plane.recovery, plane.gateway.striped,
            )  # fmt: skip
            plane.repairs = repairs
            plane.scrubber = Scrubber(
                ScrubConfig(0), ScrubNotes(), plane.state, plane.shards, plane.placer, repairs, plane.recovery,
                plane.executor, plane.clock, random.Random(number), plane.stats,
                lambda oid, index, reason, number=number: found.append((number, oid, index)),
            )  # fmt: skip
            tasks.start_soon(plane.scrubber.run)
        yield Scene(made, found)
        tasks.cancel_scope.cancel()


def content_of(seed):
    return random.Random(seed).randbytes(OBJECT)


@pytest.mark.anyio
async def test_corrupt_copies_are_announced_and_repaired(scene):
    """A read of a corrupt copy gives the bytes of another holder, tells observers, and has the copy repaired."""
    oid = scene.world.object_on(0, 1, 2, copies=3)
    good = content_of(1)
    await scene.plane(0).objects.create(oid, 0, good)
    scene.spoil(0, oid)
    scene.spoil(1, oid)

    for number in range(4):
        assert await scene.plane(number).objects.read(oid, 4096, 4096) == good[4096:8192]
    with anyio.fail_after(10):
        while not all(scene.stored(number, oid) == good for number in (0, 1, 2)):
            await anyio.sleep(0.01)

    assert sorted(set(scene.found)) == [(0, oid, -1), (1, oid, -1)]


@pytest.mark.anyio
async def test_copy_of_an_unknown_copy(scene):
    """What recovery takes from a copy without checksums gets none by that: copies that have them are believed."""
    oid = scene.world.object_on(0, 1, 2, copies=3)
    good = content_of(3)
    await scene.plane(0).objects.create(oid, 0, good)
    scene.forget(0)
    scene.spoil(0, oid)

    await scene.world.change(0, 1, 3)
    await scene.world.recovered()
    assert scene.stored(3, oid) == scene.stored(0, oid) != good, "the first holder was the source"
    assert not scene.known(3, oid)
    await scene.scrub()

    for number in (0, 1, 3):
        assert scene.stored(number, oid) == good and scene.known(number, oid)


@pytest.mark.anyio
async def test_copy_of_a_known_copy(scene):
    """What recovery takes from a copy with checksums has them at once."""
    oid = scene.world.object_on(0, 1, 2, copies=3)
    await scene.plane(0).objects.create(oid, 0, content_of(4))

    await scene.world.change(0, 1, 3)
    await scene.world.recovered()

    assert scene.stored(3, oid) == content_of(4) and scene.known(3, oid)


@pytest.mark.anyio
async def test_unknown_copies_are_compared(scene):
    """Copies without checksums get them when they agree; one that differs becomes as the others."""
    oid = scene.world.object_on(0, 1, 2, copies=3)
    other = scene.world.object_on(1, 2, 0, copies=3)
    for number, each in enumerate((oid, other)):
        await scene.plane(0).objects.create(each, 0, content_of(number))
    scene.forget(0, 1, 2)
    scene.spoil(0, oid)
    assert not scene.known(1, oid)

    states = await scene.scrub()

    for number in (0, 1, 2):
        assert scene.stored(number, oid) == content_of(0)
        assert scene.stored(number, other) == content_of(1)
        assert scene.known(number, oid) and scene.known(number, other)
    assert not any(state["unrepairable"] for state in states)
    assert sum(state["repaired"] for state in states) == 1


@pytest.mark.anyio
async def test_unknown_copies_are_compared_after_the_start(scene):
    """Without anybody asking: a sheep that has started has compared what has no checksums, and reads nothing else."""
    oid = scene.world.object_on(0, 1, 2, copies=3)
    known = scene.world.object_on(1, 2, 0, copies=3)
    for number, each in enumerate((oid, known)):
        await scene.plane(0).objects.create(each, 0, content_of(number))
    for number in (0, 1, 2):
        scene.plane(number).store.upkeep()
        scene.plane(number).store.upkeep()
        store = scene.plane(number).store
        store._files.drop(ShardKey(oid))
        with store._lock:
            for key in list(store._states):
                store._forget(key)
    scene.spoil(0, oid)
    scene.spoil(1, known)

    async with anyio.create_task_group() as tasks:
        for plane in scene.world.sheep:
            plane.scrubber._config = ScrubConfig(interval_s=1)
            tasks.start_soon(plane.scrubber._catch_up)

    for number in (0, 1, 2):
        assert scene.stored(number, oid) == content_of(0) and scene.known(number, oid)
    assert scene.stored(1, known) != content_of(1), "that is for a read or a pass to find"
    assert [scrubber.status()["unknown"] for scrubber in scene.scrubbers] == [0] * 4


@pytest.mark.anyio
async def test_checksum_outweighs_the_majority(scene):
    """Two equal copies without checksums do not replace one that is known to be right."""
    oid = scene.world.object_on(0, 1, 2, copies=3)
    good = content_of(2)
    await scene.plane(0).objects.create(oid, 0, good)
    scene.forget(0, 1)
    for number in (0, 1):
        scene.spoil(number, oid)

    await scene.scrub()

    assert [scene.stored(number, oid) == good for number in (0, 1, 2)] == [True] * 3


@pytest.mark.anyio
async def test_repair_of_one_copy_touches_no_other(scene):
    """What ``vdi check`` asks for is done to that copy alone; nothing is brought in line with the primary's later."""
    oid = scene.world.object_on(0, 1, 2, copies=3)
    good = content_of(7)
    await scene.plane(0).objects.create(oid, 0, good)
    scene.forget(0, 1, 2)
    scene.spoil(0, oid)
    scene.spoil(2, oid, at=9000)
    scene.plane(1).store.accept(ShardKey(oid), hashlib.sha1(good).digest())
    before = scene.stored(0, oid)

    await scene.plane(2).repairs.repair(oid)
    await anyio.sleep(1.0)  # longer than an object waits to be settled

    assert scene.stored(2, oid) == good
    assert scene.stored(0, oid) == before
    assert oid not in scene.plane(0).unsettled.oids


@pytest.mark.anyio
@pytest.mark.parametrize("known", [False, True])
async def test_settling_prefers_what_is_right(scene, known):
    """Settling an object does not copy the primary's bytes over those of holders that are known to be right."""
    oid = scene.world.object_on(0, 1, 2, copies=3)
    good = content_of(6)
    await scene.plane(0).objects.create(oid, 0, good)
    if not known:
        scene.forget(0)
    scene.spoil(0, oid)
    plane = scene.plane(0)
    plane.unsettled.oids[oid] = None
    ended = anyio.Event()
    results = []

    def done(result):
        results.append(result)
        ended.set()

    with plane.outbox:
        plane.primary.settle(oid, done)
    with anyio.fail_after(10):
        await ended.wait()

    assert results == [0]
    assert [scene.stored(number, oid) == good for number in (0, 1, 2)] == [True] * 3


@pytest.mark.anyio
async def test_nothing_good_is_left(scene):
    """Corrupt copies are kept as they are and named; a good one that turns up mends them."""
    oid = scene.world.object_on(0, 1, 2, copies=3)
    good = content_of(3)
    await scene.plane(0).objects.create(oid, 0, good)
    for number in (0, 1, 2):
        scene.spoil(number, oid)
    before = [scene.stored(number, oid) for number in (0, 1, 2)]

    with pytest.raises(SheepdogError):
        await scene.plane(3).objects.read(oid, 0, 8192)
    states = await scene.scrub()
    assert [len(state["unrepairable"]) for state in states] == [1, 1, 1, 0]
    assert states[0]["unrepairable"][0][:2] == [f"{oid:016x}", -1]
    assert [scene.stored(number, oid) for number in (0, 1, 2)] == before
    scene.spoil(2, oid)  # back to what it was
    states = await scene.scrub()

    assert not any(state["unrepairable"] for state in states)
    assert [scene.stored(number, oid) == good for number in (0, 1, 2)] == [True] * 3


@pytest.mark.anyio
async def test_writes_beside_comparisons(scene):
    """Comparing an object that is written to all the time finds nothing, and loses nothing."""
    oid = scene.world.object_on(0, 1, 2, copies=3)
    expected = bytearray(content_of(4))
    await scene.plane(0).objects.create(oid, 0, bytes(expected))
    done = False

    async def compare():
        while not done:
            scene.forget(0, 1, 2)
            outcome = await scene.plane(0).repairs.compare(oid)
            assert outcome == Outcome()
            await anyio.sleep(0.001)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(compare)
        rng = random.Random(4)
        for number in range(150):
            offset = rng.randrange(OBJECT // 512) * 512
            data = rng.randbytes(512)
            await scene.plane(number % 4).objects.write(oid, offset, data)
            expected[offset : offset + 512] = data
        done = True

    digest = hashlib.sha1(expected).digest()
    assert [hashlib.sha1(scene.stored(number, oid)).digest() for number in (0, 1, 2)] == [digest] * 3
    assert scene.found == []


@pytest.mark.anyio
async def test_corrupt_source_in_recovery(scene):
    """A holder that recovers takes the good copy, never the corrupt one; with none it waits and nothing is lost."""
    made = scene.world
    oid = made.object_on(0, 1, 2, 3, copies=4)
    lost = made.object_on(1, 0, 2, 3, copies=4)
    good = content_of(5)
    for each in (oid, lost):
        await scene.plane(0).objects.create(each, 0, good)
    scene.spoil(0, oid)
    for number in (0, 1):
        scene.spoil(number, lost)
    before = [scene.stored(number, lost) for number in (0, 1)]

    await made.change(0, 1, 3)
    await made.recovered()
    with anyio.fail_after(10):
        while scene.stored(3, oid) != good or scene.stored(0, oid) != good:
            await anyio.sleep(0.01)

    assert not made.has(3, lost)
    assert [scene.stored(number, lost) for number in (0, 1)] == before
    assert scene.stored(2, lost) == good
    await made.change(0, 1, 2, 3)
    await made.recovered()
    await scene.scrub()
    assert scene.stored(0, lost) == good
