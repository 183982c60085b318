"""What a sheep tells about itself and the cluster, and maintenance of single objects.

No answer is longer than the room that the request announces: what does not fit is BUFFER_SMALL, upon which dog asks
again with more. What only needs memory is answered at once; what touches disks runs on worker threads.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import cbor2

from sheepdog.contracts.services import Clock
from sheepdog.contracts.store import REPLICA, ObjectStore, ShardKey
from sheepdog.daemon.config import LOGGING_LEVELS
from sheepdog.daemon.interfaces import Backend
from sheepdog.daemon.membership import Membership
from sheepdog.daemon.repair import Repairs
from sheepdog.daemon.state import SheepState
from sheepdog.errors import InvalidParameters, ObjectNotFound
from sheepdog.model.clusterinfo import ClusterInfo, ClusterStatus, cluster_info_bytes, mode_flag
from sheepdog.model.epochs import EpochLogEntry, EpochRecord, epoch_entry_bytes, pack_epoch_log
from sheepdog.model.ids import always_replicated, vid_of
from sheepdog.model.limits import VDI_BITMAP_BYTES
from sheepdog.model.node import pack_nodes
from sheepdog.model.vdi_state import VDI_STATE_BYTES, pack_vdi_states
from sheepdog.wire.header import Request, Response
from sheepdog.wire.payloads import (
    RECOVERY_STATE_BYTES,
    STAT_BYTES,
    STORE_LIST_BYTES,
    THROTTLE_BYTES,
    ClusterDefaultResponse,
    ClusterRequest,
    ForwRequest,
    HashResponse,
    NodeResponse,
    RecoveryState,
    Stat,
    Throttle,
    pack_i32,
    pack_oids,
    pack_store_list,
    unpack_i32,
    unpack_oids,
)
from sheepdog.wire.results import Result

logger = logging.getLogger(__name__)

EPOCHS_BYTES_MAX = 64 << 20  # of one STAT_CLUSTER answer, whatever room is announced
_STATUS_RESULT = {
    ClusterStatus.OK: Result.SUCCESS,
    ClusterStatus.SHUTDOWN: Result.SHUTDOWN,
    ClusterStatus.KILLED: Result.SYSTEM_ERROR,
}


class Info:
    """Handlers of everything that only tells, and of GET_HASH, REPAIR_REPLICA and their like."""

    def __init__(
        self,
        state: SheepState,
        membership: Membership,
        backend: Backend,
        clock: Clock,
    ) -> None:
        self._state = state
        self._membership = membership
        self._backend = backend
        self._clock = clock
        self.repairs: Repairs | None = None  # set where objects are stored

    # ---- the cluster

    def cluster_default(self, request: Request) -> Response:
        """GET_CLUSTER_DEFAULT."""
        state = self._state
        return Response(variant=ClusterDefaultResponse(state.copies, state.copy_policy, state.block_size_shift).pack())

    def node_list(self, request: Request) -> Response:
        """GET_NODE_LIST."""
        nodes = self._state.ring.nodes
        return _sized(request, pack_nodes(nodes, self._state.mode), NodeResponse(nr_nodes=len(nodes)).pack())

    def cluster_info(self, request: Request) -> Response:
        """CLUSTER_INFO."""
        state = self._state
        if request.data_length < cluster_info_bytes(state.mode):
            return Response(Result.BUFFER_SMALL)
        return Response(
            body=ClusterInfo(
                disable_recovery=state.recovery_disabled,
                epoch=state.epoch,
                ctime=state.ctime,
                flags=state.flags | mode_flag(state.mode),  # it decides how long the records are
                copies=state.copies,
                copy_policy=state.copy_policy,
                status=state.status,
                block_size_shift=state.block_size_shift,
                default_store=state.store_name,
                nodes=self._membership.epoch_nodes,
            ).pack()
        )

    async def driver_status(self, request: Request) -> Response:
        """DRIVER_STATUS: the session with the cluster driver, and the members as this sheep sees them, oldest first."""
        status = await self._membership.driver_status(self._clock.monotonic)
        status["members"] = [member.node.id.text for member in self._membership.members()]
        return _sized(request, cbor2.dumps(status))

    async def stat_cluster(self, request: Request) -> Response:
        """STAT_CLUSTER: the newest epochs, as many as fit; the result is the status of the cluster."""
        state = self._state
        slots = ClusterRequest.unpack(request.variant or b"").nodes_nr
        room = min(request.data_length, EPOCHS_BYTES_MAX) // epoch_entry_bytes(slots, state.mode)
        wanted = list(range(state.epoch, max(0, state.epoch - room), -1))
        entries: list[EpochLogEntry] = []
        for epoch in wanted:
            record: EpochRecord | None = EpochRecord((), 0)
            if slots:
                record = await self._epoch(epoch)
                if record is None:
                    await self._membership.complete_epochs()
                    record = await self._epoch(epoch)
                if record is None:
                    break  # nobody knows it any more
                if len(record.nodes) > slots:
                    return Response(Result.BUFFER_SMALL, body=pack_epoch_log(entries, slots, state.mode))
            assert record is not None
            entry = EpochLogEntry(record.time, epoch, record.nodes)
            if not entries:
                entry = EpochLogEntry(
                    record.time,
                    epoch,
                    record.nodes,
                    ctime=state.ctime,
                    disable_recovery=state.recovery_disabled,
                    copies=state.copies,
                    copy_policy=state.copy_policy,
                    flags=state.flags,
                    store=state.store_name,
                )
            entries.append(entry)
        result = _STATUS_RESULT.get(state.status)
        if result is None:
            result = Result.WAIT_FOR_JOIN if state.formatted else Result.WAIT_FOR_FORMAT
        return Response(result, body=pack_epoch_log(entries, slots, state.mode))

    async def _epoch(self, epoch: int) -> EpochRecord | None:
        storedir = self._backend.storedir
        return await self._backend.executor.run(lambda: storedir.read_epoch(epoch))

    async def get_epoch(self, request: Request) -> Response:
        """GET_EPOCH: one log entry of this sheep."""
        record = await self._epoch(request.tgt_epoch) if request.tgt_epoch else None
        if record is None:
            return Response(Result.NO_TAG)
        return _sized(request, record.pack(self._state.mode))

    # ---- volumes

    def read_vdis(self, request: Request) -> Response:
        """READ_VDIS."""
        if request.data_length != VDI_BITMAP_BYTES:
            return Response(Result.INVALID_PARMS)
        return Response(body=self._state.vdis.in_use.pack())

    def read_del_vdis(self, request: Request) -> Response:
        """READ_DEL_VDIS."""
        if request.data_length != VDI_BITMAP_BYTES:
            return Response(Result.INVALID_PARMS)
        return Response(body=self._state.vdis.deleted.pack())

    def vdi_copies(self, request: Request) -> Response:
        """GET_VDI_COPIES: the states of all volumes."""
        if len(self._state.vdis) * VDI_STATE_BYTES > request.data_length:
            return Response(Result.BUFFER_SMALL)
        return Response(body=pack_vdi_states(self._state.vdis.states()))

    def flush_vdi(self, request: Request) -> Response:
        """FLUSH_VDI: tells clients that there is no cache to flush."""
        return Response(Result.INVALID_PARMS)

    # ---- this sheep

    async def stat_sheep(self, request: Request) -> Response:
        """STAT_SHEEP: bytes of storage in all and free."""
        if self._backend.store is None:
            return Response(variant=NodeResponse().pack())
        usage = await self._backend.use(lambda store: store.usage())
        return Response(
            variant=NodeResponse(store_size=usage.used_bytes + usage.free_bytes, store_free=usage.free_bytes).pack()
        )

    def store_list(self, request: Request) -> Response:
        """GET_STORE_LIST."""
        body = pack_store_list(self._backend.store_names)
        return Response(body=body.ljust(STORE_LIST_BYTES, b"\0")[: request.data_length])

    def stat_recovery(self, request: Request) -> Response:
        """STAT_RECOVERY."""
        now = self._backend.recovery.status()
        body = RecoveryState(int(now.in_recovery), now.phase, now.finished, now.total).pack()
        assert len(body) == RECOVERY_STATE_BYTES
        return _sized(request, body)

    def stat(self, request: Request) -> Response:
        """STAT."""
        body = Stat(*self._backend.stats.counters()).pack()
        assert len(body) == STAT_BYTES
        return _sized(request, body)

    def get_log_level(self, request: Request) -> Response:
        """GET_LOGLEVEL: that of the root logger, which is the one in force."""
        level = logging.getLogger().level
        number = next((at for at, one in enumerate(LOGGING_LEVELS) if one <= level), len(LOGGING_LEVELS) - 1)
        return _sized(request, pack_i32(number))

    def set_log_level(self, request: Request) -> Response:
        """SET_LOGLEVEL."""
        level = unpack_i32(request.body)
        if not 0 <= level < len(LOGGING_LEVELS):
            raise InvalidParameters(f"no log level {level}")
        logging.getLogger().setLevel(LOGGING_LEVELS[level])
        return Response()

    def get_throttle(self, request: Request) -> Response:
        """GET_RECOVERY."""
        count, interval_ms, on = self._backend.recovery.throttle()
        return _sized(request, Throttle(count, interval_ms, int(on)).pack())

    def set_throttle(self, request: Request) -> Response:
        """SET_RECOVERY."""
        if len(request.body) < THROTTLE_BYTES:
            raise InvalidParameters(f"a throttle has {THROTTLE_BYTES} bytes, not {len(request.body)}")
        wanted = Throttle.unpack(request.body)
        # dog leaves the flag 0 and means the numbers: both 0 is off.
        on = wanted.max_exec_count > 0 and wanted.interval_ms > 0
        self._backend.recovery.set_throttle(wanted.max_exec_count, wanted.interval_ms, on)
        return Response()

    def get_vnodes(self, request: Request) -> Response:
        """GET_VNODES."""
        return _sized(request, pack_i32(self._state.me.vnodes))

    def success(self, request: Request) -> Response:
        """Operations that have nothing to do any more."""
        return Response()

    # ---- objects of this sheep

    async def object_list(self, request: Request) -> Response:
        """GET_OBJ_LIST: oids held here, live and stale, ascending."""
        if self._backend.store is None:
            return Response()
        oids = await self._backend.use(_all_oids)
        if len(oids) * 8 > request.data_length:
            return Response(Result.BUFFER_SMALL)
        return Response(body=pack_oids(oids))

    async def exist(self, request: Request) -> Response:
        """EXIST."""
        missing = await self._missing([request.oid])
        return Response(Result.NO_OBJ if missing else Result.SUCCESS)

    async def oids_exist(self, request: Request) -> Response:
        """OIDS_EXIST: those of the listed objects that this sheep does not hold."""
        missing = await self._missing(unpack_oids(request.body))
        return Response(Result.NO_OBJ if missing else Result.SUCCESS, body=pack_oids(missing))

    async def _missing(self, oids: list[int]) -> list[int]:
        if self._backend.store is None:
            return oids
        return await self._backend.use(lambda store: [oid for oid in oids if self._key(store, oid) is None])

    def _key(self, store: ObjectStore, oid: int) -> ShardKey | None:
        """The shard of ``oid`` that is stored here; on a worker thread."""
        for index in self._indexes(oid):
            if store.exists(ShardKey(oid, index)):
                return ShardKey(oid, index)
        return None

    def _indexes(self, oid: int) -> Iterable[int]:
        known = self._state.vdis.scheme_of(vid_of(oid))
        copies, policy = known[:2] if known is not None else (self._state.copies, self._state.copy_policy)
        if always_replicated(oid) or not policy:
            return (REPLICA,)
        return range(copies)

    async def get_hash(self, request: Request) -> Response:
        """GET_HASH: SHA-1 of the live shard held here, or of the stale version of an epoch."""
        if self._backend.store is None:
            return Response(Result.NO_OBJ)
        oid, epoch = request.oid, request.tgt_epoch
        cache = self._state.vdis.readonly(vid_of(oid)) and not always_replicated(oid)

        def work(store: ObjectStore) -> bytes:
            key = self._key(store, oid)
            if key is not None:
                return store.digest(key, cache=cache)
            for index in self._indexes(oid):
                try:
                    return store.digest(ShardKey(oid, index), epoch=epoch)
                except ObjectNotFound:
                    continue
            raise ObjectNotFound(f"oid={oid:016x} is not here, nor its version of epoch={epoch}")

        return Response(variant=HashResponse(await self._backend.use(work)).pack())

    async def repair_replica(self, request: Request) -> Response:
        """REPAIR_REPLICA: the copy held here becomes that of the majority.

        The node that the request names as source is not asked: what the client saw may be out of date (see ``repair``).
        """
        oid = ForwRequest.unpack(request.variant or b"").oid
        if self.repairs is None or self._backend.store is None:
            return Response(Result.NO_OBJ)
        return await self.repairs.repair(oid)


def _all_oids(store: ObjectStore) -> list[int]:
    oids = {key.oid for key in store.keys()}  # noqa: SIM118  a store is no mapping
    oids.update(key.oid for key, _ in store.stale_keys())
    return sorted(oids)


def _sized(request: Request, body: bytes, variant: bytes = b"") -> Response:
    """The answer if it fits."""
    if len(body) > request.data_length:
        return Response(Result.BUFFER_SMALL)
    return Response(variant=variant, body=body)
