"""The write journal with real processes (JRN-1 to JRN-5), and journals that the original left."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from scenes import MiB, pattern, read, read_all, write

from sheepdog.client import admin
from sheepdog.client.volume import Volume
from sheepdog.daemon.storedir import StoreDirectory
from sheepdog.model.ids import data_oid, inode_oid
from sheepdog.model.node import NodeId
from sheepdog.testing.cluster import SheepCluster, reserve_port, run_python, wait_until
from sheepdog.testing.vectors import store_facts, unpack_store

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

JOURNAL = ("-j", "size=64M")


@pytest.fixture
def one(fresh_cluster, request):
    """A sheep with a journal."""
    cluster = fresh_cluster(1, options=getattr(request, "param", JOURNAL), sync=True)
    cluster.format()
    return cluster


@pytest.fixture
def small_device(tmp_path):
    """A file system with room for the smallest journal."""
    place = tmp_path / "device"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def journal_files(directory: Path) -> list[Path]:
    return sorted(directory.glob("journal_file?"))


def object_file(cluster: SheepCluster, oid: int) -> Path:
    (found,) = (cluster.sheep[0].directory / "obj").rglob(f"{oid:016x}")
    return found


def vid(cluster: SheepCluster, name: str) -> int:
    with cluster.connect() as connection:
        return Volume.open(connection.request, name.encode()).inode.vid


def test_lost_files(one):
    """JRN-1: two objects and an inode whose files are gone after a kill come back from the journal, content right."""
    one.dog("vdi", "create", "alpha", "16M")
    write(one, "alpha", 0, pattern(1, 4 * MiB))
    write(one, "alpha", 5 * MiB, pattern(2, 100_000))
    write(one, "alpha", 1000, pattern(3, 5000))
    number = vid(one, "alpha")
    before = read_all(one, "alpha")
    one.kill(0)
    for oid in (data_oid(number, 0), data_oid(number, 1), inode_oid(number)):
        object_file(one, oid).unlink()

    one.restart(0)

    assert read_all(one, "alpha") == before
    assert before[1000:6000] == pattern(3, 5000)


def test_clean_stop_and_skip(one):
    """JRN-2: a clean stop leaves no journal; with ``skip`` what a kill left is not replayed."""
    one.dog("vdi", "create", "alpha", "16M")
    write(one, "alpha", 0, pattern(1, 100_000))
    assert len(journal_files(one.sheep[0].directory)) == 2
    assert one.stop(0) == 0
    assert journal_files(one.sheep[0].directory) == []
    assert "cleaning journal file" in one.sheep[0].log_tail()
    one.restart(0)
    assert read(one, "alpha", 0, 100_000) == pattern(1, 100_000)

    write(one, "alpha", 0, pattern(2, 5000))
    path = object_file(one, data_oid(vid(one, "alpha"), 0))
    one.kill(0)
    with path.open("r+b") as file:
        file.write(bytes(5000))
    one.options = ("-j", "size=64M,skip")
    one.restart(0)
    assert read(one, "alpha", 0, 5000) == bytes(5000)


@pytest.mark.parametrize("one", [()], indirect=True)
def test_small_writes_without_a_journal(one):
    """Without ``-j`` a small write is in a log, and comes back when the object's file has lost it.

    A clean stop leaves no log, and the objects have all of it.
    """
    one.dog("vdi", "create", "alpha", "8M")
    write(one, "alpha", 0, pattern(1, 4 * MiB))
    path = object_file(one, data_oid(vid(one, "alpha"), 0))
    without = path.read_bytes()
    write(one, "alpha", 5000, pattern(2, 4096))
    write(one, "alpha", 7000, pattern(3, 4096))
    one.kill(0)
    path.write_bytes(without)  # as if the power had been lost: nobody flushed the file

    one.restart(0)

    expected = pattern(1, 4 * MiB)[:5000] + pattern(2, 4096)[:2000] + pattern(3, 4096)
    assert read(one, "alpha", 0, 11096) == expected
    write(one, "alpha", 8000, pattern(4, 4096))
    assert one.stop(0) == 0
    assert not list(one.sheep[0].directory.glob("strip_log?"))
    assert path.read_bytes()[8000:12096] == pattern(4, 4096)


@pytest.mark.parametrize("one", [()], indirect=True)
def test_another_program_after_a_crash(one):
    """What an original sheep, which ignores our log, stored after a crash is not undone: the log is kept aside."""
    one.dog("vdi", "create", "alpha", "8M")
    write(one, "alpha", 0, pattern(1, 4 * MiB))
    write(one, "alpha", 5000, pattern(2, 4096))
    directory = one.sheep[0].directory
    path = object_file(one, data_oid(vid(one, "alpha"), 0))
    one.kill(0)
    path.write_bytes(pattern(3, 4 * MiB))
    config, new = directory / "config", directory / "config.new"
    new.write_bytes(config.read_bytes())
    os.utime(new, (config.stat().st_mtime + 10,) * 2)
    new.rename(config)

    one.restart(0)

    assert read(one, "alpha", 0, 4 * MiB) == pattern(3, 4 * MiB)
    assert (directory / "strip_log0.unused").exists()
    assert "something else has used" in one.sheep[0].log_tail()


def test_switches(one):
    """JRN-3: more than the journal holds, both halves in turn; a kill right after loses nothing acknowledged."""
    one.dog("vdi", "create", "alpha", "64M")
    with one.connect(timeout_s=60.0) as connection:
        opened = Volume.open(connection.request, b"alpha")
        for index in range(16):
            opened.write(index * 4 * MiB, pattern(index, 4 * MiB))
        for index in range(16):
            opened.write(index * 4 * MiB, pattern(100 + index, 3 * MiB))
    number = vid(one, "alpha")
    one.kill(0)
    object_file(one, data_oid(number, 15)).write_bytes(bytes(4 * MiB))  # the last write was in the page cache only
    with object_file(one, data_oid(number, 15)).open("r+b") as file:
        file.seek(3 * MiB)
        file.write(pattern(15, 4 * MiB)[3 * MiB :])

    one.restart(0)

    for index in range(16):
        assert read(one, "alpha", index * 4 * MiB, 4 * MiB) == (
            pattern(100 + index, 3 * MiB) + pattern(index, 4 * MiB)[3 * MiB :]
        ), index


def test_directory(fresh_cluster, tmp_path):
    """JRN-4: the journal lies in ``dir=``; a missing directory, and a size below the minimum, fail the start."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    cluster = fresh_cluster(1, options=("-j", f"size=64M,dir={elsewhere}"))
    assert len(journal_files(elsewhere)) == 2
    assert journal_files(cluster.sheep[0].directory) == []
    assert all(path.stat().st_size == 32 * MiB for path in journal_files(elsewhere))
    cluster.stop(0)
    assert journal_files(elsewhere) == []

    def start(options: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            run_python("sheepdog_cli.sheep", "-f", "-l", "dst=stdout", "-c", f"local:{tmp_path / 'other'}",
                       "-b", "127.0.0.1", "-y", "127.0.0.1", "-p", str(cluster.sheep[0].port),
                       "-j", options, str(tmp_path / "x")),
            capture_output=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    missing = start(f"size=64M,dir={tmp_path / 'none'}")
    small = start("size=63M")

    assert missing.returncode == 1 and b"none does not exist" in missing.stderr + missing.stdout
    assert b"Traceback" not in missing.stderr + missing.stdout
    assert small.returncode == 1 and b"must be bigger than 64(M)" in small.stderr


def test_full_device(tmp_path, small_device):
    """JRN-4: a device without room for the journal fails the start in one line, before the store has anything, and what
    was reserved on it is given back; a second sheep on the directory of a running one is refused as well."""

    def start(name: str, options: str) -> subprocess.Popen[bytes]:
        arguments = ["-f", "-l", "dst=stdout", "-c", f"local:{tmp_path / name}.cluster", "-b", "127.0.0.1"]
        arguments += ["-p", str(ports[name].getsockname()[1]), "-y", "127.0.0.1", "-j", options, str(tmp_path / name)]
        return subprocess.Popen(
            run_python("sheepdog_cli.sheep", *arguments),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    ports = {name: reserve_port() for name in ("one", "two")}
    full = start("one", f"size=256M,dir={small_device}")
    said, _ = full.communicate(timeout=60)
    assert full.returncode == 1
    assert b"No space left on device" in said and b"Traceback" not in said
    assert list(small_device.iterdir()) == []
    assert not (tmp_path / "one" / "config").exists() and not any((tmp_path / "one" / "epoch").iterdir())

    first = start("one", f"size=64M,dir={small_device}")
    try:
        wait_until(lambda: len(journal_files(small_device)) == 2, "the journal of the first sheep")
        wait_until(lambda: all(path.stat().st_size == 32 * MiB for path in journal_files(small_device)), "its size")
        second = start("two", f"size=64M,dir={small_device}")
        said, _ = second.communicate(timeout=60)
        assert second.returncode == 1
        assert b"is used by another sheep" in said and b"Traceback" not in said
        assert len(journal_files(small_device)) == 2
    finally:
        first.terminate()
        first.communicate(timeout=60)
        for port in ports.values():
            port.close()
    assert journal_files(small_device) == []


def test_torn_record(one):
    """JRN-5: the last record, torn by the crash, is ignored; those before it are replayed."""
    one.dog("vdi", "create", "alpha", "16M")
    write(one, "alpha", 0, pattern(1, 65536))
    write(one, "alpha", 0, pattern(2, 4096))
    path = object_file(one, data_oid(vid(one, "alpha"), 0))
    one.kill(0)
    content = path.read_bytes()
    journal = journal_files(one.sheep[0].directory)[0]
    raw = journal.read_bytes()
    end = raw.rindex(pattern(2, 4096)[-100:])
    os.truncate(journal, end + 50)
    path.write_bytes(bytes(len(content)))

    one.restart(0)

    assert read(one, "alpha", 0, 65536) == pattern(1, 65536)


@pytest.mark.parametrize(("store", "redundancy"), [("plain", "3"), ("tree", "2:1")])
def test_three_nodes(fresh_cluster, store, redundancy):
    """Three sheep with journals are killed at once, one loses what it had not flushed: acknowledged data is there.

    Copies in the plain store, strips in the tree store: the original's replay knew neither strips nor directories.
    """
    cluster = fresh_cluster(3, options=JOURNAL, sync=True, store=store, redundancy=redundancy)
    cluster.format()
    cluster.dog("vdi", "create", "alpha", "16M")
    acknowledged = 0
    with cluster.connect(timeout_s=60.0) as connection:
        opened = Volume.open(connection.request, b"alpha")
        for index in range(40):
            opened.write(index * 8192, pattern(index, 8192))
            acknowledged += 1
    for index in range(3):
        cluster.sheep[index].signal(signal.SIGKILL)
    for index in range(3):
        cluster.sheep[index].end(signal.SIGKILL)
    for path in (cluster.sheep[1].directory / "obj").rglob("00*00000000*"):
        path.write_bytes(bytes(path.stat().st_size))
    for index in range(3):
        cluster.restart(index, wait=False)
    cluster.wait_recovered()
    assert "replayed" in cluster.sheep[1].log_path.read_text()

    for node in range(3):
        content = read(cluster, "alpha", 0, acknowledged * 8192, node=node)
        assert content == b"".join(pattern(index, 8192) for index in range(acknowledged))


@pytest.mark.parametrize("name", ["one-node-journal-killed", "one-node-journal-lost-writes"])
def test_store_of_the_original(fresh_cluster, tmp_path, name):
    """A store that the original left with its journal serves the recorded volumes, byte for byte."""
    facts = store_facts(name)
    base = tmp_path / "cluster"
    unpack_store(name, base)
    cluster = SheepCluster(1, base=base, options=("-j", "size=256M"), store="plain", redundancy="1")
    directory = cluster.sheep[0].directory
    next(path for path in base.iterdir() if (path / "config").exists()).rename(directory)
    # The sheep runs on another port here than the one recorded in its epochs.
    epochs = StoreDirectory(str(directory))
    for epoch in epochs.epochs():
        record = epochs.read_epoch(epoch)
        nodes = tuple(replace(node, id=NodeId.of("127.0.0.1", cluster.sheep[0].port)) for node in record.nodes)
        epochs.write_epoch(epoch, replace(record, nodes=nodes))
    try:
        cluster.start()
        wait_until(lambda: serves(cluster), "the volumes")
        for vdi in facts["vdis"]:
            content = read_all(cluster, vdi["name"], tag=vdi["tag"])
            assert hashlib.sha256(content).hexdigest() == vdi["content_sha256"], vdi
        assert "replayed" in cluster.sheep[0].log_path.read_text()
        assert cluster.stop(0) == 0
        assert journal_files(directory) == []
    finally:
        cluster.close()


def serves(cluster: SheepCluster) -> bool:
    with cluster.connect() as connection:
        return bool(admin.used_vids(connection.request))
