"""How many shards an object has, and of which kind: the pair (nr_copies, copy_policy) of inodes and requests."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sheepdog.errors import ConfigError, InvalidParameters
from sheepdog.model.limits import COPIES_MAX, DATA_STRIPS, PARITY_STRIPS_MAX

_TEXT = re.compile(r"(\d{1,3})(?::(\d{1,3}))?", re.ASCII)


def data_strips(policy: int) -> int:
    """d of a policy byte; 1 for replication, where every copy is the data."""
    return (policy >> 4) * 2 if policy else 1


def parity_strips(policy: int) -> int:
    """p of a policy byte; 0 for replication."""
    return policy & 0x0F


def policy_byte(data: int, parity: int) -> int:
    """The byte of an erasure code: high nibble d/2, low nibble p.

    :raises InvalidParameters: d is not 2, 4, 8 or 16, or p is not 1..15.
    """
    if data not in DATA_STRIPS or not 1 <= parity <= PARITY_STRIPS_MAX:
        raise InvalidParameters(f"no erasure code {data}:{parity} (data 2, 4, 8 or 16, parity 1 to 15)")
    return data // 2 << 4 | parity


@dataclass(frozen=True, slots=True)
class CopyPolicy:
    """``copies`` shards: whole copies when ``policy`` is 0, else the strips of the erasure code in that byte.

    ``CopyPolicy(0, 0)`` stands for "not said", as in requests that want the cluster's default.

    :raises InvalidParameters: numbers that the data model forbids.
    """

    copies: int
    policy: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.copies <= COPIES_MAX:
            raise InvalidParameters(f"{self.copies} copies (0 to {COPIES_MAX})")
        if self.policy:
            if self.policy != policy_byte(self.data, parity_strips(self.policy)):
                raise InvalidParameters(f"no copy policy 0x{self.policy:02x}")
            strips = self.data + parity_strips(self.policy)
            if self.copies != strips:
                raise InvalidParameters(f"{self.copies} copies, policy 0x{self.policy:02x} has {strips} strips")

    @classmethod
    def parse(cls, text: str) -> CopyPolicy:
        """What ``-c`` takes: ``3`` (1 to 31 copies) or ``4:2`` (data:parity).

        :raises ConfigError: anything else.
        """
        match = _TEXT.fullmatch(text)
        if match is not None:
            first, second = int(match[1]), match[2]
            try:
                if second is None and first >= 1:
                    return cls(first)
                if second is not None:
                    return cls(first + int(second), policy_byte(first, int(second)))
            except InvalidParameters:
                pass
        raise ConfigError(f"Invalid parameter {text}")

    @property
    def erasure(self) -> bool:
        """Shards are strips, not copies."""
        return self.policy != 0

    @property
    def data(self) -> int:
        """How many shards must be had to know the content: d, or 1."""
        return data_strips(self.policy)

    @property
    def parity(self) -> int:
        """How many shards may be lost: p, or copies - 1."""
        return self.copies - self.data

    def __str__(self) -> str:
        return f"{self.data}:{self.parity}" if self.policy else str(self.copies)
