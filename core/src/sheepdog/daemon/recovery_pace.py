"""How fast recovery goes: the operator's throttle, and consideration for clients.

A sheep that has nothing else to do recovers as fast as it can, with several pieces of an object under way. While
requests of clients come in, its own or those that other sheep pass on, it fetches one piece at a time and takes a
breath between them: a small request waits for the pieces that are under way, on the connection and for a core, so there
must be few of them. The same when a sheep that it fetches from says that clients are at work there. An object that a
request waits for is *urgent*: it takes no breath, and the others stand back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import anyio

from sheepdog.contracts.services import Clock

LOOK_S = 0.5  # a wait is at most so long before it is looked whether recovery was replaced
PIECE_BYTES = 512 << 10  # small answers of the same connection do not wait behind a whole object; fits a core's cache
PIECE_BYTES_MIN = 256 << 10  # while clients are at work
WRITE_BYTES = 2 << 20
AHEAD = 3  # pieces of one object under way while nobody else wants anything
LOOK_AGAIN_S = 0.001
BUSY_S = 0.1  # so long after a client's last request the sheep counts as busy
STAND_BACK_S = 0.1  # at most, for an urgent object whose holders are slow
BREATH_S = 0.004  # from one piece to the next; a small piece costs two processes 0.5 ms in all on the CI's machine


class Pace:
    """Of one sheep's recovery.

    :param requests: how many requests of clients there were so far.
    :param pieces: how many that nobody waits for may be under way at a time while no client is at work.
    """

    def __init__(self, clock: Clock, requests: Callable[[], int], pieces: int) -> None:
        self._clock = clock
        self._requests = requests
        self._seen = 0
        self._seen_at = -BUSY_S
        self._told_at = -BUSY_S
        self._look_at = 0.0
        self._throttle = (0, 0, False)
        self._changed = anyio.Event()
        self._window_began = 0.0
        self._started = 0
        self._next_piece = 0.0
        self._urgent: set[int] = set()
        self._changed_urgency = anyio.Event()
        self._pieces = pieces
        self._window = 1  # of these at the moment: it grows with each that came while no client was at work
        self._under_way = 0  # pieces that nobody waits for
        self._waiting: deque[anyio.Event] = deque()  # to be under way

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

    def look(self) -> None:
        """Called from a timer: a recovery that begins long after the last request finds nobody at work."""
        now = self._clock.monotonic()
        if now < self._look_at:
            return  # a look costs more than what it is asked before
        self._look_at = now + LOOK_AGAIN_S
        requests = self._requests()
        if requests != self._seen:
            self._seen, self._seen_at = requests, now

    def busy_here(self) -> bool:
        """Requests of clients come to this sheep. What others say is left out: two would tell each other for ever."""
        self.look()
        return self._clock.monotonic() - self._seen_at < BUSY_S

    def busy(self) -> bool:
        """Clients are at work, here or where objects are fetched from."""
        return self.busy_here() or self._clock.monotonic() - self._told_at < BUSY_S

    def source_busy(self) -> None:
        """A sheep that something is fetched from has clients at work."""
        self._told_at = self._clock.monotonic()

    def hurry(self, oid: int) -> None:
        """A request waits for the object, until ``calm``."""
        if oid not in self._urgent:
            self._urgent.add(oid)
            self._tell()

    def calm(self, oid: int) -> None:
        """The object is here, or will not be."""
        if oid in self._urgent:
            self._urgent.discard(oid)
            self._tell()

    def _tell(self) -> None:
        event, self._changed_urgency = self._changed_urgency, anyio.Event()
        event.set()
        while self._waiting:
            self._waiting.popleft().set()

    def piece_bytes(self, oid: int) -> int:
        """How much of the object to ask for at a time."""
        return PIECE_BYTES if self._quick(oid) else PIECE_BYTES_MIN

    def _quick(self, oid: int) -> bool:
        return oid in self._urgent or not self.busy()

    def ahead(self, oid: int) -> int:
        """How many pieces of the object may be under way at a time."""
        return AHEAD if self._quick(oid) else 1

    def write_bytes(self, oid: int) -> int:
        """How much of the object is worth a change of thread to write it down."""
        return 0 if oid in self._urgent or self.busy() else WRITE_BYTES

    async def breath(self, oid: int) -> bool:
        """The next piece of the object may be fetched; ``over`` is called with the answer when it is here."""
        stood_back = False
        while oid not in self._urgent:
            if self._urgent and not stood_back:
                stood_back = True
                with anyio.move_on_after(STAND_BACK_S):
                    while self._urgent and oid not in self._urgent:
                        await self._changed_urgency.wait()
            elif self._room() < 1:
                await self._wait_for_room()
            else:
                break
        if oid in self._urgent:
            return False
        self._under_way += 1
        try:
            if self.busy():
                now = self._clock.monotonic()
                begins = max(now, self._next_piece)
                self._next_piece = begins + BREATH_S
                with anyio.move_on_after(begins - now):
                    while begins > now and oid not in self._urgent:
                        await self._changed_urgency.wait()
        except BaseException:
            self.over(True)
            raise
        return True

    def over(self, counted: bool) -> None:
        """A piece is here, or will not be."""
        if counted:
            self._under_way -= 1
            self._window = 1 if self.busy() else min(self._window + 1, self._pieces)
            self._let_in()

    def _room(self) -> int:
        """For so many more pieces that nobody waits for."""
        return (1 if self.busy() else self._window) - self._under_way

    def _let_in(self) -> None:
        for _ in range(min(len(self._waiting), self._room())):
            self._waiting.popleft().set()

    async def _wait_for_room(self) -> None:
        event = anyio.Event()
        self._waiting.append(event)
        try:
            await event.wait()
        except BaseException:
            if event.is_set():
                self._let_in()
            else:
                self._waiting.remove(event)
            raise
