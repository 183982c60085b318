"""Volumes: life cycle, thinness, I/O of every shape, attributes, numbering (behaviours VDI-1 to VDI-18)."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from scenes import (
    KiB,
    MiB,
    header_of,
    kinds,
    live_inodes,
    only,
    pattern,
    read,
    read_all,
    referenced,
    rows,
    stored,
    vid_of_name,
    volume,
    wait_stored,
    write,
)

from sheepdog.client import admin
from sheepdog.model.hashing import vdi_hash
from sheepdog.model.ids import data_oid, is_inode
from sheepdog.testing.cluster import SheepCluster, run_python, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.matrix, pytest.mark.timeout(180)]

NODES = range(3)


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., SheepCluster]) -> SheepCluster:
    """Three nodes, 2 copies or strips 2:1, objects of 1 MiB; shared by the tests, each with names of its own."""
    cluster = start_cluster(3, copies=2)
    cluster.format("-z", "20")
    return cluster


@pytest.mark.covering
def test_life_of_a_volume(cluster: SheepCluster) -> None:
    """VDI-1: create, list, grow, delete; the same name twice and shrinking are refused."""
    cluster.dog("vdi", "create", "life", "3M")
    [row] = rows(cluster, "life")
    assert row[:4] == ["=", "life", "0", str(3 * MiB)]
    assert row[8:] == [cluster.redundancy, "", "20"]
    again = cluster.dog("vdi", "create", "life", "3M", check=False)
    assert (again.returncode, again.stderr) == (1, b"Failed to create VDI life: VDI exists already\n")
    write(cluster, "life", 0, pattern(1, 3 * MiB))
    cluster.dog("vdi", "resize", "life", "5M", node=1)
    assert read_all(cluster, "life", node=2) == pattern(1, 3 * MiB) + bytes(2 * MiB)
    shrink = cluster.dog("vdi", "resize", "life", "1M", check=False)
    assert (shrink.returncode, shrink.stderr) == (64, b"Shrinking VDIs is not implemented\n")
    cluster.dog("vdi", "delete", "life")
    assert rows(cluster, "life") == []
    cluster.dog("vdi", "create", "life", "1M")
    assert not any(read_all(cluster, "life"))


@pytest.mark.parametrize("size", [0, 1, 4095, 4 * MiB, 1 << 40])
def test_sizes(cluster: SheepCluster, size: int) -> None:
    """VDI-1: nothing, a byte, no whole sector, whole objects, the limit of the shift: listed as asked for, and the
    first and the last byte can be written."""
    name = f"size{size}"
    cluster.dog("vdi", "create", name, str(size))
    assert [int(row[3]) for row in rows(cluster, name)] == [size]
    if size:
        with volume(cluster, name) as opened:
            opened.write(0, b"F")
            opened.write(size - 1, b"L")
        assert read(cluster, name, size - 1, 1, node=1) == b"L"
        assert read(cluster, name, 0, 1, node=2) == (b"F" if size > 1 else b"L")


def test_sizes_above_the_limit(cluster: SheepCluster) -> None:
    """VDI-1: one byte more than 2^20 objects needs another shift or a hyper volume; exit 64."""
    refused = cluster.dog("vdi", "create", "-z", "22", "toobig", str((4 << 40) + 1), check=False)
    assert refused.returncode == 64
    assert refused.stderr.startswith(b"VDI size is larger than 4.0 TB bytes, please use '-y'")
    for size, message in (("ten", b"Invalid size 'ten'"), ("12MB", b"Invalid size '12MB'")):
        bad = cluster.dog("vdi", "create", "toobig", size, check=False)
        assert bad.returncode == 64
        assert bad.stderr.startswith(message)
    assert rows(cluster, "toobig") == []


def test_names(cluster: SheepCluster) -> None:
    """VDI-1: blanks, backslashes and letters beyond ASCII are kept, and escaped in raw listings."""
    for name, shown in (("a b", "a\\ b"), ("back\\slash", "back\\\\slash"), ("größe 漢", "größe\\ 漢")):
        cluster.dog("vdi", "create", name, "1M")
        write(cluster, name, 0, name.encode())
        assert [row[1] for row in rows(cluster, name)] == [shown]
        assert read(cluster, name, 0, len(name.encode()), node=1) == name.encode()


@pytest.mark.covering
def test_thin_and_preallocated(cluster: SheepCluster) -> None:
    """VDI-2: creation stores the inode alone; each first write to an object adds one object with all copies; -P creates
    all of them."""
    cluster.dog("vdi", "create", "thin", "8M")
    vid = vid_of_name(cluster, "thin")
    mine = only([vid])
    assert not stored(cluster, mine)
    assert stored(cluster, lambda oid: is_inode(oid) and oid >> 32 & 0xFFFFFF == vid).total() == cluster.shards
    for count, index in enumerate((5, 0, 7), start=1):
        write(cluster, "thin", index * MiB + 17, b"x")
        write(cluster, "thin", index * MiB + 99, b"y")
        assert len(stored(cluster, mine)) == count
    wait_stored(cluster, {data_oid(vid, index): cluster.shards for index in (0, 5, 7)}, mine)
    cluster.dog("vdi", "create", "-P", "thick", "8M")
    vid = vid_of_name(cluster, "thick")
    wait_stored(cluster, {data_oid(vid, index): cluster.shards for index in range(8)}, only([vid]))


@pytest.mark.covering
def test_unaligned_writes(cluster: SheepCluster) -> None:
    """VDI-3: 1 to 1024 bytes at odd offsets, over sector and object borders and over each other, up to the last byte of
    a size that no sector divides, read back exactly through every node."""
    size = 3 * MiB + 333
    cluster.dog("vdi", "create", "odd", str(size))
    content = bytearray(size)
    chosen = random.Random(3)
    with volume(cluster, "odd") as opened:
        for number in range(150):
            length = chosen.randint(1, 1024)
            border = chosen.choice((0, 512, 4096, MiB, 2 * MiB, 3 * MiB, size))
            offset = max(0, min(size - length, border + chosen.randint(-1024, 1024)))
            data = pattern(number, length)
            opened.write(offset, data)
            content[offset : offset + length] = data
        opened.write(size - 1, b"!")
        content[-1:] = b"!"
    for node in NODES:
        assert read_all(cluster, "odd", node=node) == content


def test_scattered_sectors(cluster: SheepCluster) -> None:
    """VDI-4: sectors written at steps of 1.5 KB show in a read of the whole, with zeros between them."""
    cluster.dog("vdi", "create", "holes", "2M")
    content = bytearray(2 * MiB)
    with volume(cluster, "holes") as opened:
        for offset in range(0, MiB + 64 * KiB, 7 * 1536):
            data = pattern(offset, 512)
            opened.write(offset, data)
            content[offset : offset + 512] = data
    assert read_all(cluster, "holes", node=1) == content
    assert cluster.dog("vdi", "read", "holes", node=2).stdout == content


def test_runs_of_zeros(cluster: SheepCluster) -> None:
    """VDI-5: blocks that begin or end with zeros, or are nothing else, replace what was there."""
    cluster.dog("vdi", "create", "zeros", "2M")
    write(cluster, "zeros", 0, b"\xff" * 2 * MiB)
    content = bytearray(b"\xff" * 2 * MiB)
    block = pattern(1, 4096)
    shapes = (
        bytes(4096) + block,
        block + bytes(4096),
        bytes(2048) + block,
        block + bytes(512),
        bytes(512) + block + bytes(512),
        bytes(8192),
        bytes(100),
        bytes(4096) + block + bytes(8192),
    )
    with volume(cluster, "zeros", node=1) as opened:
        for number, data in enumerate(shapes):
            offset = number * 128 * KiB + (0, 512, 100)[number % 3]
            opened.write(offset, data)
            content[offset : offset + len(data)] = data
        opened.write(MiB + 12288, bytes(512 * KiB))
        content[MiB + 12288 : MiB + 12288 + 512 * KiB] = bytes(512 * KiB)
    for node in NODES:
        assert read_all(cluster, "zeros", node=node) == content


@pytest.mark.covering
def test_discard(cluster: SheepCluster) -> None:
    """VDI-6: a discard of everything frees all objects, reads give zeros, check is clean and writing works again."""
    cluster.dog("vdi", "create", "-P", "gone", "4M")
    vid = vid_of_name(cluster, "gone")
    write(cluster, "gone", 0, pattern(1, 4 * MiB))
    with volume(cluster, "gone") as opened:
        opened.discard(0, 4 * MiB)
    wait_stored(cluster, {}, only([vid]))
    assert not any(read_all(cluster, "gone", node=1))
    assert cluster.dog("vdi", "check", "gone").stdout == b"finish check&repair gone\n"
    write(cluster, "gone", MiB + 5, b"again", node=2)
    assert read(cluster, "gone", MiB, 16) == bytes(5) + b"again" + bytes(6)
    wait_stored(cluster, {data_oid(vid, 1): cluster.shards}, only([vid]))


def test_discard_by_the_server(cluster: SheepCluster) -> None:
    """DISCARD_OBJ: an old QEMU leaves the map to the server; twice is harmless."""
    cluster.dog("vdi", "create", "-P", "olddiscard", "2M")
    vid = vid_of_name(cluster, "olddiscard")
    with cluster.connect(1) as connection:
        for _ in range(2):
            assert connection.request(0x05, oid=data_oid(vid, 1)).result == 0
    wait_stored(cluster, {data_oid(vid, 0): cluster.shards}, only([vid]))
    assert header_of(cluster, "olddiscard").vdi_size == 2 * MiB


def test_copies_per_volume(cluster: SheepCluster) -> None:
    """VDI-7: the cluster's default unless the volume names its own; both kinds live side by side."""
    for words, shown, copies in (
        ((), cluster.redundancy, cluster.shards),
        (("-c", "3"), "3", 3),
        (("-c", "1"), "1", 1),
        (("-c", "2:1"), "2:1", 3),
    ):
        name = f"copies{len(words)}{shown}"
        cluster.dog("vdi", "create", *words, name, "2M")
        write(cluster, name, 0, pattern(copies, 2 * MiB))
        vid = vid_of_name(cluster, name)
        wait_stored(cluster, {data_oid(vid, index): copies for index in range(2)}, only([vid]))
        assert [row[8] for row in rows(cluster, name)] == [shown]
        assert read_all(cluster, name, node=1) == pattern(copies, 2 * MiB)


