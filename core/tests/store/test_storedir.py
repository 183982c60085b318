"""The base directory: PATH, lock, config, epochs, and what stops a start."""

import errno
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from sheepdog.daemon import storedir
from sheepdog.daemon.storedir import (
    StoreDirectory,
    check_config,
    check_vnodes,
    create_directory,
    parse_path,
    same_device,
)
from sheepdog.daemon.storedir import usable_disks as usable
from sheepdog.errors import ConfigError
from sheepdog.model.clusterinfo import ClusterFlag, DiskConfig, mode_flag
from sheepdog.model.epochs import EpochRecord
from sheepdog.model.node import Node, NodeDisk, NodeId, VnodeMode

CONFIG = DiskConfig(
    ctime=0x02267FA8_0A64DF98, flags=ClusterFlag.AUTO_VNODES, copies=3, default_store="plain", block_size_shift=22,
    space=80 << 30,
)  # fmt: skip


def node(port, vnodes=128):
    return Node(NodeId.of("127.0.0.1", port), vnodes, 0, 1 << 30)


@pytest.fixture
def directory(tmp_path):
    directory = StoreDirectory(str(tmp_path))
    directory.prepare()
    return directory


# ---- PATH


def test_path_of_one_directory(tmp_path, monkeypatch):
    """One element: objects go to BASE/obj; relative paths and symbolic links are resolved, slashes dropped."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    for argument in ("link", "real//", f"{tmp_path}/link/", "./real/."):
        path = parse_path(argument)
        assert (path.base, path.disks, path.listed) == (f"{tmp_path}/real", (f"{tmp_path}/real/obj",), False)


def test_path_with_disks(tmp_path, monkeypatch):
    """A list: disks in their order, absolute, without trailing slashes, and with their own symbolic links."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "a").symlink_to("b")

    path = parse_path("base/,/srv/d2//,a/,,d1")

    assert path.base == f"{tmp_path}/base"
    assert path.disks == ("/srv/d2", f"{tmp_path}/a", f"{tmp_path}/d1")
    assert path.listed


def test_default_path():
    """Without PATH it is /tmp."""
    assert parse_path() == parse_path("") == storedir.StorePath(os.path.realpath("/tmp"), ("/tmp/obj",), False)


def test_create_directory(tmp_path):
    """Only the last component is made; what exists is left alone; the message names path and reason."""
    create_directory(str(tmp_path / "new"))
    create_directory(str(tmp_path / "new"))
    assert (tmp_path / "new").is_dir()

    deep = tmp_path / "a" / "b"
    with pytest.raises(ConfigError) as caught:
        create_directory(str(deep))
    assert str(caught.value) == f"cannot create the directory {deep} (No such file or directory)"

    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="File exists"):
        create_directory(str(tmp_path / "file"))


def test_mode_of_directories(tmp_path):
    """Directories are made for owner and group."""
    old = os.umask(0)
    try:
        create_directory(str(tmp_path / "new"))
    finally:
        os.umask(old)
    assert os.stat(tmp_path / "new").st_mode & 0o777 == 0o770


def test_same_device(tmp_path):
    """Whether all directories are on one file system; one that is gone is on none."""
    one = tmp_path / "one"
    one.mkdir()

    assert same_device(str(tmp_path), [str(one), str(tmp_path)])
    assert not same_device(str(tmp_path), [str(one), "/proc"])
    assert not same_device(str(tmp_path), [str(tmp_path / "gone")])


def test_usable_disks(tmp_path, caplog):
    """Missing disks are made, one named twice counts once, one that cannot be made is dropped with an error."""
    (tmp_path / "one").mkdir()
    (tmp_path / "link").symlink_to("one")
    given = [str(tmp_path / name) for name in ("two", "one", "link", "no/parent", "one")]

    assert usable(given, str(tmp_path / "base")) == (given[0], given[1])
    assert os.path.isdir(given[0])
    assert f"duplicate path {given[2]}" in caplog.text
    assert f"duplicate path {given[4]}" in caplog.text
    assert f"cannot create the directory {given[3]} (No such file or directory)" in caplog.text


