"""Whole strips are written beside and change places with the old ones: nothing is lost, whatever a crash leaves.

A store on real files makes changes by chance, and after some of them an image is taken of what a power loss at that
moment would leave (``lossy_files``). Started again on the image, it has what was acknowledged, what undoes the last
change of each strip, and goes on from there.
"""

from __future__ import annotations

import os
import random
import shutil

import pytest

from sheepdog.builtin import filestore_io as io
from sheepdog.builtin import filestore_spares
from sheepdog.contracts.store import REPLICA, ShardKey, StoreOptions
from sheepdog.daemon.checksum_files import ChecksumFiles
from sheepdog.daemon.checksums import ChecksummedStore
from sheepdog.daemon.journal import Journal
from sheepdog.daemon.journal_files import JOURNAL, STRIPS, Left, left_journal, replay
from sheepdog.daemon.journaled_store import JournaledStore
from sheepdog.daemon.strip_memory import Record, StripChange
from sheepdog.daemon.strip_store import StripLog, StripStore
from sheepdog.daemon.striped_undo import _put_back
from sheepdog.errors import ObjectNotFound, StoreBusy
from sheepdog.model.node import NodeId
from sheepdog_store_plain import sheepdog_object_store as plain
from sheepdog_store_tree import sheepdog_object_store as tree

from .lossy_files import LossyFiles

SIZE = 4096
PART = 512
KEYS = tuple(ShardKey(0x0012345600000000 | number, number % 3) for number in range(1, 5))
PRIMARY = 1 << 63 | 7 << 32
HOLDERS = (NodeId.of("10.0.0.1", 7000),)
LOG_BYTES = 64 << 10


class Sheep:
    """The store of one sheep, and what it was told."""

    def __init__(self, directory, make_store, *, journal=False, synced=True, boot="first"):
        self.directory = directory
        self.synced = synced
        self.journal = None
        (directory / "obj").mkdir(parents=True, exist_ok=True)
        self.files = make_store(StoreOptions((str(directory / "obj"),)))
        inner = ChecksummedStore(self.files, ChecksumFiles(str(directory), durable=synced, boot_id=boot))
        inner.distrust = True
        self.log = StripLog(str(directory), synced=synced, size_bytes=LOG_BYTES)
        if journal:
            left = Left()
            replay(str(directory), inner, block_size_shift=22, left=left)
            self.journal = Journal(str(directory), LOG_BYTES, left=left)
            self.store = JournaledStore(inner, self.journal)
        else:
            self.log.replay(inner, block_size_shift=22)
            self.log.begin()
            self.store = StripStore(inner, self.log)
        inner.distrust = False
        self.inner = inner
        self.records = self.store.strips_left.records

    def get(self, key):
        buffer = bytearray(SIZE)
        count = self.store.read_into(key, memoryview(buffer), offset_bytes=0)
        return bytes(buffer[:count])

    def put(self, key, content):
        self.store.create(key, content, offset_bytes=0, size_bytes=SIZE, sparse=False, durable=True)
        self.records.pop(key.oid, None)

    def change(self, key, count, content, low_water):
        """All of the strip; whether it was written beside."""
        staged = self.store.stage(key, content, durable=self.synced)
        old = () if staged else ((0, self.get(key)),)
        self._make(key, count, old, () if staged else ((0, content),), low_water, staged)
        return staged is not None

    def change_part(self, key, count, data, low_water):
        self._make(key, count, ((0, self.get(key)[: len(data)]),), ((0, data),), low_water, None)

    def _make(self, key, count, old, new, low_water, staged):
        record = Record(PRIMARY | count, 5, 9, key, old, HOLDERS, exchange=staged)
        assert self.store.write_strips([StripChange(record, low_water, new, staged)]) == [None]
        self.records[key.oid] = record

    def take_back(self, key):
        _put_back(self.store, self.records.pop(key.oid), self.synced)

    def crash(self):
        made = self.journal or self.log.made
        if made is not None:
            made.close(remove=False)

    def end(self):
        """In order."""
        if self.journal is not None:
            self.journal.finish()
        self.log.finish()
        self.store.close()


def spares(directory):
    return sorted(name for name in os.listdir(directory / "obj" / ".stale") if name.startswith("spare."))


