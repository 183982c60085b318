"""What sheep say to each other through the cluster driver: CBOR maps, versioned and bounded.

Two kinds of payload exist. A *greeting* travels with a join and tells what the joiner knows of the cluster. A
*message* is broadcast: changes of the replicated state, claims of exclusive sections, and admission. Keys are short
because a payload has at most 128 KiB; unknown keys and unknown kinds are skipped, so that a newer sheep can say more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import cbor2

from sheepdog.contracts.cluster import PAYLOAD_BYTES_MAX
from sheepdog.errors import PayloadTooLarge, ProtocolError
from sheepdog.model.node import Node, NodeId, VnodeMode, pack_nodes, unpack_nodes
from sheepdog.model.vdi_state import LockState, VdiState

VERSION = 1
INVENTORY_BYTES_MAX = 64 * 1024  # of volume states in one payload, so that a greeting's node list fits beside them
READY = "ready"  # the welcomed sender has the state; nobody needs to keep a copy for it any more

CHANGE = "change"  # apply a change of the replicated state
CLAIM = "claim"  # queue for an exclusive section
RELEASE = "release"  # leave the section, or the queue, without a change
INVENTORY = "inventory"  # volumes that the joining sender knows from its own disks
WELCOME = "welcome"
REFUSE = "refuse"
PING = "ping"  # means nothing: its sender measures how long it takes to come back
STAMP = "stamp"  # the wall-clock time of an epoch, so that every member records the same

Fields = dict[str, Any]  # Any: CBOR carries ints, bytes, text, lists and maps


def encode(fields: Mapping[str, Any]) -> bytes:
    """The payload.

    :raises PayloadTooLarge: above the limit of the cluster contract.
    """
    payload = cbor2.dumps(dict(fields))
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise PayloadTooLarge(f"a payload of {len(payload)} bytes; at most {PAYLOAD_BYTES_MAX} can be broadcast")
    return payload


def decode(payload: bytes) -> Fields:
    """The map inside a payload.

    :raises ProtocolError: not a map of text keys, too long, or of another version.
    """
    if len(payload) > PAYLOAD_BYTES_MAX:
        raise ProtocolError(f"a payload of {len(payload)} bytes")
    return decode_map(payload)


def decode_map(data: bytes) -> Fields:
    """The map inside ``data``, whatever its length (state transfer).

    :raises ProtocolError: as ``decode``.
    """
    try:
        fields = cbor2.loads(data)
    except (cbor2.CBORDecodeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"a payload is not CBOR: {error}") from error
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise ProtocolError("a payload is not a map of text keys")
    if fields.get("v") != VERSION:
        raise ProtocolError(f"a payload has version {fields.get('v')!r}, not {VERSION}")
    return fields


def message(kind: str, token: int = 0, **fields: Any) -> bytes:
    """A broadcast of ``kind``; ``token`` lets the sender recognise its own delivery."""
    return encode({"v": VERSION, "k": kind, "t": token, **fields})


def integer(fields: Mapping[str, Any], key: str, default: int = 0) -> int:
    """An unsigned 64-bit field, ``default`` when absent.

    :raises ProtocolError: something else is there.
    """
    value = fields.get(key, default)
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise ProtocolError(f"field {key!r} is not an unsigned integer: {value!r}")
    return value


def octets(fields: Mapping[str, Any], key: str, default: bytes = b"") -> bytes:
    """A byte string, ``default`` when absent.

    :raises ProtocolError: something else is there.
    """
    value = fields.get(key, default)
    if not isinstance(value, bytes):
        raise ProtocolError(f"field {key!r} is not a byte string: {type(value).__name__}")
    return value


def text(fields: Mapping[str, Any], key: str) -> str:
    """A text, empty when absent.

    :raises ProtocolError: something else is there.
    """
    value = fields.get(key, "")
    if not isinstance(value, str):
        raise ProtocolError(f"field {key!r} is not a text: {type(value).__name__}")
    return value


def pack_records(nodes: Sequence[Node]) -> bytes | list[bytes]:
    """Node records as a field: in a row, or in a list where some announce disks, so that none takes the room of 32."""
    return [node.pack() for node in nodes] if any(node.disks for node in nodes) else pack_nodes(nodes)


def unpack_records(fields: Mapping[str, Any], key: str) -> tuple[Node, ...]:
    """The records of a field that ``pack_records`` made, none when absent.

    :raises ProtocolError: something else is there.
    """
    value = fields.get(key)
    if isinstance(value, list) and all(isinstance(record, bytes) for record in value):
        return tuple(map(Node.unpack, value))
    return unpack_nodes(octets(fields, key))


def pack_state(state: VdiState) -> list[Any]:
    """One volume state; the lock is left out while nobody holds it."""
    fields: list[Any] = [
        state.vid,
        state.copies,
        state.copy_policy,
        state.block_size_shift,
        state.parent_vid,
        int(state.snapshot) | int(state.deleted) << 1,
    ]
    if state.lock_state is not LockState.UNLOCKED:
        fields.append(state.pack())
    return fields


def unpack_state(fields: Any) -> VdiState:
    """The state that ``pack_state`` made.

    :raises ProtocolError: it did not.
    """
    if not isinstance(fields, list) or len(fields) < 6 or not all(isinstance(value, int) for value in fields[:6]):
        raise ProtocolError("a volume state is malformed")
    vid, copies, policy, shift, parent, bits = fields[:6]
    if not (0 < vid < 1 << 24 and 0 <= parent < 1 << 24 and max(copies, policy, shift) < 256 and min(fields[:6]) >= 0):
        raise ProtocolError(f"a volume state is out of range: {fields[:6]}")
    if len(fields) > 6 and isinstance(fields[6], bytes):
        return VdiState.unpack(fields[6])
    return VdiState(
        vid=vid,
        copies=copies,
        copy_policy=policy,
        block_size_shift=shift,
        parent_vid=parent,
        snapshot=bool(bits & 1),
        deleted=bool(bits & 2),
    )


def unpack_states(value: Any) -> list[VdiState]:
    """A list of states.

    :raises ProtocolError: it is not.
    """
    if not isinstance(value, list):
        raise ProtocolError("a list of volume states is missing")
    return [unpack_state(fields) for fields in value]


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a joiner knows: the cluster it was formatted in (``ctime`` 0: none) and the members of its newest epoch."""

    proto: int
    nonce: int  # tells this join from an earlier one under the same identity
    ctime: int = 0
    epoch: int = 0
    epoch_time: int = 0  # when ``epoch`` began
    flags: int = 0
    copies: int = 0
    copy_policy: int = 0
    block_size_shift: int = 0
    store: str = ""
    auto_vnodes: bool = True
    vnode_mode: VnodeMode = VnodeMode.NODE
    gateway: bool = False
    recovery_disabled: bool = False
    members: tuple[Node, ...] = ()
    inventory: tuple[VdiState, ...] = field(default=())
    unfinished: tuple[Any, ...] = field(default=())  # half-done volumes: their own form, see Vdis
    complete: bool = True  # False: INVENTORY messages with the rest follow

    def pack(self) -> bytes:
        """The greeting as a payload.

        :raises PayloadTooLarge: more members than fit; see the limits in the documentation of the cluster contract.
        """
        return encode(
            {
                "v": VERSION,
                "proto": self.proto,
                "nonce": self.nonce,
                "ctime": self.ctime,
                "epoch": self.epoch,
                "time": self.epoch_time,
                "flags": self.flags,
                "copies": self.copies,
                "policy": self.copy_policy,
                "shift": self.block_size_shift,
                "store": self.store,
                "auto": self.auto_vnodes,
                "disks": self.vnode_mode is VnodeMode.DISK,
                "gateway": self.gateway,
                "norec": self.recovery_disabled,
                "members": pack_records(self.members),
                "vdis": [pack_state(state) for state in self.inventory],
                "half": list(self.unfinished),
                "all": self.complete,
            }
        )

    @classmethod
    def unpack(cls, payload: bytes) -> Greeting:
        """The greeting inside a payload.

        :raises ProtocolError: it holds none.
        """
        fields = decode(payload)
        return cls(
            proto=integer(fields, "proto"),
            nonce=integer(fields, "nonce"),
            ctime=integer(fields, "ctime"),
            epoch=integer(fields, "epoch"),
            epoch_time=integer(fields, "time"),
            flags=integer(fields, "flags"),
            copies=integer(fields, "copies"),
            copy_policy=integer(fields, "policy"),
            block_size_shift=integer(fields, "shift"),
            store=text(fields, "store"),
            auto_vnodes=bool(integer(fields, "auto", 1)),
            vnode_mode=VnodeMode.DISK if integer(fields, "disks") else VnodeMode.NODE,
            gateway=bool(integer(fields, "gateway")),
            recovery_disabled=bool(integer(fields, "norec")),
            members=unpack_records(fields, "members"),
            inventory=tuple(unpack_states(fields.get("vdis", []))),
            unfinished=tuple(fields["half"]) if isinstance(fields.get("half"), list) else (),
            complete=bool(integer(fields, "all", 1)),
        )


def inventory_chunks(states: Sequence[VdiState]) -> list[tuple[VdiState, ...]]:
    """``states`` in order, cut so that each piece fits into one payload; at least one piece, possibly empty."""
    chunks: list[list[VdiState]] = [[]]
    size = 0
    for state in states:
        length = 1500 if state.lock_state is not LockState.UNLOCKED else 32
        if size + length > INVENTORY_BYTES_MAX:
            chunks.append([])
            size = 0
        chunks[-1].append(state)
        size += length
    return [tuple(chunk) for chunk in chunks]


def inventory_messages(chunks: Sequence[Sequence[VdiState]]) -> list[bytes]:
    """INVENTORY payloads for what did not fit into a greeting; the last one says so."""
    return [
        message(INVENTORY, vdis=[pack_state(state) for state in chunk], last=number == len(chunks) - 1)
        for number, chunk in enumerate(chunks)
    ]


def node_id_field(fields: Mapping[str, Any], key: str) -> NodeId:
    """A packed node id.

    :raises ProtocolError: something else is there.
    """
    data = octets(fields, key)
    if len(data) != 40:
        raise ProtocolError(f"field {key!r} is not a node id")
    return NodeId.unpack(data)
