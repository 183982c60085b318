"""The data path when answers get lost, epochs begin in the middle, and nobody knows what was carried out."""

from __future__ import annotations

from collections import deque

import anyio
import pytest

from sheepdog.builtin.tcp import sheepdog_transport
from sheepdog.contracts.store import REPLICA, ShardKey
from sheepdog.daemon import server
from sheepdog.daemon.primary import FanOut
from sheepdog.daemon.unsettled import LOG_MAX, Unsettled
from sheepdog.errors import ShardCorrupt, StoreBusy, StoreDeviceError
from sheepdog.model.clusterinfo import ClusterStatus
from sheepdog.model.ids import data_oid, inode_oid, ledger_oid
from sheepdog.model.inode import MAP_OFFSET
from sheepdog.model.ring import Ring
from sheepdog.wire.extensions import FORWARD_DECREF, FORWARD_REMOVE
from sheepdog.wire.opcodes import Op
from sheepdog.wire.results import Result

from .data_plane import planes

pytestmark = pytest.mark.anyio
OID = data_oid(0x123456, 1)


async def wait_for(condition):
    with anyio.fail_after(10):
        while not condition():
            await anyio.sleep(0.005)


def content(plane, oid, length):
    buffer = bytearray(length)
    plane.store.read_into(ShardKey(oid), memoryview(buffer), offset_bytes=0)
    return bytes(buffer)


def primary_of(sheep, oid):
    return next(plane for plane in sheep if plane.placer.placement(oid).here)


def intercept(plane, opcode, handler):
    """``handler(original, connection, request)`` serves the next request with that opcode."""
    handlers = plane.dispatcher._handlers
    original = handlers[opcode]

    def once(connection, request):
        handlers[opcode] = original
        handler(original, connection, request)

    handlers[opcode] = once


def refuse(original, connection, request):
    connection.reply(request, Result.NETWORK_ERROR)


class LosesAnswers:
    """A connection that breaks when it is to carry an answer."""

    def __init__(self, connection):
        self._connection = connection

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def reply(self, *_):
        self._connection._inflight -= 1
        self._connection.channel.abort()


def answer_lost(original, connection, request):
    original(LosesAnswers(connection), request)


# ---- what is remembered of changes that failed


def test_a_change_that_nobody_confirmed_is_remembered():
    """Refused by a newer epoch or cut off, a holder may have applied a change all the same: its object is marked."""
    unsettled = Unsettled()
    ended = []
    fan = FanOut(2, unsettled, OID, ended.append)
    fan.one(Result.OLD_NODE_VER)
    fan.one(Result.NETWORK_ERROR)

    assert ended == [Result.NETWORK_ERROR] and list(unsettled.oids) == [OID]


@pytest.mark.parametrize("results", [[0, 0], [Result.NO_OBJ, Result.NO_OBJ]])
def test_a_change_that_all_agree_on_is_not(results):
    """Done everywhere, or nowhere since nobody has the object: nothing can differ."""
    unsettled = Unsettled()
    ended = []
    fan = FanOut(2, unsettled, OID, ended.append)
    for result in results:
        fan.one(result)

    assert ended == [results[0]] and not unsettled.oids


def test_holders_remember_until_it_is_settled():
    """The low-water mark stays below an incomplete change: the primary may die before it is settled."""
    unsettled = Unsettled()
    first, second, third = (unsettled.begin(oid) for oid in (1, 2, 3))
    unsettled.end(first, True)
    unsettled.end(second, False)
    unsettled.end(third, True)
    assert unsettled.low_water == second

    log = deque()
    unsettled.applied(log, second, 2, unsettled.low_water)
    unsettled.applied(log, 0, 0, unsettled.low_water)
    assert list(log) == [(second, 2)]

    unsettled.settled(2)
    unsettled.applied(log, 0, 0, unsettled.low_water)
    assert unsettled.low_water == third + 1 and not log


