"""Everything a plugin may import.

A plugin imports this module and nothing else of Sheepdog (its tests also import ``sheepdog.testing``). What is not
here is core's own business and may change in any release; what is here changes only with ``API_VERSION``: a new minor
number adds something, a new major number breaks something.

Importing this module is cheap: no event loop, no pluggy, no third-party library. A plugin that needs those imports
them itself, late if a command line could do without.

See docs/plugins.md for a plugin from the first line to its conformance tests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sheepdog.contracts.cluster import (
    PAYLOAD_BYTES_MAX,
    ClusterDriver,
    ClusterSession,
    Delivered,
    Event,
    Joined,
    Left,
    Updated,
)
from sheepdog.contracts.frontend import FrontEnd, FrontEndContext
from sheepdog.contracts.hookspecs import hookimpl
from sheepdog.contracts.incoming import Gathered, Incoming
from sheepdog.contracts.redundancy import (
    RedundancyFactory,
    RedundancyScheme,
    ShardRange,
    ShardWrite,
)
from sheepdog.contracts.services import (
    Clock,
    Done,
    Executor,
    Services,
    Volume,
    VolumeInfo,
    Volumes,
    completed,
)
from sheepdog.contracts.store import REPLICA, DiskInfo, ObjectStore, ShardKey, Staged, StoreOptions, Usage, Verified
from sheepdog.contracts.transport import Accept, Address, Buffer, Channel, Listener, Receiver, Transport
from sheepdog.errors import (
    ClusterError,
    ClusterUnavailable,
    ConfigError,
    Halted,
    InvalidParameters,
    JoinRefused,
    ObjectExists,
    ObjectNotFound,
    PayloadTooLarge,
    PluginAmbiguous,
    PluginBroken,
    PluginError,
    PluginIncompatible,
    PluginMissing,
    ProtocolError,
    ReadOnlyObject,
    RequestError,
    SessionLost,
    ShardCorrupt,
    SheepdogError,
    StoreBusy,
    StoreDeviceError,
    StoreError,
    StoreFull,
    TagNotFound,
    TransportError,
    VdiExists,
    VdiLocked,
    VdiNotFound,
)
from sheepdog.model.hashing import fnv1a, hash_oid, next_hash, sd_hash
from sheepdog.model.ids import (
    SPARSE_BITS,
    Epoch,
    Oid,
    Vid,
    always_replicated,
    attribute_oid,
    btree_oid,
    data_oid,
    format_oid,
    index_of,
    inode_oid,
    is_attribute,
    is_btree,
    is_data,
    is_inode,
    is_ledger,
    is_sparse,
    is_vmstate,
    ledger_oid,
    object_bytes,
    vid_of,
    vmstate_oid,
)
from sheepdog.model.node import NODE_BYTES, Node, NodeId
from sheepdog.model.ring import DiskRing, Ring

if TYPE_CHECKING:
    from sheepdog.builtin.filestore import FileStore, Layout
    from sheepdog.builtin.grouplog import GroupMember, GroupState, RecordDamaged
    from sheepdog.builtin.groupsession import (
        EventStream,
        GroupSession,
        Mailbox,
        ServiceDriver,
        ServiceSession,
        check_size,
    )
    from sheepdog.builtin.streams import StreamListening, StreamTransport
    from sheepdog.builtin.tls import TlsChannel as TlsChannel

API_VERSION = (1, 0)
"""(major, minor). A plugin runs when its major number is the same and its minor number is not larger."""

# Parts of core that plugins build on and that themselves import this module; they are loaded when first asked for.
_LATE = {
    "EventStream": "sheepdog.builtin.groupsession",
    "FileStore": "sheepdog.builtin.filestore",
    "GroupMember": "sheepdog.builtin.grouplog",
    "GroupSession": "sheepdog.builtin.groupsession",
    "GroupState": "sheepdog.builtin.grouplog",
    "Layout": "sheepdog.builtin.filestore",
    "Mailbox": "sheepdog.builtin.groupsession",
    "RecordDamaged": "sheepdog.builtin.grouplog",
    "ServiceDriver": "sheepdog.builtin.groupsession",
    "ServiceSession": "sheepdog.builtin.groupsession",
    "StreamListening": "sheepdog.builtin.streams",
    "StreamTransport": "sheepdog.builtin.streams",
    "TlsChannel": "sheepdog.builtin.tls",
    "check_size": "sheepdog.builtin.groupsession",
}


def __getattr__(name: str) -> Any:  # Any: whatever the name stands for
    if name in _LATE:
        from importlib import import_module

        value = getattr(import_module(_LATE[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@contextmanager
def map_errors(mapping: Mapping[type[BaseException], type[SheepdogError]]) -> Iterator[None]:
    """Foreign exceptions leave the block as ours: the one boundary that each backend has.

    The first entry whose class fits wins, so put subclasses before their bases. The original stays as ``__cause__``;
    its text becomes the message. Exceptions of the Sheepdog tree pass unchanged.
    """
    try:
        yield
    except SheepdogError:
        raise
    except tuple(mapping) as error:
        for foreign, ours in mapping.items():
            if isinstance(error, foreign):
                raise ours(str(error) or type(error).__name__) from error
        raise


__all__ = [
    "API_VERSION",
    "NODE_BYTES",
    "PAYLOAD_BYTES_MAX",
    "REPLICA",
    "SPARSE_BITS",
    "Accept",
    "Address",
    "Buffer",
    "Channel",
    "Clock",
    "ClusterDriver",
    "ClusterError",
    "ClusterSession",
    "ClusterUnavailable",
    "ConfigError",
    "Delivered",
    "DiskInfo",
    "DiskRing",
    "Done",
    "Epoch",
    "Event",
    "EventStream",
    "Executor",
    "FileStore",
    "FrontEnd",
    "FrontEndContext",
    "Gathered",
    "GroupMember",
    "GroupSession",
    "GroupState",
    "Halted",
    "Incoming",
    "InvalidParameters",
    "JoinRefused",
    "Joined",
    "Layout",
    "Left",
    "Listener",
    "Mailbox",
    "Node",
    "NodeId",
    "ObjectExists",
    "ObjectNotFound",
    "ObjectStore",
    "Oid",
    "PayloadTooLarge",
    "PluginAmbiguous",
    "PluginBroken",
    "PluginError",
    "PluginIncompatible",
    "PluginMissing",
    "ProtocolError",
    "ReadOnlyObject",
    "Receiver",
    "RecordDamaged",
    "RedundancyFactory",
    "RedundancyScheme",
    "RequestError",
    "Ring",
    "ServiceDriver",
    "ServiceSession",
    "Services",
    "SessionLost",
    "ShardCorrupt",
    "ShardKey",
    "ShardRange",
    "ShardWrite",
    "SheepdogError",
    "Staged",
    "StoreBusy",
    "StoreDeviceError",
    "StoreError",
    "StoreFull",
    "StoreOptions",
    "StreamListening",
    "StreamTransport",
    "TagNotFound",
    "TlsChannel",
    "Transport",
    "TransportError",
    "Updated",
    "Usage",
    "VdiExists",
    "VdiLocked",
    "VdiNotFound",
    "Verified",
    "Vid",
    "Volume",
    "VolumeInfo",
    "Volumes",
    "always_replicated",
    "attribute_oid",
    "btree_oid",
    "check_size",
    "completed",
    "data_oid",
    "fnv1a",
    "format_oid",
    "hash_oid",
    "hookimpl",
    "index_of",
    "inode_oid",
    "is_attribute",
    "is_btree",
    "is_data",
    "is_inode",
    "is_ledger",
    "is_sparse",
    "is_vmstate",
    "ledger_oid",
    "map_errors",
    "next_hash",
    "object_bytes",
    "sd_hash",
    "vid_of",
    "vmstate_oid",
]
