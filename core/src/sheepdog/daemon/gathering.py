"""When a group of changes that share one flush is complete.

A flush costs the same for one change as for many, on the disk and on the CPU: two thread switches, a request to the
disk, the wake-up of the loop. Changes that arrive while one runs share the next. When a flush takes less time than a
change takes to come round again (answer, client, next change), most groups would be small: those who were just answered
miss the flush that begins at that moment. So a group waits until as many changes are in it as are known to be under
way: those that the last flush answered and those that came meanwhile. It waits ``FLUSHES_WAITED`` times as long as the
last flush took at most, and never longer than ``WAIT_MAX_S``; whoever waited in vain corrects the expectation. One
change at a time never waits.
"""

from __future__ import annotations

from collections.abc import Callable

import anyio

from sheepdog.contracts.services import Clock
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.spawner import AsyncFunction

FLUSHES_WAITED = 4
WAIT_MAX_S = 0.004
WAIT_MIN_S = 0.0005  # below, the loop's timers are not exact enough to be worth one
TICK_S = 0.001  # of the loop's timers; for less than half of it uvloop does not sleep at all
IDLE_MAX = 8  # times that the timer looks in vain


class Gathering:
    """Groups of changes, one after the other. All methods are called on the event loop."""

    def __init__(
        self,
        start: Callable[[], int],
        outbox: Outbox,
        clock: Clock,
        spawn: Callable[[AsyncFunction], None],
    ) -> None:
        """:param start: begins the flush of what is waiting; returns of how many changes. ``ended`` is called later."""
        self._start = start
        self._outbox = outbox
        self._clock = clock
        self._spawn = spawn
        self._deferred = False
        self._running = False
        self._timed = False
        self._deadline = 0.0  # of the group that waits, 0 when none does
        self._waiting = 0
        self._group = 0  # in the flush that runs
        self._expected = 1
        self._started = 0.0
        self._took = 0.0  # the last flush

    def add(self) -> None:
        """One more change is waiting."""
        self._waiting += 1
        if not self._running and not self._deferred:
            # At the end of the pass, so that everything one receive brought is in the group.
            self._deferred = True
            self._outbox.defer(self._consider)

    def ended(self) -> None:
        """The flush is over. Called before those are answered whose changes it made durable."""
        self._took = self._clock.monotonic() - self._started
        self._running = False
        self._expected = self._group + self._waiting
        if self._waiting:
            self._consider()

    def _consider(self) -> None:
        self._deferred = False
        if self._running or not self._waiting:
            return
        if self._waiting < self._expected:
            wait = min(self._took * FLUSHES_WAITED, WAIT_MAX_S)
            if wait >= WAIT_MIN_S:
                if not self._deadline:
                    self._deadline = self._clock.monotonic() + wait
                    if not self._timed:
                        self._timed = True
                        self._spawn(self._wait)
                return
        self._begin()

    async def _wait(self) -> None:
        """Begins groups whose time has come. One task for many of them: to start one costs more than to wake it up."""
        idle = 0
        while self._deadline or idle < IDLE_MAX:
            left = self._deadline - self._clock.monotonic() if self._deadline else WAIT_MAX_S
            if left > 0:
                idle = 0 if self._deadline else idle + 1
                await anyio.sleep(max(left, TICK_S))
            else:
                with self._outbox:
                    self._begin()
        self._timed = False

    def _begin(self) -> None:
        self._deadline = 0.0
        self._running = True
        self._started = self._clock.monotonic()
        self._group = self._start()
        self._waiting -= self._group
