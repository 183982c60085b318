"""The checksummed store: it is a store like any other, and tells what was not stored through it."""

import os
import random
import threading

import pytest

from sheepdog.builtin.filestore import FileStore
from sheepdog.contracts.store import ShardKey, StoreOptions
from sheepdog.daemon.block_sums import sum_of, sums_of
from sheepdog.daemon.checksum_files import ChecksumFiles
from sheepdog.daemon.checksums import _STATE_BYTES, ChecksummedStore
from sheepdog.daemon.journal import Journal
from sheepdog.daemon.journaled_store import JournaledStore
from sheepdog.errors import ObjectNotFound, ShardCorrupt, StoreError
from sheepdog.model.ids import data_oid
from sheepdog.testing.memory_store import MemoryMedium, MemoryStore
from sheepdog.testing.store_kit import StoreKit, content, get, get_stale, put

from .checksummed import BLOCK, KEY, SIZE, STRIP, flip, open_store, rest
from .conftest import Flat


@pytest.fixture
def store(tmp_path):
    store = open_store(tmp_path)
    yield store
    store.close()


class TestChecksummedFiles(StoreKit):
    """With checksums a store still does all that the contract says."""

    @pytest.fixture
    def store_factory(self, tmp_path):
        def make(options):
            return ChecksummedStore(FileStore(options, Flat()), ChecksumFiles(str(tmp_path), durable=True, boot_id="b"))

        return make


class TestChecksummedJournal(StoreKit):
    """And with a journal in front of it."""

    @pytest.fixture
    def store_factory(self, tmp_path):
        made = []

        def make(options):
            directory = tmp_path / f"journal{len(made)}"
            directory.mkdir()
            made.append(Journal(str(directory), 64 << 20))
            files = ChecksumFiles(str(tmp_path), durable=True, boot_id="b")
            return JournaledStore(ChecksummedStore(FileStore(options, Flat()), files), made[-1])

        yield make
        for journal in made:
            journal.finish()


@pytest.mark.parametrize("offset", [0, 1, BLOCK - 1, BLOCK, 5 * BLOCK + 7, SIZE - 1])
@pytest.mark.parametrize("restart", [False, True])
def test_flipped_bit(tmp_path, offset, restart):
    """A changed bit is noticed by every kind of read that touches its block, and by no other."""
    store = open_store(tmp_path)
    put(store, KEY, content(1, SIZE))
    if restart:
        store.close()
        store = open_store(tmp_path)
    flip(store, KEY, offset)
    block = offset // BLOCK * BLOCK

    for at, length in ((0, SIZE), (offset, 1), (block, BLOCK), (max(0, offset - 10), 30), (block, SIZE)):
        with pytest.raises(ShardCorrupt, match=f"block at {block}"):
            store.read_into(KEY, memoryview(bytearray(length)), offset_bytes=at)
        with pytest.raises(ShardCorrupt):
            store.try_read_into(KEY, memoryview(bytearray(length)), offset_bytes=at)
    with pytest.raises(ShardCorrupt):
        store.digest(KEY)
    with pytest.raises(ShardCorrupt):
        store.verify(KEY, offset_bytes=0, length_bytes=SIZE)
    other = 2 * BLOCK
    assert get(store, KEY, 100, other + 5) == content(1, SIZE)[other + 5 : other + 105]
    store.close()


def test_truncated_and_grown(store):
    """A file that was cut short, or grew, is not what was stored."""
    put(store, KEY, content(1, SIZE))
    path = store.inner._paths[KEY]

    os.truncate(path, SIZE - 1)
    with pytest.raises(ShardCorrupt, match="bytes instead of"):
        get(store, KEY, SIZE)
    with pytest.raises(ShardCorrupt):
        store.digest(KEY)
    os.truncate(path, SIZE + 5000)

    with pytest.raises(ShardCorrupt):
        store.read_into(KEY, memoryview(bytearray(SIZE + 100)), offset_bytes=0)


@pytest.mark.parametrize("seed", range(4))
def test_random_writes(tmp_path, seed):
    """After any writes, rests and restarts, what was stored reads back and every block is known."""
    rng = random.Random(seed)
    store = open_store(tmp_path)
    expected = bytearray(rng.randbytes(SIZE))
    put(store, KEY, bytes(expected))
    for _ in range(120):
        offset = rng.choice([0, rng.randrange(SIZE), rng.randrange(10) * BLOCK])
        length = min(rng.choice([1, 512, BLOCK, BLOCK, 3 * BLOCK, rng.randrange(1, SIZE)]), SIZE - offset)
        data = rng.randbytes(length)
        store.write(KEY, data, offset_bytes=offset, durable=rng.random() < 0.1)
        expected[offset : offset + length] = data
        if rng.random() < 0.1:
            rest(store)
        if rng.random() < 0.1:
            store.close()
            store = open_store(tmp_path)
        at = rng.randrange(SIZE)
        assert get(store, KEY, 2000, at) == expected[at : at + 2000]

    assert store.verify(KEY, offset_bytes=0, length_bytes=SIZE) == (SIZE, True)
    assert get(store, KEY) == expected
    store.close()


