"""Clients first, and of the objects those first that a client waits for."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import anyio
import pytest

from sheepdog.daemon import recovery_pace
from sheepdog.daemon.recovery_pace import AHEAD, PIECE_BYTES, PIECE_BYTES_MIN, Pace
from sheepdog.daemon.stats import Stats
from sheepdog.wire.extensions import SETTLE
from sheepdog.wire.header import Request
from sheepdog.wire.opcodes import Op

PIECES = 4

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


class _World:
    def __init__(self):
        self.now = 100.0
        self.requests = 0
        self.pace = Pace(SimpleNamespace(monotonic=lambda: self.now), lambda: self.requests, PIECES)
        self.passed = []

    async def breath(self, oid):
        counted = await self.pace.breath(oid)
        self.passed.append(oid)
        self.pace.over(counted)

    def request(self):
        """One more, a moment later."""
        self.requests += 1
        self.now += recovery_pace.LOOK_AGAIN_S


async def test_full_speed_without_clients():
    """Nobody else wants anything: no breath, and large pieces several at a time. With clients: one by one."""
    w = _World()
    with anyio.fail_after(5):
        for _ in range(3):
            await w.breath(1)
    assert (w.pace.ahead(1), w.pace.piece_bytes(1)) == (AHEAD, PIECE_BYTES)
    w.request()
    assert (w.pace.ahead(1), w.pace.piece_bytes(1)) == (1, PIECE_BYTES_MIN)
    w.pace.hurry(1)
    assert (w.pace.ahead(1), w.pace.piece_bytes(1)) == (AHEAD, PIECE_BYTES)
    w.pace.calm(1)
    w.now += 2 * recovery_pace.BUSY_S
    assert w.pace.ahead(1) == AHEAD


async def test_clients_of_long_ago():
    """What came before the last looks does not slow down a recovery that begins now."""
    w = _World()
    w.requests = 1000
    w.pace.look()
    w.now += 2 * recovery_pace.BUSY_S
    w.pace.look()

    assert w.pace.ahead(1) == AHEAD


async def test_what_a_client_waits_for_takes_no_breath(monkeypatch):
    """An object that becomes urgent in the middle of a breath goes on at once; the others go on breathing."""
    monkeypatch.setattr(recovery_pace, "BREATH_S", 3600.0)
    w = _World()
    w.request()
    await w.breath(1)  # the next one is an hour away
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(w.breath, 1)
        tasks.start_soon(w.breath, 2)
        await anyio.wait_all_tasks_blocked()
        w.pace.hurry(1)
        await anyio.wait_all_tasks_blocked()
        assert w.passed == [1, 1]
        tasks.cancel_scope.cancel()


async def test_the_others_stand_back(monkeypatch):
    """While an urgent object is fetched all others wait; when it is there they all go on, and not later."""
    monkeypatch.setattr(recovery_pace, "STAND_BACK_S", 3600.0)
    w = _World()
    w.pace.hurry(1)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            for oid in (2, 3, 1):
                tasks.start_soon(partial(w.breath, oid))
            await anyio.wait_all_tasks_blocked()
            assert w.passed == [1]
            w.pace.calm(1)
    assert sorted(w.passed) == [1, 2, 3]


async def test_few_pieces_at_a_time():
    """However many objects are fetched at once, what a client asks for meanwhile waits behind a few pieces; behind one
    while clients are at work. What a request waits for does not count."""
    w = _World()
    under_way = []

    async def piece(oid):
        under_way.append(await w.pace.breath(oid))

    async with anyio.create_task_group() as tasks:
        for oid in range(10):
            tasks.start_soon(piece, oid)
        await anyio.wait_all_tasks_blocked()
        assert len(under_way) == 1, "a client that comes in the first moment waits behind one"
        for ended, allowed in ((1, 2), (2, 3), (3, PIECES), (4, PIECES)):
            w.pace.over(True)
            await anyio.wait_all_tasks_blocked()
            assert len(under_way) - ended == allowed, "one more with each that came while there was no client"

        w.request()
        for _ in range(PIECES - 1):
            w.pace.over(True)
        await anyio.wait_all_tasks_blocked()
        assert len(under_way) == 8, "one is still under way"
        w.pace.hurry(99)
        assert await w.pace.breath(99) is False
        w.pace.over(False)
        w.pace.calm(99)
        w.pace.over(True)
        await anyio.wait_all_tasks_blocked()
        assert len(under_way) == 9, "one by one"
        w.now += 2 * recovery_pace.BUSY_S
        w.pace.over(True)
    assert len(under_way) == 10


async def test_a_wait_that_is_given_up_holds_nobody_up():
    """Whoever is cancelled in the moment of being let in lets the next one in."""
    w = _World()
    w.request()
    counted = await w.pace.breath(1)
    with anyio.fail_after(5):
        async with anyio.create_task_group() as tasks:
            gone = anyio.CancelScope()

            async def give_up():
                with gone:
                    await w.breath(2)

            tasks.start_soon(give_up)
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(w.breath, 3)
            await anyio.wait_all_tasks_blocked()
            w.pace.over(counted)
            gone.cancel()
    assert w.passed == [3]


async def test_clients_at_the_source():
    """A sheep that serves objects and clients slows down those that fetch from it, but not those that these serve."""
    w = _World()
    w.pace.source_busy()
    assert w.pace.busy() and not w.pace.busy_here()
    w.now += 2 * recovery_pace.BUSY_S
    assert not w.pace.busy()


def test_what_other_sheep_recover_is_no_client():
    """Requests to settle objects, and copies and strips that are brought, do not slow down the recovery that made
    them."""
    stats = Stats()
    for opcode in (SETTLE, Op.CREATE_AND_WRITE_PEER):
        stats.peer.began(Request(opcode))
    assert stats.client_requests() == 0
    stats.peer.began(Request(Op.WRITE_PEER))
    stats.gateway.began(Request(Op.READ_OBJ))
    assert stats.client_requests() == 2
