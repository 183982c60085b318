"""The tree store, formats that change the store, and wrong store names (ST-1 to ST-4), with real processes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from scenes import MiB, kinds, pattern, read, read_all, vid_of_name, write

from sheepdog.model.ids import data_oid, inode_oid
from sheepdog.testing.cluster import SheepCluster, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]


def scene(cluster: SheepCluster) -> None:
    """Volumes, snapshots, clones, attributes, a deletion; the same for every store."""
    cluster.dog("vdi", "create", "alpha", "16M")
    write(cluster, "alpha", 0, pattern(1, 5 * MiB))
    cluster.dog("vdi", "snapshot", "-s", "t", "alpha")
    write(cluster, "alpha", 100, pattern(2, 5000))
    cluster.dog("vdi", "clone", "-s", "t", "alpha", "beta")
    write(cluster, "beta", 8 * MiB, pattern(3, 1000))
    cluster.dog("vdi", "create", "-c", "2:1", "gamma", "8M")
    write(cluster, "gamma", 3 * MiB, pattern(4, 2 * MiB))
    cluster.dog("vdi", "setattr", "alpha", "key", "value")
    cluster.dog("vdi", "create", "-P", "delta", "8M")
    cluster.dog("vdi", "delete", "delta")
    delta_gone = lambda: kinds(cluster)["data"] == 6  # noqa: E731  read by wait_until
    wait_until(delta_gone, "the data of a deleted vdi to go")


def check_scene(cluster: SheepCluster, node: int) -> None:
    alpha = pattern(1, 5 * MiB)
    assert read(cluster, "alpha", 0, 5 * MiB, node=node, tag="t") == alpha
    assert read(cluster, "alpha", 0, 5 * MiB, node=node) == alpha[:100] + pattern(2, 5000) + alpha[5100:]
    assert read(cluster, "beta", 0, 5 * MiB, node=node) == alpha
    assert read(cluster, "beta", 8 * MiB, 1000, node=node) == pattern(3, 1000)
    assert read_all(cluster, "gamma", node=node) == bytes(3 * MiB) + pattern(4, 2 * MiB) + bytes(3 * MiB)
    assert cluster.dog("vdi", "getattr", "alpha", "key", node=node).stdout.strip() == b"value"


def files(sheep_directory: Path) -> list[Path]:
    objects = sheep_directory / "obj"
    return sorted(
        path.relative_to(objects) for path in objects.rglob("*") if path.is_file() and ".stale" not in path.parts
    )


def test_tree_does_what_plain_does(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """ST-1: the same scene on both stores leaves the same census; files of tree lie in its sub-directories, also after
    a node died and returned and after a restart of all.
    """
    census = {}
    for store in ("plain", "tree"):
        cluster = fresh_cluster(3, driver="local", store=store, redundancy="2")
        cluster.format()
        scene(cluster)
        census[store] = kinds(cluster)
        if store == "tree":
            vid = vid_of_name(cluster, "alpha")
            for sheep in cluster.sheep:
                for path in files(sheep.directory):
                    oid = int(path.name.split("_")[0], 16)
                    expected = "meta" if oid >> 60 else f"{oid >> 32 & 0xFF:02x}"
                    assert path.parent == Path(expected), path
            assert any((inode_oid(vid), -1) == key for key in cluster.census())
            cluster.kill(1)
            cluster.wait_recovered()
            check_scene(cluster, 0)
            write(cluster, "alpha", 100, pattern(2, 5000))
            cluster.restart(1)
            cluster.wait_recovered()
            for node in range(3):
                check_scene(cluster, node)
            cluster.dog("cluster", "shutdown")
            for sheep in cluster.sheep:
                wait_until(lambda sheep=sheep: not sheep.running, "the sheep to end")
            for index in range(3):
                cluster.restart(index, wait=False)
            cluster.wait_recovered()
            check_scene(cluster, 2)
        for index in range(3):
            cluster.sheep[index].signal(signal.SIGKILL)
            cluster.sheep[index].end(signal.SIGKILL)

    assert census["tree"] == census["plain"]


@pytest.fixture(scope="module")
def two(start_cluster: Callable[..., SheepCluster]) -> SheepCluster:
    """Two nodes."""
    return start_cluster(2, driver="local", store="plain", redundancy="2")


def test_format_again(two: SheepCluster) -> None:
    """ST-2: a format with the other store removes the old files, and back."""
    for store, other in (("plain", "tree"), ("tree", "plain"), ("plain", "tree")):
        two.dog("cluster", "format", "-f", "-b", store, "-c", "2")
        assert all(files(sheep.directory) == [] for sheep in two.sheep)
        two.dog("vdi", "create", "-P", "alpha", "8M")
        data = data_oid(vid_of_name(two, "alpha"), 0)
        name = Path(f"{data:016x}")
        where = name if store == "plain" else Path(f"{data >> 32 & 0xFF:02x}") / name
        assert all(where in files(sheep.directory) for sheep in two.sheep), (store, other)
        two.restart(1)
        two.wait_recovered()
        assert read_all(two, "alpha", node=1) == bytes(8 * MiB)


def test_options(two: SheepCluster) -> None:
    """ST-3: long options equal the short ones; an unknown store is refused with the list, and changes nothing."""
    two.dog("cluster", "format", "-f", "--store", "tree", "--copies", "2")
    long = two.dog("cluster", "info", "-v").stdout.split(b"Cluster created")[0]
    two.dog("cluster", "format", "-f", "-b", "tree", "-c", "2")
    assert two.dog("cluster", "info", "-v").stdout.split(b"Cluster created")[0] == long
    assert b"tree" in long
    two.dog("vdi", "create", "kept", "8M")

    refused = two.dog("cluster", "format", "-f", "-b", "nonsense", check=False)

    text = refused.stdout + refused.stderr
    assert refused.returncode == 2, text
    assert b"plain" in text and b"tree" in text
    assert b"kept" in two.dog("vdi", "list").stdout


def test_failing_operation_leaves_nothing(two: SheepCluster) -> None:
    """ST-4: after a restart, a clone onto a name that exists fails and leaves the census as it was."""
    two.dog("cluster", "format", "-f", "-b", "tree", "-c", "2")
    two.dog("vdi", "create", "alpha", "8M")
    write(two, "alpha", 0, pattern(1, MiB))
    two.dog("vdi", "snapshot", "-s", "t", "alpha")
    two.dog("vdi", "create", "beta", "8M")
    two.restart(0)
    two.wait_recovered()
    before = two.census()

    failed = two.dog("vdi", "clone", "-s", "t", "alpha", "beta", check=False)

    assert failed.returncode != 0
    assert two.census() == before


def test_convert_one_node(two: SheepCluster) -> None:
    """The store of a stopped sheep is converted to tree and back; the cluster goes on with both kinds together."""
    two.dog("cluster", "format", "-f", "-b", "plain", "-c", "2")
    two.dog("vdi", "create", "alpha", "16M")
    content = pattern(70, 9 * MiB)
    write(two, "alpha", 0, content)
    two.dog("vdi", "snapshot", "-s", "t", "alpha")
    two.dog("vdi", "setattr", "alpha", "key", "value")
    directory = two.sheep[1].directory
    running = two.dog("upgrade", "store-convert", str(directory), "tree", check=False)
    assert running.returncode != 0 and b"another sheep daemon" in running.stderr

    for store in ("tree", "plain"):
        two.stop(1)
        before = {path.name for path in files(directory)}
        two.dog("upgrade", "store-convert", str(directory), store)
        assert {path.name for path in files(directory)} == before
        assert all((path.parent == Path(".")) == (store == "plain") for path in files(directory))
        two.dog("upgrade", "store-convert", str(directory), store)  # nothing left to do
        two.restart(1)
        two.wait_recovered()
        write(two, "alpha", 9 * MiB, pattern(71, 1000), node=1)
        assert read(two, "alpha", 0, 9 * MiB, node=1) == content
        assert read(two, "alpha", 0, 9 * MiB, node=1, tag="t") == content
        assert two.dog("vdi", "getattr", "alpha", "key", node=1).stdout.strip() == b"value"
    assert two.dog("upgrade", "store-convert", str(directory), "other", check=False).returncode == 64
    assert two.dog("upgrade", "store-convert", str(directory / "obj"), "tree", check=False).returncode == 64


def test_other_layout(two: SheepCluster) -> None:
    """A sheep started with another store than its objects were written by refuses, says what to do, and touches
    nothing; with the right one it goes on."""
    two.dog("cluster", "format", "-f", "-b", "plain", "-c", "2")
    two.dog("vdi", "create", "alpha", "8M")
    content = pattern(80, 5 * MiB)
    write(two, "alpha", 0, content)
    sheep = two.sheep[1]
    node_config = sheep.directory / "node_config"
    node_config.unlink(missing_ok=True)  # of a conversion
    two.stop(1)
    before = sorted((sheep.directory / "obj").rglob("*"))
    two.options = ("--store", "tree")
    two.restart(1, wait=False)
    assert sheep.process is not None and sheep.process.wait(30) == 1
    assert "in the places of another store" in sheep.log_tail() and "store-convert" in sheep.log_tail()
    assert sorted((sheep.directory / "obj").rglob("*")) == before

    two.options = ()
    two.restart(1)
    two.wait_recovered()
    assert read(two, "alpha", 0, 5 * MiB, node=1) == content