def test_no_usable_disk(tmp_path):
    """Without any disk the sheep does not start."""
    with pytest.raises(ConfigError) as caught:
        usable([str(tmp_path / "no" / "parent")], str(tmp_path))
    assert str(caught.value) == "There isn't any available disk!"


def test_base_directory_is_no_disk(tmp_path):
    """A directory with config and epochs, or our own base, is refused as a disk; one of the two names is not enough."""
    base, disk = tmp_path / "base", tmp_path / "disk"
    disk.mkdir()
    base.mkdir()
    (disk / "config").write_bytes(b"")
    assert usable([str(disk)], str(base)) == (str(disk),)

    (disk / "epoch").mkdir()
    with pytest.raises(ConfigError) as caught:
        usable([str(tmp_path / "other"), str(disk)], str(base))
    assert str(caught.value) == f"{disk} is meta-store, abort"
    with pytest.raises(ConfigError, match="meta-store"):
        usable([str(base)], str(base))


# ---- lock


HOLDER = """
import sys
from sheepdog.daemon.storedir import StoreDirectory
StoreDirectory(sys.argv[1]).lock()
print("locked", flush=True)
sys.stdin.read()
"""


def test_lock(directory):
    """A second process is refused with both messages, and gets the lock when the first one ends, however it ends."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, directory.base], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"locked\n"

        with pytest.raises(ConfigError) as caught:
            directory.lock()
        holder.kill()

    assert str(caught.value).splitlines() == [
        f"another sheep daemon is using {directory.base}",
        f"locking directory: {directory.base} failed",
    ]
    directory.lock()
    assert os.path.getsize(os.path.join(directory.base, "lock")) == 0
    directory.unlock()
    directory.unlock()
    directory.lock()
    directory.unlock()


def test_lock_that_cannot_be_made(directory):
    """A lock file that cannot be opened is an error of its own, not another daemon."""
    os.mkdir(os.path.join(directory.base, "lock"))

    with pytest.raises(ConfigError, match="failed to open lock file") as caught:
        directory.lock()
    assert "another sheep" not in str(caught.value)


# ---- config


def test_config_before_format(directory):
    """A new directory has no config, no epochs and no preferred store."""
    assert directory.read_config() is None
    assert list(directory.epochs()) == []
    assert directory.latest_epoch() == 0
    assert directory.read_node_config() is None
    directory.set_clean_shutdown(True)
    assert directory.read_config() is None


def test_config(directory):
    """The config file holds the 40 bytes of the format and is read back as it was written."""
    directory.write_config(CONFIG)

    with open(os.path.join(directory.base, "config"), "rb") as file:
        raw = file.read()
    assert raw == (
        bytes.fromhex("98df640aa87f2602") + b"\x04\x00\x03" + b"plain".ljust(16, b"\0")
        + b"\x00\x00\x16\x06\x00" + (80 << 30).to_bytes(8, "little")
    )  # fmt: skip
    assert directory.read_config() == CONFIG


def test_clean_shutdown_mark(directory):
    """The mark is set and taken back, and nothing else changes."""
    directory.write_config(CONFIG)

    directory.set_clean_shutdown(True)
    assert directory.read_config().shutdown
    directory.set_clean_shutdown(False)
    assert directory.read_config() == CONFIG


@pytest.mark.parametrize("version", [0, 1, 5, 7])
def test_config_of_another_version(directory, version):
    """Another format version stops the start with the two known lines."""
    raw = bytearray(CONFIG.pack())
    raw[30:32] = version.to_bytes(2, "little")
    with open(os.path.join(directory.base, "config"), "wb") as file:
        file.write(raw)

    with pytest.raises(ConfigError) as caught:
        directory.read_config()
    assert str(caught.value).splitlines() == [
        f"This sheep version is not compatible with the existing data layout, {version}",
        "use '-u' option to upgrade sheep store",
    ]
    with pytest.raises(ConfigError, match=r"\na sheep converts no layout itself; .* 'dog upgrade'$"):
        directory.read_config(upgrade=True)


def test_truncated_config(directory):
    """A config file of another length is refused, not guessed at."""
    with open(os.path.join(directory.base, "config"), "wb") as file:
        file.write(CONFIG.pack()[:20])

    with pytest.raises(ConfigError, match="40 bytes"):
        directory.read_config()


def test_failed_write_keeps_the_old_config(directory, monkeypatch):
    """When writing fails half-way the old config is still there, and a restart removes the rest."""
    directory.write_config(CONFIG)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(ConfigError, match="cannot write"):
            directory.write_config(DiskConfig(ctime=1))

    assert directory.read_config() == CONFIG
    directory.prepare()
    assert sorted(os.listdir(directory.base)) == ["config", "epoch", "obj"]


def test_writes_are_durable(directory, monkeypatch):
    """A file is flushed before it gets its name, and the directory after."""
    order = []
    fsync, rename = os.fsync, os.rename

    def note(fd):
        order.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", lambda *names: (order.append("rename"), rename(*names)))
    directory.write_epoch(3, EpochRecord((node(7000),), 5))

    epoch = os.path.join(directory.base, "epoch")
    assert order == [f"{epoch}/00000003.0.tmp", "rename", epoch]


# ---- epochs


def test_epochs(directory):
    """Epoch files are named by eight digits; temporary, foreign and damaged ones do not count."""
    records = {number: EpochRecord((node(7000), node(7001)), 100 + number) for number in (1, 2, 10)}
    for number, record in records.items():
        directory.write_epoch(number, record)
    epoch = os.path.join(directory.base, "epoch")
    for name in ("00000011.tmp", "0000011", "000000011", "notes"):
        with open(os.path.join(epoch, name), "wb") as file:
            file.write(records[1].pack())
    with open(os.path.join(epoch, "00000012"), "wb") as file:
        file.write(bytes(592 + 8))  # as a disk-mode build writes it

    assert list(directory.epochs()) == [1, 2, 10, 12]
    assert directory.read_epoch(12) is None
    assert directory.read_epoch(11) is None
    assert directory.latest_epoch() == 10
    assert {number: directory.read_epoch(number) for number in records} == records
    with open(os.path.join(epoch, "00000002"), "rb") as file:
        raw = file.read()
    assert len(raw) == 2 * 80 + 8
    assert raw[36:42] == bytes.fromhex("7f000001581b")


def test_epoch_is_replaced(directory):
    """Writing an epoch again replaces it."""
    directory.write_epoch(1, EpochRecord((node(7000),), 1))
    directory.write_epoch(1, EpochRecord((node(7001),), 2))

    assert directory.read_epoch(1) == EpochRecord((node(7001),), 2)


def test_remove_epochs(directory):
    """Epochs above the given one are gone, the others stay."""
    for number in (1, 2, 3, 4):
        directory.write_epoch(number, EpochRecord((node(7000),), number))

    directory.remove_epochs(after=2)
    assert list(directory.epochs()) == [1, 2]
    directory.remove_epochs()
    directory.remove_epochs()
    assert list(directory.epochs()) == []


def test_node_config(directory):
    """The preferred store is 16 bytes, padded, in BASE/node_config."""
    directory.write_node_config("tree")

    with open(os.path.join(directory.base, "node_config"), "rb") as file:
        assert file.read() == b"tree" + bytes(12)
    assert directory.read_node_config() == "tree"


# ---- may this sheep use this store?


@pytest.mark.parametrize(
    ("flags", "fixed", "message"),
    [
        (ClusterFlag.AUTO_VNODES, False, None),
        (ClusterFlag(0), True, None),
        (ClusterFlag.AUTO_VNODES, True, storedir.VNODE_STRATEGY_DIFFERS),
        (ClusterFlag(0), False, storedir.VNODE_STRATEGY_DIFFERS),
    ],
)
def test_vnode_strategy(flags, fixed, message):
    """A store refuses the other vnode strategy, but never a gateway, and never before the format."""
    config = DiskConfig(ctime=1, flags=flags)
    check_config(config, fixed_vnodes=fixed, gateway=True)
    check_config(DiskConfig(ctime=0, flags=flags), fixed_vnodes=fixed, gateway=False)

    if message is None:
        check_config(config, fixed_vnodes=fixed, gateway=False)
    else:
        with pytest.raises(ConfigError) as caught:
            check_config(config, fixed_vnodes=fixed, gateway=False)
        assert str(caught.value) == message


@pytest.mark.parametrize("gateway", [False, True])
@pytest.mark.parametrize("mode", list(VnodeMode))
def test_vnode_mode(mode, gateway):
    """A store that was formatted for the other vnode mode is refused, a gateway's too, with a word on what to do."""
    flags = {one: ClusterFlag.AUTO_VNODES | mode_flag(one) for one in VnodeMode}
    other = next(one for one in VnodeMode if one is not mode)
    check_config(DiskConfig(ctime=1, flags=flags[mode]), fixed_vnodes=False, gateway=gateway, mode=mode)
    check_config(DiskConfig(ctime=0, flags=flags[other]), fixed_vnodes=False, gateway=gateway, mode=mode)

    with pytest.raises(ConfigError) as caught:
        check_config(DiskConfig(ctime=1, flags=flags[other]), fixed_vnodes=False, gateway=gateway, mode=mode)
    how = "with" if other is VnodeMode.DISK else "without"
    assert str(caught.value).splitlines() == [
        "This sheep can't run because exists data format mismatch",
        f"the store was formatted {how} --disk-vnodes, start the sheep so, too",
    ]


