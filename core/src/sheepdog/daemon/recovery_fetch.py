"""Finding the newest version of one object among live and set-aside copies of several epochs.

A change that was acknowledged in epoch e is on every holder of that epoch. So the search walks from the present epoch
back, asking the holders of each. A holder of epoch e answers with its live copy, or with a set-aside one whose epoch
is e or later; the first answer is the newest version there is. Going on to an older epoch is right only if nothing
was changed in this one, and that is proved by a holder that is present and has no copy of it. When all holders of an
epoch are absent they may have newer data than anything that can be found, so the search ends in doubt: what is older
must not be served, and must not be cleaned up, until one of them is back.

Members of the last epoch to which everybody had recovered had brought together whatever they had. An older version at
one of its members' former fellow holders is therefore of an object that has been removed since, and is not looked at.

For erasure-coded objects the same walk collects strips until they suffice (``need``): strips of epochs in which
nothing was changed fit together.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from struct import Struct
from typing import Any, TypeAlias

import anyio

from sheepdog.contracts.incoming import Incoming
from sheepdog.contracts.services import Executor
from sheepdog.contracts.store import REPLICA, Buffer, ObjectStore, ShardKey
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.placement import Placement
from sheepdog.daemon.recovery_keep import PieceWriter
from sheepdog.daemon.recovery_pace import PIECE_BYTES, PIECE_BYTES_MIN, Pace
from sheepdog.daemon.state import SheepState
from sheepdog.errors import (
    ObjectNotFound,
    RequestError,
    ShardCorrupt,
    SheepdogError,
    StoreBusy,
    TransportError,
)
from sheepdog.model.node import NodeId
from sheepdog.model.ring import Ring
from sheepdog.wire.header import Request, Response
from sheepdog.wire.opcodes import Flag, Op
from sheepdog.wire.results import Result

logger = logging.getLogger(__name__)

LIVE = 0xFFFFFFFF  # in place of the epoch of a set-aside version
# Variant of an answer: epoch of the version (0: none), Progress.lossy, epoch of a removal, whether no checksums vouch,
# whether whoever answers has clients at work.
VERSION = Struct("<4xIIIII")
RINGS_MAX = 4096

Receive: TypeAlias = Callable[[], Incoming]
RingOf: TypeAlias = Callable[[int], Awaitable[Ring | None]]  # of an epoch; None when nobody knows it


class StaleIndex:
    """Which set-aside versions this sheep has: a directory scan for every question would take too long.

    Used from worker threads.
    """

    def __init__(self, store: Callable[[], ObjectStore]) -> None:
        """:param store: the store in use."""
        self._store = store
        self._lock = threading.Lock()
        self._moving = threading.Lock()  # held while something is set aside, and while all of it is purged
        self._epochs: dict[ShardKey, set[int]] | None = None

    def newest(self, key: ShardKey) -> int:
        """The epoch of the newest version, 0 for none."""
        with self._lock:
            return max(self._all().get(key, ()), default=0)

    def oids(self) -> set[int]:
        """All objects that have a version."""
        with self._lock:
            return {key.oid for key in self._all()}

    def keys(self) -> set[ShardKey]:
        with self._lock:
            return set(self._all())

    def _all(self) -> dict[ShardKey, set[int]]:
        if self._epochs is None:
            found: dict[ShardKey, set[int]] = {}
            for key, epoch in self._store().stale_keys():
                found.setdefault(key, set()).add(epoch)
            self._epochs = found
        return self._epochs

    def retire(self, key: ShardKey, epoch: int) -> None:
        """The live shard is set aside; nobody finds it missing in between. A missing one is none of our business."""
        with self._moving:
            with self._lock:
                self._all().setdefault(key, set()).add(epoch)
            try:
                self._store().retire(key, epoch)
            except ObjectNotFound:
                with self._lock:
                    epochs = self._all().get(key, set())
                    epochs.discard(epoch)
                    if not epochs:
                        self._all().pop(key, None)

    def purge(self, due: Callable[[], bool]) -> None:
        """No set-aside version is left, if ``due()``. What a newer epoch sets aside waits until this is over."""
        with self._moving:
            if not due():
                return
            with self._lock:
                self._epochs = {}
            self._store().purge_stale()

    def forget(self) -> None:
        """The disks changed: the next question looks."""
        with self._lock:
            self._epochs = None


class VersionReader:
    """Reads the version of a shard that an epoch needs, from this sheep's store. Blocks; for worker threads."""

    def __init__(self, store: Callable[[], ObjectStore], index: StaleIndex) -> None:
        self._store = store
        self._index = index

    def read(self, key: ShardKey, epoch: int, view: memoryview, offset: int) -> tuple[int, int]:
        """(bytes read, epoch of the version): the live shard, else the newest version not older than ``epoch``.

        With nothing to give, the count is -1 and the epoch that of the newest older version, 0 for none.
        """
        store = self._store()
        for _ in range(3):  # a shard that is set aside between two looks is found by the next
            try:
                return store.read_into(key, view, offset_bytes=offset), LIVE
            except ObjectNotFound:
                pass
            newest = self._index.newest(key)
            try:
                if newest and newest >= epoch:
                    return store.read_stale_into(key, newest, view, offset_bytes=offset), newest
            except ObjectNotFound:
                self._index.forget()
                continue
            if not store.exists(key):
                return -1, newest
        raise StoreBusy(f"oid={key.oid:016x} is being moved")

    def vouched(self, key: ShardKey, version: int, offset: int, count: int) -> bool:
        """Whether checksums say that what was read is what was stored; asked right after it was."""
        epoch = None if version == LIVE else version
        return self._store().vouched(key, offset_bytes=offset, length_bytes=count, epoch=epoch)


