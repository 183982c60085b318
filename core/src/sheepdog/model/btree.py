"""The index of a hypervolume: a B-tree of at most two levels whose root lies in the inode's map area.

Every node is a 4 MiB area: an 8-byte head, then entries in ascending order of index. A leaf entry says which vid owns a
data object; an inner entry, only in a root of depth 2, names a leaf object and the highest index in it. Leaves are
objects of their own, numbered by the inode's ``btree_counter``. Docs: data model, section 5.

Nothing here does I/O. ``lookup`` and ``insert`` are generators that yield the oid of a leaf that they must see and are
sent its content; ``run`` drives one with a plain function. ``insert`` returns what is to be written, in this order:
leaf objects, then the root, then the counter. So a crash in between leaves the old tree intact, at the price of leaf
objects that nobody names.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from struct import Struct
from typing import TypeVar

from sheepdog.errors import InvalidParameters, ProtocolError
from sheepdog.model.ids import Oid, btree_oid

Buffer = bytes | bytearray | memoryview
T = TypeVar("T")

NODE_BYTES = 4 << 20
MAGIC = 0x6274
LEAF_DEPTH = 1
INNER_DEPTH = 2

_HEAD = Struct("<HHI")
_LEAF = Struct("<II")
_INNER = Struct("<I4xQ")
LEAF_ENTRIES_MAX = (NODE_BYTES - _HEAD.size) // _LEAF.size
INNER_ENTRIES_MAX = (NODE_BYTES - _HEAD.size) // _INNER.size


@dataclass(frozen=True, slots=True)
class BtreeNode:
    """A root or a leaf: the packed entries, exactly as they are stored."""

    depth: int = LEAF_DEPTH
    entries: bytes = b""

    @property
    def _entry(self) -> Struct:
        return _LEAF if self.depth == LEAF_DEPTH else _INNER

    def __len__(self) -> int:
        """How many entries there are."""
        return len(self.entries) // self._entry.size

    def pack(self) -> bytes:
        """The head and the entries; the rest of the 4 MiB does not matter."""
        return _HEAD.pack(MAGIC, self.depth, len(self)) + self.entries

    @classmethod
    def unpack(cls, buffer: Buffer) -> BtreeNode:
        """A node from its area, or from as much of it as its entries take.

        :raises ProtocolError: no B-tree node, or shorter than the entries that it announces.
        """
        if len(buffer) < _HEAD.size:
            raise ProtocolError(f"a B-tree node has at least {_HEAD.size} bytes, not {len(buffer)}")
        magic, depth, count = _HEAD.unpack_from(buffer)
        if magic != MAGIC or depth not in (LEAF_DEPTH, INNER_DEPTH):
            raise ProtocolError(f"no B-tree node: magic 0x{magic:04x}, depth {depth}")
        if depth == INNER_DEPTH and count == 0:
            raise ProtocolError("an inner B-tree node without entries")
        node = cls(depth)
        end = _HEAD.size + count * node._entry.size
        if end > min(len(buffer), NODE_BYTES):
            raise ProtocolError(f"a B-tree node of {len(buffer)} bytes announces {count} entries")
        return cls(depth, bytes(buffer[_HEAD.size : end]))

    @classmethod
    def unpack_leaf(cls, buffer: Buffer) -> BtreeNode:
        """As ``unpack``, for a leaf object; the depth that its head states does not matter.

        :raises ProtocolError: as ``unpack``.
        """
        if len(buffer) < _HEAD.size:
            raise ProtocolError(f"a B-tree node has at least {_HEAD.size} bytes, not {len(buffer)}")
        magic, _, count = _HEAD.unpack_from(buffer)
        end = _HEAD.size + count * _LEAF.size
        if magic != MAGIC or end > min(len(buffer), NODE_BYTES):
            raise ProtocolError(f"no B-tree leaf: magic 0x{magic:04x}, {count} entries in {len(buffer)} bytes")
        return cls(LEAF_DEPTH, bytes(buffer[_HEAD.size : end]))

    def index_at(self, slot: int) -> int:
        """The index of entry ``slot``."""
        return int.from_bytes(self.entries[slot * self._entry.size :][:4], "little")

    def value_at(self, slot: int) -> int:
        """The vid, or the leaf's oid, of entry ``slot``."""
        value: int = self._entry.unpack_from(self.entries, slot * self._entry.size)[1]
        return value

    def find(self, index: int) -> int:
        """The first slot whose index is ``index`` or higher; ``len(self)`` when there is none."""
        size = self._entry.size
        words = memoryview(self.entries).cast("I")
        stride = size // 4
        return bisect_left(range(len(self)), index, key=lambda slot: words[slot * stride])

    def items(self) -> Iterator[tuple[int, int]]:
        """(index, vid or oid) of every entry, ascending."""
        return (entry for entry in self._entry.iter_unpack(self.entries))

    def put(self, slot: int, index: int, value: int, *, replace: bool) -> BtreeNode:
        """The node with an entry written over ``slot``, or put in before it."""
        size = self._entry.size
        at = slot * size
        rest = at + size if replace else at
        return BtreeNode(self.depth, self.entries[:at] + self._entry.pack(index, value) + self.entries[rest:])

    def split(self) -> tuple[BtreeNode, BtreeNode]:
        """The first floor(n/2) entries and the others."""
        at = len(self) // 2 * self._entry.size
        return BtreeNode(self.depth, self.entries[:at]), BtreeNode(self.depth, self.entries[at:])


