"""Volumes: numbers, snapshots, clones, deletion, and what a crash leaves."""

import anyio
import pytest

from sheepdog.errors import Halted
from sheepdog.model.clusterinfo import ClusterFlag
from sheepdog.model.ids import btree_oid, data_oid, inode_oid, is_inode, vmstate_oid
from sheepdog.model.inode import MAP_OFFSET, REFS_OFFSET
from sheepdog.testing.vectors import vectors
from sheepdog.wire.opcodes import Op
from sheepdog.wire.payloads import VdiStateRequest
from sheepdog.wire.results import Result

from .world import AUTO, machines

pytestmark = pytest.mark.anyio
RECYCLE = AUTO | ClusterFlag.RECYCLE_VID
TEST = 0x7C2B25


async def one_sheep(world, flags=AUTO):
    (sheep,) = await world.start_all(0)
    await sheep.format(flags=int(flags))
    return sheep


def references(world, vid, count):
    """(generation, count) of the first entries."""
    pairs = memoryview(world.space.peek(inode_oid(vid), REFS_OFFSET, 8 * count)).cast("i").tolist()
    return list(zip(pairs[::2], pairs[1::2], strict=True))


def entries(world, vid, count):
    return memoryview(world.space.peek(inode_oid(vid), MAP_OFFSET, 4 * count)).cast("I").tolist()


async def fill(world, vid, *indexes):
    """As a client writes: the objects, then the map."""
    for index in indexes:
        old = entries(world, vid, index + 1)[index]
        if old != vid:
            await world.space.create(data_oid(vid, index), 0, b"data")
            await world.space.write(inode_oid(vid), MAP_OFFSET + 4 * index, vid.to_bytes(4, "little"))


@pytest.mark.parametrize("number", range(5))
async def test_numbering(number):
    """VDI-13, VDI-15: the numbers that the original gave, in each recorded sequence."""
    sequence = vectors()["vdi_numbering"][number]
    async with machines() as world:
        sheep = await one_sheep(world, RECYCLE if "-R" in sequence["format_options"] else AUTO)
        for step in sequence["ops"]:
            name, tag = step["name"].encode(), step.get("tag", "").encode()
            if step["op"] == "create":
                result, vid = await sheep.new_vdi(name)
                wanted = step["vid"]
            elif step["op"] == "snapshot":
                result, vid = await sheep.snapshot(name, tag)
                wanted = step["new_working_vid"]
            elif step["op"] == "clone":
                _, base = await sheep.find(name, tag)
                result, vid = await sheep.new_vdi(step["new_name"].encode(), base=base)
                wanted = step["vid"]
            elif step["op"] == "rollback":
                _, base = await sheep.find(name, tag)
                await sheep.delete(name)
                result, vid = await sheep.new_vdi(name, base=base)
                wanted = step["vid"]
            else:
                assert step["op"] == "delete", step
                result, vid, wanted = await sheep.delete(name, tag), 0, None
            assert (result != 0) == (step["exit"] != 0), step
            assert vid == int(wanted or "0", 16), step

        headers = dict(await sheep.control.list_vdis())
        listed = [
            (f"{vid:x}", header.name.decode(), header.tag.decode() if header.is_snapshot else "")
            for vid, header in headers.items()
        ]
        assert listed == [(row["vid"], row["name"], row["tag"]) for row in sequence["list_after"]]


