"""Several disks of one file store: weights, moves, disks that fail, come and go."""

import dataclasses
import errno
import logging
import os
import shutil
import struct
import threading
from types import SimpleNamespace

import pytest

from sheepdog.builtin import filestore, filestore_disk
from sheepdog.builtin import filestore_io as io
from sheepdog.builtin.filestore import FileStore
from sheepdog.contracts.store import REPLICA, ShardKey, StoreOptions
from sheepdog.errors import ConfigError, ObjectNotFound, StoreDeviceError, StoreError
from sheepdog.model.ids import data_oid, inode_oid
from sheepdog.model.node import NodeId
from sheepdog.model.ring import DiskRing
from sheepdog.testing.store_tools import KEY, MiB, get, get_stale, put

from .conftest import ByVid, Flat
from .helpers import KEYS, age, files, place, run_in_child


def test_crash_while_moving(make, tmp_path):
    """A crash between the copy and the removal of the source leaves two files; a restart keeps one of them."""
    one, two = tmp_path / "one", tmp_path / "two"
    store = make(one)
    for key in KEYS:
        put(store, key, str(key).encode())
    store = make(one, two)

    def work():
        os.unlink = lambda path: os._exit(42)
        for key in KEYS:
            get(store, key)

    assert run_in_child(work) == 42
    assert len(files(one)) + len(files(two)) == len(KEYS) + 1

    store = make(one, two)
    assert len(files(one)) + len(files(two)) == len(KEYS)
    assert all(get(store, key) == str(key).encode() for key in KEYS)


def test_unmounted_disk(make, tmp_path, mounted):
    """Unmounting shows at the next call, and nothing is written to the empty mount point."""
    disk = mounted("disk", 8)
    weight = make(tmp_path / "other").usage().weight_bytes
    os.setxattr(disk, "user.md.size", struct.pack("<Q", weight))
    store = make(tmp_path / "other", disk)
    for key in KEYS:
        put(store, key, b"data")
    here = [key for key in KEYS if place(disk, key)]
    assert 0 < len(here) < len(KEYS)
    mounted.unmount(disk)

    for key in here:
        with pytest.raises(StoreDeviceError) as caught:
            get(store, key, 4)
        assert caught.value.path == str(disk)
        with pytest.raises(StoreDeviceError):
            put(store, key, b"new")
    assert os.listdir(disk) == []

    store.remove_disk(str(disk))
    assert set(store.keys()) == set(KEYS) - set(here)
    for key in KEYS:
        put(store, key, b"back")
    assert list(store.keys()) == KEYS


def test_misplaced_object_without_room_to_move(make, tmp_path, mounted):
    """An object that cannot be moved to where it belongs, because that disk is full, is used where it lies."""
    one, two = tmp_path / "one", mounted("two", 64)
    store = make(one)
    for key in KEYS:
        put(store, key, b"d" * 8192)
    store.close()
    (two / "filler").write_bytes(b"")
    fd = os.open(two / "filler", os.O_WRONLY)
    free = os.statvfs(two)
    # The weight must be recorded before the disk fills up, or it would get no share.
    os.setxattr(two, "user.md.size", struct.pack("<Q", os.statvfs(one).f_frsize * os.statvfs(one).f_bavail))
    make(two)
    free = os.statvfs(two)
    os.posix_fallocate(fd, 0, free.f_bavail * free.f_frsize)
    os.close(fd)

    store = make(one, two)
    for key in KEYS:
        store.write(key, b"W", offset_bytes=0, durable=False)
        assert get(store, key) == b"W" + b"d" * 8191
    assert all(place(one, key) for key in KEYS)

    (two / "filler").unlink()
    assert all(get(store, key, 1) == b"W" for key in KEYS)
    assert 0 < sum(place(two, key) is not None for key in KEYS) < len(KEYS)


def test_moves_keep_allocation(make, tmp_path):
    """Moved between disks, a reserved object stays reserved and a sparse one sparse; bytes and times are the same."""
    one, two = tmp_path / "one", tmp_path / "two"
    store = make(one)
    keys = [ShardKey(data_oid(1, index)) for index in range(30)] + [ShardKey(inode_oid(vid)) for vid in range(1, 31)]
    for key in keys:
        sparse = key.oid >> 63 == 1
        store.create(key, b"x" * 5000, offset_bytes=70_000, size_bytes=MiB, sparse=sparse, durable=False)
    times = {key: os.stat(place(one, key)).st_mtime_ns for key in keys}

    store = make(two, one)
    expected = bytes(70_000) + b"x" * 5000 + bytes(MiB - 75_000)
    assert all(get(store, key) == expected for key in keys)

    moved = [key for key in keys if place(two, key)]
    assert {key.oid >> 63 for key in moved} == {0, 1}
    assert len(moved) < len(keys)
    for key in moved:
        assert place(one, key) is None
        status = os.stat(place(two, key))
        assert status.st_mtime_ns == times[key]
        if key.oid >> 63:
            assert status.st_blocks * 512 < 128 * 1024
        else:
            assert status.st_blocks * 512 >= MiB


