"""Ledgers: who still refers to a shared data object.

Generational reference counting (Goldberg 1989). Each map entry carries (generation, count): how many snapshot or clone
steps separate it from the object's creator, and how many references were copied from it. The ledger holds, per
generation, references known minus references dropped. Dropping (g, c) takes one from L[g] and adds c to L[g+1]; once
all entries are zero nobody refers to the object, whatever the order of the drops. Entries may be negative in between.

A stored ledger is a 4 MiB object of 32-bit counters, nearly all zero, and a missing one means [1, 0, 0, ...]. Here a
ledger is its used prefix: a tuple of signed integers without trailing zeros. Docs: data model, section 8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from sheepdog.errors import InvalidParameters, ProtocolError
from sheepdog.model.limits import GENERATION_MAX, LEDGER_COUNTERS

Buffer = bytes | bytearray | memoryview

LEDGER_BYTES = 4 * LEDGER_COUNTERS

Ledger: TypeAlias = tuple[int, ...]

UNSHARED: Ledger = (1,)
"""The ledger of an object that has none stored: its creator refers to it."""

_SCAN_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Drop:
    """One reference that a map entry gave up."""

    generation: int
    count: int

    @property
    def never_shared(self) -> bool:
        """The object had no other reference ever: remove it, no ledger is involved."""
        return self.generation == 0 and self.count == 0


def drop(ledger: Ledger, generation: int, count: int) -> Ledger:
    """The ledger after one reference (generation, count) went. ``()`` means that the object is free.

    :param generation: 0 to 1048574.
    :param count: any 32-bit value; counters wrap.
    :raises InvalidParameters: the generation is out of range.
    """
    if not 0 <= generation <= GENERATION_MAX:
        raise InvalidParameters(f"generation {generation} (0 to {GENERATION_MAX})")
    counters = list(ledger)
    counters.extend([0] * (generation + 2 - len(counters)))
    counters[generation] = _wrap32(counters[generation] - 1)
    counters[generation + 1] = _wrap32(counters[generation + 1] + count)
    while counters and counters[-1] == 0:
        counters.pop()
    return tuple(counters)


def decode(buffer: Buffer) -> Ledger:
    """The used prefix of a stored ledger, whole or cut short.

    Trailing zeros are found from the end in blocks, so a full 4 MiB costs a memory compare.

    :raises ProtocolError: more than 4 MiB, or no whole number of counters.
    """
    if len(buffer) > LEDGER_BYTES or len(buffer) % 4:
        raise ProtocolError(f"a ledger has up to {LEDGER_BYTES} bytes in whole counters, not {len(buffer)}")
    view = memoryview(buffer)
    end = len(view)
    zeros = bytes(_SCAN_BYTES)
    while end >= _SCAN_BYTES and view[end - _SCAN_BYTES : end] == zeros:
        end -= _SCAN_BYTES
    counters = view[:end].cast("i").tolist()
    while counters and counters[-1] == 0:
        counters.pop()
    return tuple(counters)


def encode(ledger: Ledger) -> bytes:
    """The bytes of the used prefix; everything behind it in the object is zero.

    When a ledger gets shorter, the writer must also clear what was stored behind.
    """
    return b"".join(counter.to_bytes(4, "little", signed=True) for counter in ledger)


def _wrap32(number: int) -> int:
    return (number + 0x80000000 & 0xFFFFFFFF) - 0x80000000
