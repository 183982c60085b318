"""The write journal: a store behind it keeps the contract, and what it made durable survives whatever happens."""

import errno
import hashlib
import os
import random
import threading
import time
from pathlib import Path

import pytest

from sheepdog.contracts.store import ShardKey, StoreOptions
from sheepdog.daemon.config import JournalConfig, SheepConfig
from sheepdog.daemon.journal import Journal, start_journal
from sheepdog.daemon.journal_files import STRIPS, JournalFile, file_paths, replay
from sheepdog.daemon.journaled_store import JournaledStore
from sheepdog.errors import ConfigError, StoreDeviceError, StoreFull
from sheepdog.model.journal_entry import JournalEntry, JournalKind, scan
from sheepdog.testing.memory_store import MemoryMedium, MemoryStore
from sheepdog.testing.store_kit import StoreKit
from sheepdog.testing.store_tools import KEY, OTHER, get, put
from sheepdog.testing.vectors import store_facts, store_files
from sheepdog_store_plain import sheepdog_object_store as plain_store
from sheepdog_store_tree import sheepdog_object_store as tree_store

MiB = 1 << 20
OPTIONS = StoreOptions(("/d",))
STRIP = ShardKey(0x0012345600000001, 3)


class TestJournaledStore(StoreKit):
    several_disks = False

    @pytest.fixture
    def store_factory(self, tmp_path):
        made = []

        def make(options):
            number = len(made)
            directory = tmp_path / f"journal{number}"
            directory.mkdir()
            made.append(Journal(str(directory), 64 * MiB))
            return JournaledStore(plain_store(options), made[-1])

        yield make
        for journal in made:
            journal.finish()


class Machine:
    """A disk that forgets, a journal that does not, and a daemon that can be started again on both."""

    def __init__(self, directory, size=2 * MiB):
        self.directory = str(directory)
        self.size = size
        self.medium = MemoryMedium()
        self.start()

    def start(self):
        inner = MemoryStore(OPTIONS, self.medium)
        self.replayed = replay(self.directory, inner, block_size_shift=22)
        self.journal = Journal(self.directory, self.size)
        self.store = JournaledStore(inner, self.journal)

    def lose_power(self, chance=None):
        """The journal files keep what was written to them, the disk what was flushed."""
        self.journal.close(remove=False)
        self.medium.lose_power(chance)
        self.start()


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path)
    yield made
    made.journal.close(remove=True)


def test_durable_changes_survive(machine):
    """A durable create, write or removal is there after power loss although no shard was flushed."""
    put(machine.store, KEY, b"a" * 1000, durable=True)
    put(machine.store, OTHER, b"b" * 1000, durable=True)
    put(machine.store, STRIP, b"c" * 1000, durable=True)
    machine.store.write(KEY, b"new", offset_bytes=100, durable=True)
    machine.store.write(STRIP, b"strip", offset_bytes=0, durable=True)
    machine.store.remove(OTHER)
    machine.store.sync([OTHER])
    assert machine.medium.flush_count == 0

    machine.lose_power()

    assert list(machine.store.keys()) == [KEY, STRIP] or set(machine.store.keys()) == {KEY, STRIP}
    assert get(machine.store, KEY) == b"a" * 100 + b"new" + b"a" * 897
    assert get(machine.store, STRIP) == b"strip" + b"c" * 995


def test_group_commit(machine):
    """Writes that nobody waited for become durable together, with one write to the journal."""
    put(machine.store, KEY, bytes(100_000), durable=True)
    calls = []
    real = JournalFile.append

    def counting(self, buffers, length):
        calls.append(length)
        real(self, buffers, length)

    JournalFile.append = counting
    try:
        for number in range(50):
            machine.store.write(KEY, bytes([number + 1]) * 1000, offset_bytes=number * 1000, durable=False)
        machine.store.sync([KEY])
    finally:
        JournalFile.append = real

    machine.lose_power()

    assert len(calls) == 1
    assert get(machine.store, KEY, 50_000) == b"".join(bytes([number + 1]) * 1000 for number in range(50))


def test_lent_buffers(machine):
    """A buffer that is reused after a write was accepted does not change what the journal says."""
    put(machine.store, KEY, bytes(1000), durable=True)
    buffer = bytearray(b"x" * 1000)
    machine.store.write(KEY, buffer, offset_bytes=0, durable=False)
    buffer[:] = b"y" * 1000
    machine.store.sync([KEY])

    machine.lose_power()

    assert get(machine.store, KEY) == b"x" * 1000


