"""What an open volume asks of the gateway, and how it copes with what happens meanwhile."""

from __future__ import annotations

import random

import anyio
import pytest

from sheepdog.contracts.services import completed
from sheepdog.errors import ObjectNotFound, SheepdogError, StoreError, StoreFull, VdiLocked, VdiNotFound
from sheepdog.model.ids import data_oid, inode_oid
from sheepdog.wire.results import Result

pytestmark = pytest.mark.anyio

MiB = 1024 * 1024
KiB = 1024


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param


def read(volume, offset, length):
    return completed(lambda done: volume.read(offset, length, done))


def write(volume, offset, data):
    return completed(lambda done: volume.write(offset, data, done))


def kinds(cluster):
    return [entry[0] for entry in cluster.log]


async def test_allocated_objects_cost_one_request(make_cluster):
    """Reads and writes of allocated objects are one request each, and holes are read without any."""
    cluster, volumes = make_cluster()
    cluster.create_vdi("disk", 8 * MiB)
    volume = await volumes.open("disk")
    await write(volume, 0, b"x")
    cluster.log.clear()

    await write(volume, 10, b"y" * 4096)
    await read(volume, 8, 100)
    await read(volume, 5 * MiB, 4096)

    assert kinds(cluster) == ["write", "read"]


async def test_first_write_creates_then_stores_the_map(make_cluster):
    """The first write to a hole creates the object, then the inode names it, and only then it is complete."""
    cluster, volumes = make_cluster()
    vid = cluster.create_vdi("disk", 8 * MiB)
    volume = await volumes.open("disk")
    cluster.log.clear()

    await write(volume, 4 * MiB + 5, b"x")

    assert cluster.log == [("create", data_oid(vid, 1)), ("map", inode_oid(vid))]
    assert cluster.stored_map(vid) == {1: vid}


async def test_writes_wait_for_the_create_and_reads_do_not(make_cluster):
    """While an object is created other writes to it wait, reads see the hole, and there is one create."""
    cluster, volumes = make_cluster(3)
    cluster.create_vdi("disk", 4 * MiB)
    volume = await volumes.open("disk")
    seen = []
    volume.write(0, b"a" * 10, lambda error, _: seen.append(error))
    volume.write(10, b"b" * 10, lambda error, _: seen.append(error))
    volume.write(20, b"c" * 10, lambda error, _: seen.append(error))
    volume.read(0, 30, lambda error, data: seen.append(bytes(data)))

    assert seen == [bytes(30)]
    await wait_for(lambda: len(seen) == 4)
    assert kinds(cluster).count("create") == 1
    assert kinds(cluster).count("map") == 1
    assert await read(volume, 0, 31) == b"a" * 10 + b"b" * 10 + b"c" * 10 + b"\0"


async def test_neighbouring_map_entries_share_a_write(make_cluster):
    """Entries of neighbouring objects created together are stored by one write; a gap makes two."""
    cluster, volumes = make_cluster(5)
    cluster.create_vdi("disk", 64 * MiB)
    volume = await volumes.open("disk")

    await completed(lambda done: volume.write_zeroes(4 * MiB, 4 * MiB, False, done))
    cluster.log.clear()
    await write(volume, 0, b"x" * 16 * MiB)  # index 1 is there already

    assert kinds(cluster).count("create") == 3
    assert kinds(cluster).count("map") <= 3
    assert cluster.content("disk")[: 16 * MiB] == b"x" * 16 * MiB


async def test_copy_on_write_names_its_source(make_cluster):
    """A write to an inherited object creates our own from it; one that covers the object needs no source."""
    cluster, volumes = make_cluster()
    old = cluster.create_vdi("disk", 8 * MiB)
    volume = await volumes.open("disk")
    await write(volume, 0, b"o" * 8 * MiB)
    new = await cluster.snapshot_vdi("disk", "s")
    sources = []
    submit_create = cluster.submit_create

    def spy(*args, cow_oid=0, **options):
        sources.append(cow_oid)
        submit_create(*args, cow_oid=cow_oid, **options)

    cluster.submit_create = spy
    await write(volume, 1, b"n")
    await write(volume, 4 * MiB, b"n" * 4 * MiB)

    assert sources == [data_oid(old, 0), 0]
    assert await read(volume, 0, 3) == b"ono"
    assert cluster.stored_map(new) == {0: new, 1: new}
    assert cluster.stored_map(old) == {0: old, 1: old}


