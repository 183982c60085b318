"""Result codes of responses, the strings that dog prints for them, and the errors they become.

Docs: wire protocol, section 10.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum

from sheepdog.errors import (
    ClusterError,
    Halted,
    InvalidParameters,
    JoinRefused,
    ObjectExists,
    ObjectNotFound,
    ReadOnlyObject,
    RequestError,
    SheepdogError,
    StoreError,
    StoreFull,
    TagNotFound,
    TransportError,
    VdiExists,
    VdiLocked,
    VdiNotFound,
)


class Result(IntEnum):
    """Result codes."""

    SUCCESS = 0x00
    UNKNOWN = 0x01
    NO_OBJ = 0x02
    EIO = 0x03
    VDI_EXIST = 0x04
    INVALID_PARMS = 0x05
    SYSTEM_ERROR = 0x06
    VDI_LOCKED = 0x07
    NO_VDI = 0x08
    NO_BASE_VDI = 0x09
    VDI_READ = 0x0A
    VDI_WRITE = 0x0B
    BASE_VDI_READ = 0x0C
    BASE_VDI_WRITE = 0x0D
    NO_TAG = 0x0E
    STARTUP = 0x0F
    VDI_NOT_LOCKED = 0x10
    SHUTDOWN = 0x11
    NO_MEM = 0x12
    FULL_VDI = 0x13
    VER_MISMATCH = 0x14
    NO_SPACE = 0x15
    WAIT_FOR_FORMAT = 0x16
    WAIT_FOR_JOIN = 0x17
    JOIN_FAILED = 0x18
    HALT = 0x19
    READONLY = 0x1A
    INODE_INVALIDATED = 0x1D
    OLD_NODE_VER = 0x81
    NEW_NODE_VER = 0x82
    NOT_FORMATTED = 0x83
    INVALID_CTIME = 0x84
    INVALID_EPOCH = 0x85
    NETWORK_ERROR = 0x86
    NO_CACHE = 0x87
    BUFFER_SMALL = 0x88
    FORCE_RECOVER = 0x89
    NO_STORE = 0x8A
    NO_SUPPORT = 0x8B
    NODE_IN_RECOVERY = 0x8C
    KILLED = 0x8D
    OID_EXIST = 0x8E
    AGAIN = 0x8F
    STALE_OBJ = 0x90
    CLUSTER_ERROR = 0x91
    VDI_NOT_EMPTY = 0x92
    NOT_FOUND = 0x93
    INCOMPLETE = 0x94
    COLLECTING_CINFO = 0x95
    GATEWAY_MODE = 0x97
    INVALID_VNODES_STRATEGY = 0x98
    NO_CHECKPOINT_ENTRY = 0x99


_TEXT: dict[int, str] = {
    Result.SUCCESS: "Success",
    Result.UNKNOWN: "Unknown error",
    Result.NO_OBJ: "No object found",
    Result.EIO: "I/O error",
    Result.VDI_EXIST: "VDI exists already",
    Result.INVALID_PARMS: "Invalid parameters",
    Result.SYSTEM_ERROR: "System error",
    Result.VDI_LOCKED: "VDI is already locked",
    Result.NO_VDI: "No VDI found",
    Result.NO_BASE_VDI: "No base VDI found",
    Result.VDI_READ: "Failed to read from requested VDI",
    Result.VDI_WRITE: "Failed to write to requested VDI",
    Result.BASE_VDI_READ: "Failed to read from base VDI",
    Result.BASE_VDI_WRITE: "Failed to write to base VDI",
    Result.NO_TAG: "Failed to find requested tag",
    Result.STARTUP: "System is still booting",
    Result.VDI_NOT_LOCKED: "VDI is not locked",
    Result.SHUTDOWN: "System is shutting down",
    Result.NO_MEM: "Out of memory on server",
    Result.FULL_VDI: "Maximum number of VDIs reached",
    Result.VER_MISMATCH: "Protocol version mismatch",
    Result.NO_SPACE: "Server has no space for new objects",
    Result.WAIT_FOR_FORMAT: "Waiting for cluster to be formatted",
    Result.WAIT_FOR_JOIN: "Waiting for other nodes to join cluster",
    Result.JOIN_FAILED: "Node has failed to join cluster",
    Result.HALT: "IO has halted as there are not enough living nodes",
    Result.READONLY: "Object is read-only",
    Result.INODE_INVALIDATED: "Inode object is invalidated",
    Result.OLD_NODE_VER: "Request has an old epoch",
    Result.NEW_NODE_VER: "Request has a new epoch",
    Result.NOT_FORMATTED: "Cluster has not been formatted",
    Result.INVALID_CTIME: "Creation times differ",
    Result.INVALID_EPOCH: "Invalid epoch",
    Result.NETWORK_ERROR: "Network error between sheep",
    Result.NO_CACHE: "No cache object found",
    Result.BUFFER_SMALL: "The buffer is too small",
    Result.FORCE_RECOVER: "Cluster is running/halted and cannot be force recovered",
    Result.NO_STORE: "Targeted backend store is not found",
    Result.NO_SUPPORT: "Operation is not supported",
    Result.NODE_IN_RECOVERY: "Targeted node is in recovery",
    Result.KILLED: "Node is killed",
    Result.OID_EXIST: "Object ID exists already",
    Result.AGAIN: "Ask to try again",
    Result.STALE_OBJ: "Object may be stale",
    Result.CLUSTER_ERROR: "Cluster driver error",
    Result.GATEWAY_MODE: "Targeted node is gateway mode",
    Result.INVALID_VNODES_STRATEGY: "Invalid cluster vnodes strategy",
}


def describe(code: int) -> str:
    """The string that dog prints for a result code."""
    return _TEXT.get(code) or f"Invalid error code {code:x}"


_ERRORS: dict[int, Callable[[str], SheepdogError]] = {
    Result.NO_OBJ: ObjectNotFound,
    Result.EIO: StoreError,
    Result.VDI_EXIST: VdiExists,
    Result.INVALID_PARMS: InvalidParameters,
    Result.VDI_LOCKED: VdiLocked,
    Result.NO_VDI: VdiNotFound,
    Result.NO_TAG: TagNotFound,
    Result.NO_SPACE: StoreFull,
    Result.JOIN_FAILED: JoinRefused,
    Result.HALT: Halted,
    Result.READONLY: ReadOnlyObject,
    Result.NETWORK_ERROR: TransportError,
    Result.OID_EXIST: ObjectExists,
    Result.CLUSTER_ERROR: ClusterError,
}


def error_for(code: int, message: str = "") -> SheepdogError:
    """The error that a result code stands for; its ``result`` is ``code``.

    :param code: anything but SUCCESS.
    :param message: the string of ``describe`` is taken when empty.
    """
    text = message or describe(code)
    make = _ERRORS.get(code)
    if make is not None:
        return make(text)
    return RequestError(text, result=int(code))
