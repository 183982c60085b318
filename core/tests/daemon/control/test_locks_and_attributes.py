"""Locks of volumes, and attributes."""

import anyio
import pytest

from sheepdog.model.attribute import ATTRIBUTE_BYTES, Attribute
from sheepdog.model.clusterinfo import ClusterFlag
from sheepdog.model.hashing import vdi_hash
from sheepdog.model.ids import attribute_oid
from sheepdog.model.vdi_state import LockState, SharedState, unpack_vdi_states
from sheepdog.wire.opcodes import Flag, Op
from sheepdog.wire.payloads import CheckpointRequest, CoherenceRequest, VdiRequest, VdiResponse
from sheepdog.wire.results import Result

from .world import AUTO, machines

pytestmark = pytest.mark.anyio
LOCKS = AUTO | ClusterFlag.USE_LOCK
TEST = 0x7C2B25
NORMAL, SHARED = 0, 1
MODIFIED, FRESH, INVALID = SharedState.MODIFIED, SharedState.SHARED, SharedState.INVALIDATED


async def sheep_with_locks(world, count=2, flags=LOCKS):
    sheep = await world.start_all(*range(count))
    await sheep[0].format(flags=int(flags))
    await sheep[0].new_vdi(b"test")
    return sheep


async def release(sheep, vid=TEST, kind=NORMAL):
    return (await sheep.ask(Op.RELEASE_VDI, VdiRequest(base_vdi_id=vid, lock_type=kind))).result


def freshness(sheep):
    return [participant.state for participant in sheep.state.vdis.get(TEST).participants]


async def test_normal_lock():
    """LCK-1: one lock excludes all others, also through the same sheep, until it is released."""
    async with machines() as world:
        one, two = await sheep_with_locks(world)
        assert await one.lock(b"test") == 0
        for sheep in (one, two):
            for kind in (NORMAL, SHARED):
                assert await sheep.lock(b"test", kind) == Result.VDI_LOCKED
        states = unpack_vdi_states((await two.ask(Op.GET_VDI_COPIES, data_length=1 << 20)).body)
        assert (states[0].lock_state, states[0].owner) == (LockState.LOCKED, one.node.id)
        assert await release(one) == 0
        assert await two.lock(b"test") == 0


async def test_without_locks():
    """LCK-7: where locks are not enforced everybody opens, and nothing is recorded."""
    async with machines() as world:
        one, two = await sheep_with_locks(world, flags=AUTO)
        assert [await sheep.lock(b"test") for sheep in (one, one, two)] == [0, 0, 0]
        assert await release(two) == 0
        assert one.state.vdis.get(TEST).lock_state is LockState.UNLOCKED


async def test_lock_errors():
    """A lock of something that is not there, or of a type that does not exist, is refused; a release never is."""
    async with machines() as world:
        one, _ = await sheep_with_locks(world)
        assert await one.lock(b"other") == Result.NO_VDI
        assert await one.lock(b"test", tag=b"none") == Result.NO_TAG
        assert await one.lock(b"test", 7) == Result.INVALID_PARMS
        assert await release(one) == 0
        assert await release(one, 0x99) == 0


async def test_owner_dies():
    """LCK-2: a dead owner's normal lock stays until somebody unlocks; shared participants vanish with their sheep."""
    async with machines() as world:
        one, two, three = await sheep_with_locks(world, 3)
        await one.new_vdi(b"other")
        await two.lock(b"test")
        await two.lock(b"other", SHARED)
        await three.lock(b"other", SHARED)
        await world.kill(two)
        await world.agreed(one, three)

        assert await one.lock(b"test") == Result.VDI_LOCKED
        assert await release(one) == 0
        assert await one.lock(b"test") == 0
        _, other = await one.find(b"other")
        assert [participant.node for participant in one.state.vdis.get(other).participants] == [three.node.id]


