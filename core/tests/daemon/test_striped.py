"""Erasure-coded objects: partial stripes, computed reads beside writes, and changes that die half-way."""

from __future__ import annotations

import random

import anyio
import pytest

from sheepdog.contracts.store import ShardKey, StoreOptions
from sheepdog.daemon import striped
from sheepdog.daemon.checksum_files import ChecksumFiles
from sheepdog.daemon.checksums import ChecksummedStore
from sheepdog.daemon.store_wrapper import StoreWrapper
from sheepdog.daemon.strip_memory import StripMemory
from sheepdog.daemon.strip_store import StripLog, StripStore
from sheepdog.daemon.striped_undo import StripUndo
from sheepdog.errors import RequestError, ShardCorrupt, SheepdogError
from sheepdog.model.ids import attribute_oid, data_oid
from sheepdog.testing.memory_store import MemoryMedium, MemoryStore
from sheepdog.wire.extensions import STRIP_WRITE
from sheepdog.wire.opcodes import Op
from sheepdog.wire.results import Result
from sheepdog_redundancy_ec import sheepdog_redundancy
from sheepdog_store_plain import sheepdog_object_store as plain_store

from .data_plane import random_bytes
from .recovery_world import VID, world

pytestmark = pytest.mark.anyio
FOUR_TWO = 0x22
TWO_ONE = 0x11
MiB = 1024 * 1024
PART = 64 * 1024  # what the tests look at of an object


@pytest.fixture
def anyio_backend():
    return "asyncio"


def make_store(number):
    return MemoryStore(StoreOptions((f"/d{number}",)), MemoryMedium())


def striped_world(count, policy=FOUR_TWO, make_store=make_store):
    copies = (policy >> 4) * 2 + (policy & 15)
    return world(count, make_store, copies=copies, factories=(sheepdog_redundancy(),), policy=policy)


def holders(made, oid, copies=6):
    """Numbers of the sheep that hold the strips, in order of the strips."""
    by_id = {plane.node.id: number for number, plane in enumerate(made.sheep)}
    return [by_id[node.id] for node in made.rings[made.epoch].holders(oid, copies)]


def lose_changes(plane, targets, *, opcode=Op.WRITE_PEER):
    """From now on what ``plane`` sends to these nodes to change strips never arrives, and is never answered."""
    for node in targets:
        link = plane.peers.link(node)
        real = link.object_request

        def request(op, *arguments, _real=real, **fields):
            if op != opcode:
                _real(op, *arguments, **fields)

        # A method of a slotted class: the link is replaced by one that filters.
        plane.peers._links[node] = _Filter(link, request)
        for placement, _ in plane.placer._cache.values():
            placement.links = tuple(plane.peers.link(other) for other in placement.others)


class _Filter:
    def __init__(self, link, request):
        self._link = link
        self.object_request = request

    def __getattr__(self, name):
        return getattr(self._link, name)


async def readable(plane, oid, offset, length):
    """The bytes, as soon as they can be had."""
    with anyio.fail_after(20):
        while True:
            try:
                return bytes(await plane.objects.read(oid, offset, length))
            except SheepdogError:
                await anyio.sleep(0.02)


@pytest.mark.parametrize("policy", [TWO_ONE, FOUR_TWO])
async def test_partial_writes(policy):
    """EC-6: writes inside a strip, across strips and across stripes read back right, also with strips missing."""
    copies = (policy >> 4) * 2 + (policy & 15)
    async with striped_world(copies, policy) as made:
        oid = made.object_on(0, copies=copies)
        content = bytearray(random_bytes(1, PART))
        await made.sheep[0].objects.create(oid, 0, bytes(content))
        dice = random.Random(7)
        for number in range(60):
            length = dice.choice((1, 5, 100, 512, 513, 4096, 5000))
            offset = dice.randrange(PART - length)
            data = dice.randbytes(length)
            await made.sheep[number % copies].objects.write(oid, offset, data)
            content[offset : offset + length] = data
            if number == 30:  # from here on degraded: the last data strip is gone
                index = (policy >> 4) * 2 - 1
                made.sheep[holders(made, oid, copies)[index]].store.remove(ShardKey(oid, index))

        for plane in made.sheep:
            assert bytes(await plane.objects.read(oid, 0, PART)) == content


