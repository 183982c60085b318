"""Volumes: creation, snapshot, clone, rollback, deletion and lookup.

Whatever changes a volume runs in an exclusive section, and its last broadcast carries the result to all members;
before the client gets its answer every member has seen it (barrier), so an acknowledged change holds through every
gateway.

Making a child of a volume touches several objects, so it is ordered to survive a crash after any step
(``vdi_child``). What a crashed sheep left half done is remembered by all members as ``half_done``, and by a mark in
the child's inode should all of them go down; the next section on any volume settles it first.

Lookups are optimistic: they run without a section and believe only a positive answer found while nothing is half done.
Everything else is asked again inside a section, so a lookup never falls between the two halves of a snapshot.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any

from sheepdog.contracts.services import Clock
from sheepdog.daemon import messages
from sheepdog.daemon.barrier import Barrier
from sheepdog.daemon.interfaces import Backend, Objects, Spawn
from sheepdog.daemon.membership import Membership
from sheepdog.daemon.messages import Fields
from sheepdog.daemon.scan import state_of
from sheepdog.daemon.sections import Section, Sections
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.vdi_child import ChildMaker, PendingChild, read_pending
from sheepdog.daemon.vdi_reclaim import Reclaimer, forget_locally
from sheepdog.errors import (
    InvalidParameters,
    ObjectNotFound,
    ProtocolError,
    ReadOnlyObject,
    RequestError,
    SheepdogError,
    VdiExists,
    VdiNotFound,
)
from sheepdog.model.clusterinfo import ClusterFlag
from sheepdog.model.ids import index_of, inode_oid, is_data, vid_of
from sheepdog.model.inode import MAP_ENTRIES, MAP_ENTRY_BYTES, InodeHeader, map_offset
from sheepdog.model.node import NodeId
from sheepdog.model.vdi_lookup import LookupResult, Outcome, lookup
from sheepdog.model.vdi_state import LockState, VdiState
from sheepdog.wire.header import Request, Response
from sheepdog.wire.payloads import VdiRequest, VdiResponse, unpack_names, unpack_new_vdi_name
from sheepdog.wire.results import Result

logger = logging.getLogger(__name__)

PREPARE = "vdi.prepare"  # a child gets its number; the volume it is split off becomes a snapshot
CREATED = "vdi.created"
UNDONE = "vdi.undone"  # takes PREPARE back
DELETED = "vdi.deleted"
ADDED = "vdi.added"  # NOTIFY_VDI_ADD
ALTERED = "vdi.altered"


class HalfDone(Exception):
    """A lookup met the inode of a child that is not complete."""

    def __init__(self, vid: int, pending: PendingChild) -> None:
        super().__init__(vid)
        self.vid = vid
        self.pending = pending


class Vdis:
    """All operations on volumes but locks and attributes."""

    def __init__(
        self,
        state: SheepState,
        membership: Membership,
        sections: Sections,
        barrier: Barrier,
        objects: Objects,
        backend: Backend,
        clock: Clock,
        spawn: Spawn,
    ) -> None:
        self.state = state
        self.sections = sections
        self.barrier = barrier
        self.objects = objects
        self.half_done: dict[int, tuple[int, int]] = {}  # child -> (base, volume that becomes a snapshot or 0)
        self.moved_locks: dict[int, int] = {}  # a snapshot whose lock went to the working volume -> that volume
        self._membership = membership
        self._backend = backend
        self._spawn = spawn
        self._children = ChildMaker(state, objects, clock)
        self._reclaimer = Reclaimer(objects)
        membership.extra("half_done", self._export, self._restore)
        membership.extra("moved_locks", self._export_moved, self._restore_moved)
        membership.inventory = self._inventory
        membership.merge_unfinished = self._merge_unfinished
        membership.on_left(self._member_left)
        for name, applier in (
            (PREPARE, self._apply_prepare),
            (CREATED, self._apply_created),
            (UNDONE, self._apply_undone),
            (DELETED, self._apply_deleted),
            (ADDED, self._apply_added),
            (ALTERED, self._apply_altered),
        ):
            sections.register(name, applier)

    # ---- lookup

    async def header(self, vid: int) -> InodeHeader:
        """The header of a volume that is complete; one without a name for a deleted volume.

        :raises HalfDone: it is not complete.
        :raises SheepdogError: it cannot be read.
        """
        if vid in self.state.vdis.deleted:
            return InodeHeader(vdi_id=vid)
        header, pending = await read_pending(self.objects, vid)
        if pending is not None:
            raise HalfDone(vid, pending)
        return header

    async def complete_header(self, vid: int) -> InodeHeader | None:
        """As ``header``; ``None`` while the volume is not complete."""
        try:
            return await self.header(vid)
        except HalfDone:
            return None

    async def _lookup(self, name: bytes, tag: bytes, snap_id: int) -> LookupResult:
        vdis = self.state.vdis
        steps = lookup(
            name,
            tag,
            snap_id,
            in_use=vdis.in_use,
            deleted=vdis.deleted,
            recycle=bool(self.state.flags & ClusterFlag.RECYCLE_VID),
        )
        try:
            vid = next(steps)
            while True:
                vid = steps.send(await self.header(vid))
        except StopIteration as stop:
            result: LookupResult = stop.value
            return result

    async def lookup(self, section: Section, name: bytes, tag: bytes = b"", snap_id: int = 0) -> LookupResult:
        """What the name means, inside a section; what somebody left half done is settled before."""
        await self._settle(section)
        while True:
            try:
                return await self._lookup(name, tag, snap_id)
            except HalfDone as half:
                await self._complete(section, half.vid, half.pending)

    async def find(self, name: bytes, tag: bytes, snap_id: int) -> tuple[int, InodeHeader]:
        """The volume or snapshot meant, by an optimistic lookup.

        :raises VdiNotFound: no such name.
        :raises TagNotFound: no such snapshot.
        :raises SheepdogError: an inode cannot be read.
        """
        if not self.half_done:
            try:
                result = await self._lookup(name, tag, snap_id)
                if result.outcome is Outcome.FOUND and not self.half_done:
                    return result.found()
            except (HalfDone, SheepdogError) as error:
                logger.debug("lookup of %r is repeated in a section: %r", name, error)
        async with self.sections.exclusive() as section:
            return (await self.lookup(section, name, tag, snap_id)).found()

    def reply(self, vid: int, header: InodeHeader, attr_id: int = 0) -> Response:
        """The reply that names a volume."""
        known = self.state.vdis.scheme_of(vid)
        copies, shift = (known[0], known[2]) if known else (header.nr_copies, header.block_size_shift)
        return Response(variant=VdiResponse(vid, attr_id, copies, shift).pack())

    async def get_vdi_info(self, request: Request) -> Response:
        """GET_VDI_INFO."""
        name, tag = unpack_names(request.body)
        vid, header = await self.find(name, tag, _variant(request).snapid)
        return self.reply(vid, header)

    # ---- half-done children

    async def _settle(self, section: Section) -> None:
        """Nothing is half done any more; the holder of the section is the only one who acts."""
        for vid, (_, retired) in sorted(self.half_done.items()):
            try:
                _, pending = await read_pending(self.objects, vid)
            except ObjectNotFound:
                logger.warning("vid=%x was prepared but never created, taking it back", vid)
                await self._undo(section, vid, retired)
                continue
            if pending is None:
                await section.change(CREATED, vid=vid, retired=retired)
            else:
                await self._complete(section, vid, pending)

    async def _complete(self, section: Section, vid: int, pending: PendingChild) -> None:
        logger.warning("vid=%x was left half done, completing it", vid)
        header = await self._children.complete(vid, pending)
        state = messages.pack_state(state_of(vid, header))
        await section.change(CREATED, vid=vid, retired=pending.retired, state=state)

    async def _undo(self, section: Section, vid: int, retired: int) -> None:
        """The child is forgotten, and the volume that was to become a snapshot is writable unless it is one by now."""
        writable = bool(retired) and not (await read_pending(self.objects, retired))[0].is_snapshot
        await section.change(UNDONE, vid=vid, retired=retired if writable else 0)

    def _member_left(self, node: NodeId) -> None:
        if self.half_done and self._membership.oldest:
            self._spawn(self._settle_soon)

    async def _settle_soon(self) -> None:
        try:
            async with self.sections.exclusive() as section:
                await self._settle(section)
        except SheepdogError as error:
            logger.warning("a half-done volume could not be settled yet: %s", error)

    # ---- creation

    async def new_vdi(self, request: Request) -> Response:
        """NEW_VDI: create, snapshot, clone or rollback."""
        wanted = _variant(request)
        name = unpack_new_vdi_name(request.body)
        async with self.sections.exclusive() as section:
            result = await self.lookup(section, name)
            if result.outcome is Outcome.FULL or not result.free:
                raise RequestError("every vdi number is in use", result=Result.FULL_VDI)
            if wanted.snapid:
                working, _ = result.found()
                header = await self._new_child(section, wanted, name, result, working)
            elif result.outcome is Outcome.FOUND:
                raise VdiExists(f"a vdi of that name exists as vid={result.vid:x}")
            elif wanted.base_vdi_id:
                header = await self._new_child(section, wanted, name, result, 0)
            else:
                if result.vid and self.state.flags & ClusterFlag.RECYCLE_VID:
                    raise VdiExists("snapshots of that name exist")
                header = await self._new_volume(section, wanted, name, result)
        await self.barrier.wait()
        return self.reply(header.vdi_id, header)

    async def _new_volume(self, section: Section, wanted: VdiRequest, name: bytes, result: LookupResult) -> InodeHeader:
        header = self._children.new_header(wanted, name, result, None)
        await self._children.create_volume(header)
        await section.finish(
            CREATED, vid=header.vdi_id, retired=0, state=messages.pack_state(state_of(header.vdi_id, header))
        )
        return header

    async def _new_child(
        self, section: Section, wanted: VdiRequest, name: bytes, result: LookupResult, working: int
    ) -> InodeHeader:
        """A child of the base volume. ``working``: the volume that becomes a snapshot, 0 when there is none."""
        base = wanted.base_vdi_id
        base_header = await self._children.base_header(base)
        if base_header.is_deleted or base in self.state.vdis.deleted:
            raise VdiNotFound(f"the base vid={base:x} is deleted")
        if base != working and not base_header.is_snapshot:
            raise RequestError(f"the base vid={base:x} is no snapshot", result=Result.INVALID_PARMS)
        header = self._children.new_header(wanted, name, result, base_header)
        vid = header.vdi_id
        state = messages.pack_state(state_of(vid, header))
        await section.change(PREPARE, vid=vid, base=base, retired=working, state=state)
        try:
            # From here on no gateway starts a write to the new snapshot's data, and those under way are over.
            await self.barrier.wait(drain_vid=working)
            pending = await self._children.create_pending(header, base, working)
        except SheepdogError:
            # Nothing refers to the child yet, and its base is as it was.
            await self._undo(section, vid, working)
            raise
        # A failure from here on leaves it half done: the next section completes it.
        await self._children.complete(vid, pending)
        await section.finish(CREATED, vid=vid, retired=working, state=state)
        return header

    # ---- deletion

    async def del_vdi(self, request: Request) -> Response:
        """DEL_VDI. Map entries that the client left are cleared, mostly outside the section since there may be many."""
        name, tag = unpack_names(request.body)
        snap_id = _variant(request).snapid
        async with self.sections.exclusive() as section:
            vid, header = (await self.lookup(section, name, tag, snap_id)).found()
            if await self._reclaimer.is_empty(header):
                return await self._delete(section, vid, header)
        await self._reclaimer.reclaim(header)
        async with self.sections.exclusive() as section:
            again, header = (await self.lookup(section, name, tag, snap_id)).found()
            if again != vid:
                raise VdiNotFound(f"vid={vid:x} is not what the name means any more")
            await self._reclaimer.reclaim(header)
            return await self._delete(section, vid, header)

    async def _delete(self, section: Section, vid: int, header: InodeHeader) -> Response:
        await self._reclaimer.wipe(vid, header)
        # Inside the section: a number that is given back must not be taken before everybody has cleaned up behind it.
        await section.change(DELETED, vid=vid)
        await self.barrier.wait()
        return Response(variant=VdiResponse(vid).pack())

    async def discard_obj(self, request: Request) -> Response:
        """DISCARD_OBJ: one data object is given up by its volume. Also SUCCESS when it was not allocated."""
        oid = request.oid
        vid, index = vid_of(oid), index_of(oid)
        if not is_data(oid):
            raise InvalidParameters(f"oid={oid:016x} is no data object")
        if self.state.vdis.readonly(vid):
            # A client that has not heard of the snapshot yet looks the name up again upon this, as after a write.
            raise ReadOnlyObject(f"vid={vid:x} is a snapshot")
        if (await self.header(vid)).is_hypervolume:
            await self._reclaimer.discard_from_tree(vid, index)
            return Response()
        if index >= MAP_ENTRIES:
            raise InvalidParameters(f"oid={oid:016x} lies behind the map")
        owner = await self.objects.read(inode_oid(vid), map_offset(index), MAP_ENTRY_BYTES)
        if any(owner):
            await self.objects.write(inode_oid(vid), map_offset(index), bytes(MAP_ENTRY_BYTES))
        return Response()

    # ---- steps on every member

    async def _apply_prepare(self, fields: Fields, sender: NodeId) -> None:
        vid, base, retired = _vid(fields, "vid"), _vid(fields, "base"), messages.integer(fields, "retired")
        vdis = self.state.vdis
        vdis.put(messages.unpack_state(fields.get("state")))
        vdis.make(vid)
        if retired:
            self._retire(retired)
        self.half_done[vid] = (base, retired)

    async def _apply_created(self, fields: Fields, sender: NodeId) -> None:
        vid, retired = _vid(fields, "vid"), messages.integer(fields, "retired")
        vdis = self.state.vdis
        if "state" in fields:
            vdis.put(messages.unpack_state(fields["state"]))
        vdis.deleted.discard(vid)
        vdis.make(vid)
        if retired:
            self._retire(retired)
            self._move_lock(retired, vid)
        self.half_done.pop(vid, None)

    async def _apply_undone(self, fields: Fields, sender: NodeId) -> None:
        vid, retired = _vid(fields, "vid"), messages.integer(fields, "retired")
        if vid not in self.half_done:
            return
        del self.half_done[vid]
        self.state.vdis.forget(vid)
        known = self.state.vdis.get(retired)
        if known is not None:
            self.state.vdis.put(replace(known, snapshot=False))

    async def _apply_deleted(self, fields: Fields, sender: NodeId) -> None:
        vid = _vid(fields, "vid")
        vdis = self.state.vdis
        vdis.mark_deleted(vid)
        known = vdis.get(vid)
        if known is not None:
            vdis.put(replace(known, lock_state=LockState.UNLOCKED, owner=None, participants=()))
        self.moved_locks.pop(vid, None)
        self._backend.recovery.volume_deleted()
        if self.state.flags & ClusterFlag.RECYCLE_VID:
            dead = vdis.dead_families()
            if dead and self._backend.store is not None:
                await self._backend.use(partial(forget_locally, vids=frozenset(dead)))
            for member in dead:
                vdis.forget(member)

    async def _apply_added(self, fields: Fields, sender: NodeId) -> None:
        old = messages.integer(fields, "old")
        state = messages.unpack_state(fields.get("state"))
        if old and old != state.vid:
            self._retire(old)
        self.state.vdis.put(state)
        if messages.integer(fields, "used"):
            self.state.vdis.use(state.vid)

    async def _apply_altered(self, fields: Fields, sender: NodeId) -> None:
        vid = _vid(fields, "vid")
        known = self.state.vdis.get(vid) or VdiState(vid=vid)
        copies = messages.integer(fields, "copies")
        self.state.vdis.put(
            replace(
                known,
                copies=copies,
                copy_policy=0,
                block_size_shift=messages.integer(fields, "shift") or known.block_size_shift,
            )
        )
        self._backend.recovery.copies_changed(vid, known.copies or self.state.copies, copies)

    def _retire(self, vid: int) -> None:
        known = self.state.vdis.get(vid)
        if known is None:
            known = VdiState(
                vid=vid,
                copies=self.state.copies,
                copy_policy=self.state.copy_policy,
                block_size_shift=self.state.block_size_shift,
            )
        self.state.vdis.put(replace(known, snapshot=True))

    def _move_lock(self, source: int, target: int) -> None:
        """A client that holds a normal lock goes on with the working volume, so its lock does too.

        Shared locks stay: their users lock the new volume themselves when they learn of the snapshot.
        """
        vdis = self.state.vdis
        holder, heir = vdis.get(source), vdis.get(target)
        if holder is None or heir is None or holder.lock_state is not LockState.LOCKED:
            return
        vdis.put(replace(heir, lock_state=LockState.LOCKED, owner=holder.owner))
        vdis.put(replace(holder, lock_state=LockState.UNLOCKED, owner=None))
        self.moved_locks[source] = target

    # ---- state transfer

    def _inventory(self) -> tuple[list[VdiState], list[Any]]:
        """What we may tell a cluster that we join again: half-done volumes apart, for they may be undone by now."""
        vdis = self.state.vdis
        unfinished = []
        retired = set()
        for vid, (base, old) in sorted(self.half_done.items()):
            state = vdis.get(vid)
            if state is not None:
                unfinished.append([vid, base, old, messages.pack_state(state)])
                retired.add(old)
        return [
            replace(state, snapshot=False) if state.vid in retired else state
            for state in vdis.states()
            if state.vid not in self.half_done
        ], unfinished

    def _merge_unfinished(self, entries: tuple[Any, ...]) -> None:
        """A joiner knows volumes that were half done when it left. Those that are known here were completed."""
        for entry in entries:
            if not isinstance(entry, list) or len(entry) != 4:
                raise ProtocolError("a half-done volume is malformed")
            state = messages.unpack_state(entry[3])
            (_, base, retired), vid = _number_lists([entry[:3]], 3)[0], state.vid
            if vid in self.state.vdis.in_use:
                continue
            self.state.vdis.put(state)
            self.state.vdis.use(vid)
            if retired:
                self._retire(retired)
            self.half_done[vid] = (base, retired)

    def _export(self) -> list[list[int]]:
        return [[vid, *pair] for vid, pair in sorted(self.half_done.items())]

    def _export_moved(self) -> list[list[int]]:
        return [list(pair) for pair in sorted(self.moved_locks.items())]

    def _restore(self, value: Any) -> None:
        self.half_done = {vid: (base, retired) for vid, base, retired in _number_lists(value, 3)}

    def _restore_moved(self, value: Any) -> None:
        self.moved_locks = {entry[0]: entry[1] for entry in _number_lists(value, 2)}

    def reset(self) -> None:
        """The cluster was formatted."""
        self.half_done = {}
        self.moved_locks = {}


def _number_lists(value: Any, width: int) -> list[list[int]]:
    entries = [] if value is None else value
    if not isinstance(entries, list) or not all(
        isinstance(entry, list) and len(entry) == width and all(isinstance(number, int) for number in entry)
        for entry in entries
    ):
        raise ProtocolError("a list of numbers is malformed")
    return entries


def _vid(fields: Fields, key: str) -> int:
    vid = messages.integer(fields, key)
    if not 0 < vid < 1 << 24:
        raise ProtocolError(f"field {key!r} is no vid: {vid:x}")
    return vid


def _variant(request: Request) -> VdiRequest:
    return VdiRequest.unpack(request.variant or b"")
