"""Everything on the wire besides the common headers: header variants and bodies.

A request variant is the 32 bytes at offset 16 of the header, a response variant the 28 bytes at offset 20 (docs: wire
protocol, sections 3, 4 and 9.6). Each structure is a frozen dataclass with ``pack()`` and ``unpack(buffer)``; padding
is sent as zero and ignored on receipt. ``unpack`` raises ``ProtocolError`` on what is too short and
``InvalidParameters`` on a body that is well-framed but makes no sense, so that the server can answer it.

Structures that belong to the model (nodes, cluster_info, vdi_state, epoch log, attributes, bitmaps) are in
``sheepdog.model``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct
from struct import error as StructError
from typing import Any, ClassVar, TypeVar

from sheepdog.errors import InvalidParameters, ProtocolError
from sheepdog.model.inode import NAME_BYTES, check_name, cut_name
from sheepdog.model.limits import DISKS_MAX
from sheepdog.model.node import NodeId, format_address

Buffer = bytes | bytearray | memoryview
V = TypeVar("V", bound="_Packed")

REQUEST_VARIANT_BYTES = 32
RESPONSE_VARIANT_BYTES = 28


class _Packed:
    """Mixin: the dataclass's fields, in order, are the struct's."""

    __slots__ = ()
    __match_args__: ClassVar[tuple[str, ...]] = ()  # dataclass puts the names of the fields here
    _struct: ClassVar[Struct]

    def pack(self) -> bytes:
        """The bytes, padding zero.

        :raises InvalidParameters: a value that its field cannot hold.
        """
        try:
            return self._struct.pack(*[getattr(self, name) for name in self.__match_args__])
        except StructError as error:
            raise InvalidParameters(f"{self}: {error}") from None

    @classmethod
    def unpack(cls: type[V], buffer: Buffer) -> V:
        """From the beginning of ``buffer``.

        :raises ProtocolError: too short.
        """
        if len(buffer) < cls._struct.size:
            raise ProtocolError(f"{cls.__name__} has {cls._struct.size} bytes, not {len(buffer)}")
        return cls(*cls._struct.unpack_from(buffer))


# --- request variants, 32 bytes ---


@dataclass(frozen=True, slots=True)
class ObjRequest(_Packed):
    """Object I/O and several internal operations. ``tail`` is padding for clients."""

    oid: int = 0
    cow_oid: int = 0
    copies: int = 0
    copy_policy: int = 0
    ec_index: int = 0
    reserved: int = 0
    tgt_epoch: int = 0
    offset: int = 0
    tail: int = 0
    _struct: ClassVar[Struct] = Struct("<QQBBBBIII")


@dataclass(frozen=True, slots=True)
class VdiRequest(_Packed):
    """NEW_VDI, LOCK_VDI, RELEASE_VDI, GET_VDI_INFO, DEL_VDI, GET_VDI_ATTR.

    :param vdi_size: bytes.
    :param base_vdi_id: parent (NEW_VDI), or the vid itself (RELEASE_VDI).
    :param snapid: of the snapshot that is looked up; NEW_VDI: not 0 means "make a snapshot".
    :param lock_type: 0 normal, 1 shared.
    """

    vdi_size: int = 0
    base_vdi_id: int = 0
    copies: int = 0
    copy_policy: int = 0
    store_policy: int = 0
    block_size_shift: int = 0
    snapid: int = 0
    lock_type: int = 0
    _struct: ClassVar[Struct] = Struct("<QIBBBBII8x")


@dataclass(frozen=True, slots=True)
class ClusterRequest(_Packed):
    """MAKE_FS, STAT_CLUSTER, ALTER_CLUSTER_COPY.

    :param nodes_nr: node slots per epoch entry (STAT_CLUSTER).
    """

    oid: int = 0
    ctime: int = 0
    copies: int = 0
    copy_policy: int = 0
    flags: int = 0
    tag: int = 0
    nodes_nr: int = 0
    block_size_shift: int = 0
    _struct: ClassVar[Struct] = Struct("<QQBBHIIB3x")


@dataclass(frozen=True, slots=True)
class VdiStateRequest(_Packed):
    """NOTIFY_VDI_ADD and ALTER_VDI_COPY."""

    old_vid: int = 0
    new_vid: int = 0
    copies: int = 0
    set_bitmap: int = 0
    copy_policy: int = 0
    block_size_shift: int = 0
    _struct: ClassVar[Struct] = Struct("<IIBBBB20x")


@dataclass(frozen=True, slots=True)
class RefRequest(_Packed):
    """DECREF_OBJ and DECREF_PEER: one reference (generation, count) to the ledger's object is dropped."""

    oid: int = 0
    generation: int = 0
    count: int = 0
    _struct: ClassVar[Struct] = Struct("<QII16x")


