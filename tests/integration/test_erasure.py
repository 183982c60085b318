"""Erasure-coded volumes with real processes (EC-1 to EC-10)."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from scenes import KiB, MiB, pattern, read, read_all, rows, vid_of_name, volume, write

from sheepdog.client.volume import read_object, write_object
from sheepdog.errors import SheepdogError
from sheepdog.model.ids import data_oid, inode_oid, is_attribute, is_data, is_inode, is_vmstate, vmstate_oid
from sheepdog.testing.cluster import SheepCluster, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., SheepCluster]) -> SheepCluster:
    """Six nodes, 4:2 by default; no test changes its membership."""
    cluster = start_cluster(6, driver="local", store="plain", redundancy="4:2", nbd=True)
    cluster.format()
    return cluster


def strips(cluster: SheepCluster, vid: int, kind: Callable[[int], bool] = is_data) -> dict[int, list[int]]:
    """Objects of a vid -> the strip numbers that are on disks."""
    found: dict[int, list[int]] = {}
    for oid, index in cluster.census():
        if kind(oid) and (oid >> 32 & 0xFFFFFF) == vid:
            found.setdefault(oid, []).append(index)
    return {oid: sorted(indexes) for oid, indexes in found.items()}


def strip_file(cluster: SheepCluster, oid: int, index: int) -> Path:
    for sheep in cluster.sheep:
        path = sheep.directory / "obj" / f"{oid:016x}_{index}"
        if path.exists():
            return path
    raise AssertionError(f"no strip {index} of {oid:016x}")


def kill(cluster: SheepCluster, *indexes: int) -> None:
    for index in indexes:
        cluster.sheep[index].signal(signal.SIGKILL)
    for index in indexes:
        cluster.sheep[index].end(signal.SIGKILL)


# ---- EC-1, EC-9: what is stored


@pytest.mark.parametrize("policy", ["2:1", "4:2", "2:4", "4:1"])
def test_strips_on_disk(cluster, policy):
    """EC-1: every accepted D:P stores D+P strips of each object; the inode is replicated."""
    name = f"strips{policy.replace(':', 'x')}"
    total = sum(map(int, policy.split(":")))
    cluster.dog("vdi", "create", "-c", policy, name, "16M")
    write(cluster, name, 100, pattern(1, 5 * MiB))

    vid = vid_of_name(cluster, name)
    assert strips(cluster, vid) == {data_oid(vid, index): list(range(total)) for index in (0, 1)}
    assert strips(cluster, vid, is_inode) == {inode_oid(vid): [-1]}
    assert len(cluster.census()[inode_oid(vid), -1]) == total
    data_strips = int(policy.split(":")[0])
    assert strip_file(cluster, data_oid(vid, 0), total - 1).stat().st_size == 4 * MiB // data_strips
    for node in range(6):
        assert read(cluster, name, 100, 5 * MiB, node=node) == pattern(1, 5 * MiB)


@pytest.mark.parametrize("policy", ["3:1", "4:0", "16:16", "0:2", "4:", "5:3"])
def test_invalid_forms(cluster, policy):
    """EC-1: other forms are refused, with the explanation, and nothing is created."""
    refused = cluster.dog("vdi", "create", "-c", policy, "never", "16M", check=False)

    assert refused.returncode != 0
    text = (refused.stdout + refused.stderr).decode()
    assert "x:y" in text and len(text.strip().splitlines()) >= 6, text
    assert b"never" not in cluster.dog("vdi", "list", "-r").stdout


def test_default_and_mixed(cluster):
    """EC-9: the cluster's default applies to new vdis, beside vdis with a redundancy of their own."""
    cluster.dog("vdi", "create", "default", "8M")
    cluster.dog("vdi", "create", "-c", "3", "copies", "8M")
    for name in ("default", "copies"):
        write(cluster, name, 0, pattern(2, 100_000))

    striped, copied = vid_of_name(cluster, "default"), vid_of_name(cluster, "copies")
    assert strips(cluster, striped) == {data_oid(striped, 0): [0, 1, 2, 3, 4, 5]}
    assert strips(cluster, copied) == {data_oid(copied, 0): [-1]}
    assert len(cluster.census()[data_oid(copied, 0), -1]) == 3
    assert b"4:2" in cluster.dog("cluster", "info", "-v").stdout or b"4:2" in cluster.dog("vdi", "list", "-r").stdout


