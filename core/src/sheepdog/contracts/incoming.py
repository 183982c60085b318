"""A whole shard that arrives in pieces (``ObjectStore.receive``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sheepdog.contracts.store import Buffer, ObjectStore, ShardKey


class Incoming(ABC):
    """The coming content of one shard, of which nobody sees anything until it is finished.

    Used from worker threads. Errors are those of the store.
    """

    @abstractmethod
    def write(self, data: Buffer, *, offset_bytes: int) -> None:
        """A piece of the content, also beside others.

        :param offset_bytes: a multiple of 4 KiB; no two pieces overlap.
        :raises StoreFull: there is no space for it.
        """

    @abstractmethod
    def finish(self, *, durable: bool) -> None:
        """The shard exists with all pieces, zeros between them. As ``ObjectStore.create``: atomic, and a mutator.

        :raises StoreFull: nothing changed.
        :raises StoreBusy: the store was emptied or has other disks now; nothing changed.
        """

    @abstractmethod
    def discard(self) -> None:
        """It is not wanted any more; has no effect after ``finish``."""


class Gathered(Incoming):
    """For any store: the pieces are gathered in memory and make a shard when all are there."""

    def __init__(self, store: ObjectStore, key: ShardKey, size_bytes: int, *, sparse: bool) -> None:
        self._store = store
        self._key = key
        self._sparse = sparse
        self._size_bytes = size_bytes
        self._content = memoryview(bytearray(size_bytes))

    def write(self, data: Buffer, *, offset_bytes: int) -> None:
        self._content[offset_bytes : offset_bytes + len(data)] = data

    def finish(self, *, durable: bool) -> None:
        self._store.create(
            self._key,
            self._content,
            offset_bytes=0,
            size_bytes=self._size_bytes,
            sparse=self._sparse,
            durable=durable,
        )

    def discard(self) -> None:
        self._content = memoryview(b"")
