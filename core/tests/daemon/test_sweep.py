"""What deleted volumes left behind goes, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import anyio
import pytest

from sheepdog.daemon import sweep
from sheepdog.errors import StoreFull
from sheepdog.model.clusterinfo import ClusterFlag
from sheepdog.model.ids import data_oid, inode_oid, ledger_oid, vmstate_oid
from sheepdog.model.inode import MAP_OFFSET, InodeHeader
from sheepdog.model.vdi_state import VdiState
from sheepdog.wire.opcodes import Op
from sheepdog.wire.results import Result

from .recovery_world import world

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]

GONE, CHILD, OTHER = 0xA00, 0xB00, 0xC00


@pytest.fixture
def anyio_backend():
    """As for recovery."""
    return "asyncio"


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Nobody waits for further deletions."""
    monkeypatch.setattr(sweep, "DELAY_S", 0.05)


def know(w, vid, *, parent=0):
    """All sheep were there when the volume was made."""
    for plane in w.sheep:
        plane.state.vdis.make(vid)
        plane.state.vdis.put(
            VdiState(
                vid=vid, copies=3, block_size_shift=22, parent_vid=parent
            )
        )  # fmt: skip


async def make(w, vid, entries=(), *, parent=0):
    """A volume with these map entries: index -> owner. The objects that are its own exist."""
    know(w, vid, parent=parent)
    header = InodeHeader(name=b"disk", vdi_size=64 << 22, nr_copies=3, block_size_shift=22, vdi_id=vid)
    await w.sheep[0].objects.create(inode_oid(vid), 0, header.pack())
    for index, owner in dict(entries).items():
        if owner == vid:
            await w.sheep[0].objects.create(data_oid(vid, index), 0, b"x" * 512)
        await w.sheep[0].objects.write(inode_oid(vid), MAP_OFFSET + 4 * index, owner.to_bytes(4, "little"))


async def delete(w, vid, *, wiped=True):
    """The volume is deleted, while nobody releases what its map named."""
    if wiped:
        for plane in w.sheep:
            w_header = replace(InodeHeader(vdi_id=vid, nr_copies=3, block_size_shift=22), name=b"").pack()
            plane.store.remove(key := sweep.ShardKey(inode_oid(vid)))
            plane.store.create(key, w_header, offset_bytes=0, size_bytes=1 << 20, sparse=True, durable=False)
    for plane in w.sheep:
        plane.state.vdis.mark_deleted(vid)


async def swept(w):
    """Every sheep has looked once, and found this many objects."""
    return sum([await plane.recovery.sweeper.sweep() for plane in w.sheep])


async def gone(w, oid):
    with anyio.fail_after(10):
        while w.holders(oid):
            await anyio.sleep(0.01)


async def gathered(w):
    await w.change(*range(len(w.sheep)))
    await w.recovered()
    with anyio.fail_after(5):
        while any(not plane.recovery.whole() for plane in w.sheep):
            await anyio.sleep(0.01)


async def test_deletion_that_a_full_disk_interrupted(make_store):
    """A holder has no space for the map write that releases an object. The next attempt finds the map cleared already;
    with the deletion of the volume the object goes all the same."""
    async with world(3, make_store, copies=3) as w:
        await gathered(w)
        await make(w, GONE, {1: GONE})
        oid = data_oid(GONE, 1)
        primary = next(plane for plane in w.sheep if plane.placer.placement(inode_oid(GONE)).here)
        full = next(plane for plane in w.sheep if plane is not primary)
        serve = full.dispatcher._handlers[Op.WRITE_PEER]

        def no_space(connection, request):
            full.dispatcher._handlers[Op.WRITE_PEER] = serve
            connection.reply(request, Result.NO_SPACE)

        full.dispatcher._handlers[Op.WRITE_PEER] = no_space
        with pytest.raises(StoreFull):
            await primary.objects.write(inode_oid(GONE), MAP_OFFSET + 4, bytes(4))
        await primary.objects.write(inode_oid(GONE), MAP_OFFSET + 4, bytes(4))
        assert len(w.holders(oid)) == 3

        await delete(w, GONE)
        for plane in w.sheep:
            plane.recovery.volume_deleted()

        await gone(w, oid)


async def test_end_of_recovery(make_store):
    """What could not be removed during recovery goes when everybody has recovered."""
    async with world(3, make_store, copies=3) as w:
        await make(w, GONE, {1: GONE})
        others = (ledger_oid(data_oid(GONE, 2)), vmstate_oid(GONE, 0))
        for oid in others:
            await w.sheep[0].objects.create(oid, 0, b"x" * 512)
        await delete(w, GONE)

        await gathered(w)

        for oid in (data_oid(GONE, 1), *others):
            await gone(w, oid)


