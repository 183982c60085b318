"""The checksummed store: it is a store like any other, and tells what was not stored through it."""

import os
import random
import threading
from array import array
from types import SimpleNamespace

import pytest

from sheepdog.builtin.filestore import FileStore, parse_file_name
from sheepdog.contracts.store import ShardKey, StoreOptions
from sheepdog.daemon.checksum_files import ChecksumFiles
from sheepdog.daemon.checksums import _STATE_BYTES, ChecksummedStore, sum_of, sums_of
from sheepdog.daemon.journal import Journal, JournaledStore
from sheepdog.errors import ObjectNotFound, ShardCorrupt, StoreBusy, StoreError
from sheepdog.model.ids import data_oid
from sheepdog.testing.memory_store import MemoryMedium, MemoryStore
from sheepdog.testing.store_kit import StoreKit, content, get, get_stale, put

from .conftest import Flat

KEY = ShardKey(data_oid(0x1234, 1))
STRIP = ShardKey(data_oid(0x1234, 1), 2)
BLOCK = 4096
SIZE = 10 * BLOCK + 100


def open_store(tmp_path, *, durable=True, boot_id="b", started_ns=0, **more):
    disk = tmp_path / "disk"
    disk.mkdir(exist_ok=True)
    files = ChecksumFiles(str(tmp_path), durable=durable, boot_id=boot_id, started_ns=started_ns)
    return ChecksummedStore(FileStore(StoreOptions((str(disk),)), Flat()), files, **more)


@pytest.fixture
def store(tmp_path):
    store = open_store(tmp_path)
    yield store
    store.close()


def rest(store):
    """Half minutes go by."""
    store.upkeep()
    store.upkeep()


def flip(store, key, offset):
    """One bit changes on the medium."""
    byte = bytearray(1)
    store.inner.read_into(key, memoryview(byte), offset_bytes=offset)
    store.inner.write(key, bytes([byte[0] ^ 1]), offset_bytes=offset, durable=False)


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


def killed(tmp_path, **more):
    """Another store on the same disk, as after ``kill -9``: nothing was closed."""
    return open_store(tmp_path, **more)


def test_killed(tmp_path):
    """After kill -9 a shard that rested is still known, one that had just changed is not."""
    store = open_store(tmp_path)
    put(store, KEY, content(1, SIZE))
    put(store, STRIP, content(2, SIZE))
    rest(store)
    store.write(KEY, content(3, BLOCK), offset_bytes=BLOCK, durable=False)

    after = killed(tmp_path)

    assert get(after, KEY, BLOCK, BLOCK) == content(3, BLOCK)
    assert after.verify(KEY, offset_bytes=0, length_bytes=SIZE) == (SIZE, False)
    assert after.verify(STRIP, offset_bytes=0, length_bytes=SIZE) == (SIZE, True)


@pytest.mark.parametrize(
    ("before", "now", "kept"),
    [
        ({"durable": False}, {"durable": False}, True),
        ({"durable": False}, {"durable": False, "boot_id": "c"}, False),
        ({"durable": False}, {"durable": True}, False),
        ({"durable": True}, {"durable": True, "boot_id": "c"}, True),
    ],
)
def test_power_loss(tmp_path, before, now, kept):
    """What the machine lost with its power under -n is not called corrupt; flushed checksums are kept."""
    store = open_store(tmp_path, **before)
    put(store, KEY, content(1, SIZE))
    rest(store)
    flip(store, KEY, 0)  # a write that was half on disk, of which the checksums knew nothing

    after = killed(tmp_path, **now)

    if kept:
        with pytest.raises(ShardCorrupt):
            get(after, KEY)
    else:
        assert len(get(after, KEY)) == SIZE


def test_journal_replay(tmp_path):
    """What a replay writes to may differ from checksums that came back with the power: they are not believed."""
    store = open_store(tmp_path)
    put(store, KEY, content(1, SIZE))
    rest(store)
    (path,) = (tmp_path / "sums").glob("??/*")
    raw = path.read_bytes()
    store.write(KEY, b"first", offset_bytes=10, durable=False)
    store.write(KEY, b"second", offset_bytes=5000, durable=False)
    path.write_bytes(raw)  # its removal did not reach the disk, what was written did

    after = open_store(tmp_path, boot_id="c")
    after.distrust = True
    after.write(KEY, b"second", offset_bytes=5000, durable=False)
    after.distrust = False

    assert get(after, KEY)[10:15] == b"first"
    assert after._memory_bytes == _STATE_BYTES + 4 * 11
    assert not after.verify(KEY, offset_bytes=0, length_bytes=SIZE).complete


