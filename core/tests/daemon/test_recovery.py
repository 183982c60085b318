"""Nodes come and go, and nothing is lost: recovery over real connections and real files."""

from __future__ import annotations

from functools import partial
from itertools import count
from pathlib import Path

import anyio
import pytest

from sheepdog.contracts.incoming import Gathered, Incoming
from sheepdog.contracts.store import ShardKey
from sheepdog.daemon import recovery, recovery_pace
from sheepdog.daemon.recovery_notes import FileNotes
from sheepdog.errors import ObjectNotFound, SheepdogError, StoreFull
from sheepdog.model.ids import attribute_oid, data_oid
from sheepdog.model.vdi_state import VdiState
from sheepdog.wire.opcodes import Op
from sheepdog.wire.results import Result

from .data_plane import random_bytes
from .recovery_world import OBJECT, VID, digest, world

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


@pytest.fixture
def anyio_backend():
    """The loop that sheep run on; recovery over a simulated network on trio is tested by the simulation."""
    return "asyncio"


async def left_behind(w, number, oid, content):
    """The sheep has a version of epoch 1 set aside, and no epoch was gathered yet."""
    await w.recovered()
    with anyio.fail_after(5):
        while any(plane.recovery.gathered != w.epoch for plane in w.sheep):
            await anyio.sleep(0.01)
    await w.sheep[number].recovery.cleanup()
    with anyio.fail_after(5):
        while w.stale(number):
            await anyio.sleep(0.01)
    for plane in w.sheep:
        plane.recovery._progress.gathered = 0
    w.put(number, oid, content)
    w.sheep[number].store.retire(ShardKey(oid), 1)
    w.sheep[number].recovery._index.forget()


async def test_leaving_and_joining_keep_the_copies(make_store):
    """After every change each object has its copies where the ring wants them, and nothing set aside is left."""
    async with world(4, make_store) as w:
        contents = {data_oid(VID, index): random_bytes(index, OBJECT) for index in range(6)}
        for oid, content in contents.items():
            await w.sheep[0].objects.create(oid, 0, content)

        for members in ((0, 1, 2), (1, 2), (1, 2, 3), (0, 1, 2, 3)):
            await w.change(*members)
            await w.recovered()
            for oid, content in contents.items():
                wanted = {node.id for node in w.rings[w.epoch].holders(oid, 2)}
                have = [number for number in members if w.has(number, oid)]
                assert {w.sheep[number].node.id for number in have} == wanted
                assert {w.content(number, oid) for number in have} == {content}
            with anyio.fail_after(5):
                while any(w.stale(number) for number in members):
                    await anyio.sleep(0.01)
            assert {w.sheep[number].recovery.gathered for number in members} == {w.epoch}


async def test_object_comes_back_with_its_holders(make_store):
    """An object all of whose holders are gone is recovered when one of them returns, also after later epochs."""
    async with world(4, make_store) as w:
        oid = w.object_on(0, 1)
        content = random_bytes(1, OBJECT)
        await w.sheep[2].objects.create(oid, 0, content)
        await w.change(2, 3)
        await w.recovered()
        with pytest.raises(SheepdogError):
            await w.sheep[2].objects.read(oid, 0, 512)

        await w.change(0, 2, 3)
        await w.recovered()

        assert digest(await w.sheep[3].objects.read(oid, 0, OBJECT)) == digest(content)
        assert len([number for number in w.members if w.has(number, oid)]) == 2


async def test_old_copies_do_not_win(make_store):
    """While those who have the newest version are absent, an older one is neither served nor cleaned up."""
    async with world(3, make_store) as w:
        oid = w.object_on(0, 1)
        old, new = random_bytes(1, OBJECT), random_bytes(2, OBJECT)
        await w.change(0, 1, 2)
        await w.sheep[0].objects.create(oid, 0, new)
        await left_behind(w, 2, oid, old)

        await w.change(2)
        await w.recovered()

        assert not w.has(2, oid)
        assert w.sheep[2].recovery.status().unfinished
        assert (ShardKey(oid), 1) in w.stale(2)
        await w.change(0, 1, 2)
        await w.recovered()
        assert {digest(w.content(number, oid)) for number in w.holders(oid)} == {digest(new)}
        assert len(w.holders(oid)) == 2


