"""Small writes of whole copies without ``-j``: durable through the log, and never replayed over what came later."""

import pytest

from sheepdog.contracts.store import ShardKey, StoreOptions
from sheepdog.daemon import strip_store
from sheepdog.daemon.strip_store import StripLog, StripStore
from sheepdog.errors import ObjectNotFound, StoreDeviceError
from sheepdog.testing.memory_store import MemoryMedium, MemoryStore

MiB = 1 << 20
COPY = ShardKey(0x0012345600000001)
OTHER = ShardKey(0x0012345600000002)
SIZE = 200_000


class Counting(MemoryStore):
    """Counts what it is asked to flush."""

    def __init__(self, medium):
        super().__init__(StoreOptions(("/d",)), medium)
        self.flushed = []
        self.during_flush = lambda: None

    def sync(self, keys):
        keys = list(keys)
        self.flushed += keys
        super().sync(keys)
        self.during_flush()


class Machine:
    """A sheep's store on a disk that forgets what was not flushed."""

    def __init__(self, directory, *, synced=True, size=2 * MiB):
        self.directory, self.synced, self.size = directory, synced, size
        self.medium = MemoryMedium()
        self.start()

    def start(self):
        self.inner = Counting(self.medium)
        self.log = StripLog(self.directory, synced=self.synced, size_bytes=self.size)
        self.log.replay(self.inner, block_size_shift=22)
        self.log.begin()
        self.store = StripStore(self.inner, self.log)
        self.inner.flushed.clear()

    def lose_power(self):
        if self.log.made is not None:
            self.log.made.close(remove=False)
        self.medium.lose_power()
        self.start()

    def create(self, key, byte, *, durable=True):
        data = byte * SIZE
        self.store.create(key, data, offset_bytes=0, size_bytes=SIZE, sparse=False, durable=durable)

    def write(self, key, data, offset=0):
        """As the event loop does it, up to the answer."""
        if not self.store.try_write(key, data, offset_bytes=offset):
            self.store.write(key, data, offset_bytes=offset, durable=False)
        self.store.sync((key,))

    def get(self, key):
        buffer = bytearray(self.store.size(key))
        self.store.read_into(key, memoryview(buffer), offset_bytes=0)
        return bytes(buffer)


@pytest.fixture
def machine(tmp_path):
    made = Machine(str(tmp_path))
    made.create(COPY, b"a")
    made.create(OTHER, b"a")
    made.write(OTHER, b"b")  # from the first write on there is a log
    made.inner.flushed.clear()
    yield made
    made.log.finish()


def test_written_once_for_all(machine):
    """A small write is durable without a flush of its object."""
    machine.write(COPY, b"c" * 4096, 4096)

    assert machine.inner.flushed == []
    machine.lose_power()
    assert machine.get(COPY) == b"a" * 4096 + b"c" * 4096 + b"a" * (SIZE - 8192)


def test_first_write_of_all(tmp_path):
    """The write that finds no log yet is durable as well."""
    machine = Machine(str(tmp_path))
    machine.create(COPY, b"a")
    machine.write(COPY, b"c" * 4096)

    machine.lose_power()

    assert machine.get(COPY)[:4097] == b"c" * 4096 + b"a"
    machine.log.finish()


@pytest.mark.parametrize("length", [30_000, 100_000], ids=["medium", "large"])
def test_larger_write_over_a_small_one(machine, length):
    """A small write that is still in the log is not replayed over a larger one that came after it, and none is lost."""
    machine.write(COPY, b"c" * 4096, 4096)
    machine.write(COPY, b"d" * length, 8000)
    machine.write(COPY, b"e" * 512, 9000)
    expected = machine.get(COPY)

    machine.lose_power()

    assert machine.get(COPY) == expected
    assert expected[4096:8000] == b"c" * 3904
    assert expected[8000:9512] == b"d" * 1000 + b"e" * 512


@pytest.mark.parametrize("durable", [False, True])
def test_large_write_that_is_durable_at_once(machine, durable):
    """What a worker writes past the log is not undone by a replay."""
    machine.write(COPY, b"c" * 4096, 4096)
    machine.store.write(COPY, b"d" * 100_000, offset_bytes=0, durable=durable)
    machine.store.sync((COPY,))

    machine.lose_power()

    assert machine.get(COPY) == b"d" * 100_000 + b"a" * (SIZE - 100_000)


def test_past_the_log_once(machine):
    """Only the first large write after small ones has to make the log forget them."""
    machine.write(COPY, b"c" * 4096)
    machine.store.write(COPY, b"d" * 100_000, offset_bytes=0, durable=True)
    machine.inner.flushed.clear()

    machine.store.write(COPY, b"e" * 100_000, offset_bytes=0, durable=True)

    assert machine.inner.flushed == []
    machine.lose_power()
    assert machine.get(COPY)[:100_001] == b"e" * 100_000 + b"a"


def test_made_anew(machine):
    """Nothing that was logged of an object is replayed over the one that replaced it."""
    machine.write(COPY, b"c" * 4096)
    machine.create(COPY, b"d")

    machine.lose_power()

    assert machine.get(COPY) == b"d" * SIZE


def test_received(machine):
    """The same when the one that replaced it came in pieces, as in recovery."""
    machine.write(COPY, b"c" * 4096)
    for durable in (True, False):
        incoming = machine.store.receive(COPY, SIZE, sparse=False)
        incoming.write(b"d" * SIZE, offset_bytes=0)
        incoming.finish(durable=durable)
        machine.store.sync((COPY,))

        machine.lose_power()

        assert machine.get(COPY) == b"d" * SIZE


