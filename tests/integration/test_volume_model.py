"""Random sequences of everything that can be done to volumes, against a model that knows every byte and every object.

The model keeps, for each volume and snapshot, its content and who made each of its data objects: a *generation* is the
time between two snapshots of a volume, has one vid, and makes at most one object per index. From that alone follows
which data objects and ledgers must be on disk, whatever the order of snapshots, clones, rollbacks and deletions was.

    SHEEPDOG_VOLUME_MODEL=seed,examples,steps pytest tests/integration/test_volume_model.py

runs another sequence; the seed of a failing one is printed with it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, Phase, note, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from scenes import MiB, kinds, stored, vid_of_name, volume, wait_stored

from sheepdog.client.nbd import NbdClient
from sheepdog.client.volume import create_vdi, read_object
from sheepdog.model.ids import data_oid, inode_oid, is_ledger, ledger_oid
from sheepdog.model.inode import HEADER_BYTES, MAP_OFFSET, InodeHeader
from sheepdog.testing.cluster import SheepCluster

pytestmark = [pytest.mark.processes, pytest.mark.matrix, pytest.mark.timeout(600)]

SEED, EXAMPLES, STEPS = map(int, os.environ.get("SHEEPDOG_VOLUME_MODEL", "1,6,25").split(","))
NODES = 3
NAMES = ("alpha", "beta", "gamma", "delta")
OBJECTS_MAX = 5
SNAPSHOTS_MAX = 10
SECTOR = 512


@dataclass(frozen=True)
class Generation:
    """The time between two snapshots of a volume."""

    number: int


@dataclass(frozen=True)
class Thing:
    """A data object: who made it, and where it lies in the volume."""

    maker: Generation
    index: int


@dataclass
class Modelled:
    """A volume or a snapshot."""

    name: str
    tag: str
    content: bytearray
    generation: Generation
    objects: dict[int, Thing] = field(default_factory=dict)

    def child(self, generation: Generation, name: str) -> Modelled:
        """A working volume on top of this one."""
        return Modelled(name, "", bytearray(self.content), generation, dict(self.objects))


class VolumeMachine(RuleBasedStateMachine):
    """``cluster`` is set by the test."""

    cluster: SheepCluster

    def __init__(self) -> None:
        super().__init__()
        self.working: dict[str, Modelled] = {}
        self.snapshots: list[Modelled] = []
        self.vids: dict[Generation, int] = {}
        self.lent: set[Thing] = set()  # objects of which a reference was dropped; those still stored have a ledger
        self.counter = 0

    # ---- the model

    def next_number(self) -> int:
        self.counter += 1
        return self.counter

    def everything(self) -> list[Modelled]:
        return [*self.working.values(), *self.snapshots]

    def born(self, modelled: Modelled) -> None:
        """It is the working volume of its name."""
        self.working[modelled.name] = modelled
        self.vids[modelled.generation] = vid_of_name(self.cluster, modelled.name)

    def drop(self, modelled: Modelled, index: int) -> None:
        thing = modelled.objects.pop(index, None)
        if thing is not None:
            self.lent.add(thing)
            if not any(other.objects.get(index) == thing for other in self.everything() if other is not modelled):
                self.lent.discard(thing)  # nobody has it any more; made again, it is new

    def own(self, modelled: Modelled, index: int) -> None:
        """The volume has an object of its own there."""
        mine = Thing(modelled.generation, index)
        if modelled.objects.get(index) != mine:
            self.drop(modelled, index)
            modelled.objects[index] = mine

    def own_range(self, modelled: Modelled, offset: int, length: int) -> None:
        for index in range(offset // MiB, (offset + length - 1) // MiB + 1):
            self.own(modelled, index)

    def oid(self, thing: Thing) -> int:
        return data_oid(self.vids[thing.maker], thing.index)

    def forget(self, modelled: Modelled) -> None:
        for index in list(modelled.objects):
            self.drop(modelled, index)

    # ---- choosing

    def pick(self, number: int) -> Modelled:
        return list(self.working.values())[number % len(self.working)]

    def pick_snapshot(self, number: int) -> Modelled:
        return self.snapshots[number % len(self.snapshots)]

    # ---- what can be done

    @initialize()
    def clean(self) -> None:
        assert kinds(self.cluster) == {"data": 0, "inode": 0, "ledger": 0, "attribute": 0}

    @precondition(lambda self: len(self.working) < len(NAMES))
    @rule(size=st.integers(0, OBJECTS_MAX * MiB // SECTOR), full=st.booleans(), node=st.integers(0, NODES - 1))
    def create(self, size: int, full: bool, node: int) -> None:
        name = next(name for name in NAMES if name not in self.working)
        note(f"create {name} of {size} sectors, preallocated: {full}")
        if full:
            self.cluster.dog("vdi", "create", "-P", name, str(size * SECTOR), node=node)
        else:
            with self.cluster.connect(node) as connection:
                create_vdi(connection.request, name.encode(), size=size * SECTOR)
        made = Modelled(name, "", bytearray(size * SECTOR), Generation(self.next_number()))
        self.born(made)
        if full and size:
            self.own_range(made, 0, size * SECTOR)
        self.compare()

    @precondition(lambda self: any(one.content for one in self.working.values()))
    @rule(which=st.integers(0, 99), place=st.integers(0), length=st.integers(0), fill=st.integers(0, 3),
          by_nbd=st.booleans(), node=st.integers(0, NODES - 1))  # fmt: skip
    def write(self, which: int, place: int, length: int, fill: int, by_nbd: bool, node: int) -> None:
        """Any range, over object borders as well; a fill of 0 is zeros."""
        modelled = self.pick(which)
        size = len(modelled.content)
        if not size:
            return
        offset = place % size
        length = 1 + length % min(size - offset, 3 * MiB // 2)
        if by_nbd:
            offset -= offset % SECTOR
            length += -length % SECTOR
        number = self.next_number()
        note(f"write {modelled.name} {offset}+{length} fill {fill}, nbd: {by_nbd}, node {node}")
        data = random.Random(number).randbytes(length) if fill else bytes(length)
        if by_nbd:
            with NbdClient.connect(f"127.0.0.1:{self.cluster.sheep[node].nbd_port}") as client:
                client.go(modelled.name)
                client.write(offset, data)
        else:
            with volume(self.cluster, modelled.name, node=node) as opened:
                opened.write(offset, data)
        self.own_range(modelled, offset, length)
        modelled.content[offset : offset + length] = data
        self.compare()

    @precondition(lambda self: self.working and len(self.snapshots) < SNAPSHOTS_MAX)
    @rule(which=st.integers(0, 99), node=st.integers(0, NODES - 1))
    def snapshot(self, which: int, node: int) -> None:
        modelled = self.pick(which)
        tag = f"t{self.next_number()}"
        note(f"snapshot {modelled.name} {tag}")
        self.cluster.dog("vdi", "snapshot", "-s", tag, modelled.name, node=node)
        self.snapshots.append(replace(modelled, tag=tag))
        self.born(modelled.child(Generation(self.next_number()), modelled.name))
        self.compare()

    @precondition(lambda self: self.snapshots and len(self.working) < len(NAMES))
    @rule(which=st.integers(0, 99), how=st.sampled_from(("", "-n", "-P", "-nP")), node=st.integers(0, NODES - 1))
    def clone(self, which: int, how: str, node: int) -> None:
        """Sharing everything; with copies of what is allocated; with all objects; with both."""
        source = self.pick_snapshot(which)
        name = next(name for name in NAMES if name not in self.working)
        note(f"clone {how} {source.name}:{source.tag} {name}")
        self.cluster.dog("vdi", "clone", *([how] if how else []), "-s", source.tag, source.name, name, node=node)
        made = source.child(Generation(self.next_number()), name)
        if "n" in how:
            made.objects = {index: Thing(made.generation, index) for index in source.objects}
        self.born(made)
        if "P" in how and made.content:
            self.own_range(made, 0, len(made.content))
        self.compare()

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, 99), node=st.integers(0, NODES - 1))
    def roll_back(self, which: int, node: int) -> None:
        target = self.pick_snapshot(which)
        note(f"rollback {target.name} to {target.tag}")
        self.cluster.dog("vdi", "rollback", "-f", "-s", target.tag, target.name, node=node)
        if target.name in self.working:
            self.forget(self.working.pop(target.name))
        self.born(target.child(Generation(self.next_number()), target.name))
        self.compare()

    @precondition(lambda self: self.working)
    @rule(which=st.integers(0, 99), more=st.integers(0, 3 * MiB // SECTOR), node=st.integers(0, NODES - 1))
    def grow(self, which: int, more: int, node: int) -> None:
        modelled = self.pick(which)
        size = min(len(modelled.content) + more * SECTOR, 2 * OBJECTS_MAX * MiB)
        note(f"resize {modelled.name} to {size}")
        self.cluster.dog("vdi", "resize", modelled.name, str(size), node=node)
        modelled.content += bytes(size - len(modelled.content))
        self.compare()

    @precondition(lambda self: any(one.objects for one in self.working.values()))
    @rule(which=st.integers(0, 99), first=st.integers(0), count=st.integers(1, 3),
          how=st.sampled_from(("nbd", "map", "server")), node=st.integers(0, NODES - 1))  # fmt: skip
    def discard(self, which: int, first: int, count: int, how: str, node: int) -> None:
        """Whole objects: by an NBD client, by a client that writes the map, by the server on an old client's behalf."""
        modelled = self.pick(which)
        total = -(-len(modelled.content) // MiB)
        if not total:
            return
        first %= total
        last = min(first + count, total)
        begin, end = first * MiB, min(last * MiB, len(modelled.content))
        note(f"discard {modelled.name} objects {first} to {last - 1} by {how}")
        if how == "nbd":
            with NbdClient.connect(f"127.0.0.1:{self.cluster.sheep[node].nbd_port}") as client:
                client.go(modelled.name)
                client.trim(begin, end - begin)
        elif how == "map":
            with volume(self.cluster, modelled.name, node=node) as opened:
                opened.discard(begin, end - begin)
        else:
            with self.cluster.connect(node) as connection:
                for index in range(first, last):
                    oid = data_oid(self.vids[modelled.generation], index)
                    assert connection.request(0x05, oid=oid).result == 0
        for index in range(first, last):
            self.drop(modelled, index)
        modelled.content[begin:end] = bytes(end - begin)
        self.compare()

    @precondition(lambda self: self.working)
    @rule(which=st.integers(0, 99), words=st.sampled_from(((), ("-B", "1"))), node=st.integers(0, NODES - 1))
    def delete(self, which: int, words: tuple[str, ...], node: int) -> None:
        modelled = self.pick(which)
        note(f"delete {modelled.name}")
        self.cluster.dog("vdi", "delete", *words, modelled.name, node=node)
        self.forget(self.working.pop(modelled.name))
        self.compare()

    @precondition(lambda self: self.snapshots)
    @rule(which=st.integers(0, 99), node=st.integers(0, NODES - 1))
    def delete_snapshot(self, which: int, node: int) -> None:
        modelled = self.pick_snapshot(which)
        note(f"delete {modelled.name}:{modelled.tag}")
        self.cluster.dog("vdi", "delete", "-s", modelled.tag, modelled.name, node=node)
        self.snapshots.remove(modelled)
        self.forget(modelled)
        self.compare()

    # ---- comparing

    def compare(self) -> None:
        """Every volume and snapshot has the size, the map and the content of the model, through one of the nodes.

        An object that several of them share is read once.
        """
        with self.cluster.connect(self.counter % NODES, timeout_s=60.0) as connection:
            seen: dict[int, bytes] = {}
            for modelled in self.everything():
                what = f"{modelled.name}:{modelled.tag}"
                oid = inode_oid(self.vids[modelled.generation])
                header = InodeHeader.unpack(read_object(connection.request, oid, HEADER_BYTES))
                assert (header.name, header.tag) == (modelled.name.encode(), modelled.tag.encode())
                assert header.is_snapshot == bool(modelled.tag), what
                assert header.vdi_size == len(modelled.content), what
                entries = memoryview(read_object(connection.request, oid, 64, offset=MAP_OFFSET)).cast("I")
                expected = {index: self.vids[thing.maker] for index, thing in modelled.objects.items()}
                assert {index: vid for index, vid in enumerate(entries) if vid} == expected, what
                for index in range(-(-len(modelled.content) // MiB)):
                    part = modelled.content[index * MiB : (index + 1) * MiB]
                    thing = modelled.objects.get(index)
                    if thing is None:
                        assert not any(part), what
                        continue
                    oid = self.oid(thing)
                    if oid not in seen:
                        seen[oid] = bytes(read_object(connection.request, oid, MiB, direct=False))
                    assert seen[oid][: len(part)] == part, f"{what}, object {oid:016x}"

    def compare_disks(self) -> None:
        """Exactly the objects that somebody can see are stored, and ledgers of those that were once shared by more."""
        live = {thing for modelled in self.everything() for thing in modelled.objects.values()}
        wait_stored(self.cluster, {self.oid(thing): self.cluster.shards for thing in live})
        ledgers = {ledger_oid(self.oid(thing)): self.cluster.shards for thing in live & self.lent}
        wait_stored(self.cluster, ledgers, is_ledger)

    def teardown(self) -> None:
        try:
            self.compare_disks()
            while self.snapshots or self.working:
                number = self.next_number()
                if self.snapshots and (number % 2 or not self.working):
                    self.delete_snapshot(number, number % NODES)
                else:
                    self.delete(number, (), number % NODES)
            wait_stored(self.cluster, {})
            wait_stored(self.cluster, {}, is_ledger)
        finally:
            self.cluster.format("-f", "-z", "20")


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., SheepCluster]) -> SheepCluster:
    """Three nodes with NBD, 2 copies or strips 2:1, objects of 1 MiB."""
    cluster = start_cluster(NODES, copies=2, nbd=True)
    cluster.format("-z", "20")
    return cluster


def test_volumes_against_a_model(cluster: SheepCluster) -> None:
    """VDI, SNAP, GC: whatever is done in whatever order, every volume and snapshot reads what the model says after each
    step, exactly the data objects and ledgers that it needs are stored, and nothing is left once all are deleted."""

    class Machine(VolumeMachine):
        pass

    Machine.cluster = cluster
    print(f"repeat with SHEEPDOG_VOLUME_MODEL={SEED},{EXAMPLES},{STEPS}")
    run_state_machine_as_test(
        seed(SEED)(Machine),
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            database=None,
            print_blob=True,
            phases=[Phase.generate],  # shrinking would start every step again on the real cluster
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert not stored(cluster)