def test_memory_of_applied_changes_is_bounded():
    """What a holder can no longer remember as applied it marks, so it is settled rather than forgotten."""
    unsettled = Unsettled()
    log = deque()
    for number in range(1, LOG_MAX + 11):
        unsettled.applied(log, number, 1000 + number, 1)

    assert len(log) == LOG_MAX
    assert list(unsettled.oids) == [1000 + number for number in range(1, 11)]


def test_low_water_across_the_wrap():
    """Numbers go on after the largest one, and older ones are still known to be older."""
    unsettled = Unsettled()
    unsettled._next = unsettled.low_water = 0xFFFFFFFE
    numbers = [unsettled.begin(oid) for oid in (1, 2, 3)]
    assert numbers == [0xFFFFFFFE, 0xFFFFFFFF, 1]

    log = deque()
    for number, oid in zip(numbers, (1, 2, 3), strict=True):
        unsettled.applied(log, number, oid, unsettled.low_water)
    unsettled.end(numbers[0], True)
    unsettled.end(numbers[1], True)
    unsettled.applied(log, 0, 0, unsettled.low_water)

    assert list(log) == [(1, 3)]


# ---- changes that must wait, and for how long


async def test_change_that_waited_through_a_new_ring(make_store):
    """A change whose turn comes under another ring goes to the holders of that ring, or is not acknowledged."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        primary = primary_of(sheep, OID)
        await primary.objects.create(OID, 0, b"a" * 512)
        release = []
        primary.primary.enter(OID, True, release.append, lambda _: None)
        results = []
        placement = primary.placer.placement(OID)
        primary.primary.write(OID, 0, b"b" * 512, placement, results.append)
        nodes = [plane.node for plane in sheep]
        for plane in sheep:
            plane.join(nodes, 2, 3)
        with primary.outbox:
            release[0](0)

        assert results == [Result.OLD_NODE_VER]
        assert content(primary, OID, 512) == b"a" * 512


async def test_change_that_waited_until_the_session_was_lost(make_store):
    """A sheep that is no member applies nothing that waited for its turn."""
    async with planes(1, make_store, sheepdog_transport) as (plane,):
        await plane.objects.create(OID, 0, b"a" * 512)
        release, results = [], []
        plane.primary.enter(OID, True, release.append, lambda _: None)
        plane.primary.write(OID, 0, b"b" * 512, plane.placer.placement(OID), results.append)
        plane.state.install(status=ClusterStatus.WAIT)
        release[0](0)

        assert results == [Result.OLD_NODE_VER]
        assert content(plane, OID, 512) == b"a" * 512


async def test_write_waits_for_a_former_holder(make_store):
    """When an object has moved, no write is acknowledged while a former holder may still serve the older copy."""
    async with planes(4, make_store, sheepdog_transport, copies=2) as sheep:
        nodes = [plane.node for plane in sheep]
        for plane in sheep[:3]:
            plane.join(nodes[:3], 2, 2)
        oid = next(
            oid for oid in (data_oid(0x123456, index) for index in range(1000))
            if Ring(nodes[:3]).holders(oid, 2)[0] == Ring(nodes).holders(oid, 2)[0]
            and Ring(nodes).holders(oid, 2)[1] == nodes[3]
        )  # fmt: skip
        first = primary_of(sheep[:3], oid)
        late = next(plane for plane in sheep[:3] if plane.placer.placement(oid).index == 1)
        await first.objects.create(oid, 0, b"old")
        for plane in sheep:
            if plane is not late:
                plane.join(nodes, 3, 2)
        await sheep[3].recovery.fetched(oid, REPLICA)
        done = []

        async def write():
            await first.objects.write(oid, 0, b"new")
            done.append(True)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(write)
            await wait_for(lambda: first.gateway.waiting)
            await anyio.sleep(0.1)
            assert bytes(await late.objects.read(oid, 0, 3)) == b"old"
            assert not done
            late.join(nodes, 3, 2)
            await wait_for(lambda: done)

        assert bytes(await late.objects.read(oid, 0, 3)) == b"new"


async def test_primary_that_cannot_fetch_its_copy_now(make_store):
    """While nobody can say whether an object exists, the client waits; it is not told that there is none."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        primary = primary_of(sheep, OID)
        await primary.objects.create(OID, 0, b"a" * 512)
        primary.store.remove(ShardKey(OID))
        fetch = primary.recovery.fetch

        def fail_once(oid, index, done):
            primary.recovery.fetch = fetch
            done(Result.NETWORK_ERROR)

        primary.recovery.fetch = fail_once
        await primary.objects.write(OID, 0, b"b" * 512)

        assert [content(plane, OID, 512) for plane in sheep] == [b"b" * 512] * 3