async def test_strips_of_attributes():
    """The strip of an attribute has the size of a data object's strip, at every holder, as the original makes it."""
    async with striped_world(6) as made:
        oid = attribute_oid(VID, 5)
        content = random_bytes(1, 66320)
        await made.sheep[0].objects.create(oid, 0, content)

        sizes = [made.sheep[number].store.size(ShardKey(oid, i)) for i, number in enumerate(holders(made, oid))]
        assert sizes == [MiB] * 6
        assert bytes(await made.sheep[1].objects.read(oid, 0, 66320)) == content


async def test_computed_reads_beside_writes():
    """Reads that need parity, made through every gateway while the stripe is being written, never return garbage.

    Every write fills the whole range with one byte, so a read must be of one byte per sector, whichever.
    """
    async with striped_world(6) as made:
        oid = made.object_on(0, copies=6)
        await made.sheep[0].objects.create(oid, 0, b"\x01" * 8192)
        made.sheep[holders(made, oid)[2]].store.remove(ShardKey(oid, 2))
        stop = False
        seen = set()

        async def write():
            number = 1
            while not stop:
                number = number % 200 + 1
                await made.sheep[number % 6].objects.write(oid, 0, bytes([number]) * 8192)

        async def look(plane):
            for _ in range(60):
                content = bytes(await plane.objects.read(oid, 256, 128))  # exactly the strip that is missing
                assert len(set(content)) == 1, content[:16]
                seen.add(content[0])

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            async with anyio.create_task_group() as readers:
                for plane in made.sheep:
                    readers.start_soon(look, plane)
            stop = True
        assert len(seen) > 1


async def interrupted(made, oid, reached, survivors, offset=300, length=1200, size=PART):
    """A write of bytes 300 to 1500 reaches only the strips of ``reached``; then the primary is gone.

    :returns: the content before, and as it would be after the write.
    """
    order = holders(made, oid)
    primary = made.sheep[order[0]]
    before = random_bytes(5, size)
    await primary.objects.create(oid, 0, before)
    await primary.objects.write(oid, 0, before[:4096])  # every holder has a record of a complete change
    data = random_bytes(6, length)
    lose_changes(primary, [made.sheep[order[index]].node.id for index in range(1, 6) if index not in reached])
    primary.gateway.submit_write(oid, offset, data, lambda *_: None)
    old = {index: made.content(order[index], oid, index) for index in reached}
    with anyio.fail_after(10):
        while any(made.content(order[index], oid, index) == old[index] for index in reached):
            await anyio.sleep(0.005)
    await made.change(*survivors(order))
    return before, before[:offset] + data + before[offset + length :]


CASES = [
    (reached, spare) for reached in ((1,), (4,), (1, 2), (4, 5), (1, 2, 3), (2, 4, 5), (1, 2, 3, 4)) for spare in (0, 1)
]


@pytest.mark.parametrize(("reached", "spare"), CASES)
async def test_write_that_dies_half_way(reached, spare):
    """The primary dies when only some holders have a change: the object is the old or the new one, nothing between."""
    async with striped_world(6 + spare) as made:
        oid = made.object_on(0, copies=6)
        before, after = await interrupted(
            made, oid, reached, lambda order: [n for n in range(6 + spare) if n != order[0]]
        )

        contents = {await readable(made.sheep[n], oid, 0, PART) for n in made.members}
        await made.recovered()
        contents |= {await readable(made.sheep[n], oid, 0, PART) for n in made.members}

        assert contents in ({before}, {after})
        order = holders(made, oid)
        made.sheep[order[0]].store.remove(ShardKey(oid, 0))
        assert await readable(made.sheep[order[1]], oid, 0, PART) in contents


