"""The tracers by themselves: what is recorded of requests that overlap, how it is read, and the watch over the loop."""

import logging
from types import SimpleNamespace

import pytest

from sheepdog.daemon import tracing
from sheepdog.daemon.tracing import ITEM, Tracers
from sheepdog.wire.header import Request
from sheepdog.wire.opcodes import Op
from sheepdog.wire.results import Result


class World:
    """A dispatcher's place for tracers, and a clock that the test turns."""

    def __init__(self):
        self.now = 1.0
        self.tracer = None
        self.tracers = Tracers(self, SimpleNamespace(monotonic=lambda: self.now))
        self.connection = SimpleNamespace(channel=SimpleNamespace(remote="10.0.0.1:7000"))

    def fast(self, opcode, handler):
        """Nothing is dispatched here."""

    def switch(self, name, *, on):
        change = self.tracers.enable if on else self.tracers.disable
        return change(Request(Op.TRACE_ENABLE, body=name + b"\0")).result

    def came(self, opcode, *, took=0.0):
        request = Request(opcode)

        def handle(connection, request):
            self.now += took

        self.tracers.run(handle, self.connection, request)
        return request

    def read(self, length=1 << 20):
        response = self.tracers.read(Request(Op.TRACE_READ_BUF, data_length=length))
        items = [(kind, depth, name.rstrip(b"\0")) for kind, _, depth, name, *_ in ITEM.iter_unpack(response.body)]
        return response.result, items


def test_overlap():
    """Requests under way at the same time have depths of their own, the lowest ones that are free."""
    world = World()
    assert world.switch(b"graph", on=True) == 0 and world.tracer is world.tracers
    one, two = world.came(Op.READ_OBJ), world.came(Op.WRITE_OBJ)
    world.tracers.replied(one)
    world.came(Op.STAT)
    world.tracers.replied(two)
    world.tracers.replied(Request(Op.READ_OBJ))  # came before the record

    assert world.read() == (
        0,
        [
            (0, 0, b"READ_OBJ"),
            (0, 1, b"WRITE_OBJ"),
            (1, 0, b"READ_OBJ"),
            (0, 0, b"STAT"),
            (1, 1, b"WRITE_OBJ"),
        ],
    )


def test_reading_in_pieces():
    """AGAIN while there is more, and where there never was a record; a new record begins empty."""
    world = World()
    assert world.read() == (Result.AGAIN, [])
    world.switch(b"graph", on=True)
    for _ in range(3):
        world.came(Op.READ_OBJ)
    world.switch(b"graph", on=False)

    assert world.tracer is None
    assert [world.read(2 * ITEM.size + 5)[0], world.read(2 * ITEM.size)[0]] == [Result.AGAIN, 0]
    assert world.read() == (0, [])
    world.switch(b"graph", on=True)
    world.came(Op.READ_OBJ)
    world.switch(b"graph", on=False)
    world.switch(b"graph", on=True)
    assert world.read() == (0, [])


def test_record_is_bounded(monkeypatch):
    """The oldest items go when there are too many."""
    monkeypatch.setattr(tracing, "ITEMS_MAX", 4)
    world = World()
    world.switch(b"graph", on=True)
    for _ in range(3):
        world.tracers.replied(world.came(Op.READ_OBJ))

    assert len(world.read()[1]) == 4


def test_loop_checker(caplog):
    """A request that keeps the loop for more than a millisecond is named; one that does not is not."""
    world = World()
    world.switch(b"loop_checker", on=True)
    with caplog.at_level(logging.WARNING):
        world.came(Op.READ_OBJ, took=0.0009)
        world.came(Op.STAT_CLUSTER, took=0.0025)

    assert caplog.messages == ["STAT_CLUSTER kept the event loop for 2.500 ms"]


@pytest.mark.parametrize(("name", "result"), [(b"thread_checker", Result.NO_SUPPORT), (b"graph", Result.INVALID_PARMS)])
def test_refusals(name, result):
    """Tracers that there are not, and those that are off already."""
    assert World().switch(name, on=False) == result
