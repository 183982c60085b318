"""Long runs (RUN-1, RUN-2, RUN-3), and a short slice of the first that every run of the suite has.

``./check --soak [MINUTES]`` runs all of them; the seed is printed and repeats the choice of actions::

    SHEEPDOG_SOAK_SEED=7 ./check --soak 5 -k random_actions

RUN-4: driver, store and redundancy are those of SHEEPDOG_TEST_CLUSTER, _STORE and _REDUNDANCY; SHEEPDOG_SOAK_OPTIONS
are further words of each sheep's command line, for example ``-j size=64M``.
"""

from __future__ import annotations

import os
import random
import shlex
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults import spec_of
from soak import Soak

from sheepdog.client.volume import create_vdi
from sheepdog.testing.cluster import Sheep, SheepCluster

MINUTES = float(os.environ.get("SHEEPDOG_SOAK_MINUTES", "30"))
SEED = int(os.environ.get("SHEEPDOG_SOAK_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 31)
OPTIONS = tuple(shlex.split(os.environ.get("SHEEPDOG_SOAK_OPTIONS", "")))
DRIVER = os.environ.get("SHEEPDOG_TEST_CLUSTER", "local")
STRIPS = os.environ.get("SHEEPDOG_TEST_REDUNDANCY", "copies") != "copies"
SLICE_SEED = 3
MANY_NODES = 50
MANY_VDIS = 10_000
SHEEP_BYTES_MAX = 300 << 20

pytestmark = [pytest.mark.processes]

Start = Callable[..., SheepCluster]


def started(start: Start, base: Path) -> SheepCluster:
    """Five nodes in five zones, formatted with objects of 1 MiB."""
    cluster = start(5, base=base, driver=spec_of(DRIVER, base), options=OPTIONS)
    cluster.format("-z", "20")
    return cluster


@pytest.mark.timeout(240)
def test_slice(fresh_cluster: Start, tmp_path: Path) -> None:
    """One round of random actions, always the same ones: nothing is lost, and the invariants hold (RUN-1)."""
    Soak(started(fresh_cluster, tmp_path), SLICE_SEED, wounds_max=1 if STRIPS else 2).run(rounds=1)


@pytest.mark.soak
@pytest.mark.timeout(MINUTES * 60 + 600)
def test_random_actions(fresh_cluster: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """RUN-1, for as many minutes as asked."""
    soak = Soak(started(fresh_cluster, tmp_path), SEED, wounds_max=1 if STRIPS else 2)
    with capsys.disabled():
        print(f"\nSHEEPDOG_SOAK_SEED={SEED}, {MINUTES:g} minutes", flush=True)
    soak.run(seconds=MINUTES * 60)
    with capsys.disabled():
        print(f"{soak.number} numbered actions, {soak.load.writes} writes of guests", flush=True)


def memory_bytes(sheep: Sheep) -> int:
    """What the process holds."""
    assert sheep.process is not None
    status = Path(f"/proc/{sheep.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) << 10


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_fifty_nodes(fresh_cluster: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fifty nodes, of which ten at a time leave and join (RUN-2): one membership, one history, all data in place."""
    import invariants
    from load import Load
    from recovery_scenes import all_agree

    chance = random.Random(SEED)
    begun = time.monotonic()
    timeout = f"local:{tmp_path}/cluster,timeout=20000" if DRIVER == "local" else DRIVER
    cluster = fresh_cluster(MANY_NODES, base=tmp_path, driver=timeout, redundancy="3", start_s=300.0)
    cluster.format("-z", "20")
    together = time.monotonic() - begun
    slowest = 0.0
    load = Load(cluster, "many", guests=3, size=4 << 20, seed=SEED)
    with load:
        for burst in range(4):
            victims = chance.sample(range(3, MANY_NODES), 10)
            before = time.monotonic()
            for victim in victims[:2]:
                cluster.sheep[victim].signal(9)
            for number, victim in enumerate(victims):
                if number < 2:
                    cluster.kill(victim)
                else:
                    assert cluster.stop(victim) == 0
            cluster.wait_recovered(timeout_s=180)
            for victim in victims:
                cluster.restart(victim, wait=False)
            cluster.wait_recovered(timeout_s=180)
            slowest = max(slowest, time.monotonic() - before)
            load.progress(1)
            with capsys.disabled():
                print(f"\nburst {burst + 1}: {time.monotonic() - before:.1f} s", flush=True)
    load.verify()
    invariants.identical(cluster)
    all_agree(cluster)
    largest = max(memory_bytes(sheep) for sheep in cluster.live)
    assert largest < SHEEP_BYTES_MAX
    with capsys.disabled():
        print(
            f"RUN-2: {MANY_NODES} nodes together after {together:.0f} s, slowest burst {slowest:.0f} s, "
            f"{largest >> 20} MiB at most, {load.writes} writes of guests",
            flush=True,
        )


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_ten_thousand_vdis(fresh_cluster: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten thousand volumes are listed within 30 s, and no sheep or dog grows beyond bounds (RUN-3)."""
    cluster = fresh_cluster(3, base=tmp_path, driver=spec_of(DRIVER, tmp_path))
    cluster.format()

    def create(first: int) -> None:
        with cluster.connect(first % 3, timeout_s=60.0) as connection:
            for number in range(first, MANY_VDIS, 4):
                create_vdi(connection.request, f"vdi{number:05}".encode(), size=1 << 30)

    begun = time.monotonic()
    with ThreadPoolExecutor(4) as workers:
        list(workers.map(create, range(4)))
    created = time.monotonic() - begun
    begun = time.monotonic()
    listed = cluster.dog("vdi", "list", "-r", timeout_s=60).stdout.splitlines()
    took = time.monotonic() - begun
    largest = max(memory_bytes(sheep) for sheep in cluster.live)

    assert len(listed) == MANY_VDIS
    assert took < 30
    with capsys.disabled():
        print(
            f"\nRUN-3: {MANY_VDIS} vdis created in {created:.0f} s, listed in {took:.1f} s, "
            f"{largest >> 20} MiB at most",
            flush=True,
        )
    cluster.kill(2)
    begun = time.monotonic()
    cluster.restart(2)
    cluster.wait_recovered(timeout_s=900)
    back = time.monotonic() - begun
    largest = max(memory_bytes(sheep) for sheep in cluster.live)
    assert len(cluster.dog("vdi", "list", "-r", node=2, timeout_s=60).stdout.splitlines()) == MANY_VDIS
    assert largest < SHEEP_BYTES_MAX
    with capsys.disabled():
        print(f"a node that was away has them all after {back:.0f} s, {largest >> 20} MiB at most", flush=True)
