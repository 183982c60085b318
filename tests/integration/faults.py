"""The table of faults: what can happen to sheep while guests write, each as a story from the first blow to the healing.

A story gets a ``Scene``: the cluster, the guests at work, and what it needs to know of the surroundings. It leaves all
sheep running. Whoever tells it checks afterwards that nothing acknowledged is lost, and the invariants.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from load import SECTOR, Load
from recovery_scenes import shards
from scenes import LiveClient, pattern, read_object, vid_of_name, wait_serving, write

from sheepdog.client.connection import Connection
from sheepdog.client.volume import OP_WRITE_OBJ
from sheepdog.errors import SheepdogError
from sheepdog.model.ids import data_oid, is_data
from sheepdog.testing.cluster import SheepCluster, wait_until
from sheepdog.wire.results import Result

SESSION_S = 2.0  # of the clusters that these stories are told of


@dataclass
class Scene:
    """Where a story happens."""

    cluster: SheepCluster
    load: Load
    copies: int
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    def busy(self, writes: int = 5) -> None:
        """Everybody gets on with the work."""
        self.load.progress(writes)

    def come_back(self, *indexes: int) -> None:
        """These sheep run again and everybody agrees on the members."""
        for index in indexes:
            self.cluster.restart(index, wait=False)
        self.cluster.wait_members()

    def kill_together(self, indexes: Sequence[int]) -> None:
        """All get SIGKILL before one of them is waited for."""
        for index in indexes:
            self.cluster.sheep[index].signal(signal.SIGKILL)
        for index in indexes:
            self.cluster.kill(index)

    @contextlib.contextmanager
    def slow_recovery(self) -> Iterator[None]:
        """Recovery moves one object in 20 ms on every sheep that runs now, until the end of the block."""
        runs = [sheep.index for sheep in self.cluster.live]
        for index in runs:
            self.cluster.dog("node", "recovery", "set-throttle", "1", "20", node=index)
        yield
        for sheep in self.cluster.live:
            self.cluster.dog("node", "recovery", "set-throttle", "0", "0", node=sheep.index)


@dataclass(frozen=True)
class Fault:
    """A story, the errors in the logs that it causes, and the results with which it may refuse writes."""

    tell: Callable[[Scene], None]
    explained: tuple[str, ...] = ()
    refusals: tuple[Result, ...] = ()
    refusals_of_strips: tuple[Result, ...] = ()  # where more nodes are away for a moment than strips to spare

    @property
    def name(self) -> str:
        return self.tell.__name__


def killed_in_turn(scene: Scene) -> None:
    """Each node is killed as soon as the one before is a member again, long before that one has healed."""
    for sheep in scene.cluster.sheep:
        scene.cluster.kill(sheep.index)
        scene.busy()
        scene.come_back(sheep.index)


def as_many_as_may_die(scene: Scene) -> None:
    """As many nodes as there are copies to spare are killed at the same moment; the others go on."""
    victims = scene.chance.sample(range(len(scene.cluster.sheep)), max(1, scene.copies - 1))
    scene.kill_together(victims)
    scene.busy()
    scene.come_back(*victims)


def all_killed(scene: Scene) -> None:
    """All nodes are killed in the middle of writes, and nobody is left to send those again."""
    everybody = [sheep.index for sheep in scene.cluster.sheep]
    scene.kill_together(everybody)
    scene.load.abandon()
    scene.come_back(*everybody)


def stopped_for_a_moment(scene: Scene) -> None:
    """A node stands still for less than its session: nobody is counted out."""
    epoch = scene.cluster.epoch(0)
    scene.cluster.pause(1)
    with contextlib.suppress(AssertionError):  # whoever needs the node waits for it
        scene.load.progress(5, timeout_s=SESSION_S / 4)
    scene.cluster.resume(1)
    scene.busy()
    assert scene.cluster.epoch(0) == epoch


def stopped_beyond_its_session(scene: Scene) -> None:
    """A node stands still until it is counted out. Awake again it tells nobody what it knew, and what a client had
    sent to it before that client went elsewhere does not happen any more."""
    cluster = scene.cluster
    victim = 1
    cluster.dog("vdi", "create", "sleeper", "4M", node=0)
    old, new = pattern(1, 8 * SECTOR), pattern(2, 8 * SECTOR)
    write(cluster, "sleeper", 0, old, node=0)
    oid = data_oid(vid_of_name(cluster, "sleeper"), 0)
    reader = cluster.connect(victim, timeout_s=60.0)
    read_object(reader.request, oid, len(old), direct=False)
    writers = [cluster.connect(victim, timeout_s=0.3) for _ in range(3)]
    cluster.pause(victim)
    for number, connection in enumerate(writers):
        with contextlib.suppress(SheepdogError):  # silence, of course
            connection.request(OP_WRITE_OBJ, oid=oid, copies=scene.copies, body=pattern(10 + number, len(old)))
        connection.close()
    cluster.wait_members()
    with LiveClient(cluster, "sleeper", node=0) as client:
        client.write(0, new)
    answers: list[bytes] = []
    asking = threading.Thread(target=_ask, args=(reader, oid, len(new), answers))
    asking.start()
    scene.load.progress(but_of=[victim])
    cluster.resume(victim)
    asking.join(90)
    assert not asking.is_alive(), "a read through the sheep that slept is never answered"
    reader.close()
    assert all(answer == new for answer in answers), "the sheep that slept served what it remembered"
    cluster.wait_recovered()
    for sheep in cluster.live:
        with cluster.connect(sheep.index) as connection:
            found = read_object(connection.request, oid, len(new), direct=False)
        assert found == new, f"a write from before the sleep is there, says sheep {sheep.index}"
    cluster.dog("vdi", "delete", "sleeper")


def _ask(connection: Connection, oid: int, length: int, answers: list[bytes]) -> None:
    with contextlib.suppress(SheepdogError):  # no answer is right as well
        answers.append(bytes(read_object(connection.request, oid, length, direct=False)))


def disks_change_during_recovery(scene: Scene) -> None:
    """Disks are plugged and unplugged while a dead node's objects are copied, and while the node returns."""
    cluster = scene.cluster
    extra = []
    for name in ("disk0x", "disk0y"):
        path = cluster.base / name
        path.mkdir(exist_ok=True)
        extra.append(str(path))
    with scene.slow_recovery():
        cluster.kill(3)
        cluster.wait_members()
        cluster.dog("node", "md", "plug", ",".join(extra), input=b"yes\n", node=0)
        scene.busy()
        cluster.dog("node", "md", "unplug", extra[0], input=b"yes\n", node=0)
        scene.come_back(3)
        scene.busy()
    cluster.dog("node", "md", "unplug", extra[1], input=b"yes\n", node=0)
    for path in extra:
        shutil.rmtree(path, ignore_errors=True)


