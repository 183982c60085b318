"""The map of a hypervolume: a B-tree whose root is in the inode and whose leaves are objects."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sheepdog.client.block_map import FLAG_DIRECT, BlockMap
from sheepdog.model.btree import INNER_DEPTH, NODE_BYTES, BtreeNode, insert, lookup, run
from sheepdog.model.inode import BTREE_COUNTER_OFFSET, HEADER_BYTES, MAP_OFFSET, REFS_OFFSET

if TYPE_CHECKING:
    from sheepdog.client.volume import Inode


class TreeMap(BlockMap):
    """Every change is stored leaves first, then the root, then the counter, so that a crash leaves the old tree."""

    def __init__(self, inode: Inode) -> None:
        """:raises ProtocolError: the map area holds no B-tree."""
        self._inode = inode
        self._root = BtreeNode.unpack(memoryview(inode.buffer)[MAP_OFFSET:REFS_OFFSET])
        self._counter = inode.header.btree_counter
        self._leaf: tuple[int, bytes | bytearray] | None = None  # the one seen last; accesses come in runs

    def get(self, index: int) -> int:
        return run(lookup(self._root, index), self._read_leaf)

    def items(self) -> Iterator[tuple[int, int]]:
        if self._root.depth != INNER_DEPTH:
            nodes: Iterator[BtreeNode] = iter((self._root,))
        else:
            nodes = (BtreeNode.unpack(self._read_leaf(oid)) for _, oid in self._root.items())
        return ((index, vid) for node in nodes for index, vid in node.items() if vid)

    def nodes(self) -> Iterator[int]:
        return iter([oid for _, oid in self._root.items()] if self._root.depth == INNER_DEPTH else ())

    def store(self, index: int, vid: int, *, flags: int = FLAG_DIRECT) -> None:
        from sheepdog.client.volume import write_object

        inode = self._inode
        header = inode.header
        known = set(self.nodes())
        change = run(insert(self._root, index, vid, vid=header.vdi_id, counter=self._counter), self._read_leaf)
        for oid, leaf in change.leaves.items():
            content = leaf.pack()
            write_object(inode.call, oid, content, copies=header.nr_copies, create=oid not in known, flags=flags)
            self._leaf = (oid, content)
        if change.root != self._root:
            inode.write(bytes(inode.buffer[:HEADER_BYTES]) + change.root.pack(), flags=flags)
            self._root = change.root
        counter = change.counter.to_bytes(4, "little")
        inode.write(counter, offset=BTREE_COUNTER_OFFSET, flags=flags)
        inode.buffer[BTREE_COUNTER_OFFSET : BTREE_COUNTER_OFFSET + 4] = counter
        self._counter = change.counter

    def clear(self, first: int, last: int, *, flags: int = FLAG_DIRECT) -> None:
        for index, _ in [entry for entry in self.items() if first <= entry[0] <= last]:
            self.store(index, 0, flags=flags)

    def _read_leaf(self, oid: int) -> bytes | bytearray:
        from sheepdog.client.volume import read_object

        if self._leaf is None or self._leaf[0] != oid:
            self._leaf = (oid, read_object(self._inode.call, oid, NODE_BYTES))
        return self._leaf[1]