async def test_wildcard_takes_what_there_is(make_store):
    """A sheep started for wildcard recovery brings back an older version when nothing newer can be had."""
    async with world(3, make_store) as w:
        oid = w.object_on(0, 1)
        old = random_bytes(1, OBJECT)
        w.put(2, oid, old)
        w.sheep[2].store.retire(ShardKey(oid), 1)
        w.sheep[2].recovery.wildcard = True

        await w.change(0, 1, 2)
        await w.change(2)
        await w.recovered()

        assert digest(w.content(2, oid)) == digest(old)


async def test_wildcard_waits_for_everybody(make_store):
    """A member that does not serve yet when another begins its wildcard recovery may have the only version: it is not
    passed over, or the object would be taken for removed and then cleaned up."""
    async with world(2, make_store, copies=1) as w:
        oid, content = w.object_on(1, copies=1), random_bytes(1, OBJECT)
        await w.recovered()
        w.put(0, oid, content)
        w.sheep[0].store.retire(ShardKey(oid), 1)
        w.sheep[0].recovery._index.forget()
        w.sheep[1].recovery.wildcard = True
        handlers = w.sheep[0].dispatcher._handlers
        serve, refused = handlers[Op.READ_PEER], []

        def not_yet(connection, request):
            if len(refused) < 3:
                refused.append(request.oid)
                connection.reply(request, Result.WAIT_FOR_JOIN)
            else:
                serve(connection, request)

        handlers[Op.READ_PEER] = not_yet
        w.restart()
        await w.recovered()

        assert refused == [oid] * 3
        assert digest(w.content(1, oid)) == digest(content)


async def test_missed_epoch(make_store):
    """A copy that belonged here before and after an epoch, but not in it, is replaced by what was written meanwhile."""
    async with world(2, make_store, copies=1) as w:
        oid = w.object_on(0, copies=1)
        old, new = random_bytes(1, OBJECT), random_bytes(2, OBJECT)
        await w.sheep[0].objects.create(oid, 0, old)

        await w.change(0, 1, storing=(1,))
        w.put(1, oid, new)  # what a client did in that epoch
        await w.change(0, 1)
        refused = []
        w.sheep[0].shards.read(ShardKey(oid), 0, 512, lambda result, data: refused.append(result))
        await w.recovered()

        assert refused and refused[0] != 0
        assert digest(await w.sheep[0].objects.read(oid, 0, OBJECT)) == digest(new)
        assert digest(w.content(0, oid)) == digest(new)


async def test_missed_epoch_over_a_restart(make_store):
    """A sheep that was killed before it acted upon an epoch does so when it is back."""
    async with world(2, make_store, copies=1) as w:
        oid = w.object_on(0, copies=1)
        old, new = random_bytes(1, OBJECT), random_bytes(2, OBJECT)
        await w.sheep[0].objects.create(oid, 0, old)
        await w.change(0, 1)
        await w.recovered()
        assert w.sheep[0].recovery._progress.retired == 2
        plane = w.sheep[0]
        # Epochs 3 (without us) and 4 (with us) began, and the process died before it looked at its objects.
        await w.change(1, 0, storing=(1,))
        await w.change(0, 1)
        await w.recovered()
        w.put(0, oid, old)
        w.put(1, oid, new)
        w.sheep[1].store.retire(ShardKey(oid), 3)
        w.sheep[1].recovery._index.forget()
        plane.recovery._progress.retired = 2
        plane.recovery._notes.progress = plane.recovery._progress
        for other in w.sheep:
            other.recovery._progress.gathered = 2
        w.restart()
        assert plane.shards.gate is not None and plane.shards.gate(ShardKey(oid))
        await w.recovered()

        assert digest(w.content(0, oid)) == digest(new)
        assert plane.shards.gate is None