async def test_snapshot():
    """The old volume becomes the snapshot, the new one shares its objects, and the pairs on both sides say so."""
    async with machines() as world:
        sheep = await one_sheep(world)
        await sheep.new_vdi(b"test", size=40 << 20)
        await fill(world, TEST, 1, 7)
        assert await sheep.snapshot(b"test", b"one") == (0, TEST + 1)

        base, child = world.space.header(TEST), world.space.header(TEST + 1)
        assert (base.is_snapshot, base.tag, base.snap_id) == (True, b"one", 1)
        assert (child.is_snapshot, child.tag, child.snap_id, child.parent_vdi_id) == (False, b"", 2, TEST)
        assert entries(world, TEST + 1, 10) == entries(world, TEST, 10)
        assert references(world, TEST, 8) == [(0, 0), (0, 1)] + [(0, 0)] * 5 + [(0, 1)]
        assert references(world, TEST + 1, 8) == [(0, 0), (1, 0)] + [(0, 0)] * 5 + [(1, 0)]
        assert world.space.peek(inode_oid(TEST + 1), 572, 4092) == bytes(4092)
        assert sheep.state.vdis.readonly(TEST)
        assert not sheep.state.vdis.readonly(TEST + 1)
        assert TEST in sheep.drained
        assert await sheep.find(b"test", b"one") == (0, TEST)
        assert await sheep.find(b"test", b"", 1) == (0, TEST)
        assert await sheep.find(b"test") == (0, TEST + 1)
        assert (await sheep.find(b"test", b"two"))[0] == Result.NO_TAG


async def test_clone_and_branch():
    """A clone counts on its snapshot; going back while a working volume exists keeps that one as a snapshot."""
    async with machines() as world:
        sheep = await one_sheep(world)
        await sheep.new_vdi(b"test", size=40 << 20)
        await fill(world, TEST, 0)
        await sheep.snapshot(b"test", b"one")
        result, clone = await sheep.new_vdi(b"clone", size=80 << 20, base=TEST)
        assert (result, world.space.header(clone).snap_id, world.space.header(clone).vdi_size) == (0, 1, 80 << 20)
        assert references(world, TEST, 1) == [(0, 2)]
        assert references(world, clone, 1) == [(1, 0)]

        assert await sheep.new_vdi(b"test", base=TEST, snapid=1) == (0, TEST + 2)
        assert world.space.header(TEST + 1).is_snapshot
        assert sheep.state.vdis.readonly(TEST + 1)
        assert (world.space.header(TEST + 2).snap_id, world.space.header(TEST + 2).parent_vdi_id) == (3, TEST)
        assert references(world, TEST, 1) == [(0, 3)]


async def test_objects_are_freed_in_the_end():
    """Whatever the order of deletion, no data object is left when the whole family is gone."""
    async with machines() as world:
        sheep = await one_sheep(world)
        await sheep.new_vdi(b"test", size=40 << 20)
        await fill(world, TEST, 0, 3)
        await sheep.snapshot(b"test", b"one")
        await fill(world, TEST + 1, 3, 4)
        await sheep.snapshot(b"test", b"two")
        await sheep.new_vdi(b"clone", base=TEST + 1)
        assert await sheep.delete(b"test", b"one") == 0
        assert data_oid(TEST, 0) in world.space.data_objects()
        assert await sheep.delete(b"clone") == 0
        assert await sheep.delete(b"test") == 0
        assert await sheep.delete(b"test", b"two") == 0

        assert world.space.data_objects() == []
        assert world.space.ledgers == {}
        assert all(is_inode(oid) for oid in world.space.pages)


async def test_delete_frees_vm_state():
    """VM state goes with its snapshot."""
    async with machines() as world:
        sheep = await one_sheep(world)
        await sheep.new_vdi(b"test", size=40 << 20)
        for number in range(2):
            await world.space.create(vmstate_oid(TEST, number), 0, b"vm")
        await world.space.write(inode_oid(TEST), 544, (5 << 20).to_bytes(8, "little"))
        await sheep.snapshot(b"test", b"one")
        assert await sheep.delete(b"test", b"one") == 0

        assert vmstate_oid(TEST, 0) not in world.space.pages
        assert vmstate_oid(TEST, 1) not in world.space.pages


