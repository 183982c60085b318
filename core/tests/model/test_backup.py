"""Backup streams."""

import hashlib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.errors import ProtocolError
from sheepdog.model import backup
from sheepdog.model.backup import BackupRecord
from sheepdog.testing.vectors import backup_stream, load_json, pattern


def entries():
    return {entry["name"]: entry for entry in load_json("backup/backup.json")}


NAMES = ["equal", "mixed", "shift20", "trim", "unaligned"]


@pytest.mark.parametrize("name", NAMES)
def test_recorded(name):
    """A stream of the original has the recorded records and is written back to the same bytes."""
    entry, stream = entries()[name], backup_stream(name)

    records = list(backup.read_backup(io.BytesIO(stream).read))

    assert [(one.index, one.offset, len(one.data), hashlib.sha256(one.data).hexdigest()) for one in records] == [
        (row["index"], row["offset"], row["length"], row["sha256"]) for row in entry["records"]
    ]
    assert b"".join(backup.write_backup(records)) == stream


@pytest.mark.parametrize("name", NAMES)
def test_same_difference(name):
    """The records made from the two contents are the original's."""
    entry = entries()[name]
    size = int(entry["size"].removesuffix("M")) << 20
    object_bytes = 1 << 20 if "20" in entry["create_options"] else 1 << 22
    base = bytearray(size)
    for row in entry["base_writes"]:
        base[row["offset"] : row["offset"] + row["length"]] = pattern(row["seed"], row["offset"], row["length"])
    target = bytearray(base)
    for row in entry["target_writes"]:
        target[row["offset"] : row["offset"] + row["length"]] = pattern(row["seed"], row["offset"], row["length"])
    assert hashlib.sha256(base).hexdigest() == entry["base_sha256"]
    assert hashlib.sha256(target).hexdigest() == entry["target_sha256"]

    made = []
    for index, start in enumerate(range(0, size, object_bytes)):
        old, new = base[start : start + object_bytes], target[start : start + object_bytes]
        change = backup.difference(old, new)
        if change is not None:
            made.append((index, *change))

    assert made == [(row["index"], row["offset"], row["length"]) for row in entry["records"]]


RECORDS = st.lists(
    st.builds(BackupRecord, st.integers(0, 0xFFFFFFFE), st.integers(0, 1 << 20), st.binary(max_size=50)), max_size=5
)


@given(RECORDS)
def test_inverse(records):
    """What is written is read."""
    stream = b"".join(backup.write_backup(records))

    assert list(backup.read_backup(io.BytesIO(stream).read)) == records


@given(RECORDS, st.data())
def test_cut_short(records, data):
    """A stream without its end is a protocol error, wherever it was cut."""
    stream = b"".join(backup.write_backup(records))
    cut = data.draw(st.integers(0, len(stream) - 1))

    with pytest.raises(ProtocolError):
        list(backup.read_backup(io.BytesIO(stream[:cut]).read))


@pytest.mark.parametrize(
    "stream",
    [
        bytes(24),
        bytes.fromhex("0200000092119211") + backup.pack_end(),
        backup.pack_header() + backup.pack_record_head(0, 1 << 31, 1) + b"x" + backup.pack_end(),
    ],
)
def test_not_a_backup(stream):
    """Another magic, another version or a record that fits no object is a protocol error."""
    with pytest.raises(ProtocolError):
        list(backup.read_backup(io.BytesIO(stream).read))


CHANGES = st.lists(st.tuples(st.integers(0, 2047), st.integers(0, 255)), max_size=4)


@given(st.binary(min_size=2048, max_size=2048), CHANGES)
def test_difference(old, changes):
    """Outside the difference both are equal; both of its end sectors really differ."""
    new = bytearray(old)
    for place, value in changes:
        new[place] = value

    found = backup.difference(old, new)

    if found is None:
        assert old == new
        return
    offset, length = found
    end = offset + length
    assert offset % 512 == length % 512 == 0
    assert old[:offset] == new[:offset] and old[end:] == new[end:]
    assert old[offset : offset + 512] != new[offset : offset + 512]
    assert old[end - 512 : end] != new[end - 512 : end]
