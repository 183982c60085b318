"""Replication: every shard is the whole object.

The cheapest scheme there is: nothing is computed, nothing is copied, and the same buffer is handed on once per copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sheepdog.api import (
    Buffer,
    ConfigError,
    RedundancyFactory,
    RedundancyScheme,
    ShardRange,
    ShardWrite,
    hookimpl,
)

SHEEPDOG_API = (1, 0)

COPIES_MAX = 31
POLICY_COPIES = 0  # the policy byte of replicated volumes


class Copies(RedundancyScheme):
    """``copies`` whole copies, 1..31."""

    __slots__ = ("_copies",)

    def __init__(self, copies: int) -> None:
        if not 1 <= copies <= COPIES_MAX:
            raise ConfigError(f"{copies} copies are not possible; choose 1 to {COPIES_MAX}")
        self._copies = copies

    def __repr__(self) -> str:
        return f"Copies({self._copies})"

    @property
    def policy(self) -> int:
        return POLICY_COPIES

    @property
    def shards(self) -> int:
        return self._copies

    @property
    def shards_to_read(self) -> int:
        return 1

    @property
    def identical(self) -> bool:
        return True

    def shard_bytes(self, object_bytes: int) -> int:
        return object_bytes

    def widen(self, offset_bytes: int, length_bytes: int) -> tuple[int, int]:
        return offset_bytes, length_bytes

    def split(self, data: Buffer, *, offset_bytes: int) -> Sequence[ShardWrite]:
        return [ShardWrite(index, offset_bytes, data) for index in range(self._copies)]

    def plan_read(self, offset_bytes: int, length_bytes: int, available: Sequence[int]) -> Sequence[ShardRange] | None:
        """One range of the copy that is named first: the caller puts the one that it likes best in front."""
        for index in available:
            if 0 <= index < self._copies:
                return [ShardRange(index, offset_bytes, length_bytes)]
        return None

    def join(self, parts: Mapping[ShardRange, Buffer], *, offset_bytes: int, length_bytes: int) -> Buffer:
        ((source, data),) = parts.items()
        assert source.offset_bytes == offset_bytes and len(data) == length_bytes, (source, offset_bytes, length_bytes)
        return data

    def rebuild(self, index: int, parts: Mapping[int, Buffer]) -> Buffer:
        assert parts and 0 <= index < self._copies, (index, len(parts))
        return next(iter(parts.values()))

    def verify(self, parts: Mapping[int, Buffer]) -> bool:
        # bytes are compared by memcmp, memoryviews item by item
        first, *others = (bytes(part) for part in parts.values())
        return all(first == other for other in others)


class CopiesFactory(RedundancyFactory):
    """Makes ``Copies`` for policy byte 0."""

    def accepts(self, policy: int) -> bool:
        return policy == POLICY_COPIES

    def scheme(self, policy: int, shards: int) -> RedundancyScheme:
        if policy != POLICY_COPIES:
            raise ConfigError(f"policy {policy:#04x} is not replication")
        return Copies(shards)


@hookimpl
def sheepdog_redundancy() -> RedundancyFactory:
    """Replication."""
    return CopiesFactory()
