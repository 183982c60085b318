"""Operations of the administrator: format, shutdown, forced recovery, defaults, weights."""

from __future__ import annotations

import logging
from dataclasses import replace

from sheepdog.contracts.services import Clock
from sheepdog.daemon import messages
from sheepdog.daemon.barrier import Barrier
from sheepdog.daemon.disk_list import DiskList
from sheepdog.daemon.interfaces import Backend, Lifecycle, Spawn
from sheepdog.daemon.membership import Membership
from sheepdog.daemon.messages import Fields
from sheepdog.daemon.sections import Sections
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.vdi import ADDED, ALTERED, DELETED, Vdis
from sheepdog.errors import InvalidParameters, ProtocolError, RequestError, SheepdogError
from sheepdog.model.clusterinfo import ClusterFlag, ClusterStatus, mode_flag, pack_store_name
from sheepdog.model.limits import (
    BLOCK_SIZE_SHIFT_DEFAULT,
    BLOCK_SIZE_SHIFT_MAX,
    BLOCK_SIZE_SHIFT_MIN,
    COPIES_DEFAULT,
    COPIES_MAX,
)
from sheepdog.model.node import VNODES_MAX, Node, NodeId, VnodeMode, pack_nodes
from sheepdog.model.policy import CopyPolicy, data_strips, parity_strips
from sheepdog.model.timestamps import pack_time
from sheepdog.model.vdi_state import VdiState
from sheepdog.wire.header import Request, Response
from sheepdog.wire.payloads import ClusterRequest, VdiStateRequest, unpack_i32, unpack_text, unpack_u32
from sheepdog.wire.results import Result

logger = logging.getLogger(__name__)

FORMAT = "cluster.format"
SHUTDOWN = "cluster.shutdown"
FORCE_RECOVER = "cluster.force_recover"
SET_RECOVERY = "cluster.recovery"
COPIES = "cluster.copies"
REWEIGHT = "cluster.reweight"
CLEANUP = "cluster.cleanup"
RECOVERED = "cluster.recovered"

WEIGHT_CHANGE_MIN = 0.01  # a smaller change of a node's size is not worth a new epoch
KNOWN_FLAGS = (
    ClusterFlag.STRICT
    | ClusterFlag.AUTO_VNODES
    | ClusterFlag.USE_LOCK
    | ClusterFlag.RECYCLE_VID
    | ClusterFlag.AVOID_DISK_FULL
)