async def test_removal_while_fetching(make_store):
    """An object that is removed while a new holder fetches it does not come back."""
    async with world(3, make_store, copies=2) as w:
        oid = w.object_on(0, 1)
        await w.sheep[0].objects.create(oid, 0, b"x" * 4096)
        target = w.sheep[2].recovery
        reached, go = anyio.Event(), anyio.Event()
        find = target.finder.find

        async def slow_find(*args, **options):
            found = await find(*args, **options)
            reached.set()
            await go.wait()
            return found

        target.finder.find = slow_find
        await w.change(1, 2)
        with anyio.fail_after(10):
            await reached.wait()
        await w.sheep[1].objects.remove(oid)
        go.set()
        await w.recovered()

        assert w.holders(oid) in ([], [0])  # the absent sheep still has its copy
        target.finder.find = find
        await w.change(0, 1, 2)
        await w.recovered()
        assert w.holders(oid) == []


@pytest.mark.parametrize("kind", ["data", "attribute"])
async def test_removed_while_a_holder_was_away(make_store, kind):
    """What was removed while a node was away stays removed when the node returns with its old copies."""
    async with world(3, make_store) as w:
        candidates = (attribute_oid(VID, number) for number in range(100_000))
        first, second = w.sheep[0].node.id, w.sheep[1].node.id
        oid = w.object_on(0, 1)
        if kind == "attribute":
            oid = next(oid for oid in candidates if [node.id for node in w.rings[1].holders(oid, 2)] == [first, second])
        await w.sheep[0].objects.create(oid, 0, b"x" * 4096)
        await w.change(1, 2)
        await w.recovered()
        await w.sheep[1].objects.remove(oid)

        await w.change(0, 1, 2)
        await w.recovered()

        assert w.holders(oid) == []
        with pytest.raises(ObjectNotFound):
            await w.sheep[2].objects.read(oid, 0, 512)


async def test_removed_before_everybody_restarted(make_store, tmp_path):
    """What was removed while a node was away stays removed, even if everybody else was killed before it returned."""
    async with world(3, make_store) as w:
        first, second = w.sheep[0].node.id, w.sheep[1].node.id
        candidates = (attribute_oid(VID, number) for number in range(100_000))
        oid = next(oid for oid in candidates if [node.id for node in w.rings[1].holders(oid, 2)] == [first, second])
        bases = [tmp_path / f"base{number}" for number in range(3)]
        for base, plane in zip(bases, w.sheep, strict=True):
            base.mkdir()
            plane.recovery._notes = FileNotes(str(base))
            plane.state.recovery_disabled = True  # so that the epoch is not gathered before the removal
        await w.sheep[0].objects.create(oid, 0, b"x" * 4096)
        await w.change(1, 2)
        await w.sheep[1].objects.remove(oid)
        for number in (1, 2):
            w.sheep[number].recovery._notes.close()
            w.sheep[number].recovery._notes = FileNotes(str(bases[number]))
        w.restart()
        for plane in w.sheep:
            plane.state.recovery_disabled = False

        await w.change(0, 1, 2)
        await w.recovered()

        assert w.holders(oid) == []
        with anyio.fail_after(5):
            while any(plane.recovery._notes.removed for plane in w.sheep):
                await anyio.sleep(0.01)


async def test_fewer_and_more_copies_at_once(make_store):
    """A holder that was none for a moment, while a volume had fewer copies, does not serve what it missed."""
    async with world(3, make_store, copies=3) as w:
        oid = w.object_on(0, 1, 2, copies=3)
        old, new = random_bytes(1, OBJECT), random_bytes(2, OBJECT)

        def copies(before, after):
            for plane in w.sheep:
                plane.state.vdis.put(VdiState(vid=VID, copies=after, block_size_shift=22))
                plane.recovery.copies_changed(VID, before, after)

        copies(3, 3)
        await w.sheep[0].objects.create(oid, 0, old)
        await w.recovered()
        copies(3, 2)
        w.put(0, oid, new)  # what a client did then
        w.put(1, oid, new)
        copies(2, 3)
        refused = []
        w.sheep[2].shards.read(ShardKey(oid), 0, 512, lambda result, data: refused.append(result))
        await w.recovered()

        assert refused and refused[0] != 0
        assert [digest(w.content(number, oid)) for number in range(3)] == [digest(new)] * 3