@pytest.mark.covering
def test_attributes(cluster: SheepCluster) -> None:
    """VDI-8: set, get, overwrite, delete, get after that; empty, 64 KB and from stdin; the same before and after
    snapshot and rollback."""
    cluster.dog("vdi", "create", "attr", "1M")

    def get(key: str) -> bytes:
        return cluster.dog("vdi", "getattr", "attr", key, node=1).stdout

    cluster.dog("vdi", "setattr", "attr", "owner", "ops-team")
    assert get("owner") == b"ops-team"
    cluster.dog("vdi", "setattr", "attr", "owner", "dev", node=2)
    assert get("owner") == b"dev"
    cluster.dog("vdi", "setattr", "attr", "empty", "")
    assert get("empty") == b""
    big = pattern(1, 65536).replace(b"\0", b"\1")
    cluster.dog("vdi", "setattr", "attr", "big", input=big)
    assert get("big") == big
    cluster.dog("vdi", "snapshot", "-s", "s", "attr")
    assert get("owner") == b"dev"
    cluster.dog("vdi", "rollback", "-f", "-s", "s", "attr")
    assert get("owner") == b"dev"
    cluster.dog("vdi", "setattr", "-d", "attr", "owner")
    for words in (("getattr", "attr", "owner"), ("setattr", "-d", "attr", "owner")):
        missing = cluster.dog("vdi", *words, check=False)
        assert (missing.returncode, missing.stderr) == (5, b"Attribute 'owner' not found\n")
    unknown = cluster.dog("vdi", "getattr", "noattr", "owner", check=False)
    assert (unknown.returncode, unknown.stderr) == (5, b"VDI not found\n")


