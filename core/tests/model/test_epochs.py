"""Epoch files and logs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.errors import InvalidParameters, ProtocolError
from sheepdog.model import epochs
from sheepdog.model.clusterinfo import ClusterFlag
from sheepdog.model.epochs import EpochLogEntry, EpochRecord
from sheepdog.model.node import Node, NodeId

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
NODES = st.lists(
    st.builds(Node, st.builds(NodeId, st.binary(min_size=16, max_size=16), st.integers(0, 0xFFFF)), st.integers(0, 9)),
    max_size=4,
).map(tuple)
ENTRIES = st.builds(
    EpochLogEntry,
    time=U64,
    epoch=U32,
    nodes=NODES,
    ctime=U64,
    disable_recovery=st.booleans(),
    copies=st.integers(0, 255),
    copy_policy=st.integers(0, 255),
    flags=st.integers(0, 63).map(ClusterFlag),
    store=st.sampled_from(["", "plain", "tree"]),
)


@given(NODES, st.integers(-(1 << 63), (1 << 63) - 1))
def test_record_inverse(nodes, time):
    """An epoch file survives packing."""
    record = EpochRecord(nodes, time)

    assert EpochRecord.unpack(record.pack()) == record
    assert len(record.pack()) == 80 * len(nodes) + 8


@given(st.lists(ENTRIES, max_size=3), st.integers(4, 6))
def test_log_inverse(entries, slots):
    """A log survives packing, whatever the number of slots."""
    packed = epochs.pack_epoch_log(entries, slots)

    assert epochs.unpack_epoch_log(packed, slots) == tuple(entries)
    assert len(packed) == (48 + 80 * slots) * len(entries)


def test_slots_too_few():
    """Nodes that do not fit their slots are refused, going out and coming in."""
    entry = EpochLogEntry(1, 1, (Node(NodeId.of("10.0.0.1", 1)),) * 2)

    with pytest.raises(InvalidParameters):
        entry.pack(1)
    with pytest.raises(ProtocolError):
        EpochLogEntry.unpack(entry.pack(2)[:-1])


@pytest.mark.parametrize("size", [0, 7, 9, 87, 89])
def test_bad_record_size(size):
    """A file that does not hold whole nodes and a time is no epoch."""
    with pytest.raises(ProtocolError):
        EpochRecord.unpack(bytes(size))


def test_bad_log_size():
    """A log that ends inside an entry is a protocol error."""
    with pytest.raises(ProtocolError):
        epochs.unpack_epoch_log(bytes(129), 1)
    with pytest.raises(ProtocolError):
        EpochLogEntry.unpack(bytes(47))


@given(U32, st.integers(1, (1 << 31) - 1))
def test_order_wraps(epoch, steps):
    """Later epochs are after earlier ones, across the end of the counter, too."""
    later = (epoch + steps) % (1 << 32)

    assert epochs.epoch_before(epoch, later) and epochs.epoch_after(later, epoch)
    assert not epochs.epoch_before(later, epoch) and not epochs.epoch_after(epoch, later)
    assert not epochs.epoch_before(epoch, epoch)


@given(st.integers(0, 99999999))
def test_file_names(epoch):
    """File names give back their epoch."""
    assert epochs.parse_epoch_file_name(epochs.epoch_file_name(epoch)) == epoch


@pytest.mark.parametrize("name", ["1", "00000001.tmp", "000000001", "0000000x", "+0000001", ""])
def test_foreign_file_names(name):
    """Other files in the directory are no epochs."""
    assert epochs.parse_epoch_file_name(name) is None