async def test_creation_that_the_primary_refused(make_store):
    """Objects that their primary does not have go, too."""
    async with world(3, make_store, copies=3) as w:
        await gathered(w)
        await make(w, GONE, {1: GONE})
        oid = data_oid(GONE, 1)
        primary = next(plane for plane in w.sheep if plane.placer.placement(oid).here)
        primary.store.remove(sweep.ShardKey(oid))
        await delete(w, GONE)

        assert await swept(w) == 1
        assert not w.holders(oid)


async def test_what_a_living_volume_names_stays(make_store):
    """Objects of a deleted snapshot stay as long as a descendant names them, and its ledger does."""
    async with world(3, make_store, copies=3) as w:
        await gathered(w)
        await make(w, GONE, {1: GONE, 2: GONE, 3: GONE})
        await make(w, CHILD, {1: GONE, 3: CHILD}, parent=GONE)
        await make(w, OTHER, {2: GONE})  # no descendant: nothing can be known by that name
        await w.sheep[0].objects.create(ledger_oid(data_oid(GONE, 1)), 0, b"x" * 512)
        await delete(w, GONE)

        assert await swept(w) == 2
        assert [len(w.holders(data_oid(GONE, index))) for index in (1, 2, 3)] == [3, 0, 0]
        assert len(w.holders(ledger_oid(data_oid(GONE, 1)))) == len(w.holders(data_oid(CHILD, 3))) == 3

        await delete(w, CHILD)
        assert await swept(w) == 3


async def test_every_copy_of_a_map_counts(make_store):
    """A change of the descendant's map that has reached some holders only may be undone: the object stays."""
    async with world(3, make_store, copies=3) as w:
        await gathered(w)
        await make(w, GONE, {1: GONE})
        await make(w, CHILD, {1: GONE}, parent=GONE)
        await delete(w, GONE)
        for plane in w.sheep[:2]:
            plane.store.write(
                sweep.ShardKey(inode_oid(CHILD)), bytes(4), offset_bytes=MAP_OFFSET + 4, durable=False
            )  # fmt: skip

        assert await swept(w) == 0

        w.sheep[2].store.write(sweep.ShardKey(inode_oid(CHILD)), bytes(4), offset_bytes=MAP_OFFSET + 4, durable=False)
        assert await swept(w) == 1


async def test_copy_of_a_map_that_is_not_given(make_store):
    """While a holder does not say what its copy of the descendant's map names, everything stays."""
    async with world(3, make_store, copies=3) as w:
        await gathered(w)
        await make(w, GONE, {1: GONE})
        await make(w, CHILD, {}, parent=GONE)
        await delete(w, GONE)
        for plane in w.sheep:
            serve = plane.dispatcher._handlers[Op.READ_PEER]

            def refuse(connection, request, serve=serve):
                if request.oid == inode_oid(CHILD):
                    connection.reply(request, Result.EIO)
                else:
                    serve(connection, request)

            plane.dispatcher._handlers[Op.READ_PEER] = refuse

        assert await swept(w) == 0


async def test_child_that_is_made_meanwhile(make_store):
    """A descendant of which this sheep hears while it reads maps may have copied the name: the object stays."""
    async with world(3, make_store, copies=3) as w:
        await gathered(w)
        await make(w, GONE, {1: GONE})
        await make(w, CHILD, {2: CHILD}, parent=GONE)
        await delete(w, GONE)
        primary = next(plane for plane in w.sheep if plane.placer.placement(data_oid(GONE, 1)).here)
        maps = primary.recovery.sweeper._maps

        async def slowly(*arguments):
            know(w, OTHER, parent=CHILD)
            return await maps(*arguments)

        primary.recovery.sweeper._maps = slowly

        assert await primary.recovery.sweeper.sweep() == 0


async def test_volume_that_is_older_than_we_are(make_store):
    """Who was no member when the volume was made does not know all that may descend from it: its objects stay."""
    async with world(3, make_store) as w:
        await make(w, GONE, {3: GONE})
        for plane in w.sheep:
            plane.state.vdis.born.clear()
        await gathered(w)
        await delete(w, GONE)

        assert not await swept(w)
        assert len(w.holders(data_oid(GONE, 3))) == 3


async def test_inode_that_is_not_wiped(make_store):
    """A volume that counts as deleted, though a copy of its inode has a name: nothing of it is touched."""
    async with world(3, make_store, copies=3) as w:
        await gathered(w)
        await make(w, GONE, {1: GONE})
        await delete(w, GONE, wiped=False)

        assert await swept(w) == 0


async def test_numbers_that_are_given_out_again(make_store):
    """With recycling, the object may be one of a new volume of that number."""
    async with world(3, make_store, copies=3) as w:
        await gathered(w)
        await make(w, GONE, {1: GONE})
        await delete(w, GONE)
        for plane in w.sheep:
            plane.state.flags |= ClusterFlag.RECYCLE_VID

        assert await swept(w) == 0