@pytest.mark.parametrize(("reached", "stays"), [((1, 2), False), ((1, 2, 3), False), ((1, 2, 3, 4, 5), True)])
async def test_whole_object_that_dies_half_way(tmp_path, reached, stays):
    """The same for a change of whole strips, which are written beside the old ones and not over them."""

    done = []
    logs = []

    class Watched(StoreWrapper):
        def exchange(self, staged):
            done.append("exchange")
            super().exchange(staged)

        def put_back(self, key, old, *, durable):
            done.append("put back")
            return super().put_back(key, old, durable=durable)

    def real_store(number):
        base = tmp_path / str(number)
        (base / "obj").mkdir(parents=True)
        made = plain_store(StoreOptions((str(base / "obj"),)))
        logs.append(StripLog(str(base), synced=False))
        return StripStore(Watched(made), logs[-1])

    async with striped_world(6, make_store=real_store) as made:
        oid = made.object_on(0, copies=6)
        before, after = await interrupted(made, oid, reached, lambda order: order[1:], 0, 4 * MiB, 4 * MiB)

        contents = {await readable(made.sheep[n], oid, 0, 4 * MiB) for n in made.members}
        await made.recovered()
        contents |= {await readable(made.sheep[n], oid, 0, 4 * MiB) for n in made.members}

        assert contents == {after if stays else before}
    assert done.count("exchange") >= len(reached) and ("put back" in done) != stays
    for log in logs:
        log.finish()


async def test_write_that_reached_all_stays():
    """The primary dies when every other holder has the change, which may have been acknowledged: it stays."""
    async with striped_world(6) as made:
        oid = made.object_on(0, copies=6)
        _, after = await interrupted(made, oid, (1, 2, 3, 4, 5), lambda order: order[1:])

        assert await readable(made.sheep[made.members[0]], oid, 0, PART) == after


async def test_acknowledged_writes_stay():
    """Nothing that was acknowledged is taken back, whoever dies after it."""
    async with striped_world(7) as made:
        contents = {}
        for index in range(12):
            oid = data_oid(VID, index)
            contents[oid] = bytearray(random_bytes(index, 8192))
            await made.sheep[index % 7].objects.create(oid, 0, bytes(contents[oid]))
            for number in range(5):
                data = random_bytes(100 * index + number, 700)
                await made.sheep[number % 7].objects.write(oid, number * 900, data)
                contents[oid][number * 900 : number * 900 + 700] = data
        for gone in (0, 3):
            await made.change(*(number for number in made.members if number != gone))
            await made.recovered()

            for oid, content in contents.items():
                for number in made.members:
                    assert await readable(made.sheep[number], oid, 0, 8192) == content


async def test_without_records_there_is_the_hole(monkeypatch):
    """What the records are for: without them a change that died half-way spoils bytes that nobody wrote."""

    def resolve(self, oid, done):
        done(0)

    monkeypatch.setattr(StripUndo, "resolve", resolve)
    async with striped_world(6) as made:
        oid = made.object_on(0, copies=6)
        before, after = await interrupted(made, oid, (1, 2), lambda order: order[1:])

        content = await readable(made.sheep[made.members[0]], oid, 0, PART)
        assert content not in (before, after)
        assert content[:300] != before[:300] or content[1500:2048] != before[1500:2048]


async def test_fewer_zones():
    """Fewer zones than strips, but enough to read: every strip that has a zone is written. Below: an error."""
    async with striped_world(5) as made:
        oid = made.object_on(0, copies=6)
        content = random_bytes(3, 20_000)
        await made.sheep[1].objects.create(oid, 0, content)
        order = holders(made, oid)
        assert [made.has(number, oid, index) for index, number in enumerate(order)] == [True] * 5
        made.sheep[order[1]].store.remove(ShardKey(oid, 1))
        assert bytes(await made.sheep[2].objects.read(oid, 0, 20_000)) == content

    async with striped_world(3) as made:
        oid = made.object_on(0, copies=6)
        with pytest.raises(RequestError):
            await made.sheep[0].objects.create(oid, 0, b"x" * 600)


