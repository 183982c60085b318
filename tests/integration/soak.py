"""Random actions on a cluster under load, against a model that knows every byte (RUN-1).

What is done next depends on the seed and on what was done before, never on how long anything took, so a seed repeats
its actions: volumes are created, written, snapshotted, cloned and deleted; nodes are killed, stopped, frozen and
restarted; disks come and go, and weights are measured anew. Guests of their own write all the time. Now and then
everything heals and everything is checked.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

import invariants
from load import SECTOR, Load
from scenes import MiB, read_all, write

from sheepdog.testing.cluster import SheepCluster

NAMES = ("ant", "bee", "cat", "dog", "elk", "fox")
SNAPSHOTS_MAX = 8
OBJECTS_MAX = 5
ROUND_ACTIONS = 15
EXPLAINED: tuple[str, ...] = ()


@dataclass(frozen=True)
class Snapshot:
    """What a volume held when it was taken."""

    name: str
    tag: str
    data: bytes


class Soak:
    """One sequence of actions.

    :param seed: of the choices, and of all bytes.
    :param wounds_max: nodes and disks that may be lacking at a time: one less than there are copies.
    """

    def __init__(self, cluster: SheepCluster, seed: int, *, wounds_max: int = 2, guests: int = 2) -> None:
        self.cluster = cluster
        self.seed = seed
        self.random = random.Random(seed)
        self.wounds_max = wounds_max
        self.volumes: dict[str, bytearray] = {}
        self.snapshots: list[Snapshot] = []
        self.down: set[int] = set()
        self.disks: dict[int, list[str]] = {}
        self.wounds = 0
        self.number = 0
        self.done: list[str] = []
        self.load = Load(cluster, "guest", guests=guests, size=2 * MiB, seed=seed)
        self._actions: list[tuple[int, Callable[[], str | None]]] = [
            (6, self._create),
            (20, self._write),
            (6, self._snapshot),
            (4, self._clone),
            (4, self._delete),
            (3, self._delete_snapshot),
            (8, self._kill),
            (3, self._stop),
            (3, self._freeze),
            (9, self._restart),
            (3, self._plug),
            (3, self._unplug),
            (2, self._reweight),
            (3, self._look),
        ]

    # ---- the run

    def run(self, *, seconds: float | None = None, rounds: int | None = None) -> None:
        """Rounds of actions, each ending with everything healed and checked.

        :raises AssertionError: something was wrong; the note says the seed and the actions of the round.
        """
        begun = time.monotonic()
        finished = 0
        try:
            while (rounds is None or finished < rounds) and (
                seconds is None or time.monotonic() - begun < seconds or not finished
            ):
                self._round()
                finished += 1
        except BaseException as error:
            error.add_note(f"seed {self.seed}, round {finished + 1}: {'; '.join(self.done)}")
            raise

    def _round(self) -> None:
        watch = invariants.Watch(self.cluster)
        self.done = []
        self.load.go_on()
        try:
            while len(self.done) < ROUND_ACTIONS:
                weights = [weight for weight, _ in self._actions]
                _, action = self.random.choices(self._actions, weights)[0]
                said = action()
                if said:
                    self.done.append(said)
            self._heal()
        finally:
            self.load.abandon()
        self._check(watch)

    def _heal(self) -> None:
        for index in sorted(self.down):
            self._forget_disks(index)
            self.cluster.restart(index, wait=False)
        self.down.clear()
        self.cluster.wait_recovered(timeout_s=120)
        self.wounds = 0

    def _wound(self) -> None:
        """One node or disk will be lacking; if that is too much, everything heals first."""
        if self.wounds + 1 > self.wounds_max:
            self._heal()
        self.wounds += 1

    def _check(self, watch: invariants.Watch) -> None:
        self.cluster.wait_recovered(timeout_s=120)
        invariants.identical(self.cluster)
        self.load.verify()
        for sheep in self.cluster.live:
            self._compare(sheep.index)
        invariants.everything(self.cluster, timeout_s=120)
        watch.check(explained=EXPLAINED)
        assert not self.load.refusals(), "a guest's write was refused"

    def _compare(self, node: int) -> None:
        for name, data in self.volumes.items():
            assert read_all(self.cluster, name, node=node) == data, f"{name} through sheep {node}"
        for one in self.snapshots:
            assert read_all(self.cluster, one.name, tag=one.tag, node=node) == one.data, f"{one.name}:{one.tag}"

    # ---- choosing

    def _gateway(self) -> int:
        return self.random.choice([index for index in range(len(self.cluster.sheep)) if index not in self.down])

    def _volume(self) -> str | None:
        return self.random.choice(sorted(self.volumes)) if self.volumes else None

    def _next(self) -> int:
        self.number += 1
        return self.number

    # ---- volumes

    def _create(self) -> str | None:
        free = [name for name in NAMES if name not in self.volumes]
        if not free:
            return None
        name, node = self.random.choice(free), self._gateway()
        size = self.random.randint(1, OBJECTS_MAX * MiB // SECTOR) * SECTOR
        full = ["-P"] if self.random.random() < 0.2 else []
        self.cluster.dog("vdi", "create", *full, name, str(size), node=node)
        self.volumes[name] = bytearray(size)
        return f"create {name} {size}"

    def _write(self) -> str | None:
        name = self._volume()
        if name is None:
            return None
        data = self.volumes[name]
        offset = self.random.randrange(len(data))
        length = min(self.random.choice((1, 512, 4096, 70_000, 2 * MiB)), len(data) - offset)
        fresh = random.Random(f"{self.seed}/{self._next()}").randbytes(length)
        write(self.cluster, name, offset, fresh, node=self._gateway())
        data[offset : offset + length] = fresh
        return f"write {name} {offset}+{length}"

    def _snapshot(self) -> str | None:
        name = self._volume()
        if name is None or len(self.snapshots) >= SNAPSHOTS_MAX:
            return None
        tag = f"t{self._next()}"
        self.cluster.dog("vdi", "snapshot", "-s", tag, name, node=self._gateway())
        self.snapshots.append(Snapshot(name, tag, bytes(self.volumes[name])))
        return f"snapshot {name} {tag}"

    def _clone(self) -> str | None:
        free = [name for name in NAMES if name not in self.volumes]
        if not free or not self.snapshots:
            return None
        one, name = self.random.choice(self.snapshots), self.random.choice(free)
        self.cluster.dog("vdi", "clone", "-s", one.tag, one.name, name, node=self._gateway())
        self.volumes[name] = bytearray(one.data)
        return f"clone {one.name}:{one.tag} {name}"

    def _delete(self) -> str | None:
        name = self._volume()
        if name is None or len(self.volumes) < 3:
            return None
        self.cluster.dog("vdi", "delete", name, node=self._gateway())
        del self.volumes[name]
        return f"delete {name}"

    def _delete_snapshot(self) -> str | None:
        if len(self.snapshots) < 2:
            return None
        one = self.random.choice(self.snapshots)
        self.cluster.dog("vdi", "delete", "-s", one.tag, one.name, node=self._gateway())
        self.snapshots.remove(one)
        return f"delete {one.name}:{one.tag}"

    def _look(self) -> str:
        node = self._gateway()
        self._compare(node)
        return f"look through {node}"

    # ---- nodes and disks

    def _kill(self) -> str:
        self._wound()
        victim = self._gateway()
        self.cluster.kill(victim)
        self.down.add(victim)
        return f"kill {victim}"

    def _stop(self) -> str:
        self._wound()
        victim = self._gateway()
        code = self.cluster.stop(victim)
        assert code == 0, f"sheep {victim} ended with {code}"
        self.down.add(victim)
        return f"stop {victim}"

    def _freeze(self) -> str:
        """Shorter or longer than its session, as it happens; awake again it is a member or becomes one."""
        self._wound()
        victim = self._gateway()
        self.cluster.pause(victim)
        long = self.random.random() < 0.5
        if long:
            self.cluster.wait_members()
        self.cluster.resume(victim)
        self.cluster.wait_members(timeout_s=60)
        return f"freeze {victim}{' for long' if long else ''}"

    def _restart(self) -> str | None:
        if not self.down:
            return None
        index = self.random.choice(sorted(self.down))
        self.down.discard(index)
        self._forget_disks(index)
        self.cluster.restart(index)
        return f"restart {index}"

    def _forget_disks(self, index: int) -> None:
        """A sheep starts with the disks of its command line: what was plugged later, and all on it, is gone."""
        for path in self.disks.pop(index, ()):
            shutil.rmtree(path)

    def _plug(self) -> str | None:
        node = self._gateway()
        if len(self.disks.get(node, ())) >= 2:
            return None
        path = self.cluster.base / f"disk{node}-{self._next()}"
        path.mkdir()
        self.cluster.dog("node", "md", "plug", str(path), input=b"yes\n", node=node)
        self.disks.setdefault(node, []).append(str(path))
        return f"plug {path.name}"

    def _unplug(self) -> str | None:
        chosen = [node for node, paths in sorted(self.disks.items()) if paths and node not in self.down]
        if not chosen:
            return None
        self._wound()
        node = self.random.choice(chosen)
        path = self.disks[node].pop(self.random.randrange(len(self.disks[node])))
        self.cluster.dog("node", "md", "unplug", path, input=b"yes\n", node=node)
        shutil.rmtree(path)
        return f"unplug {path.rpartition('/')[2]}"

    def _reweight(self) -> str:
        self.cluster.dog("cluster", "reweight", node=self._gateway())
        return "reweight"