async def test_data_of_a_node_without_vnodes(make_store):
    """A node whose disk is so small beside the others' that nothing belongs there any more hands over what it has."""
    async with world(3, make_store, copies=2) as w:
        oid, content = w.object_on(0, 1), random_bytes(1, OBJECT)
        await w.sheep[0].objects.create(oid, 0, content)

        await w.change(0, 1, 2, storing=(2,))
        await w.recovered()

        assert w.holders(oid) == [2]
        assert digest(await w.sheep[0].objects.read(oid, 0, OBJECT)) == digest(content)


class Cramped(Incoming):
    """A shard that arrives on a disk which is full until ``full`` says otherwise."""

    def __init__(self, inner, step, full):
        self.inner = inner
        self.step = step
        self.full = full

    def _refuse(self, step):
        if self.full and step == self.step:
            self.full.append(step)
            raise StoreFull("no space")

    def write(self, data, *, offset_bytes):
        if offset_bytes:
            self._refuse("write")
        self.inner.write(data, offset_bytes=offset_bytes)

    def finish(self, *, durable):
        self._refuse("finish")
        self.inner.finish(durable=durable)

    def discard(self):
        self.inner.discard()


@pytest.mark.parametrize("step", ["write", "finish"])
async def test_full_disk_during_recovery(make_store, monkeypatch, step):
    """What finds no space at its new holder stays where it was set aside, is served again once there is space, and only
    then is cleaned up. Nothing is left of what was received in vain."""
    monkeypatch.setattr(recovery, "ROOM_RETRY_S", 0.1)
    async with world(2, make_store, copies=1) as w:
        oid, content = w.object_on(0, copies=1), random_bytes(1, OBJECT)
        await w.sheep[0].objects.create(oid, 0, content)
        receive, store = w.sheep[1].store.receive, w.sheep[1].store
        full = ["from the beginning"]
        store.receive = lambda *args, **options: Cramped(receive(*args, **options), step, full)
        await w.change(0, 1, storing=(1,))
        with anyio.fail_after(10):
            while len(full) < 3:
                await anyio.sleep(0.01)
        assert w.holders(oid) == [] and w.stale(0) == [(ShardKey(oid), 1)]
        assert w.sheep[1].recovery.status().unfinished
        assert w.sheep[0].recovery.gathered != 2

        full.clear()
        with anyio.fail_after(10):
            while w.stale(0):
                await anyio.sleep(0.01)
        assert digest(w.content(1, oid)) == digest(content)
        disk = Path(store.disks()[0].path)
        assert not list(disk.rglob("*.tmp"))


async def test_sources_tell_of_their_clients(make_store, monkeypatch):
    """Who fetches from a sheep with clients at work hears of it, and takes its time, but does not pass it on."""
    monkeypatch.setattr(recovery_pace, "BUSY_S", 3600.0)
    async with world(3, make_store) as w:
        await w.sheep[0].objects.create(w.object_on(0, 1), 0, random_bytes(1, OBJECT))
        source, target = w.sheep[1].recovery, w.sheep[2].recovery
        for plane in w.sheep:
            plane.recovery.pace = plane.recovery.finder._pace = recovery_pace.Pace(
                plane.recovery._clock, partial(next, count()) if plane.recovery is source else int, 4
            )
        await w.change(1, 2)
        await w.recovered()
        assert source.pace.busy_here()
        assert target.pace.busy() and not target.pace.busy_here()


async def test_unchanged_copy_is_taken_up_again(make_store):
    """A node that returns with the version that the others have links it into place instead of fetching it."""
    async with world(3, make_store) as w:
        same, changed = w.object_on(0, 1), w.object_on(1, 0)
        for oid in (same, changed):
            await w.sheep[0].objects.create(oid, 0, random_bytes(oid & 0xFF, OBJECT))
        await w.change(1, 2)
        await w.recovered()
        await w.sheep[1].objects.write(changed, 0, b"new!" * 1024)
        fetched = []
        find = w.sheep[0].recovery.finder.find

        async def counting_find(oid, *args, **options):
            fetched.append(oid)
            return await find(oid, *args, **options)

        w.sheep[0].recovery.finder.find = counting_find
        await w.change(0, 1, 2)
        await w.recovered()

        assert fetched == [changed]
        assert w.content(0, changed)[:4096] == b"new!" * 1024
        assert w.content(0, same) == w.content(1, same)