def test_weight_is_recorded_once(make, tmp_path):
    """A disk's weight is its free space when it was first used, kept in its attribute until it is measured again."""
    store = make(tmp_path)
    weight = store.usage().weight_bytes
    assert os.getxattr(tmp_path, "user.md.size") == struct.pack("<Q", weight)
    assert abs(weight - os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize) < 10 << 30

    os.setxattr(tmp_path, "user.md.size", struct.pack("<Q", 5 << 30))
    assert make(tmp_path).usage().weight_bytes == 5 << 30

    store = make(tmp_path)
    usage = store.reweigh()
    assert usage.weight_bytes != 5 << 30
    assert os.getxattr(tmp_path, "user.md.size") == struct.pack("<Q", usage.weight_bytes)
    assert make(tmp_path).usage().weight_bytes == usage.weight_bytes


def test_share_follows_weight(make, tmp_path):
    """A disk of twice the weight holds about twice the objects."""
    paths = [tmp_path / "one", tmp_path / "two"]
    for path, gib in zip(paths, (20, 40), strict=True):
        path.mkdir()
        os.setxattr(path, "user.md.size", struct.pack("<Q", gib << 30))
    store = make(*paths)
    for index in range(300):
        store.create(ShardKey(data_oid(9, index)), b"", offset_bytes=0, size_bytes=1, sparse=True, durable=False)

    count = len(files(paths[0]))
    assert 60 <= count <= 140


def test_disk_without_attributes(make, tmp_path, monkeypatch, caplog):
    """A disk that takes no attributes is dropped with the known message; with none left the store is not made."""
    real = os.setxattr

    def setxattr(path, name, value):
        if str(path).endswith("bad"):
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        real(path, name, value)

    monkeypatch.setattr(os, "setxattr", setxattr)
    good, bad = tmp_path / "good", tmp_path / "bad"

    assert [disk.path for disk in make(good, bad).disks()] == [str(good)]
    assert f"multi-disk support need xattr feature for path: {bad}" in caplog.text
    with pytest.raises(ConfigError, match="There isn't any available disk!"):
        make(bad)


def test_unusable_disks_are_dropped(make, tmp_path, caplog):
    """A disk that cannot be made is dropped, the store starts on the rest and logs how the ring is cut."""
    caplog.set_level(logging.INFO)
    store = make(tmp_path / "good", tmp_path / "no" / "parent", str(tmp_path / "good") + "//")

    assert [disk.path for disk in store.disks()] == [str(tmp_path / "good")]
    assert "cannot create the directory" in caplog.text
    weight = store.usage().weight_bytes
    assert f"{tmp_path / 'good'}, vdisk nr {-(-weight // (16 << 20))}, total disk 1" in caplog.text
    with pytest.raises(ConfigError):
        make(tmp_path / "no" / "parent")


def test_one_of_two_disks_fails(make, tmp_path):
    """When one disk is lost, the other serves on; after its removal everything can be written again."""
    one, two = tmp_path / "one", tmp_path / "two"
    store = make(one, two)
    for key in KEYS:
        put(store, key, b"data")
    lost = [key for key in KEYS if place(one, key)]
    shutil.rmtree(one)

    for key in KEYS:
        if key in lost:
            with pytest.raises(StoreDeviceError) as caught:
                get(store, key, 4)
            assert caught.value.path == str(one)
        else:
            assert get(store, key) == b"data"
    with pytest.raises(StoreDeviceError):
        store.exists(ShardKey(data_oid(3, 3)))

    store.remove_disk(str(one) + "/")
    assert list(store.keys()) == [key for key in KEYS if key not in lost]
    for key in lost:
        assert not store.exists(key)
        put(store, key, b"data")
    assert not one.exists()


