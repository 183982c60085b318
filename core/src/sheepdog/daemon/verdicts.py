"""Which shards of an object are right: by checksums where there are any, else by comparing them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from typing import TypeVar

from sheepdog.contracts.redundancy import RedundancyScheme
from sheepdog.contracts.store import Buffer

_OUTCOME = Struct("<BBB")

T = TypeVar("T")


class Verdict(IntEnum):
    """What a holder says of a shard of its own."""

    MISSING = 0
    UNKNOWN = 1  # some of it has no checksum
    RIGHT = 2
    CORRUPT = 3


@dataclass(frozen=True, slots=True)
class Look:
    """A shard as its holder sees it; the digest is of what lies there, right or not."""

    verdict: Verdict
    digest: bytes = bytes(20)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a comparison.

    :param damaged: shards that were corrupt, missing or different from the right one.
    :param repaired: how many of them are right now.
    :param undecided: they differ, or are corrupt, and nothing tells what would be right.
    """

    damaged: int = 0
    repaired: int = 0
    undecided: bool = False

    def pack(self) -> bytes:
        return _OUTCOME.pack(min(self.damaged, 255), min(self.repaired, 255), self.undecided)

    @classmethod
    def unpack(cls, variant: bytes) -> Outcome:
        damaged, repaired, undecided = _OUTCOME.unpack_from(variant)
        return cls(damaged, repaired, bool(undecided))


def best_of(looks: Mapping[T, Look], *, by_majority: bool = False) -> bytes | None:
    """The digest of the right copy; ``None`` when nothing tells.

    :param by_majority: a majority of copies that are not corrupt wins over a minority whose checksums are right: it was
        put there on purpose, and somebody asks for what the original does.
    """
    corrupt = {look.digest for look in looks.values() if look.verdict is Verdict.CORRUPT}
    right = Counter(look.digest for look in looks.values() if look.verdict is Verdict.RIGHT)
    if len(right) == 1 and not by_majority:
        return next(iter(right))
    # A copy without checksums is not right if it equals one whose checksums say that it is wrong.
    votes = right + Counter(
        look.digest for look in looks.values() if look.verdict is Verdict.UNKNOWN and look.digest not in corrupt
    )
    if not votes:
        return None
    best, count = votes.most_common(1)[0]
    if count * 2 > votes.total():
        return best
    return next(iter(right)) if len(right) == 1 else None


def judge_strips(
    scheme: RedundancyScheme, parts: Mapping[int, Buffer], right: Set[int], count: int
) -> dict[int, Buffer] | None:
    """What must replace the strips that are wrong or missing; ``None`` when nothing tells which are.

    :param parts: the strips that are not known to be wrong, by index.
    :param right: those of them of which a checksum says that they are right.
    :param count: how many strips there should be.
    """
    need = scheme.shards_to_read
    checked = {index: parts[index] for index in right}
    if len(right) > need and not _fit(scheme, checked):
        return None  # each is as it was stored, and still they are of different changes
    if len(right) >= need:
        base: Mapping[int, Buffer] = checked
    elif len(parts) < need:
        return None
    elif _fit(scheme, parts):
        base = parts
    else:
        # One of them is wrong: without it the others fit, if enough are left for that to mean something.
        suspects = [
            index
            for index in parts
            if index not in right
            and len(parts) - 1 > need
            and _fit(scheme, {other: strip for other, strip in parts.items() if other != index})
        ]
        if len(suspects) != 1:
            return None
        base = {index: strip for index, strip in parts.items() if index != suspects[0]}
    whole = _rebuilt(scheme, base, count)
    return {
        index: strip for index, strip in enumerate(whole) if index not in parts or bytes(parts[index]) != bytes(strip)
    }


def _rebuilt(scheme: RedundancyScheme, parts: Mapping[int, Buffer], count: int) -> list[Buffer]:
    """All strips, computed from the first ones of ``parts`` that suffice."""
    need = scheme.shards_to_read
    known = {index: parts[index] for index in sorted(parts)[:need]}
    data = {index: known[index] if index in known else scheme.rebuild(index, known) for index in range(need)}
    return [data[index] if index < need else scheme.rebuild(index, data) for index in range(count)]


def _fit(scheme: RedundancyScheme, parts: Mapping[int, Buffer]) -> bool:
    whole = _rebuilt(scheme, parts, max(parts) + 1)
    return all(bytes(whole[index]) == bytes(strip) for index, strip in parts.items())
