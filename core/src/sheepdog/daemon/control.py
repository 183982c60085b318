"""The control plane of one sheep, put together, and its part of the opcode table."""

from __future__ import annotations

from collections.abc import Sequence

from sheepdog.contracts.cluster import ClusterDriver
from sheepdog.contracts.services import Services
from sheepdog.daemon.admin import Admin
from sheepdog.daemon.attributes import Attributes
from sheepdog.daemon.barrier import Barrier
from sheepdog.daemon.disk_list import DiskList
from sheepdog.daemon.dispatch import Dispatcher
from sheepdog.daemon.info import Info
from sheepdog.daemon.interfaces import Backend, Gateway, Lifecycle, Objects, PeerCaller, Spawn
from sheepdog.daemon.locks import Locks
from sheepdog.daemon.md_ops import DiskOperations
from sheepdog.daemon.membership import Membership
from sheepdog.daemon.sections import Sections
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.tracing import Tracers
from sheepdog.daemon.transfer import BARRIER, FETCH_STATE
from sheepdog.daemon.vdi import Vdis
from sheepdog.errors import SheepdogError
from sheepdog.model.clusterinfo import ClusterStatus
from sheepdog.model.inode import InodeHeader
from sheepdog.model.ring import Ring
from sheepdog.model.vdi_state import LockType
from sheepdog.wire.extensions import DRIVER_STATUS
from sheepdog.wire.opcodes import Op


