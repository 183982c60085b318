"""Consistent hashing: which nodes, and which disks of a node, hold an object.

Every node owns ``vnodes`` positions on a circle of 64-bit numbers. The first holder of an object is the owner of the
first position at or after the hash of its oid; the further holders are found by walking on clockwise, skipping every
position whose zone is taken already. So a node that comes or goes moves only the objects of the arcs it takes or
leaves. Algorithm and vectors: docs, placement and recovery, sections 2, 3 and 5.

Where vnodes belong to disks, each disk of a node has positions of its own, in proportion to its size. The ring inside
the node has the same positions, so an object lies on the disk that its node was chosen by, and a disk that comes or
goes moves only what lies in its arcs, to or from other nodes for the most part.

A ring never changes; a new epoch makes a new one. What is asked is remembered: holders depend only on the position
where the walk starts, so walks are kept per position, and the answer per oid on top of that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from struct import Struct
from typing import TypeVar

from sheepdog.model.hashing import fnv1a, hash_chain, hash_oid, sd_hash
from sheepdog.model.node import VNODES_DEFAULT, VNODES_MAX, Node, NodeDisk, NodeId

ZONES_MAX = 31  # zones beyond are not counted, because no object has more holders
CACHE_OIDS_MAX = 1 << 17  # holders remembered per ring and number of copies, about 20 MiB when full
DISK_POSITION_BYTES = 16 << 20  # of disk space for one position on the ring of disks

_FLOAT = Struct("<f")
_U64 = 1 << 64
T = TypeVar("T")


def _identity(node: NodeId) -> bytes:
    """What the positions of a node are made of."""
    return node.address + node.port.to_bytes(2, "little")


@lru_cache(maxsize=8192)
def _node_positions(identity: bytes, count: int) -> tuple[int, ...]:
    """Positions of one node. Kept between rings: most nodes are the same in the next epoch."""
    return hash_chain(sd_hash(identity), count)


@lru_cache(maxsize=8192)
def _disk_positions(identity: bytes, disk: int, count: int) -> tuple[int, ...]:
    """Positions of one disk of a node, where vnodes belong to disks. Kept like those of nodes."""
    return hash_chain(fnv1a(disk.to_bytes(8, "little"), sd_hash(identity)), count)


def _positions(node: Node) -> tuple[int, ...]:
    identity = _identity(node.id)
    if not node.disks:
        return _node_positions(identity, node.vnodes)
    return tuple(chain.from_iterable(_disk_positions(identity, disk.id, disk.vnodes) for disk in node.disks))


def _owners(places: Sequence[tuple[Sequence[int], T]]) -> dict[int, T]:
    """Who owns each position.

    The original aborts on two vnodes at one position; stepping aside is the same on every node, because all build the
    ring in the same order. Rings of large disks have a million positions, and hardly ever two in one place.
    """
    owners: dict[int, T] = {}
    for positions, owner in places:
        owners.update(dict.fromkeys(positions, owner))
    if len(owners) == sum(len(positions) for positions, _ in places):
        return owners
    owners = {}
    for positions, owner in places:
        for place in positions:
            position = place
            while position in owners:
                position = (position + 1) % _U64
            owners[position] = owner
    return owners


def _disk_key(path: str) -> bytes:
    """What the positions of a disk are made of: its path as given, without trailing slashes."""
    return (path.rstrip("/") or "/").encode("utf-8", "surrogateescape")


def node_disk(path: str, space: int) -> NodeDisk:
    """How a node announces one of its disks, where vnodes belong to disks.

    :param path: as the operator gave it.
    :param space: its recorded size in bytes.
    """
    return NodeDisk(sd_hash(_disk_key(path)), space)


class Ring:
    """The placement of one epoch. Immutable."""

    __slots__ = ("_caches", "_owners", "_walks", "nodes", "positions", "storage", "with_disks", "zones")

    nodes: tuple[Node, ...]
    """All members in order of (address, port), gateways included."""
    storage: tuple[Node, ...]
    """The members that store objects."""
    with_disks: tuple[Node, ...]
    """Those, and members that may have stored some before: a disk that is small beside the mean rounds to no vnodes."""
    zones: int
    """Distinct zones among ``storage``, at most 31: the most holders an object can have."""
    positions: tuple[int, ...]
    """All vnode positions, ascending."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = tuple(sorted(nodes, key=lambda node: node.id))
        self.storage = tuple(node for node in self.nodes if node.vnodes > 0)
        self.with_disks = tuple(node for node in self.nodes if node.vnodes > 0 or node.space > 0)
        self.zones = min(len({node.zone for node in self.storage}), ZONES_MAX)
        owners = _owners([(_positions(node), node) for node in self.storage])
        self.positions = tuple(sorted(owners))
        self._owners = tuple(map(owners.__getitem__, self.positions))
        self._caches: dict[int, dict[int, tuple[Node, ...]]] = {}
        self._walks: dict[tuple[int, int], tuple[Node, ...]] = {}

    def holders(self, oid: int, copies: int) -> tuple[Node, ...]:
        """The nodes that hold ``oid``, the first (the primary) first.

        min(copies, zones) nodes, each in another zone; empty when no node stores anything.
        """
        cache = self._caches.get(copies)
        if cache is None:
            cache = self._caches[copies] = {}
        found = cache.get(oid)
        if found is None:
            if len(cache) >= CACHE_OIDS_MAX:
                cache.clear()
            found = cache[oid] = self._walk(hash_oid(oid), copies)
        return found

    def walk(self, position: int, copies: int) -> tuple[tuple[Node, int], ...]:
        """As ``holders``, from any position, with the vnode position that each holder was met at."""
        positions, owners = self.positions, self._owners
        wanted = min(copies, self.zones)
        count = len(positions)
        start = bisect_left(positions, position)
        taken: set[int] = set()
        found: list[tuple[Node, int]] = []
        for step in range(count):
            if len(found) >= wanted:
                break
            at = (start + step) % count
            node = owners[at]
            if node.zone not in taken:
                taken.add(node.zone)
                found.append((node, positions[at]))
        return tuple(found)

    def _walk(self, position: int, copies: int) -> tuple[Node, ...]:
        start = bisect_left(self.positions, position)
        walk = self._walks.get((start, copies))
        if walk is None:
            walk = self._walks[start, copies] = tuple(node for node, _ in self.walk(position, copies))
        return walk

    def __repr__(self) -> str:
        return f"Ring({len(self.storage)} of {len(self.nodes)} nodes store, zones={self.zones})"


