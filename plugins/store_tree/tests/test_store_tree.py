"""The tree store passes the kit on one disk and on several, with and without direct I/O."""

import dataclasses
import os

import pytest

from sheepdog.api import ShardKey, StoreOptions, attribute_oid, btree_oid, data_oid, inode_oid, ledger_oid, vmstate_oid
from sheepdog.testing.store_kit import StoreKit
from sheepdog.testing.store_tools import put
from sheepdog_store_tree import sheepdog_object_store


class TestTreeStore(StoreKit):
    several_disks = True

    @pytest.fixture
    def store_factory(self):
        return sheepdog_object_store


class TestTreeStoreDirect(TestTreeStore):
    @pytest.fixture
    def store_factory(self):
        return lambda options: sheepdog_object_store(dataclasses.replace(options, direct_io=True))


def test_names(tmp_path):
    """Metadata lies in ``meta``, the rest by the low byte of the vid; the stale area is flat."""
    store = sheepdog_object_store(StoreOptions((str(tmp_path),)))
    vid = 0x4620A7
    for oid in (
        data_oid(vid, 15),
        vmstate_oid(vid, 0),
        attribute_oid(vid, 0x6D21D6C0),
        btree_oid(vid, 2),
        ledger_oid(data_oid(vid, 1)),
        inode_oid(vid),
    ):
        put(store, ShardKey(oid), b"data")
    put(store, ShardKey(data_oid(vid, 1), 10), b"strip")
    put(store, ShardKey(data_oid(vid, 2)), b"stale")
    store.retire(ShardKey(data_oid(vid, 2)), 7)

    assert sorted(os.listdir(tmp_path)) == sorted([".stale", "meta", *(f"{low:02x}" for low in range(256))])
    assert sorted(os.listdir(tmp_path / "meta")) == ["204620a76d21d6c0", "404620a700000000", "804620a700000000"]
    assert sorted(os.listdir(tmp_path / "a7")) == [
        "004620a700000001_10",
        "004620a70000000f",
        "084620a700000001",
        "104620a700000002",
    ]
    assert os.listdir(tmp_path / ".stale") == ["004620a700000002.7"]


def test_misplaced_objects_are_found(tmp_path):
    """An object on another disk than the ring says is found in its sub-directory there and moved."""
    one, two = tmp_path / "one", tmp_path / "two"
    store = sheepdog_object_store(StoreOptions((str(one),)))
    keys = [ShardKey(data_oid(vid, 0)) for vid in range(1, 60)]
    for key in keys:
        put(store, key, key.oid.to_bytes(8, "big"))

    store = sheepdog_object_store(StoreOptions((str(one), str(two))))
    assert all(store.size(key) == 8 for key in keys)

    moved = {name for low in os.listdir(two) if low != ".stale" for name in os.listdir(two / low)}
    assert 0 < len(moved) < len(keys)
    assert list(store.keys()) == keys
