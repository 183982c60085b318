"""Real sheep and dog on what the original left: store directories, cluster snapshots and backups as they were recorded,
and store directories that are built byte by byte from the description of the format."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import stores
from scenes import MiB, header_of, kinds, pattern, read, read_all, rows, stored, vid_of_name, wait_serving, wait_stored
from scenes import write as write_volume

from sheepdog.model.ids import btree_oid, data_oid, inode_oid, is_btree, is_ledger, ledger_oid
from sheepdog.testing.cluster import SheepCluster, wait_until
from sheepdog.testing.vectors import (
    backup_stream,
    find_vectors,
    load_json,
    store_facts,
    unpack_archive,
    unpack_store,
    vectors_path,
)
from sheepdog.testing.vectors import pattern as recorded_pattern

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

ARCHIVES = (
    "one-node-plain",
    "two-nodes-tree",
    "three-nodes-one-lost",
    "three-nodes-erasure",
    "four-nodes-stale-killed",
)
Facts = dict[str, Any]  # as the recordings describe a volume


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def row_of(vdi: Facts) -> list[str]:
    """The row of ``vdi list -r`` without the time."""
    flag = {"working": "=", "clone": "c", "snapshot": "s"}[vdi["kind"]]
    columns = ("name", "snap_id", "size", "used", "shared", "vid", "copies", "tag", "block_size_shift")
    return [flag, *(str(vdi[column]) for column in columns)]


def listed(cluster: SheepCluster, node: int) -> list[list[str]]:
    return [row[:6] + row[7:] for row in rows(cluster, node=node)]


def check_contents(cluster: SheepCluster, vdis: list[Facts]) -> None:
    """Through every node the listing and the content of every volume are those that were recorded."""
    for sheep in cluster.live:
        assert listed(cluster, sheep.index) == [row_of(vdi) for vdi in vdis]
        for vdi in vdis:
            content = read_all(cluster, vdi["name"], node=sheep.index, snap_id=vdi["snap_id"])
            assert sha256(content) == vdi["content_sha256"], (sheep.index, vdi)


@pytest.mark.parametrize("name", ARCHIVES if find_vectors() else [None])
def test_recorded_store(fresh_cluster: Callable[..., SheepCluster], tmp_path: Path, name: str) -> None:
    """A cluster that the original left goes on under our sheep: all volumes, snapshots and attributes, through every
    node, deleted ones stay deleted, every check is clean, and it can be written, snapshotted and deleted.

    Placement follows from addresses, so the sheep must have the ports that were recorded.
    """
    vectors_path()
    facts = store_facts(name)
    numbers = facts.get("restart_nodes") or [one["node"] for one in facts["sheep"]]
    members = [one for one in facts["sheep"] if one["node"] in numbers]
    unpack_store(name, tmp_path)
    try:
        cluster = SheepCluster(
            len(members), driver="local", base=tmp_path / "run", store=facts["store"], redundancy="1",
            zones=[one["zone"] for one in members], ports=[one["port"] for one in members],
        )  # fmt: skip
    except OSError as error:
        pytest.skip(f"a port of the recording is in use: {error}")
    try:
        for sheep, one in zip(cluster.sheep, members, strict=True):
            sheep.directory, *disks = (tmp_path / os.path.basename(path) for path in one["paths"])
            sheep.disks = tuple(disks)
        cluster.start()
        for sheep in cluster.sheep:
            wait_serving(cluster, sheep.index)
        cluster.wait_recovered()

        check_contents(cluster, facts["vdis"])
        for one in facts.get("attributes", ()):
            assert cluster.dog("vdi", "getattr", one["vdi"], one["key"]).stdout.decode() == one["value"]
        for one in facts.get("deleted", ()):
            gone = cluster.dog("vdi", "read", one["name"], check=False)
            assert (gone.returncode, gone.stdout) == (1, b"")
        checked = cluster.dog("cluster", "check")
        assert checked.stderr == b"" and b"fixed" not in checked.stdout

        name = facts["vdis"][0]["name"]
        before = read_all(cluster, name)
        cluster.dog("vdi", "snapshot", "-s", "ours", name)
        write_volume(cluster, name, 3 * MiB - 5, b"written by us")
        assert read(cluster, name, 3 * MiB - 5, 13, node=len(members) - 1) == b"written by us"
        assert read_all(cluster, name, tag="ours") == before
        for row in rows(cluster):
            cluster.dog("vdi", "delete", *(("-s", row[2]) if row[0] == "s" else ()), row[1])
        assert rows(cluster) == []
        if not cluster.sheep[0].disks:
            wait_until(lambda: not kinds(cluster)["data"] and not kinds(cluster)["ledger"], "all objects to go")
        assert [cluster.stop(sheep.index) for sheep in cluster.sheep] == [0] * len(members)
    finally:
        logs = cluster.logs()
        cluster.close()
    assert "Traceback" not in logs


@pytest.fixture(scope="module")
def target(start_cluster: Callable[..., SheepCluster]) -> SheepCluster:
    """Where recorded states and streams are loaded: three nodes, while they were made with one and two."""
    return start_cluster(3, driver="local", store="plain", redundancy="1")


def test_recorded_cluster_snapshots(target: SheepCluster, tmp_path: Path) -> None:
    """CS-1: every state that the original saved loads, by tag and by index, and gives what the original made of it. The
    directory is continued by us, and the original's entries in it stay byte for byte."""
    unpack_archive(vectors_path() / "snapshots" / "cluster-snapshot.tar.gz", tmp_path)
    path = tmp_path / "cs"
    loads = load_json("snapshots/cluster-snapshot.json")["loads"]
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for number, (tag, made) in enumerate(loads.items(), 1):
        what = tag if number % 2 else str(number)
        done = target.dog("cluster", "snapshot", "load", what, str(path), input=b"yes\n")
        assert (done.returncode, done.stderr) == (0, b"")
        check_contents(target, made["vdis_after_load"])
    target.dog("cluster", "snapshot", "save", "ours", str(path))
    log = path / "user_snap"
    assert all(file.read_bytes() == content for file, content in files.items() if file != log)
    records = log.read_bytes()
    assert records[:12] == files[log][:12] and records[32 : len(files[log])] == files[log][32:]
    assert len(records) == len(files[log]) + 296