async def test_sheep_do_not_wait_for_each_other(make_store, monkeypatch):
    """Two sheep that are each other's primaries serve any number of forwarded writes: neither stops reading."""
    monkeypatch.setattr(server, "INFLIGHT_MAX", 4)
    async with planes(2, make_store, sheepdog_transport) as sheep:
        one, other = sheep
        oids = [data_oid(0x123456, index) for index in range(40)]
        of_one = next(oid for oid in oids if primary_of(sheep, oid) is one)
        of_other = next(oid for oid in oids if primary_of(sheep, oid) is other)
        for oid in (of_one, of_other):
            await one.objects.create(oid, 0, b"")
        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                for number in range(100):
                    tasks.start_soon(one.objects.write, of_other, number * 512, b"x" * 512)
                    tasks.start_soon(other.objects.write, of_one, number * 512, b"y" * 512)

        assert content(one, of_one, 51200) == content(other, of_one, 51200) == b"y" * 51200


# ---- removals and references


async def test_removal_does_not_outlive_its_epoch(make_store):
    """A private object whose removal was not over before a new epoch stays: its owner may have made it anew."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        vid, index = 0xA, next(
            index for index in range(64)
            if primary_of(sheep, data_oid(0xA, index)) is not primary_of(sheep, inode_oid(0xA))
        )  # fmt: skip
        oid = data_oid(vid, index)
        entry = MAP_OFFSET + 4 * index
        await sheep[0].objects.create(inode_oid(vid), 0, b"name")
        await sheep[0].objects.create(oid, 0, b"old")
        await sheep[0].objects.write(inode_oid(vid), entry, vid.to_bytes(4, "little"))
        mapper, keeper = primary_of(sheep, inode_oid(vid)), primary_of(sheep, oid)
        held = []
        intercept(keeper, FORWARD_REMOVE, lambda original, connection, request: held.append((connection, request)))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(mapper.objects.write, inode_oid(vid), entry, bytes(4))
            await wait_for(lambda: held)
            nodes = [plane.node for plane in sheep]
            for plane in sheep:
                plane.join(nodes, 2, 3)
            await keeper.objects.create(oid, 0, b"new")
            with keeper.outbox:
                held[0][0].reply(held[0][1], Result.OLD_NODE_VER)
            await wait_for(lambda: mapper.references.idle)

        assert [content(plane, oid, 3) for plane in sheep] == [b"new"] * 3


async def test_removal_of_a_client_that_left(make_store):
    """A removal that waits to be tried again is dropped when its client has gone."""
    async with planes(1, make_store, sheepdog_transport) as (plane,):
        await plane.objects.create(OID, 0, b"a")
        results = []
        plane.state.install(status=ClusterStatus.WAIT)
        plane.gateway.submit_remove(OID, results.append, wanted=lambda: False)
        plane.state.install(status=ClusterStatus.OK)

        assert results == [Result.NETWORK_ERROR]
        assert plane.store.exists(ShardKey(OID))


async def make_ledger(sheep):
    """A ledger with three references of generation 1: its object must outlive two drops."""
    ledger = ledger_oid(OID)
    await sheep[0].objects.create(OID, 0, b"shared")
    done = []
    with sheep[0].outbox:
        sheep[0].gateway.submit_decref(ledger, 0, 3, done.append)
    await wait_for(lambda: done)
    assert counters(sheep[0]) == (0, 3)
    return ledger


def counters(plane):
    return tuple(memoryview(content(plane, ledger_oid(OID), 8)).cast("i"))


async def test_reference_is_dropped_once_when_the_answer_is_lost(make_store):
    """When the connection breaks after a drop was carried out, it is not repeated."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        ledger = await make_ledger(sheep)
        primary = primary_of(sheep, ledger)
        asking = next(plane for plane in sheep if plane is not primary)
        intercept(primary, FORWARD_DECREF, answer_lost)
        done = []
        with asking.outbox:
            asking.gateway.submit_decref(ledger, 1, 0, done.append)
        await wait_for(lambda: done)
        await wait_for(lambda: all(counters(plane) == (0, 2) for plane in sheep))

        assert done == [Result.EIO]


