"""Reads and writes through several sheep's data paths, over real connections and real files."""

from __future__ import annotations

import anyio
import pytest

from sheepdog.builtin.tcp import sheepdog_transport
from sheepdog.contracts.store import ShardKey
from sheepdog.errors import ObjectNotFound, ReadOnlyObject
from sheepdog.model.ids import data_oid, inode_oid, ledger_oid
from sheepdog.model.inode import MAP_OFFSET, REFS_OFFSET
from sheepdog.model.vdi_state import VdiState

from .data_plane import planes, random_bytes

pytestmark = pytest.mark.anyio
OBJECT = 4 << 20


async def wait_for(condition):
    with anyio.fail_after(10):
        while not condition():
            await anyio.sleep(0.005)


def whole(plane, oid, length=OBJECT):
    buffer = bytearray(length)
    plane.store.read_into(ShardKey(oid), memoryview(buffer), offset_bytes=0)
    return bytes(buffer)


async def test_write_reaches_every_copy(make_store):
    """What is acknowledged is on every holder, whichever gateway took it, and every gateway reads it."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        for index, gateway in enumerate(sheep):
            oid = data_oid(0x123456, index)
            await gateway.objects.create(oid, 0, random_bytes(1, 4096))
            await gateway.objects.write(oid, 8192, random_bytes(2, 100_000))

            for other in sheep:
                assert bytes(await other.objects.read(oid, 8192, 100_000)) == random_bytes(2, 100_000)
            assert len({whole(plane, oid) for plane in sheep}) == 1


async def test_concurrent_writers_leave_equal_copies(make_store):
    """Overlapping writes through three gateways end in the same order on every holder."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        oid = data_oid(0x111111, 7)
        await sheep[0].objects.create(oid, 0, b"")
        async with anyio.create_task_group() as tasks:
            for number in range(120):
                size = 150_000 if number % 10 == 0 else 6_000
                tasks.start_soon(sheep[number % 3].objects.write, oid, (number % 7) * 1000, random_bytes(number, size))

        assert len({whole(plane, oid) for plane in sheep}) == 1


async def test_durable_writes_share_flushes(make_store):
    """Durable writes that arrive together are flushed together, and every one is answered."""
    async with planes(3, make_store, sheepdog_transport, durable=True) as sheep:
        oid = data_oid(0x111111, 9)
        await sheep[0].objects.create(oid, 0, b"")
        async with anyio.create_task_group() as tasks:
            for number in range(64):
                tasks.start_soon(sheep[1].objects.write, oid, number * 4096, random_bytes(number, 4096))

        assert all(
            whole(plane, oid)[: 64 * 4096] == b"".join(random_bytes(n, 4096) for n in range(64)) for plane in sheep
        )


async def test_copy_on_write(make_store):
    """A create with a source object holds the source's bytes around the new ones."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        source, target = data_oid(0x10, 0), data_oid(0x11, 0)
        old = random_bytes(5, OBJECT)
        await sheep[0].objects.create(source, 0, old)
        await sheep[1].objects.create(target, 4096, b"new!" * 1024, cow_oid=source)

        assert bytes(await sheep[2].objects.read(target, 0, OBJECT)) == old[:4096] + b"new!" * 1024 + old[8192:]


async def test_missing_object(make_store):
    """Reading, writing and copying what does not exist says so."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        with pytest.raises(ObjectNotFound):
            await sheep[0].objects.read(data_oid(1, 1), 0, 512)
        with pytest.raises(ObjectNotFound):
            await sheep[0].objects.write(data_oid(1, 1), 0, b"x" * 512)
        with pytest.raises(ObjectNotFound):
            await sheep[0].objects.create(data_oid(1, 2), 0, b"x", cow_oid=data_oid(1, 1))
        with pytest.raises(ObjectNotFound):
            await sheep[0].objects.remove(data_oid(1, 1))


async def test_lost_copy_is_replaced_by_a_write(make_store):
    """A holder that lost its copy gets the whole object back before the next write is acknowledged."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        oid = data_oid(0x123456, 1)
        await sheep[0].objects.create(oid, 0, random_bytes(1, OBJECT))
        victim = next(plane for plane in sheep if plane.placer.placement(oid).primary != plane.node.id)
        victim.store.remove(ShardKey(oid))
        await sheep[0].objects.write(oid, 0, b"z" * 4096)

        assert len({whole(plane, oid) for plane in sheep}) == 1


async def test_lost_primary_copy_is_fetched_by_a_write(make_store):
    """A primary without its copy takes one from another holder, so the write does not fail."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        oid = data_oid(0x123456, 1)
        await sheep[0].objects.create(oid, 0, random_bytes(1, OBJECT))
        victim = next(plane for plane in sheep if plane.placer.placement(oid).primary == plane.node.id)
        victim.store.remove(ShardKey(oid))
        await sheep[0].objects.write(oid, 0, b"z" * 4096)

        assert whole(victim, oid) == b"z" * 4096 + random_bytes(1, OBJECT)[4096:]
        assert len({whole(plane, oid) for plane in sheep}) == 1


