"""``sheep -D``: aligned I/O to data objects passes the page cache, everything else works as ever (cli-sheep, 2.3)."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from scenes import MiB, pattern, read, read_all, volume, write

from sheepdog.testing.cluster import SheepCluster

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]


def device_bytes(pid: int | str) -> int:
    """What the process has read from block devices so far."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def goes_to_a_device(directory: Path) -> bool:
    """Whether direct reads of files there are counted as such: not on tmpfs, for example."""
    path = directory / "probe"
    path.write_bytes(bytes(MiB))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        os.fsync(fd)
        before = device_bytes("self")
        with mmap.mmap(-1, MiB) as buffer:
            os.preadv(fd, [buffer], 0)
        return device_bytes("self") - before >= MiB
    finally:
        os.close(fd)
        path.unlink()


@pytest.mark.parametrize(("store", "redundancy"), [("plain", "2"), ("plain", "2:1"), ("tree", "2"), ("tree", "2:1")])
def test_direct_io(fresh_cluster: Callable[..., SheepCluster], store: str, redundancy: str) -> None:
    """Writes of every alignment, flushed and past the cache, read back the same through every node, also after a death
    and a return; reading twice reads the device twice."""
    cluster = fresh_cluster(3, store=store, redundancy=redundancy, sync=True, options=("-D",))
    cluster.format("-z", "20")
    size = 3 * MiB + 512
    cluster.dog("vdi", "create", "direct", str(size))
    content = bytearray(size)
    chosen = random.Random(4)
    with volume(cluster, "direct") as opened:
        for number in range(60):
            unit = chosen.choice((1, 512, 4096, 65536))
            length = min(unit * chosen.randint(1, 9), size)
            offset = chosen.randrange(0, size - length + 1) // unit * unit
            data = pattern(number, length)
            opened.write(offset, data)
            content[offset : offset + length] = data
            assert opened.read(offset, length) == data
        opened.write(MiB, bytes(MiB))  # zeros are written, too
        content[MiB : 2 * MiB] = bytes(MiB)
    for node in range(3):
        assert read_all(cluster, "direct", node=node) == content

    if goes_to_a_device(cluster.base):
        content[: 2 * MiB] = pattern(98, 2 * MiB)  # holes and reserved blocks cost no I/O
        write(cluster, "direct", 0, bytes(content[: 2 * MiB]))
        processes = [sheep.process for sheep in cluster.sheep]
        read(cluster, "direct", 0, 2 * MiB)
        before = sum(device_bytes(process.pid) for process in processes if process is not None)
        for _ in range(2):
            read(cluster, "direct", 0, 2 * MiB)
        after = sum(device_bytes(process.pid) for process in processes if process is not None)
        assert after - before >= 2 * 2 * MiB, "read from the page cache"
    assert "direct I/O is not possible" not in cluster.logs()

    cluster.kill(1)
    cluster.wait_recovered()
    write(cluster, "direct", 700, pattern(99, 70_000), node=2)
    content[700:70_700] = pattern(99, 70_000)
    cluster.restart(1)
    cluster.wait_recovered()
    for node in range(3):
        assert read_all(cluster, "direct", node=node) == content
    assert cluster.dog("vdi", "check", "direct").stdout == b"finish check&repair direct\n"
