"""Weights of nodes (behaviours VN-1 to VN-9): automatic and fixed numbers of vnodes, and changes of both."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import loop_disk
import pytest
from recovery_scenes import MiB, all_agree, exited, fill, in_place, nodes, same_everywhere, shards, wait_status

from sheepdog.testing.cluster import SheepCluster, wait_until
from sheepdog.testing.services import missing_service

pytestmark = [pytest.mark.processes, pytest.mark.matrix, pytest.mark.timeout(120)]

Start = Callable[..., SheepCluster]


def vnodes(cluster: SheepCluster, index: int) -> list[int]:
    """The numbers of vnodes, in the order of the sheep."""
    by_port = {node.id.port: node.vnodes for node in nodes(cluster, index)}
    return [by_port[sheep.port] for sheep in cluster.live]


def by_size(cluster: SheepCluster) -> list[int]:
    """The numbers that follow from the sizes, which every live sheep lists alike with the vnodes."""
    listings = [nodes(cluster, sheep.index) for sheep in cluster.live]
    assert len({tuple((node.id, node.space, node.vnodes) for node in listing) for listing in listings}) == 1
    space = {node.id.port: node.space for node in listings[0]}
    mean = sum(space.values()) / len(space)
    return [round(128 * space[sheep.port] / mean) for sheep in cluster.live]


def test_sizes(fresh_cluster: Start, tmp_path: Path) -> None:
    """File systems of 1:2:4 give vnodes in that ratio, also before the format, and another member of another size
    changes everybody's in its epoch (VN-1, VN-2). A disk is plugged, and a node dies during the reweight and returns
    later: all agree, the copies follow the new weights and nothing is lost (VN-3)."""
    if (lacking := loop_disk.why_not()) is not None:
        missing_service(lacking)
    with ExitStack() as disks:
        unit = 64 * MiB if "SHEEPDOG_TEST_JOURNAL" not in os.environ else 192 * MiB
        for index, size in enumerate((1, 2, 4, 2)):
            disks.enter_context(loop_disk.LoopDisk(tmp_path / f"sheep{index}", size * unit))
        more = disks.enter_context(loop_disk.LoopDisk(tmp_path / "disk0", 4 * unit))
        cluster = fresh_cluster(4, base=tmp_path, copies=2)
        assert vnodes(cluster, 0) == by_size(cluster)
        cluster.format()
        contents = {"a": fill(cluster, "a", 3, size=16 * MiB)}
        cluster.stop(3)
        cluster.wait_recovered()
        three = vnodes(cluster, 1)
        assert three == by_size(cluster)
        assert sum(three) == pytest.approx(3 * 128, abs=2)
        assert [number / three[0] for number in three] == pytest.approx([1, 2, 4], rel=0.2)
        epoch = cluster.epoch(0)
        cluster.restart(3)
        assert vnodes(cluster, 0) == by_size(cluster) != [*three, 128]
        assert cluster.epoch(0) == epoch + 1
        cluster.wait_recovered()

        small = vnodes(cluster, 0)[0]
        cluster.dog("node", "md", "plug", str(more.place / "d"), input=b"yes\n", node=0)
        assert vnodes(cluster, 0)[0] == small
        cluster.dog("cluster", "reweight", node=2)
        cluster.kill(1)
        wait_until(lambda: vnodes(cluster, 2)[0] > 2 * small, "the new weight to be announced")
        in_place(cluster, 2)
        assert vnodes(cluster, 0) == by_size(cluster)
        same_everywhere(cluster, contents)
        cluster.restart(1)
        in_place(cluster, 2)
        assert vnodes(cluster, 1) == by_size(cluster)
        all_agree(cluster)
        same_everywhere(cluster, contents, through=(0, 1))
        for sheep in cluster.live:
            cluster.stop(sheep.index)


def test_fixed(fresh_cluster: Start) -> None:
    """Fixed numbers stay as given, change on line with an epoch each, and objects follow gently; an automatic node and
    an automatic format are refused (VN-4 to VN-9)."""
    cluster = fresh_cluster(3, copies=2, options=("-V", "60"))
    refused = cluster.dog("cluster", "format", "-c", "2", check=False)
    assert refused.returncode != 0
    cluster.format("-V")
    contents = {"a": fill(cluster, "a", 1, size=24 * MiB)}
    assert vnodes(cluster, 1) == [60, 60, 60]
    epoch = cluster.epoch(0)
    for bad in ("0", "65536", "4294967297", "-1", "x", "7x", "+", "-"):
        assert cluster.dog("node", "vnodes", "set", bad, check=False).returncode == 64
    for step, number in enumerate((200, 10), start=1):
        cluster.dog("node", "vnodes", "set", str(number), node=2)
        in_place(cluster, 2)
        assert cluster.epoch(0) == epoch + step
        assert vnodes(cluster, 0) == [60, 60, number]
        same_everywhere(cluster, contents, through=(step,))

    cluster.kill(2)
    cluster.wait_recovered()
    cluster.options = ()
    cluster.restart(2, wait=False)
    assert exited(cluster, 2) != 0
    cluster.wait_members()
    before = sorted(cluster.sheep[2].directory.rglob("*"))
    cluster.options = ("-V", "61")
    cluster.restart(2, wait=False)
    assert exited(cluster, 2) != 0
    assert sorted(cluster.sheep[2].directory.rglob("*")) == before
    cluster.options = ("-V", "10")
    cluster.restart(2)
    in_place(cluster, 2)
    same_everywhere(cluster, contents)


def test_auto(fresh_cluster: Start) -> None:
    """Automatic numbers are there before format and equal in every listing; a reweight with nothing new is harmless;
    fixed numbers are refused (VN-1, VN-2, VN-3, VN-6, VN-8)."""
    cluster = fresh_cluster(3, copies=2)
    assert vnodes(cluster, 0) == vnodes(cluster, 2)
    assert abs(sum(vnodes(cluster, 0)) - 3 * 128) <= 2
    assert cluster.dog("cluster", "format", "-V", "-c", "2", check=False).returncode != 0
    cluster.format()
    contents = {"a": fill(cluster, "a", 2, size=64 * MiB)}
    assert cluster.dog("node", "vnodes", "set", "5", check=False).returncode == 255
    disk = cluster.base / "disk1a"
    disk.mkdir()
    before = vnodes(cluster, 0)
    cluster.dog("node", "md", "plug", str(disk), input=b"yes\n", node=1)
    cluster.wait_recovered()
    assert vnodes(cluster, 0) == before

    cluster.dog("cluster", "reweight")
    wait_until(lambda: vnodes(cluster, 0)[1] > before[1], "the new weight to be announced")
    cluster.wait_recovered()
    assert vnodes(cluster, 2)[0] < before[0]
    in_place(cluster, 2)
    same_everywhere(cluster, contents)
    cluster.dog("cluster", "reweight")
    in_place(cluster, 2)
    same_everywhere(cluster, contents, through=(2,))

    cluster.kill(2)
    cluster.wait_recovered()
    cluster.options = ("-V", "100")
    cluster.restart(2, wait=False)
    assert exited(cluster, 2) != 0
    cluster.options = ()
    cluster.restart(2)
    wait_status(cluster, 0, "running")
    in_place(cluster, 2)
    assert shards(cluster, 2)