# ---- EC-6: partial writes


def test_partial_writes(cluster):
    """EC-6: writes inside a strip, across strips, stripes and objects, through all gateways, read back right."""
    cluster.dog("vdi", "create", "partial", "12M")
    dice = random.Random(6)
    content = bytearray(12 * MiB)
    places = [0, 100, 127, 128, 511, 512, 4095, 4 * MiB - 1, 4 * MiB - 300, 8 * MiB - 513]
    for number, place in enumerate(places * 2):
        length = dice.choice((1, 3, 128, 129, 512, 1000, 5000))
        data = dice.randbytes(length)
        write(cluster, "partial", place, data, node=number % 6)
        content[place : place + length] = data

    assert read_all(cluster, "partial", node=3) == content


# ---- EC-7: check


def test_check_rebuilds(cluster):
    """EC-7: a strip that was deleted is rebuilt by ``vdi check``, which says which."""
    cluster.dog("vdi", "create", "lost", "4M")
    write(cluster, "lost", 0, pattern(3, 4 * MiB))
    oid = data_oid(vid_of_name(cluster, "lost"), 0)
    for index in (1, 5):
        path = strip_file(cluster, oid, index)
        before = path.read_bytes()
        path.unlink()

        checked = cluster.dog("vdi", "check", "lost")

        assert f"fixed missing {oid:016x}, copy index {index}".encode() in checked.stdout + checked.stderr
        assert path.read_bytes() == before


def test_check_reports(cluster):
    """EC-7: a byte that flips behind a sheep is put right by its checksum; more than P missing strips are a failure.

    One that was changed while no sheep ran is reported as inconsistent: ``test_dog_check.py``.
    """
    cluster.dog("vdi", "create", "rotten", "8M")
    write(cluster, "rotten", 0, pattern(4, 8 * MiB))
    vid = vid_of_name(cluster, "rotten")
    path = strip_file(cluster, data_oid(vid, 0), 2)
    content = bytearray(path.read_bytes())
    before = bytes(content)
    content[1000] ^= 0x40
    path.write_bytes(content)
    flipped = cluster.dog("vdi", "check", "rotten")
    assert f"fixed corrupt {data_oid(vid, 0):016x}, copy index 2".encode() in flipped.stdout
    assert path.read_bytes() == before

    for index in (0, 1, 2):
        strip_file(cluster, data_oid(vid, 1), index).unlink()
    failed = cluster.dog("vdi", "check", "rotten", check=False)
    text = (failed.stdout + failed.stderr).decode()
    assert "failed" in text.lower(), text
    with volume(cluster, "rotten") as opened, pytest.raises(SheepdogError):
        opened.read(4 * MiB, 4 * MiB)
    assert read(cluster, "rotten", 0, 4 * MiB) == pattern(4, 8 * MiB)[: 4 * MiB]
    cluster.dog("vdi", "delete", "rotten")


# ---- EC-8: everything else that volumes do


def test_snapshots_and_clones(cluster):
    """EC-8: snapshots, clones, rollback, backup and restore of an erasure-coded vdi keep every byte."""
    cluster.dog("vdi", "create", "family", "12M")
    for number in range(3):
        write(cluster, "family", 1000, pattern(10 + number, 5 * MiB), node=number)
        cluster.dog("vdi", "snapshot", "-s", f"t{number}", "family")
    write(cluster, "family", 1000, pattern(13, 300))
    cluster.dog("vdi", "clone", "-s", "t1", "family", "child")
    write(cluster, "child", 2000, pattern(14, 300))

    for number in range(3):
        assert read(cluster, "family", 1000, 5 * MiB, node=5 - number, tag=f"t{number}") == pattern(
            10 + number, 5 * MiB
        )
    assert read(cluster, "family", 1000, 5 * MiB) == pattern(13, 300) + pattern(12, 5 * MiB)[300:]
    child = bytearray(pattern(11, 5 * MiB))
    child[1000:1300] = pattern(14, 300)
    assert read(cluster, "child", 1000, 5 * MiB) == child
    stream = cluster.dog("vdi", "backup", "-F", "t0", "-s", "t2", "family").stdout
    cluster.dog("vdi", "restore", "-s", "t0", "family", input=stream)
    untagged = [int(row[2]) for row in rows(cluster, "family") if row[0] == "s" and row[9] == ""]
    restored = [read(cluster, "family", 1000, 5 * MiB, snap_id=number) for number in untagged]
    assert pattern(12, 5 * MiB) in restored


