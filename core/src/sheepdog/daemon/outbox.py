"""Output of one pass, written once.

Whatever enters the daemon (bytes on a connection, completions of worker threads, a timer) runs as one *pass*.
Connections that queue output during a pass register here and are flushed when the pass ends, so that the replies to
everything one receive brought leave in one write. Outside a pass output leaves at once.
"""

from __future__ import annotations

from collections.abc import Callable


class Outbox:
    """Collects what must happen at the end of the current pass."""

    __slots__ = ("_deferred", "_depth")

    def __init__(self) -> None:
        self._depth = 0
        self._deferred: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth and self._deferred:
            self._drain()

    def defer(self, action: Callable[[], None]) -> None:
        """``action()`` runs at the end of this pass, or now when there is none."""
        self._deferred.append(action)
        if not self._depth:
            self._drain()

    def _drain(self) -> None:
        # What runs here may defer more; holding the depth keeps that in this loop and in order.
        self._depth += 1
        try:
            while self._deferred:
                actions, self._deferred = self._deferred, []
                for action in actions:
                    action()
        finally:
            self._depth -= 1