def test_removed(machine):
    """An object that was removed stays away, also when one of its name was made since."""
    machine.write(COPY, b"c" * 4096)
    machine.write(OTHER, b"c" * 4096)
    for key in (COPY, OTHER):
        machine.store.remove(key)
        machine.store.sync((key,))
    machine.create(OTHER, b"d")

    machine.lose_power()

    with pytest.raises(ObjectNotFound):
        machine.store.size(COPY)
    assert machine.get(OTHER) == b"d" * SIZE


def test_set_aside_and_back(machine):
    """A version that was set aside has what was logged of it, and what comes in its place has not."""
    machine.write(COPY, b"c" * 4096)
    machine.store.retire(COPY, 3)
    machine.create(COPY, b"d")

    machine.lose_power()

    assert machine.get(COPY) == b"d" * SIZE
    buffer = bytearray(4097)
    machine.store.read_stale_into(COPY, 3, memoryview(buffer), offset_bytes=0)
    assert bytes(buffer) == b"c" * 4096 + b"a"


def test_change_past_the_log_during_a_flush(machine):
    """A flush of a change past the log answers for those that came before it, not for one that came meanwhile."""
    machine.store.write(COPY, b"c" * 30_000, offset_bytes=0, durable=False)
    machine.inner.during_flush = lambda: machine.store.try_write(COPY, b"d" * 30_000, offset_bytes=0)
    machine.store.sync((COPY,))
    machine.inner.during_flush = lambda: None
    machine.store.sync((COPY,))

    machine.lose_power()

    assert machine.get(COPY)[:30_001] == b"d" * 30_000 + b"a"


def test_many_times_the_log(machine):
    """The log has a fixed size, whatever is written, and all of it is there after a power loss."""
    expected = bytearray(machine.get(COPY))
    for count in range(1500):
        offset = count * 4096 % (SIZE - 4096)
        machine.write(COPY, bytes([count % 251]) * 4096, offset)
        expected[offset : offset + 4096] = bytes([count % 251]) * 4096

    machine.lose_power()

    assert machine.get(COPY) == bytes(expected)


def test_log_that_broke(machine, monkeypatch):
    """When the log cannot be written the objects are flushed instead, and nothing that was answered is lost."""
    machine.write(COPY, b"c" * 4096)
    file = machine.log.made._files[0]

    def refuse(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(file, "append", refuse)
    machine.write(COPY, b"d" * 4096, 4096)
    machine.write(COPY, b"e" * 4096, 8192)

    assert machine.log.made.failed
    machine.medium.lose_power()
    machine.start()
    assert machine.get(COPY)[:12289] == b"c" * 4096 + b"d" * 4096 + b"e" * 4096 + b"a"


def test_no_room_for_a_log(tmp_path, monkeypatch):
    """Where there is no room for a log, objects are flushed."""
    monkeypatch.setattr(strip_store.Journal, "__init__", _refuse)
    machine = Machine(str(tmp_path))
    machine.create(COPY, b"a")
    machine.write(COPY, b"c" * 4096)
    machine.write(COPY, b"d" * 4096, 4096)

    assert machine.log.made is None
    machine.medium.lose_power()
    machine.start()
    assert machine.get(COPY)[:8193] == b"c" * 4096 + b"d" * 4096 + b"a"


def _refuse(*_, **__):
    raise strip_store.ConfigError("no space")


def test_disk_that_does_not_take_it(machine, monkeypatch):
    """A change past the log whose flush fails is not answered, and is flushed by the next attempt."""
    machine.store.write(COPY, b"c" * 30_000, offset_bytes=0, durable=False)

    def refuse(_):
        raise StoreDeviceError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(machine.inner, "sync", refuse)
        with pytest.raises(StoreDeviceError):
            machine.store.sync((COPY,))
    machine.store.sync((COPY,))

    machine.lose_power()
    assert machine.get(COPY)[:30_001] == b"c" * 30_000 + b"a"


def test_without_flushes_nothing_is_logged(tmp_path):
    """With ``-n`` there is no log of copies."""
    machine = Machine(str(tmp_path), synced=False)
    machine.create(COPY, b"a", durable=False)
    machine.store.try_write(COPY, b"c" * 4096, offset_bytes=0)

    assert machine.log.made is None
    assert not machine.store._past_log


def test_disks_of_their_own(tmp_path):
    """Where objects are on other devices than the log, small writes flush them, and are there without the log."""
    machine = Machine(str(tmp_path))
    machine.log.of_copies = False
    machine.create(COPY, b"a")
    machine.write(COPY, b"c" * 4096)

    assert machine.inner.flushed == [COPY]
    assert machine.log.made is None
    assert not machine.store._past_log
    machine.lose_power()
    assert machine.get(COPY)[:4097] == b"c" * 4096 + b"a"


def test_scarce_space(tmp_path, monkeypatch):
    """Where space is scarce no log is made for copies; one that strips have made serves copies as well."""
    monkeypatch.setattr(strip_store, "ROOM_BYTES", 1 << 80)
    machine = Machine(str(tmp_path))
    machine.create(COPY, b"a")
    machine.write(COPY, b"c" * 4096)
    assert machine.log.made is None
    assert machine.inner.flushed == [COPY]
    machine.lose_power()
    assert machine.get(COPY)[:4097] == b"c" * 4096 + b"a"

    assert machine.log.get() is not None
    machine.write(COPY, b"d" * 4096)
    assert machine.inner.flushed == []
    machine.log.finish()