def test_cluster_snapshot(fresh_cluster, tmp_path):
    """EC-8, EC-9: a cluster snapshot brings back erasure-coded snapshots, with the default of the cluster."""
    cluster = fresh_cluster(3, driver="local", store="plain", redundancy="2:1")
    cluster.format()
    cluster.dog("vdi", "create", "alpha", "8M")
    write(cluster, "alpha", 0, pattern(20, 5 * MiB))
    cluster.dog("vdi", "snapshot", "-s", "t", "alpha")
    cluster.dog("cluster", "snapshot", "save", "all", str(tmp_path / "farm"))
    write(cluster, "alpha", 0, pattern(21, 5 * MiB))
    cluster.dog("cluster", "snapshot", "load", "all", str(tmp_path / "farm"))

    assert read(cluster, "alpha", 0, 5 * MiB, tag="t") == pattern(20, 5 * MiB)
    vid = vid_of_name(cluster, "alpha", tag="t")
    assert strips(cluster, vid)[data_oid(vid, 0)] == [0, 1, 2]


def test_attributes_and_vmstate(cluster):
    """Attributes and VM state of an erasure-coded vdi are stored in strips and read back."""
    cluster.dog("vdi", "create", "state", "4M")
    cluster.dog("vdi", "setattr", "state", "colour", "blue")
    assert cluster.dog("vdi", "getattr", "state", "colour").stdout.strip() == b"blue"
    cluster.dog("vdi", "setattr", "state", "colour", "red")
    assert cluster.dog("vdi", "getattr", "state", "colour", node=4).stdout.strip() == b"red"
    attributes = [index for (oid, index) in cluster.census() if is_attribute(oid)]
    assert sorted(attributes) == [0, 1, 2, 3, 4, 5]

    vid = vid_of_name(cluster, "state")
    with cluster.connect() as connection:
        write_object(connection.request, vmstate_oid(vid, 0), pattern(9, 100_000), copies=6, policy=0x22, create=True)
    with cluster.connect(3) as connection:
        assert bytes(read_object(connection.request, vmstate_oid(vid, 0), 100_000)) == pattern(9, 100_000)
    assert strips(cluster, vid, is_vmstate) == {vmstate_oid(vid, 0): [0, 1, 2, 3, 4, 5]}