def test_another_program_used_the_directory(tmp_path):
    """Where an original sheep ran since, which rewrote the config file and the objects, nothing is called corrupt."""
    (tmp_path / "config").write_bytes(b"ours")
    store = open_store(tmp_path)
    put(store, KEY, content(1, SIZE))
    store.close()
    same = open_store(tmp_path)
    assert same.verify(KEY, offset_bytes=0, length_bytes=SIZE).complete
    same._files.config_written()
    same.close()
    os.replace(tmp_path / "config", tmp_path / "old")
    (tmp_path / "config").write_bytes(b"thei")
    flip(same, KEY, 5)

    after = open_store(tmp_path)

    assert after.verify(KEY, offset_bytes=0, length_bytes=SIZE) == (SIZE, False)
    assert len(get(after, KEY)) == SIZE


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damaged_checksums(tmp_path, damage):
    """A file of checksums that is not whole counts as none: it says nothing about the shard."""
    store = open_store(tmp_path)
    put(store, KEY, content(1, SIZE))
    store.close()
    (path,) = (tmp_path / "sums").glob("??/*")
    raw = path.read_bytes()
    path.write_bytes({"cut": raw[:-3], "flip": raw[:-3] + bytes([raw[-3] ^ 8]) + raw[-2:], "empty": b""}[damage])

    after = open_store(tmp_path)

    assert after.verify(KEY, offset_bytes=0, length_bytes=SIZE) == (SIZE, False)
    assert get(after, KEY) == content(1, SIZE)


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


def test_unwritable_checksums(tmp_path, store):
    """Without room for checksums there are none; nothing else fails."""
    put(store, KEY, content(1, SIZE))
    store._files._path = lambda key, epoch: str(tmp_path / "disk" / f"{key.oid:016x}" / "below-a-file")
    rest(store)

    assert get(store, KEY) == content(1, SIZE)
    assert store.verify(KEY, offset_bytes=0, length_bytes=SIZE) == (SIZE, True)
    store.write(KEY, content(2, BLOCK), offset_bytes=0, durable=True)
    assert get(store, KEY, BLOCK) == content(2, BLOCK)


@pytest.mark.parametrize("scarce", ["f_bavail", "f_favail"])
def test_room_is_left_to_others(tmp_path, monkeypatch, scarce):
    """A file system that is almost full keeps its last space and files for what a sheep cannot do without."""
    store = open_store(tmp_path)
    put(store, KEY, content(1, SIZE))
    real = os.statvfs(tmp_path)
    fields = {name: getattr(real, name) for name in ("f_frsize", "f_blocks", "f_bavail", "f_files", "f_favail")}
    fields |= {"f_files": 1 << 20, "f_favail": 1 << 20, scarce: 5000}
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(**fields))

    rest(store)

    assert not list((tmp_path / "sums").glob("??/*"))
    assert store.verify(KEY, offset_bytes=0, length_bytes=SIZE) == (SIZE, True)
    monkeypatch.undo()
    store.write(KEY, b"x", offset_bytes=0, durable=False)
    rest(store)
    assert list((tmp_path / "sums").glob("??/*"))


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

    assert get(store, KEY)[:BLOCK] == content(2, 2 * BLOCK)[:BLOCK]
    assert not store.verify(KEY, offset_bytes=0, length_bytes=BLOCK).complete
    assert store.verify(KEY, offset_bytes=2 * BLOCK, length_bytes=BLOCK).complete


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


