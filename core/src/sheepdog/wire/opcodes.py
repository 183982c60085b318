"""Operations of the wire protocol: numbers, flags, classes, and which of them are served in every cluster status.

The table is that of docs, wire protocol, section 8.1. A number without a row in ``OP_TABLE`` is answered with
INVALID_PARMS, whether or not it has a name.
"""

from __future__ import annotations

from enum import Enum, IntEnum
from typing import Final, NamedTuple

PROTO_VER: Final = 0x02  # opcodes below 0x80; 0, 1 and 2 are accepted
SHEEP_PROTO_VER: Final = 0x0A  # opcodes from 0x80 on; nothing else is accepted
INTERNAL_OPCODE_MIN: Final = 0x80

WRITE: Final = 0x0001
COW: Final = 0x0002
CACHE: Final = 0x0004
DIRECT: Final = 0x0008
PIGGYBACK: Final = 0x0010
TGT: Final = 0x0020
FWD: Final = 0x0040
RECOVERY: Final = 0x0080
WILDCARD: Final = 0x0100
CREAT: Final = 0x0100  # GET_VDI_ATTR only, the same bit as WILDCARD
EXCL: Final = 0x0200  # GET_VDI_ATTR only
DEL: Final = 0x0400  # GET_VDI_ATTR only


class Flag:
    """The request flags under one name; plain integers, because the data path tests them."""

    WRITE: Final = 0x0001
    COW: Final = 0x0002
    CACHE: Final = 0x0004
    DIRECT: Final = 0x0008
    PIGGYBACK: Final = 0x0010
    TGT: Final = 0x0020
    FWD: Final = 0x0040
    RECOVERY: Final = 0x0080
    WILDCARD: Final = 0x0100
    CREAT: Final = 0x0100
    EXCL: Final = 0x0200
    DEL: Final = 0x0400


class Op(IntEnum):
    """Opcodes."""

    CREATE_AND_WRITE_OBJ = 0x01
    READ_OBJ = 0x02
    WRITE_OBJ = 0x03
    REMOVE_OBJ = 0x04
    DISCARD_OBJ = 0x05
    NEW_VDI = 0x11
    LOCK_VDI = 0x12
    RELEASE_VDI = 0x13
    GET_VDI_INFO = 0x14
    READ_VDIS = 0x15
    FLUSH_VDI = 0x16
    DEL_VDI = 0x17
    GET_CLUSTER_DEFAULT = 0x18
    GET_NODE_LIST = 0x82
    MAKE_FS = 0x84
    SHUTDOWN = 0x85
    STAT_SHEEP = 0x86
    STAT_CLUSTER = 0x87
    GET_VDI_ATTR = 0x89
    FORCE_RECOVER = 0x8A
    GET_STORE_LIST = 0x90
    SNAPSHOT = 0x91
    RESTORE = 0x92
    GET_SNAP_FILE = 0x93
    CLEANUP = 0x94
    TRACE_STATUS = 0x95
    TRACE_READ_BUF = 0x96
    STAT_RECOVERY = 0x97
    FLUSH_DEL_CACHE = 0x98
    NOTIFY_VDI_DEL = 0x99
    KILL_NODE = 0x9A
    TRACE_ENABLE = 0x9B
    TRACE_DISABLE = 0x9C
    GET_OBJ_LIST = 0xA1
    GET_EPOCH = 0xA2
    CREATE_AND_WRITE_PEER = 0xA3
    READ_PEER = 0xA4
    WRITE_PEER = 0xA5
    REMOVE_PEER = 0xA6
    ENABLE_RECOVER = 0xA8
    DISABLE_RECOVER = 0xA9
    GET_VDI_COPIES = 0xAB
    COMPLETE_RECOVERY = 0xAC
    FLUSH_NODES = 0xAD
    FLUSH_PEER = 0xAE
    NOTIFY_VDI_ADD = 0xAF
    DELETE_CACHE = 0xB0
    MD_INFO = 0xB1
    MD_PLUG = 0xB2
    MD_UNPLUG = 0xB3
    GET_HASH = 0xB4
    REWEIGHT = 0xB5
    GET_CACHE_INFO = 0xB6
    CACHE_PURGE = 0xB7
    STAT = 0xB8
    GET_LOGLEVEL = 0xB9
    SET_LOGLEVEL = 0xBA
    NFS_CREATE = 0xBB
    NFS_DELETE = 0xBC
    EXIST = 0xBD
    CLUSTER_INFO = 0xBE
    ALTER_CLUSTER_COPY = 0xBF
    ALTER_VDI_COPY = 0xC0
    DECREF_OBJ = 0xC1
    DECREF_PEER = 0xC2
    PREVENT_INODE_UPDATE = 0xC3
    ALLOW_INODE_UPDATE = 0xC4
    REPAIR_REPLICA = 0xC5
    OIDS_EXIST = 0xC6
    VDI_STATE_CHECKPOINT_CTL = 0xC7
    INODE_COHERENCE = 0xC8
    READ_DEL_VDIS = 0xC9
    GET_RECOVERY = 0xCA
    SET_RECOVERY = 0xCB
    SET_VNODES = 0xCC
    GET_VNODES = 0xCD


class OpClass(Enum):
    """Who executes an operation, and in which order relative to others."""

    GATEWAY = "gateway"
    """The contacted sheep, fanning out to peers."""
    PEER = "peer"
    """The contacted sheep on its own store; the epoch must match."""
    LOCAL = "local"
    """The contacted sheep alone."""
    BLOCK = "cluster/block"
    """A work step on the contacted sheep inside an exclusive section, then a step on every sheep in total order."""
    NOTIFY = "cluster/notify"
    """A step on every sheep in total order."""


