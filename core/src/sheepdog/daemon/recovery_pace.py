"""How fast recovery goes: the operator's throttle, and consideration for clients.

A sheep that has nothing else to do recovers as fast as it can, with several pieces of an object under way. While
requests of clients come in, its own or those that other sheep pass on, it fetches one piece at a time and takes a
breath between them: a small request waits for the pieces that are under way, on the connection and for a core, so there
must be few of them. An object that a request waits for is *urgent*: it takes no breath, and the others stand back.
"""

from __future__ import annotations

from collections.abc import Callable

import anyio

from sheepdog.contracts.services import Clock

LOOK_S = 0.5  # a wait is at most so long before it is looked whether recovery was replaced
AHEAD = 3  # pieces of one object under way while nobody else wants anything
BUSY_S = 0.1  # so long after a client's last request the sheep counts as busy
STAND_BACK_S = 0.1  # at most, for an urgent object whose holders are slow
BREATH_S = 0.004  # from one piece to the next; half a megabyte costs two processes 1 ms in all on the machine of the CI


class Pace:
    """Of one sheep's recovery.

    :param requests: how many requests of clients there were so far.
    """

    def __init__(self, clock: Clock, requests: Callable[[], int]) -> None:
        self._clock = clock
        self._requests = requests
        self._seen = 0
        self._seen_at = -BUSY_S
        self._throttle = (0, 0, False)
        self._changed = anyio.Event()
        self._window_began = 0.0
        self._started = 0
        self._next_piece = 0.0
        self._urgent: set[int] = set()
        self._calm = anyio.Event()

    def throttle(self) -> tuple[int, int, bool]:
        """(objects, milliseconds, on)."""
        return self._throttle

    def set_throttle(self, count: int, interval_ms: int, on: bool) -> None:
        """At most ``count`` objects start per ``interval_ms``."""
        self._throttle = (count, interval_ms, on)
        self._started = 0
        self._window_began = self._clock.monotonic()
        self._changed.set()

    async def turn(self, halted: Callable[[], bool]) -> None:
        """One more object may start, or ``halted()``."""
        while not halted():
            count, interval_ms, on = self._throttle
            now = self._clock.monotonic()
            until = self._window_began + interval_ms / 1000
            if now >= until:
                self._window_began, self._started = now, 0
            if not on or self._started < count:
                self._started += 1
                return
            self._changed = anyio.Event()
            with anyio.move_on_after(min(until - now, LOOK_S)):
                await self._changed.wait()

    def busy(self) -> bool:
        """Clients are at work."""
        now = self._clock.monotonic()
        requests = self._requests()
        if requests != self._seen:
            self._seen, self._seen_at = requests, now
        return now - self._seen_at < BUSY_S

    def hurry(self, oid: int) -> None:
        """A request waits for the object, until ``calm``."""
        self._urgent.add(oid)

    def calm(self, oid: int) -> None:
        """The object is here, or will not be."""
        self._urgent.discard(oid)
        if not self._urgent:
            self._calm.set()

    def ahead(self, oid: int) -> int:
        """How many pieces of the object may be under way at a time."""
        return AHEAD if oid in self._urgent or not self.busy() else 1

    async def breath(self, oid: int) -> None:
        """The next piece of the object may be fetched."""
        if oid in self._urgent:
            return
        if self._urgent:
            self._calm = anyio.Event()
            with anyio.move_on_after(STAND_BACK_S):
                await self._calm.wait()
        if self.busy():
            now = self._clock.monotonic()
            begins = max(now, self._next_piece)
            self._next_piece = begins + BREATH_S
            if begins > now:
                await anyio.sleep(begins - now)
