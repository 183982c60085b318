"""Objects whose shards differ: erasure-coded reads and writes.

The scheme (a plugin) says which bytes of which strips; this module moves them. Strip ``k`` belongs to the holder with
placement index ``k``.

Writes of one object are made in *rounds*. A round runs alone in the object's lane at its primary, so that the
read-modify-write of partial stripes sees no other writer. It takes all writes that came while the round before was
under way, in their order: their stripes are read together, each holder gets one request with all pieces of its strip,
and answers when one flush made them durable. So the more writes are waiting, the less each one costs. A round is one
change: after a crash all of it stays, or all of it is taken back (``striped_undo``).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from struct import Struct
from typing import Any, NamedTuple, TypeAlias

from sheepdog.contracts.redundancy import RedundancyScheme, ShardRange
from sheepdog.contracts.store import Buffer, ShardKey
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.placement import Placement
from sheepdog.daemon.primary import RETRYABLE, Done, FanOut, Primary
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.strip_memory import Pieces
from sheepdog.daemon.striped_undo import StripUndo
from sheepdog.wire.extensions import FORWARD_READ, STRIP_WRITE
from sheepdog.wire.header import Response
from sheepdog.wire.opcodes import Op
from sheepdog.wire.results import Result

ROUND_BYTES_MAX = 8 << 20  # of writes made together, so that what undoes them fits into the journals many times
ROUND_WRITES_MAX = 128
_COUNT = Struct("<H")
_PIECE = Struct("<QI")

ReadDone: TypeAlias = Callable[[int, Any], None]


class Striped:
    """Moves the strips of erasure-coded objects."""

    def __init__(
        self,
        state: SheepState,
        primary: Primary,
        peers: PeerPool,
        shards: Shards | None,
        start: int = 0,
    ) -> None:
        """:param start: of this process: a count that has grown since its last one."""
        self._state = state
        self._primary = primary
        self._peers = peers
        self._shards = shards
        self._waiting: dict[int, deque[Write]] = {}  # by oid, for the next round, which is in the lane
        self.undo = StripUndo(state, primary, peers, shards, start)

    # ---- reads

    def read(self, oid: int, offset: int, length: int, placement: Placement, done: ReadDone) -> None:
        """``done(SUCCESS, bytes)``. Bytes whose strips are missing are computed by the object's primary.

        So is what may be out of step: a change that died half-way must not be seen before it is taken back.
        """
        if oid in self._primary.unsettled.oids:
            self.read_computed(oid, offset, length, placement, done)
            return
        _StripedRead(self, oid, offset, length, placement, done, compute=False).start()

    def read_computed(self, oid: int, offset: int, length: int, placement: Placement, done: ReadDone) -> None:
        """As ``read``, computed from any strips that suffice: by the primary, in the object's lane.

        Strips from before and after a change do not fit together, so nothing is computed while one is under way, and
        one that died half-way is taken back or kept as a whole before.
        """
        if not placement.here:
            if placement.primary_link is None:
                done(Result.NETWORK_ERROR, None)
                return

            def answered(response: Response) -> None:
                done(response.result, response.body)

            placement.primary_link.object_request(
                FORWARD_READ, self._state.epoch, oid, answered, copies=placement.copies, copy_policy=placement.policy,
                offset=offset, length=length,
            )  # fmt: skip
            return
        found: list[Any] = []  # Any: the bytes on success

        def start(finish: Done) -> None:
            def read(result: int, data: Any) -> None:  # Any: as above
                found.append(data)
                finish(result)

            def resolved(result: int) -> None:
                if result:
                    read(result, None)
                else:
                    self._read_alone(oid, offset, length, placement, read)

            recovery = self._primary.recovery
            if recovery is not None and not recovery.must_mend(oid):
                resolved(0)  # all changes of it are complete, but for those that the lane keeps away
            else:
                self.undo.resolve(oid, resolved)

        self._primary.enter(oid, True, start, lambda result: done(result, found[0] if found else None))

    def _read_alone(self, oid: int, offset: int, length: int, placement: Placement, done: ReadDone) -> None:
        _StripedRead(self, oid, offset, length, placement, done, compute=True).start()

    def read_strip(self, oid: int, part: ShardRange, placement: Placement, done: Callable[[int, Any], None]) -> None:
        """The bytes of one strip, from wherever its holder is."""
        node = placement.holders[part.index]
        if node == self._state.me.id and self._shards is not None:
            self._shards.read(ShardKey(oid, part.index), part.offset_bytes, part.length_bytes, done)
            return

        def answered(response: Response) -> None:
            done(response.result, response.body)

        self._peers.link(node).object_request(
            Op.READ_PEER, self._state.epoch, oid, answered, ec_index=part.index, copy_policy=placement.policy,
            offset=part.offset_bytes, length=part.length_bytes,
        )  # fmt: skip

    # ---- writes

    def write(self, oid: int, offset: int, data: Buffer, placement: Placement, done: Done) -> None:
        """Bytes of an existing object are replaced, and its parity with them."""
        if len(data) > ROUND_BYTES_MAX:
            self._write_in_parts(oid, offset, memoryview(data), placement, done)
            return
        waiting = self._waiting.get(oid)
        if waiting is not None:
            waiting.append(Write(offset, data, placement, done))
            return
        self._waiting[oid] = deque((Write(offset, data, placement, done),))
        self._enter(oid)

    def _write_in_parts(self, oid: int, offset: int, data: memoryview, placement: Placement, done: Done) -> None:
        """What is too much for one round, in several."""
        cuts = [0, *range(ROUND_BYTES_MAX - offset % ROUND_BYTES_MAX, len(data), ROUND_BYTES_MAX), len(data)]
        left = len(cuts) - 1
        worst = 0

        def one(result: int) -> None:
            nonlocal left, worst
            left -= 1
            if result and (not worst or worst in RETRYABLE):
                worst = result
            if not left:
                done(worst)

        for start, end in pairwise(cuts):
            self.write(oid, offset + start, data[start:end], placement, one)

    def _enter(self, oid: int) -> None:
        """The next round of the object is in its lane."""
        round_: list[Write] = []

        def start(finish: Done) -> None:
            waiting = self._waiting[oid]
            placement = waiting[0].placement
            size = 0
            while (
                waiting
                and waiting[0].placement is placement
                and len(round_) < ROUND_WRITES_MAX
                and (not round_ or size + len(waiting[0].data) <= ROUND_BYTES_MAX)
            ):
                round_.append(waiting.popleft())
                size += len(round_[-1].data)
            self._write_now(oid, round_, placement, finish)

        def done(result: int) -> None:
            if self._waiting[oid]:
                self._enter(oid)
            else:
                del self._waiting[oid]
            for write in round_:
                write.done(result)

        self._primary.enter(oid, True, start, done)

    def _write_now(self, oid: int, round_: list[Write], placement: Placement, done: Done) -> None:
        recovery = self._primary.recovery
        if recovery is None or recovery.mender is None or not recovery.must_mend(oid):
            self._write_whole(oid, round_, placement, done)
            return

        def mended(result: int) -> None:
            if result:
                done(result)
            else:
                self._write_whole(oid, round_, placement, done)

        # Strips that are missing are computed from strips of the same version, so before one is changed.
        recovery.mender.settle(oid, mended)

    def _write_whole(self, oid: int, round_: list[Write], placement: Placement, done: Done) -> None:
        """The round as whole stripes; what of them nobody writes is read before."""
        scheme = placement.scheme
        if len(round_) == 1:
            offset, data = round_[0].offset, round_[0].data
            if scheme.widen(offset, len(data)) == (offset, len(data)):
                self._send(Op.WRITE_PEER, oid, [(offset, data)], placement, done)
                return
        segments = _Segments(round_, scheme)
        left = len(segments.to_read) + 1
        worst = 0

        def one(offset: int, result: int, old: Any) -> None:  # Any: the bytes on success
            nonlocal left, worst
            left -= 1
            if result:
                worst = worst or result
            elif old is not None:
                segments.fill(offset, old)
            if left:
                return
            if worst:
                done(worst)
                return
            for write in round_:
                segments.fill(write.offset, write.data)
            self._send(Op.WRITE_PEER, oid, segments.made, placement, done)

        for offset, length in segments.to_read:
            self._read_alone(oid, offset, length, placement, partial(one, offset))
        one(0, 0, None)

    def create_now(self, oid: int, offset: int, data: Buffer, placement: Placement, done: Done) -> None:
        """The object exists as strips: ``data``, zeros elsewhere. For a caller that is alone in the lane."""
        if not len(data):
            data = b"\0"  # there is no stripe of nothing; the one that is written holds zeros, as all the others do
        wide_offset, wide_length = placement.scheme.widen(offset, len(data))
        if (wide_offset, wide_length) != (offset, len(data)):
            padded = bytearray(wide_length)
            padded[offset - wide_offset : offset - wide_offset + len(data)] = data
            data = padded
        self._send(Op.CREATE_AND_WRITE_PEER, oid, [(wide_offset, data)], placement, done)

    def _send(self, op: Op, oid: int, parts: list[tuple[int, Buffer]], placement: Placement, done: Done) -> None:
        """Every holder gets its pieces of the parts, which are whole stripes.

        :param op: CREATE_AND_WRITE_PEER, which takes one part, or WRITE_PEER.
        """
        scheme = placement.scheme
        holders = placement.holders
        if len(holders) < scheme.shards_to_read:
            done(Result.SYSTEM_ERROR)
            return
        refused = self._primary.refusal(oid, placement)
        if refused:
            done(refused)
            return
        strangers = self.undo.strangers(holders) if op is Op.WRITE_PEER else None
        if strangers:

            def introduced(result: int) -> None:
                if result:
                    done(result)
                else:
                    self._send(op, oid, parts, placement, done)

            self.undo.introduce(strangers, introduced)
            return
        epoch = self._state.epoch
        shard_bytes = placement.shard_bytes
        fan = FanOut(len(holders), self._primary.unsettled, oid, done)
        number = self.undo.number(fan.sequence)
        if op is Op.CREATE_AND_WRITE_PEER:
            self.undo.forget(oid)
        strips: list[list[tuple[int, Buffer]]] = [[] for _ in holders]
        for offset, data in parts:
            for write in scheme.split(data, offset_bytes=offset)[: len(holders)]:
                strips[write.index].append((write.offset_bytes, write.data))
        low_water = self._primary.unsettled.low_water
        for index, pieces in enumerate(strips):
            node = holders[index]
            ((offset, body),) = pieces if len(pieces) == 1 else ((0, pack_pieces(pieces)),)
            if node != self._state.me.id:
                self._peers.link(node).object_request(
                    op if len(pieces) == 1 else STRIP_WRITE, epoch, oid, fan.answered, ec_index=index,
                    copies=placement.copies, copy_policy=placement.policy, offset=offset, body=body,
                    cow_oid=number, tail=low_water, tgt_epoch=self.undo.start,
                )  # fmt: skip
                continue
            key = ShardKey(oid, index)

            def stored(result: int, _: object) -> None:
                fan.one(self._primary.ended_at(epoch, result))

            if op is Op.CREATE_AND_WRITE_PEER:
                self._primary.shards.create(key, offset, body, shard_bytes, False, stored)
            else:
                self.undo.write(key, tuple(pieces), number, self.undo.start, low_water, holders, stored)


class Write(NamedTuple):
    """A write that waits for its round."""

    offset: int
    data: Buffer
    placement: Placement
    done: Done


class _Segments:
    """The whole stripes that some writes touch, each once, in buffers."""

    __slots__ = ("_starts", "made", "to_read")

    def __init__(self, writes: list[Write], scheme: RedundancyScheme) -> None:
        partial_stripes: list[tuple[int, int]] = []
        wide: list[tuple[int, int]] = []
        for write in writes:
            start, length = scheme.widen(write.offset, len(write.data))
            wide.append((start, start + length))
            if start != write.offset:
                partial_stripes.append(_span(scheme.widen(start, 1)))
            end = write.offset + len(write.data)
            if start + length != end:
                partial_stripes.append(_span(scheme.widen(end, 1)))
        self.to_read = [(start, end - start) for start, end in _merged(partial_stripes)]
        self.made: list[tuple[int, Buffer]] = [(start, bytearray(end - start)) for start, end in _merged(wide)]
        self._starts = [start for start, _ in self.made]

    def fill(self, offset: int, data: Buffer) -> None:
        """``data`` is at its place; it lies in one segment."""
        start, buffer = self.made[bisect_right(self._starts, offset) - 1]
        assert isinstance(buffer, bytearray) and offset + len(data) <= start + len(buffer), (offset, len(data), start)
        buffer[offset - start : offset - start + len(data)] = data


def _span(place: tuple[int, int]) -> tuple[int, int]:
    return place[0], place[0] + place[1]


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans (start, end) that cover the same, in order, without one touching another."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def pack_pieces(pieces: list[tuple[int, Buffer]]) -> bytes:
    """The body of a STRIP_WRITE."""
    heads = (_PIECE.pack(offset, len(data)) for offset, data in pieces)
    return b"".join((_COUNT.pack(len(pieces)), *heads, *(data for _, data in pieces)))


def unpack_pieces(body: Buffer) -> Pieces | None:
    """The pieces in the body of a STRIP_WRITE; ``None`` when it is none."""
    view = memoryview(body)
    if len(view) < _COUNT.size:
        return None
    (count,) = _COUNT.unpack_from(view)
    at = _COUNT.size + count * _PIECE.size
    if not 0 < count <= ROUND_WRITES_MAX or at > len(view):
        return None
    pieces = []
    for index in range(count):
        offset, length = _PIECE.unpack_from(view, _COUNT.size + index * _PIECE.size)
        pieces.append((offset, view[at : at + length]))
        at += length
    return tuple(pieces) if at == len(view) else None


class _StripedRead:
    """One read over strips: asks for what the plan names, plans again without the strips that failed."""

    __slots__ = (
        "_bad",
        "_compute",
        "_done",
        "_left",
        "_length",
        "_offset",
        "_oid",
        "_parts",
        "_placement",
        "_striped",
        "_worst",
    )

    def __init__(
        self,
        striped: Striped,
        oid: int,
        offset: int,
        length: int,
        placement: Placement,
        done: ReadDone,
        *,
        compute: bool,
    ) -> None:
        """:param compute: the caller is alone in the object's lane; otherwise the primary is asked to compute."""
        self._striped = striped
        self._compute = compute
        self._oid = oid
        self._offset = offset
        self._length = length
        self._placement = placement
        self._done = done
        self._parts: dict[ShardRange, Buffer] = {}
        self._bad: dict[int, int] = {}  # strip index -> why
        self._left = 0
        self._worst = 0

    def start(self) -> None:
        scheme = self._placement.scheme
        available = [index for index in range(len(self._placement.holders)) if index not in self._bad]
        plan = scheme.plan_read(self._offset, self._length, available)
        if plan is None:
            reasons = [reason for reason in self._bad.values() if reason != Result.NO_OBJ]
            retryable = [reason for reason in reasons if reason in RETRYABLE]
            if retryable or reasons:
                self._done((retryable or reasons)[0], None)
            else:
                self._done(Result.NO_OBJ if self._bad else Result.SYSTEM_ERROR, None)
            return
        if self._bad and not self._compute:
            self._striped.read_computed(self._oid, self._offset, self._length, self._placement, self._done)
            return
        missing = [part for part in plan if part not in self._parts]
        self._left = len(missing) + 1
        for part in missing:
            self._striped.read_strip(self._oid, part, self._placement, partial(self._one, part))
        self._arrived(plan)

    def _one(self, part: ShardRange, result: int, data: Any) -> None:  # Any: the bytes on success
        if result:
            self._bad[part.index] = result
        else:
            self._parts[part] = data
        self._arrived(None)

    def _arrived(self, _: object) -> None:
        self._left -= 1
        if self._left:
            return
        scheme = self._placement.scheme
        available = [index for index in range(len(self._placement.holders)) if index not in self._bad]
        plan = scheme.plan_read(self._offset, self._length, available)
        if plan is None or any(part not in self._parts for part in plan):
            self.start()
            return
        joined = scheme.join(
            {part: self._parts[part] for part in plan}, offset_bytes=self._offset, length_bytes=self._length
        )
        self._done(0, joined)