@pytest.mark.parametrize("durable", [False, True])
def test_removals_are_flushed_before_a_change(tmp_path, durable):
    """Without -n the removal of checksums is on stable storage before a change begins that they do not know, for its
    bytes may reach the disk at once. If that fails nothing changes, and the next attempt sees to it again."""
    order = []
    store = open_store(tmp_path)
    put(store, KEY, content(1, SIZE))
    rest(store)
    (path,) = (tmp_path / "sums").glob("??/*")
    flush, write = store._files.flush, store.inner.write

    def failing():
        raise StoreBusy("too many open files")

    def written(*arguments, **named):
        order.append((path.exists(), len(store._files._unflushed)))
        write(*arguments, **named)

    store.inner.write = written
    store._files.flush = failing
    assert not store.ready(KEY)
    with pytest.raises(StoreBusy):
        store.write(KEY, content(2, BLOCK), offset_bytes=0, durable=durable)
    assert (get(store, KEY), order) == (content(1, SIZE), [])
    store._files.flush = flush
    store.write(KEY, content(2, BLOCK), offset_bytes=0, durable=durable)

    assert order == [(False, 0)]
    assert store.ready(KEY)


def test_removals_of_a_killed_process_are_flushed(tmp_path, monkeypatch):
    """Who was killed between the removal of checksums and its flush leaves the flush to the next process, before that
    changes anything. After a power loss there is nothing to flush."""
    store = open_store(tmp_path)
    put(store, KEY, content(1, SIZE))
    rest(store)
    store._files.drop(KEY)
    flushed = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))

    killed(tmp_path)
    here = list(flushed)
    flushed.clear()
    killed(tmp_path, boot_id="c")

    directory = str(next((tmp_path / "sums").glob("[0-9a-f][0-9a-f]")))
    assert directory in here
    assert directory not in flushed


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


def test_failed_flush(tmp_path):
    """Of a shard that could not be flushed nothing is known: the old bytes may be there again one day."""
    store = open_store(tmp_path)
    put(store, KEY, content(1, SIZE))
    store.write(KEY, content(2, BLOCK), offset_bytes=0, durable=False)

    def failing(keys):
        raise StoreBusy("too many open files")

    store.inner.sync, sync = failing, store.inner.sync
    with pytest.raises(StoreBusy):
        store.sync(iter([KEY]))
    store.inner.sync = sync
    rest(store)

    assert store.verify(KEY, offset_bytes=0, length_bytes=SIZE) == (SIZE, False)
    assert get(store, KEY, BLOCK) == content(2, BLOCK)


@pytest.mark.parametrize("step", ["rest", "rest at the end", "set aside", "accept"])
def test_data_is_flushed_before_checksums_are_written(tmp_path, step):
    """Checksums of bytes that only the page cache has would make the old ones look corrupt after a power loss."""
    store = open_store(tmp_path)
    put(store, KEY, content(1, SIZE))
    store.write(KEY, content(2, BLOCK), offset_bytes=0, durable=False)
    order = []
    sync, save = store.inner.sync, store._files.save
    store.inner.sync = lambda keys: (order.append("data"), sync(keys))
    store._files.save = lambda *what: order.append("sums") or save(*what)

    if step == "rest":
        rest(store)
    elif step == "set aside":
        store.retire(KEY, 3)
    elif step == "accept":
        assert store.accept(KEY, store.stored_digest(KEY))
    store.close()

    assert order[:2] == ["data", "sums"]


def test_change_while_coming_to_rest(tmp_path):
    """A change between the flush of a shard and the writing of its checksums is not flushed: it does not rest."""
    store = open_store(tmp_path)
    put(store, KEY, content(1, SIZE))
    sync = store.inner.sync

    def changing(keys):
        sync(keys)
        store.write(KEY, content(2, BLOCK), offset_bytes=0, durable=False)

    store.upkeep()
    store.inner.sync = changing
    store.upkeep()
    store.inner.sync = sync

    assert not list((tmp_path / "sums").glob("??/*"))
    rest(store)
    assert list((tmp_path / "sums").glob("??/*"))
    assert store.verify(KEY, offset_bytes=0, length_bytes=SIZE) == (SIZE, True)


def test_names_are_not_those_of_objects(tmp_path):
    """Whoever looks for objects by the names of their files, below the whole directory, finds no checksums."""
    store = open_store(tmp_path)
    for key in (KEY, STRIP):
        put(store, key, content(1, SIZE))
        rest(store)
        store.retire(key, 3)
        put(store, key, content(1, SIZE))
    rest(store)

    names = [path.name for path in (tmp_path / "sums").rglob("*") if path.is_file()]
    assert len(names) == 5
    assert not any(parse_file_name(name) for name in names)


