"""A sheep as its peers know it: identity and record.

A node is identified by its 16-byte address and port alone; the second NIC is carried along but never compared. An IPv4
address fills the last four bytes of the address field. Layouts: docs, wire protocol, section 9.6.

Whether vnodes belong to nodes or to their disks is decided for a whole cluster (``VnodeMode``), and with it the length
of a record wherever several stand in a row: on the wire to clients, and in epoch files.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from struct import Struct
from typing import NamedTuple

from sheepdog.errors import ConfigError, ProtocolError
from sheepdog.model.limits import NODE_DISKS_MAX, NODES_MAX, NODES_WITH_DISKS_MAX

NODE_ID_BYTES = 40
NODE_BYTES = 80
NODE_DISK_BYTES = 16
VNODES_DEFAULT = 128
VNODES_MAX = 0xFFFF
DISK_VNODE_BYTES = 4 << 30  # of disk space for one vnode, where vnodes belong to disks

_NODE_ID = Struct("<16sH16sH4x")
_NODE = Struct("<24x16sH16sH4xHxxIQ")
_DISK = Struct("<QQ")
assert _NODE_ID.size == NODE_ID_BYTES
assert _NODE.size == NODE_BYTES
assert _DISK.size == NODE_DISK_BYTES
_ZERO_ADDRESS = bytes(16)


def parse_address(host: str) -> bytes:
    """The 16 address bytes of an IP address literal (``127.0.0.1``, ``2001:db8::1``, ``[::1]``).

    An IPv4-mapped IPv6 address becomes the IPv4 one, so that one host has one identity.

    :raises ConfigError: not an address; host names must be resolved before.
    """
    try:
        address = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        raise ConfigError(f"not an IP address: {host!r}; give a literal such as 127.0.0.1 or ::1") from None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.packed.rjust(16, b"\0")


def format_address(address: bytes) -> str:
    """The text of 16 address bytes.

    Twelve zero bytes followed by a non-zero one mean IPv4, as in the original; so ``::1`` stays IPv6.
    """
    if address[12] and not any(address[:12]):
        return ".".join(map(str, address[12:]))
    return str(ipaddress.IPv6Address(address))


def default_zone(address: bytes) -> int:
    """The zone of a sheep started without ``-z``: the last four address bytes as a little-endian integer."""
    return int.from_bytes(address[12:16], "little")


@dataclass(frozen=True, slots=True, order=True)
class NodeId:
    """Who a node is. Equality, hash and order look at (address, port) only.

    :param address: 16 bytes.
    :param port: 0..65535.
    :param io_address: address of the second NIC, zeros without one.
    :param io_port: 0 means there is no second NIC.
    """

    address: bytes
    port: int
    io_address: bytes = field(default=_ZERO_ADDRESS, compare=False)
    io_port: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if len(self.address) != 16 or len(self.io_address) != 16:
            raise ConfigError(f"a node address has 16 bytes, not {len(self.address)} and {len(self.io_address)}")
        if not 0 <= self.port <= 0xFFFF or not 0 <= self.io_port <= 0xFFFF:
            raise ConfigError(f"a port is 0 to 65535, not {self.port} and {self.io_port}")

    @classmethod
    def of(cls, host: str, port: int, io_host: str | None = None, io_port: int = 0) -> NodeId:
        """The identity of the sheep at an IP address literal.

        :raises ConfigError: not an address, or the port is out of range.
        """
        io_address = _ZERO_ADDRESS if io_host is None else parse_address(io_host)
        return cls(parse_address(host), port, io_address, io_port)

    @property
    def host(self) -> str:
        """The address as text, without brackets."""
        return format_address(self.address)

    @property
    def io_host(self) -> str | None:
        """The second NIC's address as text; ``None`` without one."""
        return format_address(self.io_address) if self.io_port else None

    @property
    def text(self) -> str:
        """``host:port``, an IPv6 host in brackets."""
        host = self.host
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def __str__(self) -> str:
        return self.text

    def pack(self) -> bytes:
        """40 bytes."""
        return _NODE_ID.pack(self.address, self.port, self.io_address, self.io_port)

    @classmethod
    def unpack(cls, buffer: bytes | bytearray | memoryview, offset: int = 0) -> NodeId:
        """The identity at ``offset``.

        :raises ProtocolError: fewer than 40 bytes are there.
        """
        if offset < 0 or len(buffer) - offset < NODE_ID_BYTES:
            raise ProtocolError(f"a node id has 40 bytes, {len(buffer) - offset} are left")
        return cls(*_NODE_ID.unpack_from(buffer, offset))


class VnodeMode(Enum):
    """What the vnodes of a cluster belong to. All of its sheep are started for the same one."""

    NODE = "node"
    DISK = "disk"

    @property
    def record_bytes(self) -> int:
        """Length of each node record in an array."""
        return NODE_BYTES if self is VnodeMode.NODE else NODE_BYTES + NODE_DISKS_MAX * NODE_DISK_BYTES

    @property
    def nodes_max(self) -> int:
        """The most members that a cluster can have."""
        return NODES_MAX if self is VnodeMode.NODE else NODES_WITH_DISKS_MAX