async def test_shared_lock():
    """LCK-3: participants keep each other's cached inodes coherent; at most one is modified."""
    async with machines() as world:
        one, two, three = await sheep_with_locks(world, 3)
        assert await one.lock(b"test", SHARED) == 0
        assert await two.lock(b"test", SHARED) == 0
        assert await one.lock(b"test", SHARED) == Result.VDI_LOCKED
        assert await three.lock(b"test", NORMAL) == Result.VDI_LOCKED
        assert freshness(one) == [MODIFIED, INVALID]
        await two.control.coherence(TEST, validate=True)
        assert freshness(two) == [FRESH, FRESH]
        assert (await two.ask(Op.INODE_COHERENCE, CoherenceRequest(vid=TEST))).result == 0
        assert freshness(two) == [INVALID, MODIFIED]
        assert (await three.ask(Op.INODE_COHERENCE, CoherenceRequest(vid=TEST))).result == Result.NO_VDI
        assert await release(one, kind=SHARED) == 0
        assert await release(two, kind=SHARED) == 0
        assert three.state.vdis.get(TEST).lock_state is LockState.UNLOCKED


async def test_lock_follows_snapshot():
    """LCK-5: a normal lock goes on with the working volume, under whichever number its holder releases it."""
    async with machines() as world:
        one, two = await sheep_with_locks(world)
        for number, release_by in ((TEST, TEST), (TEST + 1, TEST + 2)):
            assert await one.lock(b"test") == 0
            await one.snapshot(b"test", b"s%d" % number)
            assert await two.lock(b"test") == Result.VDI_LOCKED
            assert await release(one, release_by) == 0
            assert await two.lock(b"test") == 0
            assert await release(two, number + 1) == 0


async def test_joiner_knows_locks():
    """LCK-6: a joiner learns all locks, and one taken while it joins is not lost."""
    async with machines(seed=9, delay_s_max=0.02) as world:
        one, two = await sheep_with_locks(world)
        await one.new_vdi(b"other")
        await one.lock(b"test")
        three = world.start(2)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(two.lock, b"other")
        await world.agreed(one, two, three)

        assert three.state.vdis.states() == one.state.vdis.states()
        assert await three.lock(b"test") == Result.VDI_LOCKED
        assert await three.lock(b"other") == Result.VDI_LOCKED


async def test_restart_drops_locks():
    """LCK-6: after a restart of everybody no lock is left."""
    async with machines() as world:
        sheep = await sheep_with_locks(world)
        await sheep[0].lock(b"test")
        await world.kill(*sheep)
        one, _ = await world.start_all(0, 1)
        assert await one.lock(b"test") == 0


async def test_deleted_volume_has_no_lock():
    """LCK-8: the lock goes with the volume."""
    async with machines() as world:
        one, two = await sheep_with_locks(world)
        await one.lock(b"test")
        assert await two.delete(b"test") == 0
        assert two.state.vdis.get(TEST).lock_state is LockState.UNLOCKED


async def test_checkpoint():
    """The state of a volume can be fetched for any epoch that has begun."""
    async with machines() as world:
        one, _ = await sheep_with_locks(world)
        await one.lock(b"test")
        got = await one.ask(Op.VDI_STATE_CHECKPOINT_CTL, CheckpointRequest(1, 1, TEST), data_length=1428)
        assert unpack_vdi_states(got.body)[0].owner == one.node.id
        later = await one.ask(Op.VDI_STATE_CHECKPOINT_CTL, CheckpointRequest(1, 2, TEST), data_length=1428)
        unknown = await one.ask(Op.VDI_STATE_CHECKPOINT_CTL, CheckpointRequest(1, 1, 5), data_length=1428)
        assert (later.result, unknown.result) == (Result.AGAIN, Result.NO_CHECKPOINT_ENTRY)


# ---- attributes


async def attribute(sheep, key, value=b"", flags=0, name=b"test", snapid=0, tag=b""):
    body = Attribute(name, tag, 0, snapid, key, value).pack()
    response = await sheep.ask(Op.GET_VDI_ATTR, VdiRequest(snapid=snapid), flags=flags | Flag.WRITE, body=body)
    return response.result, VdiResponse.unpack(response.variant.ljust(28, b"\0"))


async def value_of(world, sheep, key):
    result, where = await attribute(sheep, key)
    assert result == 0
    return Attribute.unpack(world.space.peek(attribute_oid(where.vdi_id, where.attr_id), 0, ATTRIBUTE_BYTES)).value


