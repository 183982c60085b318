"""Every fault of the table, on real sheep under load: what was acknowledged is there, all copies are identical without
anybody having looked at them, and the invariants hold (INV-1 to INV-6).

Driver, store and redundancy are those of the environment (SHEEPDOG_TEST_CLUSTER, _STORE, _REDUNDANCY); without it the
local driver, the plain store and three copies. ``SHEEPDOG_FAULTS_SEED`` chooses other writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import invariants
import loop_disk
import pytest
from disk_faults import DISK_BYTES, DISKS, DiskScene
from faults import PROCESSES, QUORUM, WIRES, Fault, Scene, spec_of
from load import Load
from scenes import MiB, pattern, read_all, write

from sheepdog.daemon.strip_store import LOG_BYTES as STRIP_LOG_BYTES
from sheepdog.testing import network
from sheepdog.testing.cluster import SheepCluster
from sheepdog.testing.services import missing_service

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

SEED = os.environ.get("SHEEPDOG_FAULTS_SEED", "1")
DRIVER = os.environ.get("SHEEPDOG_TEST_CLUSTER", "local")
STRIPS = os.environ.get("SHEEPDOG_TEST_REDUNDANCY", "copies") != "copies"
SPARE = 1 if STRIPS else 2  # nodes that an object may lose
OBJECT_SHIFT = "20"

Start = Callable[..., SheepCluster]


def prepare(cluster: SheepCluster, *words: str) -> None:
    """Formatted, with objects of 1 MiB and some object of almost every kind."""
    cluster.format("-z", OBJECT_SHIFT, *words)
    cluster.dog("vdi", "create", "witness", "4M")
    write(cluster, "witness", 0, pattern(1, 4 * MiB))
    cluster.dog("vdi", "snapshot", "-s", "s", "witness")
    cluster.dog("vdi", "setattr", "witness", "key", "value")
    write(cluster, "witness", MiB, pattern(2, MiB))


def witness_intact(cluster: SheepCluster) -> None:
    """What nobody has touched is what it was."""
    before = pattern(1, 4 * MiB)
    for sheep in cluster.live:
        assert read_all(cluster, "witness", node=sheep.index) == before[:MiB] + pattern(2, MiB) + before[2 * MiB :]
        assert read_all(cluster, "witness", node=sheep.index, tag="s") == before
        assert cluster.dog("vdi", "getattr", "witness", "key", node=sheep.index).stdout == b"value"


def tell(
    cluster: SheepCluster,
    fault: Fault,
    *,
    answer_s: float = 60.0,
    guests: int = 4,
    scene: Callable[..., Scene] = Scene,
) -> None:
    """The story under load, and all that must be true afterwards."""
    watch = invariants.Watch(cluster)
    load = Load(cluster, f"{fault.name[:20]}-", guests=guests, answer_s=answer_s, seed=SEED)
    with load:
        load.progress()
        fault.tell(scene(cluster, load, copies=SPARE + 1))
        cluster.wait_recovered()
    cluster.wait_recovered()
    invariants.identical(cluster)
    load.verify()
    witness_intact(cluster)
    invariants.everything(cluster)
    watch.check(explained=fault.explained)
    allowed = {*fault.refusals, *(fault.refusals_of_strips if STRIPS else ())}
    assert set(load.refusals()) <= allowed, f"writes were refused: {load.refusals()}"
    load.close()


def _need(lacking: str | None) -> None:
    """The surroundings have what the test needs; it is skipped otherwise, or fails where CI is set."""
    if lacking is not None:
        missing_service(lacking)


@pytest.fixture(scope="module")
def cluster(start_cluster: Start, tmp_path_factory: pytest.TempPathFactory) -> SheepCluster:
    """Four sheep in four zones."""
    base = tmp_path_factory.mktemp("faults")
    cluster = start_cluster(4, base=base, driver=spec_of(DRIVER, base))
    prepare(cluster)
    return cluster


@pytest.mark.matrix
@pytest.mark.parametrize("fault", PROCESSES, ids=lambda fault: fault.name)
def test_processes(cluster: SheepCluster, fault: Fault) -> None:
    """Processes and disks come, go and hang (MEM-15, MEM-24, REC-1, REC-19, REC-22, MD-9, MD-10)."""
    tell(cluster, fault)


@contextmanager
def wired(start: Start, base: Path, driver: str) -> Iterator[SheepCluster]:
    """Five sheep, each on a network of its own."""
    _need(network.why_not())
    with network.Network(5) as wires:
        cluster = start(5, base=base, driver=spec_of(driver, base), network=wires)
        prepare(cluster)
        yield cluster
        for sheep in cluster.live:
            cluster.stop(sheep.index)


@pytest.fixture(scope="module")
def wired_locally(start_cluster: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SheepCluster]:
    """The local driver, which notices nothing."""
    with wired(start_cluster, tmp_path_factory.mktemp("wired"), "local") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def wired_raft(start_cluster: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SheepCluster]:
    """Five voters."""
    with wired(start_cluster, tmp_path_factory.mktemp("raft"), "raft") as cluster:
        yield cluster


@pytest.mark.parametrize("fault", WIRES, ids=lambda fault: fault.name)
def test_wires(wired_locally: SheepCluster, fault: Fault) -> None:
    """The data network is cut while everybody is a member: whatever needs the lost ones waits, and nothing is
    acknowledged without them (REC-19)."""
    tell(wired_locally, fault)


@pytest.mark.parametrize("fault", QUORUM, ids=lambda fault: fault.name)
def test_quorum(wired_raft: SheepCluster, fault: Fault) -> None:
    """Machines vanish from the network while their processes live on: the majority makes the missing copies and goes
    on, the minority serves nothing and comes back (MEM-22, REC-19)."""
    tell(wired_raft, fault, answer_s=8.0)


@pytest.fixture(scope="module")
def on_small_disk(
    start_cluster: Start, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[SheepCluster, loop_disk.LoopDisk, loop_disk.LoopDisk]]:
    """Four sheep, the last one on a small file system, and another such file system.

    The space for objects is the same with strips, whose log comes besides.
    """
    _need(loop_disk.why_not())
    base = tmp_path_factory.mktemp("disks")
    size = DISK_BYTES + (STRIP_LOG_BYTES * 9 // 8 if STRIPS else 0)  # an eighth of it is what ext4 needs for itself
    with (
        loop_disk.LoopDisk(base / "sheep3", size) as disk,
        loop_disk.LoopDisk(base / "disk3x", DISK_BYTES) as more,
    ):
        # the same share for everybody, however small its disk
        cluster = start_cluster(4, base=base, driver=spec_of(DRIVER, base), disks=(), options=("-V", "64"))
        prepare(cluster, "-V")
        yield cluster, disk, more
        for sheep in cluster.live:
            cluster.stop(sheep.index)


@pytest.mark.matrix
@pytest.mark.parametrize("fault", DISKS, ids=lambda fault: fault.name)
def test_disks(on_small_disk: tuple[SheepCluster, loop_disk.LoopDisk, loop_disk.LoopDisk], fault: Fault) -> None:
    """Disks are full, fail or turn read-only (MD-3, MD-4, MD-7, MD-13, MD-15)."""
    cluster, disk, second = on_small_disk
    tell(cluster, fault, guests=2, scene=partial(DiskScene, disk=disk, second=second))
