"""Bytes that change on disk behind a sheep: never served, found, repaired from good ones, or reported (MD-16)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scenes import KiB, MiB, pattern, read, vid_of_name, wait_serving, write

from sheepdog.errors import SheepdogError
from sheepdog.model.ids import data_oid, inode_oid
from sheepdog.testing.cluster import SheepCluster, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., SheepCluster]) -> SheepCluster:
    """Four nodes, 3 copies, objects of 1 MiB."""
    cluster = start_cluster(4, driver="local", store="plain", redundancy="3")
    cluster.format("-z", "20")
    return cluster


def files_of(cluster: SheepCluster, oid: int, strip: int = -1) -> dict[int, Path]:
    """The file at each holder of the object, or of one of its strips."""
    name = f"{oid:016x}" + (f"_{strip}" if strip >= 0 else "")
    return {index: cluster.sheep[index].directory / "obj" / name for index in cluster.census()[oid, strip]}


def flip(path: Path, at: int, *, rot: bool = False) -> bytes:
    """One byte of the file changes; returns what it was as a whole.

    :param rot: as a disk does it, which leaves the time of the last change alone.
    """
    before, status = path.read_bytes(), path.stat()
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes([before[at] ^ 0x40]))
    if rot:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return before


def status(cluster: SheepCluster, node: int) -> dict[str, Any]:  # Any: a JSON document
    found: dict[str, Any] = json.loads(cluster.dog("node", "scrub", "status", "--json", node=node).stdout)
    return found


def scrub(cluster: SheepCluster) -> list[dict[str, Any]]:  # Any: JSON documents
    """All nodes look at everything; what they say afterwards."""
    cluster.dog("node", "scrub", "start", "-A", "-R", "1000")

    def ended() -> bool:
        return not any(entry["running"] or entry["repairing"] for entry in every())

    def every() -> list[dict[str, Any]]:  # Any: JSON documents
        found: list[dict[str, Any]] = json.loads(cluster.dog("node", "scrub", "status", "-A", "--json").stdout)
        return found

    before = {entry["node"]: entry["started"] for entry in every()}
    wait_until(lambda: all(entry["started"] for entry in every()), "the scrub begins")
    wait_until(ended, "the scrub ends")
    assert set(before) == {entry["node"] for entry in every()}
    return every()


def disk(cluster: SheepCluster, name: str, seed: int, size: int = 3 * MiB) -> tuple[bytes, list[int]]:
    """A volume with content; its data objects."""
    cluster.dog("vdi", "create", name, f"{size // MiB}M")
    content = pattern(seed, size)
    write(cluster, name, 0, content)
    vid = vid_of_name(cluster, name)
    return content, [data_oid(vid, index) for index in range(size // MiB)]


def test_read_of_a_flipped_byte(cluster: SheepCluster) -> None:
    """Whoever is asked, a client gets the right bytes, and the wrong ones are replaced at once."""
    content, oids = disk(cluster, "flipped", 1)
    for oid, index in zip(oids, (0, 1, 2), strict=True):
        holder, path = list(files_of(cluster, oid).items())[index]
        before = flip(path, 70_000)
        found = status(cluster, holder)["found"]

        for node in range(4):
            assert read(cluster, "flipped", 0, len(content), node=node) == content

        wait_until(lambda path=path, before=before: path.read_bytes() == before, "the copy is repaired")
        wait_until(lambda holder=holder: not status(cluster, holder)["repairing"], "the repair ends")
        assert status(cluster, holder)["found"] == found + 1
        assert f"oid={oid:016x} is corrupt" in cluster.sheep[holder].log_tail(1 << 20)


def test_small_reads_and_truncation(cluster: SheepCluster) -> None:
    """A few bytes are compared as well, and a file that was cut short is not read as zeros."""
    content, oids = disk(cluster, "short", 2)
    for path in list(files_of(cluster, oids[0]).values())[:2]:
        flip(path, 5000)
    for path in list(files_of(cluster, oids[1]).values())[:2]:
        with path.open("r+b") as file:
            file.truncate(100 * KiB)

    for node in range(4):
        assert read(cluster, "short", 4999, 3, node=node) == content[4999:5002]
        assert read(cluster, "short", MiB + 200 * KiB, 512, node=node) == content[MiB + 200 * KiB :][:512]


def test_scrub_repairs(cluster: SheepCluster) -> None:
    """What no client reads is found and repaired by the scrub, in inodes too, and said by status."""
    _, oids = disk(cluster, "rotten", 3)
    paths = [next(iter(files_of(cluster, oid).values())) for oid in oids]
    paths.append(list(files_of(cluster, inode_oid(vid_of_name(cluster, "rotten"))).values())[1])
    before = [flip(path, 4664 + 1000) for path in paths]

    after = scrub(cluster)

    assert [path.read_bytes() for path in paths] == before
    assert sum(entry["found"] for entry in after) >= 4
    assert sum(entry["repaired"] for entry in after) >= 4
    assert not any(entry["unrepairable"] for entry in after)
    text = cluster.dog("node", "scrub").stdout.decode()
    assert "State:          idle" in text, text
    assert "Unrepairable:   0" in text, text
    raw = cluster.dog("node", "scrub", "status", "-r").stdout.decode().splitlines()
    assert "state idle" in raw, raw


def test_all_copies_corrupt(cluster: SheepCluster) -> None:
    """Where no good copy is left that is said, clients get an error, and everything is kept for whoever can do more."""
    content, oids = disk(cluster, "lost", 4)
    files = files_of(cluster, oids[1])
    before = [flip(path, 123_456) for path in files.values()]
    flipped = [path.read_bytes() for path in files.values()]

    with pytest.raises(SheepdogError):
        read(cluster, "lost", MiB, MiB)
    after = scrub(cluster)

    bad = {entry["node"]: entry["unrepairable"] for entry in after if entry["unrepairable"]}
    assert len(bad) == 3, bad
    assert all(
        rows == [[f"{oids[1]:016x}", -1, "the block at 122880 differs from its checksum"]] for rows in bad.values()
    )
    assert f"  {oids[1]:016x}: the block" in cluster.dog("node", "scrub", node=next(iter(files))).stdout.decode()
    assert [path.read_bytes() for path in files.values()] == flipped
    assert read(cluster, "lost", 0, MiB) == content[:MiB]
    checked = cluster.dog("vdi", "check", "lost", check=False)
    assert f"no good copy of {oids[1]:016x}".encode() in checked.stderr
    assert [path.read_bytes() for path in files.values()] == flipped

    # One good copy from somewhere mends all.
    next(iter(files.values())).write_bytes(before[0])
    after = scrub(cluster)

    assert not any(entry["unrepairable"] for entry in after)
    assert [path.read_bytes() for path in files.values()] == before
    assert read(cluster, "lost", 0, len(content)) == content


def test_check_repairs(cluster: SheepCluster) -> None:
    """MD-16: ``vdi check`` repairs two corrupt copies from one good one, though they are the majority."""
    content, oids = disk(cluster, "checked", 5)
    files = list(files_of(cluster, oids[0]).values())
    before = [flip(path, 999) for path in files[:2]]

    checked = cluster.dog("vdi", "check", "checked")

    assert f"fixed replica {oids[0]:016x}" in checked.stdout.decode()  # the other one perhaps by the scrub already
    assert [path.read_bytes() for path in files[:2]] == before
    assert read(cluster, "checked", 0, len(content)) == content


def test_rate_and_stop(cluster: SheepCluster) -> None:
    """A pass keeps to its rate, can be stopped, and goes on where it was."""
    disk(cluster, "slow", 6, 12 * MiB)
    cluster.dog("node", "scrub", "start", "-R", "1")
    wait_until(lambda: status(cluster, 0)["bytes"] > 0, "something is read")
    assert status(cluster, 0)["rate"] == 1_000_000
    cluster.dog("node", "scrub", "stop")
    wait_until(lambda: not status(cluster, 0)["running"], "the pass stops")
    stopped = status(cluster, 0)
    assert stopped["stopped"]
    started = stopped["started"]

    cluster.dog("node", "scrub", "start", "--rate", "1000")
    wait_until(lambda: not status(cluster, 0)["stopped"] and not status(cluster, 0)["running"], "it goes on and ends")

    assert status(cluster, 0)["started"] == started
    assert status(cluster, 0)["done"] > stopped["done"]
    bad = cluster.dog("node", "scrub", "start", "-R", "0", check=False)
    assert (bad.returncode, b"Invalid rate" in bad.stderr) == (64, True)


def test_recovery_takes_the_good_copy(cluster: SheepCluster) -> None:
    """A corrupt copy is no source: a node that gets the object anew gets the right bytes, whoever leads."""
    content, oids = disk(cluster, "moved", 7)
    spoilt = {oid: next(iter(files_of(cluster, oid).values())) for oid in oids}
    for path in spoilt.values():
        flip(path, 300_000)
    gone = 3

    cluster.stop(gone)
    cluster.wait_members()
    cluster.wait_recovered()

    for number, oid in enumerate(oids):
        files = files_of(cluster, oid)
        files.pop(gone, None)  # its disk still has what was there when it stopped
        good = content[number * MiB :][:MiB]
        assert len(files) == 3
        assert all(path.read_bytes() == good for path in files.values() if path != spoilt[oid])
    scrub(cluster)
    for number, oid in enumerate(oids):
        files = files_of(cluster, oid)
        files.pop(gone, None)
        assert all(path.read_bytes() == content[number * MiB :][:MiB] for path in files.values())
    cluster.restart(gone)
    cluster.wait_members()
    cluster.wait_recovered()
    assert read(cluster, "moved", 0, len(content), node=gone) == content


def test_damage_while_down(cluster: SheepCluster) -> None:
    """Checksums outlast a shutdown. What was edited meanwhile is taken as it is, and a store without any checksums, as
    the original leaves it, is compared, and gets them."""
    content, oids = disk(cluster, "down", 8)
    files = [list(files_of(cluster, oid).values()) for oid in oids]
    cluster.dog("cluster", "shutdown")
    for sheep in cluster.sheep:
        assert sheep.process is not None
        sheep.process.wait(30)
    before = [flip(files[0][0], 10, rot=True), flip(files[0][1], 10, rot=True)]
    for path in files[2]:
        flip(path, 20)
    edited = files[2][0].read_bytes()
    content = content[: 2 * MiB] + edited
    cluster_start(cluster)

    for node in range(4):
        assert read(cluster, "down", 0, len(content), node=node) == content
    wait_until(lambda: [path.read_bytes() for path in files[0][:2]] == before, "both copies are repaired")
    scrub(cluster)
    assert [path.read_bytes() for path in files[2]] == [edited] * 3
    found = [status(cluster, node)["found"] for node in range(4)]
    flip(files[2][1], 30)
    for node in range(4):
        assert read(cluster, "down", 0, len(content), node=node) == content
    wait_until(lambda: files[2][1].read_bytes() == edited, "what was edited has checksums of its own by now")
    assert [status(cluster, node)["found"] for node in range(4)] != found

    cluster.dog("cluster", "shutdown")
    for sheep in cluster.sheep:
        assert sheep.process is not None
        sheep.process.wait(30)
        shutil.rmtree(sheep.directory / "sums")
    unknown = flip(files[1][0], 10)
    cluster_start(cluster)
    scrub(cluster)

    assert files[1][0].read_bytes() == unknown
    flip(files[2][0], 10)
    for node in range(4):
        assert read(cluster, "down", 0, len(content), node=node) == content


def cluster_start(cluster: SheepCluster) -> None:
    for sheep in cluster.sheep:
        cluster.restart(sheep.index, wait=False)
    cluster.wait_members()
    for sheep in cluster.sheep:
        wait_serving(cluster, sheep.index)
    cluster.wait_recovered()


def test_strips(start_cluster: Callable[..., SheepCluster]) -> None:
    """EC-7 with checksums: a flipped byte of a strip is read around, and the strip rebuilt; two of 2:1 are reported."""
    cluster = start_cluster(3, driver="local", store="tree", redundancy="2:1")
    cluster.format("-z", "20")
    content, oids = disk(cluster, "strips", 9)
    paths = {
        (oid, strip): next(
            path for sheep in cluster.sheep for path in (sheep.directory / "obj").glob(f"??/{oid:016x}_{strip}")
        )
        for oid in oids
        for strip in range(3)
    }
    before = {(oids[at], at): flip(paths[oids[at], at], 50_000) for at in range(3)}

    for node in range(3):
        assert read(cluster, "strips", 0, len(content), node=node) == content
    write(cluster, "strips", 99_000, b"new")
    content = content[:99_000] + b"new" + content[99_003:]
    after = scrub(cluster)

    assert not any(entry["unrepairable"] for entry in after)
    assert all(paths[at].read_bytes() == before[at] for at in before if at[0] != oids[0])
    assert cluster.dog("vdi", "check", "strips").returncode == 0
    for node in range(3):
        assert read(cluster, "strips", 0, len(content), node=node) == content
    lost = {strip: flip(paths[oids[2], strip], 7) for strip in (0, 1)}
    after = scrub(cluster)
    bad = [row for entry in after for row in entry["unrepairable"]]
    assert sorted((row[0], row[1]) for row in bad) == [(f"{oids[2]:016x}", 0), (f"{oids[2]:016x}", 1)]
    with pytest.raises(SheepdogError):
        read(cluster, "strips", 2 * MiB, MiB)
    paths[oids[2], 0].write_bytes(lost[0])
    scrub(cluster)
    assert paths[oids[2], 1].read_bytes() == lost[1]
    assert read(cluster, "strips", 0, len(content)) == content


def test_all_killed(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """After ``kill -9`` of all holders no copy is known. They are compared soon, without a pass: one that went bad
    becomes as the others, and what goes bad from then on is noticed."""
    cluster = fresh_cluster(
        3, driver="local", store="plain", redundancy="3", options=("--scrub", "interval=10,rate=1000")
    )
    cluster.format("-z", "20")
    content, oids = disk(cluster, "killed", 10)
    for sheep in cluster.sheep:
        cluster.kill(sheep.index)
    first, second = (files_of(cluster, oid)[0] for oid in oids[:2])
    before = flip(first, 40_000)
    cluster_start(cluster)

    for sheep in cluster.sheep:
        wait_until(lambda sheep=sheep: " have no checksums" in sheep.log_tail(1 << 20), "it looks for unknown copies")
        wait_until(lambda sheep=sheep: not status(cluster, sheep.index)["unknown"], "they were compared")
    assert first.read_bytes() == before
    assert [status(cluster, node)["started"] for node in range(3)] == [0, 0, 0], "no pass has begun"
    before = flip(second, 7)
    for node in range(3):
        assert read(cluster, "killed", 0, len(content), node=node) == content
    wait_until(lambda: second.read_bytes() == before, "the copy is repaired")
