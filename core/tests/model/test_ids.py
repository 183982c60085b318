"""Object ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.model import ids, inode

VIDS = st.integers(1, (1 << 24) - 1)
INDEXES = st.integers(0, (1 << 32) - 1)


def test_spelling():
    """Oids are spelled as the original names its files."""
    data = ids.data_oid(0x7C2B25, 3)

    assert ids.format_oid(data) == "007c2b2500000003"
    assert ids.format_oid(ids.inode_oid(0x7C2B25)) == "807c2b2500000000"
    assert ids.format_oid(ids.vmstate_oid(0x7C2B25, 1)) == "407c2b2500000001"
    assert ids.format_oid(ids.attribute_oid(0x0222EC, 0xEC1B0F44)) == "200222ecec1b0f44"
    assert ids.format_oid(ids.btree_oid(0x7C2B25, 2)) == "107c2b2500000002"
    assert ids.format_oid(ids.ledger_oid(data)) == "087c2b2500000003"


@given(vid=VIDS, index=INDEXES)
def test_parts(vid, index):
    """Every kind of oid gives back the vid and index it was made of."""
    data = ids.data_oid(vid, index)
    made = [data, ids.vmstate_oid(vid, index), ids.attribute_oid(vid, index), ids.btree_oid(vid, index)]
    made.append(ids.ledger_oid(data))

    assert {ids.vid_of(oid) for oid in made} == {vid}
    assert {ids.index_of(oid) for oid in made} == {index}
    assert ids.vid_of(ids.inode_oid(vid)) == vid
    assert ids.ledger_subject(ids.ledger_oid(data)) == data


@given(vid=VIDS, index=INDEXES)
def test_kinds(vid, index):
    """An oid is of exactly one kind."""
    kinds = (ids.is_data, ids.is_inode, ids.is_vmstate, ids.is_attribute, ids.is_btree, ids.is_ledger)
    oids = [
        ids.data_oid(vid, index),
        ids.inode_oid(vid),
        ids.vmstate_oid(vid, index),
        ids.attribute_oid(vid, index),
        ids.btree_oid(vid, index),
        ids.ledger_oid(ids.data_oid(vid, index)),
    ]

    assert [[kind(oid) for kind in kinds].index(True) for oid in oids] == list(range(6))
    assert all(sum(kind(oid) for kind in kinds) == 1 for oid in oids)


@pytest.mark.parametrize(
    ("oid", "size", "replicated", "sparse"),
    [
        (ids.data_oid(1, 0), 1 << 20, False, False),
        (ids.vmstate_oid(1, 0), 1 << 20, False, False),
        (ids.inode_oid(1), inode.INODE_BYTES, True, True),
        (ids.attribute_oid(1, 0), 66320, False, False),
        (ids.btree_oid(1, 0), 4 << 20, True, False),
        (ids.ledger_oid(ids.data_oid(1, 0)), 4 << 20, True, True),
    ],
)
def test_properties(oid, size, replicated, sparse):
    """Size, redundancy and sparseness follow from the kind alone, except that data obeys the VDI's object size."""
    assert ids.object_bytes(oid, 20) == size
    assert ids.always_replicated(oid) is replicated
    assert ids.is_sparse(oid) is sparse
