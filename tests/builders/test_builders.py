"""Directories built byte by byte open in our store, and our store writes the same bytes under the same names."""

from __future__ import annotations

import os

import pytest

import sheepdog_store_plain
import sheepdog_store_tree
from sheepdog.api import REPLICA, ShardKey, StoreOptions
from sheepdog.daemon.storedir import StoreDirectory
from sheepdog.model.clusterinfo import ClusterFlag, DiskConfig
from sheepdog.model.epochs import EpochRecord
from sheepdog.model.inode import MAP_OFFSET, REFS_OFFSET, InodeHeader
from sheepdog.model.node import Node, NodeId, VnodeMode
from sheepdog.model.ring import Ring, node_disk
from sheepdog.testing.store_tools import get, get_stale

from . import stores

VID = 0xED202B
DATA = VID << 32
OBJECTS = {
    ShardKey(DATA): b"\x01" * (4 << 20),
    ShardKey(DATA | 1, 0): b"\x02" * (2 << 20),
    ShardKey(DATA | 1, 2): b"\x03" * (2 << 20),
    ShardKey(stores.LEDGER | DATA): b"\x07" * 24 + bytes(stores.LEDGER_BYTES - 24),
    ShardKey(stores.BTREE | DATA | 5): b"\x04" * (4 << 20),
    ShardKey(stores.ATTRIBUTE | DATA | 0x6D21D6C0): b"\x05" * stores.ATTRIBUTE_BYTES,
    ShardKey(stores.VMSTATE | DATA | 3): b"\x06" * (4 << 20),
    ShardKey(stores.INODE | DATA): stores.inode(
        b"alpha",
        vid=VID,
        size=32 << 20,
        tag=b"s1",
        snap_ctime=(1795339443 << 32) | 5000,
        copies=3,
        snap_id=2,
        parent=0xED202A,
        owners={0: VID, 1: VID, 1 << 19: 0x123456},
        references={0: (1, 2), (1 << 20) - 1: (3, -4)},
    ),
}


def strip(key):
    return None if key.index == REPLICA else key.index


@pytest.fixture(params=[False, True], ids=["plain", "tree"])
def tree(request):
    return request.param


@pytest.fixture
def make(tree):
    return (sheepdog_store_tree if tree else sheepdog_store_plain).sheepdog_object_store


def listing(path):
    """Every file below: its relative path and bytes."""
    found = {}
    for base, _, names in os.walk(path):
        for name in names:
            full = os.path.join(base, name)
            with open(full, "rb") as file:
                found[os.path.relpath(full, path)] = file.read()
    return found


def test_config_and_epochs(tmp_path):
    """Config and epoch files mean what their description says."""
    builder = stores.StoreBuilder(tmp_path / "n0")
    builder.config(
        stores.config_file(ctime=1795339442 << 32 | 7, flags=0x15, copies=3, store="tree", clean=True, policy=0x11,
                           shift=20, space=77_777_777)
    )  # fmt: skip
    nodes = [stores.node(7000, zone=3, space=5 << 30), stores.node(7001, address="10.1.2.3", vnodes=0)]
    builder.epoch(1, stores.epoch_file(nodes[:1], 1795339442))
    builder.epoch(12, stores.epoch_file(nodes, -1))
    builder.epoch(13, bytes(592 + 8))

    directory = StoreDirectory(str(tmp_path / "n0"))

    assert directory.read_config() == DiskConfig(
        ctime=1795339442 << 32 | 7,
        flags=ClusterFlag.STRICT | ClusterFlag.AUTO_VNODES | ClusterFlag.RECYCLE_VID,
        copies=3,
        default_store="tree",
        shutdown=True,
        copy_policy=0x11,
        block_size_shift=20,
        space=77_777_777,
    )
    first = Node(NodeId.of("127.0.0.1", 7000), 128, 3, 5 << 30)
    second = Node(NodeId.of("10.1.2.3", 7001), 0, 0, 0)
    assert directory.latest_epoch() == 12
    assert directory.read_epoch(1) == EpochRecord((first,), 1795339442)
    assert directory.read_epoch(12) == EpochRecord((first, second), -1)


def test_our_config_and_epochs_have_the_same_bytes(tmp_path):
    """What we write is, byte for byte, what the description says."""
    directory = StoreDirectory(str(tmp_path))
    directory.prepare()
    auto = ClusterFlag.AUTO_VNODES
    directory.write_config(
        DiskConfig(ctime=9, flags=auto, copies=2, default_store="plain", block_size_shift=22, space=5)
    )
    directory.write_epoch(2, EpochRecord((Node(NodeId.of("127.0.0.1", 7000), 100, 4, 6),), 99))

    assert listing(tmp_path) == {
        "config": stores.config_file(ctime=9, copies=2, space=5),
        "epoch/00000002": stores.epoch_file([stores.node(7000, vnodes=100, zone=4, space=6)], 99),
    }