async def test_random_deaths():
    """Many writes, a primary that dies in the middle: every sector is of one write, acknowledged ones stand."""
    async with striped_world(7) as made:
        oid = made.object_on(0, copies=6)
        order = holders(made, oid)
        sectors = 64
        await made.sheep[order[1]].objects.create(oid, 0, bytes(sectors * 512))
        acknowledged = {}
        submitted = {sector: {0} for sector in range(sectors)}
        dice = random.Random(11)
        primary = made.sheep[order[0]]
        lost = [made.sheep[order[index]].node.id for index in (2, 4, 5)]

        async def write(number):
            sector = number % sectors
            value = number % 250 + 1
            submitted[sector].add(value)
            # Through the primary itself: with it the request is gone, so nobody repeats it.
            primary.gateway.submit_write(
                oid,
                sector * 512,
                bytes([value]) * 512,
                lambda result, _: acknowledged.update({sector: value} if not result else {}),
            )

        for number in range(sectors):
            await write(number)
        with anyio.fail_after(20):
            while len(acknowledged) < sectors:
                await anyio.sleep(0.01)
        lose_changes(primary, lost)
        late = dice.randrange(sectors)
        await write(late + 3 * sectors)
        await anyio.sleep(0.1)
        await made.change(*(number for number in range(7) if number != order[0]))

        content = await readable(made.sheep[order[1]], oid, 0, sectors * 512)
        for sector in range(sectors):
            values = set(content[sector * 512 : sector * 512 + 512])
            assert len(values) == 1, sector
            if sector != late:
                assert values == {acknowledged[sector]}
            else:
                assert values <= submitted[sector] - {0}


async def test_write_to_a_corrupt_strip(tmp_path):
    """What was there before cannot be read: the write is made nevertheless, is on record like any other, and makes the
    blocks that it covers right again."""

    def checksummed(number):
        base = tmp_path / str(number)
        base.mkdir()
        return ChecksummedStore(make_store(number), ChecksumFiles(str(base), durable=True, boot_id="b"))

    async with world(3, checksummed, copies=3, factories=(sheepdog_redundancy(),), policy=TWO_ONE) as made:
        oid = made.object_on(0, 1, 2, copies=3)
        await made.sheep[0].objects.create(oid, 0, random_bytes(1, 2 * PART))
        made.sheep[1].store.inner.write(ShardKey(oid, 1), b"rotten", offset_bytes=4096, durable=False)
        with pytest.raises(ShardCorrupt):
            made.content(1, oid, 1, PART)

        new = random_bytes(2, 2 * PART)
        await made.sheep[0].objects.write(oid, 0, new)

        first, second = (made.sheep[number].gateway.striped.undo.memory.records[oid] for number in (1, 2))
        assert first.number == second.number
        made.content(1, oid, 1, PART)
        assert await made.sheep[2].objects.read(oid, 0, 2 * PART) == new


async def test_restarted_holder_is_no_witness():
    """A holder whose process began after a change knows nothing of it: that it has no record undoes nothing."""
    async with striped_world(6) as made:
        oid = made.object_on(0, copies=6)
        order = holders(made, oid)
        content = random_bytes(8, 8192)
        await made.sheep[order[0]].objects.create(oid, 0, bytes(8192))
        await made.sheep[order[0]].objects.write(oid, 0, content)
        # The primary is killed and is back before anybody has settled anything.
        undo = made.sheep[order[0]].gateway.striped.undo
        undo.memory = StripMemory()
        undo._base ^= 1 << 40
        for plane in made.sheep:
            plane.unsettled.oids[oid] = None
        results = []
        made.sheep[order[0]].primary.settle(oid, results.append)
        with anyio.fail_after(10):
            while not results:
                await anyio.sleep(0.01)

        assert results == [0]
        for plane in made.sheep:
            assert bytes(await plane.objects.read(oid, 0, 8192)) == content


def count_requests(plane, counted):
    """``counted`` has the number of requests that ``plane`` sends, by opcode; under "of" (opcode, strip, length)."""
    for other in list(plane.state.ring.nodes):
        if other.id == plane.node.id:
            continue
        link = plane.peers.link(other.id)
        real = link.object_request

        def request(op, epoch, oid, done, *, _real=real, **fields):
            counted[op] = counted.get(op, 0) + 1
            counted.setdefault("of", []).append((op, fields.get("ec_index", 0), fields.get("length", 0)))
            _real(op, epoch, oid, done, **fields)

        plane.peers._links[other.id] = _Filter(link, request)


async def all_of(submit, count):
    """``submit(number, done)`` for each number at once, then their results."""
    results = {}
    for number in range(count):
        submit(number, lambda result, *_, _number=number: results.update({_number: result}))
    with anyio.fail_after(20):
        while len(results) < count:
            await anyio.sleep(0.005)
    return results


