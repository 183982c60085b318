"""The journal of strips: changes of strips survive a crash together with what undoes them, in files of bounded size."""

import errno
import os
from dataclasses import dataclass

import pytest

from sheepdog.contracts.store import ShardKey, StoreOptions
from sheepdog.daemon.journal import Journal
from sheepdog.daemon.journal_files import STRIPS, Left, file_paths, left_journal, replay
from sheepdog.daemon.journaled_store import JournaledStore
from sheepdog.daemon.strip_memory import Record, StripChange, StripMemory
from sheepdog.daemon.strip_store import StripLog, StripStore
from sheepdog.errors import StoreDeviceError
from sheepdog.model.ids import data_oid
from sheepdog.model.node import NodeId
from sheepdog.testing.memory_store import MemoryMedium, MemoryStore
from sheepdog.testing.store_kit import StoreKit
from sheepdog_store_plain import sheepdog_object_store as plain_store

MiB = 1 << 20
OPTIONS = StoreOptions(("/d",))
STRIP = ShardKey(0x0012345600000001, 3)
OTHER = ShardKey(0x0012345600000002, 0)
PRIMARY = 1 << 63 | 7 << 32
HOLDERS = tuple(NodeId.of("10.0.0.1", 7000 + index) for index in range(6))


class TestStripStore(StoreKit):
    several_disks = False

    @pytest.fixture
    def store_factory(self, tmp_path):
        logs = []

        def make(options):
            directory = tmp_path / f"log{len(logs)}"
            directory.mkdir()
            logs.append(StripLog(str(directory), synced=True, size_bytes=4 * MiB))
            return StripStore(plain_store(options), logs[-1])

        yield make
        for log in logs:
            log.finish()


@dataclass
class Machine:
    """A disk that forgets, a log that does not, and a daemon that can be started again on both."""

    directory: str
    synced: bool = True
    size: int = 2 * MiB

    def __post_init__(self):
        self.medium = MemoryMedium()
        self.start()

    def start(self):
        inner = MemoryStore(OPTIONS, self.medium)
        self.log = StripLog(self.directory, synced=self.synced, size_bytes=self.size)
        self.log.replay(inner, block_size_shift=22)
        self.log.begin()
        self.store = StripStore(inner, self.log)

    def crash(self):
        """The power is gone and back."""
        if self.log.made is not None:
            self.log.made.close(remove=False)
        if self.synced:
            self.medium.lose_power()
        self.start()

    def put(self, key, content):
        self.store.create(key, content, offset_bytes=0, size_bytes=len(content), sparse=False, durable=True)

    def get(self, key):
        buffer = bytearray(self.store.size(key))
        self.store.read_into(key, memoryview(buffer), offset_bytes=0)
        return bytes(buffer)

    def change(self, count, offset, data, *, key=STRIP, low_water=1):
        old = self.get(key)[offset : offset + len(data)]
        record = Record(PRIMARY | count, 5, 9, key, ((offset, old),), HOLDERS)
        (result,) = self.store.write_strips([StripChange(record, low_water, ((offset, data),))])
        return result


@pytest.fixture
def machine(tmp_path):
    made = Machine(str(tmp_path))
    yield made
    made.log.finish()


@pytest.mark.parametrize("length", [1000, 200_000], ids=["small", "large"])
def test_change_survives_with_what_undoes_it(machine, length):
    """A change that was answered is there after a power loss, and so are the bytes before it."""
    machine.put(STRIP, b"a" * 300_000)
    assert machine.change(1, 100, b"b" * length) is None

    machine.crash()

    assert machine.get(STRIP) == b"a" * 100 + b"b" * length + b"a" * (300_000 - 100 - length)
    record = machine.store.strips_left.records[STRIP.oid]
    assert record == Record(PRIMARY | 1, 5, 9, STRIP, ((100, b"a" * length),), HOLDERS)


def test_large_change_over_a_small_one(machine):
    """A small change that is still in the log is not replayed over a large one that came after it."""
    machine.put(STRIP, b"a" * 300_000)
    assert machine.change(1, 50, b"b" * 1000) is None
    assert machine.change(2, 100, b"c" * 200_000) is None
    assert machine.change(3, 200, b"d" * 100) is None

    machine.crash()

    content = b"a" * 50 + b"b" * 50 + b"c" * 100 + b"d" * 100 + b"c" * 199_800 + b"a" * 99_900
    assert machine.get(STRIP) == content
    assert machine.store.strips_left.records[STRIP.oid].pieces == ((200, b"c" * 100),)