@pytest.mark.parametrize("busy", [False, True])
async def test_large_objects_come_in_pieces(make_store, monkeypatch, busy):
    """An object larger than one answer may be arrives whole, one piece after the other or several at a time."""
    for name in ("PIECE_BYTES", "PIECE_BYTES_MIN"):
        monkeypatch.setattr(recovery_pace, name, 300_000)
    async with world(3, make_store) as w:
        pace = w.sheep[2].recovery.pace
        monkeypatch.setattr(pace, "busy", lambda: busy)
        oid = w.object_on(0, 1)
        await w.sheep[0].objects.create(oid, 0, random_bytes(7, OBJECT))
        await w.change(1, 2)
        await w.recovered()

        assert digest(w.content(2, oid)) == digest(random_bytes(7, OBJECT))


async def test_no_space_is_not_the_end(make_store, monkeypatch):
    """An object that finds no space is neither forgotten nor announced as recovered: writes to it are refused, not left
    waiting, and it comes when there is space (MD-13)."""
    monkeypatch.setattr(recovery, "ROOM_RETRY_S", 0.1)
    async with world(3, make_store) as w:
        oid = w.object_on(0, 1)
        await w.sheep[0].objects.create(oid, 0, random_bytes(7, OBJECT))
        store = w.sheep[2].store
        create, attempts, full = store.create, [], [True]

        def create_if_space(key, *arguments, **options):
            attempts.append(key)
            if full:
                raise StoreFull("no space")
            create(key, *arguments, **options)

        store.create = create_if_space
        store.receive = lambda key, size, *, sparse: Gathered(store, key, size, sparse=sparse)
        await w.change(1, 2)
        with anyio.fail_after(10):
            while len(attempts) < 3:
                await anyio.sleep(0.01)
        assert w.sheep[2].recovery.status().unfinished
        with anyio.fail_after(5), pytest.raises(SheepdogError) as refused:
            await w.sheep[1].objects.write(oid, 0, b"w" * 512)
        assert refused.value.result == Result.NO_SPACE
        full.clear()
        await w.recovered()
        await w.sheep[1].objects.write(oid, 0, b"v" * 512)

        assert w.content(2, oid) == w.content(1, oid)
        assert w.content(2, oid)[:512] == b"v" * 512


async def test_requests_do_not_wait_for_their_turn(make_store):
    """A missing object that a client reads or writes is fetched at once, even while recovery is switched off."""
    async with world(3, make_store) as w:
        oids = [w.object_on(0, 1), w.object_on(1, 0)]
        for oid in oids:
            await w.sheep[0].objects.create(oid, 0, random_bytes(1, OBJECT))
        for plane in w.sheep:
            plane.state.recovery_disabled = True
        await w.change(1, 2)
        with anyio.fail_after(10):
            while w.sheep[2].recovery._phase == 0:
                await anyio.sleep(0.01)

        assert not w.sheep[2].recovery.status().in_recovery
        assert w.sheep[2].recovery.status().unfinished
        assert not any(w.has(2, oid) for oid in oids)
        await w.sheep[2].objects.write(oids[0], 0, b"w" * 512)
        assert w.has(2, oids[0]) and not w.has(2, oids[1])
        for plane in w.sheep:
            plane.state.recovery_disabled = False
            plane.recovery.enabled_changed()
        with anyio.fail_after(10):
            while not w.has(2, oids[1]):
                await anyio.sleep(0.01)
        await w.recovered()
        assert w.content(1, oids[0]) == w.content(2, oids[0])