def test_exclusive_attribute(cluster: SheepCluster) -> None:
    """VDI-9: of several that set one key exclusively at the same moment, through all nodes, exactly one succeeds; the
    others get exit 3; after its deletion it is the same again."""
    cluster.dog("vdi", "create", "mutex", "1M")
    for _ in range(2):
        with ThreadPoolExecutor(6) as pool:
            tries = [
                pool.submit(cluster.dog, "vdi", "setattr", "-x", "mutex", "lock", f"holder{n}", node=n % 3, check=False)
                for n in range(6)
            ]
        done = [one.result() for one in tries]
        assert sorted(one.returncode for one in done) == [0, 3, 3, 3, 3, 3], [one.stderr for one in done]
        winner = next(number for number, one in enumerate(done) if one.returncode == 0)
        assert cluster.dog("vdi", "getattr", "mutex", "lock").stdout == f"holder{winner}".encode()
        cluster.dog("vdi", "setattr", "-d", "mutex", "lock")


def test_deleting_twice(cluster: SheepCluster) -> None:
    """VDI-10: the second deletion says that there is no such vdi."""
    cluster.dog("vdi", "create", "once", "1M")
    cluster.dog("vdi", "delete", "once")
    again = cluster.dog("vdi", "delete", "once", check=False)
    assert again.returncode in (0, 5), "0 as in the original, or 5"
    assert again.stderr == b"Failed to open VDI once (snapshot id: 0 snapshot tag: ): No VDI found\n"


