"""Vnodes that belong to disks (``sheep --disk-vnodes``): the weight of a node follows its disks by itself."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
from builders import stores
from recovery_scenes import MiB, all_agree, exited, fill, in_place, nodes, same_everywhere, shards
from scenes import pattern, wait_serving

from sheepdog.model.ids import data_oid, inode_oid, is_data
from sheepdog.model.ring import Ring
from sheepdog.testing.cluster import SheepCluster, wait_until
from sheepdog.wire.opcodes import Op

pytestmark = [pytest.mark.processes, pytest.mark.matrix, pytest.mark.timeout(120)]

Start = Callable[..., SheepCluster]
T = TypeVar("T")

GiB = 1 << 30
SIZES = ((512, 256), (256, 384), (1000, 2))  # GiB; of the disks of each sheep
VNODES = (128 + 64, 64 + 96, 250 + 1)  # one for 4 GiB of each disk, or a part of them


def weighed(directory: Path, size: int) -> Path:
    """A disk that counts as one of that size when it is first used."""
    directory.mkdir(parents=True)
    os.setxattr(directory, "user.md.size", size.to_bytes(8, "little"))
    return directory


def three(start: Start, base: Path) -> SheepCluster:
    """Three sheep with two disks each, 2 copies or strips 2:1."""
    disks = [
        [weighed(base / f"disk{index}{letter}", size * GiB) for letter, size in zip("ab", sizes, strict=True)]
        for index, sizes in enumerate(SIZES)
    ]
    cluster = start(3, base=base, copies=2, disks=disks, options=("--disk-vnodes",))
    cluster.format()
    return cluster


def vnodes(cluster: SheepCluster, index: int = 0) -> tuple[int, ...]:
    """As one sheep lists them, in the order of the sheep."""
    by_port = {node.id.port: node.vnodes for node in nodes(cluster, index)}
    return tuple(by_port.get(sheep.port, 0) for sheep in cluster.sheep)


def changed(cluster: SheepCluster, epoch: int, wanted: tuple[int, ...]) -> None:
    """In that epoch the sheep have so many vnodes, everybody agrees, and everything is where it belongs."""
    wait_until(lambda: cluster.epoch(cluster.live[0].index) >= epoch, f"epoch {epoch}")
    in_place(cluster, 2)
    all_agree(cluster)
    for sheep in cluster.live:
        assert cluster.epoch(sheep.index) == epoch
        assert vnodes(cluster, sheep.index) == wanted


def on_own_disks(cluster: SheepCluster) -> None:
    """Every data object lies on the disk of its sheep that owns the next position after it, once it was looked at.

    Positions are those of the format's description, not ours.
    """
    for sheep in cluster.live:
        with cluster.connect(sheep.index) as connection:
            for oid in {oid for oid, _ in shards(cluster, sheep.index)}:
                assert connection.request(Op.EXIST, oid=oid).result == 0
        owners: dict[int, Path] = {}
        for disk in sheep.disks:
            size = int.from_bytes(os.getxattr(disk, "user.md.size"), "little")
            owners |= dict.fromkeys(stores.disk_positions(sheep.port, str(disk), size), disk)
        for (oid, _), path in shards(cluster, sheep.index).items():
            if is_data(oid):
                assert following(owners, oid) in Path(path).parents, f"{oid:016x} is at {path}"


def following(owners: dict[int, T], oid: int) -> T:
    """Who owns the first position at or after the object."""
    place = stores.next_position(stores.fnv(oid.to_bytes(8, "little")))
    return owners[min((at for at in owners if at >= place), default=min(owners))]


def shut_down(cluster: SheepCluster) -> None:
    """All sheep have ended in order."""
    cluster.dog("cluster", "shutdown")
    for sheep in cluster.sheep:
        assert exited(cluster, sheep.index) == 0


def start_again(cluster: SheepCluster) -> None:
    """All sheep run."""
    for sheep in cluster.sheep:
        cluster.restart(sheep.index, wait=False)
    cluster.wait_members()


def test_disks_come_and_go(fresh_cluster: Start, tmp_path: Path) -> None:
    """Weights follow the sizes of disks; plugging, unplugging and losing one makes an epoch with other weights, without
    a reweight, after which everything is where it belongs and nothing is lost; dog tells the disks of each node."""
    cluster = three(fresh_cluster, tmp_path)
    contents = {"a": fill(cluster, "a", 1, size=64 * MiB), "b": fill(cluster, "b", 2, size=64 * MiB, node=1)}
    changed(cluster, 1, VNODES)
    on_own_disks(cluster)
    ports = sorted((sheep.port, number) for sheep, number in zip(cluster.sheep, VNODES, strict=True))
    info = cluster.dog("cluster", "info", "-v").stdout.decode()
    assert "Cluster vnodes strategy: auto\nCluster vnode mode: disk\n" in info
    assert info.endswith(f"[{', '.join(f'127.0.0.1:{port}:{number}(2)' for port, number in ports)}]\n")
    listed = json.loads(cluster.dog("node", "list", "--json").stdout)
    assert [(row["vnodes"], row["disks"], row["space"]) for row in listed] == [
        (number, 2, sum(SIZES[VNODES.index(number)]) * GiB) for _, number in ports
    ]
    paths = cluster.dog("node", "md", "info", "-r", node=1).stdout.decode()
    assert [line.rpartition(" ")[2] for line in paths.splitlines()] == list(map(str, cluster.sheep[1].disks))

    more = weighed(tmp_path / "disk0more", 800 * GiB)
    cluster.dog("node", "md", "plug", str(more), input=b"yes\n", node=0)
    cluster.sheep[0].disks += (more,)
    changed(cluster, 2, (VNODES[0] + 200, *VNODES[1:]))
    assert [path for (oid, _), path in shards(cluster, 0).items() if is_data(oid) and path.startswith(str(more))]
    same_everywhere(cluster, contents)
    on_own_disks(cluster)

    gone, *kept = cluster.sheep[0].disks
    cluster.dog("node", "md", "unplug", str(gone), input=b"yes\n", node=0)
    shutil.rmtree(gone)
    cluster.sheep[0].disks = tuple(kept)
    changed(cluster, 3, (264, *VNODES[1:]))
    contents["c"] = fill(cluster, "c", 3, size=32 * MiB, node=2)
    same_everywhere(cluster, contents)

    lost, kept_one = cluster.sheep[1].disks
    shutil.rmtree(lost)
    cluster.sheep[1].disks = (kept_one,)
    same_everywhere(cluster, contents)
    changed(cluster, 4, (264, 96, VNODES[2]))
    same_everywhere(cluster, contents)
    on_own_disks(cluster)
    rows = cluster.dog("cluster", "info", "-r", node=2).stdout.decode().splitlines()[2:]
    assert [row.count("(2)") for row in rows] == [2, 3, 2, 3]
    assert "(3)" in rows[2] and "(1)" in rows[0]


def test_nodes_come_and_go(fresh_cluster: Start, tmp_path: Path) -> None:
    """Nodes die and return, the whole cluster restarts, also with a disk less; epoch files have records of 592 bytes,
    and a sheep, a gateway or a store of the other kind is refused with a word on what to do."""
    cluster = three(fresh_cluster, tmp_path)
    contents = {"a": fill(cluster, "a", 4, size=64 * MiB)}
    cluster.kill(2)
    changed(cluster, 2, (*VNODES[:2], 0))
    same_everywhere(cluster, contents)

    cluster.options = ()
    cluster.restart(2, wait=False)
    assert exited(cluster, 2) == 1
    assert "exists data format mismatch" in cluster.sheep[2].log_tail()
    shutil.move(cluster.sheep[2].directory, tmp_path / "aside")
    cluster.restart(2, wait=False)
    assert exited(cluster, 2) == 1
    assert "every sheep of this cluster is started with --disk-vnodes" in cluster.sheep[2].log_tail()
    shutil.rmtree(cluster.sheep[2].directory)
    shutil.move(tmp_path / "aside", cluster.sheep[2].directory)
    cluster.options = ("--disk-vnodes",)
    disks = cluster.sheep[2].disks
    cluster.sheep[2].disks = tuple(tmp_path / f"many{number}" for number in range(33))
    cluster.restart(2, wait=False)
    assert exited(cluster, 2) == 1
    assert "33 disks; with --disk-vnodes a sheep has at most 32" in cluster.sheep[2].log_tail()
    cluster.sheep[2].disks = disks
    assert cluster.epoch(0) == 2

    cluster.restart(2)
    changed(cluster, 3, VNODES)
    files = {path.name: path.stat().st_size for path in (cluster.sheep[0].directory / "epoch").iterdir()}
    assert files == {"00000001": 3 * 592 + 8, "00000002": 2 * 592 + 8, "00000003": 3 * 592 + 8}
    newest = str(cluster.sheep[0].directory / "epoch" / "00000003")
    for oid in (1, 2, 3, 4):
        (first,) = Ring(nodes(cluster, 0)).holders(oid, 1)
        said = cluster.dog("upgrade", "object-location", newest, f"{oid:x}").stderr.decode()
        assert said.endswith(f" port:{first.id.port}\n")
    same_everywhere(cluster, contents)

    shut_down(cluster)
    start_again(cluster)
    changed(cluster, 3, VNODES)
    same_everywhere(cluster, contents)

    shut_down(cluster)
    lost, kept = cluster.sheep[0].disks
    shutil.rmtree(lost)
    cluster.sheep[0].disks = (kept,)
    start_again(cluster)
    changed(cluster, 4, (64, *VNODES[1:]))
    same_everywhere(cluster, contents)
    on_own_disks(cluster)


def test_built_store(tmp_path: Path) -> None:
    """Store directories of the format's description alone, with every object where the description's ring of disks
    wants it, open in the epoch in which they were left: all is there, nothing is moved and no epoch begins."""
    sizes = ((40, 12), (4, 61))
    disks = [[tmp_path / f"disk{index}{letter}" for letter in "ab"] for index in range(2)]
    cluster = SheepCluster(
        2, driver="local", base=tmp_path, store="plain", redundancy="1", disks=disks, options=("--disk-vnodes",)
    )
    try:
        builders, records, owners = [], [], {}
        for sheep, weights in zip(cluster.sheep, sizes, strict=True):
            known = dict(zip(sheep.disks, (size * GiB for size in weights), strict=True))
            builders.append(stores.StoreBuilder(sheep.directory, known))
            for number, (disk, size) in enumerate(known.items()):
                positions = stores.disk_positions(sheep.port, str(disk), size)
                owners |= dict.fromkeys(positions, (sheep.index, number))
            vnodes, space = sum(-(-size // 4) for size in weights), sum(weights) * GiB
            record = stores.node(sheep.port, vnodes=vnodes, zone=sheep.zone, space=space)
            records.append(
                (sheep.port, stores.node_with_disks(record, [(stores.disk_id(str(d)), s) for d, s in known.items()]))
            )
        vid, content = 0x7C2B25, pattern(7, 40 * MiB)
        objects = {data_oid(vid, index): content[index * MiB : (index + 1) * MiB] for index in range(40)}
        names = dict.fromkeys(range(40), vid)
        objects[inode_oid(vid)] = stores.inode(b"test", vid=vid, size=40 * MiB, shift=20, owners=names)
        for oid, data in objects.items():
            index, number = following(owners, oid)
            builders[index].put(oid, data, disk=number)
        for builder, weights in zip(builders, sizes, strict=True):
            space = sum(weights) * GiB
            builder.config(stores.config_file(ctime=1795339442 << 32, flags=0x06, clean=True, shift=20, space=space))
            builder.epoch(1, stores.epoch_file([record for _, record in sorted(records)], 1795339442))
        placed = [shards(cluster, index) for index in range(2)]
        assert len({Path(path).parent for found in placed for path in found.values()}) > 1, "the ring spreads them"
        cluster.start()
        for index in range(2):
            wait_serving(cluster, index)

        same_everywhere(cluster, {"test": content})
        assert cluster.dog("vdi", "check", "test").stdout == b"finish check&repair test\n"
        assert [cluster.epoch(index) for index in range(2)] == [1, 1]
        assert [shards(cluster, index) for index in range(2)] == placed
        assert [cluster.stop(index) for index in range(2)] == [0, 0]
    finally:
        cluster.close()
