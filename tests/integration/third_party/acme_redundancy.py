"""A redundancy plugin that knows plain copies, and nothing that core does not know already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sheepdog.api import Buffer, ConfigError, RedundancyFactory, RedundancyScheme, ShardRange, ShardWrite, hookimpl

SHEEPDOG_API = (1, 0)


class Mirror(RedundancyScheme):
    policy = 0
    shards_to_read = 1
    identical = True
    shards = 0

    def __init__(self, shards: int) -> None:
        self.shards = shards

    def shard_bytes(self, object_bytes: int) -> int:
        return object_bytes

    def widen(self, offset_bytes: int, length_bytes: int) -> tuple[int, int]:
        return offset_bytes, length_bytes

    def split(self, data: Buffer, *, offset_bytes: int) -> Sequence[ShardWrite]:
        return [ShardWrite(index, offset_bytes, data) for index in range(self.shards)]

    def plan_read(self, offset_bytes: int, length_bytes: int, available: Sequence[int]) -> Sequence[ShardRange] | None:
        return [ShardRange(available[0], offset_bytes, length_bytes)] if available else None

    def join(self, parts: Mapping[ShardRange, Buffer], *, offset_bytes: int, length_bytes: int) -> Buffer:
        (data,) = parts.values()
        return data

    def rebuild(self, index: int, parts: Mapping[int, Buffer]) -> Buffer:
        return next(iter(parts.values()))


class MirrorFactory(RedundancyFactory):
    def accepts(self, policy: int) -> bool:
        return policy == 0

    def scheme(self, policy: int, shards: int) -> RedundancyScheme:
        if policy or not 1 <= shards <= 31:
            raise ConfigError(f"{shards} copies with policy 0x{policy:02x}")
        return Mirror(shards)


@hookimpl
def sheepdog_redundancy() -> RedundancyFactory:
    return MirrorFactory()