@pytest.mark.parametrize("seed", range(6))
def test_more_than_both_halves(tmp_path, seed):
    """Whatever the journal wrapped over, and whatever the disk kept by chance, every acknowledged byte is there."""
    machine = Machine(tmp_path, size=MiB)
    dice = random.Random(seed)
    expected = {}
    for _ in range(3):
        for _ in range(150):
            key = ShardKey(dice.randrange(1, 6), dice.choice((-1, 2)))
            action = dice.random()
            if key not in expected or action < 0.1:
                content = dice.randbytes(20_000)
                put(machine.store, key, content, durable=True)
                expected[key] = bytearray(content)
            elif action < 0.15:
                machine.store.remove(key)
                machine.store.sync([key])
                del expected[key]
            else:
                offset = dice.randrange(15_000)
                data = dice.randbytes(dice.randrange(1, 5000))
                machine.store.write(key, data, offset_bytes=offset, durable=True)
                expected[key][offset : offset + len(data)] = data
        machine.lose_power(dice if dice.random() < 0.5 else None)

        assert set(machine.store.keys()) == set(expected), f"seed {seed}"
        for key, content in expected.items():
            assert get(machine.store, key) == content, f"seed {seed} {key}"
    machine.journal.finish()


def test_concurrent_writers(machine):
    """Writers on many threads, over several switches of the halves, lose nothing."""
    expected = {}

    def work(number):
        key = ShardKey(number + 1)
        dice = random.Random(number)
        content = bytearray(dice.randbytes(8000))
        put(machine.store, key, bytes(content), durable=True)
        for _ in range(80):
            data = dice.randbytes(4000)
            offset = dice.randrange(4000)
            machine.store.write(key, data, offset_bytes=offset, durable=True)
            content[offset : offset + 4000] = data
        expected[key] = content

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    machine.lose_power()

    assert len(expected) == 8
    assert {key: get(machine.store, key) for key in expected} == expected


def test_set_aside(machine):
    """What was set aside after it was journaled is not brought back to life over what came later."""
    put(machine.store, KEY, b"old" * 100, durable=True)
    machine.store.retire(KEY, 3)
    machine.store.sync([])
    machine.medium.disk("/d").flush((KEY, 3))
    machine.medium.disk("/d").flush((KEY, -1))

    machine.lose_power()

    assert list(machine.store.keys()) == []
    assert list(machine.store.stale_keys()) == [(KEY, 3)]


def test_wiped(machine):
    """After a format nothing of before comes back."""
    put(machine.store, KEY, b"old" * 100, durable=True)
    machine.store.wipe()

    machine.lose_power()

    assert list(machine.store.keys()) == []


def test_refused_create_does_not_come_true(tmp_path):
    """A create that the disk refused is not made by a replay, and what was there before is unharmed."""
    machine = Machine(tmp_path)
    machine.medium.capacity_bytes = 10_000
    put(machine.store, KEY, b"k" * 1000, durable=True)
    with pytest.raises(StoreFull):
        put(machine.store, OTHER, bytes(20_000), durable=True)

    machine.lose_power()

    assert list(machine.store.keys()) == [KEY]
    assert get(machine.store, KEY) == b"k" * 1000


def test_replay_twice(machine):
    """A crash during the replay is no harm: it is repeated."""
    put(machine.store, KEY, b"a" * 1000, durable=True)
    machine.store.write(KEY, b"b" * 10, offset_bytes=5, durable=True)
    machine.store.remove(KEY)
    put(machine.store, KEY, b"c" * 500, durable=True)
    machine.journal.close(remove=False)
    machine.medium.lose_power()
    store = MemoryStore(OPTIONS, machine.medium)

    for _ in range(3):
        replay(machine.directory, store, block_size_shift=22)
        assert get(store, KEY) == b"c" * 500
    machine.start()


@pytest.mark.parametrize("cut", [1, 4, 508, 600, 4000])
def test_torn_end(machine, cut):
    """JRN-5: the last record, cut short, is ignored; those before it are replayed."""
    put(machine.store, KEY, b"a" * 4000, durable=True)
    machine.store.write(KEY, b"b" * 4000, offset_bytes=0, durable=True)
    end = machine.journal._files[0].end
    machine.journal.close(remove=False)
    machine.medium.lose_power()
    os.truncate(file_paths(machine.directory)[0], end - cut)

    machine.start()

    assert machine.replayed == 1
    assert get(machine.store, KEY) == b"a" * 4000


