"""Objects whose shards differ: erasure-coded reads and writes.

The scheme (a plugin) says which bytes of which strips; this module moves them. Strip ``k`` belongs to the holder with
placement index ``k``. Every write runs alone in the object's lane at its primary, so that the read-modify-write of a partial
stripe sees no other writer.
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

    # ---- reads

    def read(self, oid: int, offset: int, length: int, placement: Placement, done: ReadDone) -> None:
        """``done(SUCCESS, bytes)``, decoded from any strips that suffice."""
        _StripedRead(self, oid, offset, length, placement, done).start()

    def read_strip(
        self, oid: int, part: ShardRange, placement: Placement, done: Callable[[int, Any], None]
    ) -> None:
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

        self.read(oid, wide_offset, wide_length, placement, merge)

    def create_now(self, oid: int, offset: int, data: Buffer, placement: Placement, done: Done) -> None:
        """The object exists as strips: ``data``, zeros elsewhere. For a caller that is alone in the lane."""
        wide_offset, wide_length = placement.scheme.widen(offset, len(data))
        if len(data) and (wide_offset, wide_length) != (offset, len(data)):
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
        epoch = self._state.epoch
        shard_bytes = scheme.shard_bytes(placement.object_bytes)
        fan = FanOut(len(holders), self._primary.unsettled, oid, done)
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
                    shards.write(key, write.offset_bytes, write.data, stored)
            else:
                self._peers.link(node).object_request(
                    op, epoch, oid, fan.answered, ec_index=write.index, copies=placement.copies,
                    copy_policy=placement.policy, offset=write.offset_bytes, body=write.data,
                    cow_oid=fan.sequence, tail=self._primary.unsettled.low_water,
                )  # fmt: skip


class _StripedRead:
    """One read over strips: asks for what the plan names, plans again without the strips that failed."""

    __slots__ = ("_bad", "_done", "_left", "_length", "_offset", "_oid", "_parts", "_placement", "_striped", "_worst")

    def __init__(
        self, striped: Striped, oid: int, offset: int, length: int, placement: Placement, done: ReadDone
    ) -> None:
        self._striped = striped
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
