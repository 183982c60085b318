"""Checksums on disk: when they are there, what they survive, and what makes them void."""

import os
import shutil
from array import array
from types import SimpleNamespace

import pytest

from sheepdog.builtin.filestore import parse_file_name
from sheepdog.daemon.checksum_files import ChecksumFiles
from sheepdog.daemon.checksums import _STATE_BYTES
from sheepdog.errors import ShardCorrupt, StoreBusy
from sheepdog.testing.store_kit import content, get, get_stale, put

from .checksummed import BLOCK, KEY, SIZE, STRIP, flip, open_store, rest


@pytest.fixture
def store(tmp_path):
    store = open_store(tmp_path)
    yield store
    store.close()


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


def test_whose_config(tmp_path):
    """A sheep that dies while it replaces its config file has used the directory itself, with either of the two; a copy
    of the directory is no use of it. Whoever else replaced the file is noticed, once."""

    def used_elsewhere(base=tmp_path):
        found = []
        files = ChecksumFiles(str(base), durable=True, used_elsewhere=lambda: found.append(base))
        return files, bool(found)

    config, new = tmp_path / "config", tmp_path / "new"
    config.write_bytes(b"first")
    os.utime(config, (1000, 1000))
    files, _ = used_elsewhere()
    new.write_bytes(b"other")
    os.utime(new, (2000, 2000))
    files.config_follows(new.stat())
    files, foreign = used_elsewhere()
    assert not foreign
    files.config_follows(new.stat())
    new.rename(config)
    files, foreign = used_elsewhere()
    assert not foreign

    shutil.copytree(tmp_path, tmp_path / "copy")
    assert not used_elsewhere(tmp_path / "copy")[1]
    os.utime(config, (3000, 3000))
    assert [used_elsewhere()[1] for _ in range(2)] == [True, False]


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