@dataclass(slots=True)
class Found:
    """What a search came to.

    :param parts: strip index (``REPLICA`` for a whole copy) -> content.
    :param version: epoch of the oldest version among the parts, ``LIVE`` when all are live at present holders.
    :param doubtful: holders that may have the object are absent; or they do not answer now (``trouble``); or what they
        have is corrupt.
    :param corrupt: some of it is.
    :param vouched: where the parts come from, checksums say that they are what was stored.
    :param incoming: what was received into the store already, instead of the content of the one part.
    """

    parts: dict[int, Buffer] = field(default_factory=dict)
    version: int = LIVE
    doubtful: bool = False
    corrupt: bool = False
    vouched: bool = True
    incoming: Incoming | None = None


@dataclass(slots=True)
class _Answer:
    content: Buffer | None
    version: int
    lossy: int = 0
    removed: int = 0
    corrupt: bool = False  # there is one, but not what was stored
    vouched: bool = True
    incoming: Incoming | None = None  # that has the content


class Finder:
    """Searches for a sheep that recovers."""

    def __init__(
        self,
        state: SheepState,
        peers: PeerPool,
        executor: Executor,
        outbox: Outbox,
        reader: VersionReader | None,
        lossy: Callable[[], int],
        pace: Pace,
    ) -> None:
        """:param lossy: up to this epoch the local store may lack what it once had."""
        self._state = state
        self._peers = peers
        self._executor = executor
        self._outbox = outbox
        self._reader = reader
        self._lossy = lossy
        self._pace = pace
        self._spare: list[bytearray] = []  # for pieces: new memory is slower than what was used before
        self.corrupt: Callable[[ShardCorrupt], None] = _ignore  # told of corrupt shards of our own
        self.ring_of: RingOf = _no_ring
        self._rings: dict[int, Ring | None] = {}

    def forget_rings(self) -> None:
        """The log of epochs is that of another cluster now, or more of it can be known."""
        self._rings = {}

    async def ring(self, epoch: int) -> Ring | None:
        """The ring of an epoch; remembered."""
        if epoch == self._state.epoch:
            return self._state.ring
        if epoch not in self._rings:
            if len(self._rings) >= RINGS_MAX:
                self._rings = {}
            found = await self.ring_of(epoch)
            if found is None:
                logger.warning("epoch=%d is unknown here, clients may see old data", epoch)
            self._rings[epoch] = found
        return self._rings[epoch]

    async def find(
        self,
        oid: int,
        placement: Placement,
        need: int,
        gathered: int,
        *,
        skip_own: bool,
        live_only: bool = False,
        receive: Receive | None = None,
    ) -> Found:
        """The newest ``need`` shards of the object (1 whole copy, or so many strips).

        :param gathered: the last epoch to which every member had recovered.
        :param skip_own: our live shard is known to be missing.
        :param live_only: only what the present holders have.
        :param receive: how a large copy gets into the store while it is received. The caller finishes or drops it.
        :raises TransportError: a holder that matters does not answer now.
        :raises RequestError: OLD_NODE_VER, the epoch moved on.
        """
        state = self._state
        epoch = state.epoch
        replica = placement.scheme.identical
        present = {node.id for node in state.ring.with_disks}
        found = Found()
        newest: dict[tuple[NodeId, int], _Answer] = {}  # of those that had nothing for a younger epoch
        trouble: TransportError | None = None
        fellows: set[NodeId] | None = None
        removed = 0
        for older in range(epoch, epoch - 1 if live_only else 0, -1):
            ring = await self.ring(older)
            if ring is None:
                continue
            holders = [node.id for node in ring.holders(oid, placement.scheme.shards)]
            if gathered and older < gathered and not found.parts:
                if fellows is None:
                    last = await self.ring(gathered)
                    fellows = {node.id for node in last.nodes} if last is not None else set()
                if not fellows.isdisjoint(holders):
                    continue
            proved = len(holders) < need  # too few for any change of an erasure-coded object
            for position, node in enumerate(holders):
                index = REPLICA if replica else position
                if node not in present or index in found.parts:
                    continue
                if skip_own and older == epoch and node == state.me.id:
                    proved = proved or older > self._lossy()
                    continue
                self._still(epoch)
                answer = newest.get((node, index))
                if answer is None or answer.version >= older:
                    try:
                        answer = await self.ask(node, ShardKey(oid, index), placement, older, receive=receive)
                    except TransportError as error:
                        trouble = error
                        continue
                    newest[node, index] = answer
                    removed = max(removed, answer.removed)
                if answer.corrupt:
                    found.corrupt = True
                    continue
                if removed >= older:
                    self.drop(answer.incoming)
                    return Found()
                if answer.content is not None:
                    found.parts[index] = answer.content
                    found.incoming = answer.incoming
                    found.vouched = found.vouched and answer.vouched
                    found.version = min(found.version, answer.version)
                    if len(found.parts) >= need:
                        return found
                    del newest[node, index]
                elif older > answer.lossy:
                    proved = True
            if holders and not proved:
                if trouble is not None:
                    break
                found.doubtful = True
                break
        if trouble is not None:
            raise trouble
        found.doubtful = found.doubtful or found.corrupt
        return found

    async def find_wildcard(self, oid: int, index: int, placement: Placement) -> Found:
        """The newest version of a shard that any member has, whatever newer ones may have been lost.

        :raises TransportError: one does not answer now, and may have the newest or the only one.
        :raises RequestError: OLD_NODE_VER, the epoch moved on.
        """
        key = ShardKey(oid, index)
        newest = 0
        sources: list[NodeId] = []  # that have this version
        epoch = self._state.epoch
        for node in self._state.ring.with_disks:
            self._still(epoch)
            answer = await self.ask(node.id, key, placement, 1, length=0)
            if answer.version > newest:
                newest, sources = answer.version, []
            if newest and answer.version == newest:
                sources.append(node.id)
        found = Found()
        for source in sources:
            self._still(epoch)
            answer = await self.ask(source, key, placement, 1)
            if answer.corrupt:
                found.corrupt = True
            elif answer.content is not None:
                logger.warning("oid=%016x is taken from node=%s, epoch=%d", oid, source.text, answer.version)
                found.parts[index] = answer.content
                found.vouched = answer.vouched
                found.version = answer.version
                break
        return found

    async def ask(
        self,
        node: NodeId,
        key: ShardKey,
        placement: Placement,
        older: int,
        *,
        length: int | None = None,
        receive: Receive | None = None,
    ) -> _Answer:
        """What ``node`` has of a shard that is live, or was at ``older``.

        :param receive: as for ``find``.
        :raises TransportError: no answer, or not now.
        :raises RequestError: OLD_NODE_VER, the epoch moved on.
        """
        if length is None:
            length = placement.object_bytes
            if key.index != REPLICA:
                length = placement.scheme.shard_bytes(length)
        if node == self._state.me.id:
            return await self._ask_own(key, older, length)
        if length <= PIECE_BYTES_MIN:
            return await self._ask_piece(node, key, placement, older, 0, length)
        return await self._ask_pieces(node, key, placement, older, length, receive)

    async def _ask_pieces(
        self, node: NodeId, key: ShardKey, placement: Placement, older: int, length: int, receive: Receive | None
    ) -> _Answer:
        """As ``ask``, for a large object: several pieces are under way at a time, into one buffer or into the store.

        :raises TransportError: the object was cut off or lost meanwhile, besides what ``ask`` says.
        :raises StoreError: it cannot be stored.
        """
        whole = memoryview(bytearray(length if receive is None else 0))
        incoming = None if receive is None else receive()
        epoch = self._state.epoch
        asked = 0  # up to here
        answers: dict[int, _Answer] = {}
        trouble: list[SheepdogError] = []
        ended = False  # there is no more, or none at all
        under_way = 0

        writer = None if incoming is None else PieceWriter(incoming, self._executor, self._spare)

        async def fetch() -> None:
            nonlocal asked, ended, under_way
            while asked < length:
                offset, size = asked, min(self._pace.piece_bytes(key.oid), length - asked)
                asked += size
                counted = await self._pace.breath(key.oid)
                room = whole[offset : offset + size] if writer is None else memoryview(self._room())[:size]
                try:
                    self._still(epoch)
                    answer = answers[offset] = await self._ask_into(node, key, placement, older, offset, room)
                except SheepdogError as error:
                    trouble.append(error)
                    break
                finally:
                    self._pace.over(counted)
                content = answer.content
                if writer is not None and content is not None and len(content):
                    writer.add(room[: len(content)], offset, self._pace.write_bytes(key.oid))
                ended = ended or content is None or len(content) < size
                ahead = self._pace.ahead(key.oid)  # somebody may have come to wait for it, or clients to work
                if ended or trouble or under_way > ahead:
                    break
                if under_way < ahead and asked < length:
                    start()
            under_way -= 1

        def start() -> None:
            nonlocal under_way
            under_way += 1
            tasks.start_soon(fetch)

        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(self._pace.ahead(key.oid)):
                    start()
            if writer is not None:
                await writer.all_written()
            answer, filled = _joined(node, key, answers, trouble)
            if answer.content is not None:
                answer.content = whole[:filled]
                answer.incoming, incoming = incoming, None
            return answer
        finally:
            self.drop(incoming)

    async def _ask_into(
        self, node: NodeId, key: ShardKey, placement: Placement, older: int, offset: int, view: memoryview
    ) -> _Answer:
        """One piece, which is in its place then."""
        answer = await self._ask_piece(node, key, placement, older, offset, len(view), into=view)
        content = answer.content
        if content is not None and not (isinstance(content, memoryview) and content.obj is view.obj):
            view[: len(content)] = content
        return answer

    def _room(self) -> bytearray:
        return self._spare.pop() if self._spare else bytearray(PIECE_BYTES)

    def drop(self, incoming: Incoming | None) -> None:
        """What was received is not wanted, if anything was."""
        if incoming is not None:
            self._executor.submit(incoming.discard, _gone)

    def rest(self) -> None:
        """Nothing more is to be fetched for now."""
        self._spare = []

    def _still(self, epoch: int) -> None:
        """Nobody left since: who did, and lives, lets requests of later epochs wait for an epoch that it never sees.

        :raises RequestError: OLD_NODE_VER, the epoch moved on.
        """
        if self._state.epoch != epoch:
            raise RequestError("the epoch moved on", result=Result.OLD_NODE_VER)

    async def _ask_own(self, key: ShardKey, older: int, length: int) -> _Answer:
        reader = self._reader
        assert reader is not None, "only a sheep with a store holds objects"

        def work() -> _Answer:
            buffer = memoryview(bytearray(length))
            count, version = reader.read(key, older, buffer, 0)
            if count < 0:
                return _Answer(None, version, self._lossy())
            return _Answer(buffer[:count], version, self._lossy(), vouched=reader.vouched(key, version, 0, count))

        try:
            return await self._executor.run(work)
        except ShardCorrupt as error:
            self.corrupt(error)
            return _Answer(None, LIVE, self._lossy(), corrupt=True)

    async def _ask_piece(
        self,
        node: NodeId,
        key: ShardKey,
        placement: Placement,
        older: int,
        offset: int,
        length: int,
        *,
        into: memoryview | None = None,
    ) -> _Answer:
        response = await self.request(
            node, Op.READ_PEER, key.oid, flags=Flag.RECOVERY, tgt_epoch=older, offset=offset, length=length, into=into,
            ec_index=max(key.index, 0), copy_policy=placement.policy if key.index != REPLICA else 0,
        )  # fmt: skip
        version, lossy, removed, doubted, busy = VERSION.unpack_from(response.variant.ljust(VERSION.size, b"\0"))
        if busy:
            self._pace.source_busy()
        if response.result == Result.NO_OBJ:
            return _Answer(None, version, lossy, removed)
        if response.result == Result.OLD_NODE_VER:
            raise RequestError("the epoch moved on", result=Result.OLD_NODE_VER)
        if response.result == Result.EIO:
            return _Answer(None, LIVE, lossy, removed, corrupt=True)
        if response.result:
            raise TransportError(f"node {node.text} answers 0x{response.result:02x} for oid={key.oid:016x}")
        return _Answer(response.body, version, lossy, removed, vouched=not doubted)

    # ---- requests to one node

    async def request(self, node: NodeId, opcode: int, oid: int, **fields: Any) -> Response:  # Any: of object_request
        """The answer to one object request under the present epoch; NETWORK_ERROR when there is none."""
        return await self._answer(
            lambda done: self._peers.link(node).object_request(opcode, self._state.epoch, oid, done, **fields)
        )

    async def send(self, node: NodeId, request: Request) -> Response:
        """The answer to any other request; NETWORK_ERROR when there is none."""
        return await self._answer(lambda done: self._peers.link(node).send(request, done))

    async def _answer(self, send: Callable[[Callable[[Response], None]], None]) -> Response:
        event = anyio.Event()
        answers: list[Response] = []

        def done(response: Response) -> None:
            answers.append(response)
            event.set()

        with self._outbox:
            send(done)
        await event.wait()
        return answers[0]


