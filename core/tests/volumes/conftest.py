"""A cluster's objects and control plane in memory, with the rules that a real one enforces."""

from __future__ import annotations

import random
from dataclasses import replace

import anyio
import anyio.lowlevel
import pytest

from sheepdog.daemon.volumes import GatewayVolumes
from sheepdog.errors import TagNotFound, VdiLocked, VdiNotFound
from sheepdog.model.ids import inode_oid, is_data, is_inode, vid_of
from sheepdog.model.inode import MAP_OFFSET, SHORT_INODE_BYTES, InodeHeader, allocated, map_view
from sheepdog.wire.results import Result

MiB = 1024 * 1024


class FakeCluster:
    """Objects, and the control plane over them.

    :param seed: requests complete later and in an order drawn from it; ``None``: before they return.
    """

    def __init__(self, seed=None, *, locks=False, shift=22):
        self.objects: dict[int, bytearray] = {}
        self.snapshots: set[int] = set()
        self.vids: list[int] = []
        self.shift = shift
        self.locks = locks
        self.locked: set[int] = set()
        self.moved_locks: dict[int, int] = {}  # a snapshot -> the working VDI that its lock went to
        self.shared: set[int] = set()  # data objects that a snapshot names
        self.log: list[tuple] = []
        self.faults: list[tuple] = []  # (kind, result) of the next request of that kind
        self.random = None if seed is None else random.Random(seed)
        self._pending: list = []
        self._kick = anyio.Event()
        self._section = anyio.Lock()
        self._next_vid = 0xA00001
        self.syncs = 0

    async def run(self):
        """Completes what is pending, one request in each turn."""
        while True:
            if not self._pending:
                self._kick = anyio.Event()
                await self._kick.wait()
            await anyio.lowlevel.checkpoint()
            if self._pending:
                self._pending.pop(self.random.randrange(len(self._pending)))()

    def _do(self, kind, oid, action, done):
        self.log.append((kind, oid))

        def complete():
            for fault in self.faults:
                if fault[0] == kind:
                    self.faults.remove(fault)
                    done(fault[1], None)
                    return
            done(*action())

        if self.random is None:
            complete()
        else:
            self._pending.append(complete)
            self._kick.set()

    def _refused(self, oid):
        return is_data(oid) and vid_of(oid) in self.snapshots

    # ---- ObjectIO

    def submit_read(self, oid, offset, length, done):
        def action():
            if oid not in self.objects:
                return Result.NO_OBJ, None
            return 0, bytes(self.objects[oid][offset : offset + length]).ljust(length, b"\0")

        self._do("read", oid, action, done)

    def submit_write(self, oid, offset, data, done, *, copies=0, policy=0, client=None):
        def action():
            if client is not None and not client.is_open():
                return Result.NETWORK_ERROR, None
            if self._refused(oid):
                return Result.READONLY, None
            if oid not in self.objects:
                return Result.NO_OBJ, None
            if is_inode(oid) and MAP_OFFSET <= offset < SHORT_INODE_BYTES:
                self._map_write(oid, offset, data)
            assert offset + len(data) <= len(self.objects[oid]), "a write beyond the object"
            self.objects[oid][offset : offset + len(data)] = data
            return 0, None

        self._do("map" if is_inode(oid) else "write", oid, action, done)

    def _map_write(self, oid, offset, data):
        if InodeHeader.unpack(self.objects[oid]).is_hypervolume:
            return
        first = (offset - MAP_OFFSET) // 4
        old = map_view(self.objects[oid])
        for i, new in enumerate(memoryview(bytes(data)).cast("I"), first):
            assert old[i] != new or not new, f"a map write covers entry {i}, which does not change"
            if old[i] and old[i] != new and old[i] == vid_of(oid):
                self.objects.pop(old[i] << 32 | i, None)

    def submit_create(self, oid, offset, data, done, *, cow_oid=0, copies=0, policy=0, client=None):
        def action():
            if client is not None and not client.is_open():
                return Result.NETWORK_ERROR, None
            if self._refused(oid):
                return Result.READONLY, None
            if cow_oid and cow_oid not in self.objects:
                return Result.NO_OBJ, None
            made = bytearray(self.objects[cow_oid] if cow_oid else 1 << self.shift)
            made[offset : offset + len(data)] = data
            assert len(made) == 1 << self.shift, "a create beyond the object"
            self.objects[oid] = made
            return 0, None

        def node():
            self.objects[oid] = bytearray(4 * MiB)
            self.objects[oid][offset : offset + len(data)] = data
            return 0, None

        self._do("create", oid, action if is_data(oid) else node, done)

    def submit_remove(self, oid, done, *, client=None):
        def action():
            return (0 if self.objects.pop(oid, None) is not None else Result.NO_OBJ), None

        self._do("remove", oid, action, lambda result, _: done(result))

    def submit_sync(self, done):
        def action():
            self.syncs += 1
            return 0, None

        self._do("sync", 0, action, done)

    # ---- VdiControl

    def _headers(self):
        return [(vid, InodeHeader.unpack(self.objects[inode_oid(vid)])) for vid in self.vids]

    async def lookup(self, name, tag, snapid):
        async with self._section:
            self.log.append(("lookup", name))
            found = False
            for vid, header in reversed(self._headers()):
                if header.name != name:
                    continue
                if tag or snapid:
                    found = True
                    if header.is_snapshot and (header.tag == tag != b"" or header.snap_id == snapid):
                        return vid, 1, self.shift
                elif not header.is_snapshot:
                    return vid, 1, self.shift
            raise TagNotFound("no tag") if found else VdiNotFound("no vdi")

    async def lock(self, name):
        vid, copies, shift = await self.lookup(name, b"", 0)
        if self.locks:
            if vid in self.locked:
                raise VdiLocked("locked")
            self.locked.add(vid)
        return vid, copies, shift

    async def release(self, vid):
        while vid not in self.locked and vid in self.moved_locks:
            vid = self.moved_locks.pop(vid)
        self.locked.discard(vid)

    async def list_vdis(self):
        return self._headers()

    def readonly(self, vid):
        return vid in self.snapshots

    # ---- what a test arranges

    def create_vdi(self, name, size, *, snap_id=1, parent=0, store_policy=0):
        vid = self._next_vid
        self._next_vid += 1
        header = InodeHeader(
            name=name.encode(), vdi_size=size, nr_copies=1, block_size_shift=self.shift, snap_id=snap_id,
            vdi_id=vid, parent_vdi_id=parent, store_policy=store_policy, create_time=1,
        )  # fmt: skip
        inode = self.objects[inode_oid(vid)] = bytearray(SHORT_INODE_BYTES)
        inode[: len(header.pack())] = header.pack()
        if store_policy:
            inode[MAP_OFFSET : MAP_OFFSET + 8] = bytes.fromhex("7462010000000000")
        self.vids.append(vid)
        return vid

    def header(self, vid):
        return InodeHeader.unpack(self.objects[inode_oid(vid)])

    def put_header(self, vid, **changes):
        packed = replace(self.header(vid), **changes).pack()
        self.objects[inode_oid(vid)][: len(packed)] = packed

    def working(self, name):
        return next(vid for vid, header in self._headers() if header.name == name.encode() and not header.is_snapshot)

    async def snapshot_vdi(self, name, tag):
        async with self._section:
            old = self.working(name)
            header = self.header(old)
            self.snapshots.add(old)  # from now on its data is read-only
            for _ in range(5 if self.random else 0):
                await anyio.lowlevel.checkpoint()
            self.put_header(old, tag=tag.encode(), snap_ctime=1)
            new = self.create_vdi(name, header.vdi_size, snap_id=header.snap_id + 1, parent=old)
            self.objects[inode_oid(new)][MAP_OFFSET:SHORT_INODE_BYTES] = self.objects[inode_oid(old)][
                MAP_OFFSET:SHORT_INODE_BYTES
            ]
            if old in self.locked:
                self.locked.remove(old)
                self.locked.add(new)
                self.moved_locks[old] = new
            return new

    async def rollback_vdi(self, name, tag):
        """As dog does it: the working VDI is deleted, and the name made anew from a snapshot."""
        async with self._section:
            old = self.working(name)
            for index, owner in self.stored_map(old).items():
                if owner == old:
                    self.objects.pop(owner << 32 | index)
            base = next(vid for vid, header in self._headers() if header.tag == tag.encode())
            header = self.header(old)
            self.put_header(old, name=b"", vdi_size=0)
            self.objects[inode_oid(old)][MAP_OFFSET:SHORT_INODE_BYTES] = bytes(SHORT_INODE_BYTES - MAP_OFFSET)
            new = self.create_vdi(name, header.vdi_size, snap_id=header.snap_id + 1, parent=base)
            self.objects[inode_oid(new)][MAP_OFFSET:SHORT_INODE_BYTES] = self.objects[inode_oid(base)][
                MAP_OFFSET:SHORT_INODE_BYTES
            ]
            return new

    def stored_map(self, vid):
        """The entries in the inode, as a dictionary."""
        return dict(allocated(map_view(self.objects[inode_oid(vid)])))

    def content(self, name):
        """Every byte of a working VDI, by what is stored."""
        header = self.header(self.working(name))
        content = bytearray(header.vdi_size)
        for index, owner in self.stored_map(header.vdi_id).items():
            start = index << self.shift
            data = self.objects[owner << 32 | index][: max(header.vdi_size - start, 0)]
            content[start : start + len(data)] = data
        return content


@pytest.fixture
async def make_cluster(anyio_backend):
    """``cluster, volumes = make_cluster(seed, ...)``; requests of seeded ones complete in the background."""
    async with anyio.create_task_group() as group:

        def make(seed=None, **options):
            cluster = FakeCluster(seed, **options)
            if seed is not None:
                group.start_soon(cluster.run)
            return cluster, GatewayVolumes(cluster, cluster, group.start_soon)

        yield make
        group.cancel_scope.cancel()