def test_nbd(cluster):
    """An erasure-coded vdi through NBD: qemu-io writes odd ranges and verifies them through another sheep."""
    cluster.dog("vdi", "create", "disk", "16M")
    commands = ["write -P 11 0 5M", "write -P 12 1000k 3k", "write -P 13 4095k 2k", "write -P 14 512 512"]
    checks = [
        "read -P 13 4095k 2k",
        "read -P 14 512 512",
        "read -P 11 1k 900k",
        "read -P 12 1000k 3k",
        "read -P 0 6M 9M",
    ]
    for node, lines in ((0, commands), (4, checks)):
        arguments = [word for line in lines for word in ("-c", line)]
        done = subprocess.run(
            ["qemu-io", "-f", "raw", *arguments, cluster.sheep[node].nbd_uri("disk")],
            capture_output=True, timeout=60, check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert b"failed" not in done.stdout + done.stderr


# ---- EC-2 to EC-5: nodes that go and come


def test_losing_nodes(fresh_cluster):
    """EC-2, EC-3, EC-6: 2:1 on four nodes. Reads and partial writes are right while nodes die one by one and return."""
    cluster = fresh_cluster(4, driver="local", store="plain", redundancy="2:1")
    cluster.format()
    cluster.dog("vdi", "create", "alpha", "32M")
    content = bytearray(pattern(30, 24 * MiB))
    write(cluster, "alpha", 0, bytes(content))

    def change(seed: int, node: int) -> None:
        dice = random.Random(seed)
        for place in range(0, 24 * MiB, 4 * MiB):
            at = place + dice.randrange(3 * MiB)
            data = dice.randbytes(700)
            write(cluster, "alpha", at, data, node=node)
            content[at : at + 700] = data

    kill(cluster, 1)
    assert read(cluster, "alpha", 0, 24 * MiB) == content
    change(1, 0)
    cluster.wait_recovered()
    vid = vid_of_name(cluster, "alpha")
    wait_until(lambda: live_strips(cluster, vid) == {0, 1, 2}, "all strips on three nodes")
    assert read(cluster, "alpha", 0, 24 * MiB, node=2) == content

    cluster.restart(1)
    change(2, 3)
    cluster.wait_recovered()
    change(3, 1)
    for node in range(4):
        assert read(cluster, "alpha", 0, 24 * MiB, node=node) == content
    kill(cluster, 3)
    assert read(cluster, "alpha", 0, 24 * MiB, node=1) == content


def live_strips(cluster: SheepCluster, vid: int) -> set[int]:
    """Strip numbers that every object of the vid has on sheep that run; empty while objects differ."""
    found: dict[int, set[int]] = {}
    for (oid, index), places in cluster.census().items():
        if is_data(oid) and (oid >> 32 & 0xFFFFFF) == vid and any(cluster.sheep[n].running for n in places):
            found.setdefault(oid, set()).add(index)
    kinds = {frozenset(indexes) for indexes in found.values()}
    return set(kinds.pop()) if len(kinds) == 1 else set()


def test_below_data_nodes(fresh_cluster):
    """EC-4: 2:1 on three nodes, two die: the cluster runs, reads fail cleanly; both return: the data is equal."""
    cluster = fresh_cluster(3, driver="local", store="plain", redundancy="2:1")
    cluster.format()
    cluster.dog("vdi", "create", "alpha", "32M")
    content = pattern(40, 28 * MiB)
    write(cluster, "alpha", 0, content)

    kill(cluster, 1)
    cluster.wait_members()
    kill(cluster, 2)
    cluster.wait_members()
    assert b"running" in cluster.dog("cluster", "info").stdout
    with volume(cluster, "alpha") as opened, pytest.raises(SheepdogError):
        opened.read(0, 64 * KiB)

    cluster.restart(1)
    cluster.restart(2)
    cluster.wait_recovered()
    for node in range(3):
        assert read(cluster, "alpha", 0, 28 * MiB, node=node) == content


def test_shutdown_and_restart(fresh_cluster):
    """EC-5: three of 14 die with recovery between, the cluster is shut down, all start again: the data is equal."""
    cluster = fresh_cluster(14, driver="local", store="plain", redundancy="8:4", start_s=90)
    cluster.format()
    cluster.dog("vdi", "create", "alpha", "16M")
    content = pattern(50, 12 * MiB)
    write(cluster, "alpha", 0, content)
    for index in (13, 12, 11):
        kill(cluster, index)
        cluster.wait_recovered()
        assert read(cluster, "alpha", 0, 12 * MiB) == content
    cluster.dog("cluster", "shutdown")
    for index in range(11):
        wait_until(lambda index=index: not cluster.sheep[index].running, "the sheep to end")
    for index in range(14):
        cluster.restart(index, wait=False)
    cluster.wait_recovered()

    for node in (0, 5, 13):
        assert read(cluster, "alpha", 0, 12 * MiB, node=node) == content
    cluster.dog("vdi", "create", "beta", "4M")
    write(cluster, "beta", 0, pattern(51, 1000))
    beta = vid_of_name(cluster, "beta")
    assert strips(cluster, beta) == {data_oid(beta, 0): list(range(12))}, "EC-9: the default survives a restart"


def test_strict(fresh_cluster):
    """EC-10: strict mode with erasure coding: too few zones halt writes, reads go on, a returning node lifts it.

    EC-7: too few zones abort a check. Without strict mode writes go on with fewer strips (STR-2).
    """
    cluster = fresh_cluster(4, driver="local", store="plain", redundancy="2:2")
    cluster.format("-t")
    cluster.dog("vdi", "create", "alpha", "8M")
    write(cluster, "alpha", 0, pattern(60, MiB))
    kill(cluster, 3)
    cluster.wait_recovered()
    halted = cluster.dog("vdi", "write", "alpha", "0", "512", input=bytes(512), check=False)
    assert halted.returncode != 0
    assert b"IO has halted as there are not enough living nodes" in halted.stdout + halted.stderr
    assert cluster.dog("vdi", "create", "beta", "8M", check=False).returncode != 0
    assert read(cluster, "alpha", 0, MiB, node=1) == pattern(60, MiB)
    assert cluster.dog("vdi", "check", "alpha", check=False).returncode == 1

    cluster.restart(3)
    write(cluster, "alpha", 0, pattern(61, 1000))
    assert read(cluster, "alpha", 0, MiB, node=2) == pattern(61, 1000) + pattern(60, MiB)[1000:]


def test_killed_at_once(fresh_cluster):
    """All nodes die after partial writes and start again: all that was acknowledged is there, also by parity."""
    cluster = fresh_cluster(3, driver="local", store="plain", redundancy="2:1")
    cluster.format()
    cluster.dog("vdi", "create", "alpha", "4M")
    write(cluster, "alpha", 0, b"\x01" * MiB)
    acknowledged = 0
    for number in range(60):
        write(cluster, "alpha", number * 700, bytes([number % 200 + 2]) * 700, node=number % 3)
        acknowledged += 1
    kill(cluster, 0, 1, 2)
    for index in range(3):
        cluster.restart(index, wait=False)
    cluster.wait_recovered()

    expected = b"".join(bytes([number % 200 + 2]) * 700 for number in range(acknowledged))
    for node in range(3):
        assert read(cluster, "alpha", 0, MiB, node=node) == expected + b"\x01" * (MiB - len(expected))
    kill(cluster, 1)
    assert read(cluster, "alpha", 0, MiB) == expected + b"\x01" * (MiB - len(expected))


def test_killed_at_once_and_a_disk_lost(fresh_cluster):
    """All nodes are killed in the middle of writes and one disk is lost: every stripe has its old or its new content.

    So has an object that is written as a whole, into files beside. The log of strips and these files are there after
    the kill and gone after an orderly end.
    """
    cluster = fresh_cluster(3, driver="local", store="plain", redundancy="2:1")
    cluster.format()
    cluster.dog("vdi", "create", "alpha", "8M")
    place, places = 256, 12  # half a stripe each
    write(cluster, "alpha", 0, bytes(place * places))
    acknowledged = dict.fromkeys(range(places), 0)

    def change(number: int) -> None:
        with suppress(SheepdogError, OSError), volume(cluster, "alpha", node=number % 3) as opened:
            for value in range(1, 100_000):
                opened.write(number * place, bytes([value % 251]) * place)
                acknowledged[number] = value

    whole = [0]  # acknowledged values of the second object

    def change_all() -> None:
        with suppress(SheepdogError, OSError), volume(cluster, "alpha", node=1) as opened:
            for value in range(100_000):
                opened.write(4 * MiB, bytes([value % 251]) * (4 * MiB))
                whole.append(value)

    threads = [threading.Thread(target=change, args=(number,)) for number in range(places)]
    for thread in (*threads, another := threading.Thread(target=change_all)):
        thread.start()
    wait_until(lambda: min(acknowledged.values()) > 10 and whole[-1] > 3, "all writers to be under way")
    kill(cluster, 0, 1, 2)
    for thread in (*threads, another):
        thread.join()
    assert (cluster.sheep[0].directory / "strip_log0").exists()
    assert list((cluster.sheep[0].directory / "obj" / ".stale").glob("spare.*.tmp"))
    shutil.rmtree(cluster.sheep[1].directory / "obj")
    for index in range(3):
        cluster.restart(index, wait=False)
    cluster.wait_recovered()

    for node in range(3):
        content = read(cluster, "alpha", 0, place * places, node=node)
        for number in range(places):
            found = set(content[number * place : (number + 1) * place])
            assert len(found) == 1 and found <= {(acknowledged[number] + more) % 251 for more in (0, 1)}, number
        found = set(read(cluster, "alpha", 4 * MiB, 4 * MiB, node=node))
        assert len(found) == 1 and found <= {(whole[-1] + more) % 251 for more in (0, 1)}
    cluster.dog("cluster", "shutdown")
    for index in range(3):
        wait_until(lambda index=index: not cluster.sheep[index].running, "the sheep to end")
        assert not (cluster.sheep[index].directory / "strip_log0").exists()
        assert not list((cluster.sheep[index].directory / "obj" / ".stale").glob("spare.*"))
