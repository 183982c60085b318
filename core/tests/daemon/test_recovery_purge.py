"""When what was set aside goes: not before everybody has what it may need."""

from __future__ import annotations

import threading

import anyio
import pytest

from sheepdog.contracts.store import ShardKey
from sheepdog.errors import RequestError

from .data_plane import random_bytes
from .recovery_world import OBJECT, digest, world

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(60)]


@pytest.fixture
def anyio_backend():
    """The loop that sheep run on; recovery over a simulated network on trio is tested by the simulation."""
    return "asyncio"


async def test_late_purge_spares_what_a_newer_epoch_sets_aside(make_store):
    """The purge after an epoch may run when the next has begun; what that set aside is needed."""
    async with world(2, make_store, copies=1) as w:
        oid, content = w.object_on(0, copies=1), random_bytes(1, OBJECT)
        await w.sheep[0].objects.create(oid, 0, content)
        index = w.sheep[0].recovery._index
        purge, go, called = index.purge, threading.Event(), threading.Event()

        def late(due):
            called.set()
            assert go.wait(20)
            purge(due)

        index.purge = late
        await w.change(0, 1)
        with anyio.fail_after(10):
            while not called.is_set():
                await anyio.sleep(0.01)
        searched, found = anyio.Event(), anyio.Event()
        find = w.sheep[1].recovery.finder.find

        async def slow_find(*args, **options):
            searched.set()
            await found.wait()
            return await find(*args, **options)

        w.sheep[1].recovery.finder.find = slow_find
        await w.change(0, 1, storing=(1,))
        with anyio.fail_after(10):
            await searched.wait()
            while not w.stale(0):
                await anyio.sleep(0.01)
        go.set()
        await anyio.sleep(0.2)  # for a purge that does not care
        found.set()
        await w.recovered()

        assert digest(w.content(1, oid)) == digest(content)
        with anyio.fail_after(5):
            while w.stale(0):
                await anyio.sleep(0.01)


async def test_nothing_is_cleaned_up_while_others_recover(make_store):
    """CLEANUP is refused until everybody has everything."""
    async with world(2, make_store, copies=1) as w:
        oid = w.object_on(0, copies=1)
        await w.sheep[0].objects.create(oid, 0, b"x" * 4096)
        w.sheep[1].state.recovery_disabled = True
        await w.change(0, 1, storing=(1,))
        await w.recovered()

        with pytest.raises(RequestError):
            await w.sheep[0].recovery.cleanup()
        assert w.stale(0)


async def _one_looks_for_what_the_other_has(w):
    """After an epoch that everybody had recovered: the next search of the second sheep says so, and waits.

    :return: oid and content of what the first has set aside, event of the search, event that lets it go on.
    """
    oid, content = w.object_on(1, copies=1), random_bytes(1, OBJECT)
    await w.change(0, 1)
    await w.recovered()
    w.put(0, oid, content)
    w.sheep[0].store.retire(ShardKey(oid), 2)
    w.sheep[0].recovery._index.forget()
    searched, go = anyio.Event(), anyio.Event()
    finder = w.sheep[1].recovery.finder
    find = finder.find

    async def slow_find(*args, **options):
        searched.set()
        await go.wait()
        return await find(*args, **options)

    finder.find = slow_find
    w.sheep[1].recovery.wildcard = True
    return oid, content, searched, go


async def test_cleaning_up_while_another_recovers_again(make_store):
    """CLEANUP in an epoch that everybody had recovered leaves what a sheep that was restarted since still looks for."""
    async with world(2, make_store, copies=1) as w:
        oid, content, searched, go = await _one_looks_for_what_the_other_has(w)
        w.sheep[1].recovery.membership_changed(w.sheep[1].state.ring, False)
        with anyio.fail_after(10):
            await searched.wait()
        await w.sheep[0].recovery.cleanup()
        await anyio.sleep(0.2)  # for a purge that does not care
        assert w.stale(0)
        go.set()
        await w.recovered()

        assert digest(w.content(1, oid)) == digest(content)
        await w.sheep[0].recovery.cleanup()
        with anyio.fail_after(5):
            while w.stale(0):
                await anyio.sleep(0.01)


async def test_one_who_is_done_keeps_what_another_still_looks_for(make_store):
    """All were killed after an epoch that everybody had recovered, and one has what another must find: being done
    first, it keeps that until the other has it."""
    async with world(2, make_store, copies=1) as w:
        oid, content, searched, go = await _one_looks_for_what_the_other_has(w)
        w.restart()
        with anyio.fail_after(10):
            await searched.wait()
            while w.sheep[0].recovery.status().in_recovery:
                await anyio.sleep(0.01)
        await anyio.sleep(0.2)  # for a purge that does not care
        go.set()
        await w.recovered()

        assert digest(w.content(1, oid)) == digest(content)
        with anyio.fail_after(5):
            while w.stale(0):
                await anyio.sleep(0.01)


async def test_only_version_on_a_disk_of_another(make_store):
    """A disk with an object that belongs elsewhere, and is not there, was put in: the object is set aside and stays,
    while one that its holder has goes."""
    async with world(2, make_store, copies=1) as w:
        oid, content = w.object_on(1, copies=1), random_bytes(1, OBJECT)
        await w.change(0, 1)
        await w.recovered()
        w.put(0, oid, content)
        w.sheep[0].recovery.disks_changed()
        await w.recovered()
        await anyio.sleep(0.2)  # for a purge that does not care
        assert w.stale(0) == [(ShardKey(oid), 2)]

        w.put(1, oid, content)
        w.sheep[0].recovery.disks_changed()
        with anyio.fail_after(5):
            while w.stale(0):
                await anyio.sleep(0.01)