def test_write_error(machine, caplog):
    """A journal that cannot be written is given up: everything is flushed, the files are gone, work goes on durably."""
    put(machine.store, KEY, b"a" * 1000, durable=True)

    def broken(*_):
        raise OSError(errno.EIO, "input/output error")

    for file in machine.journal._files:
        file.append = broken
    machine.store.write(KEY, b"b" * 10, offset_bytes=0, durable=True)
    put(machine.store, OTHER, b"o" * 10, durable=True)
    machine.store.write(KEY, b"c" * 10, offset_bytes=20, durable=True)

    assert "going on without a journal" in caplog.text
    assert not any(os.path.exists(path) for path in file_paths(machine.directory))
    machine.medium.lose_power()
    store = MemoryStore(OPTIONS, machine.medium)
    assert get(store, KEY) == b"b" * 10 + b"a" * 10 + b"c" * 10 + b"a" * 970
    assert get(store, OTHER) == b"o" * 10
    machine.start()


def test_disk_fails_while_a_half_is_emptied(tmp_path):
    """A disk that does not flush is reported to a writer, who can go on once the disk is out; nothing hangs."""
    machine = Machine(tmp_path, size=MiB)
    put(machine.store, KEY, bytes(100_000), durable=True)
    refusing = threading.Event()
    real = machine.store.inner.sync

    def flush(keys):
        if refusing.is_set():
            raise StoreDeviceError("disk /d failed", path="/d")
        real(keys)

    machine.journal.serve(flush)
    refusing.set()
    with pytest.raises(StoreDeviceError):
        for number in range(40):
            machine.store.write(KEY, bytes([number]) * 50_000, offset_bytes=0, durable=True)
    refusing.clear()
    for number in range(40):
        machine.store.write(KEY, bytes([number]) * 50_000, offset_bytes=0, durable=True)

    machine.lose_power()
    assert get(machine.store, KEY, 50_000) == bytes([39]) * 50_000
    machine.journal.finish()


def test_larger_than_the_journal(tmp_path):
    """A change that fits no journal file is durable by itself, and nothing older is replayed over it."""
    machine = Machine(tmp_path, size=MiB)
    put(machine.store, KEY, b"a" * 1000, durable=True)
    put(machine.store, KEY, b"b" * MiB, durable=True)
    machine.store.write(KEY, b"c" * (MiB - 1), offset_bytes=0, durable=True)

    machine.lose_power()

    assert get(machine.store, KEY) == b"c" * (MiB - 1) + b"b"
    machine.journal.finish()


# ---- start and end


def config(tmp_path, **options):
    return SheepConfig(str(tmp_path), (str(tmp_path / "obj"),), journal=JournalConfig(64 * MiB, **options))


def test_clean_end(tmp_path):
    """JRN-2: after a clean end there is no journal file and nothing is missing."""
    machine = Machine(tmp_path)
    put(machine.store, KEY, b"a" * 1000, durable=True)
    machine.journal.finish()

    machine.medium.lose_power()

    assert not any(os.path.exists(path) for path in file_paths(machine.directory))
    assert get(MemoryStore(OPTIONS, machine.medium), KEY) == b"a" * 1000


def test_skip_and_without(tmp_path, caplog):
    """``skip`` replays nothing; a start without -j replays what is found all the same."""
    for options, expected in (({"skip": True}, []), (None, [KEY])):
        machine = Machine(tmp_path)
        put(machine.store, KEY, b"a" * 1000, durable=True)
        machine.journal.close(remove=False)
        machine.medium.lose_power()
        store = MemoryStore(OPTIONS, machine.medium)
        started = config(tmp_path, **options) if options else SheepConfig(str(tmp_path), (str(tmp_path / "obj"),))
        journal = start_journal(started, store, block_size_shift=22)
        assert list(store.keys()) == expected
        if journal is not None:
            journal.finish()
        assert not any(os.path.exists(path) for path in file_paths(str(tmp_path)))


def test_start_errors(tmp_path, monkeypatch):
    """JRN-4: a missing directory and a full file system are told in one line."""
    store = MemoryStore(OPTIONS, MemoryMedium())
    with pytest.raises(ConfigError, match="does not exist"):
        start_journal(config(tmp_path, directory=str(tmp_path / "none")), store, block_size_shift=22)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"cannot reserve .*No space left"):
        start_journal(config(tmp_path), store, block_size_shift=22)
    assert not any(os.path.exists(path) for path in file_paths(str(tmp_path)))

    calls = []

    def full_later(fd, *rest):
        calls.append(fd)
        if len(calls) > 1:
            full()

    monkeypatch.setattr(os, "posix_fallocate", full_later)
    with pytest.raises(ConfigError, match=r"cannot reserve .*file1.*No space left"):
        start_journal(config(tmp_path), store, block_size_shift=22)
    assert not any(os.path.exists(path) for path in file_paths(str(tmp_path))), "space that nobody gives back"


