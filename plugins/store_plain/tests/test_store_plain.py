"""The plain store passes the kit on one disk and on several, with and without direct I/O."""

import dataclasses
import os

import pytest

from sheepdog.api import ShardKey, StoreOptions, attribute_oid, btree_oid, data_oid, inode_oid, ledger_oid, vmstate_oid
from sheepdog.testing.store_kit import StoreKit
from sheepdog.testing.store_tools import put
from sheepdog_store_plain import sheepdog_object_store


class TestPlainStore(StoreKit):
    several_disks = True

    @pytest.fixture
    def store_factory(self):
        return sheepdog_object_store


class TestPlainStoreDirect(TestPlainStore):
    @pytest.fixture
    def store_factory(self):
        return lambda options: sheepdog_object_store(dataclasses.replace(options, direct_io=True))


def test_names(tmp_path):
    """Every object lies in the disk directory itself, under the name the original gives it."""
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
    store.retire(ShardKey(data_oid(vid, 1), 10), 12)

    assert sorted(os.listdir(tmp_path)) == [
        ".stale",
        "004620a70000000f",
        "084620a700000001",
        "104620a700000002",
        "204620a76d21d6c0",
        "404620a700000000",
        "804620a700000000",
    ]
    assert sorted(os.listdir(tmp_path / ".stale")) == ["004620a700000001_10.12", "004620a700000002.7"]
