"""What the file store promises beyond the contract: the original's files, crashes, failing and changing disks."""

import errno
import hashlib
import os
import shutil
import threading

import pytest

from sheepdog.builtin import filestore_disk
from sheepdog.builtin import filestore_io as io
from sheepdog.contracts.store import ShardKey
from sheepdog.errors import StoreBusy, StoreDeviceError, StoreFull
from sheepdog.testing.store_tools import INODE, INODE_BYTES, KEY, OTHER, MiB, get, put

from .helpers import KEYS, age, files, place, run_in_child

# ---- crashes


@pytest.mark.parametrize(
    ("step", "durable"),
    [
        ("write", False),
        ("rename", False),
        ("write", True),
        ("fdatasync", True),
        ("rename", True),
        ("sync_directory", True),
    ],
)
@pytest.mark.parametrize("replace", [False, True])
def test_crash_during_create(make, tmp_path, step, durable, replace):
    """A crash at any step of a create leaves the old shard or the new one, and after a restart no other file."""
    disk = tmp_path / "disk"
    store = make(disk)
    if replace:
        put(store, KEY, b"old" * 1000, durable=True)

    def crash(*_, **__):
        os._exit(42)

    def work():
        if step == "write":
            real = os.pwrite

            def half(fd, data, offset):
                real(fd, data[: len(data) // 2], offset)
                crash()

            os.pwrite = half
        elif step == "sync_directory":
            io.sync_directory = crash
        else:
            setattr(os, step, crash)
        put(store, KEY, b"new" * 1000, durable=durable)

    assert run_in_child(work) == 42

    store = make(disk)
    if step == "sync_directory":
        assert get(store, KEY) == b"new" * 1000
    elif replace:
        assert get(store, KEY) == b"old" * 1000
    else:
        assert not store.exists(KEY)
    assert len(files(disk)) == (1 if store.exists(KEY) else 0)


def test_start_removes_unfinished_files(make, tmp_path):
    """Anything with .tmp in its name goes at start, ours and the original's; foreign files stay, unseen."""
    store = make(tmp_path)
    put(store, KEY, b"data")
    directory = place(tmp_path, KEY).parent
    for name in ("00ed202b00000001.tmp", "00ed202b00000001_2.tmp", "00ed202b00000001.1f.tmp", "README", "ff" * 8):
        (directory / name).write_bytes(b"x")
    (tmp_path / ".stale" / "00ed202b00000001.3.tmp").write_bytes(b"x")

    store = make(tmp_path)

    assert sorted(os.listdir(directory))[-3:] == ["00ed202b00000000", "README", "ff" * 8]
    assert os.listdir(tmp_path / ".stale") == []
    assert list(store.keys()) == [KEY]


def test_names():
    """File names parse back to the shard, and only names that we would give are ours."""
    for key, epoch, name in (
        (ShardKey(0xED202B00000001), None, "00ed202b00000001"),
        (ShardKey(0xED202B00000001, 10), None, "00ed202b00000001_10"),
        (ShardKey(0xED202B00000001), 7, "00ed202b00000001.7"),
        (ShardKey(0xED202B00000001, 0), 12, "00ed202b00000001_0.12"),
    ):
        assert filestore_disk.parse_file_name(name) == (key, epoch)
        assert filestore_disk.file_name(key) + ("" if epoch is None else f".{epoch}") == name
    foreign = ("0" * 16, "f" * 16, "ED202B0000000001", "lost+found", "00ed202b0000001", "00ed202b00000001_")
    crippled = ("00ed202b00000001_-1", "00ed202b00000001.", "00ed202b00000001_1_2", "00ed202b00000001.01")
    for name in foreign + crippled:
        assert filestore_disk.parse_file_name(name) is None, name


# ---- errors


ERRORS = [
    (errno.ENOSPC, StoreFull),
    (errno.EDQUOT, StoreFull),
    (errno.EMFILE, StoreBusy),
    (errno.ENFILE, StoreBusy),
    (errno.EINTR, StoreBusy),
    (errno.EAGAIN, StoreBusy),
    (errno.EEXIST, StoreBusy),
    (errno.EIO, StoreDeviceError),
    (errno.EROFS, StoreDeviceError),
    (errno.EACCES, StoreDeviceError),
    (errno.ENOTDIR, StoreDeviceError),
]


@pytest.mark.parametrize(("code", "expected"), ERRORS, ids=[errno.errorcode[code] for code, _ in ERRORS])
def test_errors(make, tmp_path, monkeypatch, code, expected):
    """Each error of the operating system is the contract's error of its kind, wherever it happens."""
    store = make(tmp_path)
    put(store, KEY, b"old")
    before = files(tmp_path)
    buffer = memoryview(bytearray(3))

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    for call, attempt in (
        ("open", lambda: store.write(KEY, b"new", offset_bytes=0, durable=False)),
        ("open", lambda: store.write(KEY, b"new", offset_bytes=0, durable=True)),
        ("open", lambda: store.read_into(KEY, buffer, offset_bytes=0)),
        ("open", lambda: store.try_read_into(KEY, buffer, offset_bytes=0)),
        ("open", lambda: put(store, OTHER, b"new")),
        ("pwrite", lambda: store.write(KEY, b"new", offset_bytes=0, durable=False)),
        ("pwrite", lambda: store.write(KEY, b"new", offset_bytes=0, durable=True)),
        ("pwrite", lambda: put(store, OTHER, b"new")),
        ("preadv", lambda: store.read_into(KEY, buffer, offset_bytes=0)),
        ("preadv", lambda: store.digest(KEY)),
        ("fdatasync", lambda: put(store, OTHER, b"new", durable=True)),
        ("fdatasync", lambda: store.sync([KEY])),
        ("rename", lambda: put(store, OTHER, b"new")),
        ("rename", lambda: store.retire(KEY, 1)),
        ("unlink", lambda: store.remove(KEY)),
        ("stat", lambda: store.size(KEY)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(expected) as caught:
                attempt()
        if expected is StoreDeviceError:
            assert caught.value.path == str(tmp_path), call
        assert get(store, KEY) == b"old", call
        assert files(tmp_path) == before, call


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_lost_directory(make, tmp_path, how):
    """A directory that was removed, moved or replaced is a failed disk for every call, not a missing object."""
    disk = tmp_path / "disk"
    store = make(disk)
    put(store, KEY, b"data")
    put(store, OTHER, b"data")
    store.retire(OTHER, 1)
    if how == "removed":
        shutil.rmtree(disk)
    else:
        disk.rename(tmp_path / "away")
        if how == "replaced":
            disk.mkdir()
    buffer = memoryview(bytearray(4))

    for attempt in (
        lambda: store.read_into(KEY, buffer, offset_bytes=0),
        lambda: store.try_read_into(KEY, buffer, offset_bytes=0),
        lambda: store.write(KEY, b"new", offset_bytes=0, durable=False),
        lambda: store.write(KEY, b"new", offset_bytes=0, durable=True),
        lambda: put(store, KEY, b"new"),
        lambda: put(store, KEY, b"new", durable=True),
        lambda: store.exists(KEY),
        lambda: store.size(KEY),
        lambda: store.remove(KEY),
        lambda: store.retire(KEY, 1),
        lambda: store.revive(OTHER, 1),
        lambda: store.read_stale_into(OTHER, 1, buffer, offset_bytes=0),
        lambda: store.digest(KEY),
        lambda: store.sync([KEY]),
        lambda: store.wipe(),
    ):
        with pytest.raises(StoreDeviceError) as caught:
            attempt()
        assert caught.value.path == str(disk)
    if how != "replaced":
        for attempt in (lambda: list(store.keys()), lambda: list(store.stale_keys()), store.purge_stale, store.reweigh):
            with pytest.raises(StoreDeviceError):
                attempt()
        [listed] = store.disks()
        assert (listed.path, listed.usage.used_bytes, listed.usage.free_bytes) == (str(disk), 0, 0)
        assert store.usage() == (0, 0, listed.usage.weight_bytes)
    else:
        assert os.listdir(disk) == []


def test_last_disk_removed(make, tmp_path):
    """Without any disk every access is a device error, and there is no usage."""
    store = make(tmp_path)
    put(store, KEY, b"data")
    store.remove_disk(str(tmp_path))

    for attempt in (lambda: store.exists(KEY), lambda: get(store, KEY), lambda: put(store, KEY, b"x")):
        with pytest.raises(StoreDeviceError):
            attempt()
    assert store.disks() == ()
    assert list(store.keys()) == []


# ---- space


def test_full_disk(make, mounted):
    """On a full disk a create changes nothing; reading, writing in place and removing go on, and then creating too."""
    disk = mounted("disk", 8)
    store = make(disk)
    put(store, KEY, b"a" * 4 * MiB)
    store.create(INODE, b"i" * 4096, offset_bytes=0, size_bytes=INODE_BYTES, sparse=True, durable=False)
    before = files(disk)

    with pytest.raises(StoreFull):
        store.create(OTHER, b"b", offset_bytes=0, size_bytes=6 * MiB, sparse=False, durable=True)
    with pytest.raises(StoreFull):
        store.write(INODE, b"n" * 6 * MiB, offset_bytes=2048, durable=False)

    assert files(disk) == before
    assert get(store, INODE, 8192) == b"i" * 4096 + bytes(4096), "a write that does not fit writes nothing"
    store.write(KEY, b"c" * MiB, offset_bytes=MiB, durable=True)
    assert get(store, KEY, 3 * MiB, 0) == b"a" * MiB + b"c" * MiB + b"a" * MiB
    store.remove(KEY)
    store.create(OTHER, b"b", offset_bytes=0, size_bytes=6 * MiB, sparse=False, durable=True)


def test_allocation(make, tmp_path):
    """Sparse objects take the space of what was written, others all of theirs from the start."""
    store = make(tmp_path)
    store.create(INODE, b"x" * 100, offset_bytes=0, size_bytes=INODE_BYTES, sparse=True, durable=True)
    store.create(KEY, b"x" * 100, offset_bytes=0, size_bytes=4 * MiB, sparse=False, durable=True)

    assert os.stat(place(tmp_path, INODE)).st_blocks * 512 < 64 * 1024
    assert os.stat(place(tmp_path, KEY)).st_blocks * 512 >= 4 * MiB
    assert store.usage().used_bytes >= 4 * MiB


def test_zeros_written_to_a_sparse_object_free_space(make, tmp_path):
    """Zero blocks at the ends of a write to an inode become holes; a data object keeps its space."""
    store = make(tmp_path)
    for key in (INODE, KEY):
        store.create(key, b"x" * 4 * MiB, offset_bytes=0, size_bytes=4 * MiB, sparse=False, durable=True)
        store.write(key, bytes(2 * MiB) + b"y" * 4096 + bytes(MiB), offset_bytes=4096, durable=True)

    assert os.stat(place(tmp_path, INODE)).st_blocks * 512 <= MiB + 64 * 1024
    assert os.stat(place(tmp_path, KEY)).st_blocks * 512 >= 4 * MiB
    assert get(store, INODE) == get(store, KEY)


def test_without_fallocate(make, tmp_path, monkeypatch):
    """Where the file system can neither reserve nor punch, sizes and bytes are the same all the same."""
    monkeypatch.setattr(io, "_fallocate", lambda fd, mode, offset, length: False)
    store = make(tmp_path)

    store.create(KEY, b"x", offset_bytes=5000, size_bytes=64 * 1024, sparse=False, durable=True)
    store.create(INODE, b"i" * 20_000, offset_bytes=0, size_bytes=64 * 1024, sparse=True, durable=True)
    for _ in range(2):
        store.write(INODE, bytes(8192) + b"z" * 4096 + bytes(4096), offset_bytes=0, durable=True)

    assert get(store, KEY) == bytes(5000) + b"x" + bytes(64 * 1024 - 5001)
    assert get(store, INODE) == bytes(8192) + b"z" * 4096 + bytes(4096) + b"i" * 3616 + bytes(64 * 1024 - 20_000)


# ---- digests


def test_digest_is_remembered(make, tmp_path, monkeypatch):
    """A digest taken with ``cache`` is read from the attribute next time, in the original's form."""
    store = make(tmp_path)
    put(store, KEY, b"snapshot")
    path = place(tmp_path, KEY)
    age(path)
    expected = hashlib.sha1(b"snapshot").digest()
    assert store.digest(KEY, cache=True) == expected
    assert os.getxattr(path, "user.obj.sha1") == expected

    monkeypatch.setattr(io, "read_all", lambda *_: pytest.fail("the file was read again"))
    assert store.digest(KEY, cache=True) == expected


def test_digest_of_a_rotten_snapshot(make, tmp_path):
    """A file that changed behind our back is hashed again, whether the cached digest is ours or the original's."""
    store = make(tmp_path)
    put(store, KEY, b"snapshot")
    path = place(tmp_path, KEY)
    age(path)
    store.digest(KEY, cache=True)

    path.write_bytes(b"SNAPSHOT")
    assert store.digest(KEY, cache=True) == hashlib.sha1(b"SNAPSHOT").digest()

    put(store, OTHER, b"other")
    os.setxattr(place(tmp_path, OTHER), "user.obj.sha1", bytes(20))
    assert store.digest(OTHER, cache=True) == hashlib.sha1(b"other").digest()


def test_digest_of_a_fresh_file_is_not_remembered(make, tmp_path):
    """Two changes within one tick of the clock look the same, so a file must be at rest for its digest to count."""
    store = make(tmp_path)
    put(store, KEY, b"one")
    path = place(tmp_path, KEY)
    status = os.stat(path)
    store.digest(KEY, cache=True)

    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    assert store.digest(KEY, cache=True) == hashlib.sha1(b"two").digest()


# ---- reading without waiting


def test_try_read_without_cache(make, tmp_path, monkeypatch):
    """What is not in the page cache, or only in part, is left to ``read_into``."""
    store = make(tmp_path)
    put(store, KEY, b"d" * 8192)
    buffer = memoryview(bytearray(8192))
    answers = []

    def preadv(fd, buffers, offset, flags=0):
        assert flags == os.RWF_NOWAIT
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(os, "preadv", preadv)
    answers[:] = [BlockingIOError(), 4096, 8192]
    assert store.try_read_into(KEY, buffer, offset_bytes=0) is None
    assert store.try_read_into(KEY, buffer, offset_bytes=0) is None
    assert store.try_read_into(KEY, buffer, offset_bytes=0) == 8192

    answers[:] = [OSError(errno.EOPNOTSUPP, "")]
    assert store.try_read_into(KEY, buffer, offset_bytes=0) is None
    assert store.try_read_into(KEY, buffer, offset_bytes=0) is None, "asked again although the file system cannot"


def test_try_read_answers_from_the_page_cache(make, tmp_path):
    """What was just written is in the page cache, so it is answered at once (on file systems that can)."""
    store = make(tmp_path)
    put(store, KEY, b"d" * 8192)
    buffer = memoryview(bytearray(4096))
    fd = os.open(place(tmp_path, KEY), os.O_RDONLY)
    try:
        os.preadv(fd, [bytearray(10)], 0, os.RWF_NOWAIT)
    except OSError:
        pytest.skip("this file system has no RWF_NOWAIT")
    finally:
        os.close(fd)

    assert store.try_read_into(KEY, buffer, offset_bytes=0) == 4096
    assert store.try_read_into(KEY, buffer, offset_bytes=8000) == 192


def test_nothing_stays_open(make, tmp_path):
    """Between calls the store holds no file and no directory open."""
    before = os.listdir("/proc/self/fd")
    store = make(tmp_path / "one", tmp_path / "two", direct_io=True)
    for key in KEYS:
        put(store, key, b"d" * 512, durable=True)
        get(store, key)
        store.write(key, b"e" * 512, offset_bytes=0, durable=True)
        store.try_read_into(key, memoryview(bytearray(512)), offset_bytes=0)
        store.digest(key, cache=True)
    store.retire(KEYS[0], 1)
    store.revive(KEYS[0], 1)
    store.sync(KEYS)
    list(store.keys())
    store.usage()

    assert os.listdir("/proc/self/fd") == before


def test_direct_io(make, tmp_path, monkeypatch):
    """Aligned transfers of data objects pass the cache; the rest, and all where the file system refuses, does not."""
    store = make(tmp_path, direct_io=True)
    flags = []
    real = os.open

    def note(path, how, *rest):
        flags.append(bool(how & os.O_DIRECT))
        return real(path, how, *rest)

    for key in (KEY, INODE):
        put(store, key, b"a" * 64 * 1024)
    monkeypatch.setattr(os, "open", note)

    store.write(KEY, b"b" * 4096, offset_bytes=4096, durable=False)
    assert get(store, KEY, 4096, 4096) == b"b" * 4096
    assert flags == [True, True]

    flags.clear()
    store.write(KEY, b"c" * 100, offset_bytes=4096, durable=False)
    store.write(INODE, b"c" * 512, offset_bytes=512, durable=False)
    assert get(store, KEY, 100, 4096) == b"c" * 100
    assert flags == [False, False, False]

    def refuse(path, how, *rest):
        if how & os.O_DIRECT:
            raise OSError(errno.EINVAL, "")
        return real(path, how, *rest)

    monkeypatch.setattr(os, "open", refuse)
    store.write(KEY, b"d" * 4096, offset_bytes=4096, durable=True)
    assert get(store, KEY, 8192, 0) == b"a" * 4096 + b"d" * 4096


def test_no_direct_io(make, tmp_path, monkeypatch, caplog):
    """A file system without direct I/O is named once, at the start, and the store works through the page cache."""
    real = os.open

    def refuse(path, how, *rest):
        if how & os.O_DIRECT:
            os.close(real(path, how & ~os.O_DIRECT, *rest))  # Linux makes the file and then refuses
            raise OSError(errno.EINVAL, "")
        return real(path, how, *rest)

    make(tmp_path / "fine", direct_io=True)
    assert "direct I/O" not in caplog.text
    monkeypatch.setattr(os, "open", refuse)
    store = make(tmp_path / "disk", direct_io=True)
    assert caplog.text.count(f"direct I/O is not possible on {tmp_path / 'disk'}") == 1
    for number in range(3):
        put(store, KEYS[number], b"a" * 8192, durable=True)
        store.write(KEYS[number], b"b" * 4096, offset_bytes=4096, durable=True)
        assert get(store, KEYS[number], 8192) == b"a" * 4096 + b"b" * 4096
    assert caplog.text.count("direct I/O") == 1
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]


# ---- durability


def test_sync_flushes_names_once(make, tmp_path, monkeypatch):
    """``sync`` makes a create durable, name included; without a new name no directory is flushed."""
    store = make(tmp_path)
    put(store, KEY, b"data", durable=True)
    store.sync([KEY])
    flushed = []
    real = io.sync_directory
    monkeypatch.setattr(io, "sync_directory", lambda path: (flushed.append(path), real(path)))

    put(store, OTHER, b"data")
    assert flushed == []
    store.sync([OTHER, KEY])
    assert flushed == [str(place(tmp_path, OTHER).parent)]
    store.sync([OTHER, KEY])
    assert len(flushed) == 1
    put(store, OTHER, b"again", durable=True)
    assert len(flushed) == 2
    put(store, OTHER, b"third")
    store.write(OTHER, b"T", offset_bytes=0, durable=True)
    assert len(flushed) == 3


def test_flush_of_names_is_waited_for(make, tmp_path, monkeypatch):
    """A sync whose name another thread's flush covers returns after that flush, not before."""
    store = make(tmp_path)
    put(store, KEY, b"data")
    store.sync([KEY])
    flushing, go_on = threading.Event(), threading.Event()
    done = []
    real = io.sync_directory

    def slow(path):
        flushing.set()
        assert go_on.wait(10)
        real(path)
        done.append(path)

    store.remove(KEY)
    monkeypatch.setattr(io, "sync_directory", slow)
    first = threading.Thread(target=store.sync, args=([KEY],))
    first.start()
    assert flushing.wait(10)
    outcome = []
    second = threading.Thread(target=lambda: (store.sync([KEY]), outcome.append(len(done))))
    second.start()
    second.join(0.2)  # what does not wait is through by then
    go_on.set()
    first.join()
    second.join()

    assert outcome[0] >= 1


def test_durable_calls_flush(make, tmp_path, monkeypatch):
    """A durable write is opened with O_DSYNC; a durable create is flushed before it gets its name."""
    store = make(tmp_path)
    order = []
    fdatasync, rename = os.fdatasync, os.rename
    monkeypatch.setattr(os, "fdatasync", lambda fd: (order.append("fdatasync"), fdatasync(fd)))
    monkeypatch.setattr(os, "rename", lambda *names: (order.append("rename"), rename(*names)))
    put(store, KEY, b"data", durable=True)
    assert order == ["fdatasync", "rename"]

    flags = []
    real = os.open

    def note(path, how, *rest):
        flags.append(how & os.O_DSYNC)
        return real(path, how, *rest)

    monkeypatch.setattr(os, "open", note)
    store.write(KEY, b"D", offset_bytes=0, durable=False)
    store.write(KEY, b"D", offset_bytes=0, durable=True)
    assert flags[:2] == [0, os.O_DSYNC]
