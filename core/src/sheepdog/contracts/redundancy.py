"""The redundancy contract (sync, pure): no I/O, no clock, no state.

A scheme says how an object becomes shards and how shards become the object again. Offsets and lengths are bytes of the
object unless a name says ``shard``. A *policy* is the byte stored in inodes: 0 is replication, (d/2)<<4|p is d data and
p parity strips (docs: data model).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview


class ShardRange(NamedTuple):
    """A range of one shard's file."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    offset_bytes: int
    length_bytes: int


class ShardWrite(NamedTuple):
    """Bytes for one shard's file. ``data`` may be shared between shards."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    offset_bytes: int
    data: Buffer


class RedundancyScheme(ABC):
    """One scheme with fixed numbers, for example "3 copies" or "4:2". Immutable."""

    @property
    @abstractmethod
    def policy(self) -> int:
        """The policy byte, 0..255."""

    @property
    @abstractmethod
    def shards(self) -> int:
        """Shards of an object when zones suffice, 1..31. What an inode calls nr_copies."""

    @property
    @abstractmethod
    def shards_to_read(self) -> int:
        """How many shards must be had to know the content, 1..shards."""

    @property
    @abstractmethod
    def identical(self) -> bool:
        """Every shard is the whole object: placement order does not matter and names carry no index."""

    @abstractmethod
    def shard_bytes(self, object_bytes: int) -> int:
        """Size of a shard's file."""

    @abstractmethod
    def widen(self, offset_bytes: int, length_bytes: int) -> tuple[int, int]:
        """The smallest (offset, length) around the range that can be written without reading anything first."""

    @abstractmethod
    def split(self, data: Buffer, *, offset_bytes: int) -> Sequence[ShardWrite]:
        """One write per shard, in order of index.

        :param data: a range that ``widen`` leaves unchanged.
        """

    @abstractmethod
    def plan_read(self, offset_bytes: int, length_bytes: int, available: Sequence[int]) -> Sequence[ShardRange] | None:
        """What to read so that ``join`` can answer; ``None`` if the available shards do not suffice.

        Touches only the shards that hold the range when those are available.
        """

    @abstractmethod
    def join(self, parts: Mapping[ShardRange, Buffer], *, offset_bytes: int, length_bytes: int) -> Buffer:
        """The bytes of the range, from everything that ``plan_read`` asked for."""

    @abstractmethod
    def rebuild(self, index: int, parts: Mapping[int, Buffer]) -> Buffer:
        """The whole shard ``index`` from ``shards_to_read`` other whole shards."""

    def verify(self, parts: Mapping[int, Buffer]) -> bool:
        """Whether whole shards agree with each other (all shards given)."""
        return len({bytes(part) for part in parts.values()}) <= 1


class RedundancyFactory(ABC):
    """What a redundancy plugin makes: schemes by policy byte and number of shards."""

    @abstractmethod
    def accepts(self, policy: int) -> bool:
        """Whether this plugin knows the policy byte."""

    @abstractmethod
    def scheme(self, policy: int, shards: int) -> RedundancyScheme:
        """The scheme for a policy byte. Cached by core.

        :param shards: nr_copies of the volume; must fit the policy.
        :raises ConfigError: policy and shards that the data model forbids.
        """
