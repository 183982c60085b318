"""Vnodes that belong to disks: positions as the specification has them, and records of the other length."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepdog.errors import ConfigError, InvalidParameters, ProtocolError
from sheepdog.model.clusterinfo import ClusterFlag, ClusterInfo, cluster_info_bytes, mode_flag, mode_of_flags
from sheepdog.model.epochs import EpochLogEntry, EpochRecord, pack_epoch_log, unpack_epoch_log
from sheepdog.model.hashing import hash_oid
from sheepdog.model.node import Node, NodeDisk, NodeId, VnodeMode, mode_of_records, pack_nodes, unpack_nodes
from sheepdog.model.ring import DiskRing, Ring, disk_vnodes, node_disk

GiB = 1 << 30
U64 = st.integers(0, (1 << 64) - 1)
DISKS = st.builds(NodeDisk, st.integers(1, (1 << 64) - 1), U64)
IDS = st.builds(NodeId, st.binary(min_size=16, max_size=16), st.integers(1, 0xFFFF))
NODES = st.builds(
    Node, IDS, st.integers(0, 0xFFFF), st.integers(0, (1 << 32) - 1), U64, st.lists(DISKS, max_size=32).map(tuple)
)


def fnv(data, value=0xCBF29CE484222325):
    """FNV-1a in 64 bits, as its inventors write it down."""
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def following(value):
    """The next position of a chain: the fnv of the eight bytes of the last one, begun with itself."""
    return fnv(value.to_bytes(8, "little"), value)


def positions_of(host, port, path, space):
    """Placement and recovery, section 2: for each disk from fnv(le64(disk_id), basis = h_node), a step for 4 GiB."""
    address = bytes(12) + bytes(map(int, host.split(".")))
    h_node = following(fnv(address + port.to_bytes(2, "little")))
    disk_id = following(fnv(path.encode()))
    at, found = fnv(disk_id.to_bytes(8, "little"), h_node), []
    for _ in range((space + 4 * GiB - 1) // (4 * GiB)):
        at = following(at)
        found.append(at)
    return found


def member(number, *sizes, zone=None):
    """A node with disks of so many bytes, /d0, /d1 ..."""
    disks = tuple(node_disk(f"/d{at}", size) for at, size in enumerate(sizes))
    node = Node(NodeId.of(f"10.0.0.{number}", 7000), 0, number if zone is None else zone, sum(sizes), disks)
    return disk_vnodes([node])[0]


def test_positions():
    """Each disk has a position for every 4 GiB begun, and the number of vnodes of a node is that of its disks."""
    sizes = {1: (10 * GiB, 4 * GiB), 2: (1, 0, 4 * GiB + 1)}
    nodes = [member(number, *parts) for number, parts in sizes.items()]
    ring = Ring(nodes)
    expected = {
        position: number
        for number, parts in sizes.items()
        for at, size in enumerate(parts)
        for position in positions_of(f"10.0.0.{number}", 7000, f"/d{at}", size)
    }

    assert [node.vnodes for node in nodes] == [3 + 1, 1 + 0 + 2]
    assert {position: ring.walk(position, 1)[0][0].zone for position in ring.positions} == expected


def test_slashes():
    """A disk is the same with slashes behind its path."""
    assert node_disk("/s/d1//", 5) == node_disk("/s/d1", 5)


@given(st.lists(st.lists(st.integers(0, 60 * GiB), max_size=3), min_size=1, max_size=5), U64, st.integers(1, 3))
def test_disk_of_a_holder(sizes, oid, copies):
    """The ring inside a node points to the disk whose vnode the node was chosen by."""
    nodes = [member(number, *parts) for number, parts in enumerate(sizes, start=1)]

    for node, position in Ring(nodes).walk(hash_oid(oid), copies):
        parts = sizes[node.zone - 1]
        ring = DiskRing(((f"/d{at}/", size) for at, size in enumerate(parts)), node.id)
        path = ring.disk_of(oid).rstrip("/")
        assert position in positions_of(node.id.host, 7000, path, parts[int(path[2:])])


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=3), st.lists(U64, max_size=20))
def test_lost_disk_moves_its_own(sizes, oids):
    """Without one of its disks a node loses only objects of that disk, and every other object stays where it is."""
    whole = member(1, *(size * GiB for size in sizes))
    less = disk_vnodes([replace(whole, disks=whole.disks[1:])])[0]
    others = [member(2, 30 * GiB), member(3, 30 * GiB, 5 * GiB)]
    before, after = Ring([whole, *others]), Ring([less, *others])
    inside = DiskRing([(f"/d{at}", size * GiB) for at, size in enumerate(sizes)], whole.id)

    for oid in oids:
        ids = [node.id for node in before.holders(oid, 2)]
        if whole.id not in ids or inside.disk_of(oid) != "/d0":
            assert [node.id for node in after.holders(oid, 2)] == ids


def test_no_node_of_disks_without_space():
    """A node whose disks are all full when they are first used has no vnodes, and a nonsensical size has 65535."""
    empty, huge = member(1, 0, 0), NodeDisk(1, (1 << 64) - 1)

    assert (empty.vnodes, huge.vnodes) == (0, 65535)
    assert disk_vnodes([replace(empty, disks=(huge, huge._replace(id=2)))])[0].vnodes == 65535
    assert Ring([empty, member(2, GiB)]).holders(5, 2) == (member(2, GiB),)


# ---- records


@given(st.lists(NODES, max_size=4), st.integers(-(1 << 63), (1 << 63) - 1))
def test_arrays(nodes, time):
    """Records of 592 bytes survive packing, in a row and in an epoch file."""
    record = EpochRecord(tuple(nodes), time)
    packed = record.pack(VnodeMode.DISK)

    assert len(packed) == 592 * len(nodes) + 8
    assert EpochRecord.unpack(packed, VnodeMode.DISK) == record
    assert unpack_nodes(packed[:-8], VnodeMode.DISK) == tuple(nodes)
    assert mode_of_records(packed[:-8]) is (VnodeMode.DISK if nodes else VnodeMode.NODE)
    bare = pack_nodes(replace(node, disks=()) for node in nodes)
    assert len(bare) == 80 * len(nodes)
    assert mode_of_records(bare) is VnodeMode.NODE


@given(NODES)
def test_record_alone(node):
    """On its own a record takes the room of its disks only; both forms are read."""
    assert len(node.pack()) == 80 + 16 * len(node.disks)
    assert Node.unpack(node.pack()) == Node.unpack(node.pack().ljust(592, b"\0")) == node


def test_layout():
    """The bytes of a record: that of the other mode, then id and space of each disk, then zeros."""
    node = member(1, 5 * GiB, 7)
    raw = pack_nodes([node], VnodeMode.DISK)

    assert raw[:80] == replace(node, disks=()).pack()
    words = [int.from_bytes(raw[at : at + 8], "little") for at in range(80, 592, 8)]
    assert words == [node.disks[0].id, 5 * GiB, node.disks[1].id, 7, *[0] * 60]


@pytest.mark.parametrize("size", [81, 95, 80 + 33 * 16, 592 + 16])
def test_odd_record(size):
    """A record with half a disk, or more than 32, is a protocol error; a node does not announce more than 32 either."""
    with pytest.raises(ProtocolError):
        Node.unpack(bytes(size))
    with pytest.raises(ProtocolError):
        unpack_nodes(bytes(size), VnodeMode.DISK)
    with pytest.raises(ProtocolError):
        EpochRecord.unpack(bytes(size + 8), VnodeMode.DISK)
    with pytest.raises(ConfigError):
        Node(NodeId.of("10.0.0.1", 1), disks=(NodeDisk(1, 1),) * 33)


def test_epoch_log():
    """Entries of STAT_CLUSTER have slots of the longer records."""
    entries = (EpochLogEntry(5, 2, (member(1, GiB), member(2, GiB, 9 * GiB))), EpochLogEntry(4, 1, (member(1, GiB),)))
    packed = pack_epoch_log(entries, 3, VnodeMode.DISK)

    assert len(packed) == 2 * (48 + 3 * 592)
    assert unpack_epoch_log(packed, 3, VnodeMode.DISK) == entries


def test_cluster_info():
    """Its flags say how long the records are; the whole structure has 491408 bytes and room for 830 nodes."""
    assert mode_of_flags(mode_flag(VnodeMode.DISK)) is VnodeMode.DISK
    assert mode_of_flags(mode_flag(VnodeMode.NODE) | ClusterFlag.AUTO_VNODES) is VnodeMode.NODE
    info = ClusterInfo(flags=ClusterFlag.DISK_MODE, nodes=tuple(member(number, GiB) for number in range(1, 4)))
    whole = info.pack()

    assert len(whole) == cluster_info_bytes(VnodeMode.DISK) == 491408
    assert ClusterInfo.unpack(whole) == ClusterInfo.unpack(info.pack_used()) == info
    with pytest.raises(ProtocolError):
        ClusterInfo.unpack(whole[: 48 + 3 * 592 - 1])
    with pytest.raises(InvalidParameters):
        replace(info, nodes=(member(1, GiB),) * 831).pack()
    raw = bytearray(whole)
    raw[2:4] = (831).to_bytes(2, "little")
    with pytest.raises(ProtocolError):
        ClusterInfo.unpack(raw)
