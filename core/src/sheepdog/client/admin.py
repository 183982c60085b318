"""What a client can learn about a cluster, and the administrative requests: plain functions over a ``Call``.

``Call`` is ``Connection.request`` or anything with its arguments, so the same functions serve a single connection and a
tool that keeps connections to many nodes.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, NamedTuple, Protocol

from sheepdog.client.connection import Buffer, Response
from sheepdog.errors import ProtocolError, RequestError
from sheepdog.model.limits import DISKS_MAX, NODES_MAX, VDI_BITMAP_BYTES
from sheepdog.model.node import NODE_BYTES, Node, VnodeMode, unpack_nodes

if TYPE_CHECKING:
    from sheepdog.model.clusterinfo import ClusterInfo
    from sheepdog.model.epochs import EpochLogEntry
    from sheepdog.model.vdi_state import VdiState

# Opcodes as plain numbers: importing the whole table of names costs more than a listing takes.
OP_READ_VDIS = 0x15
OP_GET_NODE_LIST = 0x82
OP_STAT_SHEEP = 0x86
OP_STAT_CLUSTER = 0x87
OP_STAT_RECOVERY = 0x97
OP_GET_VDI_COPIES = 0xAB
OP_MD_INFO = 0xB1
OP_STAT = 0xB8
OP_CLUSTER_INFO = 0xBE
OP_READ_DEL_VDIS = 0xC9
OP_GET_RECOVERY = 0xCA
OP_SET_RECOVERY = 0xCB

NODES_NR_OFFSET = 20  # in the header of a GET_NODE_LIST answer

RESULT_SUCCESS = 0x00
RESULT_BUFFER_SMALL = 0x88

EPOCH_LOG_HEAD_BYTES = 48
CLUSTER_INFO_BYTES = EPOCH_LOG_HEAD_BYTES + NODES_MAX * NODE_BYTES  # where vnodes belong to disks it is shorter
EPOCH_LOG_BYTES_MAX = 64 << 20
VDI_STATE_BYTES = 1428
VDI_STATES_AT_FIRST = 512

FLAG_STRICT = 0x01
FLAG_DISK_MODE = 0x02
FLAG_AUTO_VNODES = 0x04
FLAG_USE_LOCK = 0x08
FLAG_RECYCLE_VID = 0x10
FLAG_AVOID_DISKFULL = 0x20

STATUS_OK = 1

_RECOVERY_STATE = Struct("<B3xIQQ")
_THROTTLE = Struct("<I4xQB7x")
_DISK = Struct("<i4xQQ4096s")
_STATS = Struct("<15Q")
_CLUSTER_VARIANT = Struct("<8xQBBH4xIB3x")
MD_INFO_BYTES = _DISK.size * DISKS_MAX + 8


class Call(Protocol):
    """Sends one request and returns the answer, whatever its result."""

    def __call__(
        self,
        opcode: int,
        /,
        *,
        flags: int = 0,
        epoch: int = 0,
        data_length: int = 0,
        oid: int = 0,
        cow_oid: int = 0,
        copies: int = 0,
        copy_policy: int = 0,
        ec_index: int = 0,
        tgt_epoch: int = 0,
        offset: int = 0,
        variant: bytes | None = None,
        body: Buffer | None = None,
        into: memoryview | None = None,
    ) -> Response: ...


def refused(response: Response) -> RequestError:
    """The error for an answer that is no success; its text is the one that dog prints."""
    from sheepdog.wire.results import describe

    return RequestError(describe(response.result), result=response.result)


def expect(response: Response) -> Response:
    """The response itself.

    :raises RequestError: its result is no success.
    """
    if response.result != RESULT_SUCCESS:
        raise refused(response)
    return response


class Members(NamedTuple):
    """``nodes`` are ordered by address and port; ``mode`` says what vnodes belong to, and so how long records are."""

    nodes: tuple[Node, ...]
    mode: VnodeMode


def members(call: Call) -> Members:
    """The members. Which kind of cluster it is shows in the length of their records.

    :raises RequestError: refused.
    :raises ProtocolError: the answer is malformed.
    """
    response = expect(call(OP_GET_NODE_LIST, data_length=NODES_MAX * NODE_BYTES))
    with_disks = response.u32(NODES_NR_OFFSET) * VnodeMode.DISK.record_bytes == len(response.body) > 0
    mode = VnodeMode.DISK if with_disks else VnodeMode.NODE
    return Members(unpack_nodes(response.body, mode), mode)


def node_list(call: Call) -> tuple[Node, ...]:
    """As ``members``, the nodes alone."""
    return members(call).nodes


def current_epoch(call: Call) -> int:
    """The epoch of the sheep, 0 before the cluster was formatted."""
    return call(OP_STAT_CLUSTER, data_length=EPOCH_LOG_HEAD_BYTES).epoch


class ClusterStat(NamedTuple):
    """``result`` tells the status of the cluster; ``entries`` are newest first."""

    result: int
    epoch: int
    entries: tuple[EpochLogEntry, ...]


def epoch_log(call: Call, *, epoch: int, node_slots: int, mode: VnodeMode = VnodeMode.NODE) -> ClusterStat:
    """The epochs of the cluster with their members.

    :param epoch: the newest, as ``current_epoch`` gave it; it sizes the answer.
    :param node_slots: room for nodes in each entry; doubled as often as an epoch had more.
    :param mode: as ``members`` found it.
    :raises ProtocolError: the answer is malformed.
    """
    from sheepdog.model.epochs import epoch_entry_bytes, unpack_epoch_log

    slots = max(node_slots, 1)
    while True:
        stride = epoch_entry_bytes(slots, mode)
        room = min(epoch, EPOCH_LOG_BYTES_MAX // stride) * stride
        response = call(OP_STAT_CLUSTER, data_length=room, variant=bytes(24) + slots.to_bytes(4, "little"))
        if response.result != RESULT_BUFFER_SMALL:
            return ClusterStat(response.result, response.epoch, unpack_epoch_log(response.body, slots, mode))
        if slots >= NODES_MAX:
            raise refused(response)
        slots *= 2


def newest_epoch(call: Call) -> tuple[int, EpochLogEntry | None]:
    """(result, newest entry without its nodes). The entry carries the cluster's defaults; None before format."""
    from sheepdog.model.epochs import EpochLogEntry

    response = call(OP_STAT_CLUSTER, data_length=EPOCH_LOG_HEAD_BYTES)
    if len(response.body) < EPOCH_LOG_HEAD_BYTES:
        return response.result, None
    # Asked without room for nodes, an original sheep may still give their number.
    head = bytearray(response.body[:EPOCH_LOG_HEAD_BYTES])
    head[20:24] = bytes(4)
    return response.result, EpochLogEntry.unpack(head)