async def test_refusals():
    """What no volume can be is refused before anything is written."""
    async with machines() as world:
        sheep = await one_sheep(world)
        await sheep.new_vdi(b"test")
        await sheep.new_vdi(b"hyper", size=1 << 50, store_policy=1)
        inodes = set(world.space.pages)
        wrong = Result.INVALID_PARMS
        for name, fields, result in (
            (b"", {}, wrong),
            (b"big", {"size": (4 << 40) + 1}, wrong),
            (b"huge", {"size": (16 << 50) + 1, "store_policy": 1}, wrong),
            (b"hyper2", {"size": 1, "store_policy": 1, "block_size_shift": 24}, wrong),
            (b"shift", {"block_size_shift": 12}, wrong),
            (b"copies", {"copies": 32}, wrong),
            (b"policy", {"copy_policy": 0xFF}, wrong),
            (b"clone", {"base": TEST}, wrong),  # no snapshot
            (b"clone", {"base": 0x123}, Result.BASE_VDI_READ),
            (b"none", {"base": TEST, "snapid": 1}, Result.NO_VDI),
        ):
            assert await sheep.new_vdi(name, **fields) == (result, 0), (name, fields)
        response = await sheep.ask(Op.NEW_VDI, body=b"x" * 255)
        assert response.result == wrong
        assert set(world.space.pages) == inodes


async def test_erasure_coded_volume():
    """The number of copies follows from the policy."""
    async with machines() as world:
        sheep = await one_sheep(world)
        _, vid = await sheep.new_vdi(b"ec", copies=3, copy_policy=0x11)

        assert (world.space.header(vid).nr_copies, world.space.header(vid).copy_policy) == (3, 0x11)
        assert sheep.state.vdis.scheme_of(vid) == (3, 0x11, 22)


async def test_hypervolume():
    """A fresh hypervolume has an empty tree; deleting one removes the objects that its tree names."""
    async with machines() as world:
        sheep = await one_sheep(world)
        _, vid = await sheep.new_vdi(b"hyper", size=1 << 50, store_policy=1)
        assert world.space.peek(inode_oid(vid), MAP_OFFSET, 8) == bytes.fromhex("7462010000000000")
        await world.space.create(data_oid(vid, 2), 0, b"data")
        tree = bytes.fromhex("7462010001000000 02000000") + vid.to_bytes(4, "little")
        world.space.poke(inode_oid(vid), MAP_OFFSET, tree)
        assert await sheep.delete(b"hyper") == 0

        assert world.space.data_objects() == []
        assert world.space.peek(inode_oid(vid), MAP_OFFSET, 16) == bytes(16)


async def test_discard_after_a_snapshot():
    """A client that discards by the number it knew before a snapshot is told so, as one that writes, and the snapshot
    keeps the object; by the new number only the working volume gives it up."""
    async with machines() as world:
        sheep = await one_sheep(world)
        _, vid = await sheep.new_vdi(b"test")
        await fill(world, vid, 0)
        _, working = await sheep.snapshot(b"test", b"tag")

        assert (await sheep.ask(Op.DISCARD_OBJ, oid=data_oid(vid, 0))).result == Result.READONLY
        assert entries(world, vid, 1) == [vid]
        assert (await sheep.ask(Op.DISCARD_OBJ, oid=data_oid(working, 0))).result == 0
        assert (entries(world, vid, 1), entries(world, working, 1)) == ([vid], [0])


async def test_discard_in_a_hypervolume():
    """DISCARD_OBJ of a hypervolume clears the entry in its tree, frees the object if it is its own, and leaves the
    tree whole; what is not allocated is a success."""
    async with machines() as world:
        sheep = await one_sheep(world)
        _, vid = await sheep.new_vdi(b"hyper", size=1 << 50, store_policy=1)
        own, far = data_oid(vid, 2), data_oid(vid, 0x90000000)
        for oid in (own, far):
            await world.space.create(oid, 0, b"data")
        leaf = btree_oid(vid, 0)
        inner = bytes.fromhex("7462020001000000 0000009000000000") + leaf.to_bytes(8, "little")
        entries_of = [(2, vid), (3, 0x123456), (0x90000000, vid)]
        packed = b"".join(index.to_bytes(4, "little") + owner.to_bytes(4, "little") for index, owner in entries_of)
        world.space.poke(inode_oid(vid), MAP_OFFSET, inner)
        await world.space.create(leaf, 0, bytes.fromhex("7462010003000000") + packed)
        await world.space.create(data_oid(0x123456, 3), 0, b"of another")

        for index in (2, 3, 4, 0x90000000, 0x90000001):
            assert (await sheep.ask(Op.DISCARD_OBJ, oid=data_oid(vid, index))).result == 0
        assert world.space.data_objects() == [data_oid(0x123456, 3)]
        assert world.space.peek(inode_oid(vid), MAP_OFFSET, 24) == inner
        cleared = b"".join(index.to_bytes(4, "little") + bytes(4) for index, _ in entries_of)
        assert world.space.peek(leaf, 0, 32) == bytes.fromhex("7462010003000000") + cleared