def test_write_beside_a_corrupt_byte(store):
    """A write into a part of a corrupt block does not make the rest of it right."""
    put(store, KEY, content(1, SIZE))
    flip(store, KEY, 100)

    store.write(KEY, b"new", offset_bytes=2000, durable=False)
    with pytest.raises(ShardCorrupt):
        get(store, KEY, 10, 2000)
    store.write(KEY, content(2, BLOCK), offset_bytes=0, durable=False)

    assert get(store, KEY, BLOCK) == content(2, BLOCK)


def test_other_blocks_stay_known(store):
    """A shard that is written to goes on telling of the blocks that are not."""
    put(store, KEY, content(1, SIZE))
    rest(store)
    flip(store, KEY, 3 * BLOCK)

    store.write(KEY, content(2, BLOCK), offset_bytes=0, durable=False)
    rest(store)

    with pytest.raises(ShardCorrupt):
        get(store, KEY, BLOCK, 3 * BLOCK)


def test_set_aside_and_back(tmp_path):
    """Checksums follow a shard to where it is set aside and back; other content there is noticed."""
    store = open_store(tmp_path)
    put(store, KEY, content(1, SIZE))
    put(store, STRIP, content(2, SIZE))
    rest(store)
    store.write(STRIP, b"x", offset_bytes=0, durable=False)
    for key in (KEY, STRIP):
        store.retire(key, 3)
    flipped = [path for path in (tmp_path / "disk" / ".stale").iterdir() if "_" in path.name]
    data = bytearray(flipped[0].read_bytes())
    data[9000] ^= 1
    flipped[0].write_bytes(data)

    assert get_stale(store, KEY, 3) == content(1, SIZE)
    with pytest.raises(ShardCorrupt, match="epoch=3"):
        get_stale(store, STRIP, 3)
    with pytest.raises(ShardCorrupt):
        store.digest(STRIP, epoch=3)
    store.revive(KEY, 3)
    assert store.verify(KEY, offset_bytes=0, length_bytes=SIZE) == (SIZE, True)
    store.write(KEY, b"changed", offset_bytes=0, durable=False)  # and through it the version that is set aside
    assert get_stale(store, KEY, 3)[:7] in (b"changed", content(1, 7))
    store.purge_stale()
    assert list((tmp_path / "sums" / "stale").iterdir()) == []


def test_nothing_is_left_behind(tmp_path, store):
    """A shard that was removed, or made anew, is not measured by what was there before."""
    put(store, KEY, content(1, SIZE))
    rest(store)
    store.remove(KEY)
    assert list((tmp_path / "sums").glob("??/*")) == []
    with pytest.raises(ObjectNotFound):
        store.verify(KEY, offset_bytes=0, length_bytes=1)
    put(store, KEY, content(2, 3 * BLOCK))
    rest(store)
    put(store, KEY, content(3, 2 * BLOCK))

    assert get(store, KEY) == content(3, 2 * BLOCK)
    store.wipe()
    assert list((tmp_path / "sums").glob("??")) == []


def test_accept(store):
    """Accepted content is known from then on, if it is what was compared."""
    put(store.inner, KEY, content(1, SIZE))
    digest = store.stored_digest(KEY)
    assert not store.verify(KEY, offset_bytes=0, length_bytes=SIZE).complete

    assert not store.accept(KEY, bytes(20))
    assert store.accept(KEY, digest)
    assert store.verify(KEY, offset_bytes=0, length_bytes=SIZE).complete
    flip(store, KEY, 7)

    with pytest.raises(ShardCorrupt):
        get(store, KEY)
    assert store.stored_digest(KEY) != digest
    assert store.accept(KEY, store.stored_digest(KEY))
    assert len(get(store, KEY)) == SIZE


def test_bounded_memory(tmp_path):
    """Checksums in memory stay below their limit, and what was pushed out is known again from disk."""
    store = open_store(tmp_path, memory_bytes_max=20_000)
    keys = [ShardKey(data_oid(5, index)) for index in range(200)]
    for key in keys:
        put(store, key, content(key.oid, SIZE))
        rest(store)

    assert len(store._states) <= 100
    assert store._memory_bytes <= 20_000
    for key in keys:
        assert store.verify(key, offset_bytes=0, length_bytes=SIZE).complete


def test_what_rests_makes_room(tmp_path):
    """A pass of the scrub, which looks at everything, does not push out what is known only in memory."""
    store = open_store(tmp_path, memory_bytes_max=20 * (_STATE_BYTES + 4 * 11))
    others = [ShardKey(data_oid(0x1234, index)) for index in range(10, 60)]
    for key in others:
        put(store, key, content(1, SIZE))
        rest(store)
    put(store, KEY, content(2, SIZE))

    for key in others:
        store.verify(key, offset_bytes=0, length_bytes=SIZE)

    assert store.verify(KEY, offset_bytes=0, length_bytes=SIZE) == (SIZE, True)
    assert len(store._states) <= 20


