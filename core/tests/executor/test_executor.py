"""Worker threads with batched completions, on every event loop."""

import threading

import anyio
import pytest

from sheepdog.daemon.executor import ThreadExecutor
from sheepdog.errors import SheepdogError
from sheepdog.testing.transport_kit import ASYNCIO, TRIO, UVLOOP, until

pytestmark = pytest.mark.anyio


@pytest.fixture(params=[ASYNCIO, UVLOOP, TRIO])
def anyio_backend(request):
    return request.param


async def test_results_come_back_on_the_loop():
    """Work runs on another thread, its completion on the loop's, with the result."""
    loop_thread = threading.get_ident()
    seen = []
    async with ThreadExecutor(2) as executor:
        executor.submit(threading.get_ident, lambda error, result: seen.append((error, result, threading.get_ident())))
        await until(lambda: seen, "the completion")

    ((error, worker, here),) = seen
    assert error is None
    assert worker != loop_thread
    assert here == loop_thread


async def test_errors_are_handed_over():
    """An exception of the work is the error of its completion; run() raises it."""
    seen = []

    def fail():
        raise KeyError("gone")

    async with ThreadExecutor(1) as executor:
        executor.submit(fail, lambda error, result: seen.append((error, result)))
        with pytest.raises(KeyError, match="gone"):
            await executor.run(fail)

    ((error, result),) = seen
    assert isinstance(error, KeyError)
    assert result is None


async def test_a_thread_survives_everything():
    """SystemExit inside work is an error of that work and does not cost the thread."""

    def leave():
        raise SystemExit(3)

    async with ThreadExecutor(1) as executor:
        with pytest.raises(SheepdogError):
            await executor.run(leave)
        assert await executor.run(lambda: 5) == 5


async def test_every_completion_once():
    """Two thousand pieces of work: each completion comes once, with its own result."""
    seen = []
    async with ThreadExecutor(4) as executor:
        for index in range(2000):
            executor.submit(lambda index=index: index, lambda error, result: seen.append(result))
        await until(lambda: len(seen) == 2000, "all completions")

    assert sorted(seen) == list(range(2000))


async def test_work_runs_together_up_to_the_limit():
    """max_workers pieces of work run at once and no more."""
    barrier = threading.Barrier(3, timeout=20)
    running = []
    most = []
    lock = threading.Lock()

    def work():
        with lock:
            running.append(1)
            most.append(len(running))
        barrier.wait()
        with lock:
            running.pop()

    async with ThreadExecutor(3) as executor:
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(executor.run, work)

    assert max(most) == 3


async def test_one_wake_up_for_a_batch():
    """Work that finishes while the loop is busy is delivered by one wake-up."""
    wakes = []
    seen = []
    all_done = threading.Event()
    async with ThreadExecutor(1) as executor:
        await executor.run(lambda: None)
        wake = executor._wake
        executor._wake = lambda: (wakes.append(1), wake())
        for _ in range(50):
            executor.submit(lambda: None, lambda error, result: seen.append(1))
        executor.submit(all_done.set, lambda error, result: seen.append(1))
        assert all_done.wait(20)  # the loop is held up on purpose

        await until(lambda: len(seen) == 51, "all completions")

    assert 1 <= len(wakes) <= 2


async def test_the_end_waits_for_work():
    """Leaving the context waits for work that was submitted and delivers its completion; the threads are gone then."""
    gate = threading.Event()
    seen = []
    before = threading.active_count()
    async with ThreadExecutor(2) as executor:
        executor.submit(lambda: gate.wait(20), lambda error, result: seen.append(result))
        executor.submit(lambda: gate.set(), lambda error, result: seen.append(result))

    assert sorted(seen, key=str) == [None, True]
    assert threading.active_count() <= before


async def test_cancelled_run():
    """A cancelled run() drops the result; the work still ends and the executor goes on."""
    gate = threading.Event()
    ended = []

    def work():
        gate.wait(20)
        ended.append(1)

    async with ThreadExecutor(1) as executor:
        with anyio.move_on_after(0.01) as scope:
            await executor.run(work)
        assert scope.cancelled_caught
        gate.set()
        assert await executor.run(lambda: 7) == 7

    assert ended == [1]


async def test_a_failing_completion_is_contained(caplog):
    """A completion that raises is logged; the others are delivered."""
    seen = []

    def bad(error, result):
        raise ValueError("a broken completion")

    async with ThreadExecutor(1) as executor:
        executor.submit(lambda: 1, bad)
        executor.submit(lambda: 2, lambda error, result: seen.append(result))

    assert seen == [2]
    assert "a completion failed" in caplog.text


async def test_completions_may_submit_more():
    """A completion may submit the next piece of work, and the end waits for that as well."""
    seen = []
    async with ThreadExecutor(1) as executor:

        def again(error, result):
            seen.append(result)
            if result < 5:
                executor.submit(lambda: result + 1, again)

        executor.submit(lambda: 0, again)

    assert seen == [0, 1, 2, 3, 4, 5]
