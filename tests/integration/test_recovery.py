"""Recovery with real processes (behaviours REC-1 to REC-23). What needs timing or damage is tested in process."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from recovery_scenes import (
    KiB,
    MiB,
    fill,
    in_place,
    nodes,
    same_everywhere,
    shards,
    stale,
    status,
)
from scenes import Background, LiveClient, most_may_die, pattern, read_all, write

from sheepdog.client import admin
from sheepdog.model.ids import index_of, is_data
from sheepdog.testing.cluster import SheepCluster, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.matrix, pytest.mark.timeout(150)]

Start = Callable[..., SheepCluster]


@pytest.fixture(scope="module")
def cluster(start_cluster: Start) -> SheepCluster:
    """Four sheep, 2 copies or strips 2:1 by default."""
    cluster = start_cluster(4, copies=2)
    cluster.format()
    return cluster


@pytest.fixture(scope="module")
def expendable(request: pytest.FixtureRequest, start_cluster: Start) -> SheepCluster:
    """The same, for scenes in which most sheep die."""
    if os.environ.get("SHEEPDOG_TEST_CLUSTER") != "raft":
        shared: SheepCluster = request.getfixturevalue("cluster")
        return shared
    cluster = most_may_die(start_cluster)(4, copies=2)
    cluster.format()
    return cluster


@pytest.fixture(autouse=True)
def all_back(request: pytest.FixtureRequest) -> None:
    """Every test begins with all sheep of the shared cluster running."""
    for name in {"cluster", "expendable"} & {*request.fixturenames}:
        cluster: SheepCluster = request.getfixturevalue(name)
        for sheep in cluster.sheep:
            if not sheep.running:
                cluster.restart(sheep.index, wait=False)
        cluster.wait_recovered()


@pytest.mark.covering
def test_leave_write_return(cluster: SheepCluster) -> None:
    """A node that missed writes has them after its return; a snapshot's objects and ledgers move as well (REC-1, REC-7,
    REC-14, REC-21)."""
    before = fill(cluster, "rec1", 1, size=16 * MiB)
    cluster.dog("vdi", "snapshot", "-s", "s1", "rec1")
    cluster.stop(2)
    cluster.wait_recovered()
    after = bytearray(before)
    after[3 * MiB : 9 * MiB] = pattern(2, 6 * MiB)
    write(cluster, "rec1", 3 * MiB, bytes(after[3 * MiB : 9 * MiB]))
    cluster.restart(2)

    in_place(cluster, 2)
    same_everywhere(cluster, {"rec1": bytes(after)})
    assert read_all(cluster, "rec1", node=2, tag="s1") == before
    assert cluster.dog("vdi", "check", "rec1").stdout == b"finish check&repair rec1\n"


def test_reads_and_writes_while_nodes_come_and_go(cluster: SheepCluster) -> None:
    """A client never sees an error while nodes die and return, and every byte it wrote is there (REC-2, REC-3, REC-5,
    REC-22)."""
    size = 8 * MiB
    content = bytearray(fill(cluster, "rec3", 3, size=size))
    created = []
    with LiveClient(cluster, "rec3", node=0) as client:

        def step(number: int) -> None:
            offset = number * 37 * KiB % (size - 64 * KiB)
            data = pattern(1000 + number, 48 * KiB)
            client.write(offset, data)
            content[offset : offset + len(data)] = data
            if number % 20 == 0:
                assert client.read(offset, len(data)) == data

        with Background(step) as background:
            background.wait(5)
            cluster.kill(3)
            created.append("during1")
            cluster.dog("vdi", "create", "during1", "4M", node=1)
            background.wait(10)
            cluster.restart(3, wait=False)
            cluster.kill(2)
            background.wait(10)
            created.append("during2")
            cluster.dog("vdi", "create", "during2", "4M", node=1)
            cluster.restart(2, wait=False)
            background.wait(10)
            cluster.wait_recovered()
            background.wait(5)
    in_place(cluster, 2)

    same_everywhere(cluster, {"rec3": bytes(content)})
    listed = cluster.dog("vdi", "list", "-r", node=3).stdout.decode()
    assert all(listed.count(f" {name} ") == 1 for name in created)


def test_on_demand_only(cluster: SheepCluster) -> None:
    """With recovery switched off exactly what clients touch is brought up to its copies, also over a restart of all;
    switched on, the rest follows (REC-6)."""
    fill(cluster, "rec6", 6, size=32 * MiB)
    cluster.dog("cluster", "recover", "disable")
    assert "disabled" in status(cluster, 1)
    cluster.kill(3)
    cluster.wait_recovered()
    before = {index: set(shards(cluster, index)) for index in range(3)}
    ring = nodes(cluster, 0)
    assert len(ring) == 3
    write(cluster, "rec6", 0, pattern(61, 512))

    def gained() -> set[tuple[int, int]]:
        return {key for index in range(3) for key in set(shards(cluster, index)) - before[index] if is_data(key[0])}

    time.sleep(0.5)
    assert {oid & 0xFFFFFFFF for oid, _ in gained()} <= {0}
    cluster.dog("cluster", "recover", "enable")
    assert "enabled" in status(cluster, 1)
    in_place(cluster, 2)


def test_total_turnover(expendable: SheepCluster) -> None:
    """Data moves to nodes that take over one by one; when the first ones come back with their old copies, the new
    content stays (REC-8, REC-9)."""
    cluster = expendable
    fill(cluster, "rec8", 8, size=12 * MiB, node=2)
    for gone in (0, 1):
        cluster.kill(gone)
        cluster.wait_recovered()
    new = pattern(88, 12 * MiB)
    write(cluster, "rec8", 0, new, node=2)
    cluster.restart(0)
    cluster.wait_recovered()
    cluster.kill(2)
    cluster.wait_recovered()
    cluster.restart(1)
    cluster.wait_recovered()
    cluster.kill(3)
    cluster.wait_recovered()
    same_everywhere(cluster, {"rec8": new})

    cluster.restart(2, wait=False)
    cluster.restart(3, wait=False)
    in_place(cluster, 2)
    same_everywhere(cluster, {"rec8": new})


def test_collapse(expendable: SheepCluster) -> None:
    """Half of the nodes die at once and the others one after the other, faster than recovery; with all back nothing is
    lost, though it may have been in a stale directory of an older epoch (REC-10, REC-11, REC-13, REC-15)."""
    cluster = expendable
    contents = {"col": fill(cluster, "col", 10, size=12 * MiB)}
    cluster.dog("vdi", "create", "-c", "1", "single", "16M")
    contents["single"] = pattern(11, 16 * MiB)
    write(cluster, "single", 0, contents["single"])
    cluster.sheep[1].signal(9)
    cluster.sheep[2].signal(9)
    cluster.kill(1)
    cluster.kill(2)
    cluster.wait_members()
    cluster.kill(0)
    cluster.wait_members()
    cluster.kill(3)
    for index in (3, 2, 0, 1):
        cluster.restart(index, wait=False)
    cluster.wait_recovered()

    same_everywhere(cluster, contents)
    wait_until(lambda: not any(stale(cluster, index) for index in range(4)), "the stale areas to be empty")
    cluster.dog("vdi", "delete", "single")


def test_deleted_while_a_node_was_away(cluster: SheepCluster) -> None:
    """A vdi that was deleted stays deleted when a node returns with its objects, and nobody gets them back (REC-16)."""
    fill(cluster, "rec16", 16, size=12 * MiB)
    with cluster.connect(0) as connection:
        vid = max(admin.used_vids(connection.request), key=lambda vid: vid == _vid(cluster, "rec16"))
    cluster.kill(2)
    cluster.wait_recovered()
    cluster.dog("vdi", "delete", "rec16")

    def left(*indexes: int) -> list[int]:
        return [oid for index in indexes for oid, _ in shards(cluster, index) if is_data(oid) and oid >> 32 == vid]

    wait_until(lambda: not left(0, 1, 3), "the objects to go")
    cluster.restart(2)
    cluster.wait_recovered()

    assert not left(0, 1, 3)
    assert "rec16" not in cluster.dog("vdi", "list", "-r", node=2).stdout.decode()


def _vid(cluster: SheepCluster, name: str) -> int:
    rows = cluster.dog("vdi", "list", "-r").stdout.decode().splitlines()
    return next(int(row.split()[7], 16) for row in rows if row.split()[1] == name)


def test_throttle(cluster: SheepCluster) -> None:
    """The throttle is taken in its range and refused outside of it; it slows recovery down until it is lifted (REC-17,
    REC-18)."""
    for good in (("0", "0"), ("1", "1"), ("4294967295", "9223372036854775807")):
        cluster.dog("node", "recovery", "set-throttle", *good)
    for bad in (("0", "1"), ("1", "0"), ("4294967296", "1"), ("1", "9223372036854775808")):
        assert cluster.dog("node", "recovery", "set-throttle", *bad, check=False).returncode == 64
    fill(cluster, "thr", 17, size=48 * MiB)
    for index in range(3):
        cluster.dog("node", "recovery", "set-throttle", "1", "60000", node=index)
    cluster.kill(3)
    cluster.wait_members()

    def progress() -> list[tuple[int, int]]:
        found = []
        for index in range(3):
            with cluster.connect(index) as connection:
                answer = connection.request(admin.OP_STAT_RECOVERY, data_length=24)
            state = admin.unpack_recovery_state(answer.body)
            if state.in_recovery and state.total:
                found.append((state.finished, state.total))
        return found

    wait_until(lambda: bool(progress()), "recovery to be under way")
    assert all(finished <= total for finished, total in progress())
    assert any(finished < total for finished, total in progress())
    for index in range(3):
        cluster.dog("node", "recovery", "set-throttle", "0", "0", node=index)
    in_place(cluster, 2)


def test_short_absence(fresh_cluster: Start) -> None:
    """Sheep that are told to wait move nothing when a node leaves, but for what is written. The node, back soon, is
    sent just that: its other copies are taken up again as they are (``sheep --recovery-delay``)."""
    cluster = fresh_cluster(3, redundancy="2", options=("--recovery-delay", "600"))
    cluster.format("-z", "20")
    content = fill(cluster, "short", 8, size=16 * MiB)

    def files(index: int) -> dict[int, int]:
        return {oid: os.stat(path).st_ino for (oid, _), path in shards(cluster, index).items() if is_data(oid)}

    before = [files(index) for index in range(3)]
    written = min(before[2])
    cluster.kill(2)
    cluster.wait_members()
    fresh = pattern(9, MiB)
    write(cluster, "short", index_of(written) * MiB, fresh, node=0)
    for index in (0, 1):
        wait_until(lambda index=index: "recovery for epoch 2" in cluster.sheep[index].log_tail(), "the list is made")

    def settled() -> set[int]:
        """The last writes before the end may not have been told to be complete."""
        logs = [cluster.sheep[index].log_path.read_text() for index in (0, 1)]
        return {int(oid, 16) for log in logs for oid in re.findall(r"oid=([0-9a-f]{16}) was settled", log)}

    def moved() -> set[int]:
        return {oid for index in (0, 1) for oid, ino in files(index).items() if before[index].get(oid) != ino}

    wait_until(lambda: moved() <= settled() | {written}, "nothing to be moved that was not written", timeout_s=3)
    assert len(settled()) < len(before[2]) - 1, "something stayed where it was"
    cluster.restart(2)
    in_place(cluster, 2)

    if "-j" not in cluster.options:  # the replay of a journal makes the files anew
        assert {oid for oid, ino in files(2).items() if before[2].get(oid) != ino} <= {written}
    at = index_of(written) * MiB
    same_everywhere(cluster, {"short": content[:at] + fresh + content[at + MiB :]})


def test_strips_through_a_restart_of_a_node(fresh_cluster: Start) -> None:
    """Erasure-coded data is right at once when a node dies, whole again when it returns, and its old strips do not win
    (EC-2, EC-3, EC-6, REC-21)."""
    cluster = fresh_cluster(4, redundancy="2:1")
    cluster.format()
    content = bytearray(fill(cluster, "ec", 30, size=12 * MiB))
    cluster.kill(1)
    same_everywhere(cluster, {"ec": bytes(content)}, through=(0,))
    write(cluster, "ec", 5 * MiB + 333, b"degraded" * 999)
    content[5 * MiB + 333 : 5 * MiB + 333 + 8 * 999] = b"degraded" * 999
    cluster.wait_recovered()
    cluster.restart(1)
    cluster.wait_recovered()

    same_everywhere(cluster, {"ec": bytes(content)})
    assert cluster.dog("vdi", "check", "ec").stdout == b"finish check&repair ec\n"


def test_object_only_set_aside(fresh_cluster: Start) -> None:
    """An object that exists only in a stale directory, under the last epoch, is found by recovery after a crash; a
    wildcard start finds one under any epoch at any node (REC-12, REC-23)."""
    cluster = fresh_cluster(2, redundancy="1", options=("-W",))
    cluster.format()
    contents = {"a": fill(cluster, "a", 12, size=48 * MiB)}
    for index in (0, 1):
        cluster.pause(index)  # else the second may see the first one die, and serve alone in an epoch of its own
    for index in (0, 1):
        cluster.kill(index)
    places = [path for index in (0, 1) for (oid, _), path in shards(cluster, index).items() if is_data(oid)]
    stale_area = cluster.sheep[0].object_directories[0] / ".stale"
    assert any("sheep0" in path for path in places) and any("sheep1" in path for path in places)
    for path in places:
        name = path.rsplit("/", 1)[1]
        Path(path).rename(stale_area / f"{name}.1")
    for index in (0, 1):
        cluster.restart(index, wait=False)
    cluster.wait_recovered()

    same_everywhere(cluster, contents)
