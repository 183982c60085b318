"""Objects whose shards differ: erasure-coded reads and writes.

The scheme (a plugin) says which bytes of which strips; this module moves them. Strip ``k`` belongs to the holder with
placement index ``k``. Every write runs alone in the object's lane at its primary, so that the read-modify-write of a
partial stripe sees no other writer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

from sheepdog.contracts.redundancy import ShardRange
from sheepdog.contracts.store import Buffer, ShardKey
from sheepdog.daemon.peers import PeerPool
from sheepdog.daemon.placement import Placement
from sheepdog.daemon.primary import RETRYABLE, Done, FanOut, Primary
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.striped_undo import StripUndo
from sheepdog.wire.extensions import FORWARD_READ
from sheepdog.wire.header import Response
from sheepdog.wire.opcodes import Op
from sheepdog.wire.results import Result

ReadDone: TypeAlias = Callable[[int, Any], None]


class Striped:
    """Moves the strips of erasure-coded objects."""

    def __init__(self, state: SheepState, primary: Primary, peers: PeerPool, shards: Shards | None) -> None:
        self._state = state
        self._primary = primary
        self._peers = peers
        self._shards = shards
        self.undo = StripUndo(state, primary, peers, shards)

    # ---- reads

    def read(self, oid: int, offset: int, length: int, placement: Placement, done: ReadDone) -> None:
        """``done(SUCCESS, bytes)``. Bytes whose strips are missing are computed by the object's primary."""
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
        self._primary.enter(oid, True, lambda finish: self._write_now(oid, offset, data, placement, finish), done)

    def _write_now(self, oid: int, offset: int, data: Buffer, placement: Placement, done: Done) -> None:
        recovery = self._primary.recovery
        if recovery is None or recovery.mender is None or not recovery.must_mend(oid):
            self._write_whole(oid, offset, data, placement, done)
            return

        def mended(result: int) -> None:
            if result:
                done(result)
            else:
                self._write_whole(oid, offset, data, placement, done)

        # Strips that are missing are computed from strips of the same version, so before one is changed.
        recovery.mender.settle(oid, mended)

    def _write_whole(self, oid: int, offset: int, data: Buffer, placement: Placement, done: Done) -> None:
        scheme = placement.scheme
        wide_offset, wide_length = scheme.widen(offset, len(data))
        if (wide_offset, wide_length) == (offset, len(data)):
            self._send(Op.WRITE_PEER, oid, offset, data, placement, done)
            return

        def merge(result: int, old: Any) -> None:  # Any: the bytes on success
            if result:
                done(result)
                return
            merged = bytearray(old)
            merged[offset - wide_offset : offset - wide_offset + len(data)] = data
            self._send(Op.WRITE_PEER, oid, wide_offset, merged, placement, done)

        self._read_alone(oid, wide_offset, wide_length, placement, merge)

    def create_now(self, oid: int, offset: int, data: Buffer, placement: Placement, done: Done) -> None:
        """The object exists as strips: ``data``, zeros elsewhere. For a caller that is alone in the lane."""
        if not len(data):
            data = b"\0"  # there is no stripe of nothing; the one that is written holds zeros, as all the others do
        wide_offset, wide_length = placement.scheme.widen(offset, len(data))
        if (wide_offset, wide_length) != (offset, len(data)):
            padded = bytearray(wide_length)
            padded[offset - wide_offset : offset - wide_offset + len(data)] = data
            data = padded
        self._send(Op.CREATE_AND_WRITE_PEER, oid, wide_offset, data, placement, done)

    def _send(self, op: Op, oid: int, offset: int, data: Buffer, placement: Placement, done: Done) -> None:
        scheme = placement.scheme
        holders = placement.holders
        if len(holders) < scheme.shards_to_read:
            done(Result.SYSTEM_ERROR)
            return
        refused = self._primary.refusal(oid, placement)
        if refused:
            done(refused)
            return
        epoch = self._state.epoch
        shard_bytes = placement.shard_bytes
        fan = FanOut(len(holders), self._primary.unsettled, oid, done)
        number = self.undo.number(fan.sequence)
        if op is Op.CREATE_AND_WRITE_PEER:
            self.undo.forget(oid)
        for write in scheme.split(data, offset_bytes=offset)[: len(holders)]:
            node = holders[write.index]
            if node == self._state.me.id:
                shards = self._primary.shards
                key = ShardKey(oid, write.index)

                def stored(result: int, _: object) -> None:
                    fan.one(self._primary.ended_at(epoch, result))

                if op is Op.CREATE_AND_WRITE_PEER:
                    shards.create(key, write.offset_bytes, write.data, shard_bytes, False, stored)
                else:
                    low_water = self._primary.unsettled.low_water
                    self.undo.write(key, write.offset_bytes, write.data, number, low_water, holders, stored)
            else:
                self._peers.link(node).object_request(
                    op, epoch, oid, fan.answered, ec_index=write.index, copies=placement.copies,
                    copy_policy=placement.policy, offset=write.offset_bytes, body=write.data,
                    cow_oid=number, tail=self._primary.unsettled.low_water,
                )  # fmt: skip


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
