"""Gateways and zones (behaviours GW-1 to GW-4, ZONE-1 to ZONE-4)."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from recovery_scenes import MiB, exited, fill, in_place, nodes, same_everywhere, shards
from scenes import most_may_die, read_all, write

from sheepdog.model.ids import is_data
from sheepdog.testing.cluster import SheepCluster

pytestmark = [pytest.mark.processes, pytest.mark.matrix, pytest.mark.timeout(120)]

Start = Callable[..., SheepCluster]


@pytest.fixture
def fresh_cluster(fresh_cluster: Start) -> Start:
    """In these scenes most sheep die."""
    return most_may_die(fresh_cluster)


def test_gateways(fresh_cluster: Start) -> None:
    """A gateway holds nothing and serves everything; it comes and goes as any node; without storage nodes it ends
    (GW-1, GW-3, GW-4)."""
    cluster = fresh_cluster(3, gateways=1)
    cluster.format()
    contents = {"a": fill(cluster, "a", 1, size=8 * MiB, node=2)}
    assert [node.vnodes > 0 for node in sorted(nodes(cluster, 2), key=lambda n: n.zone)] == [True, True, False]
    cluster.kill(2)
    cluster.wait_recovered()
    cluster.restart(2)
    cluster.wait_recovered()
    assert cluster.epoch(0) == 3
    assert not shards(cluster, 2)
    same_everywhere(cluster, contents)

    cluster.dog("cluster", "shutdown")
    for index in range(3):
        exited(cluster, index)
    for index in (2, 0, 1):
        cluster.restart(index, wait=False)
    cluster.wait_recovered()
    same_everywhere(cluster, contents, through=(2,))
    cluster.kill(0)
    cluster.wait_recovered()
    cluster.kill(1)
    assert exited(cluster, 2) == 0
    assert "only gateway nodes are remaining, exiting" in cluster.sheep[2].log_tail()


def test_only_gateways(fresh_cluster: Start) -> None:
    """A cluster of gateways can be formatted but stores nothing (GW-2)."""
    cluster = fresh_cluster(1, gateways=1)
    cluster.dog("cluster", "format", "-c", "1", input=b"yes\n")

    failed = cluster.dog("vdi", "create", "x", "4M", check=False)

    assert failed.returncode == 1
    assert b"Failed to create VDI x: Failed to write to requested VDI" in failed.stdout + failed.stderr


def test_one_copy_per_zone(fresh_cluster: Start) -> None:
    """No two copies are in one zone, whatever the number of copies; a new zone takes its share (ZONE-1 to ZONE-3)."""
    cluster = fresh_cluster(4, zones=(7, 7, 8, 9), redundancy="2")
    cluster.stop(3)
    cluster.wait_members()
    cluster.format()
    contents = {"a": fill(cluster, "a", 1, size=24 * MiB)}
    data = [{oid for oid, _ in shards(cluster, index) if is_data(oid)} for index in range(3)]
    assert data[2] == data[0] | data[1] and not data[0] & data[1] and len(data[2]) == 6
    cluster.dog("vdi", "create", "-c", "3", "b", "8M", input=b"yes\n")
    write(cluster, "b", 0, contents["a"][: 8 * MiB])

    cluster.restart(3)
    cluster.wait_recovered()

    same_everywhere(cluster, contents)
    assert read_all(cluster, "b", node=3) == contents["a"][: 8 * MiB]
    everything = [{oid for oid, _ in shards(cluster, index) if is_data(oid)} for index in range(4)]
    assert not everything[0] & everything[1]
    assert everything[3]
    assert cluster.dog("vdi", "check", "b").stdout == b"finish check&repair b\n"
    victim = next(path for (oid, _), path in shards(cluster, 3).items() if is_data(oid) and oid not in data[2])
    os.unlink(victim)
    assert b"fixed missing" in cluster.dog("vdi", "check", "b").stdout
    in_place_of_a = {oid: sum(oid in held for held in everything) for oid in data[2]}
    assert set(in_place_of_a.values()) == {2}


def test_nodes_of_one_zone(fresh_cluster: Start) -> None:
    """Nodes of one zone hold a single copy together, and format asks before it promises more (ZONE-4)."""
    cluster = fresh_cluster(2, zones=(5, 5))
    declined = cluster.dog("cluster", "format", "-c", "2", input=b"no\n", check=False)
    assert b"zone" in (declined.stdout + declined.stderr).lower()
    cluster.dog("cluster", "format", "-c", "2", input=b"yes\n")

    fill(cluster, "a", 1, size=8 * MiB)

    in_place(cluster, 1)