def test_newest_of_two_files_wins(make, tmp_path):
    """A disk that comes back after the sheep ran without it does not bring old contents back."""
    one, two = tmp_path / "one", tmp_path / "two"
    store = make(one, two)
    for key in KEYS:
        put(store, key, b"old")
        age(place(one, key) or place(two, key))
    store = make(one)
    for key in KEYS:
        put(store, key, b"new")

    store = make(one, two)

    assert all(get(store, key) == b"new" for key in KEYS)
    assert len(files(one)) + len(files(two)) == len(KEYS)


def test_add_disk(make, tmp_path):
    """A plugged directory is emptied, but for what belongs to its file system, and made if it was missing."""
    store = make(tmp_path / "one")
    two, three = tmp_path / "two", tmp_path / "three"
    two.mkdir()
    (two / "00ed202b00000000").write_bytes(b"old object")
    (two / "2b").mkdir()
    (two / "2b" / "junk").write_bytes(b"x")
    (two / "lost+found").mkdir()

    store.add_disk(f"{two}//")
    store.add_disk(str(three))

    assert [disk.path for disk in store.disks()] == sorted(map(str, (tmp_path / "one", two, three)))
    assert files(two) == []
    assert (two / "lost+found").is_dir()
    assert not (two / "2b").exists()
    assert list(store.keys()) == []


def test_add_disk_refusals(make, tmp_path):
    """The same directory by any name, one inside another, and a sheep's base directory are refused and left alone."""
    one = tmp_path / "one"
    store = make(one)
    put(store, KEY, b"data")
    (tmp_path / "link").symlink_to(one)
    base = tmp_path / "base"
    (base / "epoch").mkdir(parents=True)
    (base / "config").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"x")

    refused = (one, f"{one}/", tmp_path / "link", tmp_path, one / "sub", base, tmp_path / "file", tmp_path / "a" / "b")
    for path in refused:
        with pytest.raises(StoreError):
            store.add_disk(str(path))

    assert [disk.path for disk in store.disks()] == [str(one)]
    assert (base / "config").exists()
    assert get(store, KEY) == b"data"


def test_wipe_removes_other_layouts(make, tmp_path):
    """A format from one layout to another leaves no file of the former one."""
    store = make(tmp_path)
    for name in ("meta", "2b", ".stale"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "00ed202b00000000").write_bytes(b"x")
    (tmp_path / "00ed202b00000009").write_bytes(b"x")
    weight = os.getxattr(tmp_path, "user.md.size")

    store.wipe()

    assert files(tmp_path) == []
    assert not (tmp_path / "2b").exists()
    assert os.getxattr(tmp_path, "user.md.size") == weight


def test_removed_sub_directory(by_vid, tmp_path):
    """A sub-directory that somebody removed loses its objects, not the disk; it is made again when it is needed."""
    store = filestore.FileStore(StoreOptions((str(tmp_path),)), by_vid)
    put(store, KEYS[0], b"data")
    put(store, KEYS[-1], b"data")
    shutil.rmtree(tmp_path / "odd")
    shutil.rmtree(tmp_path / ".stale")

    assert not store.exists(KEYS[0])
    assert list(store.keys()) == [KEYS[-1]]
    assert store.usage().used_bytes > 0
    put(store, KEYS[0], b"again")
    store.retire(KEYS[0], 1)
    shutil.rmtree(tmp_path / "odd")
    store.revive(KEYS[0], 1)
    assert get(store, KEYS[0]) == get_stale(store, KEYS[0], 1) == b"again"


def test_a_move_does_not_undo_a_removal(make, tmp_path, monkeypatch):
    """While a reader moves an object home, a removal waits, and afterwards the object is gone everywhere."""
    one, two = tmp_path / "one", tmp_path / "two"
    store = make(one)
    for key in KEYS:
        put(store, key, b"data")
    store = make(two, one)
    copying, go_on = threading.Event(), threading.Event()
    real = io.copy_contents

    def slow_copy(source, target):
        copying.set()
        assert go_on.wait(30)
        real(source, target)

    monkeypatch.setattr(io, "copy_contents", slow_copy)
    current = []

    def read():
        for key in KEYS:  # the first one that belongs on the new disk stops here
            if copying.is_set():
                break
            current[:] = [key]
            get(store, key, 4)

    reader = threading.Thread(target=read)
    reader.start()
    assert copying.wait(30)
    key = current[0]
    remover = threading.Thread(target=store.remove, args=(key,))
    remover.start()
    go_on.set()
    reader.join(30)
    remover.join(30)

    assert not store.exists(key)
    assert place(one, key) is None
    assert place(two, key) is None