def cluster_info(call: Call) -> ClusterInfo:
    """The cluster as the sheep knows it.

    :raises RequestError: refused.
    """
    from sheepdog.model.clusterinfo import ClusterInfo

    response = expect(call(OP_CLUSTER_INFO, data_length=CLUSTER_INFO_BYTES))
    return ClusterInfo.unpack(response.body)


def pack_cluster_variant(
    *, ctime: int = 0, copies: int = 0, policy: int = 0, flags: int = 0, shift: int = 0, nodes_nr: int = 0
) -> bytes:
    """The cluster variant of a request header."""
    return _CLUSTER_VARIANT.pack(ctime, copies, policy, flags, nodes_nr, shift)


def used_vids(call: Call) -> list[int]:
    """The vids of all vdis and snapshots that are not deleted, ascending.

    :raises RequestError: refused.
    """
    from sheepdog.model.vid_bitmap import VidBitmap

    used = VidBitmap.unpack(expect(call(OP_READ_VDIS, data_length=VDI_BITMAP_BYTES)).body)
    deleted = VidBitmap.unpack(expect(call(OP_READ_DEL_VDIS, data_length=VDI_BITMAP_BYTES)).body)
    return [vid for vid in used if vid not in deleted]


def any_vid(call: Call) -> bool:
    """Some vid was ever used since the cluster was formatted.

    :raises RequestError: refused.
    """
    return any(expect(call(OP_READ_VDIS, data_length=VDI_BITMAP_BYTES)).body)