def test_recorded_backups(target: SheepCluster) -> None:
    """SNAP-8: every stream of the original, restored onto a volume of the base content, gives the recorded content as a
    new snapshot without tag; and our backup of these two snapshots is the same stream, byte for byte."""
    target.format("-f")
    for one in load_json("backup/backup.json"):
        name = one["name"]
        target.dog("vdi", "create", *one["create_options"], name, one["size"])
        for made in one["base_writes"]:
            data = recorded_pattern(made["seed"], made["offset"], made["length"])
            write_volume(target, name, made["offset"], data)
        target.dog("vdi", "snapshot", "-s", "base", name)
        stream = backup_stream(name)
        done = target.dog("vdi", "restore", "-s", "base", name, input=stream)
        assert (done.stdout, done.stderr) == (b"", b"")
        assert [(row[2], row[9]) for row in rows(target, name) if row[0] == "s"] == [("1", "base"), ("2", "")]
        assert sha256(read_all(target, name, tag="base")) == one["base_sha256"]
        assert sha256(read_all(target, name, snap_id=2)) == one["target_sha256"]
        assert target.dog("vdi", "backup", "-F", "base", "-s", "2", name).stdout == stream


# ---- built stores


def files_of(cluster: SheepCluster) -> dict[str, bytes]:
    """Every object file of the only sheep."""
    return {
        file.name: file.read_bytes() for file in (cluster.sheep[0].directory / "obj").iterdir() if file.is_file()
    }  # fmt: skip


