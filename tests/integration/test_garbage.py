"""Data objects live exactly as long as somebody can read them (behaviours GC-1 to GC-5 and GC-9)."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable

import pytest
from scenes import (
    MiB,
    kinds,
    live_inodes,
    only,
    pattern,
    read,
    read_all,
    referenced,
    stored,
    vid_of_name,
    volume,
    wait_stored,
    write,
)

from sheepdog.client.volume import delete_vdi
from sheepdog.model.ids import data_oid, inode_oid, is_ledger
from sheepdog.model.inode import map_offset
from sheepdog.testing.cluster import HOST, SheepCluster, run_python, wait_until
from sheepdog.wire.opcodes import Op

pytestmark = [pytest.mark.processes, pytest.mark.matrix, pytest.mark.timeout(180)]

COPIES = 2  # of the volumes that are not made as the matrix has it: requests made by hand name their copies


@pytest.fixture(scope="module")
def formatted(start_cluster: Callable[..., SheepCluster]) -> SheepCluster:
    return start_cluster(3, copies=2)


@pytest.fixture
def cluster(formatted: SheepCluster) -> SheepCluster:
    """Three nodes, 2 copies or strips 2:1, objects of 1 MiB, and nothing stored yet."""
    formatted.format("-f", "-z", "20")
    return formatted


def chain(cluster: SheepCluster, name: str, objects: int, rounds: int) -> dict[str, bytes]:
    """A preallocated vdi; in each round a snapshot is taken and object k overwritten. Returns the content behind each
    tag, and behind "" that of the working vdi."""
    cluster.dog("vdi", "create", "-P", name, f"{objects}M")
    content = bytearray(objects * MiB)
    states = {}
    for k in range(rounds):
        states[f"s{k}"] = bytes(content)
        cluster.dog("vdi", "snapshot", "-s", f"s{k}", name)
        data = pattern(k, MiB)
        write(cluster, name, k * MiB, data, node=k % 3)
        content[k * MiB : (k + 1) * MiB] = data
    states[""] = bytes(content)
    return states


def check_remaining(cluster: SheepCluster, name: str, states: dict[str, bytes]) -> None:
    """What is left reads as ever, and exactly what it needs is stored, in the right number of copies."""
    wait_stored(cluster, dict.fromkeys(referenced(live_inodes(cluster)), cluster.shards))
    for tag, content in states.items():
        assert read_all(cluster, name, tag=tag) == content, f"snapshot {tag!r}"


ORDERS = {
    "oldest first": lambda tags: tags,
    "newest first": lambda tags: tags[::-1],
    "random": lambda tags: random.Random(7).sample(tags, len(tags)),
    "working vdi first": lambda tags: ["", *tags[:-1]],
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_chain_of_snapshots_leaves_nothing(cluster: SheepCluster, order: str) -> None:
    """GC-1, GC-2, VDI-10: whatever the order of deletion, after each step exactly the objects that nobody can see any
    more are gone, and after the last one no data and no ledger is left."""
    states = chain(cluster, "chain", 5, 4)
    assert kinds(cluster)["data"] == 5 + 4, "one object more in each round"
    for tag in ORDERS[order]([*states]):
        del states[tag]
        cluster.dog("vdi", "delete", *(("-s", tag) if tag else ()), "chain")
        check_remaining(cluster, "chain", states)
    assert not states
    assert not stored(cluster)
    wait_until(lambda: not stored(cluster, is_ledger), "the ledgers to go")


def test_ledgers_appear_for_shared_objects_only(cluster: SheepCluster) -> None:
    """GC-1: a ledger is stored once one of several references was dropped, and goes with its object."""
    chain(cluster, "chain", 3, 1)
    vid = vid_of_name(cluster, "chain", tag="s0")
    wait_until(lambda: len(stored(cluster, is_ledger)) == 1, "the ledger of the overwritten object")
    assert {oid & (1 << 59) - 1 for oid in stored(cluster, is_ledger)} == {data_oid(vid, 0)}
    cluster.dog("vdi", "delete", "-s", "s0", "chain")
    wait_until(lambda: data_oid(vid, 0) not in stored(cluster), "the object that only the snapshot had")
    assert set(stored(cluster, only([vid]))) == {data_oid(vid, 1), data_oid(vid, 2)}
    cluster.dog("vdi", "delete", "chain")
    wait_until(lambda: not stored(cluster) and not stored(cluster, is_ledger), "everything to go")


def test_a_partial_vdi(cluster: SheepCluster) -> None:
    """GC-3: only object k is written in round k; what later snapshots share survives the deletion of earlier ones."""
    cluster.dog("vdi", "create", "partial", "4M")
    content = bytearray(4 * MiB)
    states = {}
    for k in range(3):
        data = pattern(k, MiB)
        write(cluster, "partial", k * MiB, data)
        content[k * MiB : (k + 1) * MiB] = data
        states[f"s{k}"] = bytes(content)
        cluster.dog("vdi", "snapshot", "-s", f"s{k}", "partial")
    states[""] = bytes(content)
    assert kinds(cluster)["data"] == 3
    for tag in list(states):
        del states[tag]
        cluster.dog("vdi", "delete", *(("-s", tag) if tag else ()), "partial")
        check_remaining(cluster, "partial", states)
        assert kinds(cluster)["data"] == (3 if states else 0)


@pytest.mark.covering
def test_clones(cluster: SheepCluster) -> None:
    """GC-4: a snapshot with two clones, each overwriting the same two of four objects; source, snapshot and clones are
    deleted one after the other, the others stay readable, nothing is left."""
    cluster.dog("vdi", "create", "-P", "source", "4M")
    base = pattern(1, 4 * MiB)
    write(cluster, "source", 0, base)
    cluster.dog("vdi", "snapshot", "-s", "s", "source")
    contents = {}
    for number, name in enumerate(("one", "two")):
        cluster.dog("vdi", "clone", "-s", "s", "source", name)
        data = pattern(10 + number, 2 * MiB)
        write(cluster, name, MiB, data)
        contents[name] = base[:MiB] + data + base[3 * MiB :]
    assert kinds(cluster)["data"] == 4 + 2 + 2

    cluster.dog("vdi", "delete", "source")
    wait_stored(cluster, dict.fromkeys(referenced(live_inodes(cluster)), cluster.shards))
    assert kinds(cluster)["data"] == 8
    assert read_all(cluster, "source", tag="s") == base

    cluster.dog("vdi", "delete", "-s", "s", "source")
    wait_stored(cluster, dict.fromkeys(referenced(live_inodes(cluster)), cluster.shards))
    assert kinds(cluster)["data"] == 2 + 2 + 2, "the clones still share two objects of the snapshot"
    for name, content in contents.items():
        assert read_all(cluster, name) == content

    cluster.dog("vdi", "delete", "one")
    wait_stored(cluster, dict.fromkeys(referenced(live_inodes(cluster)), cluster.shards))
    assert kinds(cluster)["data"] == 4
    assert read_all(cluster, "two") == contents["two"]

    cluster.dog("vdi", "delete", "two")
    wait_stored(cluster, {})
    wait_until(lambda: not stored(cluster, is_ledger), "the ledgers to go")


def test_map_entries_that_stay(cluster: SheepCluster) -> None:
    """A client that writes a range of the map, of which only some entries change, keeps the reference counts of the
    others: what a snapshot shares there survives its copying on write."""
    cluster.dog("vdi", "create", "-c", "2", "v", "2M")
    write(cluster, "v", 0, pattern(1, 2 * MiB))
    cluster.dog("vdi", "snapshot", "-s", "s", "v")
    old, new = vid_of_name(cluster, "v", tag="s"), vid_of_name(cluster, "v")
    with cluster.connect(1) as connection:
        call = connection.request
        data = pattern(2, MiB)
        assert call(Op.CREATE_AND_WRITE_OBJ, oid=data_oid(new, 0), copies=COPIES, body=data).result == 0
        entries = new.to_bytes(4, "little") + old.to_bytes(4, "little")
        assert call(Op.WRITE_OBJ, oid=inode_oid(new), copies=COPIES, offset=map_offset(0), body=entries).result == 0
    write(cluster, "v", MiB, pattern(3, MiB))
    both = {data_oid(vid, index): COPIES for vid in (old, new) for index in (0, 1)}
    wait_stored(cluster, both)
    assert read_all(cluster, "v", tag="s") == pattern(1, 2 * MiB)
    assert read_all(cluster, "v") == pattern(2, MiB) + pattern(3, MiB)
    cluster.dog("vdi", "delete", "-s", "s", "v")
    wait_stored(cluster, {data_oid(new, index): COPIES for index in (0, 1)})
    cluster.dog("vdi", "delete", "v")
    wait_stored(cluster, {})
    wait_stored(cluster, {}, is_ledger)


def test_deletion_by_one_request(cluster: SheepCluster) -> None:
    """A client that deletes without clearing the map before, as QEMU does, leaves nothing: no name that cannot be used
    again and no object; what a snapshot shares stays, and goes with that in the same way."""
    for number in range(2):
        cluster.dog("vdi", "create", "-c", "2", "v", "3M")
        write(cluster, "v", 0, pattern(number, 2 * MiB))
        cluster.dog("vdi", "snapshot", "-s", "s", "v")
        write(cluster, "v", MiB, pattern(9, MiB))
        old = vid_of_name(cluster, "v", tag="s")
        with cluster.connect(number) as connection:
            delete_vdi(connection.request, b"v")
            wait_stored(cluster, {data_oid(old, index): COPIES for index in (0, 1)})
            assert read_all(cluster, "v", tag="s") == pattern(number, 2 * MiB) + bytes(MiB)
            delete_vdi(connection.request, b"v", tag=b"s")
        wait_stored(cluster, {})
        wait_stored(cluster, {}, is_ledger)
        assert cluster.dog("vdi", "list", "-r").stdout == b""


def test_rollback_and_unshared_clones(cluster: SheepCluster) -> None:
    """GC-5: what only the discarded state of a rollback had goes; a clone without sharing has objects of its own, which
    go with it, and holds none of its source's."""
    cluster.dog("vdi", "create", "-c", "2", "v", "3M")
    write(cluster, "v", 0, pattern(1, 2 * MiB))
    cluster.dog("vdi", "snapshot", "-s", "s", "v")
    write(cluster, "v", 0, pattern(2, 3 * MiB))
    old = vid_of_name(cluster, "v", tag="s")
    shared = {data_oid(old, index): COPIES for index in (0, 1)}
    cluster.dog("vdi", "rollback", "-f", "-s", "s", "v")
    wait_stored(cluster, shared)
    cluster.dog("vdi", "clone", "-n", "-s", "s", "v", "free")
    free = vid_of_name(cluster, "free")
    own = {data_oid(free, index): COPIES for index in (0, 1)}
    wait_stored(cluster, shared | own)
    for words in (("-s", "s", "v"), ("v",)):
        cluster.dog("vdi", "delete", *words)
    wait_stored(cluster, own)
    assert read_all(cluster, "free") == pattern(1, 2 * MiB) + bytes(MiB)
    done = cluster.dog("vdi", "alter-copy", "-f", "-c", "1", "free")
    assert done.stderr == b"free's redundancy level is set to 1, the old one was 2.\n"
    wait_stored(cluster, dict.fromkeys(own, 1))
    cluster.dog("vdi", "delete", "free")
    wait_stored(cluster, {})
    wait_stored(cluster, {}, is_ledger)