def vdi_states(call: Call) -> tuple[VdiState, ...]:
    """The state of every vdi that the sheep knows.

    :raises RequestError: refused.
    """
    from sheepdog.model.vdi_state import unpack_vdi_states

    count = VDI_STATES_AT_FIRST
    while True:
        response = call(OP_GET_VDI_COPIES, data_length=count * VDI_STATE_BYTES)
        if response.result != RESULT_BUFFER_SMALL:
            return unpack_vdi_states(expect(response).body)
        count *= 2


class Space(NamedTuple):
    """Bytes of storage of one node; both 0 for a gateway."""

    size: int
    free: int


def node_space(response: Response) -> Space:
    """What a STAT_SHEEP answer says."""
    return Space(response.u64(32), response.u64(40))


class RecoveryState(NamedTuple):
    """Recovery of one node; phase 0 is preparing the list, 1 recovering, 2 notifying."""

    in_recovery: bool
    phase: int
    finished: int
    total: int


def unpack_recovery_state(body: Buffer) -> RecoveryState:
    """:raises ProtocolError: too short."""
    _need(body, _RECOVERY_STATE)
    in_recovery, phase, finished, total = _RECOVERY_STATE.unpack_from(body)
    return RecoveryState(bool(in_recovery), phase, finished, total)


class RecoveryThrottle(NamedTuple):
    """After ``max_exec_count`` objects recovery pauses ``interval_ms``."""

    max_exec_count: int
    interval_ms: int
    on: bool


def unpack_throttle(body: Buffer) -> RecoveryThrottle:
    """:raises ProtocolError: too short."""
    _need(body, _THROTTLE)
    count, interval, on = _THROTTLE.unpack_from(body)
    return RecoveryThrottle(count, interval, bool(on))


def pack_throttle(throttle: RecoveryThrottle) -> bytes:
    """24 bytes."""
    return _THROTTLE.pack(throttle.max_exec_count, throttle.interval_ms, throttle.on)


class Disk(NamedTuple):
    """One object directory of a node; sizes in bytes."""

    number: int
    free: int
    used: int
    path: bytes

    @property
    def size(self) -> int:
        return self.free + self.used


def unpack_disks(body: Buffer) -> list[Disk]:
    """What an MD_INFO answer says.

    :raises ProtocolError: too short.
    """
    if len(body) < MD_INFO_BYTES:
        raise ProtocolError(f"multi-disk information has {MD_INFO_BYTES} bytes, not {len(body)}")
    count = min(int.from_bytes(body[MD_INFO_BYTES - 8 : MD_INFO_BYTES - 4], "little"), DISKS_MAX)
    disks = []
    for at in range(count):
        number, free, used, path = _DISK.unpack_from(body, at * _DISK.size)
        disks.append(Disk(number, free, used, path.split(b"\0", 1)[0]))
    return disks


class Counters(NamedTuple):
    """Counters of one sheep since it started, in the order of the wire."""

    gateway_active: int
    peer_active: int
    gateway_total: int
    peer_total: int
    gateway_received_bytes: int
    gateway_sent_bytes: int
    peer_received_bytes: int
    peer_sent_bytes: int
    gateway_removes: int
    gateway_reads: int
    gateway_writes: int
    gateway_flushes: int
    peer_removes: int
    peer_reads: int
    peer_writes: int


STATS_BYTES = _STATS.size


def unpack_counters(body: Buffer) -> Counters:
    """:raises ProtocolError: too short."""
    _need(body, _STATS)
    return Counters(*_STATS.unpack_from(body))


def _need(body: Buffer, struct: Struct) -> None:
    if len(body) < struct.size:
        raise ProtocolError(f"{struct.size} bytes were expected, {len(body)} came")
