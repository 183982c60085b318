"""Group commit: changes that come one after the other share a flush, and one at a time never waits."""

import anyio
import pytest

from sheepdog.daemon import gathering
from sheepdog.daemon.clock import SystemClock
from sheepdog.daemon.gathering import WAIT_MAX_S, Gathering
from sheepdog.daemon.outbox import Outbox

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param


class Hands:
    """A clock that is set by hand, flushes that end when they are told to, and tasks that are run by hand."""

    def __init__(self):
        self.now = 100.0
        self.waiting = 0
        self.flushes = []
        self.tasks = []
        self.most = 1000  # changes of one flush
        self.outbox = Outbox()
        self.gathering = Gathering(self._start, self.outbox, self, self.tasks.append)

    def monotonic(self):
        return self.now

    def _start(self):
        group = min(self.waiting, self.most)
        self.waiting -= group
        self.flushes.append(group)
        return group

    def add(self, count=1):
        for _ in range(count):
            self.waiting += 1
            self.gathering.add()

    def end(self, took=0.0):
        self.now += took
        with self.outbox:
            self.gathering.ended()


async def test_one_at_a_time():
    """A change that is alone is flushed at once, however often that happens."""
    hands = Hands()
    for _ in range(5):
        hands.add()
        hands.end(0.001)

    assert hands.flushes == [1] * 5 and not hands.tasks


async def test_as_many_as_are_under_way():
    """A group waits for those that were just answered, and begins with the last one of them."""
    hands = Hands()
    hands.add()
    hands.add(3)  # while the first one is flushed
    hands.end(0.001)
    assert hands.flushes == [1], "the first one is expected to come round again"
    hands.add()
    assert hands.flushes == [1, 4]
    hands.end(0.001)
    hands.add(3)
    assert hands.flushes == [1, 4]
    hands.add()
    assert hands.flushes == [1, 4, 4]


async def test_changes_of_one_receive():
    """What one pass brings is one group from the begin."""
    hands = Hands()
    with hands.outbox:
        hands.add(7)
        assert not hands.flushes

    assert hands.flushes == [7]


async def test_waits_in_vain_once():
    """Those that are expected and do not come hold up the others for a moment, and are not expected any more."""
    hands = Hands()
    with hands.outbox:
        hands.add(4)
    hands.end(0.01)
    hands.add()
    assert hands.flushes == [4]
    (wait,) = hands.tasks
    hands.now += WAIT_MAX_S
    await wait()
    assert hands.flushes == [4, 1]
    hands.end(0.01)
    hands.add()
    assert hands.flushes == [4, 1, 1]


async def test_quick_flushes():
    """Where a flush takes next to nothing, nobody waits to share it."""
    hands = Hands()
    with hands.outbox:
        hands.add(4)
    hands.end(0.00001)
    hands.add()

    assert hands.flushes == [4, 1] and not hands.tasks


async def test_more_than_one_flush_takes():
    """What did not fit into a flush goes with the next one, without anything new coming."""
    hands = Hands()
    hands.most = 3
    with hands.outbox:
        hands.add(7)
    hands.end(0.0)
    hands.end(0.0)

    assert hands.flushes == [3, 3, 1]


async def test_timers_of_a_real_loop():
    """On a running event loop the wait ends by itself, and a timer of a group that has begun ends no later one."""
    hands = Hands()
    clock = SystemClock()
    async with anyio.create_task_group() as tasks:
        hands.gathering = Gathering(hands._start, hands.outbox, clock, tasks.start_soon)
        with hands.outbox:
            hands.add(2)
        await anyio.sleep(0.002)
        hands.end()
        hands.add(2)  # complete
        hands.end()
        hands.add()
        with anyio.fail_after(10):
            while len(hands.flushes) < 3:
                await anyio.sleep(0.001)

    assert hands.flushes == [2, 2, 1]


@pytest.mark.parametrize("asleep", range(1, 12))
async def test_one_timer_for_many_groups(monkeypatch, asleep):
    """A group that begins to wait while the timer of an earlier one is asleep is not forgotten, however late."""
    hands = Hands()
    sleeps = 0

    async def sleep(seconds):
        nonlocal sleeps
        sleeps += 1
        hands.now += seconds
        if sleeps == asleep:
            with hands.outbox:
                hands.add(4)
            hands.end(0.01)
            hands.add()

    with hands.outbox:
        hands.add(4)
    hands.end(0.01)
    hands.add()
    assert len(hands.tasks) == 1
    hands.add(3)  # complete before its time
    hands.end(0.01)
    monkeypatch.setattr(gathering.anyio, "sleep", sleep)
    while hands.tasks:
        await hands.tasks.pop()()

    assert hands.flushes == ([4, 4, 4, 1] if asleep <= sleeps else [4, 4])
