"""Generational reference counting."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepdog.errors import InvalidParameters, ProtocolError
from sheepdog.model import ledger
from sheepdog.model.ledger import LEDGER_BYTES, UNSHARED, Drop, drop
from sheepdog.model.limits import GENERATION_MAX

I32 = st.integers(-(1 << 31), (1 << 31) - 1)
LEDGERS = st.lists(I32, max_size=20).map(lambda counters: ledger.decode(ledger.encode(tuple(counters))))


def test_documented_orders():
    """The worked examples: copy first or delete first, both end with nothing."""
    copied = drop(UNSHARED, 1, 0)
    assert copied == (1, -1)
    assert drop(copied, 0, 1) == ()

    deleted = drop(UNSHARED, 0, 1)
    assert deleted == (0, 1)
    assert drop(deleted, 1, 0) == ()


def test_documented_tree():
    """Snapshot, snapshot, clone of the oldest, then deletion of all four, newest first."""
    states = []
    current = UNSHARED
    for generation, count in ((2, 0), (1, 1), (1, 0), (0, 2)):
        current = drop(current, generation, count)
        states.append(current)

    assert states == [(1, 0, -1), (1, -1), (1, -2), ()]


def test_never_shared():
    """Only a pair of zeros means that no ledger is involved."""
    assert Drop(0, 0).never_shared
    assert not Drop(0, 1).never_shared
    assert not Drop(1, 0).never_shared


@settings(max_examples=200)
@given(st.data())
def test_freed_with_the_last_reference(data):
    """In any order of snapshots, clones and drops, the ledger is empty exactly when nobody refers to the object."""
    references = [[0, 0]]  # (generation, count) of every map entry that names the object
    current = UNSHARED
    for _ in range(data.draw(st.integers(1, 25))):
        if data.draw(st.booleans()):
            base = data.draw(st.sampled_from(references))
            references.append([base[0] + 1, 0])
            base[1] += 1
        else:
            generation, count = references.pop(data.draw(st.integers(0, len(references) - 1)))
            if not (generation == 0 and count == 0 and not references and current == UNSHARED):
                current = drop(current, generation, count)
            else:
                current = ()  # never shared: removed without a ledger
        assert (current == ()) == (not references)
        if not references:
            return


@given(LEDGERS)
def test_inverse(counters):
    """A ledger survives encoding, with any number of zeros behind."""
    raw = ledger.encode(counters)

    assert ledger.decode(raw) == counters
    assert ledger.decode(raw + bytes(4 * 5000)) == counters
    assert not counters or counters[-1] != 0


def test_whole_object():
    """A full-size stored ledger is read, its last counter included."""
    raw = bytearray(LEDGER_BYTES)
    raw[:8] = bytes.fromhex("01000000ffffffff")
    assert ledger.decode(raw) == (1, -1)

    raw[-4:] = bytes.fromhex("02000000")
    assert len(ledger.decode(raw)) == LEDGER_BYTES // 4


@given(I32)
def test_wraps(count):
    """Counters are 32 bits and wrap."""
    assert all(-(1 << 31) <= counter < 1 << 31 for counter in drop((-(1 << 31), count), 0, 1 << 31))


@pytest.mark.parametrize("generation", [-1, GENERATION_MAX + 1])
def test_generation_bounds(generation):
    """A generation that has no place in the ledger is refused."""
    with pytest.raises(InvalidParameters):
        drop(UNSHARED, generation, 0)


@pytest.mark.parametrize("size", [1, 4097, LEDGER_BYTES + 4])
def test_bad_size(size):
    """Bytes that are no whole counters, or too many, are no ledger."""
    with pytest.raises(ProtocolError):
        ledger.decode(bytes(size))
