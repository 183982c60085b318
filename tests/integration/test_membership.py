"""Members and epochs (behaviours MEM-1 to MEM-19): what the cluster is after nodes died, came back, and came new."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from recovery_scenes import (
    MiB,
    all_agree,
    exited,
    fill,
    in_place,
    info,
    nodes,
    same_everywhere,
    status,
    wait_status,
    wipe,
)
from scenes import most_may_die

from sheepdog.testing.cluster import SheepCluster, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.matrix, pytest.mark.timeout(150)]

Start = Callable[..., SheepCluster]


@pytest.fixture
def fresh_cluster(fresh_cluster: Start) -> Start:
    """In these scenes most sheep die."""
    return most_may_die(fresh_cluster)


WAITING = "Waiting for other nodes to join cluster"


def epochs(cluster: SheepCluster, index: int) -> list[tuple[int, str]]:
    """(epoch, members) as one sheep tells them, newest first."""
    rows = []
    for line in info(cluster, index).decode().splitlines()[2:]:
        _, epoch, members = line.split(None, 2)
        rows.append((int(epoch), members))
    return rows


def shutdown(cluster: SheepCluster) -> None:
    """``dog cluster shutdown``; every sheep ended in order."""
    live = [sheep.index for sheep in cluster.live]
    cluster.dog("cluster", "shutdown")
    assert [exited(cluster, index) for index in live] == [0] * len(live)


def test_deaths_in_every_order(fresh_cluster: Start) -> None:
    """The oldest dies first, then the others; until the last survivor is back nothing is served; then all is as it was
    (MEM-1, MEM-2, MEM-3, MEM-19)."""
    cluster = fresh_cluster(3, copies=2)
    cluster.format()
    contents = {"a": fill(cluster, "a", 1, size=8 * MiB)}
    for order, back in (((0, 1), (0, 1, 2)), ((2, 1), (1, 2, 0))):
        for index in order:
            cluster.kill(index)
            cluster.wait_recovered()
        survivor = cluster.live[0].index
        history = epochs(cluster, survivor)
        cluster.dog("vdi", "create", f"v{order[0]}", "4M", node=survivor)
        cluster.kill(survivor)

        for index in back:
            cluster.restart(index, wait=False)
            if index != survivor and survivor not in [sheep.index for sheep in cluster.live]:
                wait_status(cluster, index, WAITING)
                listed = cluster.dog("vdi", "list", "-r", node=index, check=False)
                assert listed.returncode != 0 or not listed.stdout
        for index in back:
            wait_status(cluster, index, "running")
        cluster.wait_recovered()
        all_agree(cluster)
        for index in range(3):
            assert epochs(cluster, index)[-len(history) :] == history
        same_everywhere(cluster, contents)
    in_place(cluster, 2)


def test_rolling_replacement(fresh_cluster: Start) -> None:
    """Five times the oldest goes and a fresh one comes; then all seven start and know every epoch (MEM-4, MEM-5)."""
    cluster = fresh_cluster(7, redundancy="2")  # two at a time: too few for strips
    for index in range(2, 7):
        cluster.stop(index)
        wipe(cluster, index)
    cluster.wait_members()
    cluster.format()
    contents = {"a": fill(cluster, "a", 1, size=8 * MiB)}
    for step in range(5):
        cluster.kill(step)
        cluster.wait_recovered()
        cluster.restart(step + 2)
        cluster.wait_recovered()
    same_everywhere(cluster, contents)
    shutdown(cluster)
    for index in range(7):
        cluster.restart(index, wait=False)
    cluster.wait_recovered(timeout_s=90)

    all_agree(cluster)
    numbers = [epoch for epoch, _ in epochs(cluster, 0)]
    assert numbers == list(range(numbers[0], 0, -1))
    same_everywhere(cluster, contents, through=(0, 6))
    in_place(cluster, 2)


def test_simultaneous_joins(fresh_cluster: Start) -> None:
    """Several that join at once are all members soon, with at most one epoch each, and agree (MEM-6, MEM-7, MEM-8)."""
    cluster = fresh_cluster(6, gateways=2, redundancy="1")
    for index in range(1, 6):
        cluster.kill(index)
        wipe(cluster, index)
    cluster.wait_members()
    cluster.format()
    for index in range(1, 6):
        cluster.restart(index, wait=False)
    cluster.wait_recovered()

    all_agree(cluster)
    assert len(epochs(cluster, 0)) <= 6
    fill(cluster, "a", 3, size=4 * MiB, node=5)


def test_foreign_stores(start_cluster: Start, tmp_path) -> None:
    """A store of another cluster is refused by a running and by a waiting cluster, however new its epochs are
    (MEM-9, MEM-10, MEM-11)."""
    start_cluster = most_may_die(start_cluster)
    foreign = start_cluster(2, redundancy="1")
    foreign.format()
    for _ in range(2):
        foreign.kill(1)
        foreign.wait_members()
        foreign.restart(1)
    foreign.kill(1)
    foreign.stop(0)
    cluster = start_cluster(3, redundancy="2")
    cluster.kill(2)
    wipe(cluster, 2)
    cluster.wait_members()
    cluster.format()
    contents = {"a": fill(cluster, "a", 4, size=4 * MiB)}
    foreign.sheep[0].directory.rename(cluster.sheep[2].directory)

    cluster.restart(2, wait=False)
    assert exited(cluster, 2) == 1
    assert "ctime doesn't match" in cluster.sheep[2].log_tail()
    cluster.wait_members()
    same_everywhere(cluster, contents)

    shutdown(cluster)
    cluster.restart(0, wait=False)
    wait_status(cluster, 0, WAITING)
    cluster.restart(2, wait=False)
    assert exited(cluster, 2) == 1
    cluster.restart(1, wait=False)
    wait_status(cluster, 0, "running")
    cluster.wait_members()
    wipe(cluster, 2)
    cluster.restart(2)
    same_everywhere(cluster, contents)


def test_unformatted_nodes_first(fresh_cluster: Start) -> None:
    """Nodes that were never formatted and start first take the configuration of those that were (MEM-12)."""
    cluster = fresh_cluster(4, redundancy="2")
    for index in (2, 3):
        cluster.stop(index)
        wipe(cluster, index)
    cluster.wait_members()
    cluster.format()
    contents = {"a": fill(cluster, "a", 5, size=8 * MiB)}
    shutdown(cluster)
    for index in (2, 3, 0, 1):
        cluster.restart(index, wait=False)
        if index == 3:
            cluster.wait_members()
    cluster.wait_recovered()

    all_agree(cluster)
    ports = {str(sheep.port) for sheep in cluster.sheep}
    newest = epochs(cluster, 2)[0]
    assert newest[0] in (2, 3) and all(port in newest[1] for port in ports)
    same_everywhere(cluster, contents)
    in_place(cluster, 2)


def test_restart_needs_everybody_or_force(fresh_cluster: Start) -> None:
    """After a shutdown all members are waited for; forced, the cluster runs with those present, and who returns later
    joins as any other (MEM-13, MEM-14)."""
    cluster = fresh_cluster(3, copies=2)
    cluster.format()
    contents = {"a": fill(cluster, "a", 6, size=12 * MiB)}
    refused = cluster.dog("cluster", "recover", "force", input=b"yes\n", check=False)
    assert refused.returncode != 0
    shutdown(cluster)
    for index in (0, 1):
        cluster.restart(index, wait=False)
    wait_status(cluster, 0, WAITING)
    cluster.wait_members()
    assert epochs(cluster, 0)[0][0] == 1

    cluster.restart(2, wait=False)
    wait_status(cluster, 0, "running")
    assert epochs(cluster, 0)[0][0] == 1
    shutdown(cluster)
    for index in (0, 1):
        cluster.restart(index, wait=False)
    cluster.wait_members()
    cluster.dog("cluster", "recover", "force", input=b"yes\n")
    wait_status(cluster, 0, "running")
    cluster.wait_recovered()
    assert epochs(cluster, 0)[0][0] == 2
    same_everywhere(cluster, contents)
    in_place(cluster, 2)

    cluster.restart(2)
    in_place(cluster, 2)
    same_everywhere(cluster, contents)


def test_crashes_of_all(fresh_cluster: Start) -> None:
    """Three times everybody is killed at once and started at once: same epochs everywhere, same bytes (MEM-15)."""
    cluster = fresh_cluster(4, copies=3)
    cluster.format()
    contents = {name: fill(cluster, name, seed, size=8 * MiB) for seed, name in enumerate("ab")}
    for _ in range(3):
        for index in range(4):
            cluster.sheep[index].signal(9)
        for index in range(4):
            cluster.kill(index)
        for index in range(4):
            cluster.restart(index, wait=False)
        cluster.wait_recovered(timeout_s=90)
        all_agree(cluster)
        same_everywhere(cluster, contents)
    in_place(cluster, 3)


def test_two_die_one_returns_another_dies(fresh_cluster: Start) -> None:
    """Deaths and returns that overlap end in one membership that the survivors agree on (MEM-16, MEM-17)."""
    cluster = fresh_cluster(3, redundancy="4")
    cluster.dog("cluster", "format", "-b", cluster.store, "-c", "4", input=b"yes\n")
    contents = {"a": fill(cluster, "a", 7, size=8 * MiB)}
    cluster.kill(1)
    cluster.kill(2)
    cluster.wait_recovered()
    cluster.restart(2, wait=False)
    cluster.restart(1, wait=False)
    cluster.wait_recovered()
    cluster.kill(0)
    cluster.wait_recovered()

    all_agree(cluster)
    assert cluster.members(1) == cluster.members(2) == {cluster.sheep[1].port, cluster.sheep[2].port}
    assert "running" in status(cluster, 1)
    same_everywhere(cluster, contents)
    in_place(cluster, 2)


def test_random_history(fresh_cluster: Start) -> None:
    """Whatever order nodes go and come in, the last survivor's data is what all have in the end (MEM-2, MEM-16)."""
    chance = random.Random(20)
    cluster = fresh_cluster(4, copies=2)
    cluster.format()
    contents = {"a": fill(cluster, "a", 8, size=12 * MiB)}
    for _ in range(5):
        down = [sheep.index for sheep in cluster.sheep if not sheep.running]
        if down and (len(down) == 2 or chance.random() < 0.5):
            cluster.restart(chance.choice(down), wait=False)
        else:
            cluster.kill(chance.choice(cluster.live).index)
            cluster.wait_recovered()
    for sheep in cluster.sheep:
        if not sheep.running:
            cluster.restart(sheep.index, wait=False)
    cluster.wait_recovered()

    all_agree(cluster)
    same_everywhere(cluster, contents)
    in_place(cluster, 2)


