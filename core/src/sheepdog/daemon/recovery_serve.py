"""What a sheep answers to others that recover: which version of a shard it has, and how far recovery came."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sheepdog.contracts.store import ShardKey
from sheepdog.daemon.recovery_fetch import LIVE, VERSION, VersionReader
from sheepdog.daemon.recovery_notes import Progress
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.state import SheepState
from sheepdog.errors import SheepdogError
from sheepdog.wire.header import Request
from sheepdog.wire.opcodes import Flag
from sheepdog.wire.results import Result


class VersionServer:
    """Answers from the store and the notes of one sheep."""

    def __init__(
        self,
        state: SheepState,
        shards: Shards | None,
        reader: VersionReader | None,
        progress: Callable[[], Progress],
        removed: Callable[[int], int],
        busy: Callable[[], bool],
    ) -> None:
        """
        :param removed: the epoch that an object was removed in, 0 for none that is remembered.
        :param busy: clients are at work here.
        """
        self._state = state
        self._shards = shards
        self._reader = reader
        self._progress = progress
        self._removed = removed
        self._busy = busy
        self.served = 0
        """Requests of other sheep that recover, so far."""

    def serve(self, key: ShardKey, request: Request, answer: Callable[[int, Any, bytes], None]) -> None:
        """Another sheep recovers: our live version, else a set-aside one of the epoch it asks for, or newer.

        The range that was asked for is answered, shorter at the end of the object, and which version it is.
        """
        shards, reader = self._shards, self._reader
        assert shards is not None and reader is not None, "asked of a sheep with a store"
        self.served += 1
        if shards.gate is not None and shards.gate(key):
            answer(Result.NETWORK_ERROR, None, b"")
            return
        epoch = 1 if request.flags & Flag.WILDCARD else request.tgt_epoch
        offset, length = request.offset, request.data_length

        view = memoryview(bytearray(length))

        def work() -> tuple[memoryview, int, int, bool]:
            count, version = reader.read(key, epoch, view, offset)
            return view, count, version, count >= 0 and reader.vouched(key, version, offset, count)

        def done(result: int, found: Any) -> None:  # Any: what work() returns
            if result:
                answer(result, None, b"")
                return
            view, count, version, vouched = found
            variant = VERSION.pack(version, self._progress().lossy, self._removed(key.oid), not vouched, self._busy())
            if count < 0:
                answer(Result.NO_OBJ, None, variant)
            else:
                answer(0, view[:count], variant)

        cached = None
        with suppress(SheepdogError):  # a worker finds out what it is
            cached = shards.store.try_read_into(key, view, offset_bytes=offset)
        if cached is not None:
            done(0, (view, cached, LIVE, reader.vouched(key, LIVE, offset, cached)))
        else:
            shards.submit(work, done)

    def point(self, request: Request) -> tuple[int, bytes]:
        """RECOVERY_POINT: result and variant of the answer, which tells the last epoch gathered."""
        if self._progress().ctime != self._state.ctime:
            return Result.NO_OBJ, b""
        return 0, VERSION.pack(self._progress().gathered, 0, 0, 0, 0)
