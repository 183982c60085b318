"""Real sheep processes, on the driver, store and redundancy that the environment names (see the test matrix)."""

import random
import signal

import pytest

from sheepdog.client.nbd import NbdClient
from sheepdog.testing.cluster import ClusterFailure

pytestmark = [pytest.mark.processes, pytest.mark.matrix, pytest.mark.timeout(180)]

MiB = 1 << 20


@pytest.fixture
def data():
    """12 MiB: three objects."""
    return random.Random(12).randbytes(12 * MiB)


@pytest.fixture
def cluster(sheep_cluster):
    """Three formatted sheep with NBD."""
    cluster = sheep_cluster(3, nbd=True)
    cluster.format()
    return cluster


def read(cluster, name, size, node):
    return cluster.dog("vdi", "read", name, "0", str(size), node=node).stdout


def test_every_gateway_reads_the_same(cluster, data):
    """What one gateway wrote every other one reads at once."""
    cluster.dog("vdi", "create", "a", "16M")
    cluster.dog("vdi", "write", "a", "0", str(len(data)), input=data, node=0)

    assert [read(cluster, "a", len(data), node) == data for node in range(3)] == [True] * 3


def test_kill_one_and_bring_it_back(cluster, data):
    """A killed sheep costs nothing that was written; back again it has what it must have, also what it missed."""
    cluster.dog("vdi", "create", "a", "16M")
    cluster.dog("vdi", "write", "a", "0", str(len(data)), input=data)

    cluster.kill(1)
    cluster.wait_recovered()
    changed = data[: 5 * MiB] + bytes(MiB) + data[6 * MiB :]
    cluster.dog("vdi", "write", "a", str(5 * MiB), str(MiB), input=bytes(MiB), node=2)
    assert read(cluster, "a", len(data), 0) == changed

    cluster.restart(1)
    cluster.wait_recovered()
    assert read(cluster, "a", len(data), 1) == changed
    # every shard is where it was: no object is short of one
    oids = {}
    for (oid, _), holders in cluster.census().items():
        oids[oid] = oids.get(oid, 0) + len(holders)
    assert oids and set(oids.values()) == {3}


def test_whole_cluster_restarts(cluster, data):
    """All sheep stopped in order and started again: the same cluster, the same epoch, the same bytes."""
    cluster.dog("vdi", "create", "a", "16M")
    cluster.dog("vdi", "write", "a", "0", str(len(data)), input=data)
    epoch = cluster.epoch(0)
    cluster.dog("cluster", "shutdown")
    for sheep in cluster.sheep:
        assert sheep.process.wait(30) == 0

    for index in range(3):
        cluster.restart(index, wait=False)
    cluster.wait_recovered()

    assert cluster.epoch(0) == epoch
    assert read(cluster, "a", len(data), 2) == data


def test_term_is_an_orderly_end(cluster):
    """SIGTERM ends a sheep with 0, removes its pid file, and the others see it leave."""
    assert cluster.sheep[2].pid_path.exists()

    assert cluster.stop(2) == 0
    cluster.wait_members()

    assert not cluster.sheep[2].pid_path.exists()
    assert cluster.members(0) == {cluster.sheep[0].port, cluster.sheep[1].port}


def test_paused_sheep_is_left_behind_and_returns(cluster, data):
    """A sheep that stands still is declared dead; awake again it serves nothing stale and becomes a member."""
    cluster.dog("vdi", "create", "a", "16M")
    cluster.pause(1)
    cluster.wait_members(timeout_s=60)
    cluster.dog("vdi", "write", "a", "0", str(len(data)), input=data, node=0)

    cluster.resume(1)
    cluster.wait_recovered(timeout_s=90)

    assert read(cluster, "a", len(data), 1) == data


def test_nbd_and_dog_see_one_volume(cluster, data):
    """What is written through the NBD of one sheep is read by dog from another, and the other way round."""
    cluster.dog("vdi", "create", "a", "16M")
    with NbdClient.connect(f"127.0.0.1:{cluster.sheep[0].nbd_port}") as disk:
        disk.go("a")
        disk.write(0, data)
        disk.flush()
    assert read(cluster, "a", len(data), 2) == data

    cluster.dog("vdi", "write", "a", "4096", "512", input=b"w" * 512, node=1)
    with NbdClient.connect(f"127.0.0.1:{cluster.sheep[2].nbd_port}") as disk:
        disk.go("a")
        assert disk.read(4000, 700) == data[4000:4096] + b"w" * 512 + data[4608:4700]


def test_fixture_tells_of_a_sheep_that_ends(sheep_cluster):
    """A sheep that cannot start fails the wait at once, with its log."""
    with pytest.raises(ClusterFailure, match=r"ended with 1(.|\n)*log of sheep"):
        sheep_cluster(1, driver="local", options=["-b", "192.0.2.77"])


def test_fixture_leaves_nothing(sheep_cluster):
    """Closing kills what runs, also what is stopped by a signal, and frees the ports."""
    cluster = sheep_cluster(2, driver="local")
    processes = [sheep.process for sheep in cluster.sheep]
    cluster.pause(0)

    cluster.close()

    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2
    assert not cluster.base.exists()
