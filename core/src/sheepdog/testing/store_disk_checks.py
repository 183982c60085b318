"""The part of the store kit that is about several disks. Not used by itself: see ``store_kit``."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import pytest

from sheepdog.contracts.store import ShardKey, StoreOptions
from sheepdog.errors import StoreError
from sheepdog.model.ids import data_oid
from sheepdog.testing.store_tools import VID, StoreFactory, get, get_stale, put


class DiskChecks:
    """Runs with ``several_disks`` only."""

    several_disks: ClassVar[bool] = False

    @pytest.fixture
    def store_factory(self) -> StoreFactory:
        """Makes a store; the same options mean the same medium."""
        raise AssertionError("a subclass of StoreKit supplies the fixture store_factory")

    @pytest.fixture
    def three_disks(self, tmp_path: Path) -> tuple[str, str, str]:
        """Three empty directories; the checks that ask for them run with ``several_disks`` only."""
        if not self.several_disks:
            pytest.skip("this store has one disk")
        one, two, three = (tmp_path / name for name in ("d1", "d2", "d3"))
        for path in (one, two, three):
            path.mkdir()
        return str(one), str(two), str(three)

    def test_disks_share_the_objects(self, store_factory: StoreFactory, three_disks: tuple[str, str, str]) -> None:
        """Every disk takes some of the objects, and all are found."""
        store = store_factory(StoreOptions(three_disks))
        keys = [ShardKey(data_oid(vid, index)) for vid in (1, VID) for index in range(40)]
        for key in keys:
            put(store, key, key.oid.to_bytes(8, "big") * 512)

        assert list(store.keys()) == sorted(keys)
        assert [disk.path for disk in store.disks()] == sorted(three_disks)
        assert all(disk.usage.used_bytes > 0 for disk in store.disks())
        assert all(get(store, key, 8) == key.oid.to_bytes(8, "big") for key in keys)
        store.close()

    def test_disks_come_and_go(self, store_factory: StoreFactory, three_disks: tuple[str, str, str]) -> None:
        """An added disk is emptied and takes its share; what a removed one held is missing, everything else is not."""
        one, two, three = three_disks
        store = store_factory(StoreOptions((one, two)))
        # Where an object belongs depends on the paths: so many that each disk gets some, whatever they are.
        keys = [ShardKey(data_oid(1, index), strip) for index in range(80) for strip in (-1, 1)]
        for key in keys:
            put(store, key, str(key).encode())

        store.add_disk(three + "//")
        assert [disk.path for disk in store.disks()] == sorted(three_disks)
        for key in keys:
            assert get(store, key) == str(key).encode()
            store.write(key, b"W", offset_bytes=0, durable=False)
        assert list(store.keys()) == sorted(keys)
        with pytest.raises(StoreError):
            store.add_disk(three)

        store.remove_disk(one + "/")
        rest = list(store.keys())
        assert 0 < len(rest) < len(keys)
        for key in keys:
            assert store.exists(key) == (key in rest)
        for key in rest:
            assert get(store, key) == b"W" + str(key).encode()[1:]
        store.close()

    def test_other_disks_after_a_restart(self, store_factory: StoreFactory, three_disks: tuple[str, str, str]) -> None:
        """With more disks, and in another order, than before everything is found, written, replaced and removed."""
        one, two, three = three_disks
        store = store_factory(StoreOptions((one,)))
        keys = [ShardKey(data_oid(1, index)) for index in range(40)]
        for key in keys:
            put(store, key, b"first")
        for key in keys[:8]:
            store.retire(key, 2)
        store.close()

        store = store_factory(StoreOptions((three, two, one)))
        for key in keys[:8]:
            assert get_stale(store, key, 2) == b"first"
            store.revive(key, 2)
        for key in keys[:12]:
            store.write(key, b"F", offset_bytes=0, durable=True)
        for key in keys[12:20]:
            put(store, key, b"second")
        for key in keys[20:28]:
            store.remove(key)
        for key in keys[28:36]:
            store.retire(key, 5)

        assert list(store.keys()) == sorted(keys[:20] + keys[36:])
        store.close()
        store = store_factory(StoreOptions(three_disks))
        for key in keys[:12]:
            assert get(store, key) == b"First"
        for key in keys[12:20]:
            assert get(store, key) == b"second"
        for key in keys[20:28]:
            assert not store.exists(key)
        for key in keys[28:36]:
            assert not store.exists(key)
            assert get_stale(store, key, 5) == b"first"
        store.close()
