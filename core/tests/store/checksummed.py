"""What the tests of checksums share: a store of real files with checksums in front, and half minutes that go by."""

from sheepdog.builtin.filestore import FileStore
from sheepdog.contracts.store import ShardKey, StoreOptions
from sheepdog.daemon.checksum_files import ChecksumFiles
from sheepdog.daemon.checksums import ChecksummedStore
from sheepdog.model.ids import data_oid

from .conftest import Flat

KEY = ShardKey(data_oid(0x1234, 1))
STRIP = ShardKey(data_oid(0x1234, 1), 2)
BLOCK = 4096
SIZE = 10 * BLOCK + 100


def open_store(tmp_path, *, durable=True, boot_id="b", started_ns=0, **more):
    disk = tmp_path / "disk"
    disk.mkdir(exist_ok=True)
    files = ChecksumFiles(str(tmp_path), durable=durable, boot_id=boot_id, started_ns=started_ns)
    return ChecksummedStore(FileStore(StoreOptions((str(disk),)), Flat()), files, **more)


def rest(store):
    """Half minutes go by."""
    store.upkeep()
    store.upkeep()


def flip(store, key, offset):
    """One bit changes on the medium."""
    byte = bytearray(1)
    store.inner.read_into(key, memoryview(byte), offset_bytes=offset)
    store.inner.write(key, bytes([byte[0] ^ 1]), offset_bytes=offset, durable=False)