async def test_holder_gone(make_store):
    """With a holder dead, a write ends once the next epoch leaves it out."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        oid = data_oid(0x123456, 1)
        await sheep[0].objects.create(oid, 0, b"a" * 4096)
        victim = next(plane for plane in sheep if plane.placer.placement(oid).index == 2)
        alive = [plane for plane in sheep if plane is not victim]
        await victim.listener.aclose()
        victim.server.close()
        victim.peers.close()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(alive[0].objects.write, oid, 0, b"b" * 4096)
            await wait_for(lambda: alive[0].gateway._parked or alive[1].gateway._parked)
            for plane in alive:
                plane.join([plane.node for plane in alive], 2, 3)

        assert [whole(plane, oid)[:4096] for plane in alive] == [b"b" * 4096] * 2


async def test_old_epoch_waits_for_the_newer(make_store):
    """A request under a newer epoch waits until this sheep gets there."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        oid = data_oid(0x123456, 1)
        await sheep[0].objects.create(oid, 0, b"a" * 4096)
        nodes = [plane.node for plane in sheep]
        sheep[0].join(nodes, 2, 3)
        done = []

        async def write():
            await sheep[0].objects.write(oid, 0, b"b" * 4096)
            done.append(True)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            await anyio.sleep(0.05)
            assert not done
            for plane in sheep[1:]:
                plane.join(nodes, 2, 3)

        assert len({whole(plane, oid) for plane in sheep}) == 1


async def test_snapshot_data_is_read_only(make_store):
    """Data objects of a snapshot refuse changes; its inode does not."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        oid = data_oid(0x10, 0)
        await sheep[0].objects.create(oid, 0, b"a" * 512)
        for plane in sheep:
            plane.state.vdis.put(VdiState(vid=0x10, copies=3, block_size_shift=22, snapshot=True))
        outcome = []
        sheep[0].gateway.submit_write(oid, 0, b"b", lambda result, _: outcome.append(result))

        assert outcome == [ReadOnlyObject().result]


def refs_of(plane, vid, index):
    buffer = bytearray(8)
    plane.store.read_into(ShardKey(inode_oid(vid)), memoryview(buffer), offset_bytes=REFS_OFFSET + 8 * index)
    return tuple(memoryview(buffer).cast("i"))


async def make_inode(plane, vid, entries, pairs):
    await plane.objects.create(inode_oid(vid), 0, b"name")
    for index, entry in entries.items():
        await plane.objects.write(inode_oid(vid), MAP_OFFSET + 4 * index, entry.to_bytes(4, "little"))
    for index, (generation, count) in pairs.items():
        pair = generation.to_bytes(4, "little", signed=True) + count.to_bytes(4, "little", signed=True)
        await plane.objects.write(inode_oid(vid), REFS_OFFSET + 8 * index, pair)


async def test_clearing_the_map_removes_private_objects(make_store):
    """An entry that was never shared takes its object with it."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        oid = data_oid(0xA, 3)
        await make_inode(sheep[0], 0xA, {3: 0xA}, {})
        await sheep[0].objects.create(oid, 0, b"data")
        await sheep[1].objects.write(inode_oid(0xA), MAP_OFFSET + 12, bytes(4))

        await wait_for(lambda: not any(plane.store.exists(ShardKey(oid)) for plane in sheep))


async def test_worked_example_of_reference_counting(make_store):
    """Snapshot, clone and three drops in the order of the data model's table: the object goes with the last one."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        oid = data_oid(0xA, 0)
        ledger = ledger_oid(oid)
        await make_inode(sheep[0], 0xA, {0: 0xA}, {0: (0, 2)})
        await make_inode(sheep[0], 0xB, {0: 0xA}, {0: (1, 1)})
        await make_inode(sheep[0], 0xC, {0: 0xA}, {0: (2, 0)})
        await make_inode(sheep[0], 0xD, {0: 0xA}, {0: (1, 0)})
        await sheep[0].objects.create(oid, 0, b"shared")

        async def clear(vid):
            await sheep[vid % 3].objects.write(inode_oid(vid), MAP_OFFSET, bytes(4))
            await wait_for(lambda: all(plane.references.idle for plane in sheep))
            assert refs_of(sheep[0], vid, 0) == (0, 0)
            if not sheep[0].store.exists(ShardKey(ledger)):
                return ()
            return tuple(memoryview(whole(sheep[0], ledger)[:16]).cast("i"))

        assert await clear(0xC) == (1, 0, -1, 0)
        assert await clear(0xB) == (1, -1, 0, 0)
        assert await clear(0xD) == (1, -2, 0, 0)
        assert sheep[0].store.exists(ShardKey(oid))
        assert await clear(0xA) == ()
        assert not any(plane.store.exists(ShardKey(key)) for plane in sheep for key in (oid, ledger))


async def test_unchanged_entries_keep_their_references(make_store):
    """Writing back a range of the map in which one entry changes leaves the pairs of the others alone."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        await make_inode(sheep[0], 0xB, {0: 0xA, 1: 0xA}, {0: (1, 0), 1: (1, 0)})
        await sheep[0].objects.create(data_oid(0xA, 0), 0, b"0")
        await sheep[0].objects.create(data_oid(0xA, 1), 0, b"1")
        await sheep[0].objects.write(
            inode_oid(0xB), MAP_OFFSET, (0xB).to_bytes(4, "little") + (0xA).to_bytes(4, "little")
        )

        assert [refs_of(plane, 0xB, 0) for plane in sheep] == [(0, 0)] * 3
        assert [refs_of(plane, 0xB, 1) for plane in sheep] == [(1, 0)] * 3