async def test_throttle_and_progress(make_store):
    """With a throttle objects come in windows; progress rises to the total; lifting it speeds up at once."""
    async with world(3, make_store) as w:
        oids = []
        for index in range(100_000):
            oid = data_oid(VID, index)
            holders = [node.id for node in w.rings[1].holders(oid, 2)]
            if w.sheep[2].node.id not in holders:
                oids.append(oid)
            if len(oids) == 8:
                break
        for oid in oids:
            await w.sheep[0].objects.create(oid, 0, b"x" * 512)
        recovery = w.sheep[2].recovery
        recovery.set_throttle(2, 3_600_000, True)
        await w.change(1, 2)
        seen = set()
        with anyio.fail_after(10):
            while recovery.status().finished < 2:
                seen.add(recovery.status().finished)
                await anyio.sleep(0.005)
        await anyio.sleep(0.1)
        assert recovery.status().total == 8
        assert recovery.status().finished == 2

        recovery.set_throttle(0, 0, False)
        await w.recovered()
        assert all(w.has(2, oid) for oid in oids)


async def test_delay_spares_the_traffic(make_store):
    """With a delay nothing moves when a node leaves, unless it is asked for; its return ends the wait."""
    async with world(3, make_store) as w:
        oid, asked = w.object_on(0, 1), w.object_on(1, 0)
        for each in (oid, asked):
            await w.sheep[0].objects.create(each, 0, b"x" * 512)
        for plane in w.sheep:
            plane.recovery._delay_s = 3600.0
        await w.change(1, 2)
        with anyio.fail_after(10):
            while w.sheep[2].recovery._phase == 0:
                await anyio.sleep(0.01)
        await w.sheep[2].objects.write(asked, 0, b"y" * 512)
        assert w.has(2, asked) and not w.has(2, oid)

        await w.change(0, 1, 2)
        await w.recovered()

        assert w.has(0, oid) and not w.has(2, oid)


async def test_second_change_during_recovery(make_store):
    """A change during recovery starts over for the newest epoch and keeps what has arrived."""
    async with world(4, make_store) as w:
        contents = {data_oid(VID, index): random_bytes(index, OBJECT) for index in range(8)}
        for oid, content in contents.items():
            await w.sheep[0].objects.create(oid, 0, content)
        await w.change(1, 2, 3)
        await anyio.sleep(0)
        await w.change(0, 1, 2, 3)
        await anyio.sleep(0.01)
        await w.change(0, 1, 3)
        await w.recovered()

        for oid, content in contents.items():
            have = [number for number in w.members if w.has(number, oid)]
            assert len(have) == 2
            assert {w.content(number, oid) for number in have} == {content}


async def test_who_left_is_not_asked_for_the_rest(make_store):
    """A change while an object is fetched from a node that leaves ends the fetch: the node may live on and never
    answer requests of an epoch that it does not know, and recovery towards the new epoch would wait for it."""
    async with world(3, make_store, copies=1) as w:
        oid, content = w.object_on(2, copies=1), random_bytes(1, OBJECT)
        w.put(2, oid, content)
        finder = w.sheep[0].recovery.finder
        ask = finder._ask_piece
        changed = []

        async def ask_and_change(*args, **options):
            answer = await ask(*args, **options)
            if not changed and answer.content:
                changed.append(args)
                await w.change(0, 1)
            return answer

        finder._ask_piece = ask_and_change
        await w.change(0, 1, 2, storing=(0,))
        await w.recovered(10)

        assert changed and w.epoch == 3


@pytest.mark.parametrize("when", ["while it ran", "while it was down"])
async def test_lost_disk_is_no_proof(make_store, when):
    """A copy that is missing because its disk went does not prove that an older version elsewhere is the newest."""
    async with world(3, make_store) as w:
        oid = w.object_on(0, 1)
        old = random_bytes(1, OBJECT)
        await w.change(0, 1, 2)
        await w.sheep[0].objects.create(oid, 0, random_bytes(2, OBJECT))
        await left_behind(w, 2, oid, old)
        w.sheep[0].store.remove(ShardKey(oid))
        if when == "while it ran":
            w.sheep[0].recovery._progress.lossy = 2
        else:
            w.sheep[0].recovery._progress.disks.append("/pulled/out")
            w.sheep[0].recovery._notes.progress = w.sheep[0].recovery._progress
            w.sheep[0].recovery._started = False

        await w.change(0, 2)
        await w.recovered()

        assert w.holders(oid) == [1]
