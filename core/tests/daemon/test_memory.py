"""Large buffers do not come from the kernel each time, and a sheep that rests holds none."""

from __future__ import annotations

import platform
import subprocess
import sys
from types import SimpleNamespace

import anyio
import pytest

from sheepdog.daemon import sheep as sheep_module
from sheepdog.daemon.sheep import Sheep
from sheepdog.daemon.stats import Stats
from sheepdog.wire.header import Request
from sheepdog.wire.opcodes import Op

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what freed memory becomes is up to the C library")

MEASURE = """
import resource
from sheepdog.daemon.memory import give_back, keep_freed

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

{prepare}
before = resident()
for turn in range(21):
    several = [bytearray(4 << 20) for _ in range(4)]  # as many requests are under way
    del several
    if not turn:
        first = faults()
print(faults() - first)
wide = [bytearray(4 << 20) for _ in range(8)]
del wide
print(resident() - before)
give_back()
print(resident() - before)
"""


def _measure(prepare):
    program = MEASURE.format(prepare=prepare)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return map(int, done.stdout.split())


@glibc
def test_freed_buffers_are_used_again():
    """Twenty times four buffers of 4 MiB cost next to no page faults; without the setting thousands."""
    faults, kept, rested = _measure("keep_freed()")

    assert faults < 100
    assert kept > 24 << 20 and rested < 4 << 20


@glibc
def test_what_the_setting_is_good_for():
    """Without it they come from the kernel, page by page."""
    faults, _, _ = _measure("")

    assert faults > 10_000


@pytest.mark.anyio
async def test_a_sheep_that_rests(monkeypatch):
    """After a while without requests memory is given back, once; after more requests, again."""
    monkeypatch.setattr(sheep_module, "REST_S", 0.005)
    stats, calls = Stats(), []

    async def run(work):
        work()

    resting = SimpleNamespace(resting=lambda: calls.append(stats.requests()), services=SimpleNamespace(executor=None))
    resting.services.executor = SimpleNamespace(run=run)
    one = SimpleNamespace(stats=stats, parts=resting)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(Sheep._rest, one)
        await anyio.sleep(0.05)
        assert calls == []
        for total in (1, 2):
            stats.peer.began(Request(Op.READ_PEER))
            with anyio.fail_after(10):
                while not calls or calls[-1] != total:
                    await anyio.sleep(0.005)
            await anyio.sleep(0.05)
        tasks.cancel_scope.cancel()

    assert calls == [1, 2]
