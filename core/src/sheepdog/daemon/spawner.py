"""Starts tasks from anywhere on the loop, callbacks of a transport or of a worker thread included.

A task group can only be used by a task; the data path has none. So what is to run is queued here, and one task starts
it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

import anyio

AsyncFunction: TypeAlias = Callable[..., Coroutine[Any, Any, object]]  # Any: its arguments, and what a loop sends it


class Spawner:
    """``spawner(async_function, *args)`` starts a task that ends with the spawner at the latest."""

    def __init__(self) -> None:
        self._waiting: list[tuple[AsyncFunction, tuple[Any, ...]]] = []  # Any: arguments
        self._wake: anyio.Event | None = None

    def __call__(self, function: AsyncFunction, *args: Any) -> None:  # Any: arguments
        self._waiting.append((function, args))
        if self._wake is not None:
            self._wake.set()

    async def run(self) -> None:
        """Starts what is queued, until cancelled; what was started is cancelled with it."""
        async with anyio.create_task_group() as tasks:
            while True:
                self._wake = anyio.Event()
                waiting, self._waiting = self._waiting, []
                for function, args in waiting:
                    tasks.start_soon(function, *args)
                if not self._waiting:
                    await self._wake.wait()
