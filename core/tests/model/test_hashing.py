"""FNV-1a and what is built on it, against numbers of the original."""

from hypothesis import given
from hypothesis import strategies as st

from sheepdog.model import hashing
from sheepdog.testing.vectors import vectors


def test_names():
    """VDI names hash as in the original."""
    for row in vectors()["vdi_names"]:
        name = row["name"].encode()
        assert hashing.vdi_hash(name) == int(row["vdi_hash"], 16)
        assert hashing.fnv1a(name) == int(row["fnv1a_64"], 16)
        assert hashing.sd_hash(name) == int(row["sd_hash"], 16)


def test_bytes():
    """Byte strings hash as in the original."""
    for row in vectors()["sd_hash_bytes"]:
        data = bytes.fromhex(row["bytes"])
        assert hashing.fnv1a(data) == int(row["fnv1a_64"], 16)
        assert hashing.sd_hash(data) == int(row["sd_hash"], 16)


def test_oids():
    """Oids hash as in the original."""
    for row in vectors()["sd_hash_oid"]:
        assert hashing.hash_oid(int(row["oid"], 16)) == int(row["hash"], 16)


def test_next():
    """One step along a ring is the original's."""
    for row in vectors()["sd_hash_next"]:
        assert hashing.next_hash(int(row["in"], 16)) == int(row["out"], 16)


def test_attribute_ids():
    """Attribute ids are the original's, at full width of the fields, too."""
    for row in vectors()["attribute_id"]:
        made = hashing.attribute_id(row["name"].encode(), row["tag"].encode(), row["snap_id"], row["key"].encode())
        assert made == int(row["id"], 16)


@given(st.integers(0, (1 << 64) - 1))
def test_unrolled(oid):
    """The unrolled eight-byte forms equal the plain loop."""
    raw = oid.to_bytes(8, "little")

    assert hashing.hash_oid(oid) == hashing.sd_hash(raw)
    assert hashing.next_hash(oid) == hashing.fnv1a(raw, oid)


@given(st.integers(0, (1 << 64) - 1), st.integers(0, 20))
def test_chain(start, count):
    """A chain is the repeated step."""
    value, expected = start, []
    for _ in range(count):
        value = hashing.next_hash(value)
        expected.append(value)

    assert hashing.hash_chain(start, count) == tuple(expected)