def test_deletion_in_batches(cluster: SheepCluster) -> None:
    """VDI-11: -B and -I lead to the same end; -m frees only so many entries and keeps the vdi."""
    cluster.dog("vdi", "create", "-P", "batch", "8M")
    vid = vid_of_name(cluster, "batch")
    cluster.dog("vdi", "delete", "-m", "3", "batch")
    wait_stored(cluster, {data_oid(vid, index): cluster.shards for index in range(3, 8)}, only([vid]))
    assert len(rows(cluster, "batch")) == 1
    cluster.dog("vdi", "delete", "-B", "2", "-I", "0", "batch")
    wait_stored(cluster, {}, only([vid]))
    assert rows(cluster, "batch") == []


def test_deletion_while_a_node_is_down(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """VDI-12: a volume that is deleted while a node is away does not come back with that node."""
    cluster = fresh_cluster(3, copies=2)
    cluster.format("-z", "20")
    for name in ("stays", "goes"):
        cluster.dog("vdi", "create", name, "6M")
        write(cluster, name, 0, pattern(len(name), 6 * MiB))
    cluster.kill(2)
    cluster.wait_recovered()
    cluster.dog("vdi", "delete", "goes", node=0)
    cluster.restart(2)
    cluster.wait_recovered()
    for node in NODES:
        assert [row[1] for row in rows(cluster, node=node)] == ["stays"]
        assert read_all(cluster, "stays", node=node) == pattern(5, 6 * MiB)
    wait_stored(cluster, dict.fromkeys(referenced(live_inodes(cluster)), cluster.shards))


# Names found by search: hashing into the last ids is rare.
TOP, NEIGHBOUR = "n29542d8", "nbf9715"


def test_numbers(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """VDI-13, VDI-14: vids are the hash of the name or the next free one, and wrap from the top to 1; snapshot ids go
    on counting; rows are sorted by vid; deleting across the wrap works, and a deleted vid is not taken again."""
    cluster = fresh_cluster(1)
    cluster.format("-z", "20")
    top, neighbour = TOP, NEIGHBOUR
    assert (vdi_hash(top.encode()), vdi_hash(neighbour.encode())) == (0xFFFFFD, 0xFFFFFF)
    cluster.dog("vdi", "create", neighbour, "1M")
    cluster.dog("vdi", "create", top, "1M")
    expected = [0xFFFFFD, 0xFFFFFE, *range(1, 10)]
    for number, vid in enumerate(expected, start=1):
        assert vid_of_name(cluster, top) == vid
        write(cluster, top, 0, bytes([number]))
        if number < len(expected):
            cluster.dog("vdi", "snapshot", "-s", f"t{number}", top)
    listed = rows(cluster)
    assert [int(row[7], 16) for row in listed] == sorted([*expected, 0xFFFFFF])
    ids = {int(row[7], 16): int(row[2]) for row in listed if row[1] == top and row[0] == "s"}
    assert ids == {vid: number for number, vid in enumerate(expected[:-1], start=1)}
    for number in range(1, len(expected)):
        assert read(cluster, top, 0, 1, tag=f"t{number}") == bytes([number])

    for tag in ("t2", "t3", "t10"):  # fffffe, 1, 8: around the wrap and the newest
        cluster.dog("vdi", "delete", "-s", tag, top)
    cluster.dog("vdi", "snapshot", "-s", "later", top)
    assert vid_of_name(cluster, top) == 10
    assert header_of(cluster, top, tag="later").snap_id == len(expected)
    assert kinds(cluster)["inode"] == 1 + len(expected) + 1, "inodes of deleted volumes remain"
    cluster.dog("vdi", "delete", neighbour)
    cluster.dog("vdi", "create", neighbour, "1M")
    assert vid_of_name(cluster, neighbour) == 11, "ffffff was used"


def test_missing_volume(cluster: SheepCluster) -> None:
    """VDI-18: commands that open a volume say that there is none, and end with 1."""
    message = b"Failed to open VDI missing (snapshot id: 0 snapshot tag: ): No VDI found\n"
    for words in (("read", "missing"), ("resize", "missing", "1G"), ("object", "map", "missing"), ("check", "missing")):
        refused = cluster.dog("vdi", *words, check=False)
        assert refused.returncode == 1, words
        assert refused.stderr.startswith(message), words


def test_concurrent_creations(cluster: SheepCluster) -> None:
    """VDI-19: of several that create one name at the same moment, through all nodes, exactly one succeeds."""
    environment = {**os.environ, "SHEEPDOG_DOG_ADDR": "127.0.0.1"}
    running = [
        subprocess.Popen(
            run_python("sheepdog_cli.dog", "vdi", "create", "-p", str(cluster.sheep[n % 3].port), "race", "1M"),
            env=environment, stderr=subprocess.PIPE,
        )
        for n in range(5)
    ]  # fmt: skip
    outcomes = [(process.communicate(timeout=60)[1], process.returncode) for process in running]
    assert sorted(code for _, code in outcomes) == [0, 1, 1, 1, 1], outcomes
    assert {text for text, code in outcomes if code} == {b"Failed to create VDI race: VDI exists already\n"}
    assert len(rows(cluster, "race")) == 1


def test_object_map_location_and_disks_agree(cluster: SheepCluster) -> None:
    """VDI-21: what ``vdi object map`` and ``location`` print is what is on the disks."""
    cluster.dog("vdi", "create", "where", "3M")
    write(cluster, "where", 0, b"a")
    write(cluster, "where", 2 * MiB, b"b")
    vid = vid_of_name(cluster, "where")
    assert cluster.dog("vdi", "object", "map", "where").stdout.decode() == (
        f"Index       VID\n00000000 {vid:8x}\n00000002 {vid:8x}\n"
    )
    text = cluster.dog("vdi", "object", "location", "-i", "2", "where").stdout.decode()
    holders = {sheep.address for sheep in cluster.sheep if f"{sheep.address} has the object" in text}
    on_disk = {index for (oid, _), found in cluster.census().items() if oid == data_oid(vid, 2) for index in found}
    assert holders == {cluster.address(index) for index in on_disk}
    assert set(text.splitlines()[-1].split()) == holders
    assert cluster.dog("vdi", "check", "-e", "where").stdout == b"where is fine, no object is missing.\n"


def test_bitmaps_agree_on_all_nodes(cluster: SheepCluster) -> None:
    """Every node knows the same volumes after all that happened here."""

    def known(node: int) -> list[int]:
        with cluster.connect(node) as connection:
            return admin.used_vids(connection.request)

    wait_until(lambda: known(0) == known(1) == known(2), "the same volumes on all nodes", timeout_s=5)
    assert known(0)