def test_failed_write(tmp_path):
    """Of blocks that a failed write may have touched nothing is known."""

    class Failing(MemoryStore):
        failing = False

        def write(self, key, data, *, offset_bytes, durable):
            if self.failing:
                super().write(key, data[: len(data) // 2], offset_bytes=offset_bytes, durable=durable)
                raise StoreError("half of it")
            super().write(key, data, offset_bytes=offset_bytes, durable=durable)

    inner = Failing(StoreOptions((str(tmp_path),)), MemoryMedium())
    store = ChecksummedStore(inner, ChecksumFiles(str(tmp_path), durable=True, boot_id="b"))
    put(store, KEY, content(1, SIZE))
    inner.failing = True

    with pytest.raises(StoreError):
        store.write(KEY, content(2, 2 * BLOCK), offset_bytes=0, durable=False)
    with pytest.raises(StoreError):
        store.try_write(KEY, content(3, BLOCK), offset_bytes=4 * BLOCK)

    assert get(store, KEY)[:BLOCK] == content(2, 2 * BLOCK)[:BLOCK]
    assert not store.verify(KEY, offset_bytes=0, length_bytes=BLOCK).complete
    assert store.verify(KEY, offset_bytes=2 * BLOCK, length_bytes=BLOCK).complete
    assert get(store, KEY)[4 * BLOCK : 4 * BLOCK + 100] == content(3, BLOCK)[:100]
    assert not store.verify(KEY, offset_bytes=4 * BLOCK, length_bytes=BLOCK).complete


def test_reading_beside_writes(store):
    """Reads in other threads beside writes and rests never call anything corrupt."""
    size = 64 * BLOCK
    put(store, KEY, content(1, size))
    stop = threading.Event()
    failures = []

    def read():
        rng = random.Random(5)
        while not stop.is_set():
            offset = rng.randrange(size)
            try:
                store.read_into(KEY, memoryview(bytearray(9000)), offset_bytes=offset)
                store.try_read_into(KEY, memoryview(bytearray(9000)), offset_bytes=offset)
            except StoreError as error:
                failures.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    rng = random.Random(6)
    for number in range(1500):
        length = rng.choice([100, BLOCK, 2 * BLOCK])
        offset = rng.randrange((size - length) // 512) * 512
        store.write(KEY, rng.randbytes(length), offset_bytes=offset, durable=False)
        if number % 50 == 0:
            store.upkeep()
        if number % 400 == 399:
            put(store, KEY, content(number, size))
    stop.set()
    for thread in threads:
        thread.join()

    assert failures == []
    assert store.verify(KEY, offset_bytes=0, length_bytes=size).complete


@pytest.mark.parametrize("change", ["create", "remove", "retire"])
def test_reads_while_a_shard_is_replaced(tmp_path, change):
    """Bytes that were wrong before do not pass for right while the shard is replaced, removed or set aside."""
    store = open_store(tmp_path)
    put(store, KEY, content(1, SIZE))
    flip(store, KEY, 0)
    seen = []

    def look(*arguments, **named):
        seen.append(store.try_read_into(KEY, memoryview(bytearray(BLOCK)), offset_bytes=0))
        thread = threading.Thread(target=read)
        thread.start()
        thread.join(0.05)
        threads.append(thread)
        return getattr(type(store.inner), change)(store.inner, *arguments, **named)

    def read():
        try:
            seen.append(bytes(get(store, KEY, BLOCK)))
        except StoreError as error:
            seen.append(type(error))

    threads = []
    setattr(store.inner, change, look)
    if change == "create":
        put(store, KEY, content(2, SIZE))
    elif change == "remove":
        store.remove(KEY)
    else:
        store.retire(KEY, 3)
    for thread in threads:
        thread.join()

    assert seen == [None, content(2, SIZE)[:BLOCK] if change == "create" else ObjectNotFound]


def test_failed_create(store):
    """A create that failed changed nothing, and what was known stays known."""
    put(store, KEY, content(1, SIZE))
    rest(store)

    def full(*arguments, **named):
        raise StoreError("full")

    store.inner.create = full
    with pytest.raises(StoreError):
        put(store, KEY, content(2, SIZE))
    del store.inner.create

    assert store.verify(KEY, offset_bytes=0, length_bytes=SIZE) == (SIZE, True)
    assert get(store, KEY) == content(1, SIZE)


def test_ready(store):
    """Changes that would have to read or remove checksums on disk are not for the event loop; of a shard that does not
    exist that can be said at once."""
    assert store.ready(KEY)
    put(store, KEY, content(1, SIZE))
    assert store.ready(KEY)
    rest(store)
    assert not store.ready(KEY)
    store.write(KEY, b"x", offset_bytes=0, durable=False)
    assert store.ready(KEY)
    with store._lock:
        store._forget(KEY)
    assert not store.ready(KEY)


def test_many_blocks_at_once():
    """The quick way for many blocks says what the one for a single block says."""
    data = content(1, (300 << 10) + (1 << 20))

    sums = sums_of(memoryview(data))

    assert list(sums) == [sum_of(data[begin : begin + BLOCK]) for begin in range(0, len(data), BLOCK)]
