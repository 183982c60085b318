"""What a node knows of its cluster: the cluster_info structure, and the config file that outlives the process.

Layouts: docs, wire protocol, section 9.6 (48 bytes and a fixed array of node records), and on-disk layout, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from struct import Struct

from sheepdog.errors import ConfigError, InvalidParameters, ProtocolError
from sheepdog.model.node import Node, VnodeMode, pack_nodes, unpack_nodes

Buffer = bytes | bytearray | memoryview

CLUSTER_INFO_HEAD_BYTES = 48
CONFIG_BYTES = 40
CONFIG_VERSION = 6
STORE_NAME_BYTES = 16

# proto_ver, disable_recovery, nr_nodes, epoch, ctime, flags, nr_copies, copy_policy, status, shift, default_store
_HEAD = Struct("<BBhIQHBBBB3x16s7x")
# ctime, flags, copies, store, shutdown, copy_policy, shift, version, space
_CONFIG = Struct("<QHB16sBBBHQ")
assert _HEAD.size == CLUSTER_INFO_HEAD_BYTES
assert _CONFIG.size == CONFIG_BYTES


class ClusterStatus(IntEnum):
    """What a cluster is doing; the numbers are those of cluster_info."""

    OK = 1
    WAIT = 2
    SHUTDOWN = 3
    KILLED = 4


class ClusterFlag(IntFlag):
    """Choices made when the cluster was formatted."""

    STRICT = 0x01
    DISK_MODE = 0x02
    AUTO_VNODES = 0x04
    USE_LOCK = 0x08
    RECYCLE_VID = 0x10
    AVOID_DISK_FULL = 0x20


NO_FLAGS = ClusterFlag(0)


def mode_flag(mode: VnodeMode) -> ClusterFlag:
    """How the flags of a cluster say what its vnodes belong to."""
    return ClusterFlag.DISK_MODE if mode is VnodeMode.DISK else NO_FLAGS


def mode_of_flags(flags: int) -> VnodeMode:
    """What the vnodes belong to, by the flags of a cluster."""
    return VnodeMode.DISK if flags & ClusterFlag.DISK_MODE else VnodeMode.NODE


def cluster_info_bytes(mode: VnodeMode) -> int:
    """Length of the whole structure."""
    return CLUSTER_INFO_HEAD_BYTES + mode.nodes_max * mode.record_bytes


CLUSTER_INFO_BYTES = cluster_info_bytes(VnodeMode.NODE)
CLUSTER_INFO_WITH_DISKS_BYTES = cluster_info_bytes(VnodeMode.DISK)
assert CLUSTER_INFO_WITH_DISKS_BYTES <= CLUSTER_INFO_BYTES


def pack_store_name(name: str) -> bytes:
    """The name in ASCII, at most 15 bytes and a NUL.

    :raises InvalidParameters: too long, or not ASCII.
    """
    try:
        raw = name.encode("ascii")
    except UnicodeEncodeError:
        raise InvalidParameters(f"a store name is ASCII, not {name!r}") from None
    if len(raw) >= STORE_NAME_BYTES or b"\0" in raw:
        raise InvalidParameters(f"a store name has at most {STORE_NAME_BYTES - 1} bytes: {name!r}")
    return raw


def unpack_store_name(raw: bytes) -> str:
    """The text before the first NUL; bytes that are not ASCII show as ``?``, which no store is called."""
    return raw.split(b"\0", 1)[0].decode("ascii", "replace").replace("\ufffd", "?")


@dataclass(frozen=True, slots=True)
class ClusterInfo:
    """A node's knowledge of the cluster. ``nodes`` are the members of ``epoch``; ``flags`` decide their layout.

    :param ctime: identity of the cluster, 0 before it was formatted.
    :param status: a ``ClusterStatus``; a number from elsewhere is kept as it came.
    """

    proto_ver: int = 0x0A
    disable_recovery: bool = False
    epoch: int = 0
    ctime: int = 0
    flags: ClusterFlag = NO_FLAGS
    copies: int = 0
    copy_policy: int = 0
    status: int = ClusterStatus.WAIT
    block_size_shift: int = 0
    default_store: str = ""
    nodes: tuple[Node, ...] = field(default=())

    def pack_head(self) -> bytes:
        """The first 48 bytes."""
        return _HEAD.pack(
            self.proto_ver,
            self.disable_recovery,
            len(self.nodes),
            self.epoch,
            self.ctime,
            self.flags,
            self.copies,
            self.copy_policy,
            self.status,
            self.block_size_shift,
            pack_store_name(self.default_store),
        )

    def pack_used(self) -> bytes:
        """The head and the records of ``nodes`` only; what a driver's greeting carries."""
        return self.pack_head() + pack_nodes(self.nodes, mode_of_flags(self.flags))

    def pack(self) -> bytes:
        """The whole structure, 491568 bytes (491408 where vnodes belong to disks), unused records zero."""
        mode = mode_of_flags(self.flags)
        if len(self.nodes) > mode.nodes_max:
            raise InvalidParameters(f"{len(self.nodes)} nodes, a cluster has at most {mode.nodes_max}")
        return self.pack_used().ljust(cluster_info_bytes(mode), b"\0")

    @classmethod
    def unpack(cls, buffer: Buffer) -> ClusterInfo:
        """From a whole or a shortened structure.

        :raises ProtocolError: shorter than the head and the records it announces, or an impossible count.
        """
        if len(buffer) < CLUSTER_INFO_HEAD_BYTES:
            raise ProtocolError(f"cluster info has at least {CLUSTER_INFO_HEAD_BYTES} bytes, not {len(buffer)}")
        (
            proto_ver, disable_recovery, count, epoch, ctime, flags, copies, copy_policy, status, shift, store,
        ) = _HEAD.unpack_from(buffer)  # fmt: skip
        mode = mode_of_flags(flags)
        end = CLUSTER_INFO_HEAD_BYTES + count * mode.record_bytes
        if not 0 <= count <= mode.nodes_max or len(buffer) < end:
            raise ProtocolError(f"cluster info of {len(buffer)} bytes announces {count} nodes")
        return cls(
            proto_ver=proto_ver,
            disable_recovery=bool(disable_recovery),
            epoch=epoch,
            ctime=ctime,
            flags=ClusterFlag(flags),
            copies=copies,
            copy_policy=copy_policy,
            status=status,
            block_size_shift=shift,
            default_store=unpack_store_name(store),
            nodes=unpack_nodes(memoryview(buffer)[CLUSTER_INFO_HEAD_BYTES:end], mode),
        )


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """The file ``config``: cluster identity and defaults, 40 bytes.

    :param shutdown: the last shutdown was clean.
    :param space: bytes of storage, as announced to the cluster.
    """

    ctime: int = 0
    flags: ClusterFlag = NO_FLAGS
    copies: int = 0
    default_store: str = ""
    shutdown: bool = False
    copy_policy: int = 0
    block_size_shift: int = 0
    version: int = CONFIG_VERSION
    space: int = 0

    def pack(self) -> bytes:
        """40 bytes."""
        return _CONFIG.pack(
            self.ctime,
            self.flags,
            self.copies,
            pack_store_name(self.default_store),
            self.shutdown,
            self.copy_policy,
            self.block_size_shift,
            self.version,
            self.space,
        )

    @classmethod
    def unpack(cls, buffer: Buffer) -> DiskConfig:
        """From the file's content.

        :raises ConfigError: not 40 bytes, or another format version; the store cannot be used as it is.
        """
        if len(buffer) != CONFIG_BYTES:
            raise ConfigError(f"a config file has {CONFIG_BYTES} bytes, this one {len(buffer)}")
        ctime, flags, copies, store, shutdown, copy_policy, shift, version, space = _CONFIG.unpack(buffer)
        if version != CONFIG_VERSION:
            raise ConfigError(f"This sheep version is not compatible with the existing data layout, {version}")
        return cls(
            ctime=ctime,
            flags=ClusterFlag(flags),
            copies=copies,
            default_store=unpack_store_name(store),
            shutdown=bool(shutdown),
            copy_policy=copy_policy,
            block_size_shift=shift,
            version=version,
            space=space,
        )
