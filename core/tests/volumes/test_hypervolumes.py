"""Volumes whose map is a B-tree."""

from __future__ import annotations

import random
from array import array

import pytest

from sheepdog.contracts.services import completed
from sheepdog.errors import ProtocolError, StoreError
from sheepdog.model.btree import LEAF_ENTRIES_MAX
from sheepdog.model.ids import btree_oid, data_oid, inode_oid
from sheepdog.model.inode import MAP_OFFSET
from sheepdog.wire.results import Result

pytestmark = pytest.mark.anyio

KiB = 1024
OBJECT = 64 * KiB
SIZE = 1 << 40


@pytest.fixture
def anyio_backend():
    return "asyncio"


def read(volume, offset, length):
    return completed(lambda done: volume.read(offset, length, done))


def write(volume, offset, data):
    return completed(lambda done: volume.write(offset, data, done))


def root_of(cluster, vid, length):
    return bytes(cluster.objects[inode_oid(vid)][MAP_OFFSET : MAP_OFFSET + length])


async def test_first_object_gives_the_recorded_bytes(make_cluster):
    """After object 2 is written the root is the one that the data model shows (section 5)."""
    cluster, volumes = make_cluster(shift=16)
    vid = cluster.create_vdi("disk", SIZE, store_policy=1)
    volume = await volumes.open("disk")

    await write(volume, 2 * OBJECT, b"x")

    assert root_of(cluster, vid, 16) == bytes.fromhex("74620100 01000000 02000000") + vid.to_bytes(4, "little")


@pytest.mark.parametrize("seed", range(4))
async def test_random_objects_survive_a_reopen(make_cluster, seed):
    """Objects anywhere in a huge volume are found again through the stored tree; freed ones are holes and gone."""
    cluster, volumes = make_cluster(seed, shift=16)
    vid = cluster.create_vdi("disk", SIZE, store_policy=1)
    volume = await volumes.open("disk")
    rng = random.Random(seed)
    model = {}

    for _ in range(60):
        index = rng.randrange(SIZE // OBJECT) if rng.random() < 0.6 or not model else rng.choice(list(model))
        if rng.random() < 0.2:
            await completed(lambda done, i=index: volume.discard(i * OBJECT, OBJECT, done))
            model[index] = bytes(5)
            assert data_oid(vid, index) not in cluster.objects
        else:
            model[index] = rng.randbytes(5)
            await write(volume, index * OBJECT, model[index])

    await volume.aclose()
    volume = await volumes.open("disk")
    for index, data in model.items():
        assert await read(volume, index * OBJECT, 5) == data
        assert volume.extents(index * OBJECT, 10) == [(10, data != bytes(5))]


async def test_full_root_splits_into_leaves(make_cluster):
    """A write into a full root makes two leaves; the counter, the leaves and the inode agree after a reopen."""
    cluster, volumes = make_cluster(shift=16)
    vid = cluster.create_vdi("disk", SIZE, store_policy=1)
    entries = array("I")
    for index in range(LEAF_ENTRIES_MAX):
        entries.extend((2 * index, vid))
    root = bytes.fromhex("74620100") + LEAF_ENTRIES_MAX.to_bytes(4, "little") + entries.tobytes()
    cluster.objects[inode_oid(vid)][MAP_OFFSET : MAP_OFFSET + len(root)] = root
    volume = await volumes.open("disk")

    await write(volume, 1001 * OBJECT, b"odd")

    assert root_of(cluster, vid, 8) == bytes.fromhex("7462020002000000")
    assert btree_oid(vid, 0) in cluster.objects and btree_oid(vid, 1) in cluster.objects
    assert cluster.header(vid).btree_counter == 2
    await volume.aclose()
    volume = await volumes.open("disk")
    assert await read(volume, 1001 * OBJECT, 3) == b"odd"
    assert volume.extents(1000 * OBJECT, 4 * OBJECT) == [(3 * OBJECT, True), (OBJECT, False)]
    last = 2 * (LEAF_ENTRIES_MAX - 1)
    await write(volume, (last + 1) * OBJECT, b"beyond")
    assert await read(volume, (last + 1) * OBJECT, 6) == b"beyond"


async def test_failed_tree_write_does_not_count(make_cluster):
    """When the tree cannot be stored the write fails; a later one stores the whole node again."""
    cluster, volumes = make_cluster(shift=16)
    vid = cluster.create_vdi("disk", SIZE, store_policy=1)
    volume = await volumes.open("disk")
    await write(volume, 5 * OBJECT, b"x")
    cluster.faults.append(("map", Result.EIO))

    with pytest.raises(StoreError):
        await write(volume, 9 * OBJECT, b"y")
    assert await read(volume, 9 * OBJECT, 1) == b"\0"
    await write(volume, 7 * OBJECT, b"z")

    expected = b"".join(n.to_bytes(4, "little") for n in (5, vid, 7, vid))
    assert root_of(cluster, vid, 24) == bytes.fromhex("7462010002000000") + expected


async def test_damaged_tree_cannot_be_opened(make_cluster):
    """A map area that is no B-tree is an error at open."""
    cluster, volumes = make_cluster(shift=16)
    vid = cluster.create_vdi("disk", SIZE, store_policy=1)
    cluster.objects[inode_oid(vid)][MAP_OFFSET : MAP_OFFSET + 8] = b"garbage!"

    with pytest.raises(ProtocolError):
        await volumes.open("disk")
