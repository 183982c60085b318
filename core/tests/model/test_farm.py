"""Cluster snapshot directories."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.errors import InvalidParameters, ProtocolError
from sheepdog.model import farm, ids
from sheepdog.model.farm import SnapshotLog, SnapshotRecord, TrunkEntry
from sheepdog.model.inode import INODE_BYTES, InodeHeader
from sheepdog.testing.vectors import archive_members, load_json, vectors_path

DIGESTS = st.binary(min_size=20, max_size=20)
U8 = st.integers(0, 255)


@pytest.fixture(scope="module")
def directory():
    return dict(archive_members(vectors_path() / "snapshots" / "cluster-snapshot.tar.gz"))


def content(directory, digest):
    """A content file, whose name must be true."""
    head, rest = farm.content_path(digest)
    data = directory[f"cs/objects/{head}/{rest}"]
    assert farm.digest_of(data) == digest
    return data


def test_recorded_log(directory):
    """The log of the original lists the saves in order and is written back to the same bytes."""
    raw = directory["cs/user_snap"]
    log = SnapshotLog.unpack(raw)

    assert log.pack() == raw
    assert (log.copies, log.copy_policy, log.block_size_shift) == (2, 0, 22)
    rows = load_json("snapshots/cluster-snapshot.json")["list"]
    assert [(record.index, record.tag.decode()) for record in log.records] == [
        (int(row["index"]), row["tag"]) for row in rows
    ]


def test_recorded_objects(directory):
    """Every object of every save is whole, and trunks and slice lists are written back to the same bytes."""
    log = SnapshotLog.unpack(directory["cs/user_snap"])
    used = set()
    inodes = 0
    for record in log.records:
        raw = content(directory, record.trunk)
        trunk = farm.unpack_trunk(raw)
        assert farm.pack_trunk(trunk) == raw
        used.add(record.trunk)
        for entry in trunk:
            listed = content(directory, entry.digest)
            digests = farm.unpack_slice_list(listed)
            assert farm.pack_slice_list(list(digests)) == listed
            used |= {entry.digest, *digests}
            data = b"".join(content(directory, digest) for digest in digests)
            assert [farm.digest_of(part) for part in farm.slices(data)] == list(digests)
            assert len(data) == ids.object_bytes(entry.oid, entry.block_size_shift)
            if ids.is_inode(entry.oid):
                inodes += 1
                header = InodeHeader.unpack(data)
                assert header.is_snapshot
                assert len(data) == INODE_BYTES
                assert ids.inode_oid(header.vdi_id) == entry.oid

    assert inodes > 0
    named = {f"cs/objects/{head}/{rest}" for head, rest in map(farm.content_path, used)}
    assert named | {"cs/user_snap"} == set(directory)


@given(
    U8,
    U8,
    U8,
    st.lists(
        st.builds(
            SnapshotRecord,
            st.integers(0, (1 << 31) - 1),
            st.binary(max_size=255).filter(lambda tag: b"\0" not in tag),
            st.integers(0, (1 << 64) - 1),
            DIGESTS,
        ),
        max_size=3,
    ),
)
def test_log_inverse(copies, policy, shift, records):
    """A log survives packing."""
    log = SnapshotLog(copies, policy, shift, tuple(records))

    assert SnapshotLog.unpack(log.pack()) == log
    assert len(log.pack()) == 32 + 296 * len(records)


@given(st.lists(st.builds(TrunkEntry, st.integers(0, (1 << 64) - 1), U8, U8, U8, DIGESTS), max_size=4))
def test_trunk_inverse(entries):
    """A trunk survives packing."""
    assert farm.unpack_trunk(farm.pack_trunk(entries)) == tuple(entries)


def test_empty_log():
    """A directory that nobody saved to has an empty log."""
    assert SnapshotLog.unpack(b"").records == ()


def test_content_path():
    """A content file is found by the SHA-1 of its content, written in hex."""
    text = hashlib.sha1(b"abc").hexdigest()

    assert farm.content_path(farm.digest_of(b"abc")) == (text[:2], text[2:])


@pytest.mark.parametrize(
    "raw", [bytes(32), bytes(31), SnapshotLog(1, 0, 22).pack() + b"x", b"\x01\xc0\xe1\xfe" + bytes(28)]
)
def test_not_a_log(raw):
    """What is no log, or is cut short, is a protocol error."""
    with pytest.raises(ProtocolError):
        SnapshotLog.unpack(raw)


def test_bad_lengths():
    """Lists that end inside an entry are protocol errors; a long tag is refused."""
    with pytest.raises(ProtocolError):
        farm.unpack_trunk(bytes(33))
    with pytest.raises(ProtocolError):
        farm.unpack_slice_list(bytes(21))
    with pytest.raises(InvalidParameters):
        SnapshotRecord(1, b"x" * 256, 0, bytes(20))