def test_half_of_a_large_change(machine, monkeypatch):
    """A large change that died before its bytes were flushed is on record, as one that the strip may have in part."""
    machine.put(STRIP, b"a" * 300_000)

    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(machine.store.inner, "write", dies)
        machine.change(1, 100, b"b" * 200_000)

    for _ in range(2):
        machine.crash()

        record = machine.store.strips_left.records[STRIP.oid]
        assert record.pieces == ((100, b"a" * 200_000),) and not record.whole
    assert machine.change(2, 100, b"c" * 200_000) is None
    machine.crash()
    assert machine.store.strips_left.records[STRIP.oid].whole


def test_killed_process(tmp_path):
    """With -n nothing is flushed; the death of the process leaves the change and what undoes it."""
    machine = Machine(str(tmp_path), synced=False)
    machine.put(STRIP, b"a" * 1000)
    assert machine.change(1, 0, b"b" * 10) is None
    assert machine.store.ready_for([]), "further small changes need no worker thread"

    machine.crash()

    assert machine.get(STRIP) == b"b" * 10 + b"a" * 990
    record = machine.store.strips_left.records[STRIP.oid]
    assert record.pieces == ((0, b"a" * 10),) and record.whole
    machine.log.finish()


def test_bounded(machine):
    """However much is written, the files keep their size; what is not known complete is never forgotten."""
    machine.put(STRIP, b"a" * 4096)
    machine.put(OTHER, b"a" * 4096)
    assert machine.change(1, 0, b"first", key=OTHER) is None
    for count in range(2, 1500):  # 6 MB of entries
        assert machine.change(count, 0, bytes([count % 256]) * 4000) is None

    assert sum(os.path.getsize(path) for path in file_paths(machine.directory, STRIPS)) == machine.size
    machine.crash()
    assert machine.get(STRIP)[:4000] == bytes([1499 % 256]) * 4000
    assert machine.get(OTHER)[:5] == b"first"
    assert machine.store.strips_left.records[OTHER.oid].pieces == ((0, b"aaaaa"),)
    assert machine.store.strips_left.records[STRIP.oid].number == PRIMARY | 1499


def test_much_that_is_under_way(machine):
    """Old bytes of changes that are not known to be complete, more than a file has room for, make the next file larger:
    all of them can be taken back after a crash. When they are complete the files have their size again."""
    keys = [ShardKey(data_oid(7, number), 1) for number in range(12)]
    for key in keys:
        machine.put(key, b"a" * 200_000)
    for count, key in enumerate(keys, start=1):
        assert machine.change(count, 0, b"b" * 190_000, key=key) is None  # 2.3 MB, in files of 1 MiB

    machine.crash()

    records = machine.store.strips_left.records
    assert {key.oid: (PRIMARY | count, ((0, b"a" * 190_000),)) for count, key in enumerate(keys, start=1)} == {
        oid: (record.number, record.pieces) for oid, record in records.items()
    }
    machine.put(STRIP, b"a" * 4096)
    for count in range(100, 1500):
        assert machine.change(count, 0, bytes([count % 256]) * 4000, low_water=count) is None
    assert sum(os.path.getsize(path) for path in file_paths(machine.directory, STRIPS)) == machine.size