@pytest.mark.parametrize("skip", [False, True])
def test_journal_of_a_running_sheep(tmp_path, skip):
    """JRN-4: a second sheep that names the same directory is refused before it replays or empties anything."""
    machine = Machine(tmp_path)
    put(machine.store, KEY, b"a" * 1000, durable=True)
    before = [Path(path).read_bytes() for path in file_paths(machine.directory)]
    other = MemoryStore(OPTIONS, MemoryMedium())

    with pytest.raises(ConfigError, match="is used by another sheep"):
        start_journal(config(tmp_path, skip=skip), other, block_size_shift=22)

    assert list(other.keys()) == []
    assert [Path(path).read_bytes() for path in file_paths(machine.directory)] == before
    machine.journal.finish()


def test_readable_by_the_original(machine):
    """Every entry of ours has the original's head and marker, and lies where it looks for it."""
    put(machine.store, KEY, b"a" * 1000, durable=True)
    machine.store.write(KEY, b"b" * 600, offset_bytes=7, durable=True)
    machine.store.remove(KEY)
    machine.store.sync([KEY])
    with open(file_paths(machine.directory)[0], "rb") as file:
        content = file.read()
    placed = list(scan(content))

    assert [(one.entry.kind, one.entry.create, one.entry.offset, len(one.entry.data)) for one in placed] == [
        (JournalKind.STORE, True, 0, 1000), (JournalKind.STORE, False, 7, 600), (JournalKind.REMOVE, False, 0, 0),
    ]  # fmt: skip
    for at, entry in placed:
        theirs = JournalEntry(entry.kind, entry.oid, entry.offset, entry.data, entry.create, checked=False).pack()
        ours = content[at : at + len(entry)]
        assert ours[:33] == theirs[:33] and ours[508:] == theirs[508:]


@pytest.mark.parametrize("name", ["one-node-journal-killed", "one-node-journal-lost-writes"])
@pytest.mark.parametrize("make", [plain_store, tree_store])
def test_journal_of_the_original(tmp_path, name, make):
    """Objects come back from the original's journal alone, byte for byte, in either layout."""
    (tmp_path / "disk").mkdir()
    facts = store_facts(name)
    for path, content in store_files(name, lambda path: "/journal_file" in path):
        (tmp_path / path.rsplit("/", 1)[-1]).write_bytes(content)
        os.utime(tmp_path / path.rsplit("/", 1)[-1], ns=(len(content), 2 if path.endswith("1") else 1))
    store = make(StoreOptions((str(tmp_path / "disk"),)))

    replay(str(tmp_path), store, block_size_shift=22)

    whole = {
        entry["path"].rsplit("/", 1)[-1]: entry
        for entry in store_facts("one-node-journal-killed")["files"]
        if "/obj/" in entry["path"] and "sha256" in entry and "." not in entry["path"].rsplit("/", 1)[-1]
    }
    assert whole and facts["journal_entries"]
    assert {f"{key.oid:016x}" for key in store.keys()} == set(whole)  # noqa: SIM118
    if name == "one-node-journal-killed":
        for key in store.keys():  # noqa: SIM118
            entry = whole[f"{key.oid:016x}"]
            assert store.size(key) == entry["size"]
            assert hashlib.sha256(get(store, key)).hexdigest() == entry["sha256"]


def test_strip_of_the_original(tmp_path):
    """The original does not note strip numbers: its entry goes to the one strip that the sheep has of the object."""
    store = MemoryStore(OPTIONS, MemoryMedium())
    put(store, ShardKey(9, 2), bytes(2000))
    entry = JournalEntry(JournalKind.STORE, 9, 100, b"strip", checked=False)
    (tmp_path / "journal_file0").write_bytes(entry.pack())

    assert replay(str(tmp_path), store, block_size_shift=22) == 1
    assert list(store.keys()) == [ShardKey(9, 2)]
    assert get(store, ShardKey(9, 2), 5, 100) == b"strip"


def test_number_order(tmp_path):
    """The file with the older entries comes first, whatever the clock said."""
    store = MemoryStore(OPTIONS, MemoryMedium())
    first = JournalEntry(JournalKind.STORE, 9, 0, b"old", create=True, size_bytes=3, number=5)
    second = JournalEntry(JournalKind.STORE, 9, 0, b"new", number=6)
    (tmp_path / "journal_file1").write_bytes(first.pack())
    (tmp_path / "journal_file0").write_bytes(second.pack())
    os.utime(tmp_path / "journal_file1", ns=(9, 9))
    os.utime(tmp_path / "journal_file0", ns=(1, 1))

    replay(str(tmp_path), store, block_size_shift=22)

    assert get(store, ShardKey(9)) == b"new"