def test_epochs_with_disks(tmp_path):
    """Where vnodes belong to disks, epoch files have records of 592 bytes; a file of any other length is ignored."""
    directory = StoreDirectory(str(tmp_path), VnodeMode.DISK)
    directory.prepare()
    record = EpochRecord((replace(node(7000), disks=(NodeDisk(5, 1 << 40), NodeDisk(6, 7))), node(7001, 0)), 77)
    directory.write_epoch(3, record)
    (tmp_path / "epoch" / "00000004").write_bytes(bytes(5 * 80 + 8))

    assert (tmp_path / "epoch" / "00000003").stat().st_size == 2 * 592 + 8
    assert directory.read_epoch(3) == record
    assert directory.latest_epoch() == 3


def test_vnode_number():
    """With fixed vnodes the number must be that of the newest epoch in which this node was a member."""
    records = [
        EpochRecord((node(7001, 64),), 3),
        EpochRecord((node(7000, 200), node(7001, 64)), 2),
        EpochRecord((node(7000, 100),), 1),
    ]
    me = NodeId.of("127.0.0.1", 7000)
    check_vnodes(records, me, 200)
    check_vnodes([], me, 5)
    check_vnodes([EpochRecord((node(7000, 0),), 1)], me, 5)

    with pytest.raises(ConfigError) as caught:
        check_vnodes(records, me, 100)
    assert str(caught.value).splitlines() == [
        "mismatch specified vnodes is compared with the previous. previous vnodes:200",
        "failed to create sheepdog cluster",
    ]


def test_one_file_written_by_several_threads(tmp_path):
    """Recovery and membership may log the same epoch at the same time: neither fails, and nothing is left over."""
    storedir = StoreDirectory(str(tmp_path))
    storedir.prepare()
    start = threading.Barrier(4)

    def write(time):
        start.wait()
        for _ in range(25):
            storedir.write_epoch(7, EpochRecord((node(7000, 128),), time))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(write, time) for time in range(4)]:
            done.result()

    assert storedir.read_epoch(7).time in range(4)
    assert os.listdir(tmp_path / "epoch") == ["00000007"]