@dataclass(frozen=True, slots=True)
class ForwRequest(_Packed):
    """REPAIR_REPLICA: fetch ``oid`` from the node at ``address`` and ``port``."""

    oid: int = 0
    address: bytes = bytes(16)
    port: int = 0
    _struct: ClassVar[Struct] = Struct("<Q16sH6x")

    @property
    def node_id(self) -> NodeId:
        """The source node."""
        return NodeId(self.address, self.port)

    @property
    def host(self) -> str:
        """The source node's address as text."""
        return format_address(self.address)


@dataclass(frozen=True, slots=True)
class CheckpointRequest(_Packed):
    """VDI_STATE_CHECKPOINT_CTL.

    :param get: 1 fetches, 0 frees.
    """

    get: int = 0
    tgt_epoch: int = 0
    vid: int = 0
    _struct: ClassVar[Struct] = Struct("<III20x")


@dataclass(frozen=True, slots=True)
class CoherenceRequest(_Packed):
    """INODE_COHERENCE.

    :param validate: 1 validates, 0 invalidates.
    """

    vid: int = 0
    validate: int = 0
    _struct: ClassVar[Struct] = Struct("<II24x")


# --- response variants, 28 bytes ---


@dataclass(frozen=True, slots=True)
class ObjResponse(_Packed):
    """Object I/O."""

    copies: int = 0
    offset: int = 0
    _struct: ClassVar[Struct] = Struct("<B3xQ16x")


@dataclass(frozen=True, slots=True)
class VdiResponse(_Packed):
    """VDI operations."""

    vdi_id: int = 0
    attr_id: int = 0
    copies: int = 0
    block_size_shift: int = 0
    _struct: ClassVar[Struct] = Struct("<4xIIBB14x")


@dataclass(frozen=True, slots=True)
class NodeResponse(_Packed):
    """GET_NODE_LIST (``nr_nodes``) and STAT_SHEEP (bytes)."""

    nr_nodes: int = 0
    store_size: int = 0
    store_free: int = 0
    _struct: ClassVar[Struct] = Struct("<I8xQQ")


@dataclass(frozen=True, slots=True)
class HashResponse(_Packed):
    """GET_HASH: a SHA-1."""

    digest: bytes = bytes(20)
    _struct: ClassVar[Struct] = Struct("<4x20s4x")


@dataclass(frozen=True, slots=True)
class ClusterDefaultResponse(_Packed):
    """GET_CLUSTER_DEFAULT."""

    nr_copies: int = 0
    copy_policy: int = 0
    block_size_shift: int = 0
    _struct: ClassVar[Struct] = Struct("<BBB25x")


REQUEST_VARIANTS: tuple[type[_Packed], ...] = (
    ObjRequest,
    VdiRequest,
    ClusterRequest,
    VdiStateRequest,
    RefRequest,
    ForwRequest,
    CheckpointRequest,
    CoherenceRequest,
)
RESPONSE_VARIANTS: tuple[type[_Packed], ...] = (
    ObjResponse,
    VdiResponse,
    NodeResponse,
    HashResponse,
    ClusterDefaultResponse,
)
assert all(variant._struct.size == REQUEST_VARIANT_BYTES for variant in REQUEST_VARIANTS)
assert all(variant._struct.size == RESPONSE_VARIANT_BYTES for variant in RESPONSE_VARIANTS)


# --- bodies ---


class RecoveryPhase(IntEnum):
    """What a recovering node is doing."""

    PREPARING = 0
    RECOVERING = 1
    NOTIFYING = 2


@dataclass(frozen=True, slots=True)
class RecoveryState(_Packed):
    """STAT_RECOVERY, 24 bytes: objects finished and in all."""

    in_recovery: int = 0
    phase: int = RecoveryPhase.PREPARING
    finished: int = 0
    total: int = 0
    _struct: ClassVar[Struct] = Struct("<B3xIQQ")


