"""Store directories that the original left open in ours: config, epochs, and every object with all its bytes."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

import sheepdog_store_plain
import sheepdog_store_tree
from sheepdog.api import DiskRing, ShardKey, StoreOptions
from sheepdog.daemon.storedir import StoreDirectory, check_config, parse_path, usable_disks
from sheepdog.model.clusterinfo import ClusterFlag
from sheepdog.testing.vectors import find_vectors, store_facts, store_names, unpack_store, vectors_path

HOOKS = {
    "plain": sheepdog_store_plain.sheepdog_object_store,
    "tree": sheepdog_store_tree.sheepdog_object_store,
}
# What the test itself knows of names, so that it does not depend on the code under test.
NAME = re.compile(r"(?P<oid>[0-9a-f]{16})(_(?P<strip>\d+))?(\.(?P<epoch>\d+))?")
COPIES = {"2:1": (3, 0x11)}
TIME_SLACK_S = 120  # each node stamps an epoch with its own clock


@dataclass
class File:
    disk: str  # as recorded
    key: ShardKey
    epoch: int | None
    size: int
    sha256: str


@dataclass
class Sheep:
    """One sheep of an archive: what was recorded, and where its directories are now."""

    facts: dict
    recorded: list[str]  # BASE and disks as given on its command line
    root: Path

    @property
    def number(self) -> int:
        return int(re.search(r"\d+$", self.recorded[0])[0])

    def now(self, recorded: str) -> str:
        return str(self.root / os.path.basename(recorded))

    @property
    def argument(self) -> str:
        return ",".join(map(self.now, self.recorded))

    @property
    def recorded_disks(self) -> list[str]:
        return self.recorded[1:] or [self.recorded[0] + "/obj"]

    def entries(self, recorded_directory: str) -> list[tuple[str, dict]]:
        prefix = recorded_directory.removeprefix("/srv/") + "/"
        return [
            (entry["path"].removeprefix(prefix), entry)
            for entry in self.facts["files"]
            if entry["path"].startswith(prefix) and entry.get("type") != "dir"
        ]

    def files(self) -> list[File]:
        found = []
        for disk in self.recorded_disks:
            for path, entry in self.entries(disk):
                match = NAME.fullmatch(os.path.basename(path))
                assert match, path
                assert (match["epoch"] is not None) == path.startswith(".stale/")
                key = ShardKey(int(match["oid"], 16), -1 if match["strip"] is None else int(match["strip"]))
                epoch = None if match["epoch"] is None else int(match["epoch"])
                found.append(File(disk, key, epoch, entry["size"], entry["sha256"]))
        return found

    def weight(self, recorded_disk: str) -> int:
        """As the archive has it, before any of our code ran."""
        name = recorded_disk.removeprefix("/srv/")
        [entry] = [entry for entry in self.facts["files"] if entry["path"] == name]
        return int.from_bytes(bytes.fromhex(entry["xattrs_hex"]["user.md.size"]), "little")


@pytest.fixture(scope="module", params=store_names() if find_vectors() else [None])
def archive(request, tmp_path_factory) -> list[Sheep]:
    """All sheep of one archive, unpacked once for all tests."""
    vectors_path()  # skips or fails without the vectors
    facts = store_facts(request.param)
    root = tmp_path_factory.mktemp(request.param)
    unpack_store(request.param, root)
    return [Sheep(facts, one["paths"], root) for one in facts["sheep"]]


def test_paths(archive):
    """PATH in the recorded form names the unpacked directories, and all disks are usable."""
    for sheep in archive:
        path = parse_path(sheep.argument)
        assert path.base == sheep.now(sheep.recorded[0])
        assert usable_disks(path.disks, path.base) == path.disks
        assert len(path.disks) == len(sheep.recorded_disks)


def test_config(archive):
    """Store, copies, policy and the mark of a clean shutdown are what was recorded; the space is that of the disks."""
    identities = set()
    for sheep in archive:
        facts = sheep.facts
        config = StoreDirectory(parse_path(sheep.argument).base).read_config()
        copies, policy = COPIES.get(facts["copies"], (facts["copies"], 0))
        killed = not facts["clean_shutdown"] or sheep.number not in facts.get("restart_nodes", [sheep.number])

        assert config.default_store == facts["store"]
        assert (config.copies, config.copy_policy, config.block_size_shift) == (copies, policy, 22)
        assert config.flags & ClusterFlag.AUTO_VNODES
        assert config.shutdown == (not killed), sheep.recorded
        assert config.space == sum(map(sheep.weight, sheep.recorded_disks))
        check_config(config, fixed_vnodes=False, gateway=False)
        identities.add(config.ctime)
    assert len(identities) == 1
    assert 0 not in identities


def test_epochs(archive):
    """Each epoch file lists the recorded members with their vnodes, and the latest epoch is the highest number."""
    for sheep in archive:
        directory = StoreDirectory(parse_path(sheep.argument).base)
        recorded = {entry["epoch"]: entry for entry in sheep.facts["epochs"]}
        numbers = sorted(int(path) for path, _ in sheep.entries(sheep.recorded[0] + "/epoch"))

        assert list(directory.epochs()) == numbers
        assert directory.latest_epoch() == numbers[-1]
        for number in numbers:
            record = directory.read_epoch(number)
            assert [f"{node.id.text}:{node.vnodes}" for node in record.nodes] == recorded[number]["nodes"]
            assert abs(record.time - recorded[number]["time"]) < TIME_SLACK_S


def test_original_placement(archive):
    """Our disk ring, given the paths and weights of the original, puts every object on the disk where it left it."""
    for sheep in archive:
        ring = DiskRing((disk, sheep.weight(disk)) for disk in sheep.recorded_disks)
        for file in sheep.files():
            if file.epoch is None:
                assert ring.disk_of(file.key.oid) == file.disk


def test_objects(archive):
    """Every live and set-aside object is listed under its key with the recorded size and bytes; there is no other."""
    for sheep in archive:
        path = parse_path(sheep.argument)
        store = HOOKS[sheep.facts["store"]](StoreOptions(path.disks))
        files = sheep.files()

        assert list(store.keys()) == sorted(file.key for file in files if file.epoch is None)
        assert list(store.stale_keys()) == sorted((file.key, file.epoch) for file in files if file.epoch is not None)
        for file in files:
            buffer = memoryview(bytearray(file.size + 1))
            if file.epoch is None:
                assert store.size(file.key) == file.size
                count = store.read_into(file.key, buffer, offset_bytes=0)
            else:
                assert store.stale_size(file.key, file.epoch) == file.size
                count = store.read_stale_into(file.key, file.epoch, buffer, offset_bytes=0)
            assert count == file.size
            assert hashlib.sha256(buffer[:count]).hexdigest() == file.sha256, (sheep.recorded[0], file.key, file.epoch)
        assert [disk.usage.weight_bytes for disk in store.disks()] == list(map(sheep.weight, sheep.recorded_disks))
        store.close()


def test_archives_cover_the_cases():
    """Among the archives are both layouts, strips, set-aside versions and a sheep with several disks."""
    vectors_path()
    facts = [store_facts(name) for name in store_names()]
    sheep = [Sheep(fact, one["paths"], Path("/")) for fact in facts for one in fact["sheep"]]
    files = [file for one in sheep for file in one.files()]

    assert {one.facts["store"] for one in sheep} == {"plain", "tree"}
    assert any(len(one.recorded_disks) == 2 for one in sheep)
    assert any(file.epoch is not None for file in files)
    assert {file.key.index for file in files} >= {-1, 0, 1, 2}