async def test_reference_is_dropped_once_when_a_holder_fails(make_store):
    """A drop that the primary has carried out counts; a holder that missed it is brought in step."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        ledger = await make_ledger(sheep)
        primary = primary_of(sheep, ledger)
        holder = next(plane for plane in sheep if plane is not primary)
        intercept(holder, Op.WRITE_PEER, refuse)
        done = []
        with primary.outbox:
            primary.gateway.submit_decref(ledger, 1, 0, done.append)
        await wait_for(lambda: done)
        await wait_for(lambda: all(counters(plane) == (0, 2) for plane in sheep))

        assert done == [0]


@pytest.mark.parametrize(
    "trouble",
    [StoreDeviceError("disk /d failed"), ShardCorrupt(inode_oid(0xA), REPLICA, "a block differs"), StoreBusy("files")],
    ids=lambda error: type(error).__name__,
)
async def test_map_that_cannot_be_read(make_store, trouble):
    """A map write that meets trouble with what the page cache has is answered, and those after it get their turn."""
    async with planes(1, make_store, sheepdog_transport) as (plane,):
        oid = inode_oid(0xA)
        await plane.objects.create(oid, 0, b"name")
        read = plane.store.try_read_into

        def failing(*arguments, **named):
            plane.store.try_read_into = read
            raise trouble

        plane.store.try_read_into = failing
        with anyio.fail_after(10):
            await plane.objects.write(oid, MAP_OFFSET, (0xA).to_bytes(4, "little"))
            await plane.objects.write(oid, MAP_OFFSET + 4, (0xA).to_bytes(4, "little"))

        assert content(plane, oid, MAP_OFFSET + 8)[MAP_OFFSET:] == 2 * (0xA).to_bytes(4, "little")


@pytest.mark.parametrize("refused", [0, 1, 2])
async def test_corrupt_copies_beside_holders_that_do_not_answer(make_store, refused):
    """While any holder that does not answer may have a good copy, a read waits for it, however many are corrupt."""
    async with planes(3, make_store, sheepdog_transport) as sheep:
        await sheep[0].objects.create(OID, 0, b"right")
        reader = sheep[0]
        good = next(plane for plane in sheep[1:] if plane.node.id == reader.placer.placement(OID).others[-1])

        def corrupt(*_, **__):
            raise ShardCorrupt(OID, REPLICA, "a block differs")

        for plane in sheep:
            if plane is not good:
                plane.store.try_read_into = corrupt

        def refuse_some(original, connection, request, left=refused):
            if left:
                intercept(good, Op.READ_PEER, lambda *call: refuse_some(*call, left=left - 1))
                refuse(original, connection, request)
            else:
                original(connection, request)

        intercept(good, Op.READ_PEER, refuse_some)
        with anyio.fail_after(10):
            assert await reader.objects.read(OID, 0, 5) == b"right"
