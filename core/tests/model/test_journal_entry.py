"""Journal entries."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.errors import ProtocolError
from sheepdog.model.journal_entry import REPLICA, JournalEntry, JournalKind, entry_bytes, scan
from sheepdog.testing.vectors import store_facts, store_files

U64 = st.integers(0, (1 << 64) - 1)
ENTRIES = st.one_of(
    st.builds(
        JournalEntry,
        st.just(JournalKind.STORE),
        U64,
        U64,
        st.binary(max_size=1500),
        st.booleans(),
        st.integers(REPLICA, 30),
    ),
    st.builds(JournalEntry, st.just(JournalKind.REMOVE), U64, index=st.integers(REPLICA, 30)),
    st.builds(JournalEntry, st.just(JournalKind.STORE), U64, U64, st.binary(max_size=600), checked=st.just(False)),
)


def fields(entry):
    return entry.kind, entry.oid, entry.offset, bytes(entry.data), entry.create, entry.index, entry.checked


def test_recorded():
    """Every entry in the original's journal is found, and written back to the same bytes."""
    store = "one-node-journal-killed"
    listed = store_facts(store)["journal_entries"]
    seen = 0
    for path, content in store_files(store, lambda path: "/journal_file" in path):
        name = path.rsplit("/", 1)[-1]
        found = list(scan(content))
        rows = [row for row in listed.get(name, []) if row["marker_ok"]]
        assert [
            (at, int(one.kind), f"{one.oid:016x}", one.offset, len(one.data), int(one.create)) for at, one in found
        ] == [(row["at"], row["kind"], row["oid"], row["offset"], row["size"], row["create"]) for row in rows]
        for (at, one), row in zip(found, rows, strict=True):
            assert hashlib.sha256(one.data).hexdigest() == row["data_sha256"]
            assert not one.checked
            assert one.pack() == content[at : at + len(one)]
        seen += len(found)

    assert seen > 0


@given(ENTRIES)
def test_inverse(entry):
    """An entry survives packing and takes whole units."""
    packed = entry.pack()

    assert len(packed) == len(entry) == entry_bytes(len(entry.data))
    assert len(packed) % 512 == 0
    assert fields(JournalEntry.unpack(packed)) == fields(entry)


@given(st.lists(ENTRIES, max_size=5), st.integers(0, 3))
def test_scan(entries, gap):
    """All entries are found in order, with unused units between and behind."""
    journal = b"".join(entry.pack() + bytes(512 * gap) for entry in entries) + bytes(2048)

    assert [fields(one.entry) for one in scan(journal)] == [fields(entry) for entry in entries]


@given(ENTRIES, ENTRIES)
def test_torn(first, second):
    """An entry whose end never reached the disk is skipped, the one behind it is found."""
    torn = first.pack()[:-4] + bytes(4)

    assert [fields(one.entry) for one in scan(torn + second.pack())] == [fields(second)]


@given(st.binary(min_size=1, max_size=700), st.data())
def test_flipped(data, draw):
    """A flipped bit anywhere before the end marker of our entries is noticed."""
    packed = bytearray(JournalEntry(JournalKind.STORE, 1, 0, data).pack())
    place = draw.draw(st.one_of(st.integers(0, 39), st.integers(508, 507 + len(data))))
    packed[place] ^= 1 << draw.draw(st.integers(0, 7))

    try:
        read = JournalEntry.unpack(packed)
    except ProtocolError:
        return
    # Only byte 33 can pass: it turns the entry into one of the original's form, which has no checksum.
    assert place == 33
    assert not read.checked


@pytest.mark.parametrize("cut", [0, 511, 1023])
def test_short(cut):
    """An entry that ends before its announced length is a protocol error."""
    with pytest.raises(ProtocolError):
        JournalEntry.unpack(JournalEntry(JournalKind.STORE, 1, 0, b"x" * 100).pack()[:cut])


def test_original_form():
    """Without a checksum everything behind the create flag is zero, as the original writes it."""
    packed = JournalEntry(JournalKind.STORE, 1, 0, b"", create=True, checked=False).pack()

    assert packed[32] == 1
    assert packed[33:508] == bytes(475)