async def test_halted_create():
    """When the inode cannot be written the answer says so, and the name and number are free."""
    async with machines() as world:
        sheep = await one_sheep(world)

        def fail(operation, oid):
            if operation == "create":
                raise Halted("too few zones")

        world.space.fail = fail
        assert await sheep.new_vdi(b"test") == (Result.VDI_WRITE, 0)
        world.space.fail = None
        assert await sheep.new_vdi(b"test") == (0, TEST)


@pytest.mark.parametrize("everybody", [True, False])
@pytest.mark.parametrize("step", range(6))
async def test_snapshot_survives_a_crash(step, everybody):
    """A sheep (or all of them) dies after any step of a snapshot: no data is lost, the name keeps one working volume,
    and what was begun is completed or taken back by the next operation."""
    async with machines() as world:
        one, two = await world.start_all(0, 1)
        await one.format()
        await one.new_vdi(b"test", size=40 << 20)
        await fill(world, TEST, 0, 3)
        count = 0

        def fail(operation, oid):
            nonlocal count
            if operation != "read":
                count += 1
                if count > step:
                    one.scope.cancel()
                    raise Halted("this sheep is dead")

        world.space.fail = fail
        await one.new_vdi(b"test", base=TEST, snapid=1)
        world.space.fail = None
        await one.ended.wait() if count > step else None
        if everybody:
            await world.kill(*(sheep for sheep in (one, two) if sheep.node.id in world.live))
            one, two = await world.start_all(0, 1)
            await world.agreed(one, two)
        elif count > step:
            await world.until(lambda: not two.control.vdis.half_done, "repair")

        result, working = await two.find(b"test")
        assert result == 0
        assert working in (TEST, TEST + 1)
        assert not two.state.vdis.readonly(working)
        if working == TEST + 1:
            assert world.space.header(TEST).is_snapshot
            assert two.state.vdis.readonly(TEST)
            assert references(world, TEST, 4) == [(0, 1), (0, 0), (0, 0), (0, 1)]
            assert references(world, TEST + 1, 4) == [(1, 0), (0, 0), (0, 0), (1, 0)]
            assert await two.delete(b"test", b"", 1) == 0
        else:
            assert not world.space.header(TEST).is_snapshot
            assert references(world, TEST, 4) == [(0, 0)] * 4
        assert {data_oid(TEST, 0), data_oid(TEST, 3)} <= set(world.space.pages)
        assert await two.delete(b"test") == 0
        assert world.space.data_objects() == []
        assert (await two.new_vdi(b"test"))[0] == 0


async def test_failed_snapshot_is_taken_back():
    """An error before anything refers to the child leaves the base as it was, and writable."""
    async with machines() as world:
        one, two = await world.start_all(0, 1)
        await one.format()
        await one.new_vdi(b"test")

        def fail(operation, oid):
            if operation == "create":
                raise Halted("too few zones")

        world.space.fail = fail
        assert (await one.new_vdi(b"test", base=TEST, snapid=1))[0] == Result.VDI_WRITE
        world.space.fail = None

        for sheep in (one, two):
            await world.until(lambda sheep=sheep: not sheep.control.vdis.half_done, "undo")
            assert not sheep.state.vdis.readonly(TEST)
            assert list(sheep.state.vdis.in_use) == [TEST]


async def test_same_name_at_once():
    """VDI-19: of many creations of one name through several sheep exactly one succeeds."""
    async with machines(seed=5, delay_s_max=0.01) as world:
        sheep = await world.start_all(0, 1, 2)
        await sheep[0].format()
        results = []

        async def create(one):
            results.append(await one.new_vdi(b"test"))

        async with anyio.create_task_group() as tasks:
            for one in sheep * 2:
                tasks.start_soon(create, one)

        assert sorted(results) == [(0, TEST)] + [(Result.VDI_EXIST, 0)] * 5