def test_our_epochs_with_disks_have_the_same_bytes(tmp_path):
    """Also where vnodes belong to disks; and the other way round."""
    directory = StoreDirectory(str(tmp_path), VnodeMode.DISK)
    directory.prepare()
    disks = (node_disk("/d1", 9 << 30), node_disk("/d2", 5))
    record = EpochRecord(
        (Node(NodeId.of("127.0.0.1", 7000), 4, 4, 6, disks), Node(NodeId.of("127.0.0.1", 7001), 0)), 99
    )
    directory.write_epoch(2, record)
    raw = stores.epoch_file(
        [
            stores.node_with_disks(
                stores.node(7000, vnodes=4, zone=4, space=6),
                [(stores.disk_id("/d1"), 9 << 30), (stores.disk_id("/d2"), 5)],
            ),
            stores.node_with_disks(stores.node(7001, vnodes=0), []),
        ],
        99,
    )

    assert listing(tmp_path) == {"epoch/00000002": raw}
    assert directory.read_epoch(2) == record
    positions = [*stores.disk_positions(7000, "/d1", 9 << 30), *stores.disk_positions(7000, "/d2", 5)]
    assert list(Ring(record.nodes).positions) == sorted(positions)


def test_objects(tmp_path, tree, make):
    """Every kind of object, strips and set-aside versions are found under their keys, with all their bytes."""
    builder = stores.StoreBuilder(tmp_path / "n0", tree=tree)
    for key, data in OBJECTS.items():
        builder.put(key.oid, data, strip=strip(key))
    builder.put_stale(DATA, 1, b"old")
    builder.put_stale(DATA, 10, b"older", strip=3)
    builder.put_stale(stores.INODE | DATA, 2, b"inode")
    (builder.place(DATA).parent / f"{DATA:016x}.tmp").write_bytes(b"half")

    store = make(StoreOptions((str(tmp_path / "n0" / "obj"),)))

    assert {key: get(store, key) for key in list(store.keys())} == OBJECTS
    assert {version: get_stale(store, *version) for version in list(store.stale_keys())} == {
        (ShardKey(DATA), 1): b"old",
        (ShardKey(DATA, 3), 10): b"older",
        (ShardKey(stores.INODE | DATA), 2): b"inode",
    }
    assert store.usage().weight_bytes == 64 << 30
    assert not any(".tmp" in name for name in listing(tmp_path))


def test_inode(tmp_path, make, tree):
    """The fields of a built inode are read where the data model puts them."""
    builder = stores.StoreBuilder(tmp_path / "n0", tree=tree)
    key = ShardKey(stores.INODE | DATA)
    builder.put(key.oid, OBJECTS[key])
    raw = get(make(StoreOptions((str(tmp_path / "n0" / "obj"),))), key)

    header = InodeHeader.unpack(raw)

    assert (header.name, header.tag, header.vdi_size, header.snap_id) == (b"alpha", b"s1", 32 << 20, 2)
    assert (header.vdi_id, header.parent_vdi_id, header.nr_copies, header.block_size_shift) == (VID, 0xED202A, 3, 22)
    assert header.is_snapshot
    assert raw[MAP_OFFSET + 4 * (1 << 19) :][:4] == bytes.fromhex("56341200")
    assert raw[REFS_OFFSET:][:8] == bytes.fromhex("0100000002000000")
    assert raw[-8:] == bytes.fromhex("03000000fcffffff")


def test_our_store_writes_the_same_files(tmp_path, tree, make):
    """The same objects put through our store give the same names and bytes as the builder's."""
    builder = stores.StoreBuilder(tmp_path / "built", tree=tree)
    ours = tmp_path / "ours"
    ours.mkdir()
    store = make(StoreOptions((str(ours),)))
    for key, data in OBJECTS.items():
        builder.put(key.oid, data, strip=strip(key))
        sparse = bool(key.oid & (stores.INODE | stores.LEDGER))
        store.create(key, data, offset_bytes=0, size_bytes=len(data), sparse=sparse, durable=False)
    builder.put_stale(DATA | 1, 4, OBJECTS[ShardKey(DATA | 1, 2)], strip=2)
    builder.place(DATA | 1, strip=2).unlink()
    store.retire(ShardKey(DATA | 1, 2), 4)

    assert listing(ours) == listing(tmp_path / "built" / "obj")


def test_two_disks_with_misplaced_objects(tmp_path, tree, make):
    """On two disks every object is found, whichever disk it was built on, and ends up on exactly one."""
    disks = {tmp_path / "d1": 20 << 30, tmp_path / "d2": 10 << 30}
    builder = stores.StoreBuilder(tmp_path / "n0", disks, tree=tree)
    oids = [vid << 32 | index for vid in (5, 6) for index in range(20)]
    for number, oid in enumerate(oids):
        builder.put(oid, oid.to_bytes(8, "big"), disk=number % 2)
        builder.put_stale(oid, 3, oid.to_bytes(8, "little"), disk=number // 2 % 2)

    store = make(StoreOptions(tuple(map(str, disks))))

    assert [disk.usage.weight_bytes for disk in store.disks()] == [20 << 30, 10 << 30]
    for oid in oids:
        assert get(store, ShardKey(oid)) == oid.to_bytes(8, "big")
        assert get_stale(store, ShardKey(oid), 3) == oid.to_bytes(8, "little")
    names = [os.path.basename(name) for path in disks for name in listing(path) if ".stale" not in name]
    assert sorted(names) == sorted(f"{oid:016x}" for oid in oids)