def test_no_room_for_what_is_under_way(machine, monkeypatch, caplog):
    """A full disk leaves some of them out, and says so."""
    keys = [ShardKey(data_oid(7, number), 1) for number in range(12)]
    for key in keys:
        machine.put(key, b"a" * 200_000)

    def full(fd, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for count, key in enumerate(keys, start=1):
        assert machine.change(count, 0, b"b" * 190_000, key=key) is None
        monkeypatch.setattr(os, "posix_fallocate", full)  # once the log exists

    assert "could not be taken back" in caplog.text
    monkeypatch.undo()
    machine.crash()
    assert machine.get(keys[0])[:1] == b"b"


def test_complete_changes_are_forgotten(machine):
    """What is known to be complete leaves the log with its file, but not the knowledge that it is complete."""
    machine.put(STRIP, b"a" * 4096)
    machine.put(OTHER, b"a" * 4096)
    assert machine.change(1, 0, b"first", key=OTHER) is None
    for count in range(2, 1500):
        assert machine.change(count, 0, bytes([count % 256]) * 4000, low_water=count) is None

    machine.crash()

    left = machine.store.strips_left
    assert OTHER.oid not in left.records
    assert left.complete(OTHER.oid, PRIMARY | 1) and not left.complete(STRIP.oid, PRIMARY | 1499)


def test_decisions_survive(machine):
    """A change that was decided to stay is known to stay; one that was taken back is not on record."""
    for key in (STRIP, OTHER):
        machine.put(key, b"a" * 1000)
        assert machine.change(1, 0, b"b" * 10, key=key) is None
    machine.store.keep_strip(STRIP.oid, PRIMARY | 1)
    machine.store.write(OTHER, b"a" * 10, offset_bytes=0, durable=True)
    machine.store.drop_strip(OTHER)
    assert machine.change(1, 100, b"c", key=STRIP) is None  # takes what is waiting with it

    machine.crash()

    left = machine.store.strips_left
    assert left.complete(STRIP.oid, PRIMARY | 1) and OTHER.oid not in left.records
    assert machine.get(OTHER) == b"a" * 1000


def test_change_before_one_that_was_taken_back(machine):
    """Of a change that was taken back it is known, also after a crash, that the one before it stays."""
    machine.put(STRIP, b"a" * 1000)
    assert machine.change(1, 0, b"b" * 10) is None
    assert machine.change(2, 0, b"c" * 10) is None
    machine.store.write(STRIP, b"b" * 10, offset_bytes=0, durable=True)
    machine.store.drop_strip(STRIP)
    machine.store.meet_primary(5, 1)  # takes what is waiting with it

    machine.crash()

    left = machine.store.strips_left
    assert STRIP.oid not in left.records and left.complete(STRIP.oid, PRIMARY | 1)
    assert machine.get(STRIP) == b"b" * 10 + b"a" * 990


def test_repeated_replay(machine):
    """A crash during or after the replay changes nothing: records and content are the same again."""
    machine.put(STRIP, b"a" * 1000)
    assert machine.change(1, 0, b"b" * 10) is None
    for _ in range(3):
        machine.crash()

        assert machine.get(STRIP) == b"b" * 10 + b"a" * 990
        assert machine.store.strips_left.records[STRIP.oid].number == PRIMARY | 1


@pytest.mark.parametrize("what", ["create", "remove", "retire"])
def test_nothing_old_comes_back(machine, what):
    """What was logged of a strip is not replayed over what became of it later."""
    machine.put(STRIP, b"a" * 1000)
    assert machine.change(1, 0, b"b" * 10) is None
    if what == "create":
        machine.put(STRIP, b"new" * 100)
    elif what == "remove":
        machine.store.remove(STRIP)
        machine.store.sync([STRIP])
    else:
        machine.store.retire(STRIP, 4)
        machine.store.sync([STRIP])
        machine.put(STRIP, b"new" * 100)

    machine.crash()

    if what == "remove":
        assert not machine.store.exists(STRIP)
    else:
        assert machine.get(STRIP) == b"new" * 100
    assert what == "retire" or STRIP.oid not in machine.store.strips_left.records


def test_clean_end(machine):
    """A clean end flushes the strips and leaves no file; without a change there is none at all."""
    machine.put(STRIP, b"a" * 1000)
    assert not left_journal(machine.directory, STRIPS)
    assert machine.change(1, 0, b"b" * 10) is None
    assert left_journal(machine.directory, STRIPS)

    machine.log.finish()
    machine.medium.lose_power()

    assert os.listdir(machine.directory) == []
    assert machine.get(STRIP) == b"b" * 10 + b"a" * 990


def test_damaged_entry(machine):
    """An entry with a wrong checksum is left out: bytes that were never in the strip do not get into it."""
    machine.put(STRIP, b"a" * 1000)
    assert machine.change(1, 0, b"b" * 10) is None
    with open(file_paths(machine.directory, STRIPS)[0], "r+b") as file:
        file.seek(508 + 24 + 12 + 6 * 40)
        file.write(b"X")

    machine.crash()

    assert STRIP.oid not in machine.store.strips_left.records


def test_failing_disk_and_log(machine, caplog):
    """A strip that cannot be written is answered with the error; a log that cannot be written is given up."""
    machine.put(STRIP, b"a" * 1000)
    assert machine.change(1, 0, b"b" * 10) is None
    record = Record(PRIMARY | 2, 5, 9, STRIP, ((0, b"b"),), HOLDERS)
    machine.medium.break_disk("/d")
    (result,) = machine.store.write_strips([StripChange(record, 1, ((0, b"c"),))])
    assert isinstance(result, StoreDeviceError)
    machine.medium.disk("/d").broken = False
    assert not machine.store._journal.strips().records, "what failed is not on record"

    for file in machine.log.made._files:
        os.close(file._fd)
        file._fd = os.open(os.devnull, os.O_RDONLY)
    assert machine.change(3, 0, b"d" * 10) is None

    assert "going on without a journal" in caplog.text
    machine.medium.lose_power()
    assert machine.get(STRIP)[:10] == b"d" * 10


def test_from_one_journal_to_the_other(tmp_path):
    """What a run with -j left of strips is in the log of a run without, and the other way round."""
    machine = Machine(str(tmp_path))
    machine.put(STRIP, b"a" * 1000)
    assert machine.change(1, 0, b"b" * 10) is None
    machine.log.made.close(remove=False)
    machine.medium.lose_power()
    inner = MemoryStore(OPTIONS, machine.medium)
    left = Left()
    replay(str(tmp_path), inner, block_size_shift=22, name=STRIPS, left=left)
    journal = Journal(str(tmp_path), 2 * MiB, left=Left(strips=left.strips))
    machine.log.remove()
    store = JournaledStore(inner, journal)
    assert store.strips_left.records[STRIP.oid].number == PRIMARY | 1
    record = Record(PRIMARY | 2, 5, 9, STRIP, ((5, b"bb"),), HOLDERS)
    assert store.write_strips([StripChange(record, 2, ((5, b"cc"),))]) == [None]
    journal.close(remove=False)
    machine.medium.lose_power()

    inner = MemoryStore(OPTIONS, machine.medium)
    left = Left()
    assert replay(str(tmp_path), inner, block_size_shift=22, left=left) > 0
    log = StripLog(str(tmp_path), synced=True, size_bytes=2 * MiB)
    log.begin(left)
    store = StripStore(inner, log)

    assert store.strips_left.records[STRIP.oid] == record
    buffer = bytearray(10)
    store.read_into(STRIP, memoryview(buffer), offset_bytes=0)
    assert buffer == b"bbbbbccbbb"
    log.finish()
    journal = Journal(str(tmp_path), 2 * MiB)
    journal.close(remove=True)


def test_memory_is_bounded():
    """Of many large changes only those that may have to be taken back stay in memory."""
    memory = StripMemory()
    for count in range(1, 200):
        key = ShardKey(count, 0)
        memory.note(Record(PRIMARY | count, 1, 1, key, ((0, bytes(MiB)),), ()), max(1, count - 10))

    assert sum(record.size_bytes for record in memory.records.values()) <= 64 * MiB
    assert {PRIMARY | count for count in range(190, 200)} <= {record.number for record in memory.records.values()}


def test_record_that_is_said_twice():
    """A record that the new file of a log carries over, beside the entry that was on its way, is no decision."""
    memory = StripMemory()
    for _ in range(2):
        memory.note(Record(PRIMARY | 5, 1, 1, STRIP, ((0, b"old"),), HOLDERS), 1)

    assert not memory.complete(STRIP.oid, PRIMARY | 5)
    assert memory.records[STRIP.oid].pieces == ((0, b"old"),)


def test_marks_never_go_back():
    """Of marks that are noted in another order than they were sent, the highest counts."""
    memory = StripMemory()
    for low_water in (7, 9, 8):
        memory.note(Record(PRIMARY | 20 + low_water, 1, 1, STRIP, ((0, b"old"),), HOLDERS), low_water)

    assert memory.complete(OTHER.oid, PRIMARY | 8) and not memory.complete(OTHER.oid, PRIMARY | 9)
