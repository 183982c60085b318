"""How what was found gets into the store: in the lane of its shard, and never over one that appeared meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import anyio

from sheepdog.contracts.incoming import Incoming
from sheepdog.contracts.services import Executor
from sheepdog.contracts.store import Buffer, ShardKey
from sheepdog.daemon.awaiting import result_of
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.shards import Shards
from sheepdog.model.ids import is_sparse


class PieceWriter:
    """Writes the pieces of one shard as they come: a worker thread takes along all that are there."""

    def __init__(self, incoming: Incoming, executor: Executor, spare: list[bytearray]) -> None:
        """:param spare: where the buffers go that have been written."""
        self._incoming = incoming
        self._executor = executor
        self._spare = spare
        self._ready: deque[tuple[memoryview, int]] = deque()
        self._ready_bytes = 0
        self._writing = False
        self._error: Exception | None = None
        self._ended = anyio.Event()

    def add(self, piece: memoryview, offset: int, at_least: int) -> None:
        """The piece is to be written, and belongs to the writer with its whole buffer.

        :param at_least: so many bytes are worth a change of thread.
        """
        self._ready.append((piece, offset))
        self._ready_bytes += len(piece)
        if self._ready_bytes >= at_least:
            self._start()

    async def all_written(self) -> None:
        """Every piece is in its place.

        :raises SheepdogError: one could not be written.
        """
        if self._ready:
            self._start()
        if self._writing:
            self._ended = anyio.Event()
            await self._ended.wait()
        if self._error is not None:
            raise self._error

    def _start(self) -> None:
        if not self._writing and self._error is None:
            self._writing = True
            self._ready_bytes = 0
            self._executor.submit(self._write, self._written)

    def _write(self) -> None:
        while self._ready:
            piece, offset = self._ready.popleft()
            self._incoming.write(piece, offset_bytes=offset)
            assert isinstance(piece.obj, bytearray), "a buffer of ours"
            self._spare.append(piece.obj)

    def _written(self, error: Exception | None, _: object) -> None:
        self._writing = False
        self._error = error
        if self._ready and error is None:
            self._start()
        else:
            self._ended.set()


class Keeper:
    """Of one sheep."""

    def __init__(self, shards: Shards | None, outbox: Outbox) -> None:
        self._shards = shards
        self._outbox = outbox

    async def store(
        self, key: ShardKey, content: Buffer, size: int, *, replace: bool = False, vouched: bool = True
    ) -> int:
        """The shard is stored; unless one appeared meanwhile, or with ``replace`` in any case. Where checksums do not
        vouch for the content, the copy must not look better than its source."""
        shards, size = self._own(), max(size, len(content))
        store, durable = shards.store, shards.durable

        def work() -> None:
            if replace or not store.exists(key):
                store.create(key, content, offset_bytes=0, size_bytes=size, sparse=is_sparse(key.oid), durable=durable)
                if not vouched:
                    store.doubt(key)

        return await self.in_lane(key, work)

    async def finish(self, key: ShardKey, incoming: Incoming, *, vouched: bool) -> int:
        """As ``store``, for what was received into the store already."""
        shards = self._own()
        store, durable = shards.store, shards.durable

        def work() -> None:
            if store.exists(key):
                incoming.discard()
                return
            try:
                incoming.finish(durable=durable)
            except BaseException:
                incoming.discard()
                raise
            if not vouched:
                store.doubt(key)

        return await self.in_lane(key, work)

    async def in_lane(self, key: ShardKey, work: Callable[[], Any]) -> int:  # Any: not looked at
        """The result of ``work()`` as a change of the shard."""
        shards = self._own()
        return await result_of(self._outbox, lambda done: shards.run(key, work, done))

    def _own(self) -> Shards:
        assert self._shards is not None, "only a sheep with a store holds objects"
        return self._shards
