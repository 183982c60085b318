"""Attributes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.errors import InvalidParameters, ProtocolError
from sheepdog.model.attribute import ATTRIBUTE_BYTES, Attribute
from sheepdog.model.ids import format_oid, is_attribute
from sheepdog.testing.vectors import store_facts, store_files

TEXT = st.binary(max_size=255).filter(lambda text: b"\0" not in text)
ATTRIBUTES = st.builds(
    Attribute, TEXT, TEXT, st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1), TEXT, st.binary(max_size=300)
)


@given(ATTRIBUTES)
def test_inverse(attribute):
    """An attribute survives packing, whole or without the unused end."""
    packed = attribute.pack()

    assert len(packed) == ATTRIBUTE_BYTES
    assert Attribute.unpack(packed) == attribute
    assert Attribute.unpack(packed[: 784 + len(attribute.value)]) == attribute


@pytest.mark.parametrize("store", ["three-nodes-one-lost", "two-nodes-tree"])
def test_recorded(store):
    """Attribute objects of the original are read, stand where their id says, and are written back the same."""
    found = 0
    for path, content in store_files(store):
        oid = path.rsplit("/", 1)[-1]
        if len(oid) == 16 and oid.startswith("20") and ".stale" not in path:
            attribute = Attribute.unpack(content)
            assert attribute.pack() == content
            assert format_oid(attribute.oid_at(attribute.first_id)) == oid
            found += 1

    assert found > 0
    assert store_facts(store)


def test_largest_value():
    """A value may fill its field, and no more."""
    attribute = Attribute(b"v", key=b"k", value=b"x" * 65536)

    assert Attribute.unpack(attribute.pack()) == attribute
    with pytest.raises(InvalidParameters):
        Attribute(b"v", key=b"k", value=b"x" * 65537)


@pytest.mark.parametrize("field", ["name", "tag", "key"])
def test_long_names(field):
    """Names, tags and keys longer than their fields are refused."""
    with pytest.raises(InvalidParameters):
        Attribute(**{"name": b"v", "key": b"k", field: b"x" * 256})


@pytest.mark.parametrize("cut", [0, 783, 786])
def test_short(cut):
    """An attribute cut short is a protocol error."""
    with pytest.raises(ProtocolError):
        Attribute.unpack(Attribute(b"v", key=b"k", value=b"abc").pack()[:cut])


def test_impossible_value():
    """A value longer than its field is a protocol error."""
    packed = bytearray(Attribute(b"v", key=b"k").pack())
    packed[524:528] = (65537).to_bytes(4, "little")

    with pytest.raises(ProtocolError):
        Attribute.unpack(packed + bytes(1))


def test_slots():
    """A slot is the same if the key and what it belongs to are; the value and time do not matter."""
    one = Attribute(b"v", b"t", 1, 2, b"k", b"x")

    assert one.same_slot(Attribute(b"v", b"t", 9, 2, b"k", b"y"))
    assert not one.same_slot(Attribute(b"v", b"t", 1, 3, b"k", b"x"))
    assert not one.same_slot(Attribute(b"v", b"", 1, 2, b"k", b"x"))
    assert Attribute(b"").is_tombstone


def test_probing_wraps():
    """The search for a slot goes from the highest id to the lowest."""
    assert format_oid(Attribute(b"A").oid_at(1 << 32)) == "200222ec00000000"
    assert is_attribute(Attribute(b"A").oid_at(5))
