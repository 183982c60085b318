"""The table's part about disks that are full or fail: the last sheep's directory is a small file system of its own."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

from faults import Fault, Scene
from loop_disk import LoopDisk
from recovery_scenes import exited, in_place, shards
from scenes import MiB, pattern, vid_of_name

from sheepdog.model.ids import is_data, vid_of
from sheepdog.model.ring import DiskRing
from sheepdog.testing.cluster import wait_until
from sheepdog.wire.results import Result

DISK_BYTES = 40 * MiB
WEIGHT_ATTRIBUTE = "user.md.size"


@dataclass
class DiskScene(Scene):
    """A scene whose last sheep has all it owns on one small disk.

    :param second: another small disk, which that sheep does not use yet.
    """

    disk: LoopDisk | None = None
    second: LoopDisk | None = None


def _disk(scene: Scene) -> tuple[LoopDisk, LoopDisk, int]:
    assert isinstance(scene, DiskScene) and scene.disk is not None and scene.second is not None
    return scene.disk, scene.second, len(scene.cluster.sheep) - 1


def disk_full(scene: Scene) -> None:
    """A full disk refuses new objects with a clear message; objects that exist are written on. When another node dies
    meanwhile, writes to what finds no room are refused and not left waiting, and it is copied as soon as there is
    space (MD-13). Nothing stays of the volume that filled it, once that is deleted: neither objects whose creation was
    refused by some holder, nor those that could not be released at that moment."""
    cluster = scene.cluster
    cluster.dog("vdi", "create", "filler", "128M")
    refused = cluster.dog(
        "vdi", "write", "filler", "0", str(128 * MiB), input=pattern(1, 128 * MiB), node=0, check=False
    )
    vid = vid_of_name(cluster, "filler")
    assert refused.returncode != 0
    assert b"Server has no space for new objects" in refused.stdout + refused.stderr
    scene.busy()
    cluster.kill(0)
    cluster.wait_members()
    scene.busy(2)
    assert len(cluster.live) == len(cluster.sheep) - 1, "a full disk ends nobody"
    cluster.dog("vdi", "delete", "filler")
    in_place(cluster, scene.copies)
    scene.come_back(0)

    def left() -> list[int]:
        return [
            oid
            for sheep in cluster.live
            for oid, _ in shards(cluster, sheep.index)
            if is_data(oid) and vid_of(oid) == vid
        ]

    wait_until(lambda: not left(), "all objects of the deleted volume to be gone", timeout_s=40)


def only_disk_fails(scene: Scene) -> None:
    """The only disk of a node answers with I/O errors: the node leaves in order, nobody's write fails (MD-4, MD-15)."""
    disk, _, victim = _disk(scene)
    epoch = scene.cluster.epoch(0)
    disk.fail()
    assert exited(scene.cluster, victim) == 0
    scene.cluster.wait_recovered()
    assert scene.cluster.epoch(0) == epoch + 1
    scene.busy()
    disk.mend()
    scene.come_back(victim)


def only_disk_turns_read_only(scene: Scene) -> None:
    """The same when the file system gives up writing (MD-15)."""
    disk, _, victim = _disk(scene)
    disk.turn_read_only()
    assert exited(scene.cluster, victim) == 0
    scene.cluster.wait_recovered()
    scene.busy()
    disk.mend()
    scene.come_back(victim)


def _in_demand(scene: Scene, second: LoopDisk, victim: int) -> str:
    """A directory on the second disk that would get at least half of the guests' objects that the node has.

    What a disk gets follows from its path. One with nothing that anybody uses may fail and is not missed.
    """
    cluster = scene.cluster
    vids = {vid_of_name(cluster, name) for name in scene.load.names()}
    oids = {oid for oid, _ in shards(cluster, victim) if is_data(oid) and vid_of(oid) in vids}
    first = str(cluster.sheep[victim].directory / "obj")
    weight = int.from_bytes(os.getxattr(first, WEIGHT_ATTRIBUTE), "little")
    room = os.statvfs(second.place)

    def taken(path: str) -> int:
        ring = DiskRing(((first, weight), (path, room.f_frsize * room.f_bavail)))
        return sum(ring.disk_of(oid) == path for oid in oids)

    assert oids, "the guests have written"
    paths = (str(second.place / str(number)) for number in itertools.count())
    return next(path for path in paths if 2 * taken(path) >= len(oids))


def one_of_two_disks_fails(scene: Scene) -> None:
    """One of two disks answers with I/O errors: the node stays, the epoch too, and while the lost copies are made
    again on the disk that is left another node dies and returns (MD-3, MD-7, MD-15)."""
    _, second, victim = _disk(scene)
    cluster = scene.cluster
    path = _in_demand(scene, second, victim)

    def in_use() -> bool:
        return path in cluster.dog("node", "md", "info", node=victim).stdout.decode()

    cluster.dog("node", "md", "plug", path, input=b"yes\n", node=victim)
    assert in_use()
    cluster.wait_recovered()
    epoch = cluster.epoch(0)
    second.fail()
    wait_until(lambda: not in_use(), "the disk to be taken out")
    assert cluster.epoch(victim) == epoch
    cluster.kill(1)
    cluster.wait_members()
    scene.busy()
    scene.come_back(1)
    second.unmount()  # what is still on it is not to be counted


DISK_FAILED = (
    r"disk .* failed",
    r"cannot write .*recovery",
    r"journal: .*; going on without a journal",  # of strips
    r"the journal file .* cannot be removed",
)
DISKS = (
    Fault(only_disk_fails, DISK_FAILED),
    Fault(only_disk_turns_read_only, DISK_FAILED),
    Fault(one_of_two_disks_fails, DISK_FAILED),
    Fault(disk_full, refusals=(Result.NO_SPACE,)),
)