class Admin:
    """Handlers and the steps that they lead to on every member."""

    def __init__(
        self,
        state: SheepState,
        membership: Membership,
        sections: Sections,
        barrier: Barrier,
        vdis: Vdis,
        backend: Backend,
        lifecycle: Lifecycle,
        clock: Clock,
        spawn: Spawn,
        disk_list: DiskList,
    ) -> None:
        self._state = state
        self._membership = membership
        self._sections = sections
        self._barrier = barrier
        self._vdis = vdis
        self._backend = backend
        self._lifecycle = lifecycle
        self._clock = clock
        self._spawn = spawn
        self._disk_list = disk_list
        for name, applier in (
            (FORMAT, self._apply_format),
            (SHUTDOWN, self._apply_shutdown),
            (FORCE_RECOVER, self._apply_force_recover),
            (SET_RECOVERY, self._apply_set_recovery),
            (COPIES, self._apply_copies),
            (REWEIGHT, self._apply_reweight),
            (CLEANUP, self._apply_cleanup),
            (RECOVERED, self._apply_recovered),
        ):
            sections.register(name, applier)

    # ---- format

    async def make_fs(self, request: Request) -> Response:
        """MAKE_FS: the cluster is new and empty, through whichever gateway one looks."""
        wanted = ClusterRequest.unpack(request.variant or b"")
        store = unpack_text(request.body)
        if store not in self._backend.store_names:
            return Response(Result.NO_STORE)
        pack_store_name(store)
        copies, policy = wanted.copies or COPIES_DEFAULT, wanted.copy_policy
        if policy:
            copies = data_strips(policy) + parity_strips(policy)
        CopyPolicy(copies, policy)
        shift = wanted.block_size_shift or BLOCK_SIZE_SHIFT_DEFAULT
        if not BLOCK_SIZE_SHIFT_MIN <= shift <= BLOCK_SIZE_SHIFT_MAX:
            raise InvalidParameters(f"object size 2^{shift}")
        mode = mode_flag(self._state.mode)  # what dog says of it does not matter, but it must not be the other one
        if wanted.flags & ~int(KNOWN_FLAGS | mode):
            raise InvalidParameters(f"cluster flags 0x{wanted.flags:x}")
        now = self._clock.time()
        await self._sections.submit(
            FORMAT,
            ctime=wanted.ctime or pack_time(now),
            time=int(now),
            store=store,
            copies=copies,
            policy=policy,
            flags=wanted.flags | mode,
            shift=shift,
        )
        await self._barrier.wait()
        return Response()

    async def _apply_format(self, fields: Fields, sender: NodeId) -> None:
        state, backend = self._state, self._backend
        flags = ClusterFlag(messages.integer(fields, "flags"))
        auto = bool(flags & ClusterFlag.AUTO_VNODES)
        if any(m.greeting.auto_vnodes != auto for m in self._membership.members() if not m.greeting.gateway):
            raise RequestError("some sheep number their vnodes in the other way", result=Result.INVALID_VNODES_STRATEGY)
        state.install(status=ClusterStatus.WAIT)  # no I/O while objects and epochs go
        self._sections.reset()
        self._vdis.reset()
        state.vdis.clear()
        state.epoch = 0
        state.ctime = messages.integer(fields, "ctime")
        state.flags = flags
        state.copies, state.copy_policy = messages.integer(fields, "copies"), messages.integer(fields, "policy")
        state.block_size_shift = messages.integer(fields, "shift")
        state.store_name = messages.text(fields, "store")
        state.recovery_disabled = False
        backend.recovery.reset()
        try:
            await self._membership.log.forget(0)
            if not self._membership.gateway:
                await backend.switch(state.store_name)
            await self._membership.formatted(messages.integer(fields, "time"))
        except Exception:
            # The others are a new cluster now, which this sheep cannot take part in with half-formatted disks.
            self._lifecycle.stop(1, "format failed on this sheep")
            raise
        logger.info("formatted: store=%s copies=%d policy=0x%02x", state.store_name, state.copies, state.copy_policy)

    # ---- end

    async def shutdown(self, request: Request) -> Response:
        """SHUTDOWN: every sheep ends."""
        await self._sections.submit(SHUTDOWN)
        return Response()

    async def _apply_shutdown(self, fields: Fields, sender: NodeId) -> None:
        running = self._state.status is ClusterStatus.OK
        recovery = self._backend.recovery.status()
        clean = running and not recovery.in_recovery and not recovery.unfinished
        self._state.install(status=ClusterStatus.SHUTDOWN)
        if self._state.formatted and running:
            await self._membership.log.write_config(clean=clean)
        self._lifecycle.stop(0, "shutdown")

    async def kill_node(self, request: Request) -> Response:
        """KILL_NODE: this sheep ends."""
        self._state.install(status=ClusterStatus.KILLED)
        self._lifecycle.stop(0, "killed")
        return Response()

    # ---- recovery

    async def force_recover(self, request: Request) -> Response:
        """FORCE_RECOVER: a waiting cluster runs with the members that are there."""
        self._check_waiting()
        body = pack_nodes(self._membership.epoch_nodes, self._state.mode)
        if request.data_length < len(body):
            raise InvalidParameters(f"{len(body)} bytes of nodes do not fit {request.data_length}")
        await self._sections.submit(FORCE_RECOVER)
        await self._barrier.wait()
        return Response(body=body)

    def _check_waiting(self) -> None:
        if self._state.status is not ClusterStatus.WAIT or not self._state.epoch:
            raise RequestError("the cluster does not wait for members", result=Result.FORCE_RECOVER)

    async def _apply_force_recover(self, fields: Fields, sender: NodeId) -> None:
        self._check_waiting()
        logger.warning("recovery is forced: members of epoch=%d may be missing", self._state.epoch)
        await self._membership.lift()

    async def enable_recover(self, request: Request) -> Response:
        """ENABLE_RECOVER."""
        await self._sections.submit(SET_RECOVERY, disabled=False)
        return Response()

    async def disable_recover(self, request: Request) -> Response:
        """DISABLE_RECOVER."""
        await self._sections.submit(SET_RECOVERY, disabled=True)
        return Response()

    async def _apply_set_recovery(self, fields: Fields, sender: NodeId) -> None:
        self._state.recovery_disabled = bool(messages.integer(fields, "disabled"))
        self._backend.recovery.enabled_changed()

    async def cleanup(self, request: Request) -> Response:
        """CLEANUP: stale objects go everywhere."""
        await self._sections.submit(CLEANUP)
        return Response()

    async def _apply_cleanup(self, fields: Fields, sender: NodeId) -> None:
        await self._backend.recovery.cleanup()

    async def complete_recovery(self, request: Request) -> Response:
        """COMPLETE_RECOVERY as another implementation sends it."""
        node = Node.unpack(bytes(request.body[: self._state.mode.record_bytes]))
        await self._sections.submit(RECOVERED, epoch=request.tgt_epoch, node=node.id.pack())
        return Response()

    async def announce_recovered(self, epoch: int) -> None:
        """Every member learns that this sheep has recovered to ``epoch``.

        :raises ClusterError: it may not have been announced; our rejoin begins another recovery.
        """
        await self._sections.submit(RECOVERED, epoch=epoch, node=self._state.me.id.pack())

    async def _apply_recovered(self, fields: Fields, sender: NodeId) -> None:
        self._backend.recovery.completed(messages.integer(fields, "epoch"), messages.node_id_field(fields, "node"))

    # ---- defaults and volumes' states

    async def alter_cluster_copy(self, request: Request) -> Response:
        """ALTER_CLUSTER_COPY: later volumes get another number of copies."""
        wanted = ClusterRequest.unpack(request.variant or b"")
        if wanted.copy_policy or not 1 <= wanted.copies <= COPIES_MAX:
            raise InvalidParameters(f"{wanted.copies} copies with policy 0x{wanted.copy_policy:02x}")
        await self._sections.submit(COPIES, copies=wanted.copies)
        await self._barrier.wait()
        return Response()

    async def _apply_copies(self, fields: Fields, sender: NodeId) -> None:
        self._state.copies = messages.integer(fields, "copies")
        self._state.copy_policy = 0
        await self._membership.log.write_config()

    async def alter_vdi_copy(self, request: Request) -> Response:
        """ALTER_VDI_COPY: placement and recovery use another number of copies from now on."""
        wanted = VdiStateRequest.unpack(request.variant or b"")
        known = self._state.vdis.get(wanted.new_vid)
        if wanted.copy_policy or (known is not None and known.copy_policy) or not 1 <= wanted.copies <= COPIES_MAX:
            raise InvalidParameters(f"{wanted.copies} copies with policy 0x{wanted.copy_policy:02x}")
        await self._sections.submit(
            ALTERED, vid=_vid(wanted.new_vid), copies=wanted.copies, shift=wanted.block_size_shift
        )
        await self._barrier.wait()
        return Response()

    async def notify_vdi_add(self, request: Request) -> Response:
        """NOTIFY_VDI_ADD: a volume was made by somebody who writes inodes himself (dog, cluster snapshots)."""
        wanted = VdiStateRequest.unpack(request.variant or b"")
        state = VdiState(
            vid=_vid(wanted.new_vid),
            copies=wanted.copies,
            copy_policy=wanted.copy_policy,
            block_size_shift=wanted.block_size_shift or self._state.block_size_shift,
            parent_vid=wanted.old_vid & 0xFFFFFF,
        )
        old = wanted.old_vid & 0xFFFFFF
        await self._sections.submit(ADDED, old=old, used=wanted.set_bitmap, state=messages.pack_state(state))
        await self._barrier.wait(drain_vid=old if old != state.vid else 0)
        return Response()

    async def notify_vdi_del(self, request: Request) -> Response:
        """NOTIFY_VDI_DEL."""
        await self._sections.submit(DELETED, vid=_vid(unpack_u32(request.body)))
        await self._barrier.wait()
        return Response()

    # ---- weights

    async def reweight(self, request: Request) -> Response:
        """REWEIGHT: every sheep measures its disks."""
        await self._sections.submit(REWEIGHT)
        return Response()

    async def _apply_reweight(self, fields: Fields, sender: NodeId) -> None:
        self._spawn(self._reweigh)  # it announces a new record, which cannot wait for itself

    async def _reweigh(self) -> None:
        store = self._backend.store
        if store is None:
            return
        try:
            space = (await self._backend.executor.run(store.reweigh)).weight_bytes
            if self._state.mode is VnodeMode.DISK:
                self._disk_list.changed()
                return
            me = self._state.me
            if abs(space - me.space) < WEIGHT_CHANGE_MIN * max(me.space, 1):
                return
            logger.info("space changes from %d to %d bytes", me.space, space)
            await self._membership.update(replace(me, space=space))
            await self._membership.log.write_config()
        except SheepdogError as error:
            logger.warning("the new size of this sheep could not be announced: %s", error)

    async def set_vnodes(self, request: Request) -> Response:
        """SET_VNODES of this sheep."""
        if self._membership.gateway:
            return Response(Result.GATEWAY_MODE)
        if self._state.flags & ClusterFlag.AUTO_VNODES:
            return Response(Result.INVALID_VNODES_STRATEGY)
        vnodes = unpack_i32(request.body)
        if not 1 <= vnodes <= VNODES_MAX:
            raise InvalidParameters(f"{vnodes} vnodes")
        await self._membership.update(replace(self._state.me, vnodes=vnodes))
        await self._barrier.wait()
        return Response()


def _vid(number: int) -> int:
    if not 0 < number < 1 << 24:
        raise ProtocolError(f"no vid {number:x}")
    return number
