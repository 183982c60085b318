"""Conformance kit of the object store contract.

A plugin's test file subclasses ``StoreKit``, supplies one fixture and inherits a check for every sentence of the
contract. ``store_factory`` is the plugin's own hook: it makes a store of the options it is given, and a second call
with the same options must find what the first store left::

    class TestMine(StoreKit):
        @pytest.fixture
        def store_factory(self):
            return sheepdog_object_store

Set ``several_disks = True`` for a store that spreads shards over several directories and takes disks while it runs.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sheepdog.contracts.store import ObjectStore, ShardKey, StoreOptions
from sheepdog.daemon.checksum_files import ChecksumFiles
from sheepdog.daemon.checksums import ChecksummedStore
from sheepdog.errors import ObjectNotFound, ShardCorrupt, StoreError
from sheepdog.model.ids import data_oid
from sheepdog.testing.store_disk_checks import DiskChecks
from sheepdog.testing.store_exchange_checks import ExchangeChecks
from sheepdog.testing.store_incoming_checks import IncomingChecks
from sheepdog.testing.store_tools import (
    ASSORTED,
    INODE,
    INODE_BYTES,
    KEY,
    OTHER,
    KiB,
    MiB,
    StoreFactory,
    content,
    get,
    get_stale,
    put,
)

__all__ = ["StoreKit", "content", "get", "get_stale", "put"]


class StoreKit(DiskChecks, ExchangeChecks, IncomingChecks):
    """Subclass it and supply ``store_factory``."""

    @pytest.fixture
    def options(self, tmp_path: Path) -> StoreOptions:
        """One empty directory."""
        (tmp_path / "disk").mkdir()
        return StoreOptions((str(tmp_path / "disk"),))

    @pytest.fixture
    def store(self, store_factory: StoreFactory, options: StoreOptions) -> Iterator[ObjectStore]:
        """An empty store."""
        store = store_factory(options)
        yield store
        store.close()

    # ---- create

    @pytest.mark.parametrize("sparse", [False, True])
    @pytest.mark.parametrize("durable", [False, True])
    def test_create_fills_with_zeros(self, store: ObjectStore, sparse: bool, durable: bool) -> None:
        """A created shard has its full size: the data at its offset, zeros before and after."""
        data = content(1, 5000)

        store.create(KEY, data, offset_bytes=3000, size_bytes=64 * KiB, sparse=sparse, durable=durable)

        assert store.size(KEY) == 64 * KiB
        assert get(store, KEY) == bytes(3000) + data + bytes(64 * KiB - 8000)

    @pytest.mark.parametrize("sparse", [False, True])
    def test_create_without_data(self, store: ObjectStore, sparse: bool) -> None:
        """No data at all makes a shard of zeros."""
        store.create(KEY, b"", offset_bytes=0, size_bytes=10_000, sparse=sparse, durable=False)

        assert get(store, KEY) == bytes(10_000)

    @pytest.mark.parametrize("sparse", [False, True])
    def test_create_keeps_zeros_inside_data(self, store: ObjectStore, sparse: bool) -> None:
        """Zero blocks at the start, in the middle and at the end of the data come back as zeros, the rest unchanged."""
        block = content(2, 4 * KiB)
        data = bytes(128 * KiB) + block + bytes(80 * KiB) + block[:100] + bytes(12 * KiB)

        for offset in (0, 4 * KiB, 512, 1):
            store.create(KEY, data, offset_bytes=offset, size_bytes=256 * KiB, sparse=sparse, durable=False)
            assert get(store, KEY, len(data), offset) == data, f"data at {offset}"

    def test_create_at_the_last_byte(self, store: ObjectStore) -> None:
        """Data may end exactly where the shard ends."""
        store.create(KEY, b"\x01", offset_bytes=4095, size_bytes=4096, sparse=False, durable=False)

        assert get(store, KEY) == bytes(4095) + b"\x01"

    def test_create_replaces(self, store: ObjectStore) -> None:
        """A second create leaves nothing of the first, neither bytes nor size."""
        put(store, KEY, content(1, 64 * KiB))

        store.create(KEY, b"new", offset_bytes=10, size_bytes=4 * KiB, sparse=False, durable=False)

        assert get(store, KEY) == bytes(10) + b"new" + bytes(4 * KiB - 13)
        assert list(store.keys()) == [KEY]

    def test_create_large(self, store: ObjectStore) -> None:
        """A whole data object of 4 MiB and a sparse inode, the largest object there is, come back unchanged."""
        whole = content(3, 4 * MiB)
        inode = bytearray(INODE_BYTES)
        inode[:600] = content(4, 600)
        inode[4664 + 4 * 70_000 : 4664 + 4 * 70_000 + 4] = b"vid "
        inode[-3:] = b"end"

        put(store, KEY, whole)
        store.create(INODE, inode, offset_bytes=0, size_bytes=INODE_BYTES, sparse=True, durable=True)

        assert get(store, KEY) == whole
        assert get(store, INODE) == inode

    @pytest.mark.parametrize(("offset", "length"), [(4 * KiB, 4 * KiB), (0, 512), (7, 10_000), (60 * KiB, 4 * KiB)])
    def test_try_write(self, store: ObjectStore, offset: int, length: int) -> None:
        """Either the bytes are replaced, or the answer says that nothing happened; in either case ``write`` goes on."""
        put(store, KEY, content(1, 64 * KiB))
        for turn in range(3):
            expected = bytearray(get(store, KEY))
            data = content(10 + turn, length)
            if store.try_write(KEY, data, offset_bytes=offset):
                expected[offset : offset + length] = data
            assert get(store, KEY) == expected
            store.write(KEY, data[::-1], offset_bytes=offset, durable=False)
            expected[offset : offset + length] = data[::-1]
            assert get(store, KEY) == expected

        try:
            assert not store.try_write(OTHER, b"x", offset_bytes=0)
        except ObjectNotFound:
            pass
        assert list(store.keys()) == [KEY]

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_data_is_lent(self, store: ObjectStore, kind: type[bytes] | type[bytearray] | type[memoryview]) -> None:
        """Any bytes-like data will do, and changing it after the call changes nothing in the store."""
        original = content(5, 8 * KiB)
        mutable = bytearray(original)
        data = kind(mutable)

        store.create(KEY, data, offset_bytes=0, size_bytes=len(original), sparse=False, durable=False)
        store.write(KEY, data, offset_bytes=0, durable=False)
        mutable[:] = bytes(len(mutable))

        assert get(store, KEY) == original

    def test_strips_are_apart(self, store: ObjectStore) -> None:
        """A whole copy and every strip of one object are shards of their own."""
        keys = [ShardKey(KEY.oid, index) for index in (-1, 0, 1, 15)]
        for key in keys:
            put(store, key, bytes([key.index & 0xFF]) * 100)

        store.remove(keys[1])

        assert [get(store, key) for key in (keys[0], *keys[2:])] == [b"\xff" * 100, b"\x01" * 100, b"\x0f" * 100]
        assert not store.exists(keys[1])

    # ---- write

    @pytest.mark.parametrize("durable", [False, True])
    @pytest.mark.parametrize("offset", [0, 1, 4095, 4096, 61_440, 65_535])
    def test_write_in_place(self, store: ObjectStore, offset: int, durable: bool) -> None:
        """Exactly the bytes of the write change, wherever they begin and end."""
        before = content(6, 64 * KiB)
        put(store, KEY, before)
        data = content(7, min(5000, 64 * KiB - offset))

        store.write(KEY, data, offset_bytes=offset, durable=durable)

        assert get(store, KEY) == before[:offset] + data + before[offset + len(data) :]

    @pytest.mark.parametrize("key", [KEY, INODE], ids=["data", "inode"])
    @pytest.mark.parametrize("durable", [False, True])
    def test_write_zeros(self, store: ObjectStore, key: ShardKey, durable: bool) -> None:
        """Zeros written over content are zeros, also where a store makes holes of them, and nothing else changes."""
        size = 256 * KiB
        before = content(8, size)
        store.create(key, before, offset_bytes=0, size_bytes=size, sparse=True, durable=durable)
        data = bytes(70_000) + b"x" + bytes(70_000)

        for offset in (4096, 8200):
            store.write(key, data, offset_bytes=offset, durable=durable)
            expected = before[:offset] + data + before[offset + len(data) :]
            assert get(store, key) == expected, f"zeros at {offset}"
            store.write(key, before, offset_bytes=0, durable=durable)

        store.write(key, bytes(size), offset_bytes=0, durable=durable)
        assert get(store, key) == bytes(size)
        assert store.size(key) == size

    def test_write_to_a_missing_shard(self, store: ObjectStore) -> None:
        """Writing creates nothing."""
        put(store, OTHER, b"other")

        for durable in (False, True):
            with pytest.raises(ObjectNotFound):
                store.write(KEY, b"data", offset_bytes=0, durable=durable)

        assert list(store.keys()) == [OTHER]

    # ---- read

    def test_read_is_short_only_at_the_end(self, store: ObjectStore) -> None:
        """A read returns what there is: all of it, the part before the end, or nothing beyond."""
        data = content(9, 10_000)
        put(store, KEY, data)

        assert get(store, KEY, 4096, 4096) == data[4096:8192]
        assert get(store, KEY, 4096, 8000) == data[8000:]
        assert get(store, KEY, 100, 10_000) == b""
        assert get(store, KEY, 100, 20_000) == b""

    def test_read_leaves_the_rest_of_the_buffer(self, store: ObjectStore) -> None:
        """Only as many bytes of the buffer change as the returned count says."""
        put(store, KEY, b"abc")
        buffer = bytearray(b"." * 6)

        count = store.read_into(KEY, memoryview(buffer), offset_bytes=1)

        assert (count, bytes(buffer)) == (2, b"bc....")

    def test_try_read_answers_right_or_not_at_all(self, store: ObjectStore) -> None:
        """``try_read_into`` returns ``None`` or exactly what ``read_into`` returns, also at the end of the shard."""
        data = content(10, 64 * KiB)
        put(store, KEY, data)

        for offset, size in ((0, 4096), (4096, 8192), (64 * KiB - 100, 4096), (64 * KiB, 10)):
            assert get(store, KEY, size, offset) == data[offset : offset + size]
            buffer = bytearray(size)
            count = store.try_read_into(KEY, memoryview(buffer), offset_bytes=offset)
            if count is not None:
                assert bytes(buffer[:count]) == data[offset : offset + size], f"{size} bytes at {offset}"

    def test_missing_shard(self, store: ObjectStore) -> None:
        """What is not there is ``ObjectNotFound`` for every method that needs it, and ``exists`` says no."""
        put(store, OTHER, b"other")
        buffer = memoryview(bytearray(10))

        assert not store.exists(KEY)
        for attempt in (
            lambda: store.read_into(KEY, buffer, offset_bytes=0),
            lambda: store.remove(KEY),
            lambda: store.size(KEY),
            lambda: store.digest(KEY),
            lambda: store.digest(KEY, cache=True),
            lambda: store.digest(OTHER, epoch=1),
            lambda: store.retire(KEY, 1),
            lambda: store.revive(KEY, 1),
            lambda: store.read_stale_into(OTHER, 1, buffer, offset_bytes=0),
            lambda: store.stale_size(OTHER, 1),
        ):
            with pytest.raises(ObjectNotFound):
                attempt()
        try:
            assert store.try_read_into(KEY, buffer, offset_bytes=0) is None
        except ObjectNotFound:
            pass  # as good an answer

    def test_remove(self, store: ObjectStore) -> None:
        """A removed shard is gone, its neighbours are not."""
        put(store, KEY, b"one")
        put(store, OTHER, b"two")

        store.remove(KEY)

        assert not store.exists(KEY)
        assert get(store, OTHER) == b"two"
        with pytest.raises(ObjectNotFound):
            store.remove(KEY)

    def test_keys_ascend(self, store: ObjectStore) -> None:
        """``keys`` gives every live shard once, ordered by object and strip, and nothing that was set aside."""
        for key in random.Random(1).sample(ASSORTED, len(ASSORTED)):
            put(store, key, b"data")
        put(store, ShardKey(data_oid(5, 5)), b"old")
        store.retire(ShardKey(data_oid(5, 5)), 2)

        assert list(store.keys()) == ASSORTED
        assert all(isinstance(key, ShardKey) for key in store.keys())  # noqa: SIM118

    # ---- digest

    @pytest.mark.parametrize("cache", [False, True])
    def test_digest(self, store: ObjectStore, cache: bool) -> None:
        """The digest is the SHA-1 of all bytes, holes included."""
        store.create(KEY, b"x", offset_bytes=70_000, size_bytes=3 * MiB, sparse=True, durable=False)

        expected = hashlib.sha1(bytes(70_000) + b"x" + bytes(3 * MiB - 70_001)).digest()
        assert store.digest(KEY, cache=cache) == expected
        assert store.digest(KEY, cache=cache) == expected

    def test_digest_follows_changes(self, store: ObjectStore) -> None:
        """A remembered digest never outlives a change of the shard."""
        put(store, KEY, content(11, 8 * KiB))
        store.digest(KEY, cache=True)

        store.write(KEY, b"changed", offset_bytes=100, durable=False)
        assert store.digest(KEY, cache=True) == hashlib.sha1(get(store, KEY)).digest()

        put(store, KEY, b"replaced")
        assert store.digest(KEY, cache=True) == hashlib.sha1(b"replaced").digest()

    def test_verify_counts(self, store: ObjectStore) -> None:
        """Verifying says how far it came, short only at the end of the shard, and misses a missing one."""
        put(store, KEY, content(1, 10_000))

        assert store.verify(KEY, offset_bytes=0, length_bytes=4 * KiB).count == 4 * KiB
        assert store.verify(KEY, offset_bytes=8 * KiB, length_bytes=4 * KiB).count == 10_000 - 8 * KiB
        assert store.verify(KEY, offset_bytes=12 * KiB, length_bytes=4 * KiB).count == 0
        with pytest.raises(ObjectNotFound):
            store.verify(OTHER, offset_bytes=0, length_bytes=1)

    def test_accept(self, store: ObjectStore) -> None:
        """A shard is accepted by the digest of what is stored, and by no other; its content stays as it is."""
        put(store, KEY, content(1, 10_000))

        assert not store.accept(KEY, bytes(20))
        assert store.accept(KEY, store.stored_digest(KEY))
        store.upkeep()
        assert store.stored_digest(KEY) == store.digest(KEY) == hashlib.sha1(content(1, 10_000)).digest()
        assert get(store, KEY) == content(1, 10_000)
        with pytest.raises(ObjectNotFound):
            store.accept(OTHER, bytes(20))

    def test_time_of_the_last_change(
        self, store: ObjectStore, store_factory: StoreFactory, options: StoreOptions
    ) -> None:
        """A store that tells when a shard was changed last tells the same as long as nothing is written to it."""
        put(store, KEY, content(1, 10_000))
        store.write(KEY, b"more", offset_bytes=5, durable=False)
        modified = store.modified_ns(KEY)
        if modified is None:
            return

        with pytest.raises(ObjectNotFound):
            store.modified_ns(OTHER)
        get(store, KEY)
        store.digest(KEY, cache=True)
        store.sync([KEY])
        assert store.modified_ns(KEY) == modified
        store.retire(KEY, 3)
        assert store.modified_ns(KEY, epoch=3) == modified
        store.revive(KEY, 3)
        assert store.modified_ns(KEY) == modified
        again = store_factory(options)
        assert again.modified_ns(KEY) == modified
        again.close()

    def test_under_checksums(self, store: ObjectStore, tmp_path: Path) -> None:
        """Core can keep checksums for the store: what is written through them reads back, what is not is noticed."""
        (tmp_path / "beside").mkdir()
        checked = ChecksummedStore(store, ChecksumFiles(str(tmp_path / "beside"), durable=True))
        put(checked, KEY, content(1, 40 * KiB))
        checked.write(KEY, b"some bytes", offset_bytes=5000, durable=False)
        checked.upkeep()
        checked.upkeep()
        expected = bytearray(content(1, 40 * KiB))
        expected[5000:5010] = b"some bytes"
        assert get(checked, KEY) == expected

        store.write(KEY, b"others", offset_bytes=20_000, durable=False)

        with pytest.raises(ShardCorrupt):
            get(checked, KEY)
        checked.retire(KEY, 7)
        with pytest.raises(ShardCorrupt):
            get_stale(checked, KEY, 7)

    def test_digest_of_a_stale_version(self, store: ObjectStore) -> None:
        """Every version has a digest of its own."""
        put(store, KEY, b"old")
        store.retire(KEY, 4)
        put(store, KEY, b"new")

        assert store.digest(KEY, epoch=4) == hashlib.sha1(b"old").digest()
        assert store.digest(KEY) == hashlib.sha1(b"new").digest()

    # ---- the stale area

    def test_retire(self, store: ObjectStore) -> None:
        """A retired shard is not live any more and can be read under its epoch."""
        data = content(12, 10_000)
        put(store, KEY, data)

        store.retire(KEY, 3)

        assert not store.exists(KEY)
        assert list(store.keys()) == []
        assert list(store.stale_keys()) == [(KEY, 3)]
        assert get_stale(store, KEY, 3) == data
        assert store.stale_size(KEY, 3) == len(data)
        buffer = bytearray(100)
        assert store.read_stale_into(KEY, 3, memoryview(buffer), offset_bytes=9_950) == 50
        assert bytes(buffer[:50]) == data[9_950:]
        with pytest.raises(ObjectNotFound):
            store.write(KEY, b"data", offset_bytes=0, durable=False)

    def test_stale_keys_ascend(self, store: ObjectStore) -> None:
        """Every version that was set aside is listed once, ordered by object, strip and epoch (as numbers)."""
        expected = []
        for key in (KEY, ShardKey(KEY.oid, 2), INODE):
            for epoch in (10, 9, 100):
                put(store, key, b"data")
                store.retire(key, epoch)
                expected.append((key, epoch))

        assert list(store.stale_keys()) == sorted(expected)

    def test_retire_replaces(self, store: ObjectStore) -> None:
        """Of two retired under one epoch the later remains."""
        for data in (b"first", b"second"):
            put(store, KEY, data)
            store.retire(KEY, 3)

        assert get_stale(store, KEY, 3) == b"second"
        assert list(store.stale_keys()) == [(KEY, 3)]

    def test_revive(self, store: ObjectStore) -> None:
        """A revived version is live and still in the stale area."""
        put(store, KEY, b"data")
        store.retire(KEY, 3)

        store.revive(KEY, 3)

        assert get(store, KEY) == b"data"
        assert get_stale(store, KEY, 3) == b"data"
        store.write(KEY, b"D", offset_bytes=0, durable=True)
        assert get(store, KEY) == b"Data"

    def test_revive_yields_to_a_live_shard(self, store: ObjectStore) -> None:
        """Reviving never overwrites what is live."""
        put(store, KEY, b"old")
        store.retire(KEY, 3)
        put(store, KEY, b"newer")

        store.revive(KEY, 3)

        assert get(store, KEY) == b"newer"
        with pytest.raises(ObjectNotFound):
            store.revive(KEY, 4)

    def test_retire_after_revive(self, store: ObjectStore) -> None:
        """A revived shard can be retired again, under the same epoch and under another."""
        put(store, KEY, b"data")
        for epoch in (3, 3, 4):
            store.retire(KEY, epoch)
            assert not store.exists(KEY), f"epoch {epoch}"
            assert get_stale(store, KEY, epoch) == b"data"
            store.revive(KEY, epoch)

    def test_purge_stale(self, store: ObjectStore) -> None:
        """Purging empties the stale area and touches nothing live, not even what was revived from it."""
        for key in (KEY, OTHER):
            put(store, key, b"data")
            store.retire(key, 3)
        store.revive(KEY, 3)
        put(store, INODE, b"live")

        store.purge_stale()
        store.purge_stale()

        assert list(store.stale_keys()) == []
        assert list(store.keys()) == [KEY, INODE]
        assert get(store, KEY) == b"data"

    def test_wipe(self, store: ObjectStore) -> None:
        """After a wipe the store is empty and takes shards as a new one does."""
        for key in ASSORTED:
            put(store, key, b"data")
        store.retire(KEY, 1)

        store.wipe()

        assert list(store.keys()) == []
        assert list(store.stale_keys()) == []
        assert not store.exists(OTHER)
        for key in ASSORTED:
            put(store, key, b"again")
        assert list(store.keys()) == ASSORTED
        store.retire(KEY, 1)

    # ---- flush, usage, restart

    def test_sync_skips_what_is_gone(self, store: ObjectStore) -> None:
        """``sync`` takes any iterable, repeated keys and keys that were removed meanwhile."""
        put(store, KEY, b"one")
        put(store, OTHER, b"two")
        store.write(KEY, b"1", offset_bytes=0, durable=False)
        store.remove(OTHER)

        store.sync(iter([KEY, OTHER, KEY, INODE]))
        store.sync([])

        assert get(store, KEY) == b"1ne"

    def test_usage(self, store: ObjectStore) -> None:
        """Objects use space; free space and weight are not negative; the sums are those of the disks."""
        before = store.usage()
        store.create(KEY, content(13, 2 * MiB), offset_bytes=0, size_bytes=2 * MiB, sparse=False, durable=True)
        after = store.usage()

        assert after.used_bytes - before.used_bytes >= 2 * MiB
        assert after.free_bytes >= 0
        assert after.weight_bytes > 0
        disks = store.disks()
        assert [disk.path for disk in disks] == sorted(disk.path for disk in disks)
        assert len(disks) >= 1
        assert sum(disk.usage.used_bytes for disk in disks) == after.used_bytes
        assert sum(disk.usage.weight_bytes for disk in disks) == after.weight_bytes
        assert store.weights() == {disk.path: disk.usage.weight_bytes for disk in disks}
        assert store.reweigh().weight_bytes == sum(store.weights().values()) > 0

    def test_restart_finds_everything(self, store_factory: StoreFactory, options: StoreOptions) -> None:
        """A second store on the same disks has the same shards, versions and weight."""
        first = store_factory(options)
        for number, key in enumerate(ASSORTED):
            put(first, key, content(number, 5000), durable=number % 2 == 0)
        first.retire(KEY, 7)
        weight = first.usage().weight_bytes
        first.close()

        second = store_factory(options)

        assert list(second.keys()) == [key for key in ASSORTED if key != KEY]
        for number, key in enumerate(ASSORTED):
            found = get_stale(second, key, 7) if key == KEY else get(second, key)
            assert found == content(number, 5000), key
        assert second.usage().weight_bytes == weight
        second.close()

    def test_unknown_disk(self, store: ObjectStore, tmp_path: Path) -> None:
        """Removing a disk that is none of ours is refused and changes nothing."""
        put(store, KEY, b"data")
        before = store.disks()

        with pytest.raises(StoreError):
            store.remove_disk(str(tmp_path / "nowhere"))

        assert [disk.path for disk in store.disks()] == [disk.path for disk in before]
        assert get(store, KEY) == b"data"

    # ---- many at once

    def test_different_keys_concurrently(self, store: ObjectStore) -> None:
        """Threads that work on different shards do not disturb each other."""

        def work(number: int) -> list[ShardKey]:
            rng = random.Random(number)
            kept = []
            for round_number in range(6):
                key = ShardKey(data_oid(number + 1, round_number), rng.choice((-1, 0, 1)))
                data = bytearray(rng.randbytes(rng.randrange(1, 40_000)))
                store.create(key, data, offset_bytes=0, size_bytes=len(data), sparse=False, durable=rng.random() < 0.2)
                patch = rng.randbytes(rng.randrange(1, 5000))[: len(data)]
                store.write(key, patch, offset_bytes=0, durable=False)
                data[: len(patch)] = patch
                store.sync([key])
                assert get(store, key) == data
                assert store.digest(key) == hashlib.sha1(data).digest()
                if round_number % 3 == 0:
                    store.remove(key)
                elif round_number % 3 == 1:
                    store.retire(key, round_number)
                    assert get_stale(store, key, round_number) == data
                else:
                    kept.append(key)
            return kept

        with ThreadPoolExecutor(8) as pool:
            expected = [key for kept in pool.map(work, range(8)) for key in kept]

        assert list(store.keys()) == sorted(expected)

    def test_reading_while_writing(self, store: ObjectStore) -> None:
        """Readers of a shard that is written and replaced meanwhile see all its bytes and no error."""
        size = 32 * KiB
        put(store, KEY, bytes([1]) * size)

        def read(_: int) -> None:
            for _attempt in range(40):
                found = get(store, KEY, size)
                assert len(found) == size
                assert set(found) <= {1, 2, 3}

        with ThreadPoolExecutor(4) as pool:
            readers = pool.map(read, range(3))
            for round_number in range(30):
                value = bytes([1 + round_number % 3])
                store.write(KEY, value * 4096, offset_bytes=4096, durable=False)
                put(store, KEY, value * size)
            list(readers)

    @pytest.mark.parametrize("seed", range(3))
    def test_random_operations(self, store_factory: StoreFactory, options: StoreOptions, seed: int) -> None:
        """Any sequence of operations leaves what a model in memory says, across restarts."""
        rng = random.Random(seed)
        keys = [KEY, OTHER, ShardKey(KEY.oid, 0), ShardKey(KEY.oid, 1), INODE]
        live: dict[ShardKey, bytearray] = {}
        stale: dict[tuple[ShardKey, int], bytes] = {}
        store = store_factory(options)
        for step in range(150):
            key = rng.choice(keys)
            action = rng.choice(("create", "create", "write", "write", "write", "read", "remove", "retire", "revive"))
            epoch = rng.randrange(1, 4)
            durable = rng.random() < 0.05
            if action == "create":
                size = rng.randrange(1, 30_000)
                offset = rng.randrange(0, size)
                data = rng.randbytes(rng.randrange(0, size - offset + 1))
                sparse = rng.random() < 0.5
                store.create(key, data, offset_bytes=offset, size_bytes=size, sparse=sparse, durable=durable)
                live[key] = bytearray(size)
                live[key][offset : offset + len(data)] = data
            elif action == "revive" and (key, epoch) in stale:
                store.revive(key, epoch)
                live.setdefault(key, bytearray(stale[key, epoch]))
                # Whether later writes show through the stale version is left to the store: drop it on both sides.
                store.purge_stale()
                stale.clear()
            elif key in live and action == "write":
                offset = rng.randrange(0, len(live[key]))
                data = rng.choice((bytes, rng.randbytes))(rng.randrange(1, len(live[key]) - offset + 1))
                store.write(key, data, offset_bytes=offset, durable=durable)
                live[key][offset : offset + len(data)] = data
            elif key in live and action == "remove":
                store.remove(key)
                del live[key]
            elif key in live and action == "retire":
                store.retire(key, epoch)
                stale[key, epoch] = bytes(live.pop(key))
            elif key in live:
                assert get(store, key) == live[key], f"seed {seed} step {step}"
            if step % 60 == 59:
                store.close()
                store = store_factory(options)

        assert {key: get(store, key) for key in store.keys()} == live, f"seed {seed}"  # noqa: SIM118
        assert {(key, epoch): get_stale(store, key, epoch) for key, epoch in store.stale_keys()} == stale
        store.close()