@dataclass(frozen=True, slots=True)
class Throttle(_Packed):
    """GET_RECOVERY and SET_RECOVERY, 24 bytes: at most so many objects per interval, when ``on``."""

    max_exec_count: int = 0
    interval_ms: int = 0
    on: int = 0
    _struct: ClassVar[Struct] = Struct("<I4xQB7x")


@dataclass(frozen=True, slots=True)
class Stat(_Packed):
    """STAT, 120 bytes: requests in progress and in all, bytes, and requests by kind."""

    gateway_active: int = 0
    peer_active: int = 0
    gateway_total: int = 0
    peer_total: int = 0
    gateway_rx_bytes: int = 0
    gateway_tx_bytes: int = 0
    peer_rx_bytes: int = 0
    peer_tx_bytes: int = 0
    gateway_removes: int = 0
    gateway_reads: int = 0
    gateway_writes: int = 0
    gateway_flushes: int = 0
    peer_removes: int = 0
    peer_reads: int = 0
    peer_writes: int = 0
    _struct: ClassVar[Struct] = Struct("<15Q")


STAT_BYTES = Stat._struct.size
RECOVERY_STATE_BYTES = RecoveryState._struct.size
THROTTLE_BYTES = Throttle._struct.size


_DISK = Struct("<i4xQQ4096s")
_DISK_PATH_BYTES = 4096
_DISK_COUNT_OFFSET = DISKS_MAX * _DISK.size
MD_INFO_BYTES = 263688
assert _DISK_COUNT_OFFSET + 8 == MD_INFO_BYTES


@dataclass(frozen=True, slots=True)
class MdDisk:
    """One disk of a node; sizes in bytes."""

    index: int
    free: int
    used: int
    path: str


@dataclass(frozen=True, slots=True)
class MdInfo:
    """MD_INFO: the disks of a node, at most 64."""

    disks: tuple[MdDisk, ...] = ()

    def pack(self) -> bytes:
        """263688 bytes.

        :raises InvalidParameters: too many disks, or a path too long for its field.
        """
        if len(self.disks) > DISKS_MAX:
            raise InvalidParameters(f"{len(self.disks)} disks, md info reports at most {DISKS_MAX}")
        parts = []
        for disk in self.disks:
            path = disk.path.encode("utf-8", "surrogateescape")
            if len(path) >= _DISK_PATH_BYTES:
                raise InvalidParameters(f"a disk path of {len(path)} bytes")
            parts.append(_DISK.pack(disk.index, disk.free, disk.used, path))
        table = b"".join(parts).ljust(_DISK_COUNT_OFFSET, b"\0")
        return table + len(self.disks).to_bytes(8, "little")

    @classmethod
    def unpack(cls, buffer: Buffer) -> MdInfo:
        """From a reply.

        :raises ProtocolError: too short, or an impossible number of disks.
        """
        if len(buffer) < MD_INFO_BYTES:
            raise ProtocolError(f"md info has {MD_INFO_BYTES} bytes, not {len(buffer)}")
        count = int.from_bytes(buffer[_DISK_COUNT_OFFSET : _DISK_COUNT_OFFSET + 4], "little", signed=True)
        if not 0 <= count <= DISKS_MAX:
            raise ProtocolError(f"md info announces {count} disks")
        disks = []
        for at in range(0, count * _DISK.size, _DISK.size):
            index, free, used, path = _DISK.unpack_from(buffer, at)
            disks.append(MdDisk(index, free, used, cut_name(path).decode("utf-8", "surrogateescape")))
        return cls(tuple(disks))


STORE_LIST_BYTES = 512


def pack_store_list(names: Iterable[str]) -> bytes:
    """GET_STORE_LIST: each name and a space, then NUL. At most 512 bytes."""
    text = "".join(f"{name} " for name in names).encode("ascii")
    return text[: STORE_LIST_BYTES - 1] + b"\0"


def unpack_store_list(buffer: Buffer) -> tuple[str, ...]:
    """The names of a GET_STORE_LIST reply."""
    return tuple(cut_name(bytes(buffer)).decode("ascii", "replace").split())


