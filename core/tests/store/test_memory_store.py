"""The fake store passes the kit, and its faults are what they say."""

import random

import pytest

from sheepdog.contracts.store import ShardKey, StoreOptions
from sheepdog.errors import StoreBusy, StoreDeviceError, StoreFull
from sheepdog.testing.memory_store import MemoryMedium, MemoryStore
from sheepdog.testing.store_kit import StoreKit
from sheepdog.testing.store_tools import KEY, OTHER, get, get_stale, put

OPTIONS = StoreOptions(("/d",))


class TestMemoryStore(StoreKit):
    several_disks = True

    @pytest.fixture
    def store_factory(self):
        medium = MemoryMedium()
        return lambda options: MemoryStore(options, medium)


def test_power_loss_drops_what_was_not_flushed():
    """After power loss a shard is as it was when it was flushed last."""
    medium = MemoryMedium()
    store = MemoryStore(OPTIONS, medium)
    put(store, KEY, b"one", durable=True)
    store.write(KEY, b"ONE", offset_bytes=0, durable=False)
    put(store, OTHER, b"two")
    third = ShardKey(3)
    put(store, third, b"three")
    store.sync([third])

    medium.lose_power()
    store = MemoryStore(OPTIONS, medium)

    assert list(store.keys()) == [third, KEY]
    assert get(store, KEY) == b"one"
    assert get(store, third) == b"three"


def test_power_loss_by_chance_repeats_with_its_seed():
    """The same seed keeps and drops the same shards, and each shard as a whole."""

    def outcome(seed):
        medium = MemoryMedium()
        store = MemoryStore(OPTIONS, medium)
        for oid in range(1, 40):
            put(store, ShardKey(oid), b"old", durable=True)
            store.write(ShardKey(oid), b"NEW", offset_bytes=0, durable=False)
        medium.lose_power(random.Random(seed))
        store = MemoryStore(OPTIONS, medium)
        return [get(store, key) for key in list(store.keys())]

    assert outcome(1) == outcome(1)
    assert outcome(1) != outcome(2)
    assert set(outcome(1)) == {b"old", b"NEW"}


def test_retired_shard_after_power_loss():
    """A retirement that was not flushed is undone by power loss: the shard is live or stale, never lost."""
    medium = MemoryMedium()
    store = MemoryStore(OPTIONS, medium)
    put(store, KEY, b"one", durable=True)
    store.retire(KEY, 1)

    medium.lose_power()
    store = MemoryStore(OPTIONS, medium)

    assert get(store, KEY) == b"one"
    assert list(store.stale_keys()) == []


def test_full():
    """A full disk refuses a create, changes nothing, and still takes writes in place."""
    medium = MemoryMedium(capacity_bytes=10_000)
    store = MemoryStore(OPTIONS, medium)
    put(store, KEY, b"a" * 9000)

    with pytest.raises(StoreFull):
        put(store, OTHER, b"b" * 2000)

    assert list(store.keys()) == [KEY]
    store.write(KEY, b"c", offset_bytes=0, durable=True)
    put(store, KEY, b"d" * 10_000)
    assert get(store, KEY, 1) == b"d"


def test_broken_disk():
    """A broken disk fails everything that touches it, naming itself; the other disk serves on."""
    medium = MemoryMedium()
    store = MemoryStore(StoreOptions(("/a", "/b")), medium)
    keys = [ShardKey(oid) for oid in range(1, 30)]
    for key in keys:
        put(store, key, b"data")

    medium.break_disk("/a")
    failed = set()
    for key in keys:
        try:
            store.write(key, b"D", offset_bytes=0, durable=False)
        except StoreDeviceError as error:
            failed.add((key, error.path))
    assert {path for _, path in failed} == {"/a"}
    failed = {key for key, _ in failed}
    assert 0 < len(failed) < len(keys)
    with pytest.raises(StoreDeviceError):
        list(store.keys())
    assert [(disk.path, disk.usage.free_bytes > 0) for disk in store.disks()] == [("/a", False), ("/b", True)]

    store.remove_disk("/a")
    assert set(store.keys()) == set(keys) - failed


def test_busy():
    """A busy disk fails as many calls as were asked for."""
    medium = MemoryMedium()
    store = MemoryStore(OPTIONS, medium)
    put(store, KEY, b"data")
    medium.keep_busy("/d", 2)

    for _ in range(2):
        with pytest.raises(StoreBusy):
            store.exists(KEY)
    assert store.exists(KEY)


def test_rot_shows_in_the_digest():
    """Rot changes one byte and nothing announces it."""
    medium = MemoryMedium()
    store = MemoryStore(OPTIONS, medium)
    put(store, KEY, b"data")
    before = store.digest(KEY, cache=True)

    medium.rot(KEY, 1)

    assert store.digest(KEY, cache=True) != before
    assert get(store, KEY)[0:1] == b"d"


def test_last_disk_gone():
    """Without any disk every access is a device error."""
    medium = MemoryMedium()
    store = MemoryStore(OPTIONS, medium)
    put(store, KEY, b"data")
    store.retire(KEY, 1)
    assert get_stale(store, KEY, 1) == b"data"
    store.remove_disk("/d")

    with pytest.raises(StoreDeviceError):
        store.exists(KEY)
    assert store.disks() == ()
    assert store.usage() == (0, 0, 0)
