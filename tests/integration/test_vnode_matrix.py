"""Which ways to number vnodes go together: when formatting, joining and starting again (behaviours VN-4 to VN-7)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from recovery_scenes import MiB, exited, fill, nodes, same_everywhere, wait_status

from sheepdog.testing.cluster import SheepCluster

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

Start = Callable[..., SheepCluster]
UNFORMATTED = "Waiting for cluster to be formatted"


def store(directory: Path) -> dict[str, str]:
    """Every file that makes a store, by its content."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and (path.name == "config" or path.parent.name in ("epoch", "obj"))
    }


def counts(cluster: SheepCluster) -> list[int]:
    by_port = {node.id.port: node.vnodes for node in nodes(cluster, 0)}
    return [by_port[sheep.port] for sheep in cluster.sheep]


def test_format_and_restart_matrix(fresh_cluster: Start) -> None:
    """A cluster of both kinds cannot be formatted in either way, one of fixed nodes only as fixed, and a refused format
    leaves everything as it was. After a shutdown another kind or another number is refused with its line in the log,
    and the store is not touched; with the right numbers the cluster runs in the epoch it had."""
    cluster = fresh_cluster(2, options=("-V", "60"))
    cluster.stop(1)
    cluster.options = ()
    cluster.restart(1, wait=False)
    cluster.wait_members()
    for words in ((), ("-V",)):
        refused = cluster.dog("cluster", "format", "-c", "1", *words, check=False)
        assert refused.returncode != 0
        assert refused.stdout + refused.stderr
        wait_status(cluster, 0, UNFORMATTED)
    cluster.stop(1)
    cluster.options = ("-V", "120")
    cluster.restart(1, wait=False)
    cluster.wait_members()
    cluster.dog("cluster", "format", "-V", "-c", "2")
    assert counts(cluster) == [60, 120]
    contents = {"a": fill(cluster, "a", 1, size=4 * MiB)}
    assert cluster.dog("cluster", "format", "-c", "2", "-f", check=False).returncode != 0
    same_everywhere(cluster, contents)
    epoch = cluster.epoch(0)

    cluster.dog("cluster", "shutdown")
    assert [exited(cluster, index) for index in range(2)] == [0, 0]
    before = store(cluster.sheep[0].directory)
    assert {"config", "epoch/00000001"} <= set(before)
    for options, lines in (
        ((), ["Designation of before a restart and a vnodes option is different."]),
        (
            ("-V", "61"),
            [
                "mismatch specified vnodes is compared with the previous. previous vnodes:60",
                "failed to create sheepdog cluster",
            ],
        ),
    ):
        cluster.options = options
        cluster.restart(0, wait=False)
        assert exited(cluster, 0) == 1
        log = cluster.sheep[0].log_tail()
        assert all(line in log for line in lines), log
        assert store(cluster.sheep[0].directory) == before
    for index, number in ((0, "60"), (1, "120")):
        cluster.options = ("-V", number)
        cluster.restart(index, wait=False)
    wait_status(cluster, 0, "running")
    assert cluster.epoch(0) == epoch
    assert counts(cluster) == [60, 120]
    same_everywhere(cluster, contents)
