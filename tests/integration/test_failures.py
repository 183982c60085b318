"""Sheep die by ``kill -9`` and come back while clients write: no client error, nothing acknowledged is lost, every copy
is where it belongs (behaviours MEM-1, MEM-13, MEM-15, MEM-24, REC-1, REC-8, GW-1, INV-1 to INV-6)."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from scenes import (
    Background,
    KiB,
    LiveClient,
    MiB,
    live_inodes,
    only,
    pattern,
    read_all,
    referenced,
    rows,
    stored,
    vid_of_name,
    wait_stored,
    write,
)

from sheepdog.client import admin
from sheepdog.errors import TransportError
from sheepdog.model.ids import data_oid
from sheepdog.model.ring import Ring
from sheepdog.testing.cluster import SheepCluster, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.matrix, pytest.mark.timeout(180)]


class Writer:
    """Overwrites random pieces of a volume and knows what must be there.

    When its gateway dies it goes to another one and sends again what was not acknowledged.
    """

    def __init__(self, cluster: SheepCluster, name: str, size: int, *, node: int) -> None:
        self.content = bytearray(size)
        self._cluster = cluster
        self._name = name
        self._random = random.Random(name)
        self._client = LiveClient(cluster, name, node=node)
        self.moves = 0

    def step(self, number: int) -> None:
        length = self._random.randint(1, 64 * KiB)
        offset = self._random.randrange(len(self.content) - length)
        data = number.to_bytes(4, "little") * (length // 4 + 1)
        data = data[:length]
        while True:
            try:
                self._client.write(offset, data)
                break
            except TransportError:
                self._move()
        self.content[offset : offset + length] = data

    def _move(self) -> None:
        self.moves += 1
        self._client.close()

        def connected() -> bool:
            for sheep in self._cluster.live:
                try:
                    self._client = LiveClient(self._cluster, self._name, node=sheep.index)
                except TransportError:
                    continue
                return True
            return False

        wait_until(connected, "another gateway")

    def close(self) -> None:
        self._client.close()


def check_everything(cluster: SheepCluster, contents: dict[str, bytes]) -> None:
    """INV-1, INV-2, INV-4: every node reads the same, every copy or strip is where the ring says and nowhere else, and
    dog finds nothing to repair."""
    for name, content in contents.items():
        for sheep in cluster.live:
            assert read_all(cluster, name, node=sheep.index) == content, f"{name} through sheep {sheep.index}"
        assert cluster.dog("vdi", "check", name).stdout == f"finish check&repair {name}\n".encode()
    with cluster.connect(cluster.live[0].index) as connection:
        nodes = admin.node_list(connection.request)
    ring = Ring(nodes)
    by_port = {sheep.port: sheep.index for sheep in cluster.sheep}
    wanted: dict[tuple[int, int], set[int]] = {}
    for oid in referenced(live_inodes(cluster)):
        for position, node in enumerate(ring.holders(oid, cluster.shards)):
            strip = position if cluster.needed > 1 else -1
            wanted.setdefault((oid, strip), set()).add(by_port[node.id.port])
    oids = {oid for oid, _ in wanted}

    def placed() -> dict[tuple[int, int], set[int]]:
        live = {sheep.index for sheep in cluster.live}
        census = {key: live & set(holders) for key, holders in cluster.census().items() if key[0] in oids}
        return {key: holders for key, holders in census.items() if holders}

    try:
        wait_until(lambda: placed() == wanted, "every copy in its place")
    except AssertionError as error:
        have = placed()
        wrong = {key for key in have.keys() | wanted.keys() if have.get(key) != wanted.get(key)}
        for oid, strip in sorted(wrong):
            key = (oid, strip)
            error.add_note(f"oid={oid:016x} strip={strip}: is at {have.get(key)}, belongs to {wanted.get(key)}")
        raise


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., SheepCluster]) -> SheepCluster:
    """Three nodes in three zones, 2 copies or strips 2:1, objects of 1 MiB."""
    cluster = start_cluster(3, copies=2)
    cluster.format("-z", "20")
    return cluster


def test_written_here_read_everywhere(cluster: SheepCluster) -> None:
    """INV-1: what one gateway acknowledged every other one returns at once, new objects and overwritten ones."""
    cluster.dog("vdi", "create", "every", "6M")
    content = bytearray(6 * MiB)
    for number in range(12):
        data = pattern(number, 40 * KiB)
        offset = (number * 777_777) % (6 * MiB - len(data))
        write(cluster, "every", offset, data, node=number % 3)
        content[offset : offset + len(data)] = data
        for node in range(3):
            assert read_all(cluster, "every", node=node) == content
    check_everything(cluster, {"every": bytes(content)})


@pytest.mark.covering
@pytest.mark.parametrize("victim", [0, 1, 2])
def test_kill_while_writing(cluster: SheepCluster, victim: int) -> None:
    """MEM-1, MEM-24, REC-1: each sheep in turn, the first one too, is killed while one client writes through it and one
    through another; both go on, the epoch rises by one for the death and one for the return, nothing is lost."""
    epoch = cluster.epoch((victim + 1) % 3)
    names = {f"through{victim}": victim, f"beside{victim}": (victim + 1) % 3}
    for name in names:
        cluster.dog("vdi", "create", name, "4M")
    writers = [Writer(cluster, name, 4 * MiB, node=node) for name, node in names.items()]
    with Background(writers[0].step) as first, Background(writers[1].step) as second:
        first.wait(10)
        second.wait(10)
        cluster.kill(victim)
        first.wait(30)
        second.wait(30)
        cluster.wait_recovered()
        assert cluster.epoch((victim + 1) % 3) == epoch + 1
        first.wait(10)
        cluster.restart(victim)
        first.wait(20)
        second.wait(20)
    assert writers[0].moves >= 1
    assert writers[1].moves == 0, "a client of a living sheep notices nothing"
    cluster.wait_recovered()
    assert cluster.epoch(victim) == epoch + 2
    check_everything(cluster, {name: bytes(one.content) for name, one in zip(names, writers, strict=True)})
    for one in writers:
        one.close()


def test_orderly_stop_while_writing(cluster: SheepCluster) -> None:
    """MEM-24: the same with SIGTERM, down to as few sheep as serve; each ends with 0."""
    leaving = (2, 1)[: 3 - cluster.fewest]
    cluster.dog("vdi", "create", "stop", "4M")
    writer = Writer(cluster, "stop", 4 * MiB, node=1)
    with Background(writer.step) as background:
        background.wait(10)
        for index in leaving:
            assert cluster.stop(index) == 0
            background.wait(20)
            cluster.wait_recovered()  # what only it and the next one had must be elsewhere before that leaves
        for index in reversed(leaving):
            cluster.restart(index)
            background.wait(10)
    cluster.wait_recovered()
    check_everything(cluster, {"stop": bytes(writer.content)})
    writer.close()


def test_old_copies_do_not_win(cluster: SheepCluster) -> None:
    """REC-8, REC-9: a node that was away while everything was overwritten brings nothing old back."""
    cluster.dog("vdi", "create", "old", "6M")
    write(cluster, "old", 0, pattern(1, 6 * MiB))
    for victim in (0, 1, 2):
        cluster.kill(victim)
        cluster.wait_recovered()
        content = pattern(10 + victim, 6 * MiB)
        write(cluster, "old", 0, content, node=(victim + 1) % 3)
        cluster.restart(victim)
        for node in range(3):
            assert read_all(cluster, "old", node=node) == content
        cluster.wait_recovered()
        check_everything(cluster, {"old": content})


@pytest.mark.covering
def test_everybody_crashes(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """MEM-15, MEM-13: all sheep are killed at once and come back one after the other: until the last is back the
    cluster waits, then it runs in the epoch it had, with all that was acknowledged."""
    cluster = fresh_cluster(3, copies=2)
    cluster.format("-z", "20")
    cluster.dog("vdi", "create", "crash", "6M")
    writer = Writer(cluster, "crash", 6 * MiB, node=0)
    for number in range(40):
        writer.step(number)
    listed = rows(cluster)
    for index in range(3):
        cluster.pause(index)  # so that none of them sees another one die
    for index in range(3):
        cluster.kill(index)
    for index in (2, 0):
        cluster.restart(index, wait=False)
    wait_until(lambda: _status(cluster, 2) == b"Waiting for other nodes to join cluster", "the cluster to wait")
    refused = cluster.dog("vdi", "create", "x", "1M", node=2, check=False)
    assert refused.stderr == b"Failed to create VDI x: Waiting for other nodes to join cluster\n"
    cluster.restart(1)
    wait_until(lambda: _status(cluster, 0).startswith(b"running"), "the cluster to run")
    assert {cluster.epoch(index) for index in range(3)} == {1}
    cluster.wait_recovered()
    assert rows(cluster) == listed
    check_everything(cluster, {"crash": bytes(writer.content)})
    writer.close()


def _status(cluster: SheepCluster, node: int) -> bytes:
    done = cluster.dog("cluster", "info", node=node, check=False)
    return done.stdout.partition(b"Cluster status: ")[2].partition(b"\n")[0].partition(b",")[0]


def test_strips_survive_a_death(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """REC-21: an erasure-coded volume (2:1 on four nodes) is written through the death and the return of a node and
    has all its strips afterwards."""
    cluster = fresh_cluster(4, redundancy="2:1")
    cluster.format("-z", "20")
    cluster.dog("vdi", "create", "strips", "4M")
    writer = Writer(cluster, "strips", 4 * MiB, node=1)
    with Background(writer.step) as background:
        background.wait(10)
        cluster.kill(0)
        background.wait(10)
        cluster.wait_recovered()
        background.wait(5)
        cluster.restart(0)
        background.wait(10)
    cluster.wait_recovered()
    for node in range(4):
        assert read_all(cluster, "strips", node=node) == writer.content
    vid = vid_of_name(cluster, "strips")
    objects = [data_oid(vid, index) for index in range(4)]
    try:
        wait_until(lambda: all(_strips(cluster, oid) == [0, 1, 2] for oid in objects), "every strip once")
    except AssertionError as error:
        error.add_note(str({f"{oid:016x}": _strips(cluster, oid) for oid in objects}))
        raise
    assert cluster.dog("vdi", "check", "strips").stdout == b"finish check&repair strips\n"
    writer.close()


def _strips(cluster: SheepCluster, oid: int) -> list[int]:
    return sorted(strip for (found, strip), holders in cluster.census().items() if found == oid for _ in holders)


def test_gateways_hold_nothing(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """GW-1: a gateway shows no virtual nodes, serves clients like any other, and never has an object."""
    cluster = fresh_cluster(3, gateways=1, copies=2)
    cluster.format("-z", "20")
    cluster.dog("vdi", "create", "gate", "4M", node=2)
    write(cluster, "gate", 0, pattern(1, 4 * MiB), node=2)
    cluster.dog("vdi", "snapshot", "-s", "s", "gate", node=2)
    write(cluster, "gate", MiB, b"changed", node=2)
    content = pattern(1, 4 * MiB)[:MiB] + b"changed" + pattern(1, 4 * MiB)[MiB + 7 :]
    for node in range(3):
        assert read_all(cluster, "gate", node=node) == content
        assert read_all(cluster, "gate", node=node, tag="s") == pattern(1, 4 * MiB)
    assert not [oid for (oid, _), holders in cluster.census().items() if 2 in holders]
    vnodes = {
        line.split()[1]: line.split()[2] for line in cluster.dog("node", "list", "-r").stdout.decode().splitlines()
    }
    assert vnodes[cluster.address(2)] == "0"
    wanted = dict.fromkeys(referenced(live_inodes(cluster)), cluster.shards)
    wait_stored(cluster, wanted, only({oid >> 32 for oid in stored(cluster)}))
