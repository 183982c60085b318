"""Clients first, and of the objects those first that a client waits for."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import anyio
import pytest

from sheepdog.daemon import recovery_pace
from sheepdog.daemon.recovery_pace import AHEAD, PIECE_BYTES, PIECE_BYTES_MIN, Pace

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(30)]


class _World:
    def __init__(self):
        self.now = 100.0
        self.requests = 0
        self.pace = Pace(SimpleNamespace(monotonic=lambda: self.now), lambda: self.requests)
        self.passed = []

    async def breath(self, oid):
        await self.pace.breath(oid)
        self.passed.append(oid)


async def test_full_speed_without_clients():
    """Nobody else wants anything: no breath, and large pieces several at a time. With clients: one by one."""
    w = _World()
    with anyio.fail_after(5):
        for _ in range(3):
            await w.breath(1)
    assert (w.pace.ahead(1), w.pace.piece_bytes(1)) == (AHEAD, PIECE_BYTES)
    w.requests = 1
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
    w.requests = 1
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