def test_reading_errors_while_moving_blame_the_source(make, tmp_path, monkeypatch):
    """If the disk that an object is moved away from cannot be read, that disk is the failed one."""
    one, two = tmp_path / "one", tmp_path / "two"
    store = make(one)
    for key in KEYS:
        put(store, key, b"data")
    store = make(two, one)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "lseek", fail)
    errors = []
    for key in KEYS:
        try:
            get(store, key, 4)
        except StoreDeviceError as error:
            errors.append(error)

    assert {error.path for error in errors} == {str(one)}
    assert files(two) == []


def test_missing_strip_is_not_the_replica(make, tmp_path):
    """A whole copy does not stand in for a strip."""
    store = make(tmp_path)
    put(store, ShardKey(KEY.oid, REPLICA), b"data")

    with pytest.raises(ObjectNotFound):
        get(store, ShardKey(KEY.oid, 0), 4)


def test_many_keys_stay_within_the_path_cache(make, tmp_path, monkeypatch):
    """More objects than remembered paths: all are found, and the memory stays bounded."""
    monkeypatch.setattr(filestore_disk, "_PATHS_MAX", 8)
    store = make(tmp_path)
    for key in KEYS:
        put(store, key, b"data")

    assert all(get(store, key) == b"data" for key in KEYS)
    assert len(store._paths) <= 8


def test_objects_of_another_layout(tmp_path):
    """ST-2: a disk with objects where this layout does not look is refused, with what to do, and not touched; a format
    takes it and wipes it. Stale versions and files of others do not matter."""
    layouts = Flat(), ByVid()
    for mine, other in (layouts, layouts[::-1]):
        path = tmp_path / type(mine).__name__
        path.mkdir()
        options = StoreOptions((str(path),))
        store = FileStore(options, mine)
        put(store, KEYS[0], b"kept")
        put(store, KEYS[1], b"stale")
        store.retire(KEYS[1], 3)
        (path / "notes").mkdir()
        (path / "notes" / "README").write_bytes(b"x")
        before = sorted(path.rglob("*"))

        with pytest.raises(ConfigError, match=r"in the places of another store(.|\n)*store-convert"):
            FileStore(options, other)
        assert sorted(path.rglob("*")) == before
        assert get(FileStore(options, mine), KEYS[0]) == b"kept"

        FileStore(dataclasses.replace(options, replacing=True), other).wipe()
        FileStore(options, other)
        FileStore(options, mine)


def test_places_by_vnode(layout, tmp_path, caplog):
    """Where vnodes belong to disks, an object lies on the disk of the first vnode of its node after it."""
    caplog.set_level(logging.INFO)
    sizes = {tmp_path / "one": 40 << 30, tmp_path / "two": (70 << 30) + 1}
    for path, size in sizes.items():
        path.mkdir()
        os.setxattr(path, "user.md.size", struct.pack("<Q", size))
    paths = {str(path): size for path, size in sizes.items()}
    node, other = NodeId.of("10.0.0.1", 7000), NodeId.of("10.0.0.2", 7000)
    homes = {key: tmp_path / DiskRing(paths.items(), node).disk_of(key.oid) for key in KEYS}
    store = FileStore(StoreOptions(tuple(paths), node=node), layout)
    for key in KEYS:
        put(store, key, b"x")

    assert all(place(homes[key], key) for key in KEYS)
    assert set(homes.values()) == set(sizes)
    assert f"{tmp_path / 'one'}, vdisk nr 10, total disk 2" in caplog.text
    assert f"{tmp_path / 'two'}, vdisk nr 18, total disk 2" in caplog.text
    moved = FileStore(StoreOptions(tuple(paths), node=other), layout)
    assert all(get(moved, key) == b"x" for key in KEYS)
    assert all(place(tmp_path / DiskRing(paths.items(), other).disk_of(key.oid), key) for key in KEYS)


def test_places_without_weight(layout):
    """A disk that was full when it was first used gets nothing where vnodes belong to disks, unless all were full."""
    node = NodeId.of("10.0.0.1", 7000)

    def homes(**weights):
        disks = tuple(SimpleNamespace(path=f"/{name}", weight_bytes=size) for name, size in weights.items())
        paths = filestore_disk.Paths(disks, layout, node)
        return {paths.disk_of(ShardKey(data_oid(7, index))).path for index in range(64)}

    assert homes(one=0, two=5 << 30) == {"/two"}
    assert homes(one=0, two=0) == {"/one", "/two"}