def test_many_blocks_at_once():
    """The quick way for many blocks says what the one for a single block says."""
    data = content(1, (300 << 10) + (1 << 20))

    sums = sums_of(memoryview(data))

    assert list(sums) == [sum_of(data[begin : begin + BLOCK]) for begin in range(0, len(data), BLOCK)]


def test_side_file_is_small(tmp_path, store):
    """A data object of 4 MiB has 4 KiB of checksums."""
    put(store, KEY, bytes(4 << 20))
    rest(store)

    (path,) = (tmp_path / "sums").glob("??/*")
    assert path.stat().st_size == 4096 + 56
    size, sums, _ = store._files.load(KEY)
    assert (size, sums) == (4 << 20, array("I", [sums[0]]) * 1024)


def saved_then_changed(tmp_path, change, *, stale=False):
    """A shard that rests (or lies aside), of whose file a bit changes while no store is open; its path."""
    store = open_store(tmp_path)
    put(store, KEY, content(1, SIZE))
    path = store.inner._paths[KEY]
    if stale:
        rest(store)
        store.retire(KEY, 3)
        path = str(next((tmp_path / "disk" / ".stale").iterdir()))
    store.close()
    before = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(5 * BLOCK)
        byte = file.read(1)[0]
        file.seek(5 * BLOCK)
        file.write(bytes([byte ^ 1]))
    change(path, before)
    with open(path, "rb") as file:
        return path, file.read()


@pytest.mark.parametrize("stale", [False, True])
def test_edited_while_no_sheep_ran(tmp_path, stale):
    """Another time of the last change, before our start: somebody did that on purpose. What lies there is served as it
    is, unknown until it is compared, changed or accepted; its neighbours keep their checksums."""
    path, edited = saved_then_changed(tmp_path, lambda path, _: os.truncate(path, SIZE - 10), stale=stale)
    started = os.stat(path).st_mtime_ns + 1

    store = open_store(tmp_path, started_ns=started)
    if stale:
        assert get_stale(store, KEY, 3) == edited
        store.close()
        return
    assert get(store, KEY) == edited
    assert not store.verify(KEY, offset_bytes=0, length_bytes=SIZE).complete
    assert store.accept(KEY, store.stored_digest(KEY))
    store.close()

    store = open_store(tmp_path, started_ns=started)
    assert store.verify(KEY, offset_bytes=0, length_bytes=SIZE).complete
    flip(store, KEY, 7)
    with pytest.raises(ShardCorrupt):
        get(store, KEY)
    store.close()


@pytest.mark.parametrize("when", ["unchanged", "after the start"])
@pytest.mark.parametrize("stale", [False, True])
def test_changed_by_the_disk(tmp_path, when, stale):
    """The same time of the last change, or one after our start: nobody did that on purpose."""
    later = 2_000_000_000_000_000_000

    def change(path, before):
        modified = before.st_mtime_ns if when == "unchanged" else later
        os.utime(path, ns=(before.st_atime_ns, modified))

    saved_then_changed(tmp_path, change, stale=stale)
    store = open_store(tmp_path, started_ns=later if when == "after the start" else later + 1)
    with pytest.raises(ShardCorrupt):
        _ = get_stale(store, KEY, 3) if stale else get(store, KEY)
    store.close()


def test_time_of_the_last_change(tmp_path):
    """What we write ourselves, also in pieces, set aside and brought back, is known to the next process."""
    store = open_store(tmp_path)
    put(store, KEY, content(1, SIZE))
    rest(store)
    store.write(KEY, b"more", offset_bytes=5, durable=True)
    rest(store)
    store.retire(KEY, 2)
    store.revive(KEY, 2)
    put(store, STRIP, content(2, SIZE))
    store.retire(STRIP, 2)
    store.revive(STRIP, 2)
    store.close()

    store = open_store(tmp_path, started_ns=2_000_000_000_000_000_000)
    for key in (KEY, STRIP):
        assert store.verify(key, offset_bytes=0, length_bytes=SIZE).complete
    store.close()
