"""Writes to objects that a holder lacks: they wait for its copy, and the copy has them all, in order."""

from __future__ import annotations

from types import SimpleNamespace

import anyio
import pytest

from sheepdog.contracts.store import REPLICA, ShardKey
from sheepdog.daemon.held_writes import HeldWrites
from sheepdog.wire.results import Result

from .data_plane import random_bytes
from .recovery_world import OBJECT, digest, world

KEY = ShardKey(0x12345600000001, REPLICA)
AT = (0, 0, OBJECT - 4096, OBJECT // 2, 2048, 0)  # of the writes; the first piece is read before all of them


@pytest.fixture
def anyio_backend():
    """The loop that sheep run on."""
    return "asyncio"


class _Interrupted:
    """The fetches of one sheep stop after their first piece, until they may go on."""

    def __init__(self, plane):
        self.begun, self.go = anyio.Event(), anyio.Event()
        finder = plane.recovery.finder
        ask = finder._ask_piece

        async def ask_piece(*arguments, **options):
            answer = await ask(*arguments, **options)
            if answer.content is not None:
                self.begun.set()
                await self.go.wait()
            return answer

        finder._ask_piece = ask_piece


async def _listed(w, *members):
    """Recovery is off and knows what is missing."""
    for plane in w.sheep:
        plane.state.recovery_disabled = True
    await w.change(*members)
    with anyio.fail_after(10):
        while any(w.sheep[member].recovery._phase == 0 for member in members):
            await anyio.sleep(0.01)


async def _write_meanwhile(w, interrupted, oid, gateway):
    """The writes are made while the copy is brought; none is acknowledged before it is whole."""
    expected = bytearray(random_bytes(3, OBJECT))
    results = []
    for number, offset in enumerate(AT):
        data = bytes([number + 1]) * 4096
        expected[offset : offset + len(data)] = data
        gateway.submit_write(oid, offset, data, lambda result, _: results.append(result), checked=False)
    with anyio.fail_after(10):
        await interrupted.begun.wait()
        await anyio.sleep(0.05)  # more would be acknowledged, if it were
    assert results == [] and not gateway.waiting
    interrupted.go.set()
    with anyio.fail_after(10):
        while len(results) < len(AT):
            await anyio.sleep(0.01)
    assert results == [0] * len(AT)
    return bytes(expected)


@pytest.mark.anyio
@pytest.mark.timeout(60)
async def test_a_holder_lacks_the_object(make_store):
    """What is written while a new holder's copy is on its way is in that copy, and needs no settling (REC-3)."""
    async with world(3, make_store) as w:
        oid = w.object_on(0, 1)
        await w.sheep[0].objects.create(oid, 0, random_bytes(3, OBJECT))
        await _listed(w, 1, 2)
        assert w.sheep[1].placer.placement(oid).here and not w.has(2, oid)
        expected = await _write_meanwhile(w, _Interrupted(w.sheep[2]), oid, w.sheep[1].gateway)

        assert digest(w.content(2, oid)) == digest(w.content(1, oid)) == digest(expected)
        assert not any(w.sheep[member].unsettled.oids for member in (1, 2))


@pytest.mark.anyio
@pytest.mark.timeout(60)
async def test_the_primary_lacks_the_object(make_store):
    """Changes wait at a primary for its copy, and go on from there: nobody has to try again (REC-3)."""
    async with world(3, make_store) as w:
        oid = w.object_on(0, 1)
        await w.change(1, 2)
        await w.sheep[1].objects.create(oid, 0, random_bytes(3, OBJECT))
        await w.recovered()
        await _listed(w, 0, 1, 2)
        assert w.sheep[0].placer.placement(oid).here and not w.has(0, oid)
        expected = await _write_meanwhile(w, _Interrupted(w.sheep[0]), oid, w.sheep[1].gateway)

        assert digest(w.content(0, oid)) == digest(w.content(1, oid)) == digest(expected)


class _Scene:
    """A holder that lacks one object, and two writes that wait for it."""

    def __init__(self):
        self.state = SimpleNamespace(epoch=5)
        self.missing = True
        self.applied, self.answers, self.fetches = [], [], []
        self.connection = SimpleNamespace(open=True)
        recovery = SimpleNamespace(
            may_find=lambda _: True, has_no_room=lambda _: False, fetch=lambda _, __, done: self.fetches.append(done)
        )
        self.held = HeldWrites(self.state, SimpleNamespace(write=self.store), recovery)
        self.write(1)
        self.write(2)

    def store(self, key, offset, data, done):
        if self.missing:
            done(Result.NO_OBJ, None)
        else:
            self.applied.append(offset)
            done(0, None)

    def write(self, offset):
        request = SimpleNamespace(offset=offset, body=b"x", epoch=5)
        self.held.write(KEY, self.connection, request, lambda result, _: self.answers.append(result))


def test_order_is_kept_after_the_copy_came():
    """A write that comes when the copy is here, but not yet what waited for it, comes after that."""
    scene = _Scene()
    scene.missing = False
    scene.write(3)
    assert (scene.applied, scene.answers, len(scene.fetches)) == ([], [], 1)
    scene.fetches[0](0)
    scene.write(4)
    assert (scene.applied, scene.answers) == ([1, 2, 3, 4], [0, 0, 0, 0])


@pytest.mark.parametrize(
    ("change", "outcome", "answer"),
    [
        (lambda scene: setattr(scene.connection, "open", False), 0, Result.NETWORK_ERROR),
        (lambda scene: setattr(scene.state, "epoch", 6), 0, Result.OLD_NODE_VER),
        (lambda scene: None, Result.NO_SPACE, Result.NO_SPACE),
        (lambda scene: None, Result.NETWORK_ERROR, Result.NO_OBJ),
    ],
)
def test_what_must_not_be_applied(change, outcome, answer):
    """What its sender has given up, or an older epoch meant, or has no copy to go to, is not applied."""
    scene = _Scene()
    scene.missing = False
    change(scene)
    scene.fetches[0](outcome)
    assert (scene.applied, scene.answers) == ([], [answer, answer])