class NodeDisk(NamedTuple):
    """A disk as its node announces it, where vnodes belong to disks."""

    id: int  # u64, sd_hash of the path; never 0
    space: int  # bytes, as recorded when the disk was first used

    @property
    def vnodes(self) -> int:
        """Its share of the ring. At most 65535, so that a nonsensical size does not fill the memory of every sheep."""
        return min(-(-self.space // DISK_VNODE_BYTES), VNODES_MAX)


@dataclass(frozen=True, slots=True)
class Node:
    """A member's record.

    :param vnodes: share of the ring; 0 marks a gateway, which stores nothing. At most 65535.
    :param zone: u32; no two copies of an object are in one zone.
    :param space: bytes of storage.
    :param disks: what the vnodes belong to, at most 32; always empty where they belong to nodes.
    """

    id: NodeId
    vnodes: int = VNODES_DEFAULT
    zone: int = 0
    space: int = 0
    disks: tuple[NodeDisk, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.vnodes <= VNODES_MAX:
            raise ConfigError(f"a node has 0 to 65535 vnodes, not {self.vnodes}")
        if not 0 <= self.zone <= 0xFFFFFFFF:
            raise ConfigError(f"a zone is 0 to 4294967295, not {self.zone}")
        if not 0 <= self.space < 1 << 64:
            raise ConfigError(f"space is 0 to 2^64-1 bytes, not {self.space}")
        if len(self.disks) > NODE_DISKS_MAX:
            raise ConfigError(f"a node announces at most {NODE_DISKS_MAX} disks, not {len(self.disks)}")

    @property
    def gateway(self) -> bool:
        """It stores nothing."""
        return self.vnodes == 0

    @property
    def shares(self) -> frozenset[tuple[int, int]]:
        """(disk id, vnodes) of each disk: all that the ring knows of the disks."""
        return frozenset((disk.id, disk.vnodes) for disk in self.disks)

    def pack(self) -> bytes:
        """80 bytes, the first 24 zero, and 16 more for each disk: the record on its own."""
        node_id = self.id
        record = _NODE.pack(
            node_id.address, node_id.port, node_id.io_address, node_id.io_port, self.vnodes, self.zone, self.space
        )
        return record + b"".join(_DISK.pack(*disk) for disk in self.disks) if self.disks else record

    @classmethod
    def unpack(cls, buffer: bytes | bytearray | memoryview, offset: int = 0) -> Node:
        """The record that goes from ``offset`` to the end, either on its own or out of an array.

        :raises ProtocolError: there are fewer than 80 bytes, or no whole disks behind them, or more than 32.
        """
        if offset < 0 or len(buffer) - offset < NODE_BYTES:
            raise ProtocolError(f"a node record has 80 bytes, {len(buffer) - offset} are left")
        address, port, io_address, io_port, vnodes, zone, space = _NODE.unpack_from(buffer, offset)
        disks: tuple[NodeDisk, ...] = ()
        if len(buffer) - offset > NODE_BYTES:
            rest = memoryview(buffer)[offset + NODE_BYTES :]
            if len(rest) % NODE_DISK_BYTES or len(rest) > NODE_DISKS_MAX * NODE_DISK_BYTES:
                raise ProtocolError(f"{len(rest)} bytes of disks in a node record")
            disks = tuple(NodeDisk(disk, size) for disk, size in _DISK.iter_unpack(rest) if disk)
        return cls(NodeId(address, port, io_address, io_port), vnodes, zone, space, disks)


def pack_nodes(nodes: Iterable[Node], mode: VnodeMode = VnodeMode.NODE) -> bytes:
    """The records one after the other, all of one length."""
    if mode is VnodeMode.NODE:
        return b"".join(node.pack() for node in nodes)
    return b"".join(node.pack().ljust(mode.record_bytes, b"\0") for node in nodes)


def unpack_nodes(buffer: bytes | bytearray | memoryview, mode: VnodeMode = VnodeMode.NODE) -> tuple[Node, ...]:
    """All records of an array.

    :raises ProtocolError: the length is no multiple of a record's.
    """
    length = mode.record_bytes
    if len(buffer) % length:
        raise ProtocolError(f"a node list of {len(buffer)} bytes is no multiple of {length}")
    view = memoryview(buffer)
    return tuple(Node.unpack(view[at : at + length]) for at in range(0, len(buffer), length))


def mode_of_records(records: bytes | bytearray | memoryview) -> VnodeMode:
    """What an array of records was written for, where nothing else says it.

    In the shorter layout each record begins with 24 zero bytes, and none has port 0.
    """
    short = VnodeMode.NODE.record_bytes
    if len(records) % short == 0:
        heads = [bytes(records[at : at + short]) for at in range(0, len(records), short)]
        if not any(any(head[:24]) or not any(head[40:42]) for head in heads):
            return VnodeMode.NODE
    return VnodeMode.DISK if len(records) % VnodeMode.DISK.record_bytes == 0 else VnodeMode.NODE
