"""What core hands to plugins: everything nondeterministic, and the in-process volume API."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

from sheepdog.contracts.transport import Transport

Buffer: TypeAlias = bytes | bytearray | memoryview
T = TypeVar("T")

# error is None on success; data is what was read, None for everything else. Called on the loop, never raises.
Done: TypeAlias = Callable[[Exception | None, Any], None]  # Any: a buffer, or a result of the operation's own


class Clock(Protocol):
    """Time as an argument, so that a simulation can own it."""

    def monotonic(self) -> float:
        """Seconds that never run backwards."""

    def time(self) -> float:
        """Seconds since 1970."""


class Executor(Protocol):
    """Runs blocking work away from the event loop; completions come back on the loop in batches."""

    def submit(self, work: Callable[[], T], done: Callable[[Exception | None, T | None], None]) -> None:
        """``work()`` runs on a worker thread, then ``done(error, result)`` on the loop. Callable from the loop only."""

    async def run(self, work: Callable[[], T]) -> T:
        """The result of ``work()``, run on a worker thread. Cancelled, the work still ends, its result is dropped."""


@dataclass(frozen=True, slots=True)
class Services:
    """Clock, randomness, threads and network of one sheep."""

    clock: Clock
    random: random.Random
    executor: Executor
    transport: Transport


@dataclass(frozen=True, slots=True)
class VolumeInfo:
    """A volume or snapshot as a front end lists it."""

    name: str
    vid: int
    size_bytes: int
    object_bytes: int
    snapshot: bool
    tag: str
    snap_id: int


class Volume(Protocol):
    """An open volume. The callback methods make no task; ``done`` may be called before they return.

    Offsets and lengths are bytes; a range beyond the end is the caller's error and answers ``InvalidParameters``.
    Requests run concurrently; a caller that needs an order waits for the first before it submits the second.
    """

    info: VolumeInfo
    read_only: bool

    def read(self, offset: int, length: int, done: Done) -> None:
        """``done(None, buffer)`` with exactly ``length`` bytes; holes read as zeros."""

    def write(self, offset: int, data: Buffer, done: Done) -> None:
        """``done(None, None)`` when every current holder has the data (on stable storage unless ``sheep -n``)."""

    def discard(self, offset: int, length: int, done: Done) -> None:
        """Whole objects inside the range are freed and read as zeros; the rest is left alone."""

    def write_zeroes(self, offset: int, length: int, may_free: bool, done: Done) -> None:
        """The range reads as zeros; with ``may_free`` whole objects are freed."""

    def flush(self, done: Done) -> None:
        """Everything acknowledged before is on stable storage."""

    def extents(self, offset: int, length: int) -> Sequence[tuple[int, bool]]:
        """(length, allocated) pieces covering the range, from the map in memory."""

    async def refresh(self) -> None:
        """``info`` and the map are read again (size may have grown)."""

    def abandon(self) -> None:
        """Whoever this was opened for has gone without a farewell, and may go on elsewhere: a change that is not on its
        way to the disks yet, because it waits for the cluster, fails instead of being made after what is done there.

        New changes fail, too. What is under way still ends. ``aclose`` follows.
        """

    async def aclose(self) -> None:
        """The lock (if any) is released once the last user closed it."""


class Volumes(Protocol):
    """The volumes of the cluster, as a front end sees them."""

    async def list(self) -> Sequence[VolumeInfo]:
        """Everything that can be opened, ordered by name and snapshot id."""

    async def open(self, name: str, *, snapshot: str | int | None = None, read_only: bool = False) -> Volume:
        """An open volume; snapshots are read-only. Opens of one volume in one sheep share state.

        :raises VdiNotFound: no such name.
        :raises TagNotFound: no such snapshot.
        :raises VdiLocked: somebody else holds it (clusters formatted with locks).
        """


async def completed(start: Callable[[Done], None]) -> Any:  # Any: whatever the operation hands to done
    """Turns a callback operation into an await: ``data = await completed(lambda done: volume.read(0, 512, done))``."""
    import anyio

    event = anyio.Event()
    outcome: list[tuple[Exception | None, Any]] = []

    def done(error: Exception | None, data: Any) -> None:
        outcome.append((error, data))
        event.set()

    start(done)
    if not outcome:
        await event.wait()
    error, data = outcome[0]
    if error is not None:
        raise error
    return data


SpawnableTask: TypeAlias = Callable[..., Awaitable[object]]
