"""The map of a volume: which vid owns which data object, in either of its two forms.

A flat map is an array inside the inode. A hypervolume's is a B-tree whose root lies where the array would; its leaves
are objects of their own (docs: data model, section 5).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sheepdog.model.inode import allocated, map_offset, map_view

if TYPE_CHECKING:
    from sheepdog.client.volume import Inode

FLAG_DIRECT = 0x0008


class BlockMap(ABC):
    """Reads come from memory where they can; changes are stored at once."""

    @abstractmethod
    def get(self, index: int) -> int:
        """The vid that owns data object ``index``, 0 for a hole."""

    @abstractmethod
    def store(self, index: int, vid: int, *, flags: int = FLAG_DIRECT) -> None:
        """The entry names ``vid``, in memory and in the cluster.

        :raises ObjectWriteError: refused.
        """

    @abstractmethod
    def items(self) -> Iterator[tuple[int, int]]:
        """(index, vid) of every allocated object, ascending."""

    def nodes(self) -> Iterator[int]:
        """The ids of the objects, beside the inode, that hold the map."""
        return iter(())

    @abstractmethod
    def clear(self, first: int, last: int, *, flags: int = FLAG_DIRECT) -> None:
        """All entries from ``first`` to ``last``, both included, are 0, in memory and in the cluster.

        :raises ObjectWriteError: refused.
        """


class FlatMap(BlockMap):
    """2^20 entries in the inode."""

    def __init__(self, inode: Inode) -> None:
        self._inode = inode
        self._entries = map_view(inode.buffer)

    def get(self, index: int) -> int:
        return self._entries[index] if index < len(self._entries) else 0

    def store(self, index: int, vid: int, *, flags: int = FLAG_DIRECT) -> None:
        self._inode.write(vid.to_bytes(4, "little"), offset=map_offset(index), flags=flags)
        self._entries[index] = vid

    def items(self) -> Iterator[tuple[int, int]]:
        return allocated(self._entries[: min(self._inode.header.objects, len(self._entries))])

    def clear(self, first: int, last: int, *, flags: int = FLAG_DIRECT) -> None:
        zeros = bytes(4 * (last - first + 1))
        self._inode.write(zeros, offset=map_offset(first), flags=flags)
        self._entries[first : last + 1] = memoryview(zeros).cast("I")


def block_map(inode: Inode) -> BlockMap:
    """The map of the inode, in the form that its header says."""
    if inode.header.is_hypervolume:
        from sheepdog.client.tree_map import TreeMap

        return TreeMap(inode)
    return FlatMap(inode)