def test_more_creations_at_once_than_the_journal_holds(tmp_path):
    """Creations that together exceed the journal do not wait for each other for ever: all end, all survive."""
    machine = Machine(tmp_path, 1 * MiB)
    keys = [ShardKey(0x0012345600000000 + number) for number in range(10)]
    threads = [
        threading.Thread(target=put, args=(machine.store, key, bytes([number + 1]) * 200_000), kwargs={"durable": True})
        for number, key in enumerate(keys)
    ]
    with machine.journal._io:  # until all of them have their entry on the way
        for thread in threads:
            thread.daemon = True
            thread.start()
        deadline = time.monotonic() + 30
        while machine.journal.pending < len(keys):
            assert time.monotonic() < deadline, "a creation did not begin"
            time.sleep(0.001)
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads), "creations wait for each other"

    machine.lose_power()

    assert [get(machine.store, key) for key in keys] == [bytes([number + 1]) * 200_000 for number in range(10)]
    machine.journal.close(remove=True)


def test_first_appends_write_ahead(tmp_path):
    """What is written for the first time is written with zeros behind it, and the next append finds its blocks in use.

    Without that, each append to reserved space costs a commit of the file system's own journal.
    """
    path = str(tmp_path / "journal_file0")
    file = JournalFile(path, 4 * MiB)
    written = []
    real = os.pwritev

    def noting(fd, buffers, at, *flags):
        written.append((at, sum(map(len, buffers))))
        return real(fd, buffers, at, *flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pwritev", noting)
        for _ in range(3):
            file.append([b"x" * 512], 512)
        file.clear()
        file.append([b"y" * 512], 512)
    assert written == [(0, 512 + MiB), (512, 512), (1024, 512), (0, 512)]
    file.append([bytes(4 * MiB - 512)], 4 * MiB - 512)
    assert os.path.getsize(path) == 4 * MiB, "nothing is written behind the end"
    file.close()


@pytest.mark.parametrize("zeroed", [True, False], ids=["journal", "log"])
def test_emptied_file_cut_short(tmp_path, zeroed):
    """Of a file that was being emptied when the power went nothing is replayed, whatever of it was overwritten.

    With the newer one of two entries gone, the older one would bring back what it replaced.
    """
    path = tmp_path / "journal_file0"
    file = JournalFile(str(path), 1 * MiB, zeroed=zeroed)
    entries = [JournalEntry(JournalKind.STORE, 9, 0, bytes([number]) * 600, number=number) for number in (1, 2, 3)]
    whole = b"".join(entry.pack(1) for entry in entries)
    file.append([whole], len(whole))
    file.clear()
    file.close()
    emptied = path.read_bytes()
    assert any(emptied) is not zeroed
    for lost in range(512, len(whole), 512):  # of what came after the first sector, each one may have been overwritten
        path.write_bytes(bytes(512) + whole[512:lost] + bytes(512) + whole[lost + 512 :])
        store = MemoryStore(OPTIONS, MemoryMedium())
        put(store, ShardKey(9), b"z" * 600)

        assert replay(str(tmp_path), store, block_size_shift=22) == 0
        assert get(store, ShardKey(9)) == b"z" * 600


def test_left_of_an_earlier_use(tmp_path):
    """Entries that lie behind the last one since the file was emptied do not count, be that one whole or not."""
    path = tmp_path / "strip_log0"
    file = JournalFile(str(path), 1 * MiB, zeroed=False)
    for number in range(1, 9):
        if number == 7:
            file.clear()
        entry = JournalEntry(JournalKind.STORE, 9, 0, bytes([number]) * 600, number=number)
        file.append([entry.pack(file.use)], len(entry))
    file.close()
    whole = path.read_bytes()
    for content, applied in ((whole, 2), (whole[:2200] + b"\0" + whole[2201:], 1), (b"\0" + whole[1:], 0)):
        path.write_bytes(content)
        store = MemoryStore(OPTIONS, MemoryMedium())
        put(store, ShardKey(9), b"z" * 600)

        assert replay(str(tmp_path), store, block_size_shift=22, name=STRIPS) == applied
        assert get(store, ShardKey(9)) == (bytes([6 + applied]) * 600 if applied else b"z" * 600)