def entry_offset(slot: int) -> int:
    """Where in a leaf the vid of entry ``slot`` is stored."""
    return _HEAD.size + slot * _LEAF.size + 4


@dataclass(frozen=True, slots=True)
class BtreeChange:
    """What an insertion leads to.

    Write ``leaves`` first, then ``root`` and ``counter`` where they differ from before.
    """

    root: BtreeNode
    counter: int
    leaves: dict[Oid, BtreeNode] = field(default_factory=dict)


def lookup(root: BtreeNode, index: int) -> Generator[Oid, BtreeNode, int]:
    """The vid that owns data object ``index``, 0 when it is not allocated.

    Yields the oid of the leaf it needs, at most once.
    """
    slot = root.find(index)
    if slot == len(root):
        return 0
    node = root
    if root.depth == INNER_DEPTH:
        node = yield Oid(root.value_at(slot))
        slot = node.find(index)
        if slot == len(node):
            return 0
    return node.value_at(slot) if node.index_at(slot) == index else 0


def insert(
    root: BtreeNode,
    index: int,
    owner: int,
    *,
    vid: int,
    counter: int,
    leaf_entries_max: int = LEAF_ENTRIES_MAX,
    inner_entries_max: int = INNER_ENTRIES_MAX,
) -> Generator[Oid, BtreeNode, BtreeChange]:
    """What must be written so that ``lookup(index)`` gives ``owner``. Yields the leaf it needs, at most once.

    An owner of 0 clears an entry but keeps its place; clearing what was never allocated changes nothing.

    :param index: 0 <= index < 2^32.
    :param vid: of the VDI; new leaves are numbered in its name.
    :param counter: the inode's ``btree_counter``.
    :param leaf_entries_max: at least 2; smaller than real ones in tests.
    :raises InvalidParameters: the index is out of range, or the root has no room for another leaf.
    """
    if not 0 <= index < 1 << 32:
        raise InvalidParameters(f"data object {index} of a hypervolume")
    if root.depth == LEAF_DEPTH:
        return _insert_at_depth_1(root, index, owner, vid, counter, leaf_entries_max)

    slot = root.find(index)
    beyond = slot == len(root)  # higher than everything so far
    if beyond:
        slot -= 1
    leaf_oid = Oid(root.value_at(slot))
    leaf = yield leaf_oid
    at = leaf.find(index)
    known = at < len(leaf) and leaf.index_at(at) == index
    if known or (len(leaf) < leaf_entries_max and owner):
        changed = leaf.put(at, index, owner, replace=known)
        if beyond:
            root = root.put(slot, index, leaf_oid, replace=True)
        return BtreeChange(root, counter, {leaf_oid: changed})
    if not owner:
        return BtreeChange(root, counter)
    if len(root) >= inner_entries_max:
        raise InvalidParameters(f"the index of hypervolume {vid:x} is full")

    new_oid = btree_oid(vid, counter)
    if beyond:
        root = root.put(slot + 1, index, new_oid, replace=False)
        return BtreeChange(root, counter + 1, {new_oid: BtreeNode(LEAF_DEPTH, _LEAF.pack(index, owner))})
    lower, upper = leaf.split()
    # The index of the new inner entry is the last one that really is in the lower half.
    boundary = lower.index_at(len(lower) - 1)
    if index < boundary:
        lower = lower.put(lower.find(index), index, owner, replace=False)
    else:
        upper = upper.put(upper.find(index), index, owner, replace=False)
    root = root.put(slot, boundary, new_oid, replace=False)
    return BtreeChange(root, counter + 1, {new_oid: lower, leaf_oid: upper})


def _insert_at_depth_1(
    root: BtreeNode, index: int, owner: int, vid: int, counter: int, leaf_entries_max: int
) -> BtreeChange:
    """The root is the only leaf; when it is full it becomes inner, over its two halves."""
    slot = root.find(index)
    known = slot < len(root) and root.index_at(slot) == index
    if not known and not owner:
        return BtreeChange(root, counter)
    if known or len(root) < leaf_entries_max:
        return BtreeChange(root.put(slot, index, owner, replace=known), counter)
    lower, upper = root.split()
    if index < lower.index_at(len(lower) - 1):
        lower = lower.put(slot, index, owner, replace=False)
    else:
        upper = upper.put(slot - len(lower), index, owner, replace=False)
    lower_oid, upper_oid = btree_oid(vid, counter), btree_oid(vid, counter + 1)
    inner = BtreeNode(INNER_DEPTH)
    inner = inner.put(0, lower.index_at(len(lower) - 1), lower_oid, replace=False)
    inner = inner.put(1, upper.index_at(len(upper) - 1), upper_oid, replace=False)
    return BtreeChange(inner, counter + 2, {lower_oid: lower, upper_oid: upper})


def run(steps: Generator[Oid, BtreeNode, T], read_leaf: Callable[[Oid], Buffer]) -> T:
    """The result of ``lookup`` or ``insert``, with leaves read by a plain function."""
    try:
        oid = next(steps)
        while True:
            oid = steps.send(BtreeNode.unpack_leaf(read_leaf(oid)))
    except StopIteration as stop:
        result: T = stop.value
        return result
