"""Conformance kit for redundancy schemes.

A plugin's test module subclasses ``RedundancyKit``, gives factory and schemes, and inherits every check::

    class TestErasure(RedundancyKit):
        cases = [(0x11, 3), (0x22, 6)]

        @pytest.fixture
        def factory(self):
            return ErasureFactory()

The kit keeps a model beside the scheme: one bytearray for the object, one per shard. Whatever is written through
``widen`` and ``split`` must be read back through ``plan_read`` and ``join`` from every sufficient set of shards.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sheepdog.contracts.redundancy import Buffer, RedundancyFactory, RedundancyScheme
from sheepdog.errors import ConfigError

OBJECT_BYTES = 8192

_relaxed = settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


class StoredObject:
    """An object as the shards of a scheme, with the plain bytes beside them."""

    def __init__(self, scheme: RedundancyScheme, size_bytes: int = OBJECT_BYTES) -> None:
        self.scheme = scheme
        self.plain = bytearray(size_bytes)
        self.shards = [bytearray(scheme.shard_bytes(size_bytes)) for _ in range(scheme.shards)]

    def write(self, data: Buffer, offset: int) -> None:
        """As the gateway does it: widen, read what is missing, merge, split, write every shard."""
        self.plain[offset : offset + len(data)] = data
        start, length = self.scheme.widen(offset, len(data))
        merged = bytearray(self.read(start, length, range(self.scheme.shards)))
        merged[offset - start : offset - start + len(data)] = data
        for write in self.scheme.split(merged, offset_bytes=start):
            end = write.offset_bytes + len(write.data)
            self.shards[write.index][write.offset_bytes : end] = write.data

    def read(self, offset: int, length: int, available: Sequence[int]) -> bytes:
        """The range, from some shards."""
        plan = self.scheme.plan_read(offset, length, available)
        assert plan is not None, (offset, length, available)
        parts = {}
        for source in plan:
            assert source.index in available, (source, available)
            shard = self.shards[source.index]
            assert source.length_bytes > 0 and source.offset_bytes + source.length_bytes <= len(shard), source
            parts[source] = bytes(shard[source.offset_bytes : source.offset_bytes + source.length_bytes])
        return bytes(self.scheme.join(parts, offset_bytes=offset, length_bytes=length))

    def fill(self, seed: int) -> None:
        """Random bytes everywhere."""
        self.write(random.Random(seed).randbytes(len(self.plain)), 0)


def _ranges(size: int = OBJECT_BYTES) -> st.SearchStrategy[tuple[int, int]]:
    """(offset, length) with length >= 1, small and large ones alike, many at multiples of 32 and next to them."""
    place = st.one_of(
        st.integers(0, size),
        st.builds(lambda n, d: max(0, min(size, n * 32 + d)), st.integers(0, size // 32), st.integers(-1, 1)),
    )
    return st.tuples(place, place).filter(lambda pair: pair[0] != pair[1]).map(lambda p: (min(p), abs(p[0] - p[1])))


class RedundancyKit:
    """Every redundancy plugin passes this."""

    cases: ClassVar[Sequence[tuple[int, int]]] = ()
    """(policy, shards) pairs to try; at least one."""

    forbidden: ClassVar[Sequence[tuple[int, int]]] = ()
    """Pairs whose policy is accepted but whose number of shards does not fit."""

    @pytest.fixture
    def factory(self) -> RedundancyFactory:
        """What the plugin's hook returns. Subclasses override it."""
        raise AssertionError("a subclass gives the factory")

    def _schemes(self, factory: RedundancyFactory) -> list[RedundancyScheme]:
        assert self.cases, "a subclass gives the cases"
        return [factory.scheme(policy, shards) for policy, shards in self.cases]

    def _sets(self, scheme: RedundancyScheme, seed: int, most: int = 12) -> list[tuple[int, ...]]:
        """Sufficient sets of shards, all of them or a sample, in mixed order."""
        chance = random.Random(seed)
        if scheme.shards <= 8:
            sets = [list(combination) for combination in combinations(range(scheme.shards), scheme.shards_to_read)]
        else:
            sets = [chance.sample(range(scheme.shards), scheme.shards_to_read) for _ in range(most)]
        chance.shuffle(sets)
        for one in sets:
            chance.shuffle(one)
        return [tuple(one) for one in sets[:most]]

    def test_numbers(self, factory: RedundancyFactory) -> None:
        """A scheme has the policy and the number of shards that were asked for, and its numbers are in bounds."""
        for (policy, shards), scheme in zip(self.cases, self._schemes(factory), strict=True):
            assert factory.accepts(policy)
            assert (scheme.policy, scheme.shards) == (policy, shards)
            assert 1 <= scheme.shards_to_read <= scheme.shards <= 31
            assert scheme.identical == (scheme.shard_bytes(OBJECT_BYTES) == OBJECT_BYTES and scheme.shards_to_read == 1)
            assert scheme.shard_bytes(OBJECT_BYTES) * scheme.shards_to_read == OBJECT_BYTES

    def test_refuses_what_does_not_fit(self, factory: RedundancyFactory) -> None:
        """Policy and shards that contradict each other are a ConfigError, not a strange scheme."""
        for policy, shards in self.forbidden:
            with pytest.raises(ConfigError):
                factory.scheme(policy, shards)

    @_relaxed
    @given(span=_ranges())
    def test_widen(self, factory: RedundancyFactory, span: tuple[int, int]) -> None:
        """The widened range contains the range, stays inside the object, and is left alone when widened again."""
        for scheme in self._schemes(factory):
            offset, length = scheme.widen(*span)

            assert 0 <= offset <= span[0] and span[0] + span[1] <= offset + length <= OBJECT_BYTES
            assert scheme.widen(offset, length) == (offset, length)

    @_relaxed
    @given(span=_ranges())
    def test_widen_is_smallest(self, factory: RedundancyFactory, span: tuple[int, int]) -> None:
        """The ends are moved only as far as they must: what one byte needs is what the end needs."""
        for scheme in self._schemes(factory):
            offset, length = scheme.widen(*span)

            assert offset == scheme.widen(span[0], 1)[0]
            last_offset, last_length = scheme.widen(span[0] + span[1] - 1, 1)
            assert offset + length == last_offset + last_length

    def test_split_gives_one_write_per_shard(self, factory: RedundancyFactory) -> None:
        """Writes come in order of index and lie inside the shard; together they carry the data once per strip row."""
        for scheme in self._schemes(factory):
            offset, length = scheme.widen(1000, 2000)
            writes = scheme.split(bytes(length), offset_bytes=offset)

            assert [write.index for write in writes] == list(range(scheme.shards))
            assert len({(write.offset_bytes, len(write.data)) for write in writes}) == 1
            assert writes[0].offset_bytes + len(writes[0].data) <= scheme.shard_bytes(OBJECT_BYTES)
            assert len(writes[0].data) * scheme.shards_to_read == length

    @_relaxed
    @given(spans=st.lists(_ranges(), min_size=1, max_size=6), seed=st.integers(0, 2**32 - 1), reading=_ranges())
    def test_reads_what_was_written(
        self, factory: RedundancyFactory, spans: list[tuple[int, int]], seed: int, reading: tuple[int, int]
    ) -> None:
        """After any writes any range reads the same from all shards and from any set that suffices."""
        for scheme in self._schemes(factory):
            chance = random.Random(seed)
            stored = StoredObject(scheme)
            for offset, length in spans:
                stored.write(chance.randbytes(length), offset)

            expected = bytes(stored.plain[reading[0] : sum(reading)])
            assert stored.read(*reading, available=range(scheme.shards)) == expected
            for available in self._sets(scheme, seed, most=4):
                assert stored.read(*reading, available=available) == expected

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_takes_every_kind_of_buffer(self, factory: RedundancyFactory, kind: type) -> None:
        """bytes, bytearray and memoryview give the same shards, and what was lent is not changed."""
        content = random.Random(7).randbytes(OBJECT_BYTES)
        for scheme in self._schemes(factory):
            lent = kind(content)
            writes = scheme.split(lent, offset_bytes=0)

            assert bytes(lent) == content
            assert [bytes(write.data) for write in writes] == [
                bytes(write.data) for write in scheme.split(content, offset_bytes=0)
            ]

    def test_zeros_stay_zeros(self, factory: RedundancyFactory) -> None:
        """An object of zeros has shards of zeros, so a hole needs no shard."""
        for scheme in self._schemes(factory):
            for write in scheme.split(bytes(OBJECT_BYTES), offset_bytes=0):
                assert not any(bytes(write.data))

    def test_one_byte_touches_one_shard(self, factory: RedundancyFactory) -> None:
        """Where everything is available, a small read asks one shard for no more than it needs."""
        for scheme in self._schemes(factory):
            for offset in (0, 511, 512, 4095, OBJECT_BYTES - 1):
                plan = scheme.plan_read(offset, 1, range(scheme.shards))

                assert plan is not None and [source.length_bytes for source in plan] == [1]

    @_relaxed
    @given(span=_ranges())
    def test_reads_no_more_than_asked(self, factory: RedundancyFactory, span: tuple[int, int]) -> None:
        """Where everything is available, as many bytes are read as asked for."""
        for scheme in self._schemes(factory):
            plan = scheme.plan_read(*span, available=range(scheme.shards))

            assert plan is not None and sum(source.length_bytes for source in plan) == span[1]

    def test_too_few_shards(self, factory: RedundancyFactory) -> None:
        """With one shard less than needed the whole cannot be read, and the scheme says so beforehand."""
        for scheme in self._schemes(factory):
            for available in self._sets(scheme, seed=1):
                assert scheme.plan_read(0, OBJECT_BYTES, available[:-1]) is None
            assert scheme.plan_read(0, OBJECT_BYTES, ()) is None

    def test_rebuild(self, factory: RedundancyFactory) -> None:
        """Every shard comes back from any others that suffice."""
        for scheme in self._schemes(factory):
            stored = StoredObject(scheme)
            stored.fill(seed=3)
            for number, available in enumerate(self._sets(scheme, seed=4)):
                parts = {index: bytes(stored.shards[index]) for index in available}
                for index in range(scheme.shards):
                    if index not in parts and (scheme.shards <= 8 or index % 3 == number % 3):
                        assert bytes(scheme.rebuild(index, parts)) == stored.shards[index], (index, available)

    def test_verify(self, factory: RedundancyFactory) -> None:
        """Shards of one object agree; with a single bit turned in any of them they do not."""
        for scheme in self._schemes(factory):
            stored = StoredObject(scheme)
            stored.fill(seed=5)
            parts = {index: bytes(shard) for index, shard in enumerate(stored.shards)}

            assert scheme.verify(parts)
            if scheme.shards > scheme.shards_to_read:
                for index in range(scheme.shards):
                    turned = bytearray(parts[index])
                    turned[len(turned) // 2] ^= 0x10
                    assert not scheme.verify({**parts, index: bytes(turned)}), index
