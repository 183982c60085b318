"""Checksums of a shard that arrives in pieces: made of each while it is at hand, known when the shard is there."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import TypeAlias

from sheepdog.contracts.incoming import Incoming
from sheepdog.contracts.store import Buffer
from sheepdog.daemon.block_sums import INSIDE, sums_of_new

Replace: TypeAlias = Callable[[bool, Callable[[], None], Callable[[], "array[int]"]], None]


class SummedIncoming(Incoming):
    """``inner`` with the sums of its blocks."""

    def __init__(self, inner: Incoming, size_bytes: int, replace: Replace) -> None:
        """:param replace: ``replace(durable, make, sums)`` makes the shard and takes the sums up."""
        self._inner = inner
        self._size_bytes = size_bytes
        self._replace = replace
        self._sums = sums_of_new(memoryview(b""), 0, size_bytes)

    def write(self, data: Buffer, *, offset_bytes: int) -> None:
        assert not offset_bytes & INSIDE, "pieces begin with a block"
        length = min((len(data) + INSIDE) & ~INSIDE, self._size_bytes - offset_bytes)
        sums = sums_of_new(memoryview(data), 0, length)
        self._inner.write(data, offset_bytes=offset_bytes)
        first = offset_bytes >> 12
        self._sums[first : first + len(sums)] = sums

    def finish(self, *, durable: bool) -> None:
        self._replace(durable, lambda: self._inner.finish(durable=durable), lambda: self._sums)

    def discard(self) -> None:
        self._inner.discard()


class WrappedIncoming(Incoming):
    """``inner``, which becomes a shard in another way: by ``finish(durable=...)``."""

    def __init__(self, inner: Incoming, finish: Callable[..., None]) -> None:
        self._inner = inner
        self._finish = finish

    def write(self, data: Buffer, *, offset_bytes: int) -> None:
        self._inner.write(data, offset_bytes=offset_bytes)

    def finish(self, *, durable: bool) -> None:
        self._finish(durable=durable)

    def discard(self) -> None:
        self._inner.discard()