async def test_acknowledged_change_holds_everywhere():
    """What NEW_VDI and DEL_VDI acknowledged is seen through every other gateway at once."""
    async with machines(seed=5, delay_s_max=0.05) as world:
        one, two = await world.start_all(0, 1)
        await one.format()
        for _ in range(3):
            _, vid = await one.new_vdi(b"test")
            assert await two.find(b"test") == (0, vid)
            assert await one.snapshot(b"test", b"s") == (0, vid + 1)
            assert two.state.vdis.readonly(vid)
            assert await two.find(b"test") == (0, vid + 1)
            assert await two.delete(b"test") == 0
            assert (await one.find(b"test"))[0] == Result.NO_VDI
            assert await one.delete(b"test", b"s") == 0


async def test_joiner_knows_volumes():
    """State transfer: a sheep without disks content knows volumes, snapshots and deletions of the others."""
    async with machines() as world:
        one = await one_sheep(world)
        await one.new_vdi(b"test")
        await one.snapshot(b"test", b"s")
        await one.new_vdi(b"gone")
        await one.delete(b"gone")
        (two,) = await world.start_all(1)

        assert two.state.vdis.states() == one.state.vdis.states()
        assert two.state.vdis.in_use == one.state.vdis.in_use
        assert two.state.vdis.deleted == one.state.vdis.deleted


async def test_recycling():
    """VDI-15: when a whole family is deleted its inodes vanish and its numbers return; a part of it keeps them."""
    async with machines() as world:
        sheep = await one_sheep(world, RECYCLE)
        assert (await sheep.new_vdi(b"test"))[1] == 1
        assert (await sheep.snapshot(b"test", b"s"))[1] == 2
        assert await sheep.delete(b"test") == 0
        assert list(sheep.state.vdis.in_use) == [1, 2]
        assert (await sheep.new_vdi(b"test"))[0] == Result.VDI_EXIST
        assert await sheep.delete(b"test", b"s") == 0

        assert list(sheep.state.vdis.in_use) == []
        assert world.space.pages == {}
        assert (await sheep.new_vdi(b"other"))[1] == 1


async def test_notify_add():
    """A volume written by dog itself is known to all after NOTIFY_VDI_ADD."""
    async with machines() as world:
        one, two = await world.start_all(0, 1)
        await one.format()
        wanted = VdiStateRequest(old_vid=0, new_vid=0x55, copies=2, set_bitmap=1, block_size_shift=20)
        assert (await one.ask(Op.NOTIFY_VDI_ADD, wanted)).result == 0

        assert two.state.vdis.scheme_of(0x55) == (2, 0, 20)
        assert list(two.state.vdis.in_use) == [0x55]


async def test_alter_copies():
    """ALTER_VDI_COPY changes placement everywhere and starts recovery; erasure codes are left alone."""
    async with machines() as world:
        one, two = await world.start_all(0, 1)
        await one.format()
        await one.new_vdi(b"test")
        assert (await one.ask(Op.ALTER_VDI_COPY, VdiStateRequest(new_vid=TEST, copies=2))).result == 0
        assert (await one.ask(Op.ALTER_VDI_COPY, VdiStateRequest(new_vid=TEST, copies=0))).result == 5
        assert (await one.ask(Op.ALTER_VDI_COPY, VdiStateRequest(new_vid=TEST, copies=3, copy_policy=17))).result == 5

        assert two.state.vdis.scheme_of(TEST) == (2, 0, 22)
        assert two.backend.recovery.altered == [(TEST, 2)]


async def test_discard():
    """DISCARD_OBJ frees an object; discarding what is not allocated is fine."""
    async with machines() as world:
        sheep = await one_sheep(world)
        await sheep.new_vdi(b"test", size=40 << 20)
        await fill(world, TEST, 2)
        for _ in range(2):
            assert (await sheep.ask(Op.DISCARD_OBJ, oid=data_oid(TEST, 2))).result == 0

        assert world.space.data_objects() == []
        assert entries(world, TEST, 3) == [0, 0, 0]
