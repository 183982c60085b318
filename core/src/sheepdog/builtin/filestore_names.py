"""Which changes of names may not survive power loss, and which directories have to be flushed for that."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from sheepdog.api import ShardKey

Renamed: TypeAlias = str | ShardKey
"""A directory in which names were made, changed or removed, or a shard whose name was exchanged with another one."""


class Unflushed:
    """Notes of one store. Thread-safe."""

    def __init__(self, flush: Callable[[str], None]) -> None:
        """:param flush: makes the names in a directory durable."""
        self._flush = flush
        self._lock = threading.Lock()
        self._serial = itertools.count(1)
        self._noted: dict[Renamed, int] = {}  # the number of the last change

    def __bool__(self) -> bool:
        return bool(self._noted)

    def __contains__(self, what: Renamed) -> bool:
        return what in self._noted

    def note(self, what: Iterable[Renamed]) -> None:
        """These changed."""
        with self._lock:
            self._noted.update(dict.fromkeys(what, next(self._serial)))

    def flush(self, wanted: Mapping[Renamed, Iterable[str]]) -> None:
        """What changed of these so far survives power loss; costs nothing if nothing did.

        A note stays until the flush is over: another thread whose change that flush covers must wait for it too.

        :param wanted: with the directories whose flush makes it sure.
        """
        changes = {what: self._noted[what] for what in wanted if what in self._noted}
        for directory in sorted({directory for what in changes for directory in wanted[what]}):
            self._flush(directory)
        with self._lock:
            for what, change in changes.items():
                if self._noted.get(what) == change:
                    del self._noted[what]
