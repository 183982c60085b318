"""Clients of the original work unchanged: every recorded session of dog, QEMU and tgt gets the recorded answers.

The sessions of one cluster build on each other, so they are played in the recorded order to one cluster, and what
happened between them is done too: ``BEFORE`` and ``DURING`` say what. A test that is run alone first plays what came
before it. ``replay_client.EXCLUDED`` lists the few fields that are not compared.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from sheepdog.client import admin
from sheepdog.model.node import Node
from sheepdog.testing.cluster import SheepCluster, wait_until
from sheepdog.testing.vectors import find_vectors, session_index, vectors_path
from sheepdog.wire.opcodes import Op
from sheepdog.wire.payloads import pack_names, pack_paths
from sheepdog.wire.results import Result

sys.path.insert(0, str(Path(__file__).parent))

from replay_client import RECORDED_PATHS, RECORDED_PORT, Frame, Player, World

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

NODES = {"1n": 1, "3n": 3, "3v": 3}
LEVEL = ("-l", "level=info")  # what a session asks for
OPTIONS: Mapping[str, tuple[str, ...]] = {"1n": LEVEL, "3n": LEVEL, "3v": (*LEVEL, "-V", "64")}


def _lock(cluster: SheepCluster, name: bytes) -> None:
    """A client that nobody recorded holds the lock."""
    with cluster.connect(0) as connection:
        assert connection.request(Op.LOCK_VDI, body=pack_names(name)).result == Result.SUCCESS


def _start_two(cluster: SheepCluster) -> None:
    """After the shutdown nodes 0 and 1 are back, node 2 is not."""
    for index in range(3):
        _ended(cluster, index)
    cluster.options = (*LEVEL, "-V", "100")  # what SET_VNODES made of node 0
    cluster.restart(0, wait=False)
    cluster.options = OPTIONS["3v"]
    cluster.restart(1, wait=False)
    cluster.wait_members()


def _ended(cluster: SheepCluster, index: int) -> None:
    wait_until(lambda: not cluster.sheep[index].running, f"the end of sheep {index}")
    process = cluster.sheep[index].process
    assert process is not None
    assert process.returncode == 0


def _grow(cluster: SheepCluster) -> None:
    """The recorded machine had gained disk space; every sheep gets a second directory, so its size changes too."""
    for one in cluster.live:
        disk = cluster.base / f"n{one.index}d2"
        disk.mkdir()
        with cluster.connect(one.index) as connection:
            assert connection.request(Op.MD_PLUG, body=pack_paths([str(disk)])).result == Result.SUCCESS
    cluster.wait_recovered()


def _reweighted(cluster: SheepCluster) -> None:
    """Each of the three announced its new size in an epoch of its own."""
    wait_until(lambda: all(cluster.epoch(index) == 4 for index in range(3)), "epoch 4 on all nodes")
    cluster.wait_recovered()


def _rejoin(cluster: SheepCluster) -> None:
    cluster.restart(2, wait=False)
    cluster.wait_recovered()


def _lost_one(cluster: SheepCluster) -> None:
    _ended(cluster, 2)
    cluster.wait_recovered()


# What was done just before a session, without being recorded.
BEFORE: Mapping[str, Callable[[SheepCluster], object]] = {
    "tgtd-open-1n.jsonl": lambda cluster: cluster.dog("vdi", "create", "tg", "64M"),
    "tgtd-write-after-snapshot-1n.jsonl": lambda cluster: cluster.dog("vdi", "snapshot", "-s", "t1", "tg"),
    "dog-vdi-lock-list-held-1n.jsonl": lambda cluster: (
        cluster.dog("vdi", "create", "lk", "8M"),
        _lock(cluster, b"lk"),
        cluster.dog("vdi", "write", "lk", "0", "512", input=bytes(512)),
    ),
    "dog-cluster-check-3n.jsonl": lambda cluster: cluster.wait_recovered(),  # from other numbers of copies
    "dog-cluster-reweight-3n.jsonl": _grow,
    "dog-cluster-recover-disable-3n.jsonl": _reweighted,
    "dog-cluster-info-two-nodes-3n.jsonl": _lost_one,
    "dog-cluster-info-rejoined-3n.jsonl": _rejoin,
    "dog-vdi-write-3v.jsonl": lambda cluster: cluster.dog("vdi", "create", "v", "32M"),
    "dog-node-list-vnodes-3v.jsonl": lambda cluster: cluster.wait_recovered(),
    "dog-node-md-plug-3v.jsonl": lambda cluster: (cluster.base / "n0d2").mkdir(),
    "dog-vdi-read-after-md-3v.jsonl": lambda cluster: cluster.wait_recovered(),
    "dog-cluster-info-waiting-3v.jsonl": _start_two,
    "dog-cluster-info-forced-3v.jsonl": lambda cluster: cluster.wait_recovered(),
}

# What was done in the middle of a session: just before its first request that was refused as read-only.
DURING: Mapping[str, Callable[[SheepCluster], object]] = {
    "qemu-io-live-snapshot-1n.jsonl": lambda cluster: cluster.dog("vdi", "snapshot", "-s", "live", "q1"),
}


# When the recorded machine was asked to reweight one node, its disk had not changed, so nothing happened.
CALM_DISK = "dog-cluster-reweight-1n.jsonl"


def _disk_changed(cluster: SheepCluster) -> bool:
    """Other programs filled or freed so much that a reweight would act, which it did not in the recording."""
    with cluster.connect(0) as connection:
        [node] = admin.node_list(connection.request)
        size = connection.request(Op.STAT_SHEEP).u64(32)
    return abs(size - node.space) > 0.005 * node.space


class Replay:
    """The sessions of one recorded cluster, played as far as somebody asked."""

    def __init__(self, name: str, base: Path) -> None:
        self.cluster = SheepCluster(NODES[name], driver="local", options=OPTIONS[name], base=base)
        self._files = SESSIONS[name]
        self._found: dict[str, list[str]] = {}
        self._broken = ""
        self.skipped: set[str] = set()
        sheep = self.cluster.sheep
        # Node i has the i-th port, as in the recordings: node lists are ordered by port.
        sheep.sort(key=lambda one: one.port)
        for index, one in enumerate(sheep):
            one.index = one.zone = index
            one.directory = base / f"n{index}"
        if name == "3v":
            sheep[0].directory = base / "n0,n0d1"  # a disk of its own besides the directory of the node
        self.cluster.start()
        self._player = Player(
            World([RECORDED_PORT + index for index in range(3)], RECORDED_PATHS),
            World([one.port for one in sheep], f"{base}/".encode()),
            self._nodes,
        )

    def _nodes(self) -> tuple[Node, ...]:
        with self.cluster.connect(self.cluster.live[0].index) as connection:
            return admin.node_list(connection.request)

    def differences(self, file: str) -> list[str]:
        """Of one session; those before it are played first. After one that broke off none is played."""
        for earlier in self._files[: self._files.index(file) + 1]:
            if earlier not in self._found and not self._broken:
                self._broken = earlier
                self._found[earlier] = self._play(earlier)
                self._broken = ""
        assert not self._broken, f"{self._broken} broke off"
        return self._found[file]

    def _play(self, file: str) -> list[str]:
        if file == CALM_DISK and _disk_changed(self.cluster):
            self.skipped.add(file)
            return []
        if file in BEFORE:
            BEFORE[file](self.cluster)
        during = [DURING[file]] if file in DURING else []

        def before(_: Frame, answer: Frame) -> None:
            if during and answer.result == Result.READONLY:
                during.pop()(self.cluster)

        return self._player.play(file, before)

    def close(self) -> None:
        for one in self.cluster.sheep:
            if one.running:
                one.end(signal.SIGTERM)
        logs = {one.index: one.log_path.read_text(errors="replace") for one in self.cluster.sheep}
        self.cluster.close()
        bad = {index: log[log.index("Traceback") - 500 :][:4000] for index, log in logs.items() if "Traceback" in log}
        assert not bad, f"tracebacks in the logs of the sheep: {bad}"


def _sessions(cluster: str) -> list[str]:
    if find_vectors() is None:
        return []
    return [row["file"] for row in session_index() if row.get("cluster", "1n") == cluster and row.get("file")]


SESSIONS = {name: _sessions(name) for name in NODES}


@pytest.fixture(scope="module")
def replays(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Replay]]:
    """The replay of each recorded cluster; one cluster runs at a time."""
    running: dict[str, Replay] = {}

    def get(name: str) -> Replay:
        if name not in running:
            while running:
                running.popitem()[1].close()
            running[name] = Replay(name, tmp_path_factory.mktemp(name))
        return running[name]

    yield get
    while running:
        running.popitem()[1].close()


def test_recordings_are_there() -> None:
    """Sessions of all three clusters were found; without this an empty directory would pass."""
    vectors_path()
    assert {name: len(files) for name, files in SESSIONS.items()} == {"1n": 116, "3n": 101, "3v": 19}


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in SESSIONS.items() for file in files])
def test_answers_are_the_recorded_ones(replays: Callable[[str], Replay], name: str, file: str) -> None:
    """Every answer of the session equals the recorded one in all that can be equal."""
    replay = replays(name)
    assert not replay.differences(file)
    if file in replay.skipped:
        pytest.skip("the free space of the disk changed meanwhile: a reweight would act")