def _single(number: float) -> float:
    """The nearest single-precision number, as the original calculates."""
    return float(_FLOAT.unpack(_FLOAT.pack(number))[0])


def auto_vnodes(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """The same nodes with vnodes in proportion to their space, 128 for the mean of those that have any.

    Order is kept. A node without space becomes a gateway; if none has space the numbers stay as announced. Rounded to
    the nearest integer, ties to even, in single precision, so that all implementations agree.
    """
    members = tuple(nodes)
    spaces = [node.space for node in members if node.space > 0]
    if not spaces:
        return members
    mean = _single(sum(spaces) // len(spaces))
    return tuple(
        replace(node, vnodes=min(round(VNODES_DEFAULT * _single(_single(node.space) / mean)), 0xFFFF))
        for node in members
    )


def disk_vnodes(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """The same nodes with the numbers of vnodes that their disks have together. Order is kept."""
    return tuple(replace(node, vnodes=min(sum(disk.vnodes for disk in node.disks), VNODES_MAX)) for node in nodes)


class DiskRing:
    """Which of a node's disks holds an object. Immutable.

    :param disks: (path as the operator gave it, recorded size in bytes) pairs. Trailing slashes do not count.
    :param node: whose disks they are, where vnodes belong to disks: the positions are then those of its vnodes.
    """

    __slots__ = ("_owners", "positions")

    positions: tuple[int, ...]

    def __init__(self, disks: Iterable[tuple[str, int]], node: NodeId | None = None) -> None:
        places: list[tuple[Sequence[int], str]] = []
        for path, weight_bytes in sorted(disks):
            if node is None:
                positions = hash_chain(sd_hash(_disk_key(path)), -(-weight_bytes // DISK_POSITION_BYTES))
            else:
                disk = node_disk(path, weight_bytes)
                positions = _disk_positions(_identity(node), disk.id, disk.vnodes)
            places.append((positions, path))
        owners = _owners(places)
        self.positions = tuple(sorted(owners))
        self._owners = tuple(map(owners.__getitem__, self.positions))

    def disk_of(self, oid: int) -> str:
        """The path of the disk where ``oid`` belongs, as it was given.

        :raises LookupError: no disk has any space.
        """
        if not self.positions:
            raise LookupError("no disk with space to place an object on")
        return self._owners[bisect_left(self.positions, hash_oid(oid)) % len(self.positions)]