class Control:
    """Everything of a sheep that is not the data path."""

    def __init__(
        self,
        *,
        state: SheepState,
        driver: ClusterDriver,
        backend: Backend,
        peers: PeerCaller,
        objects: Objects,
        gateway: Gateway,
        dispatcher: Dispatcher,
        lifecycle: Lifecycle,
        services: Services,
        spawn: Spawn,
        auto_vnodes: bool,
    ) -> None:
        """:param auto_vnodes: the sheep was started without ``-V``."""
        clock = services.clock
        self.state = state
        self.sections = Sections(state.me.id)
        self.membership = Membership(
            state, driver, backend, peers, self.sections, lifecycle, clock,
            lambda: services.random.getrandbits(64), auto_vnodes=auto_vnodes,
        )  # fmt: skip
        self.barrier = Barrier(self.membership, peers, gateway, clock)
        self.vdis = Vdis(state, self.membership, self.sections, self.barrier, objects, backend, clock, spawn)
        self.locks = Locks(self.vdis)
        self.attributes = Attributes(self.vdis)
        self.disk_list = DiskList(state, self.membership, backend, spawn)
        self.admin = Admin(
            state, self.membership, self.sections, self.barrier, self.vdis, backend, lifecycle, clock, spawn,
            self.disk_list,
        )  # fmt: skip
        self.info = Info(state, self.membership, backend, clock)
        self.disks = DiskOperations(backend)
        self.tracers = Tracers(dispatcher, clock)
        self._register(dispatcher)

    def _register(self, dispatcher: Dispatcher) -> None:
        vdis, locks, admin, info, disks = self.vdis, self.locks, self.admin, self.info, self.disks
        for opcode, handler in (
            (Op.READ_VDIS, info.read_vdis),
            (Op.READ_DEL_VDIS, info.read_del_vdis),
            (Op.FLUSH_VDI, info.flush_vdi),
            (Op.GET_CLUSTER_DEFAULT, info.cluster_default),
            (Op.GET_NODE_LIST, info.node_list),
            (Op.CLUSTER_INFO, info.cluster_info),
            (Op.GET_VDI_COPIES, info.vdi_copies),
            (Op.GET_STORE_LIST, info.store_list),
            (Op.STAT_RECOVERY, info.stat_recovery),
            (Op.STAT, info.stat),
            (Op.GET_LOGLEVEL, info.get_log_level),
            (Op.SET_LOGLEVEL, info.set_log_level),
            (Op.GET_RECOVERY, info.get_throttle),
            (Op.SET_RECOVERY, info.set_throttle),
            (Op.GET_VNODES, info.get_vnodes),
            (Op.FLUSH_DEL_CACHE, info.success),
            (Op.DELETE_CACHE, info.success),
        ):
            dispatcher.fast(opcode, handler)
        for opcode, task in (
            (Op.NEW_VDI, vdis.new_vdi),
            (Op.DEL_VDI, vdis.del_vdi),
            (Op.GET_VDI_INFO, vdis.get_vdi_info),
            (Op.DISCARD_OBJ, vdis.discard_obj),
            (Op.LOCK_VDI, locks.lock_vdi),
            (Op.RELEASE_VDI, locks.release_vdi),
            (Op.INODE_COHERENCE, locks.inode_coherence),
            (Op.VDI_STATE_CHECKPOINT_CTL, locks.checkpoint_ctl),
            (Op.GET_VDI_ATTR, self.attributes.get_vdi_attr),
            (Op.MAKE_FS, admin.make_fs),
            (Op.SHUTDOWN, admin.shutdown),
            (Op.KILL_NODE, admin.kill_node),
            (Op.FORCE_RECOVER, admin.force_recover),
            (Op.ENABLE_RECOVER, admin.enable_recover),
            (Op.DISABLE_RECOVER, admin.disable_recover),
            (Op.CLEANUP, admin.cleanup),
            (Op.COMPLETE_RECOVERY, admin.complete_recovery),
            (Op.ALTER_CLUSTER_COPY, admin.alter_cluster_copy),
            (Op.ALTER_VDI_COPY, admin.alter_vdi_copy),
            (Op.NOTIFY_VDI_ADD, admin.notify_vdi_add),
            (Op.NOTIFY_VDI_DEL, admin.notify_vdi_del),
            (Op.REWEIGHT, admin.reweight),
            (Op.SET_VNODES, admin.set_vnodes),
            (Op.STAT_CLUSTER, info.stat_cluster),
            (Op.STAT_SHEEP, info.stat_sheep),
            (Op.GET_OBJ_LIST, info.object_list),
            (Op.GET_HASH, info.get_hash),
            (Op.EXIST, info.exist),
            (Op.OIDS_EXIST, info.oids_exist),
            (Op.REPAIR_REPLICA, info.repair_replica),
            (Op.MD_INFO, disks.md_info),
            (Op.MD_PLUG, disks.md_plug),
            (Op.MD_UNPLUG, disks.md_unplug),
        ):
            dispatcher.task(opcode, task)
        # A sheep that waits for members, or has just been accepted, needs these from others in the same state.
        dispatcher.task(Op.GET_EPOCH, info.get_epoch, force=True)
        dispatcher.task(DRIVER_STATUS, info.driver_status, force=True)
        dispatcher.task(FETCH_STATE, self.membership.frozen.answer, force=True, unlimited=True)
        dispatcher.task(BARRIER, self.barrier.answer, force=True, unlimited=True)

    async def run(self) -> None:
        """Member of the cluster until cancelled; see ``Membership.run`` for the errors."""
        await self.membership.run()

    def killed(self) -> None:
        """This sheep is about to end: it serves nothing from here on."""
        self.state.install(status=ClusterStatus.KILLED)

    # ---- for recovery

    async def epoch_ring(self, epoch: int) -> Ring | None:
        """The ring of an earlier epoch, from our own log or another member's; ``None`` when nobody knows it."""
        return await self.membership.epoch_ring(epoch)

    async def announce_recovered(self, epoch: int) -> None:
        """Every member learns that this sheep has recovered to ``epoch``. Errors are cluster errors."""
        await self.admin.announce_recovered(epoch)

    async def coherence(self, vid: int, *, validate: bool) -> None:
        """See ``Locks.coherence``."""
        await self.locks.coherence(vid, validate=validate)

    # ---- for front ends

    async def lookup(self, name: bytes, tag: bytes, snapid: int) -> tuple[int, int, int]:
        """(vid, copies, block size shift).

        :raises VdiNotFound: no such name.
        :raises TagNotFound: no such snapshot of the name.
        """
        vid, header = await self.vdis.find(name, tag, snapid)
        return self._scheme(vid, header)

    async def lock(self, name: bytes) -> tuple[int, int, int]:
        """As ``lookup`` of the working volume, which this sheep holds the lock of now (where locks are enforced).

        :raises VdiLocked: somebody holds it.
        """
        vid, header = await self.locks.lock(name, b"", 0, LockType.NORMAL)
        return self._scheme(vid, header)

    async def release(self, vid: int) -> None:
        """The lock that ``lock`` took is given back; harmless when there is none."""
        await self.locks.release(vid, LockType.NORMAL)

    async def list_vdis(self) -> Sequence[tuple[int, InodeHeader]]:
        """Every volume and snapshot that is not deleted, ordered by vid. One whose inode cannot be read is left out."""
        found = []
        for vid in list(self.state.vdis.in_use):
            try:
                header = await self.vdis.complete_header(vid)
            except SheepdogError:
                continue
            if header is not None and not header.is_deleted:
                found.append((vid, header))
        return found

    def readonly(self, vid: int) -> bool:
        """Whether this sheep knows by now that the volume is a snapshot."""
        return self.state.vdis.readonly(vid)

    def _scheme(self, vid: int, header: InodeHeader) -> tuple[int, int, int]:
        known = self.state.vdis.scheme_of(vid)
        if known is not None:
            return vid, known[0], known[2]
        return vid, header.nr_copies, header.block_size_shift