class Story:
    """What happens to the strips of one sheep, by chance, and what must be there afterwards."""

    def __init__(self, sheep, dice):
        self.sheep = sheep
        self.dice = dice
        self.count = 0
        self.now = {}
        self.before = {}  # of the last change, unless it is known to be complete
        self.beside = 0
        for key in KEYS:
            self.now[key] = bytes(SIZE)
            sheep.put(key, bytes(SIZE))

    def step(self):
        key = self.dice.choice(KEYS)
        self.count += 1
        what = self.dice.random()
        data = self.dice.randbytes(4) * (SIZE // 4)
        low_water = max(1, self.count - self.dice.randrange(8))
        if what < 0.6:
            self.beside += self.sheep.change(key, self.count, data, low_water)
            self.before[key] = self.count, self.now[key]
            self.now[key] = data
        elif what < 0.8:
            self.sheep.change_part(key, self.count, data[:PART], low_water)
            self.before[key] = self.count, self.now[key]
            self.now[key] = data[:PART] + self.now[key][PART:]
        elif what < 0.9:
            if key in self.before and key.oid in self.sheep.records:
                self.sheep.take_back(key)
                self.now[key] = self.before.pop(key)[1]
            return
        elif what < 0.95:
            self.sheep.store.retire(key, 3)
            self.sheep.store.revive(key, 3)
            return
        else:
            self.sheep.put(key, data)
            self.now[key] = data
            self.before.pop(key, None)
            return
        # What is complete is never taken back.
        for other, (count, _) in list(self.before.items()):
            if count < low_water:
                del self.before[other]


def check(sheep, now, before):
    """What was acknowledged is there; what may go back goes back."""
    for key, content in now.items():
        assert sheep.get(key) == content, f"{key}"
    for key, (count, content) in sorted(before.items()):
        record = sheep.records[key.oid]
        assert record.number == PRIMARY | count and record.whole
        sheep.take_back(key)
        assert sheep.get(key) == content, f"{key}"


@pytest.mark.parametrize("journal", [False, True], ids=["log", "journal"])
@pytest.mark.parametrize(("make_store", "seed"), [(plain, 0), (plain, 1), (tree, 2)], ids=["plain", "plain2", "tree"])
def test_power_loss(tmp_path, monkeypatch, make_store, journal, seed):
    """After a power loss at any moment, each strip is as it was acknowledged, and its last change can be taken back."""
    dice = random.Random(seed)
    disks = LossyFiles(tmp_path / "now", monkeypatch, limit=SIZE)
    monkeypatch.setattr(filestore_spares, "RESTING_MAX", 3)
    story = Story(Sheep(tmp_path / "now", make_store, journal=journal), dice)
    images = []
    for number in range(120):
        story.step()
        if dice.random() < 0.08:
            target = tmp_path / f"loss{number}"
            disks.image(target, dice)
            shutil.copyfile(tmp_path / "now/sums/state", target / "sums/state")
            images.append((target, dict(story.now), dict(story.before)))
    story.sheep.crash()
    monkeypatch.undo()
    monkeypatch.setattr(io, "file_id", disks.file_id)

    assert story.beside > 30
    reverts = 0
    for target, now, before in images:
        sheep = Sheep(target, make_store, journal=journal, boot="second")
        reverts += len(before)
        check(sheep, now, before)
        sheep.change(KEYS[0], 1000, b"z" * SIZE, 1000)
        sheep.crash()
        again = Sheep(target, make_store, journal=journal, boot="second")
        assert again.get(KEYS[0]) == b"z" * SIZE
        again.end()
        assert spares(target) == [], "after an orderly end, all is as the original knows it"
        assert not left_journal(str(target), STRIPS) and not left_journal(str(target), JOURNAL)
    assert reverts > 5


@pytest.mark.parametrize("seed", range(2))
def test_killed_process(tmp_path, seed):
    """The same for a process with -n that is killed: what it wrote is in the page cache."""
    dice = random.Random(seed)
    story = Story(Sheep(tmp_path / "a", plain, synced=False), dice)
    for _ in range(60):
        story.step()
        if dice.random() < 0.2:
            story.sheep.crash()
            story.sheep = Sheep(tmp_path / "a", plain, synced=False)
            for key, (count, _) in story.before.items():
                assert story.sheep.records[key.oid].number == PRIMARY | count
    story.sheep.crash()

    assert story.beside > 10
    check(Sheep(tmp_path / "a", plain, synced=False), story.now, story.before)


@pytest.fixture
def sheep(tmp_path):
    made = Sheep(tmp_path / "a", plain)
    made.put(KEYS[0], b"a" * SIZE)
    yield made
    made.end()


def test_died_between_log_and_exchange(sheep, tmp_path, monkeypatch):
    """A change that is in the log and not in the strip yet is made by the replay."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sheep.files, "exchange", _dies)
        sheep.change(KEYS[0], 1, b"b" * SIZE, 1)
    assert sheep.get(KEYS[0]) == b"a" * SIZE
    sheep.crash()

    again = Sheep(tmp_path / "a", plain)

    check(again, {KEYS[0]: b"b" * SIZE}, {KEYS[0]: (1, b"a" * SIZE)})
    again.end()


def _dies(_):
    raise KeyboardInterrupt


def test_died_while_it_was_taken_back(sheep, tmp_path, monkeypatch):
    """A strip that was on its way back does not count as one that has the change."""
    sheep.change(KEYS[0], 1, b"b" * SIZE, 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sheep.files, "put_back", lambda *_, **__: _dies(None))
        sheep.take_back(KEYS[0])
    sheep.crash()

    again = Sheep(tmp_path / "a", plain)

    assert not again.records[KEYS[0].oid].whole
    again.take_back(KEYS[0])
    assert again.get(KEYS[0]) == b"a" * SIZE
    again.end()


def test_old_content_is_lost(sheep):
    """A strip that cannot be taken back, whose old file was removed, is removed: others have what it is made of."""
    sheep.change(KEYS[0], 1, b"b" * SIZE, 1)
    for name in spares(sheep.directory):
        (sheep.directory / "obj" / ".stale" / name).unlink()

    sheep.take_back(KEYS[0])

    assert not sheep.store.exists(KEYS[0])


def test_files_are_used_again(sheep):
    """Many whole changes take a few files, of which the clean-up of the stale area and a restart know nothing."""
    for count in range(1, 60):
        assert sheep.change(KEYS[0], count, bytes([count]) * SIZE, count)
    assert len(spares(sheep.directory)) <= filestore_spares.RESTING_MAX + 2
    sheep.store.purge_stale()
    sheep.crash()
    again = Sheep(sheep.directory, plain)
    assert spares(again.directory)
    check(again, {KEYS[0]: bytes([59]) * SIZE}, {KEYS[0]: (59, bytes([58]) * SIZE)})

    for _ in range(2):
        again.store.upkeep()

    assert len(spares(again.directory)) <= 1, "what nobody uses goes after a while"
    again.end()
    assert spares(again.directory) == []


def test_version_that_was_set_aside_is_left_alone(sheep):
    """A file that is a set-aside version as well is not written to for another object."""
    sheep.store.retire(KEYS[0], 3)
    sheep.store.revive(KEYS[0], 3)
    for count in range(1, 40):
        assert sheep.change(KEYS[0], count, bytes([count]) * SIZE, count)

    buffer = bytearray(SIZE)
    sheep.store.read_stale_into(KEYS[0], 3, memoryview(buffer), offset_bytes=0)
    assert buffer == b"a" * SIZE


def test_in_place_where_it_must_be(sheep, monkeypatch):
    """Of another size, of no shard, on a file system that cannot exchange names, without space: nothing is staged."""
    store = sheep.store
    assert store.stage(KEYS[0], b"b" * (SIZE - 1), durable=True) is None
    assert store.stage(KEYS[1], b"b" * SIZE, durable=True) is None
    with monkeypatch.context() as patch:
        patch.setattr(filestore_spares, "ROOM_BYTES", 1 << 62)
        assert store.stage(KEYS[0], b"b" * SIZE, durable=True) is None
    with monkeypatch.context() as patch:
        patch.setattr(filestore_spares, "BYTES_MAX", SIZE - 1)
        assert store.stage(KEYS[0], b"b" * SIZE, durable=True) is None
    with monkeypatch.context() as patch:
        patch.setattr(io, "_renameat2", None)
        assert store.stage(KEYS[0], b"b" * SIZE, durable=True) is None
        assert not sheep.change(KEYS[0], 1, b"c" * SIZE, 1)
    assert sheep.get(KEYS[0]) == b"c" * SIZE
    assert spares(sheep.directory) == []


def test_replaced_or_gone_meanwhile(sheep):
    """What was staged for a strip does not replace another one."""
    staged = sheep.store.stage(KEYS[0], b"b" * SIZE, durable=True)
    sheep.put(KEYS[0], b"c" * SIZE)
    with pytest.raises(StoreBusy):
        sheep.inner.exchange(staged)
    staged = sheep.store.stage(KEYS[0], b"b" * SIZE, durable=True)
    sheep.store.remove(KEYS[0])
    with pytest.raises(ObjectNotFound):
        sheep.inner.exchange(staged)
    assert REPLICA not in {key.index for key in sheep.store.keys()}  # noqa: SIM118