def nodes_change_during_recovery(scene: Scene) -> None:
    """While a dead node's objects are copied, another node leaves in order and an empty one joins in its place."""
    cluster = scene.cluster
    with scene.slow_recovery():
        cluster.kill(2)
        cluster.wait_members()
        scene.busy(2)
        cluster.restart(2, wait=False)
        assert cluster.stop(0) == 0
        cluster.wait_members()
        scene.busy(2)
    cluster.wait_recovered()  # now nothing is on the one that left alone
    shutil.rmtree(cluster.sheep[0].directory)
    with scene.slow_recovery():
        scene.come_back(0)
        scene.busy(2)
        cluster.kill(3)
        cluster.wait_members()
        scene.come_back(3)


def bytes_flipped(scene: Scene) -> None:
    """A byte changes on the disk in one copy of each object, in other copies for other objects, while guests read and
    write them. Where there are copies enough a node dies besides, so that others are made anew. Nobody reads a wrong
    byte, none gets into another copy, and what nobody touched the scrub mends (MD-16).

    A scrub comes first: of what changed just before a node was killed nobody may have checksums until then."""
    cluster = scene.cluster
    cluster.wait_recovered()
    _scrub(scene)
    copies: dict[tuple[int, int], list[str]] = {}
    for sheep in cluster.live:
        for shard, path in shards(cluster, sheep.index).items():
            if is_data(shard[0]):
                copies.setdefault(shard, []).append(path)
    hit: dict[int, int] = {}
    for (oid, _), paths in sorted(copies.items()):
        if oid not in hit:  # of strips one only
            hit[oid] = _flip(scene.chance.choice(sorted(paths)), scene.chance)
    assert sum(hit.values()) > 3, "there is something to be damaged"
    scene.busy()
    if scene.copies > 2:
        cluster.kill(2)
        scene.busy()
        scene.come_back(2)
    cluster.wait_recovered()
    _scrub(scene)


