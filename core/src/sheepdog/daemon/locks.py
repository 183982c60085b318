"""Locks of volumes (clusters formatted with ``-l``) and the coherence of shared ones.

A lock belongs to the sheep that the client talked to. Locking looks the name up and changes the table in one section,
so it cannot fall between the halves of a snapshot; the change itself is a transition of ``VdiState``, applied by all
members in the same order.
"""

from __future__ import annotations

import logging

from sheepdog.daemon import messages
from sheepdog.daemon.messages import Fields
from sheepdog.daemon.vdi import Vdis
from sheepdog.errors import InvalidParameters, VdiLocked, VdiNotFound
from sheepdog.model.clusterinfo import ClusterFlag
from sheepdog.model.inode import InodeHeader
from sheepdog.model.node import NodeId
from sheepdog.model.vdi_state import LockType, VdiState
from sheepdog.wire.header import Request, Response
from sheepdog.wire.payloads import CheckpointRequest, CoherenceRequest, VdiRequest, unpack_names
from sheepdog.wire.results import Result

logger = logging.getLogger(__name__)

LOCKED = "lock.taken"
RELEASED = "lock.released"
COHERENCE = "lock.coherence"
MOVES_MAX = 64  # snapshots between a lock's volume and the one it went to


class Locks:
    """LOCK_VDI, RELEASE_VDI, INODE_COHERENCE, VDI_STATE_CHECKPOINT_CTL."""

    def __init__(self, vdis: Vdis) -> None:
        self._vdis = vdis
        self._state = vdis.state
        self._sections = vdis.sections
        self._sections.register(LOCKED, self._apply_locked)
        self._sections.register(RELEASED, self._apply_released)
        self._sections.register(COHERENCE, self._apply_coherence)

    @property
    def enforced(self) -> bool:
        """The cluster was formatted with locks."""
        return bool(self._state.flags & ClusterFlag.USE_LOCK)

    async def lock_vdi(self, request: Request) -> Response:
        """LOCK_VDI: only a lookup where locks are not enforced."""
        wanted = VdiRequest.unpack(request.variant or b"")
        name, tag = unpack_names(request.body)
        vid, header, refused = await self._lock(name, tag, wanted.snapid, _lock_type(wanted.lock_type))
        reply = self._vdis.reply(vid, header)
        if refused is not None:
            reply.result = refused.result  # beside the number of the volume, as the original has it
        return reply

    async def lock(self, name: bytes, tag: bytes, snap_id: int, kind: LockType) -> tuple[int, InodeHeader]:
        """The volume meant, locked for this sheep where locks are enforced.

        :raises VdiLocked: somebody holds it in a way that excludes this.
        :raises VdiNotFound: no such name.
        :raises TagNotFound: no such snapshot.
        """
        vid, header, refused = await self._lock(name, tag, snap_id, kind)
        if refused is not None:
            raise refused
        return vid, header

    async def _lock(
        self, name: bytes, tag: bytes, snap_id: int, kind: LockType
    ) -> tuple[int, InodeHeader, VdiLocked | None]:
        if not self.enforced:
            return *await self._vdis.find(name, tag, snap_id), None
        async with self._sections.exclusive() as section:
            vid, header = (await self._vdis.lookup(section, name, tag, snap_id)).found()
            try:
                await section.finish(LOCKED, vid=vid, type=int(kind))
            except VdiLocked as error:
                return vid, header, error
        return vid, header, None

    async def release_vdi(self, request: Request) -> Response:
        """RELEASE_VDI: always SUCCESS, as clients expect."""
        wanted = VdiRequest.unpack(request.variant or b"")
        shared = wanted.lock_type == LockType.SHARED
        await self.release(wanted.base_vdi_id, LockType.SHARED if shared else LockType.NORMAL)
        return Response()

    async def release(self, vid: int, kind: LockType) -> None:
        """The lock of that kind is gone; harmless when there is none."""
        if self.enforced:
            await self._sections.submit(RELEASED, vid=vid, type=int(kind))

    async def inode_coherence(self, request: Request) -> Response:
        """INODE_COHERENCE, from another sheep or a client of ours."""
        wanted = CoherenceRequest.unpack(request.variant or b"")
        await self.coherence(wanted.vid, validate=bool(wanted.validate))
        return Response()

    async def coherence(self, vid: int, *, validate: bool) -> None:
        """The clients of this sheep have read the inode again (``validate``), or are about to change its map.

        :raises VdiNotFound: this sheep does not share the volume.
        """
        await self._sections.submit(COHERENCE, vid=vid, validate=validate)

    async def checkpoint_ctl(self, request: Request) -> Response:
        """VDI_STATE_CHECKPOINT_CTL: the present state stands for any epoch that has begun."""
        wanted = CheckpointRequest.unpack(request.variant or b"")
        if not wanted.get:
            return Response()
        if wanted.tgt_epoch > self._state.epoch:
            return Response(Result.AGAIN)
        known = self._state.vdis.get(wanted.vid)
        if known is None:
            return Response(Result.NO_CHECKPOINT_ENTRY)
        body = known.pack()
        if request.data_length < len(body):
            return Response(Result.BUFFER_SMALL)
        return Response(body=body)

    # ---- steps on every member

    async def _apply_locked(self, fields: Fields, sender: NodeId) -> None:
        known = self._known(fields)
        kind = _lock_type(messages.integer(fields, "type"))
        self._state.vdis.put(known.lock(sender, kind))
        logger.info("vid=%x is locked by node=%s (%s)", known.vid, sender.text, kind.name.lower())

    async def _apply_released(self, fields: Fields, sender: NodeId) -> None:
        kind = _lock_type(messages.integer(fields, "type"))
        vid = messages.integer(fields, "vid")
        moved = self._vdis.moved_locks
        for _ in range(MOVES_MAX):
            known = self._state.vdis.get(vid)
            if known is None:
                return
            released = known.release(sender, kind)
            if released is not known:
                self._state.vdis.put(released)
                logger.info("vid=%x is unlocked by node=%s (%s)", vid, sender.text, kind.name.lower())
                return
            if kind is not LockType.NORMAL or vid not in moved:
                logger.debug("vid=%x is not locked in that way", vid)
                return
            # The client did not notice a snapshot: its lock went to the working volume.
            vid = moved.pop(vid)

    async def _apply_coherence(self, fields: Fields, sender: NodeId) -> None:
        known = self._known(fields)
        validate = messages.integer(fields, "validate")
        self._state.vdis.put(known.validate(sender) if validate else known.invalidate_others(sender))

    def _known(self, fields: Fields) -> VdiState:
        vid = messages.integer(fields, "vid")
        known = self._state.vdis.get(vid)
        if known is None:
            raise VdiNotFound(f"no vdi vid={vid:x}")
        return known


def _lock_type(number: int) -> LockType:
    try:
        return LockType(number)
    except ValueError:
        raise InvalidParameters(f"no lock type {number}") from None
