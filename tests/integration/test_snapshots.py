"""Snapshots, clones, rollback, backup (behaviours SNAP-1 to SNAP-8)."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

import pytest
from scenes import (
    Background,
    KiB,
    LiveClient,
    MiB,
    header_of,
    only,
    pattern,
    read,
    read_all,
    rows,
    stored,
    vid_of_name,
    volume,
    write,
)

from sheepdog.testing.cluster import SheepCluster

pytestmark = [pytest.mark.processes, pytest.mark.matrix, pytest.mark.timeout(180)]

NODES = range(3)


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., SheepCluster]) -> SheepCluster:
    """Three nodes, 2 copies or strips 2:1, objects of 1 MiB; shared by the tests, each with names of its own."""
    cluster = start_cluster(3, copies=2)
    cluster.format("-z", "20")
    return cluster


def test_each_snapshot_keeps_its_pattern(cluster: SheepCluster) -> None:
    """SNAP-1: seven times a pattern and a snapshot; the working vdi reads the last pattern, snapshot k reads pattern k,
    by tag and by id, through every node."""
    cluster.dog("vdi", "create", "seven", "2M")
    for k in range(1, 8):
        write(cluster, "seven", 0, pattern(k, 4096), node=k % 3)
        cluster.dog("vdi", "snapshot", "-s", f"t{k}", "seven")
    for node in NODES:
        assert read(cluster, "seven", 0, 4096, node=node) == pattern(7, 4096)
        for k in range(1, 8):
            assert read(cluster, "seven", 0, 4096, node=node, tag=f"t{k}") == pattern(k, 4096)
            assert read(cluster, "seven", 0, 4096, node=node, snap_id=k) == pattern(k, 4096)
    assert cluster.dog("vdi", "read", "-s", "t3", "seven", "0", "4096").stdout == pattern(3, 4096)
    assert cluster.dog("vdi", "read", "-s", "5", "seven", "0", "4096").stdout == pattern(5, 4096)


@pytest.mark.covering
def test_copy_on_write_is_per_object(cluster: SheepCluster) -> None:
    """SNAP-2: after a snapshot the first write to an object copies that one; Used and Shared change accordingly."""
    cluster.dog("vdi", "create", "-P", "cow", "4M")
    write(cluster, "cow", 0, pattern(1, 4 * MiB))

    def used_and_shared() -> dict[tuple[str, str], tuple[int, int]]:
        return {(row[0], row[9]): (int(row[4]) // MiB, int(row[5]) // MiB) for row in rows(cluster, "cow")}

    assert used_and_shared() == {("=", ""): (4, 0)}
    cluster.dog("vdi", "snapshot", "-s", "s", "cow")
    assert used_and_shared() == {("s", "s"): (4, 0), ("=", ""): (0, 4)}
    write(cluster, "cow", MiB + 100, b"x")
    assert used_and_shared() == {("s", "s"): (4, 0), ("=", ""): (1, 3)}
    write(cluster, "cow", MiB + 200, b"y")
    assert used_and_shared() == {("s", "s"): (4, 0), ("=", ""): (1, 3)}
    changed = bytearray(pattern(1, 4 * MiB))
    changed[MiB + 100] = ord("x")
    changed[MiB + 200] = ord("y")
    assert read_all(cluster, "cow", node=1) == changed
    assert read_all(cluster, "cow", node=2, tag="s") == pattern(1, 4 * MiB)


def test_tags(cluster: SheepCluster) -> None:
    """SNAP-3: a used tag is refused, the empty one is not, a number is refused, a tag may begin with a digit."""
    cluster.dog("vdi", "create", "tags", "2M")
    cluster.dog("vdi", "snapshot", "-s", "once", "tags")
    refused = cluster.dog("vdi", "snapshot", "-s", "once", "tags", check=False)
    assert refused.returncode == 1
    assert refused.stderr == (b"Failed to create snapshot for tags, maybe snapshot id (0) or tag (once) is existed\n")
    cluster.dog("vdi", "snapshot", "tags")
    cluster.dog("vdi", "snapshot", "tags")
    number = cluster.dog("vdi", "snapshot", "-s", "12", "tags", check=False)
    assert number.returncode == 64
    assert number.stderr == b"Please specify a non-integer value for a snapshot tag name\n"
    cluster.dog("vdi", "snapshot", "-s", "12ab", "tags")
    assert [(row[0], row[2], row[9]) for row in rows(cluster, "tags")] == [
        ("s", "1", "once"), ("s", "2", ""), ("s", "3", ""), ("s", "4", "12ab"), ("=", "0", ""),
    ]  # fmt: skip


def test_live_snapshots_under_scattered_writes(cluster: SheepCluster) -> None:
    """SNAP-4: a client with its vdi open writes four pieces per round; a snapshot taken after each round by another
    process holds exactly the rounds before it, and the client goes on without reopening."""
    cluster.dog("vdi", "create", "live", "4M")
    content = bytearray(4 * MiB)
    states = {}
    with LiveClient(cluster, "live", node=1) as client:
        for k in range(5):
            for piece in range(4):
                offset = piece * MiB + k * 3000
                data = pattern(10 * k + piece, KiB)
                client.write(offset, data)
                content[offset : offset + KiB] = data
            cluster.dog("vdi", "snapshot", "-s", f"r{k}", "live", node=k % 3)
            states[f"r{k}"] = bytes(content)
        client.write(0, b"after")
        content[:5] = b"after"
        assert client.reloads == 5
        assert client.read(0, 4 * MiB) == content
    for tag, state in states.items():
        assert read_all(cluster, "live", tag=tag) == state, f"snapshot {tag}"
    assert read_all(cluster, "live", node=2) == content


def test_live_snapshots_under_a_full_queue(cluster: SheepCluster) -> None:
    """SNAP-4: the same while eight writers keep whole-object writes in flight: no error, no hang, and each snapshot
    holds for every object some version that was written before the snapshot was taken, not one from after it."""
    objects = 8
    cluster.dog("vdi", "create", "-P", "queue", f"{objects}M")
    begun = [0] * objects
    done = [0] * objects
    clients = [LiveClient(cluster, "queue", node=index % 3) for index in range(objects)]
    lock = threading.Lock()

    def writer(index: int) -> Callable[[int], None]:
        def step(number: int) -> None:
            with lock:
                begun[index] = number + 1
            clients[index].write(index * MiB, (number + 1).to_bytes(8, "little") * (MiB // 8))
            with lock:
                done[index] = number + 1

        return step

    bounds = {}
    writers = [Background(writer(index)) for index in range(objects)]
    try:
        for one in writers:
            one.__enter__()
        for k in range(3):
            writers[0].wait(2)
            with lock:
                before = list(done)
            cluster.dog("vdi", "snapshot", "-s", f"q{k}", "queue", node=k)
            with lock:
                bounds[f"q{k}"] = (before, list(begun))
        writers[0].wait(2)
    finally:
        for one in writers:
            one.__exit__()
        for client in clients:
            client.close()

    for tag, (least, most) in bounds.items():
        for index in range(objects):
            data = read(cluster, "queue", index * MiB, MiB, tag=tag)
            version = int.from_bytes(data[:8], "little")
            assert data == data[:8] * (MiB // 8), f"snapshot {tag}: object {index} is torn"
            assert least[index] <= version <= most[index], f"snapshot {tag}: object {index}"
    for index in range(objects):
        data = read(cluster, "queue", index * MiB, MiB, node=2)
        assert data == done[index].to_bytes(8, "little") * (MiB // 8), f"object {index}"


def test_clones(cluster: SheepCluster) -> None:
    """SNAP-5: a clone has its own name, the flag c and shares data; writes to either side do not show on the other; one
    with -n has no parent; one with -P owns everything; clones of a clone's snapshot work; the end of the source harms
    none of them."""
    base = pattern(1, 3 * MiB)
    cluster.dog("vdi", "create", "father", "4M")
    write(cluster, "father", 0, base)
    cluster.dog("vdi", "snapshot", "-s", "s", "father")
    cluster.dog("vdi", "clone", "-s", "s", "father", "shares")
    cluster.dog("vdi", "clone", "-n", "-s", "s", "father", "alone")
    cluster.dog("vdi", "clone", "-P", "-s", "s", "father", "full")
    whole = base + bytes(MiB)
    for name, flag, used, shared in (("shares", "c", 0, 3), ("alone", "=", 3, 0), ("full", "c", 4, 0)):
        [row] = rows(cluster, name)
        assert (row[0], int(row[4]) // MiB, int(row[5]) // MiB) == (flag, used, shared), name
        assert read_all(cluster, name, node=1) == whole

    write(cluster, "shares", 0, b"child")
    write(cluster, "father", MiB, b"parent")
    assert read_all(cluster, "shares") == b"child" + whole[5:]
    assert read_all(cluster, "father") == base[:MiB] + b"parent" + whole[MiB + 6 :]
    assert read_all(cluster, "father", tag="s") == whole

    cluster.dog("vdi", "snapshot", "-s", "c", "shares")
    cluster.dog("vdi", "clone", "-s", "c", "shares", "grandchild")
    write(cluster, "grandchild", 2 * MiB, b"grand")
    refused = cluster.dog("vdi", "clone", "-s", "s", "father", "alone", check=False)
    assert (refused.returncode, refused.stderr) == (1, b"Failed to create VDI alone: VDI exists already\n")

    cluster.dog("vdi", "delete", "father")
    cluster.dog("vdi", "delete", "-s", "s", "father")
    assert read_all(cluster, "shares", node=2) == b"child" + whole[5:]
    assert read_all(cluster, "grandchild", node=1) == b"child" + whole[5 : 2 * MiB] + b"grand" + whole[2 * MiB + 5 :]
    assert read_all(cluster, "alone") == whole
    assert read_all(cluster, "full", node=2) == whole
    for name in ("shares", "alone", "full", "grandchild"):
        assert cluster.dog("vdi", "check", name).stdout == f"finish check&repair {name}\n".encode()


def test_rollback(cluster: SheepCluster) -> None:
    """SNAP-6: write A, snapshot s1, write B, rollback s1 reads A; the tree branches; further snapshots and rollbacks
    between them in any order give the right content, ids continue; what is refused or declined changes nothing."""
    cluster.dog("vdi", "create", "back", "2M")
    write(cluster, "back", 0, pattern(1, MiB + 5))
    cluster.dog("vdi", "snapshot", "-s", "s1", "back")
    write(cluster, "back", 4096, pattern(2, MiB))

    unchanged = read_all(cluster, "back")
    declined = cluster.dog("vdi", "rollback", "-s", "s1", "back", input=b"no\n")
    assert declined.stdout.endswith(b"snapshot was taken.  Continue? [yes/no]: ")
    for selector in ("7", "nosuch"):
        assert cluster.dog("vdi", "rollback", "-f", "-s", selector, "back", check=False).returncode == 1
    zero = cluster.dog("vdi", "rollback", "-f", "-s", "0", "back", check=False)
    assert (zero.returncode, zero.stderr) == (1, b"The snapshot id must be larger than zero\n")
    assert read_all(cluster, "back", node=1) == unchanged

    states = {"s1": read_all(cluster, "back", tag="s1")}
    assert states["s1"] == pattern(1, MiB + 5) + bytes(MiB - 5)
    cluster.dog("vdi", "rollback", "-s", "s1", "back", input=b"yes\n")
    assert read_all(cluster, "back", node=2) == states["s1"]
    for k in (2, 3):
        write(cluster, "back", k * 1000, pattern(k, 5000))
        states[f"s{k}"] = read_all(cluster, "back")
        cluster.dog("vdi", "snapshot", "-s", f"s{k}", "back")
    for tag in ("s3", "s1", "s2"):
        cluster.dog("vdi", "rollback", "-f", "-s", tag, "back")
        assert read_all(cluster, "back", node=1) == states[tag], f"rolled back to {tag}"
        write(cluster, "back", 0, b"scratch")
    for tag, state in states.items():
        assert read_all(cluster, "back", tag=tag) == state, f"snapshot {tag}"
    cluster.dog("vdi", "snapshot", "-s", "s4", "back")
    found = {row[9]: int(row[2]) for row in rows(cluster, "back") if row[0] == "s"}
    assert found["s1"] < found["s2"] < found["s3"] < found["s4"]
    assert b"-+-" in cluster.dog("vdi", "tree").stdout


def test_tree(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """SNAP-7: two names, one with a branch, are drawn as described; a snapshot whose parent is gone becomes a root."""
    cluster = fresh_cluster(1)
    cluster.format()
    cluster.dog("vdi", "create", "plain", "4M")
    cluster.dog("vdi", "create", "split", "4M")
    for tag in ("a", "b"):
        cluster.dog("vdi", "snapshot", "-s", tag, "split")
    cluster.dog("vdi", "rollback", "-f", "-s", "a", "split")
    date = r"\[\d{4}-\d\d-\d\d \d\d:\d\d\]"
    lines = sorted(cluster.dog("vdi", "tree").stdout.decode().splitlines())
    pad = " " * (len("split") + 1 + len("[2026-01-01 00:00]"))
    text = "\n".join(cluster.dog("vdi", "tree").stdout.decode().splitlines())
    assert "plain---(you are here)" in lines
    assert re.search(rf"^split---{date}-\+-{date}\n {pad} +`-\(you are here\)$", text, re.MULTILINE), text

    cluster.dog("vdi", "delete", "-s", "a", "split")
    text = cluster.dog("vdi", "tree").stdout.decode()
    assert re.search(rf"^split---{date}$", text, re.MULTILINE), text
    assert re.search(r"^split---\(you are here\)$", text, re.MULTILINE), text


def test_differential_backup(cluster: SheepCluster) -> None:
    """SNAP-8: streams 1-2, 1-3 and 2-3; restoring 1-2 onto 1 gives snapshot 2, 2-3 onto that or onto 2 gives 3, 1-3
    onto 1 gives 3; each restore adds an untagged snapshot; streams are as large as the changes."""
    cluster.dog("vdi", "create", "saved", "8M")
    contents = {}
    for k, offset in ((1, 0), (2, 3 * MiB + 512), (3, 6 * MiB + 1024)):
        write(cluster, "saved", offset, pattern(k, 64 * KiB))
        cluster.dog("vdi", "snapshot", "-s", f"b{k}", "saved")
        contents[k] = read_all(cluster, "saved", tag=f"b{k}")

    def backup(older: int, newer: int) -> bytes:
        return cluster.dog("vdi", "backup", "-F", f"b{older}", "-s", f"b{newer}", "saved").stdout

    streams = {(older, newer): backup(older, newer) for older, newer in ((1, 2), (1, 3), (2, 3))}
    for (older, newer), stream in streams.items():
        changed = (newer - older) * 64 * KiB
        assert changed <= len(stream) <= changed + 200, f"{older} to {newer}"

    def restore(stream: bytes, selector: str) -> int:
        """The id of the new snapshot."""
        known = {row[2] for row in rows(cluster, "saved") if row[0] == "s"}
        cluster.dog("vdi", "restore", "-s", selector, "saved", input=stream)
        [fresh] = [row for row in rows(cluster, "saved") if row[0] == "s" and row[2] not in known]
        assert fresh[9] == "", "a restored snapshot has no tag"
        return int(fresh[2])

    second = restore(streams[1, 2], "b1")
    assert read_all(cluster, "saved", snap_id=second) == contents[2]
    third = restore(streams[2, 3], str(second))
    assert read_all(cluster, "saved", snap_id=third) == contents[3]
    assert read_all(cluster, "saved", snap_id=restore(streams[1, 3], "b1"), node=1) == contents[3]
    assert read_all(cluster, "saved", snap_id=restore(streams[2, 3], "b2"), node=2) == contents[3]

    before = [row[:3] + row[7:] for row in rows(cluster, "saved") if row[0] == "s"]
    unknown = cluster.dog("vdi", "restore", "-s", "nosuch", "saved", input=streams[1, 2], check=False)
    assert unknown.returncode == 1
    assert unknown.stderr.endswith(b"Snapshot ID 0 or tag nosuch doesn't exist\n")
    garbage = cluster.dog("vdi", "restore", "-s", "b1", "saved", input=b"no backup at all, really", check=False)
    assert (garbage.returncode, garbage.stderr) == (2, b"The backup file is corrupted\n")
    cut = cluster.dog("vdi", "restore", "-s", "b1", "saved", input=streams[1, 3][:5000], check=False)
    assert cut.returncode == 2
    assert b"failed to read backup data" in cut.stderr
    assert [row[:3] + row[7:] for row in rows(cluster, "saved") if row[0] == "s"] == before
    assert read_all(cluster, "saved", tag="b2") == contents[2]
    write(cluster, "saved", 0, b"the name still has a working vdi")


def test_snapshot_of_nothing_new(cluster: SheepCluster) -> None:
    """SNAP-9: ``snapshot -R`` does nothing while the working vdi owns nothing, and works after one write."""
    cluster.dog("vdi", "create", "reduce", "2M")
    skipped = cluster.dog("vdi", "snapshot", "-R", "-v", "-s", "one", "reduce")
    assert skipped.stderr == b"VDI reduce doesn't have its own objects, skipping creation of snapshot\n"
    assert len(rows(cluster, "reduce")) == 1
    write(cluster, "reduce", 0, b"x")
    cluster.dog("vdi", "snapshot", "-R", "-s", "one", "reduce")
    assert len(rows(cluster, "reduce")) == 2


def test_snapshot_of_a_hyper_volume(cluster: SheepCluster) -> None:
    """SNAP-11: refused with its message."""
    cluster.dog("vdi", "create", "-y", "hyper", "5T")
    refused = cluster.dog("vdi", "snapshot", "-s", "s", "hyper", check=False)
    assert (refused.returncode, refused.stderr) == (1, b"creating a snapshot of hypervolume is not supported\n")


def test_snapshots_survive_a_restart(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """SNAP-12, VDI-7: after shutdown and restart all snapshots, copies and contents are there."""
    cluster = fresh_cluster(3, copies=2)
    cluster.format()
    cluster.dog("vdi", "create", "-c", "3", "kept", "8M")
    states = {}
    for k in range(2):
        write(cluster, "kept", k * 5 * MiB, pattern(k, MiB))
        cluster.dog("vdi", "snapshot", "-s", f"s{k}", "kept")
        states[f"s{k}"] = read_all(cluster, "kept", tag=f"s{k}")
    write(cluster, "kept", 100, b"head")
    states[""] = read_all(cluster, "kept")
    listed = rows(cluster)
    cluster.dog("cluster", "shutdown")
    for sheep in cluster.sheep:
        assert sheep.process is not None
        assert sheep.process.wait(30) == 0
    for index in NODES:
        cluster.restart(index, wait=False)
    cluster.wait_members()
    assert cluster.epoch(0) == 1, "a restart of everybody is no change of membership"
    for node in NODES:
        assert rows(cluster, node=node) == listed
        for tag, state in states.items():
            assert read_all(cluster, "kept", node=node, tag=tag) == state
    assert header_of(cluster, "kept").nr_copies == 3
    vids = [vid_of_name(cluster, "kept", tag=tag) for tag in states]
    assert set(stored(cluster, only(vids)).values()) == {3}
    with volume(cluster, "kept", node=1) as opened:
        opened.write(0, b"goes on")