async def test_writes_in_rounds():
    """Writes that wait together cost each holder one request, whatever stripes they touch, and keep their order."""
    async with striped_world(6) as made:
        oid = made.object_on(0, copies=6)
        primary = made.sheep[0]
        content = bytearray(random_bytes(1, PART))
        await primary.objects.create(oid, 0, bytes(content))
        dice = random.Random(3)
        writes = [(dice.randrange(PART - 3000), dice.randbytes(dice.choice((1, 100, 512, 3000)))) for _ in range(100)]
        for offset, data in writes:
            content[offset : offset + len(data)] = data
        counted = {}
        count_requests(primary, counted)

        results = await all_of(lambda number, done: primary.gateway.submit_write(oid, *writes[number], done), 100)

        assert set(results.values()) == {0}
        assert counted.get(Op.WRITE_PEER, 0) + counted.get(STRIP_WRITE, 0) <= 2 * 5
        for plane in made.sheep:
            assert bytes(await plane.objects.read(oid, 0, PART)) == content
        made.sheep[holders(made, oid)[1]].store.remove(ShardKey(oid, 1))  # parity is right as well
        assert bytes(await primary.objects.read(oid, 0, PART)) == content


async def test_rounds_end_when_the_object_is_gone():
    """Writes of an object that was removed before them fail, all of them, and a later object is written again."""
    async with striped_world(6) as made:
        oid = made.object_on(0, copies=6)
        primary = made.sheep[0]
        await primary.objects.create(oid, 0, bytes(4096))
        await primary.objects.remove(oid)
        results = await all_of(lambda number, done: primary.gateway.submit_write(oid, number, b"x", done), 10)
        assert set(results.values()) == {Result.NO_OBJ}

        await primary.objects.create(oid, 0, bytes(4096))
        await primary.objects.write(oid, 5, b"y")
        assert bytes(await primary.objects.read(oid, 0, 10)) == b"\0\0\0\0\0y\0\0\0\0"


async def test_write_larger_than_a_round(monkeypatch):
    """A write that is too much for one round is made in several, odd begin and end included."""
    monkeypatch.setattr(striped, "ROUND_BYTES_MAX", 4096)
    async with striped_world(6) as made:
        oid = made.object_on(0, copies=6)
        content = bytearray(random_bytes(1, PART))
        await made.sheep[0].objects.create(oid, 0, bytes(content))
        data = random_bytes(2, 20_000)
        await made.sheep[1].objects.write(oid, 777, data)
        content[777:20_777] = data

        assert bytes(await made.sheep[2].objects.read(oid, 0, PART)) == content


async def test_round_that_dies_half_way():
    """A round of several writes is taken back, or stays, as one change."""
    async with striped_world(7) as made:
        oid = made.object_on(0, copies=6)
        order = holders(made, oid)
        primary = made.sheep[order[0]]
        before = bytearray(random_bytes(5, PART))
        await primary.objects.create(oid, 0, bytes(before))
        lose_changes(primary, [made.sheep[order[index]].node.id for index in (2, 4, 5)], opcode=STRIP_WRITE)
        after = bytearray(before)
        acknowledged = []
        for number in range(8):
            at, data = 300 + number * 5000, random_bytes(number, 700)
            after[at : at + 700] = data
            primary.gateway.submit_write(oid, at, data, lambda result, *_: acknowledged.append(result))
        old = made.content(order[1], oid, 1)[2000:]
        with anyio.fail_after(10):
            while made.content(order[1], oid, 1)[2000:] == old:
                await anyio.sleep(0.005)
        assert acknowledged == [0], "the first write is a round of its own, the others are one that does not end"
        await made.change(*(number for number in range(7) if number != order[0]))

        contents = {await readable(made.sheep[n], oid, 0, PART) for n in made.members}
        assert contents in ({bytes(before[:300] + after[300:1000] + before[1000:])}, {bytes(after)})


