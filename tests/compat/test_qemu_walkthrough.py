"""Old QEMU's sheepdog driver against a cluster: the scenarios QEMU-1 to QEMU-5, by a client that follows its steps.

The driver itself is gone from today's QEMU; what it sent when it existed is replayed by ``test_replay_sessions``.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sheepdog.testing.cluster import SheepCluster, wait_until

sys.path.insert(0, str(Path(__file__).parent))

from qemu_client import NEW_VDI, QemuDisk, QemuError, Server

pytestmark = [pytest.mark.processes, pytest.mark.timeout(240)]

MiB = 1024 * 1024
NO_VDI = 0x08


@pytest.fixture(scope="module")
def cluster() -> Iterator[SheepCluster]:
    """Three nodes, two copies, objects of 1 MiB."""
    with SheepCluster(3, driver="local", store="plain", redundancy="2") as cluster:
        cluster.format("-z", "20")
        yield cluster
        logs = [one.log_path.read_text(errors="replace") for one in cluster.sheep]
        assert not any("Traceback" in log for log in logs)


def tcp(cluster: SheepCluster, node: int) -> Server:
    return Server(cluster.address(node))


def unix(cluster: SheepCluster, node: int) -> Server:
    return Server(f"unix:{cluster.sheep[node].directory}/sock")


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


class Copy:
    """A disk, and what must be on it."""

    def __init__(self, disk: QemuDisk) -> None:
        self.disk = disk
        self.content = bytearray(disk.inode.vdi_size)

    def write(self, offset: int, data: bytes) -> None:
        self.disk.write(offset, data)
        self.content[offset : offset + len(data)] = data

    def scatter(self, seed: int, count: int, longest: int = 3 * MiB) -> None:
        dice = random.Random(seed)
        for _ in range(count):
            data = dice.randbytes(dice.randint(1, longest))
            self.write(dice.randrange(len(self.content) - len(data)), data)

    def check(self) -> None:
        assert self.disk.read(0, len(self.content)) == self.content


def test_life_of_an_image(cluster: SheepCluster) -> None:
    """QEMU-1, QEMU-4: an image is created, preallocated, written, flushed, grown, discarded from, converted over the
    Unix socket of another node into a second image, and closed; dog reads the same."""
    server = tcp(cluster, 0)
    server.create("image", 16 * MiB)
    with pytest.raises(QemuError) as refused:
        QemuDisk(server, "other")
    assert refused.value.result == NO_VDI
    image = Copy(QemuDisk(server, "image"))
    for at in range(0, 16 * MiB, 4 * MiB):  # as preallocation does: what is read is written
        image.disk.write(at, image.disk.read(at, 4 * MiB))
    image.scatter(1, 20)
    assert not image.disk.flush()
    assert not image.disk.flush()
    image.disk.truncate(24 * MiB)
    image.content += bytes(8 * MiB)
    image.write(20 * MiB + 5, b"behind the old end")
    image.disk.discard(3 * MiB, 2 * MiB)
    image.content[3 * MiB : 5 * MiB] = bytes(2 * MiB)
    image.check()

    far = unix(cluster, 1)
    source = QemuDisk(far, "image")
    far.create("converted", source.inode.vdi_size)
    target = QemuDisk(far, "converted")
    for at in range(0, source.inode.vdi_size, 2 * MiB):
        part = source.read(at, 2 * MiB)
        if any(part):
            target.write(at, part)
    for one in (source, target, image.disk):
        one.close()
    for name in ("image", "converted"):
        assert cluster.dog("vdi", "read", name, node=2).stdout == image.content
    cluster.dog("vdi", "check", "image")


def test_snapshots_and_branches(cluster: SheepCluster) -> None:
    """QEMU-1, QEMU-2: snapshots by the client and by dog beside it, listed by walking the numbers; read by tag and by
    id; writing to an opened snapshot starts a branch, and every snapshot stays what it was."""
    server = tcp(cluster, 0)
    server.create("branchy", 12 * MiB)
    image = Copy(QemuDisk(server, "branchy"))
    states = {}
    for number in range(3):
        image.scatter(10 + number, 6, MiB)
        states[f"s{number}"] = bytes(image.content)
        if number == 1:
            cluster.dog("vdi", "snapshot", "-s", "s1", "branchy", node=1)  # the client learns of it by READONLY
        else:
            image.disk.snapshot(f"s{number}")
    image.scatter(20, 6, MiB)
    image.check()
    assert server.snapshots("branchy") == [(1, "s0"), (2, "s1"), (3, "s2")]
    for number, (tag, content) in enumerate(states.items(), 1):
        for snapshot in (tag, str(number)):
            opened = QemuDisk(unix(cluster, 2), "branchy", snapshot)
            assert opened.read(0, len(content)) == content
    image.disk.close()

    branch = Copy(QemuDisk(server, "branchy", "s0"))
    branch.content[:] = states["s0"]
    branch.write(MiB - 100, b"on the branch" * 20)
    branch.scatter(30, 4, MiB)
    branch.check()
    branch.disk.close()
    assert server.snapshots("branchy") == [(1, "s0"), (2, "s1"), (3, "s2")]
    assert cluster.dog("vdi", "read", "branchy", node=1).stdout == branch.content
    for tag, content in states.items():
        assert cluster.dog("vdi", "read", "-s", tag, "branchy", node=2).stdout == content


def test_vm_state(cluster: SheepCluster) -> None:
    """QEMU-4: the state of a machine is saved with a snapshot and loaded after going back to it; the disk is as it was
    then, and later work does not touch it."""
    server = tcp(cluster, 1)
    server.create("machine", 8 * MiB)
    machine = Copy(QemuDisk(server, "machine"))
    machine.scatter(40, 6, MiB)
    saved, state = bytes(machine.content), noise(41, 2 * MiB + 4321)
    machine.disk.save_vm_state(state)
    machine.disk.snapshot("running", vm_state_bytes=len(state))
    machine.scatter(42, 6, MiB)

    machine.disk.go_to("running")
    machine.content[:] = saved
    machine.check()
    assert machine.disk.load_vm_state(len(state)) == state
    machine.scatter(43, 4, MiB)
    machine.check()
    machine.disk.close()
    assert cluster.dog("vdi", "read", "-s", "running", "machine").stdout == saved


def test_large_image_read_elsewhere(cluster: SheepCluster) -> None:
    """QEMU-3: 300 MB written in order through one node are read through another, by both kinds of socket."""
    server = tcp(cluster, 0)
    server.create("large", 300 * MiB)
    disk = QemuDisk(server, "large")
    blocks = [noise(50 + number, 4 * MiB) for number in range(5)]
    for number in range(75):
        disk.write(number * 4 * MiB, blocks[number % 5])
    disk.close()
    for other in (tcp(cluster, 1), unix(cluster, 2)):
        reader = QemuDisk(other, "large")
        for number in range(75):
            assert reader.read(number * 4 * MiB, 4 * MiB) == blocks[number % 5]
        reader.close()
    cluster.dog("vdi", "delete", "large")


def test_large_objects(cluster: SheepCluster) -> None:
    """QEMU-1, VDI-17: an image with objects of 128 MiB: more than 64 MiB are written and read in one request, and the
    copy that a write after a snapshot makes of a whole object comes from and goes to other nodes."""
    for node in range(3):  # whichever of them holds the object: at least one of the three does not
        name = f"objects{node}"
        server = tcp(cluster, node)
        server.vdi(NEW_VDI, name, size=128 * MiB, shift=27)
        image = Copy(QemuDisk(server, name))
        image.write(10 * MiB, noise(70 + node, 66 * MiB))
        if node == 2:
            image.disk.snapshot("whole")
            saved = bytes(image.content)
            image.write(20 * MiB, b"after the snapshot")
            assert cluster.dog("vdi", "read", "-s", "whole", name, node=1).stdout == saved
        image.check()
        image.disk.close()
        assert cluster.dog("vdi", "read", name, node=(node + 1) % 3).stdout == image.content
        cluster.dog("vdi", "delete", name)


def test_nodes_come_and_go(cluster: SheepCluster) -> None:
    """QEMU-5: while an image is written its node's peers are killed and come back, then its own node: the client only
    waits, reconnects and sends again, and everything it was told is there."""
    server = tcp(cluster, 0)
    server.create("lively", 12 * MiB)
    image = Copy(QemuDisk(server, "lively"))
    image.scatter(60, 6, MiB)
    stop = threading.Event()
    failure: list[BaseException] = []
    rounds = 0

    def guest() -> None:
        nonlocal rounds
        try:
            while not stop.is_set():
                image.scatter(1000 + rounds, 1, MiB)
                rounds += 1
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=guest)
    thread.start()

    def after_some_writes() -> None:
        before = rounds
        wait_until(lambda: rounds > before + 3 or bool(failure), "the guest to go on")

    try:
        for node in (1, 2, 0):
            after_some_writes()
            cluster.kill(node)
            if node:
                after_some_writes()
            cluster.restart(node)
            after_some_writes()
            cluster.wait_recovered()
    finally:
        stop.set()
        thread.join(120)
    assert not failure
    assert image.disk.reconnected
    image.check()
    image.disk.close()
    for node in range(3):
        assert cluster.dog("vdi", "read", "lively", node=node).stdout == image.content
    assert cluster.dog("vdi", "check", "lively").stdout == b"finish check&repair lively\n"