class OpInfo(NamedTuple):
    """A row of the opcode table.

    :param force: served also while the cluster waits for format or for members.
    :param admin: logged as an operation of the administrator.
    """

    op_class: OpClass
    force: bool = False
    admin: bool = False

    @property
    def clustered(self) -> bool:
        """Every sheep takes part."""
        return self.op_class is OpClass.BLOCK or self.op_class is OpClass.NOTIFY


_G, _P, _L, _B, _N = OpClass.GATEWAY, OpClass.PEER, OpClass.LOCAL, OpClass.BLOCK, OpClass.NOTIFY

OP_TABLE: Final[dict[int, OpInfo]] = {
    Op.CREATE_AND_WRITE_OBJ: OpInfo(_G),
    Op.READ_OBJ: OpInfo(_G),
    Op.WRITE_OBJ: OpInfo(_G),
    Op.REMOVE_OBJ: OpInfo(_G),
    Op.DISCARD_OBJ: OpInfo(_L),
    Op.NEW_VDI: OpInfo(_B, admin=True),
    Op.LOCK_VDI: OpInfo(_B),
    Op.RELEASE_VDI: OpInfo(_B),
    Op.GET_VDI_INFO: OpInfo(_B),
    Op.READ_VDIS: OpInfo(_L, force=True),
    Op.FLUSH_VDI: OpInfo(_L),
    Op.DEL_VDI: OpInfo(_B, admin=True),
    Op.GET_CLUSTER_DEFAULT: OpInfo(_L, force=True),
    Op.GET_NODE_LIST: OpInfo(_L, force=True),
    Op.MAKE_FS: OpInfo(_N, force=True, admin=True),
    Op.SHUTDOWN: OpInfo(_N, force=True, admin=True),
    Op.STAT_SHEEP: OpInfo(_L),
    Op.STAT_CLUSTER: OpInfo(_L, force=True),
    Op.GET_VDI_ATTR: OpInfo(_B),
    Op.FORCE_RECOVER: OpInfo(_B, force=True, admin=True),
    Op.GET_STORE_LIST: OpInfo(_L, force=True),
    Op.CLEANUP: OpInfo(_N, force=True),
    Op.TRACE_STATUS: OpInfo(_L, force=True),
    Op.TRACE_READ_BUF: OpInfo(_L, force=True),
    Op.STAT_RECOVERY: OpInfo(_L),
    Op.FLUSH_DEL_CACHE: OpInfo(_L),
    Op.NOTIFY_VDI_DEL: OpInfo(_N, force=True),
    Op.KILL_NODE: OpInfo(_L, force=True, admin=True),
    Op.TRACE_ENABLE: OpInfo(_L, force=True),
    Op.TRACE_DISABLE: OpInfo(_L, force=True),
    Op.GET_OBJ_LIST: OpInfo(_L),
    Op.GET_EPOCH: OpInfo(_L),
    Op.CREATE_AND_WRITE_PEER: OpInfo(_P),
    Op.READ_PEER: OpInfo(_P),
    Op.WRITE_PEER: OpInfo(_P),
    Op.REMOVE_PEER: OpInfo(_P),
    Op.ENABLE_RECOVER: OpInfo(_N, admin=True),
    Op.DISABLE_RECOVER: OpInfo(_N, admin=True),
    Op.GET_VDI_COPIES: OpInfo(_L, force=True),
    Op.COMPLETE_RECOVERY: OpInfo(_N, force=True),
    Op.NOTIFY_VDI_ADD: OpInfo(_N, force=True),
    Op.DELETE_CACHE: OpInfo(_N),
    Op.MD_INFO: OpInfo(_L),
    Op.MD_PLUG: OpInfo(_L, admin=True),
    Op.MD_UNPLUG: OpInfo(_L, admin=True),
    Op.GET_HASH: OpInfo(_L),
    Op.REWEIGHT: OpInfo(_N, admin=True),
    Op.STAT: OpInfo(_L),
    Op.GET_LOGLEVEL: OpInfo(_L, force=True),
    Op.SET_LOGLEVEL: OpInfo(_L, force=True),
    Op.EXIST: OpInfo(_L, force=True),
    Op.CLUSTER_INFO: OpInfo(_L, force=True),
    Op.ALTER_CLUSTER_COPY: OpInfo(_N, admin=True),
    Op.ALTER_VDI_COPY: OpInfo(_N, admin=True),
    Op.DECREF_OBJ: OpInfo(_G),
    Op.DECREF_PEER: OpInfo(_P),
    Op.REPAIR_REPLICA: OpInfo(_L),
    Op.OIDS_EXIST: OpInfo(_L, force=True),
    Op.VDI_STATE_CHECKPOINT_CTL: OpInfo(_L),
    Op.INODE_COHERENCE: OpInfo(_N),
    Op.READ_DEL_VDIS: OpInfo(_L, force=True),
    Op.GET_RECOVERY: OpInfo(_L, force=True),
    Op.SET_RECOVERY: OpInfo(_L, force=True),
    Op.SET_VNODES: OpInfo(_L),
    Op.GET_VNODES: OpInfo(_L),
}
"""Every operation that is served."""

PEER_OP: Final[dict[int, Op]] = {
    Op.CREATE_AND_WRITE_OBJ: Op.CREATE_AND_WRITE_PEER,
    Op.READ_OBJ: Op.READ_PEER,
    Op.WRITE_OBJ: Op.WRITE_PEER,
    Op.REMOVE_OBJ: Op.REMOVE_PEER,
    Op.DECREF_OBJ: Op.DECREF_PEER,
}
"""What a gateway sends to peers for each operation of its own."""


def op_name(opcode: int) -> str:
    """The name for logs, or the number of an opcode that has none."""
    try:
        return Op(opcode).name
    except ValueError:
        return f"0x{opcode:02x}"