@pytest.mark.parametrize("seed", range(12))
async def test_snapshots_under_load_lose_nothing(make_cluster, seed):
    """Whatever was acknowledged is in the volume, however snapshots fall between creates and map writes."""
    cluster, volumes = make_cluster(seed, shift=16)
    cluster.create_vdi("disk", 8 * 64 * KiB)
    volume = await volumes.open("disk")
    rng = random.Random(seed)
    model = bytearray(8 * 64 * KiB)

    async def worker(number):
        own = random.Random(seed * 1000 + number)
        for step in range(12):
            # each worker has a 4 KiB column in every object, so that the outcome does not depend on the order
            offset = own.randrange(8) * 64 * KiB + number * 4096 + own.randrange(2000)
            data = bytes([number * 12 + step + 1]) * own.randrange(1, 2000)
            await write(volume, offset, data)
            model[offset : offset + len(data)] = data
            assert await read(volume, offset, len(data)) == data

    async def snapshots():
        for number in range(4):
            for _ in range(rng.randrange(40)):
                await anyio.lowlevel.checkpoint()
            await cluster.snapshot_vdi("disk", f"s{number}")

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(worker, number)
        group.start_soon(snapshots)

    assert await read(volume, 0, 8 * 64 * KiB) == model
    assert cluster.content("disk") == model
    await volume.refresh()
    assert await read(volume, 0, 8 * 64 * KiB) == model