def pack_names(name: bytes, tag: bytes | None = None) -> bytes:
    """The body of VDI requests: name[256], and tag[256] unless it is ``None``.

    :raises InvalidParameters: longer than 255 bytes.
    """
    body = check_name(name).ljust(NAME_BYTES, b"\0")
    return body if tag is None else body + check_name(tag, "tag").ljust(NAME_BYTES, b"\0")


def unpack_names(body: Buffer) -> tuple[bytes, bytes]:
    """(name, tag) of a VDI request; the tag is empty when only a name was sent.

    Fields that end without a NUL are refused: the original reads past them.

    :raises InvalidParameters: neither 256 nor 512 bytes, or a field without NUL.
    """
    if len(body) not in (NAME_BYTES, 2 * NAME_BYTES):
        raise InvalidParameters(f"a name has {NAME_BYTES} bytes, with a tag {2 * NAME_BYTES}, not {len(body)}")
    raw = bytes(body)
    fields = [raw[at : at + NAME_BYTES] for at in range(0, len(raw), NAME_BYTES)]
    if any(b"\0" not in one for one in fields):
        raise InvalidParameters("a name or tag without NUL")
    return cut_name(fields[0]), cut_name(fields[1]) if len(fields) == 2 else b""


def unpack_new_vdi_name(body: Buffer) -> bytes:
    """The name in the body of NEW_VDI.

    :raises InvalidParameters: not exactly 256 bytes, without NUL, or empty.
    """
    if len(body) != NAME_BYTES:
        raise InvalidParameters(f"the body of NEW_VDI has {NAME_BYTES} bytes, not {len(body)}")
    name, _ = unpack_names(body)
    if not name:
        raise InvalidParameters("an empty name")
    return name


def pack_text(text: str) -> bytes:
    """A NUL-terminated text: the store name of MAKE_FS, the paths of MD_PLUG and MD_UNPLUG."""
    return text.encode("utf-8", "surrogateescape") + b"\0"


def unpack_text(body: Buffer) -> str:
    """The text before the first NUL, or all of the body."""
    return cut_name(bytes(body)).decode("utf-8", "surrogateescape")


def pack_paths(paths: Iterable[str]) -> bytes:
    """MD_PLUG and MD_UNPLUG: paths with commas between them."""
    return pack_text(",".join(paths))


def unpack_paths(body: Buffer) -> tuple[str, ...]:
    """The paths of MD_PLUG and MD_UNPLUG, empty ones left out."""
    return tuple(path for path in unpack_text(body).split(",") if path)


def pack_oids(oids: Iterable[int]) -> bytes:
    """GET_OBJ_LIST and OIDS_EXIST: u64 each."""
    return b"".join(oid.to_bytes(8, "little") for oid in oids)


def unpack_oids(body: Buffer) -> list[int]:
    """The oids of GET_OBJ_LIST and OIDS_EXIST.

    :raises ProtocolError: no multiple of eight bytes.
    """
    if len(body) % 8:
        raise ProtocolError(f"an oid list of {len(body)} bytes is no multiple of 8")
    return memoryview(body).cast("B").cast("Q").tolist()


def pack_i32(number: int) -> bytes:
    """GET_LOGLEVEL, GET_VNODES and their like."""
    return number.to_bytes(4, "little", signed=True)


def unpack_i32(body: Buffer) -> int:
    """The number in the first four bytes; more may follow (SET_VNODES of the original has eight).

    :raises InvalidParameters: fewer than four bytes.
    """
    if len(body) < 4:
        raise InvalidParameters(f"a number has 4 bytes, not {len(body)}")
    return int.from_bytes(body[:4], "little", signed=True)


def pack_u32(number: int) -> bytes:
    """NOTIFY_VDI_DEL: a vid."""
    return number.to_bytes(4, "little")


def unpack_u32(body: Buffer) -> int:
    """The vid of NOTIFY_VDI_DEL.

    :raises InvalidParameters: fewer than four bytes.
    """
    if len(body) < 4:
        raise InvalidParameters(f"a number has 4 bytes, not {len(body)}")
    return int.from_bytes(body[:4], "little")


def fields_of(value: Any) -> dict[str, Any]:  # Any: field values are ints and bytes of every kind
    """Field names and values of a structure of this module, for logs and tools."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
