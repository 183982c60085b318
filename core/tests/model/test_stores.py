"""Store directories that the original left behind: everything in them that has a structure."""

import hashlib
import os

import pytest

from sheepdog.model.clusterinfo import DiskConfig
from sheepdog.model.epochs import EpochRecord, parse_epoch_file_name
from sheepdog.model.ids import inode_oid
from sheepdog.model.inode import HEADER_BYTES, INODE_BYTES, InodeHeader
from sheepdog.model.ring import DiskRing, Ring, auto_vnodes
from sheepdog.testing.vectors import store_facts, store_files, unpack_store

STORES = [
    "four-nodes-stale-killed",
    "one-node-journal-killed",
    "one-node-plain",
    "three-nodes-erasure",
    "three-nodes-killed",
    "three-nodes-one-lost",
    "two-nodes-tree",
]


def without_reserved(record):
    """An epoch file with the 24 bytes before each node's identity cleared: they are not filled on purpose."""
    raw = bytearray(record)
    for at in range(0, len(raw) - 8, 80):
        raw[at : at + 24] = bytes(24)
    return bytes(raw)


@pytest.mark.parametrize("store", STORES)
def test_files(store):
    """Config, epoch and inode files are read and written back to the same bytes, and say what is known of the store."""
    facts = store_facts(store)
    epochs, configs, names = {}, 0, set()
    for path, content in store_files(store, lambda path: "/journal_file" not in path):
        name = path.rsplit("/", 1)[-1]
        if name == "config":
            config = DiskConfig.unpack(content)
            assert config.pack() == content
            assert config.default_store == facts["store"]
            configs += 1
        elif "/epoch/" in path:
            record = EpochRecord.unpack(content)
            assert record.pack() == without_reserved(content)
            assert auto_vnodes(record.nodes) == record.nodes
            epochs[parse_epoch_file_name(name)] = {node.id.port for node in record.nodes}
        elif name.startswith("80") and len(name) == 16 and len(content) == INODE_BYTES:
            header = InodeHeader.unpack(content)
            assert header.pack() == content[:HEADER_BYTES]
            assert f"{inode_oid(header.vdi_id):016x}" == name
            names.add(header.name.decode())

    assert configs == len(facts["sheep"])
    assert set(epochs) >= {int(row["epoch"]) for row in facts["epochs"]}
    assert names - {""} >= {row["name"] for row in facts["vdis"]}


def test_placement():
    """In an undisturbed store every object lies on exactly the nodes that the ring of its epoch names."""
    store = "two-nodes-tree"
    sheep = store_facts(store)["sheep"]
    record, places = None, {}
    for path, content in store_files(store):
        parts = path.split("/")
        if "epoch" in parts:
            record = EpochRecord.unpack(content)
        elif len(parts[-1]) == 16 and ".stale" not in parts:
            places.setdefault(int(parts[-1], 16), set()).add(parts[0])
    assert record is not None
    ring = Ring(record.nodes)
    directories = {row["port"]: f"n{number}" for number, row in enumerate(sheep)}

    assert places
    for oid, where in places.items():
        assert {directories[node.id.port] for node in ring.holders(oid, 2)} == where


def test_disks():
    """In a node with two disks every object lies on the disk that its ring of disks names."""
    facts = store_facts("three-nodes-one-lost")
    disks = facts["sheep"][0]["paths"][1:]
    weights = {
        f"/srv/{row['path']}": int.from_bytes(bytes.fromhex(row["xattrs_hex"]["user.md.size"]), "little")
        for row in facts["files"]
        if "user.md.size" in row.get("xattrs_hex", {})
    }
    ring = DiskRing((path, weights[path]) for path in disks)
    placed = 0
    for row in facts["files"]:
        directory, _, name = row["path"].rpartition("/")
        if f"/srv/{directory}" in disks and len(name) == 16:
            assert ring.disk_of(int(name, 16)) == f"/srv/{directory}"
            placed += 1

    assert placed > 0


def test_unpacked(tmp_path):
    """A store unpacked for a test is the recorded one: contents, holes and the recorded weight of its disk."""
    store = "one-node-plain"
    try:
        os.setxattr(tmp_path, "user.probe", b"1")
    except OSError:
        pytest.skip("the temporary directory takes no extended attributes")

    unpack_store(store, tmp_path)

    allocated = 0
    for row in store_facts(store)["files"]:
        path = tmp_path / row["path"]
        for key, text in row.get("xattrs_hex", {}).items():
            assert os.getxattr(path, key).hex() == text
        if row.get("sha256"):
            assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"]
            if len(path.name) == 16 and path.name.startswith("80"):
                allocated = max(allocated, path.stat().st_blocks * 512)
    assert 0 < allocated < INODE_BYTES // 2
