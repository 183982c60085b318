"""From a callback of the data path to an ``await`` of the control plane."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from sheepdog.daemon.outbox import Outbox


async def result_of(outbox: Outbox, start: Callable[[Callable[..., None]], None]) -> int:
    """The result code that an operation ends with: ``start(done)`` begins it, ``done(result, ...)`` ends it."""
    event = anyio.Event()
    results: list[int] = []

    def done(result: int, *_: object) -> None:
        results.append(result)
        event.set()

    with outbox:
        start(done)
    if not results:
        await event.wait()
    return results[0]