def test_built_store(fresh_cluster: Callable[..., SheepCluster], tmp_path: Path) -> None:
    """A store of the format's description alone: a snapshot with a clone, of whose objects one has a ledger, a
    hypervolume of two leaves, a deleted volume. It lists, reads, checks and deletes as the numbers in it say."""
    cluster = SheepCluster(1, driver="local", base=tmp_path, store="plain", redundancy="1")
    try:
        builder = stores.StoreBuilder(cluster.sheep[0].directory)
        # Names are found from their hash on, unless numbers are recycled, as here (0x10).
        builder.config(stores.config_file(ctime=1795339442 << 32, flags=0x14, clean=True, shift=20, space=64 << 30))
        builder.epoch(1, stores.epoch_file([stores.node(cluster.sheep[0].port, space=64 << 30)], 1795339442))
        old, new, clone, huge, dead = 0x100, 0x101, 0x200, 0x300, 0x400
        put = builder.put
        common = {"size": 3 * MiB, "shift": 20}
        put(inode_oid(old), stores.inode(b"v", vid=old, tag=b"s", snap_ctime=1 << 32, owners={0: old, 1: old},
                                         references={0: (0, 2), 1: (0, 2)}, **common))  # fmt: skip
        # The working volume wrote object 1 anew, which dropped (1, 0) of the snapshot's.
        put(inode_oid(new), stores.inode(b"v", vid=new, snap_id=2, parent=old, owners={0: old, 1: new},
                                         references={0: (1, 0)}, **common))  # fmt: skip
        put(inode_oid(clone), stores.inode(b"c", vid=clone, parent=old, owners={0: old, 1: old},
                                           references={0: (1, 0), 1: (1, 0)}, **common))  # fmt: skip
        for seed, oid in enumerate((data_oid(old, 0), data_oid(old, 1), data_oid(new, 1))):
            put(oid, pattern(seed, MiB))
        put(ledger_oid(data_oid(old, 1)), stores.ledger(1, -1))
        last = (16 << 50 >> 22) - 1
        put(btree_oid(huge, 0), stores.leaf({7: huge, 9: huge}))
        put(btree_oid(huge, 1), stores.leaf({100: huge, last: huge}))
        root = stores.inner_root({9: btree_oid(huge, 0), last: btree_oid(huge, 1)})
        put(inode_oid(huge), stores.hyper_inode(b"h", root, vid=huge, size=16 << 50, counter=2))
        for index in (7, 9, 100, last):
            put(data_oid(huge, index), index.to_bytes(4, "little") * MiB)
        put(inode_oid(dead), stores.inode(b"", vid=dead, size=0, shift=20))
        cluster.start()
        wait_serving(cluster, 0)

        assert [row[:6] + row[7:] for row in rows(cluster)] == [
            ["s", "v", "1", str(3 * MiB), str(2 * MiB), "0", "100", "1", "s", "20"],
            ["=", "v", "0", str(3 * MiB), str(MiB), str(MiB), "101", "1", "", "20"],
            ["c", "c", "0", str(3 * MiB), "0", str(2 * MiB), "200", "1", "", "20"],
            ["=", "h", "0", str(16 << 50), str(4 << 22), "0", "300", "1", "", "22"],
        ]
        first, shared, own = pattern(0, MiB), pattern(1, MiB), pattern(2, MiB)
        assert read_all(cluster, "v", tag="s") == read_all(cluster, "c") == first + shared + bytes(MiB)
        assert read_all(cluster, "v") == first + own + bytes(MiB)
        for index in (7, 9, 100, last):
            assert read(cluster, "h", index << 22, 4096) == index.to_bytes(4, "little") * 1024
        assert read(cluster, "h", 8 << 22, 4096) == bytes(4096)
        checked = cluster.dog("cluster", "check")
        assert checked.stderr == b"" and b"fixed" not in checked.stdout
        write_volume(cluster, "h", 8 << 22, b"between")
        assert read(cluster, "h", 8 << 22, 7) == b"between"

        cluster.dog("vdi", "delete", "-s", "s", "v")
        assert read_all(cluster, "c") == first + shared + bytes(MiB)
        cluster.dog("vdi", "delete", "c")
        wait_until(lambda: data_oid(old, 1) not in stored(cluster), "the object that only the clone had")
        assert read_all(cluster, "v") == first + own + bytes(MiB)
        for name in ("v", "h"):
            cluster.dog("vdi", "delete", name)
        wait_stored(cluster, {})
        wait_until(lambda: not stored(cluster, is_ledger) and not stored(cluster, is_btree), "ledgers and leaves")
        assert cluster.stop(0) == 0
    finally:
        logs = cluster.logs()
        cluster.close()
    assert "Traceback" not in logs


