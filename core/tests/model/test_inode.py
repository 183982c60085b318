"""Inodes: bytes of the original, and the arithmetic on maps and references."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.errors import InvalidParameters, ProtocolError
from sheepdog.model import inode
from sheepdog.model.inode import InodeHeader
from sheepdog.testing.vectors import expand, vectors

NAMES = st.binary(max_size=255).filter(lambda name: b"\0" not in name)
U64 = st.integers(0, (1 << 64) - 1)
U32 = st.integers(0, (1 << 32) - 1)
U8 = st.integers(0, 255)
HEADERS = st.builds(InodeHeader, NAMES, NAMES, U64, U64, U64, U64, U64, U8, U8, U8, U8, U32, U32, U32, U32)


def recorded(store):
    for row in vectors()["inodes"][store]:
        content = expand(row["nonzero"], row["size"])
        assert content is not None
        yield row, content


@pytest.mark.parametrize("store", ["one-node-plain", "three-nodes-one-lost", "two-nodes-tree", "three-nodes-erasure"])
def test_recorded(store):
    """Headers of the original are read and written back to the same bytes; file names tell the vid."""
    for row, content in recorded(store):
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        header = InodeHeader.unpack(content)
        assert header.pack() == content[: inode.HEADER_BYTES]
        assert row["size"] == inode.INODE_BYTES
        for path in row["paths"]:
            assert path.endswith(f"/80{header.vdi_id:06x}00000000")


@pytest.mark.parametrize("store", ["one-node-plain", "two-nodes-tree"])
def test_recorded_family(store):
    """An entry that a child still shares with its parent is one generation further there than in the parent."""
    inodes = {InodeHeader.unpack(content).vdi_id: content for _, content in recorded(store)}
    shared = 0
    for content in inodes.values():
        header = InodeHeader.unpack(content)
        if header.parent_vdi_id not in inodes:
            continue
        parent = inodes[header.parent_vdi_id]
        mine, theirs = inode.map_view(content), inode.map_view(parent)
        my_refs, their_refs = inode.refs_view(content), inode.refs_view(parent)
        for index, vid in inode.allocated(mine):
            if vid != header.vdi_id and vid == theirs[index]:
                shared += 1
                assert my_refs[2 * index] == their_refs[2 * index] + 1
                assert their_refs[2 * index + 1] >= 1
            if vid == header.vdi_id:
                assert my_refs[2 * index] == 0

    assert shared > 0


@given(HEADERS)
def test_inverse(header):
    """A header survives packing."""
    assert len(header.pack()) == inode.HEADER_BYTES
    assert InodeHeader.unpack(header.pack()) == header
    assert InodeHeader.unpack(header.pack()[: inode.FIELDS_BYTES]) == header


def test_places():
    """The documented offsets."""
    packed = InodeHeader(b"n", b"t", 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13).pack()

    assert packed[inode.TAG_OFFSET] == ord("t")
    assert packed[inode.CREATE_TIME_OFFSET] == 1
    assert packed[inode.SNAP_CTIME_OFFSET] == 2
    assert packed[inode.VDI_SIZE_OFFSET] == 4
    assert packed[inode.COPY_POLICY_OFFSET] == 6
    assert packed[inode.BTREE_COUNTER_OFFSET] == 13
    assert (inode.map_offset(2), inode.refs_offset(2)) == (4672, 4198984)


def test_short():
    """Fewer bytes than the fields take are a protocol error."""
    with pytest.raises(ProtocolError):
        InodeHeader.unpack(bytes(inode.FIELDS_BYTES - 1))


def test_unterminated_name():
    """A name field without NUL is cut to what a name can be."""
    assert InodeHeader.unpack(b"x" * 512 + bytes(60)).name == b"x" * 255


@pytest.mark.parametrize("name", [b"x" * 256, b"a\0b"])
def test_bad_names(name):
    """A name that does not fit its field cannot be stored."""
    with pytest.raises(InvalidParameters):
        InodeHeader(name)
    with pytest.raises(InvalidParameters):
        InodeHeader(b"n", name)


def test_kinds():
    """Working VDIs, snapshots, clones and deleted ones are told apart by the header."""
    assert InodeHeader(b"n", snap_ctime=1).is_snapshot
    assert not InodeHeader(b"n").is_snapshot
    assert InodeHeader(b"n", snap_id=1, parent_vdi_id=5).is_clone
    assert not InodeHeader(b"n", snap_id=2, parent_vdi_id=5).is_clone
    assert InodeHeader(b"").is_deleted
    assert InodeHeader(b"n", store_policy=1).is_hypervolume


@pytest.mark.parametrize(("size", "shift", "count"), [(0, 22, 0), (1, 22, 1), (1 << 22, 22, 1), ((1 << 22) + 1, 22, 2)])
def test_object_count(size, shift, count):
    """The last object may be used in part."""
    assert inode.object_count(size, shift) == count
    assert InodeHeader(b"n", vdi_size=size, block_size_shift=shift).objects == count


ENTRIES = st.dictionaries(st.integers(0, 5000), st.integers(1, (1 << 24) - 1), max_size=8)


def map_of(entries):
    buffer = bytearray(8192 * 4)
    view = memoryview(buffer).cast("I")
    for index, vid in entries.items():
        view[index] = vid
    return view


@given(ENTRIES)
def test_scan(entries):
    """A scan finds every allocated entry in order, and the used part ends behind the last."""
    view = map_of(entries)

    assert list(inode.allocated(view)) == sorted(entries.items())
    assert inode.used_entries(view) == max(entries, default=-1) + 1


def test_views():
    """Views of whole and of shortened inodes reach as far as whole entries go."""
    whole = bytearray(inode.INODE_BYTES)

    assert len(inode.map_view(whole)) == inode.MAP_ENTRIES
    assert len(inode.refs_view(whole)) == 2 * inode.MAP_ENTRIES
    assert len(inode.map_view(whole[: inode.SHORT_INODE_BYTES])) == inode.MAP_ENTRIES
    assert len(inode.map_view(whole[:4675])) == 2
    assert len(inode.map_view(whole[:4664])) == 0
    assert len(inode.refs_view(whole[: inode.SHORT_INODE_BYTES])) == 0
    inode.map_view(whole)[1] = 0x7C2B25
    assert whole[4668:4672] == bytes.fromhex("252b7c00")


@given(ENTRIES, st.integers(0, 5), st.integers(0, 5))
def test_derive_references(entries, generation, count):
    """A child is one generation further with nothing copied from it; its base has one copy more."""
    view = map_of(entries)
    references = memoryview(bytearray(8192 * 8)).cast("i")
    for index in entries:
        references[2 * index], references[2 * index + 1] = generation, count

    child, base = inode.derive_references(view, references)

    child_view, base_view = memoryview(child).cast("i"), memoryview(base).cast("i")
    assert len(child) == len(base) == 8 * (max(entries, default=-1) + 1)
    for index in range(len(child) // 8):
        used = index in entries
        assert child_view[2 * index : 2 * index + 2].tolist() == ([generation + 1, 0] if used else [0, 0])
        assert base_view[2 * index : 2 * index + 2].tolist() == ([generation, count + 1] if used else [0, 0])