async def test_reads_touch_what_they_need():
    """A read inside one strip asks its holder alone, for these bytes alone; a read of a stripe asks the data strips."""
    async with striped_world(6) as made:
        oid = made.object_on(0, copies=6)
        content = random_bytes(4, PART)
        await made.sheep[0].objects.create(oid, 0, content)
        counted = {}
        count_requests(made.sheep[0], counted)

        def reads():
            """Recovery of the first epoch may ask for other things beside."""
            return [entry for entry in counted.pop("of") if entry[0] == Op.READ_PEER]

        assert bytes(await made.sheep[0].objects.read(oid, 512 + 256 + 10, 100)) == content[778:878]
        assert reads() == [(Op.READ_PEER, 2, 100)]
        assert bytes(await made.sheep[0].objects.read(oid, 1024, 512)) == content[1024:1536]
        assert reads() == [(Op.READ_PEER, index, 128) for index in (1, 2, 3)]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x01",
        b"\x00\x00",
        b"\x01\x00" + bytes(11),
        b"\x01\x00" + (5).to_bytes(8, "little") + (4).to_bytes(4, "little") + b"abc",
        b"\x01\x00" + (5).to_bytes(8, "little") + (2).to_bytes(4, "little") + b"abc",
        b"\xff\xff" + bytes(12 * 0xFFFF),
    ],
)
def test_hostile_pieces(body):
    """A body that is no list of pieces is refused, not guessed at."""
    assert striped.unpack_pieces(body) is None
    good = striped.pack_pieces([(5, b"abc"), (100, b"d")])
    assert [(offset, bytes(data)) for offset, data in striped.unpack_pieces(good)] == [(5, b"abc"), (100, b"d")]


# ---- many strips: what real processes would take too long for


@pytest.mark.parametrize("policy", [0x87, 0x8F, 0x43], ids=["16:7", "16:15", "8:3"])
async def test_wide(policy):
    """EC-1, EC-2: wide codes, one node for each strip and one more. P holders die one by one; all stays readable."""
    data, parity = (policy >> 4) * 2, policy & 15
    nodes = data + parity + 1
    async with striped_world(nodes, policy) as made:
        oid = made.object_on(0, copies=data + parity)
        content = bytearray(random_bytes(1, PART))
        await made.sheep[0].objects.create(oid, 0, bytes(content))
        order = holders(made, oid, data + parity)
        assert [made.has(number, oid, index) for index, number in enumerate(order)] == [True] * (data + parity)

        def change(seed):
            patch = random_bytes(seed, 700)
            at = seed * 1000
            content[at : at + 700] = patch
            return at, patch

        await made.sheep[1].objects.write(oid, *change(1))
        for step, index in enumerate((1, data - 1, data, data + parity - 1)[:parity]):
            made.sheep[order[index]].store.remove(ShardKey(oid, index))
            assert bytes(await made.sheep[order[0]].objects.read(oid, 0, PART)) == content
            await made.sheep[order[2]].objects.write(oid, *change(2 + step))
            assert bytes(await made.sheep[order[3]].objects.read(oid, 0, PART)) == content
        for victim in (order[1], order[5]):
            await made.change(*(number for number in made.members if number != victim))
            await made.recovered(60)
            assert await readable(made.sheep[order[0]], oid, 0, PART) == content


async def test_losing_and_returning():
    """EC-2, EC-3, EC-5: 8:4 on 14 nodes. Nodes die with recovery between, return, and their old strips do not win."""
    async with striped_world(14, 0x44) as made:
        contents = {}
        for index in range(6):
            oid = data_oid(VID, index)
            contents[oid] = bytearray(random_bytes(index, PART))
            await made.sheep[index].objects.create(oid, 0, bytes(contents[oid]))
        everybody = list(made.members)

        async def change_and_check(seed):
            for number, (oid, content) in enumerate(contents.items()):
                patch = random_bytes(seed * 10 + number, 900)
                at = (seed * 1000 + number * 137) % (PART - 900)
                await made.sheep[made.members[number]].objects.write(oid, at, patch)
                content[at : at + 900] = patch
            for oid, content in contents.items():
                for number in made.members[:3]:
                    assert await readable(made.sheep[number], oid, 0, PART) == content

        for seed, gone in enumerate((13, 3)):
            await made.change(*(number for number in made.members if number != gone))
            await made.recovered(30)
            await change_and_check(seed)
        await made.change(*everybody)
        await change_and_check(7)
        await made.recovered(30)
        # Those that were away have strips of the present again: with four others gone they are needed.
        for number, victim in enumerate((0, 1, 2, 5)):
            await made.change(*(member for member in made.members if member != victim))
            await change_and_check(10 + number)