def test_our_files_are_those_of_the_description(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """What our sheep store of volumes, a snapshot, a clone, a hypervolume and a ledger is, byte for byte, what the
    description says; so the original reads it."""
    cluster = fresh_cluster(1, driver="local", store="plain", redundancy="1")
    cluster.format("-z", "20")
    cluster.dog("vdi", "create", "v", "3M")
    write_volume(cluster, "v", 0, pattern(1, 2 * MiB))
    cluster.dog("vdi", "snapshot", "-s", "tag", "v")
    cluster.dog("vdi", "clone", "-s", "tag", "v", "c")
    write_volume(cluster, "v", MiB, pattern(2, MiB))
    cluster.dog("vdi", "create", "-y", "h", "1P")
    write_volume(cluster, "h", 9 << 22, pattern(3, 4 * MiB))
    old, new = header_of(cluster, "v", tag="tag"), header_of(cluster, "v")
    clone, huge = vid_of_name(cluster, "c"), vid_of_name(cluster, "h")
    wait_until(lambda: bool(stored(cluster, is_ledger)), "the ledger of the object that was written anew")
    times = {name: header_of(cluster, name).create_time for name in ("c", "h")}
    assert cluster.stop(0) == 0
    a, b, common = old.vdi_id, new.vdi_id, {"size": 3 * MiB, "shift": 20}
    expected = {
        f"{inode_oid(a):016x}": stores.inode(
            b"v", vid=a, tag=b"tag", create_time=old.create_time, snap_ctime=old.snap_ctime, owners={0: a, 1: a},
            references={0: (0, 2), 1: (0, 2)}, **common,
        ),
        f"{inode_oid(b):016x}": stores.inode(
            b"v", vid=b, create_time=new.create_time, snap_id=2, parent=a, owners={0: a, 1: b},
            references={0: (1, 0)}, **common,
        ),
        f"{inode_oid(clone):016x}": stores.inode(
            b"c", vid=clone, create_time=times["c"], parent=a, owners={0: a, 1: a},
            references={0: (1, 0), 1: (1, 0)}, **common,
        ),
        f"{data_oid(a, 0):016x}": pattern(1, 2 * MiB)[:MiB],
        f"{data_oid(a, 1):016x}": pattern(1, 2 * MiB)[MiB:],
        f"{data_oid(b, 1):016x}": pattern(2, MiB),
        f"{ledger_oid(data_oid(a, 1)):016x}": stores.ledger(1, -1),
        f"{data_oid(huge, 9):016x}": pattern(3, 4 * MiB),
    }  # fmt: skip
    hyper = bytearray(stores.hyper_inode(b"h", stores.leaf({9: huge}), vid=huge, size=1 << 50))
    hyper[512:520] = times["h"].to_bytes(8, "little")
    expected[f"{inode_oid(huge):016x}"] = bytes(hyper)
    found = files_of(cluster)
    assert set(found) == set(expected)
    assert [name for name in sorted(found) if found[name] != expected[name]] == []


def btree_entries(raw: bytes) -> tuple[int, list[tuple[int, int]]]:
    """Depth and entries of a B-tree node, by the description of its bytes."""
    magic, depth, count = struct.unpack_from("<HHI", raw)
    assert magic == 0x6274
    form = struct.Struct("<II" if depth == 1 else "<I4xQ")
    return depth, [form.unpack_from(raw, 8 + form.size * at) for at in range(count)]


def test_full_index_nodes_split(fresh_cluster: Callable[..., SheepCluster], tmp_path: Path) -> None:
    """HV-3: an object written into a hypervolume whose root is full, or whose leaf is full, splits it into halves. All
    objects are found through the new nodes, and an inner entry names the last index of its leaf, not one beyond."""
    full = 524_287
    cluster = SheepCluster(1, driver="local", base=tmp_path, store="plain", redundancy="1")
    try:
        builder = stores.StoreBuilder(cluster.sheep[0].directory)
        builder.config(stores.config_file(ctime=1795339442 << 32, flags=0x14, clean=True, space=64 << 30))
        builder.epoch(1, stores.epoch_file([stores.node(cluster.sheep[0].port, space=64 << 30)], 1795339442))
        flat, deep = 0x10, 0x20
        every_other = {2 * number: flat for number in range(full)}
        root = stores.leaf(every_other)
        builder.put(inode_oid(flat), stores.hyper_inode(b"flat", root, vid=flat, size=16 << 50))
        builder.put(btree_oid(deep, 0), stores.leaf({2 * number: deep for number in range(full)}))
        builder.put(btree_oid(deep, 1), stores.leaf({1 << 24: deep}))
        root = stores.inner_root({2 * full - 2: btree_oid(deep, 0), 1 << 24: btree_oid(deep, 1)})
        builder.put(inode_oid(deep), stores.hyper_inode(b"deep", root, vid=deep, size=16 << 50, counter=2))
        cluster.start()
        wait_serving(cluster, 0)
        for name, vid, count in (("flat", flat, full + 1), ("deep", deep, full + 2)):
            write_volume(cluster, name, 1001 << 22, name.encode())
            write_volume(cluster, name, 1_000_003 << 22, name.encode())
            assert read(cluster, name, 1001 << 22, 4) == read(cluster, name, 1_000_003 << 22, 4) == name.encode()
            lines = cluster.dog("vdi", "object", "map", name).stdout.decode().splitlines()
            indexes = [int(line.split()[0]) for line in lines[1:]]
            assert len(indexes) == count + 1 and indexes == sorted(indexes)
            assert {1001, 1_000_003, 2 * full - 2} <= set(indexes)
            assert lines[1 + indexes.index(1001)] == f"{1001:08d} {vid:8x}"
        assert cluster.stop(0) == 0

        for vid, nodes in ((flat, 2), (deep, 3)):
            inode = (cluster.sheep[0].directory / "obj" / f"{inode_oid(vid):016x}").read_bytes()
            depth, inner = btree_entries(inode[4664 : 4664 + (4 << 20)])
            assert (depth, len(inner), int.from_bytes(inode[568:572], "little")) == (2, nodes, nodes)
            for last, oid in inner:
                leaf_depth, entries = btree_entries((cluster.sheep[0].directory / "obj" / f"{oid:016x}").read_bytes())
                assert leaf_depth == 1 and entries[-1][0] == last
                assert [index for index, _ in entries] == sorted(index for index, _ in entries)
    finally:
        logs = cluster.logs()
        cluster.close()
    assert "Traceback" not in logs
