"""The disks of one sheep: what happens when work for the control plane meets one that failed."""

from __future__ import annotations

import pytest

from sheepdog.contracts.store import ShardKey, StoreOptions
from sheepdog.daemon.backend import LocalBackend
from sheepdog.daemon.executor import ThreadExecutor
from sheepdog.daemon.info import Info
from sheepdog.daemon.state import SheepState
from sheepdog.errors import StoreDeviceError, StoreError
from sheepdog.model.ids import data_oid
from sheepdog.model.node import Node, NodeId, VnodeMode
from sheepdog.testing.memory_store import MemoryMedium, MemoryStore
from sheepdog.wire.header import Request
from sheepdog.wire.opcodes import Op
from sheepdog.wire.payloads import unpack_oids

pytestmark = pytest.mark.anyio

DISKS = ("/a", "/b", "/c")
OIDS = [data_oid(7, index) for index in range(12)]


class Told:
    """Lifecycle and recovery: what they were told."""

    def __init__(self):
        self.lost = 0
        self.ended = []

    def lost_disk(self):
        self.lost += 1

    def disks_changed(self):
        pass

    def stop(self, exit_code, reason):
        self.ended.append((exit_code, reason))


@pytest.fixture
def medium():
    return MemoryMedium()


@pytest.fixture
async def backend(medium):
    """A store of three disks with some objects on each of them."""
    store = MemoryStore(StoreOptions(DISKS), medium)
    for oid in OIDS:
        store.create(ShardKey(oid), b"x" * 512, offset_bytes=0, size_bytes=512, sparse=False, durable=True)
    assert all(medium.disk(path).now for path in DISKS)
    told = Told()
    async with ThreadExecutor(1) as executor:
        backend = LocalBackend(
            state=None,
            storedir=None,
            executor=executor,
            stats=None,
            lifecycle=told,
            make_store=lambda _: store,
            store_names=("plain",),
            store=store,
            store_name="plain",
            fixed_name=None,
        )
        backend.recovery = told
        backend.told = told
        yield backend


@pytest.mark.parametrize("broken", [DISKS[:1], DISKS[:2]])
async def test_listing_takes_a_failed_disk_out(backend, medium, broken):
    """Others recover with the list of what is here; a disk that failed meanwhile is taken out, not reported to them
    again and again (MD-3, MD-5, MD-7)."""
    left = {key.oid for path in DISKS if path not in broken for key, _ in medium.disk(path).now}
    for path in broken:
        medium.break_disk(path)
    info = Info(None, None, backend, None)
    response = await info.object_list(Request(Op.GET_OBJ_LIST, data_length=1 << 20))
    assert response.result == 0
    assert set(unpack_oids(response.body)) == left
    assert [disk.path for disk in backend.store.disks()] == [path for path in DISKS if path not in broken]
    assert backend.told.lost == len(broken)
    assert not backend.told.ended


@pytest.mark.parametrize("mode", list(VnodeMode))
async def test_most_disks(backend, mode):
    """Where vnodes belong to disks no 33rd one is plugged, because no record has room for it. Each change is told, also
    that of the store."""
    changes = []
    backend._state = SheepState(Node(NodeId.of("10.0.0.1", 7000)), mode)
    backend.disks_changed = lambda: changes.append(len(backend.store.disks()))
    for number in range(29):
        await backend.plug(f"/more{number}")
    if mode is VnodeMode.DISK:
        with pytest.raises(StoreError, match="at most 32 disks"):
            await backend.plug("/more29")
    else:
        await backend.plug("/more29")
    await backend.unplug("/more0/")
    await backend.switch("plain")

    assert changes == [*range(4, 33), *([33, 32, 32] if mode is VnodeMode.NODE else [31, 31])]


async def test_last_disk(backend, medium):
    """With the last disk the sheep ends in order, and who asked gets the error (MD-4)."""
    for path in DISKS:
        medium.break_disk(path)
    with pytest.raises(StoreDeviceError):
        await backend.use(lambda store: list(store.keys()))
    assert backend.told.ended == [(0, "no disks available, going down")]
