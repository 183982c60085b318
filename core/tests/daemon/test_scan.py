"""What a sheep believes of the inodes on its disks when it starts."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from sheepdog.contracts.store import ShardKey, StoreOptions
from sheepdog.daemon.scan import local_states
from sheepdog.model.ids import inode_oid
from sheepdog.model.inode import InodeHeader
from sheepdog.testing.memory_store import MemoryMedium, MemoryStore

ALIVE = InodeHeader(name=b"a", vdi_id=0xA, nr_copies=2, vdi_size=1 << 20, block_size_shift=22)


@pytest.fixture
def store():
    return MemoryStore(StoreOptions(("disk",)), MemoryMedium())


def keep(store, vid: int, data: bytes) -> None:
    store.create(ShardKey(inode_oid(vid)), data, offset_bytes=0, size_bytes=len(data), sparse=False, durable=True)


def test_deleted(store):
    """A volume whose name was wiped is deleted."""
    keep(store, 0xA, ALIVE.pack())
    keep(store, 0xB, replace(ALIVE, name=b"", vdi_id=0xB).pack())

    assert [(state.vid, state.deleted) for state in local_states(store)] == [(0xA, False), (0xB, True)]


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(bytes(len(ALIVE.pack())), id="zeros"),
        pytest.param(b"", id="nothing"),
        pytest.param(ALIVE.pack()[:100], id="cut"),
        pytest.param(replace(ALIVE, name=b"", vdi_id=0xB).pack(), id="another"),
    ],
)
def test_lost_bytes(store, caplog, data):
    """A file that a crash left without its bytes says nothing of its volume, least of all that it is deleted: whoever
    returns from a crash tells what it knows, and a volume that is deleted anywhere is deleted."""
    keep(store, 0xA, data)
    with caplog.at_level(logging.WARNING):
        states = local_states(store)

    assert states == []
    assert "cannot be read at start" in caplog.text