def test_format_race(fresh_cluster: Start) -> None:
    """A format that is tried again and again while six sheep start takes all of them in (MEM-8)."""
    cluster = fresh_cluster(6)
    for index in range(6):
        cluster.kill(index)
        wipe(cluster, index)
    for index in range(6):
        cluster.restart(index, wait=False)

    def formatted() -> bool:
        # Before the first is a member dog sees no zones at all, asks whether that is meant, and ends well unanswered.
        done = cluster.dog("cluster", "format", "-c", "1", node=0, check=False)
        return done.returncode == 0 and b"using backend" in done.stdout

    wait_until(formatted, "a format to succeed")

    cluster.wait_recovered()
    all_agree(cluster)
    for index in range(6):
        assert "running" in status(cluster, index)
        assert len(nodes(cluster, index)) == 6
    same_everywhere(cluster, {"a": fill(cluster, "a", 8, size=4 * MiB, node=5)})


def test_identity_is_the_address(fresh_cluster: Start) -> None:
    """Stores that are started under another address wait for the nodes of the log; under their own they serve again
    (MEM-18)."""
    own = ("-b", "0.0.0.0", "-y", "127.0.0.2")
    cluster = fresh_cluster(3, options=own)
    cluster.dog("cluster", "format", "-c", "2")
    contents = {"a": fill(cluster, "a", 18, size=8 * MiB)}
    shutdown(cluster)

    cluster.options = ()
    for index in range(3):
        cluster.restart(index, wait=False)
    for index in range(3):
        wait_status(cluster, index, WAITING)
    cluster.wait_members()
    assert WAITING in status(cluster, 0)
    for index in range(3):
        assert cluster.stop(index) == 0
    cluster.options = own
    for index in range(3):
        cluster.restart(index, wait=False)
    for index in range(3):
        wait_status(cluster, index, "running")

    same_everywhere(cluster, contents)
    in_place(cluster, 2)
