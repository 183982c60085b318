"""Data planes whose membership the test changes: epochs, returning nodes, announcements, lists. No cluster driver."""

from __future__ import annotations

import hashlib
from contextlib import asynccontextmanager
from dataclasses import replace

import anyio

from sheepdog.builtin.tcp import sheepdog_transport
from sheepdog.contracts.store import ShardKey
from sheepdog.errors import ObjectNotFound
from sheepdog.model.clusterinfo import ClusterStatus
from sheepdog.model.ids import data_oid
from sheepdog.model.ring import Ring
from sheepdog.wire.header import Response
from sheepdog.wire.opcodes import Op
from sheepdog.wire.payloads import HashResponse, pack_oids
from sheepdog.wire.results import Result

from .data_plane import planes

OBJECT = 4 << 20
VID = 0x123456


class World:
    """Several sheep, of which some are members."""

    def __init__(self, sheep, tasks):
        self.sheep = sheep
        self.epoch = 1
        self.rings = {1: sheep[0].state.ring}
        self.members = list(range(len(sheep)))
        self.last_epoch = dict.fromkeys(self.members, 1)
        for number, plane in enumerate(sheep):
            self._wire(plane)
            tasks.start_soon(plane.recovery.run)
            del number

    def _wire(self, plane):
        async def object_list(request):
            store = plane.store
            oids = {key.oid for key in store.keys()} | {key.oid for key, _ in store.stale_keys()}  # noqa: SIM118
            return Response(body=pack_oids(sorted(oids)))

        async def get_hash(request):
            try:
                return Response(variant=HashResponse(plane.store.digest(ShardKey(request.oid))).pack())
            except ObjectNotFound:
                return Response(Result.NO_OBJ)

        async def ring_of(epoch):
            return self.rings.get(epoch)

        async def announce(epoch):
            for member in self.members:
                self.sheep[member].recovery.completed(epoch, plane.node.id)

        plane.dispatcher.task(Op.GET_OBJ_LIST, object_list)
        plane.dispatcher.task(Op.GET_HASH, get_hash)
        plane.recovery.ring_of = ring_of
        plane.recovery.announce = announce

    def node(self, number, vnodes=128):
        return replace(self.sheep[number].node, vnodes=vnodes)

    async def change(self, *members, storing=None):
        """A new epoch of these members; returning ones set everything aside. Those not ``storing`` are gateways."""
        for member in members:
            if member not in self.members:
                await self.sheep[member].recovery.retire_all(self.last_epoch[member])
        old = self.rings[self.epoch]
        self.epoch += 1
        storing = members if storing is None else storing
        nodes = [self.node(member, 128 if member in storing else 0) for member in members]
        ring = self.rings[self.epoch] = Ring(nodes)
        self.members = list(members)
        for member in members:
            plane = self.sheep[member]
            self.last_epoch[member] = self.epoch
            plane.state.install(status=ClusterStatus.OK, epoch=self.epoch, members=tuple(nodes), ring=ring)
            plane.recovery.membership_changed(old, True)

    def restart(self):
        """Every member goes on in the same epoch after an end without warning."""
        for member in self.members:
            plane = self.sheep[member]
            plane.recovery._started = False
            plane.recovery._notes.progress.ctime = plane.state.ctime
            plane.recovery.membership_changed(plane.state.ring, False)

    async def recovered(self, limit_s=15):
        with anyio.fail_after(limit_s):
            while any(self.sheep[member].recovery.status().in_recovery for member in self.members):
                await anyio.sleep(0.01)

    def object_on(self, *order, copies=2):
        """A data object whose first holders among all sheep are exactly these, in order."""
        wanted = [self.sheep[number].node.id for number in order]
        for index in range(100_000):
            oid = data_oid(VID, index)
            if [node.id for node in self.rings[1].holders(oid, copies)][: len(order)] == wanted:
                return oid
        raise AssertionError("no such object")

    def has(self, number, oid, index=-1):
        return self.sheep[number].store.exists(ShardKey(oid, index))

    def holders(self, oid):
        return [number for number in range(len(self.sheep)) if self.has(number, oid)]

    def content(self, number, oid, index=-1, length=OBJECT):
        buffer = bytearray(length)
        count = self.sheep[number].store.read_into(ShardKey(oid, index), memoryview(buffer), offset_bytes=0)
        return bytes(buffer[:count])

    def put(self, number, oid, content, index=-1):
        self.sheep[number].store.create(
            ShardKey(oid, index), content, offset_bytes=0, size_bytes=len(content), sparse=False, durable=False
        )

    def stale(self, number):
        return list(self.sheep[number].store.stale_keys())


@asynccontextmanager
async def world(count, make_store, *, copies=2, factories=(), policy=0):
    """``count`` sheep, all members of epoch 1."""
    async with (
        planes(count, make_store, sheepdog_transport, copies=copies, factories=factories) as sheep,
        anyio.create_task_group() as tasks,
    ):
        for plane in sheep:
            plane.state.copy_policy = policy
        yield World(sheep, tasks)
        tasks.cancel_scope.cancel()


def digest(content):
    """Short enough to compare in a failure message."""
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()[:12]
