"""Disks of one node come, go and fail (behaviours MD-1 to MD-15)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from recovery_scenes import MiB, exited, fill, same_everywhere, shards
from scenes import pattern, write

from sheepdog.model.ids import is_data
from sheepdog.testing.cluster import SheepCluster, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.matrix, pytest.mark.timeout(120)]

Start = Callable[..., SheepCluster]


@pytest.fixture(scope="module")
def cluster(start_cluster: Start) -> SheepCluster:
    """Three sheep, 2 copies or strips 2:1."""
    cluster = start_cluster(3, copies=2, disks=())
    cluster.format()
    return cluster


def disk(cluster: SheepCluster, name: str) -> str:
    """A directory with something in it that plugging must erase."""
    path = cluster.base / name
    path.mkdir()
    (path / "leftover").write_bytes(b"x")
    return str(path)


def paths(cluster: SheepCluster, index: int) -> list[str]:
    """The disks of one sheep as ``dog node md info`` lists them."""
    text = cluster.dog("node", "md", "info", node=index).stdout.decode()
    return [line.split("\t")[-1] for line in text.splitlines()[1:]]


def complete(cluster: SheepCluster, contents: dict[str, bytes]) -> None:
    """All copies are there and equal, or all strips, and belong together."""
    cluster.wait_recovered()
    same_everywhere(cluster, contents)
    if len(cluster.live) < cluster.shards and cluster.needed > 1:
        return  # dog checks strips only where each has a zone
    for name in contents:
        wait_until(partial(clean, cluster, name), "a clean check")


def clean(cluster: SheepCluster, name: str) -> bool:
    """``dog vdi check`` finds nothing to do."""
    return cluster.dog("vdi", "check", name).stdout == f"finish check&repair {name}\n".encode()


def spread(cluster: SheepCluster, prefix: str, index: int, disks: list[str]) -> dict[str, bytes]:
    """Volumes of 24 MiB, as many as it takes until each of these disks of a sheep holds some of their data.

    Where objects lie depends on the paths of the disks, which differ in each run.
    """
    contents: dict[str, bytes] = {}
    before = set(shards(cluster, index).values())
    for number in range(40):
        name = f"{prefix}-{number}"
        contents[name] = fill(cluster, name, number, size=24 * MiB)
        cluster.wait_recovered()
        held = [path for (oid, _), path in shards(cluster, index).items() if is_data(oid) and path not in before]
        if all(any(path.startswith(f"{disk}/") for path in held) for disk in disks):
            return contents
    raise AssertionError(f"there are disks without data of 40 volumes: {disks}")


def rewrite(cluster: SheepCluster, contents: dict[str, bytes], seed: int, node: int = 0) -> None:
    """Every block of these volumes has other contents."""
    for number, name in enumerate(contents):
        contents[name] = pattern(seed + number, len(contents[name]))
        write(cluster, name, 0, contents[name], node=node)


def test_plug_and_unplug(cluster: SheepCluster) -> None:
    """Plugged directories are emptied and take their share, unplugged ones give it back; neither makes an epoch; wrong
    paths change nothing; slashes at the end do not matter (MD-1, MD-2, MD-9, MD-10, MD-11)."""
    contents = {"md9": fill(cluster, "md9", 9, size=40 * MiB)}
    epoch = cluster.epoch(0)
    one, two = disk(cluster, "disk0a"), disk(cluster, "disk0b")
    own = str(cluster.sheep[0].directory / "obj")
    cluster.dog("node", "md", "plug", f"{one}/,{two}//", input=b"yes\n", node=0)
    assert paths(cluster, 0) == sorted([own, one, two])
    assert not Path(one, "leftover").exists()
    cluster.wait_recovered()
    complete(cluster, contents)
    contents |= spread(cluster, "md10", 0, [one, two])
    length = 4 * MiB // cluster.needed
    whole = [os.stat(path) for (oid, _), path in shards(cluster, 0).items() if is_data(oid)]
    assert all(status.st_size == length and status.st_blocks * 512 >= length for status in whole)

    assert cluster.dog("node", "md", "plug", one, input=b"yes\n", node=0, check=False).returncode != 0
    assert (
        cluster.dog(
            "node", "md", "unplug", str(cluster.base / "nowhere"), input=b"yes\n", node=0, check=False
        ).returncode
        != 0
    )
    cluster.dog("node", "md", "unplug", f"{one}/", input=b"yes\n", node=0)
    assert paths(cluster, 0) == sorted([own, two])
    complete(cluster, contents)
    cluster.dog("node", "md", "unplug", two, input=b"yes\n", node=0)
    complete(cluster, contents)
    assert cluster.epoch(0) == epoch


def test_failing_disks(cluster: SheepCluster) -> None:
    """Disks that vanish, also two at once, are taken out at the next I/O; the node stays and its copies are rebuilt
    (MD-3, MD-5, MD-7)."""
    extra = [disk(cluster, f"disk1{letter}") for letter in "abc"]
    cluster.dog("node", "md", "plug", ",".join(extra), input=b"yes\n", node=1)
    contents = spread(cluster, "md3", 1, extra)
    complete(cluster, contents)
    epoch = cluster.epoch(0)
    shutil.rmtree(extra[0])
    rewrite(cluster, contents, 33)
    complete(cluster, contents)
    assert extra[0] not in paths(cluster, 1)

    for path in extra[1:]:
        shutil.rmtree(path)
    rewrite(cluster, contents, 133, node=1)
    complete(cluster, contents)
    assert paths(cluster, 1) == [str(cluster.sheep[1].directory / "obj")]
    assert cluster.epoch(0) == epoch


def test_disk_that_fails_unnoticed(cluster: SheepCluster) -> None:
    """A disk that vanishes while nobody touches it holds no recovery of others up: it is taken out when they ask what
    is there (MD-7)."""
    idle = disk(cluster, "disk1idle")
    cluster.dog("node", "md", "plug", idle, input=b"yes\n", node=1)
    cluster.wait_recovered()
    shutil.rmtree(idle)
    other = disk(cluster, "disk2other")
    cluster.dog("node", "md", "plug", other, input=b"yes\n", node=2)
    cluster.wait_recovered()
    assert idle not in paths(cluster, 1)
    cluster.dog("node", "md", "unplug", other, input=b"yes\n", node=2)
    cluster.wait_recovered()


def test_fewer_disks_after_a_restart(cluster: SheepCluster) -> None:
    """A sheep that starts without a disk that it had gets the missing copies from the others (MD-12)."""
    contents = {"md12": fill(cluster, "md12", 12, size=24 * MiB)}
    cluster.dog("node", "md", "plug", disk(cluster, "disk2a"), input=b"yes\n", node=2)
    complete(cluster, contents)
    cluster.kill(2)
    cluster.wait_recovered()
    shutil.rmtree(cluster.base / "disk2a")
    cluster.restart(2)

    complete(cluster, contents)


def test_last_disk(cluster: SheepCluster) -> None:
    """When its last disk fails the node leaves in order, and no client of another node notices (MD-4, MD-6, MD-15)."""
    obj = cluster.sheep[2].directory / "obj"
    contents = spread(cluster, "md4", 2, [str(obj)])
    epoch = cluster.epoch(0)
    shutil.rmtree(obj)
    rewrite(cluster, contents, 44)

    assert exited(cluster, 2) == 0
    assert "no disks available, going down" in cluster.sheep[2].log_tail()
    cluster.wait_recovered()
    assert cluster.epoch(0) == epoch + 1
    complete(cluster, contents)
    cluster.dog("vdi", "create", "later", "4M")
    cluster.restart(2)
    complete(cluster, contents)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with 64 MiB of space, besides what the journals of two sheep take."""
    size = "192m" if os.environ.get("SHEEPDOG_TEST_JOURNAL") else "64m"
    place = tmp_path / "small"
    place.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        os.setxattr(place, "user.probe", b"")
    except OSError:
        subprocess.run(["umount", "-l", str(place)], check=False)
        pytest.skip("tmpfs has no user attributes here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=False)


def test_full_disk(fresh_cluster: Start, small_disk: Path) -> None:
    """A full disk refuses new objects with a clear message; the node stays, data stays readable, and after space is
    freed writes succeed (MD-13)."""
    cluster = fresh_cluster(2, base=small_disk / "base", disks=())
    cluster.format()
    contents = {"a": fill(cluster, "a", 13, size=12 * MiB)}
    cluster.dog("vdi", "create", "b", "64M")
    failed = cluster.dog("vdi", "write", "b", "0", str(64 * MiB), input=pattern(1, 64 * MiB), check=False)
    assert failed.returncode != 0
    assert b"Server has no space for new objects" in failed.stdout + failed.stderr
    assert len(cluster.live) == 2 and len(cluster.members(0)) == 2
    same_everywhere(cluster, contents)

    cluster.dog("vdi", "delete", "b")

    def creatable() -> bool:
        return cluster.dog("vdi", "create", "c", "4M", check=False).returncode == 0

    wait_until(creatable, "space to be free")
    fresh = pattern(3, 4 * MiB)
    write(cluster, "c", 0, fresh)
    same_everywhere(cluster, {**contents, "c": fresh})


def weigh(directory: Path, size: int) -> None:
    """A disk that is used for the first time later counts as one of that size."""
    directory.mkdir(parents=True, exist_ok=True)
    os.setxattr(directory, "user.md.size", size.to_bytes(8, "little"))


def test_no_recovery_that_would_overfill(fresh_cluster: Start) -> None:
    """Formatted with -F, the cluster does not rebuild what the nodes that are left have no space for; everything can be
    read and written, and when a node joins again all copies are made (MD-14)."""
    cluster = fresh_cluster(3, disks=())
    for index in range(3):
        cluster.kill(index)
        shutil.rmtree(cluster.sheep[index].directory)
        weigh(cluster.sheep[index].directory / "obj", 29 * MiB)
    for index in range(3):
        cluster.restart(index, wait=False)
    cluster.wait_members()
    cluster.dog("cluster", "format", "-c", "2", "-z", "20", "-F")
    content = bytearray(fill(cluster, "f", 14, size=30 * MiB))
    before = copies_by_object(cluster, (0, 1))
    assert any(len(holders) == 1 for holders in before.values())
    cluster.kill(2)
    cluster.wait_recovered()

    assert "recovery is not started" in cluster.sheep[0].log_tail() + cluster.sheep[1].log_tail()
    same_everywhere(cluster, {"f": bytes(content)})
    content[: 2 * MiB] = pattern(15, 2 * MiB)
    write(cluster, "f", 0, bytes(content[: 2 * MiB]))
    after = copies_by_object(cluster, (0, 1))
    assert any(len(holders) == 1 for holders in after.values())
    cluster.restart(2)
    complete(cluster, {"f": bytes(content)})
    assert all(len(holders) == 2 for holders in copies_by_object(cluster, (0, 1, 2)).values())


def copies_by_object(cluster: SheepCluster, members: tuple[int, ...]) -> dict[int, set[int]]:
    """Which of these sheep have each data object."""
    found: dict[int, set[int]] = {}
    for index in members:
        for oid, _ in shards(cluster, index):
            if is_data(oid):
                found.setdefault(oid, set()).add(index)
    return found


def test_bigger_disk_lost_with_strips(fresh_cluster: Start) -> None:
    """A node of an erasure-coded cluster that loses the bigger of its two disks costs nobody a read, before and after
    its strips are rebuilt on the smaller one (MD-8)."""
    cluster = fresh_cluster(4, redundancy="2:1", disks=())
    cluster.dog("cluster", "format", "-c", "2:1")
    big = cluster.base / "disk1big"
    weigh(big, 1 << 40)
    cluster.dog("node", "md", "plug", str(big), input=b"yes\n", node=1)
    content = fill(cluster, "md8", 8, size=24 * MiB)
    cluster.wait_recovered()
    own, lost = str(cluster.sheep[1].directory), str(big)
    assert [path for path in shards(cluster, 1).values() if path.startswith(lost)]

    shutil.rmtree(big)
    same_everywhere(cluster, {"md8": content})
    complete(cluster, {"md8": content})
    assert paths(cluster, 1) == [f"{own}/obj"]
    assert [path for (oid, _), path in shards(cluster, 1).items() if is_data(oid)]