def test_discard_of_a_shared_object(cluster: SheepCluster) -> None:
    """GC-9: a client that discards an object which a snapshot has too gives up only its own reference."""
    cluster.dog("vdi", "create", "shared", "2M")
    data = pattern(3, 2 * MiB)
    write(cluster, "shared", 0, data)
    cluster.dog("vdi", "snapshot", "-s", "s", "shared")
    with volume(cluster, "shared") as opened:
        opened.discard(0, MiB)
    assert read(cluster, "shared", 0, 2 * MiB) == bytes(MiB) + data[MiB:]
    assert read_all(cluster, "shared", tag="s") == data
    assert kinds(cluster)["data"] == 2
    cluster.dog("vdi", "delete", "-s", "s", "shared")
    wait_until(lambda: kinds(cluster)["data"] == 1, "the discarded object to go with the snapshot")
    assert read(cluster, "shared", 0, 2 * MiB) == bytes(MiB) + data[MiB:]
    cluster.dog("vdi", "delete", "shared")
    wait_stored(cluster, {})


def test_restart_in_the_middle_of_a_deletion(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """GC-6: when every sheep is killed while a volume is deleted in batches, deleting it again completes that."""
    cluster = fresh_cluster(3, driver="local", store="plain", redundancy=str(COPIES))
    cluster.format("-z", "20")
    for name in ("stays", "goes"):
        cluster.dog("vdi", "create", "-P", name, "24M")
        write(cluster, name, 0, pattern(len(name), 24 * MiB))
    vid = vid_of_name(cluster, "goes")
    environment = {**os.environ, "SHEEPDOG_DOG_ADDR": HOST, "SHEEPDOG_DOG_PORT": str(cluster.sheep[0].port)}
    dog = subprocess.Popen(
        run_python("sheepdog_cli.dog", "vdi", "delete", "-B", "1", "-I", "1", "goes"),
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        wait_until(lambda: 0 < len(stored(cluster, only([vid]))) < 24, "some objects to be gone")
        for index in range(3):
            cluster.pause(index)
        for index in range(3):
            cluster.kill(index)
        assert dog.wait(60) != 0
    finally:
        dog.kill()
        dog.wait()
    for index in range(3):
        cluster.restart(index, wait=False)
    cluster.wait_recovered()
    assert stored(cluster, only([vid])), "the deletion was interrupted"

    cluster.dog("vdi", "delete", "goes")

    wait_stored(cluster, dict.fromkeys(referenced(live_inodes(cluster)), COPIES))
    assert not stored(cluster, only([vid]))
    assert read_all(cluster, "stays") == pattern(5, 24 * MiB)
