"""The index of hypervolumes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepdog.errors import InvalidParameters, ProtocolError
from sheepdog.model import btree
from sheepdog.model.btree import BtreeNode
from sheepdog.model.ids import is_btree, vid_of

VID = 0x7C2B25


class Volume:
    """Inode and leaf objects in memory, written in the documented order, as bytes."""

    def __init__(self, leaf_entries_max, inner_entries_max=1000):
        self.root = BtreeNode().pack()
        self.counter = 0
        self.leaves = {}
        self.limits = {"leaf_entries_max": leaf_entries_max, "inner_entries_max": inner_entries_max}

    def set(self, index, owner):
        steps = btree.insert(BtreeNode.unpack(self.root), index, owner, vid=VID, counter=self.counter, **self.limits)
        change = btree.run(steps, self.leaves.__getitem__)
        for oid, leaf in change.leaves.items():
            self.leaves[oid] = leaf.pack()
        self.root = change.root.pack()
        self.counter = change.counter

    def get(self, index):
        return btree.run(btree.lookup(BtreeNode.unpack(self.root), index), self.leaves.__getitem__)


def test_recorded_bytes():
    """A fresh root, and one with object 2, have the original's bytes."""
    volume = Volume(btree.LEAF_ENTRIES_MAX)
    assert volume.root == bytes.fromhex("7462010000000000")

    volume.set(2, VID)
    assert volume.root == bytes.fromhex("7462010001000000 02000000") + VID.to_bytes(4, "little")


def test_capacity():
    """Nodes of 4 MiB hold what the format says."""
    assert btree.LEAF_ENTRIES_MAX == 524287
    assert btree.INNER_ENTRIES_MAX == 262143


@settings(max_examples=150)
@given(
    st.integers(2, 5),
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3)), max_size=80),
)
def test_remembers(leaf_entries_max, writes):
    """Whatever is set, in any order and through any split, every index gives what was set last."""
    volume = Volume(leaf_entries_max)
    expected = {}
    for index, owner in writes:
        volume.set(index, owner)
        expected[index] = owner

    assert {index: volume.get(index) for index in range(62)} == {index: expected.get(index, 0) for index in range(62)}


@settings(max_examples=100)
@given(st.integers(2, 5), st.lists(st.integers(0, 200), max_size=80))
def test_shape(leaf_entries_max, indexes):
    """Entries ascend across leaves, no leaf is too full, and each inner entry states its leaf's highest index."""
    volume = Volume(leaf_entries_max)
    for index in indexes:
        volume.set(index, 1)

    root = BtreeNode.unpack(volume.root)
    if root.depth == btree.LEAF_DEPTH:
        found = [index for index, _ in root.items()]
    else:
        found = []
        for highest, oid in root.items():
            leaf = BtreeNode.unpack(volume.leaves[oid])
            assert is_btree(oid)
            assert vid_of(oid) == VID
            assert 0 < len(leaf) <= leaf_entries_max
            assert leaf.index_at(len(leaf) - 1) == highest
            found += [index for index, _ in leaf.items()]
        assert volume.counter == len(volume.leaves) == len(root)
    assert found == sorted(set(indexes))


def test_first_split():
    """A full root becomes inner over its halves, the lower floor(n/2) entries first."""
    volume = Volume(4)
    for index in (10, 20, 30, 40, 50):
        volume.set(index, index)

    root = BtreeNode.unpack(volume.root)
    leaves = [BtreeNode.unpack(volume.leaves[oid]) for _, oid in root.items()]
    assert [list(leaf.items()) for leaf in leaves] == [[(10, 10), (20, 20)], [(30, 30), (40, 40), (50, 50)]]
    assert [index for index, _ in root.items()] == [20, 50]


def test_clear_keeps_place():
    """Clearing keeps the entry with vid 0; clearing what never was changes nothing."""
    volume = Volume(4)
    volume.set(5, VID)
    volume.set(5, 0)
    volume.set(6, 0)

    assert list(BtreeNode.unpack(volume.root).items()) == [(5, 0)]


def test_full():
    """A root without room for another leaf refuses, and stays as it was."""
    volume = Volume(2, inner_entries_max=2)
    for index in (1, 2, 3):
        volume.set(index, 1)
    before = volume.root

    with pytest.raises(InvalidParameters):
        volume.set(4, 1)
    assert volume.root == before


@pytest.mark.parametrize("index", [-1, 1 << 32])
def test_index_bounds(index):
    """An index that has no place in an entry is refused."""
    with pytest.raises(InvalidParameters):
        Volume(4).set(index, 1)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        bytes(8),
        bytes.fromhex("7462030000000000"),
        bytes.fromhex("7462010001000000"),
        bytes.fromhex("7462020000000000"),
        bytes.fromhex("74620100ffffffff") + bytes(64),
    ],
)
def test_not_a_node(raw):
    """What is no node, or shorter than it says, is a protocol error."""
    with pytest.raises(ProtocolError):
        BtreeNode.unpack(raw)


def test_leaf_depth_ignored():
    """A leaf object is a leaf, whatever its head says about depth."""
    raw = bytes.fromhex("7462020001000000 02000000 252b7c00")

    assert list(BtreeNode.unpack_leaf(raw).items()) == [(2, VID)]
    with pytest.raises(ProtocolError):
        BtreeNode.unpack_leaf(raw[:-1])
    with pytest.raises(ProtocolError):
        BtreeNode.unpack_leaf(raw[:7])
