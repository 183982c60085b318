"""Keys and small helpers for tests of object stores."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeAlias

from sheepdog.contracts.store import ObjectStore, ShardKey, StoreOptions
from sheepdog.model.ids import attribute_oid, btree_oid, data_oid, inode_oid, ledger_oid, vmstate_oid

StoreFactory: TypeAlias = Callable[[StoreOptions], ObjectStore]

KiB = 1024
MiB = 1024 * KiB
VID = 0xED202B
KEY = ShardKey(data_oid(VID, 0))
OTHER = ShardKey(data_oid(VID, 1))
INODE = ShardKey(inode_oid(VID))
INODE_BYTES = 12_587_576

# One of each kind, whole copies and strips, two volumes.
ASSORTED = sorted(
    [
        *(ShardKey(data_oid(vid, index), strip) for vid in (1, VID) for index in (0, 7) for strip in (-1, 0, 12)),
        INODE,
        ShardKey(vmstate_oid(VID, 3)),
        ShardKey(attribute_oid(VID, 0x6D21D6C0)),
        ShardKey(btree_oid(VID, 2)),
        ShardKey(ledger_oid(data_oid(VID, 7))),
    ]
)


def content(seed: int, size: int) -> bytes:
    """Bytes without structure, the same for the same seed."""
    return random.Random(seed).randbytes(size)


def put(store: ObjectStore, key: ShardKey, data: bytes, *, durable: bool = False) -> None:
    """The shard holds exactly ``data``."""
    store.create(key, data, offset_bytes=0, size_bytes=len(data), sparse=False, durable=durable)


def get(store: ObjectStore, key: ShardKey, size: int | None = None, offset: int = 0) -> bytes:
    """The live bytes, by default all of them."""
    buffer = bytearray(store.size(key) if size is None else size)
    count = store.read_into(key, memoryview(buffer), offset_bytes=offset)
    return bytes(buffer[:count])


def get_stale(store: ObjectStore, key: ShardKey, epoch: int) -> bytes:
    """All bytes of a version that was set aside."""
    buffer = bytearray(store.stale_size(key, epoch))
    assert store.read_stale_into(key, epoch, memoryview(buffer), offset_bytes=0) == len(buffer)
    return bytes(buffer)