def _flip(path: str, chance: random.Random) -> int:
    """One bit of the file is another one; returns how many are: nobody minds if the file has just gone."""
    with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
        at = chance.randrange(os.fstat(file.fileno()).st_size)
        file.seek(at)
        old = file.read(1)[0]
        file.seek(at)
        file.write(bytes((old ^ 1 << chance.randrange(8),)))
        return 1
    return 0


def _scrub(scene: Scene) -> None:
    """All nodes have looked at everything, while everybody works."""
    cluster = scene.cluster

    def every() -> list[dict[str, int]]:
        found: list[dict[str, int]] = json.loads(cluster.dog("node", "scrub", "status", "-A", "--json").stdout)
        return found

    def ended() -> bool:
        return not any(entry["running"] or entry["repairing"] or entry["finished"] <= before for entry in every())

    before = max(entry["finished"] for entry in every())
    wait_until(lambda: time.time() > before + 1, "another second to begin: the times are told in seconds")
    cluster.dog("node", "scrub", "start", "-A", "-R", "1000")
    scene.busy()
    wait_until(ended, "the scrub to end", timeout_s=40)


def cut_off(scene: Scene) -> None:
    """Two of five machines vanish: no packet passes, their processes live on. The guests' machines among them come
    back to the others; nothing that the two had not acknowledged by then happens later (MEM-22, REC-19)."""
    cluster = scene.cluster
    assert cluster.network is not None and not cluster.driver.startswith("local")
    lost = [3, 4]
    rest = [0, 1, 2]
    cluster.network.split(rest, lost)
    wait_until(lambda: _sees(cluster, 0) == {cluster.sheep[index].port for index in rest}, "the lost to be counted out")
    for index in lost:
        cluster.sheep[index].paused = True  # for the guests: nobody should go there
    scene.busy()
    for index in lost:
        _serves_nothing(cluster, index)
    cluster.network.heal()
    for index in lost:
        cluster.sheep[index].paused = False
    cluster.wait_members(timeout_s=60)
    for index in lost:
        wait_serving(cluster, index)


def everybody_alone(scene: Scene) -> None:
    """The switch dies: nobody reaches anybody, and nobody may serve. When it is back all go on (MEM-22)."""
    cluster = scene.cluster
    assert cluster.network is not None and not cluster.driver.startswith("local")
    cluster.network.split()
    time.sleep(SESSION_S)  # from then on nobody may believe in its session any more
    for sheep in cluster.sheep:
        _serves_nothing(cluster, sheep.index)
    cluster.network.heal()
    cluster.wait_members(timeout_s=60)
    scene.busy()


def _sees(cluster: SheepCluster, index: int) -> set[int]:
    try:
        return cluster.members(index)
    except (SheepdogError, OSError):
        return set()


def _serves_nothing(cluster: SheepCluster, index: int) -> None:
    """A write through that sheep is not acknowledged."""
    with contextlib.suppress(SheepdogError, OSError):
        with LiveClient(cluster, "witness", node=index, answer_s=1.0) as client:
            client.write(0, bytes(SECTOR))
            raise AssertionError(f"sheep {index} acknowledges writes without the others")


def one_after_the_other_cut_off(scene: Scene) -> None:
    """Each node loses its wire for a moment, the next one as soon as it has it again. The local driver tells nobody."""
    cluster = scene.cluster
    assert cluster.network is not None
    for sheep in cluster.sheep:
        cluster.network.split([other.index for other in cluster.sheep if other is not sheep])
        with contextlib.suppress(AssertionError):
            scene.load.progress(3, timeout_s=0.5)
        cluster.network.heal()
    cluster.wait_members(timeout_s=60)
    scene.busy()


PROCESSES = (
    Fault(killed_in_turn),
    Fault(as_many_as_may_die),
    Fault(all_killed),
    Fault(stopped_for_a_moment),
    Fault(stopped_beyond_its_session),
    Fault(disks_change_during_recovery),
    Fault(nodes_change_during_recovery, refusals_of_strips=(Result.EIO,)),
    Fault(bytes_flipped, (r"corrupt", r"differs")),
)
WIRES = (Fault(one_after_the_other_cut_off),)
# For drivers that lose their sessions with the wire.
QUORUM = (Fault(cut_off, refusals_of_strips=(Result.EIO,)), Fault(everybody_alone))


def spec_of(driver: str, base: object) -> str:
    """The driver with a session of ``SESSION_S``; those of ``driver_specs`` have that already."""
    return f"local:{base}/cluster,timeout={SESSION_S * 1000:.0f}" if driver == "local" else driver