@pytest.mark.parametrize("seed", range(8))
async def test_random_requests_match_a_model(make_cluster, seed):
    """Any sequence of writes, discards, zeroes, snapshots and refreshes leaves what a plain array would hold."""
    cluster, volumes = make_cluster(seed, shift=16)
    size = 20 * 64 * KiB + 1234
    cluster.create_vdi("disk", size)
    volume = await volumes.open("disk")
    rng = random.Random(seed)
    model = bytearray(size)

    for step in range(60):
        offset = rng.randrange(size)
        length = rng.randrange(1, min(size - offset, 5 * 64 * KiB) + 1)
        action = rng.randrange(10)
        if action < 5:
            data = rng.randbytes(length)
            await write(volume, offset, data)
            model[offset : offset + length] = data
        elif action < 7:
            may_free = rng.random() < 0.5
            await completed(lambda done, o=offset, n=length, f=may_free: volume.write_zeroes(o, n, f, done))
            model[offset : offset + length] = bytes(length)
        elif action < 8:
            await completed(lambda done, o=offset, n=length: volume.discard(o, n, done))
            first = -(-offset // 65536)
            end = offset + length
            last = -(-end // 65536) if end == size else end // 65536
            if last > first:
                stop = min(last * 65536, size)
                model[first * 65536 : stop] = bytes(stop - first * 65536)
        elif action < 9:
            await volume.refresh()
        else:
            await cluster.snapshot_vdi("disk", f"s{step}")
        assert await read(volume, offset, length) == model[offset : offset + length]

    assert await read(volume, 0, size) == model
    assert cluster.content("disk") == model


async def test_failed_create_fails_one_write_only(make_cluster):
    """Out of space is told to the write that met it; the next one creates the object."""
    cluster, volumes = make_cluster()
    vid = cluster.create_vdi("disk", 4 * MiB)
    volume = await volumes.open("disk")
    cluster.faults.append(("create", Result.NO_SPACE))

    with pytest.raises(StoreFull):
        await write(volume, 0, b"x")
    await write(volume, 1, b"y")

    assert await read(volume, 0, 3) == b"\0y\0"
    assert cluster.stored_map(vid) == {0: vid}


async def test_failed_map_write_does_not_count(make_cluster):
    """When the map cannot be stored the write fails and the index stays a hole."""
    cluster, volumes = make_cluster()
    vid = cluster.create_vdi("disk", 4 * MiB)
    volume = await volumes.open("disk")
    cluster.faults.append(("map", Result.EIO))

    with pytest.raises(StoreError):
        await write(volume, 0, b"x")

    assert await read(volume, 0, 1) == b"\0"
    assert list(volume.extents(0, 4 * MiB)) == [(4 * MiB, False)]
    assert cluster.stored_map(vid) == {}
    await write(volume, 0, b"x")
    assert await read(volume, 0, 1) == b"x"


async def test_missing_object_is_an_error_after_one_reload(make_cluster):
    """An object that the map names and nobody has is an error, not zeros, and does not loop."""
    cluster, volumes = make_cluster()
    vid = cluster.create_vdi("disk", 8 * MiB)
    volume = await volumes.open("disk")
    await write(volume, 0, b"x")
    del cluster.objects[data_oid(vid, 0)]
    cluster.log.clear()

    with pytest.raises(ObjectNotFound):
        await read(volume, 0, 1)
    with pytest.raises(ObjectNotFound):
        await write(volume, 0, b"y")

    assert kinds(cluster).count("lookup") == 2


async def test_discard_by_somebody_else_is_noticed(make_cluster):
    """An object that another client freed meanwhile reads as zeros and can be written again."""
    cluster, volumes = make_cluster()
    vid = cluster.create_vdi("disk", 8 * MiB)
    volume = await volumes.open("disk")
    await write(volume, 0, b"x" * 8 * MiB)
    cluster._map_write(inode_oid(vid), 4664, bytes(8))
    cluster.objects[inode_oid(vid)][4664:4672] = bytes(8)

    assert await read(volume, 0, 4) == bytes(4)
    await write(volume, 4 * MiB, b"y")
    assert cluster.stored_map(vid) == {1: vid}
    assert await read(volume, 4 * MiB, 2) == b"y\0"


async def test_deleted_volume_is_an_error(make_cluster):
    """After the volume was deleted and its objects are gone, requests fail; nothing is created under its number."""
    cluster, volumes = make_cluster()
    vid = cluster.create_vdi("disk", 8 * MiB)
    volume = await volumes.open("disk")
    await write(volume, 0, b"x")
    del cluster.objects[data_oid(vid, 0)]
    cluster.put_header(vid, name=b"", vdi_size=0)
    cluster.log.clear()

    with pytest.raises(VdiNotFound):
        await write(volume, 0, b"y")

    assert "create" not in kinds(cluster)


async def test_errors_of_other_kinds_pass_through(make_cluster):
    """What the gateway answers becomes the error of that result code."""
    cluster, volumes = make_cluster()
    cluster.create_vdi("disk", 8 * MiB)
    volume = await volumes.open("disk")
    await write(volume, 0, b"x")
    for kind in ("read", "write", "sync"):
        cluster.faults.append((kind, Result.HALT))

    for start in (
        lambda done: volume.read(0, 1, done),
        lambda done: volume.write(0, b"y", done),
        volume.flush,
    ):
        with pytest.raises(SheepdogError) as caught:
            await completed(start)
        assert caught.value.result == Result.HALT


async def test_lock_is_shared_and_given_back(make_cluster):
    """The first writable open locks, others share it, read-only opens do not lock, the last writable close unlocks."""
    cluster, volumes = make_cluster(locks=True)
    vid = cluster.create_vdi("disk", 8 * MiB)

    reader = await volumes.open("disk", read_only=True)
    assert cluster.locked == set()
    first = await volumes.open("disk")
    second = await volumes.open("disk")
    assert cluster.locked == {vid}
    await first.aclose()
    assert cluster.locked == {vid}
    await second.aclose()
    assert cluster.locked == set()
    await write(await volumes.open("disk"), 0, b"x")
    assert await read(reader, 0, 1) == b"x"


async def test_lock_of_somebody_else_is_respected(make_cluster):
    """A volume that somebody else locked cannot be opened for writing, and nothing is left behind."""
    cluster, volumes = make_cluster(locks=True)
    vid = cluster.create_vdi("disk", 8 * MiB)
    cluster.locked.add(vid)

    with pytest.raises(VdiLocked):
        await volumes.open("disk")
    cluster.locked.clear()
    volume = await volumes.open("disk")
    await volume.aclose()

    assert cluster.locked == set()


async def test_lock_follows_a_snapshot(make_cluster):
    """After a snapshot the volume goes on under the lock of its new number."""
    cluster, volumes = make_cluster(locks=True)
    cluster.create_vdi("disk", 8 * MiB)
    volume = await volumes.open("disk")
    await write(volume, 0, b"x")

    new = await cluster.snapshot_vdi("disk", "s")
    await write(volume, 0, b"y")
    await anyio.wait_all_tasks_blocked()

    assert cluster.locked == {new}
    await volume.aclose()
    assert cluster.locked == set()


async def test_open_volume_follows_a_rollback(make_cluster):
    """After dog's rollback requests go to the volume of that name, with the snapshot's content, under a new lock."""
    cluster, volumes = make_cluster(locks=True)
    cluster.create_vdi("disk", 8 * MiB)
    volume = await volumes.open("disk")
    await write(volume, 0, b"old")
    await cluster.snapshot_vdi("disk", "s")
    await write(volume, 0, b"new")

    new = await cluster.rollback_vdi("disk", "s")
    assert await read(volume, 0, 3) == b"old"
    await write(volume, 3, b"er")
    await anyio.wait_all_tasks_blocked()

    assert cluster.locked == {new}
    assert cluster.content("disk")[:6] == b"older\0"
    await volume.aclose()
    assert cluster.locked == set()


async def test_failed_open_releases_the_lock(make_cluster):
    """A volume whose map cannot be read is not left locked."""
    cluster, volumes = make_cluster(locks=True)
    cluster.create_vdi("disk", 8 * MiB)
    cluster.faults.append(("read", Result.EIO))

    with pytest.raises(StoreError):
        await volumes.open("disk")

    assert cluster.locked == set()


async def test_read_only_open_follows_a_snapshot(make_cluster):
    """A read-only open that refreshes sees what the volume holds under its new number."""
    cluster, volumes = make_cluster()
    cluster.create_vdi("disk", 8 * MiB)
    reader = await volumes.open("disk", read_only=True)
    new = await cluster.snapshot_vdi("disk", "s")
    cluster.put_header(new, vdi_size=12 * MiB)

    await reader.refresh()

    assert (reader.info.vid, reader.info.size_bytes, reader.info.snapshot) == (new, 12 * MiB, False)


async def test_extents_cut_at_the_range(make_cluster):
    """Extents cover exactly the range that was asked for and join what is alike."""
    cluster, volumes = make_cluster()
    cluster.create_vdi("disk", 40 * MiB)
    volume = await volumes.open("disk")
    await write(volume, 4 * MiB, b"x" * 8 * MiB)
    await write(volume, 20 * MiB, b"x")

    assert volume.extents(0, 40 * MiB) == [
        (4 * MiB, False), (8 * MiB, True), (8 * MiB, False), (4 * MiB, True), (16 * MiB, False),
    ]  # fmt: skip
    assert volume.extents(5 * MiB, 10) == [(10, True)]
    assert volume.extents(3 * MiB, 2 * MiB) == [(MiB, False), (MiB, True)]


async def wait_for(condition):
    with anyio.fail_after(10):
        while not condition():
            await anyio.lowlevel.checkpoint()


async def test_abandoned_changes_are_not_made(make_cluster):
    """What waits when the user of an open volume vanishes fails, its map changes too; another open is not concerned."""
    cluster, volumes = make_cluster(3)
    vid = cluster.create_vdi("disk", 16 * MiB)
    gone, stays = await volumes.open("disk"), await volumes.open("disk")
    await write(gone, 0, b"kept")
    failures = []

    async def fails(start):
        with pytest.raises(SheepdogError):
            await completed(start)
        failures.append(start)

    async with anyio.create_task_group() as tasks:
        for start in (
            lambda done: gone.write(0, b"late", done),
            lambda done: gone.write(4 * MiB, b"late", done),
            lambda done: gone.discard(0, 4 * MiB, done),
        ):
            tasks.start_soon(fails, start)
        await anyio.lowlevel.checkpoint()
        gone.abandon()

    assert len(failures) == 3
    assert await read(stays, 0, 4) == b"kept"
    await write(stays, 8 * MiB, b"more")
    assert cluster.stored_map(vid) == {0: vid, 2: vid}
