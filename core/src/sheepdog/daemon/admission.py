"""Who may join, and how the replicated state reaches a joiner.

The oldest admitted member judges every joiner, in the order of joining, before anything changes. An accepted joiner
copies the state as it stood when its acceptance was delivered; every admitted member keeps such a frozen copy until
the joiner has one, so it does not matter which of them dies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import cbor2

from sheepdog.daemon import messages
from sheepdog.daemon.messages import Fields, Greeting
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.vdi_table import VdiTable
from sheepdog.errors import ProtocolError
from sheepdog.model.clusterinfo import ClusterFlag, ClusterStatus
from sheepdog.model.node import Node, VnodeMode
from sheepdog.model.vdi_state import VdiState
from sheepdog.wire.opcodes import SHEEP_PROTO_VER


@dataclass(slots=True)
class Member:
    """One node of the driver's view. Only admitted ones count for epochs, rings and sections."""

    node: Node
    greeting: Greeting
    admitted: bool = False
    refused: bool = False
    complete: bool = False  # all of its inventory has been delivered
    inventory: list[VdiState] = field(default_factory=list)

    @property
    def pending(self) -> bool:
        """Somebody must still judge it."""
        return not self.admitted and not self.refused


def strategy(auto: bool) -> str:
    """How log lines call the two ways to number vnodes."""
    return "auto" if auto else "fixed"


def refusal(state: SheepState, members: Mapping[Any, Member], joiner: Member) -> str | None:
    """Why ``joiner`` must not become a member (the words for its log), or ``None`` when it may.

    :param members: all members, by node id; the admitted ones are the cluster.
    """
    greeting = joiner.greeting
    if greeting.proto != SHEEP_PROTO_VER:
        return f"invalid protocol version: {SHEEP_PROTO_VER}, {greeting.proto}"
    if state.ctime and greeting.ctime and state.ctime != greeting.ctime:
        return f"joining node ctime doesn't match: {greeting.ctime} vs {state.ctime}"
    if greeting.vnode_mode is not state.mode:
        how = "with" if state.mode is VnodeMode.DISK else "without"
        return (
            f"failed to join for vnode mode unmatch.  cluster:{state.mode.value}, joined:{greeting.vnode_mode.value}; "
            f"every sheep of this cluster is started {how} --disk-vnodes"
        )
    if sum(member.admitted for member in members.values()) >= state.mode.nodes_max:
        return f"failed to join, the cluster has {state.mode.nodes_max} members, which is the most"
    if greeting.gateway or not (state.ctime or greeting.ctime):
        return None
    if state.ctime:
        auto = bool(state.flags & ClusterFlag.AUTO_VNODES)
    else:
        # Not formatted yet, and the joiner brings a cluster: those who store already decide.
        storing = [member for member in members.values() if member.admitted and not member.greeting.gateway]
        auto = storing[0].greeting.auto_vnodes if storing else greeting.auto_vnodes
    if greeting.auto_vnodes != auto:
        return (
            "failed to join for vnodes strategy unmatch.  "
            f"cluster:{strategy(auto)}, joined:{strategy(greeting.auto_vnodes)}"
        )
    return None


@dataclass(frozen=True, slots=True)
class Transfer:
    """The replicated state as one member had it right after a joiner was accepted."""

    position: int  # number of the event that accepted the joiner
    status: ClusterStatus
    ctime: int
    epoch: int
    flags: ClusterFlag
    copies: int
    copy_policy: int
    block_size_shift: int
    store: str
    recovery_disabled: bool
    epoch_nodes: tuple[Node, ...]  # members of ``epoch`` as logged
    epoch_time: int
    before_nodes: tuple[Node, ...]  # members of the newest epoch before the joiner was accepted
    lifted: bool  # its acceptance began ``epoch``
    members: tuple[Member, ...]
    vdis: VdiTable
    claims: Any
    extras: Fields

    def pack(self) -> bytes:
        """CBOR, of any length."""
        states = self.vdis.states()
        known = {state.vid for state in states}
        return cbor2.dumps(
            {
                "v": messages.VERSION,
                "pos": self.position,
                "status": int(self.status),
                "ctime": self.ctime,
                "epoch": self.epoch,
                "flags": int(self.flags),
                "copies": self.copies,
                "policy": self.copy_policy,
                "shift": self.block_size_shift,
                "store": self.store,
                "norec": self.recovery_disabled,
                "nodes": messages.pack_records(self.epoch_nodes),
                "time": self.epoch_time,
                "before": messages.pack_records(self.before_nodes),
                "lifted": self.lifted,
                "members": [
                    {
                        "node": member.node.pack(),
                        "greeting": member.greeting.pack(),
                        "admitted": member.admitted,
                        "refused": member.refused,
                        "complete": member.complete,
                        # An admitted member's inventory is in the table already.
                        "vdis": [] if member.admitted else [messages.pack_state(state) for state in member.inventory],
                    }
                    for member in self.members
                ],
                "vdis": [messages.pack_state(state) for state in states],
                "used": [vid for vid in self.vdis.in_use if vid not in known],
                "deleted": [vid for vid in self.vdis.deleted if vid not in known],
                "free": [vid for vid in sorted(known) if vid not in self.vdis.in_use],
                "claims": self.claims,
                "extras": self.extras,
            }
        )

    @classmethod
    def unpack(cls, data: bytes) -> Transfer:
        """The state inside ``data``.

        :raises ProtocolError: it is malformed.
        """
        fields = messages.decode_map(data)
        integer, octets = messages.integer, messages.octets
        members = []
        for entry in _list(fields, "members"):
            if not isinstance(entry, dict):
                raise ProtocolError("a member is malformed")
            members.append(
                Member(
                    node=Node.unpack(octets(entry, "node")),
                    greeting=Greeting.unpack(octets(entry, "greeting")),
                    admitted=bool(integer(entry, "admitted")),
                    refused=bool(integer(entry, "refused")),
                    complete=bool(integer(entry, "complete")),
                    inventory=messages.unpack_states(entry.get("vdis", [])),
                )
            )
        table = VdiTable()
        free = set(_list(fields, "free"))
        for state in messages.unpack_states(fields.get("vdis")):
            table.put(state)
            if state.vid not in free:
                table.use(state.vid)
            if state.deleted:
                table.mark_deleted(state.vid)
        for vid in _list(fields, "used"):
            table.use(int(vid))
        for vid in _list(fields, "deleted"):
            table.mark_deleted(int(vid))
        extras = fields.get("extras", {})
        try:
            status = ClusterStatus(integer(fields, "status"))
        except ValueError as error:
            raise ProtocolError(str(error)) from None
        return cls(
            position=integer(fields, "pos"),
            status=status,
            ctime=integer(fields, "ctime"),
            epoch=integer(fields, "epoch"),
            flags=ClusterFlag(integer(fields, "flags")),
            copies=integer(fields, "copies"),
            copy_policy=integer(fields, "policy"),
            block_size_shift=integer(fields, "shift"),
            store=messages.text(fields, "store"),
            recovery_disabled=bool(integer(fields, "norec")),
            epoch_nodes=messages.unpack_records(fields, "nodes"),
            epoch_time=integer(fields, "time"),
            before_nodes=messages.unpack_records(fields, "before"),
            lifted=bool(integer(fields, "lifted")),
            members=tuple(members),
            vdis=table,
            claims=fields.get("claims", []),
            extras=extras if isinstance(extras, dict) else {},
        )


def _list(fields: Fields, key: str) -> list[Any]:
    value = fields.get(key, [])
    if not isinstance(value, list):
        raise ProtocolError(f"field {key!r} is not a list")
    return value