async def test_attribute_life():
    """VDI-8: set, get, overwrite by something shorter, delete, set again."""
    async with machines() as world:
        sheep, _ = await sheep_with_locks(world, flags=AUTO)
        assert (await attribute(sheep, b"k"))[0] == Result.NO_OBJ
        result, where = await attribute(sheep, b"k", b"first value", Flag.CREAT)
        assert (result, where.vdi_id) == (0, vdi_hash(b"test"))
        await attribute(sheep, b"k", b"2", Flag.CREAT)
        assert await value_of(world, sheep, b"k") == b"2"
        assert (await attribute(sheep, b"k", b"3", Flag.CREAT | Flag.EXCL))[0] == Result.VDI_EXIST
        assert (await attribute(sheep, b"k", flags=Flag.DEL))[0] == 0
        assert (await attribute(sheep, b"k"))[0] == Result.NO_OBJ
        assert (await attribute(sheep, b"k", flags=Flag.DEL))[0] == Result.NO_OBJ
        assert (await attribute(sheep, b"k", b"x" * 65536, Flag.CREAT | Flag.EXCL))[0] == 0
        assert await value_of(world, sheep, b"k") == b"x" * 65536
        assert (await attribute(sheep, b"k", name=b"other"))[0] == Result.NO_VDI


async def test_colliding_attributes():
    """Two keys that want the same slot do not overwrite each other, and a tombstone hides nothing behind it."""
    async with machines() as world:
        sheep, _ = await sheep_with_locks(world, flags=AUTO)
        _, first = await attribute(sheep, b"a", b"A", Flag.CREAT)
        # Another key's attribute where "a" hashes to: as if both had the same hash.
        oid = attribute_oid(first.vdi_id, first.attr_id)
        other = Attribute(b"test", b"", 0, 0, b"b", b"B").pack()
        world.space.poke(oid, 0, other)
        _, second = await attribute(sheep, b"a", b"A2", Flag.CREAT)
        assert second.attr_id == first.attr_id + 1
        assert await value_of(world, sheep, b"a") == b"A2"
        assert world.space.peek(oid, 0, ATTRIBUTE_BYTES) == other
        world.space.poke(oid, 0, b"\0")
        assert await value_of(world, sheep, b"a") == b"A2"
        assert (await attribute(sheep, b"a", b"!", Flag.CREAT | Flag.EXCL))[0] == Result.VDI_EXIST
        assert (await attribute(sheep, b"a", flags=Flag.DEL))[0] == 0
        _, third = await attribute(sheep, b"a", b"A3", Flag.CREAT)
        assert third.attr_id == first.attr_id


async def test_exclusive_attribute_as_lock():
    """VDI-9: of many exclusive creations through different sheep exactly one succeeds."""
    async with machines(seed=2, delay_s_max=0.01) as world:
        sheep = await sheep_with_locks(world, 3, flags=AUTO)
        results = []

        async def take(one):
            results.append((await attribute(one, b"lock", b"mine", Flag.CREAT | Flag.EXCL))[0])

        async with anyio.create_task_group() as tasks:
            for one in sheep * 3:
                tasks.start_soon(take, one)

        assert sorted(results) == [0] + [Result.VDI_EXIST] * 8


async def test_malformed_attributes():
    """A body of another length, a lying value length, or no key: refused, nothing is written."""
    async with machines() as world:
        sheep, _ = await sheep_with_locks(world, flags=AUTO)
        objects = set(world.space.pages)
        good = Attribute(b"test", b"", 0, 0, b"k", b"v").pack()
        for body in (b"", good[:-1], good + b"\0", good[:524] + b"\xff\xff\xff\xff" + good[528:]):
            response = await sheep.ask(Op.GET_VDI_ATTR, VdiRequest(), flags=Flag.WRITE | Flag.CREAT, body=body)
            assert response.result == Result.INVALID_PARMS
        assert (await attribute(sheep, b"", flags=Flag.CREAT))[0] == Result.INVALID_PARMS
        assert set(world.space.pages) == objects