def _joined(
    node: NodeId, key: ShardKey, answers: dict[int, _Answer], trouble: Sequence[SheepdogError]
) -> tuple[_Answer, int]:
    """The answer to a question that was asked in pieces, and how many bytes the pieces have.

    :raises SheepdogError: the trouble that there was, or what was answered does not fit together.
    """
    first = answers.pop(0, None)
    if first is None:
        raise trouble[0]
    if first.content is None:
        return first, 0
    for answer in answers.values():
        if answer.corrupt:
            return answer, 0
    if trouble:
        raise trouble[0]
    filled = len(first.content)
    for offset, answer in sorted(answers.items()):
        if answer.content is None or answer.version != first.version:
            raise TransportError(f"node {node.text} moved oid={key.oid:016x} while it was read")
        if offset != filled and len(answer.content):
            raise TransportError(f"oid={key.oid:016x} grew while it was read from node {node.text}")
        filled += len(answer.content)
        first.vouched = first.vouched and answer.vouched
    return first, filled


def _ignore(_: ShardCorrupt) -> None:
    """Nobody wants to know."""


def _gone(error: Exception | None, _: object) -> None:
    if error is not None:
        logger.warning("what was not wanted may be left until the next start: %s", error)


async def _no_ring(_: int) -> Ring | None:
    return None


def indexes(placement: Placement) -> Sequence[int]:
    """The shard indexes that an object has at its present holders, in their order."""
    return (REPLICA,) * len(placement.holders) if placement.scheme.identical else range(len(placement.holders))
