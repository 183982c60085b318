"""Which vid owns each data object of an open volume: the map in memory, and how changes to it are stored.

``FlatMap`` is the array in the inode; ``TreeMap`` the B-tree of a hypervolume. Both give ``owners``, something that
is indexed with an object index and says the owner's vid, 0 for a hole; it is what every request looks at. ``store``
writes a set of changes to the inode and does *not* touch ``owners``: the volume does that when it decides that a
change counts.

A flat change is one write for each run of neighbouring indexes that all change. A write that spanned an entry which
stays as it is would take that entry's reference count away (wire protocol, section 9.1).
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

from sheepdog.contracts.services import Buffer
from sheepdog.daemon.fencing import Client
from sheepdog.daemon.volumes_io import ObjectIO, read_object
from sheepdog.errors import ProtocolError, SheepdogError
from sheepdog.model.btree import INNER_DEPTH, LEAF_DEPTH, BtreeNode, insert
from sheepdog.model.ids import Oid, inode_oid
from sheepdog.model.inode import BTREE_COUNTER_OFFSET, MAP_ENTRIES, MAP_OFFSET, InodeHeader, map_offset
from sheepdog.wire.results import Result

assert sys.byteorder == "little", "map entries are kept in the order of the wire"

MiB = 1024 * 1024
READ_BYTES = MiB  # of the map for each request when a volume is opened
_HEAD_BYTES = 8

Stored: TypeAlias = Callable[[Mapping[int, int]], None]
"""Told the result code of each index that was to change."""


class Sparse(dict[int, int]):
    """Owners by index; what is not in it is a hole."""

    def __missing__(self, index: int) -> int:
        return 0


class FlatMap:
    """The map of an ordinary volume: as many u32 entries as its size needs."""

    frees = True  # clearing an entry gives up the object that it named, on the server

    def __init__(self, io: ObjectIO, header: InodeHeader, entries: array[int]) -> None:
        self._io = io
        self._inode = inode_oid(header.vdi_id)
        self._copies = header.nr_copies
        self.owners: array[int] | Sparse = entries

    @classmethod
    async def load(cls, io: ObjectIO, header: InodeHeader) -> FlatMap:
        """The map as it is stored now."""
        count = min(header.objects, MAP_ENTRIES)
        entries = array("I")
        assert entries.itemsize == 4, "the platform's unsigned int has 32 bits"
        inode = inode_oid(header.vdi_id)
        for start in range(0, count * 4, READ_BYTES):
            entries.frombytes(await read_object(io, inode, MAP_OFFSET + start, min(READ_BYTES, count * 4 - start)))
        return cls(io, header, entries)

    def allocated(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """(index, owner) of what is not a hole, ``first`` <= index < ``last``, ascending."""
        owners = self.owners
        return ((index, owners[index]) for index in range(first, last) if owners[index])

    def store(self, changes: Mapping[int, int], done: Stored, client: Client | None = None) -> None:
        """The entries in the inode are the new ones. One call at a time."""
        results: dict[int, int] = {}
        runs = list(_runs(sorted(changes)))
        left = len(runs)

        def written(first: int, last: int, result: int, _: object) -> None:
            nonlocal left
            for index in range(first, last):
                results[index] = result
            left -= 1
            if not left:
                done(results)

        for first, last in runs:
            data = array("I", [changes[index] for index in range(first, last)]).tobytes()
            self._io.submit_write(
                self._inode, map_offset(first), data, partial(written, first, last), copies=self._copies, client=client
            )


def _runs(indexes: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring indexes as half-open ranges."""
    first = last = -1
    for index in indexes:
        if index == last:
            last += 1
            continue
        if first >= 0:
            yield first, last
        first, last = index, index + 1
    if first >= 0:
        yield first, last


class TreeMap:
    """The map of a hypervolume. The whole tree is kept: its nodes as they are stored, and its entries for look-up."""

    frees = False  # hypervolumes have no reference counts: whoever clears an entry removes the object

    def __init__(self, io: ObjectIO, header: InodeHeader, root: BtreeNode, leaves: dict[Oid, BtreeNode]) -> None:
        self._io = io
        self._vid = header.vdi_id
        self._inode = inode_oid(header.vdi_id)
        self._copies = header.nr_copies
        self._root = root
        self._leaves = leaves
        self._counter = header.btree_counter
        self._certain = True  # what is stored is what the nodes here say
        self.owners: array[int] | Sparse = Sparse()
        for node in (root,) if root.depth == LEAF_DEPTH else leaves.values():
            self.owners.update((index, owner) for index, owner in node.items() if owner)

    @classmethod
    async def load(cls, io: ObjectIO, header: InodeHeader) -> TreeMap:
        """The tree as it is stored now.

        :raises ProtocolError: no B-tree is there.
        """
        stored = await _read_node(io, inode_oid(header.vdi_id), MAP_OFFSET, root=True)
        blank = not any(stored)  # some creators leave the first head to the first write
        root = BtreeNode() if blank else BtreeNode.unpack(stored)
        leaves: dict[Oid, BtreeNode] = {}
        if root.depth == INNER_DEPTH:
            for _, oid in root.items():
                leaves[Oid(oid)] = BtreeNode.unpack_leaf(await _read_node(io, oid, 0, root=False))
        made = cls(io, header, root, leaves)
        made._certain = not blank
        return made

    def allocated(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """(index, owner) of what is not a hole, ``first`` <= index < ``last``, ascending."""
        owners = self.owners
        assert isinstance(owners, Sparse), "made by the constructor"
        if last - first < len(owners):
            return ((index, owners[index]) for index in range(first, last) if owners[index])
        return iter(sorted(item for item in owners.items() if first <= item[0] < last and item[1]))

    def store(self, changes: Mapping[int, int], done: Stored, client: Client | None = None) -> None:
        """The tree names the new owners: leaves first, then the root, then the counter. One call at a time."""
        root, counter = self._root, self._counter
        changed: dict[Oid, BtreeNode] = {}
        try:
            for index in sorted(changes):
                steps = insert(root, index, changes[index], vid=self._vid, counter=counter)
                try:
                    wanted = next(steps)
                    while True:
                        wanted = steps.send(changed.get(wanted) or self._leaves[wanted])
                except StopIteration as stop:
                    change = stop.value
                root, counter = change.root, change.counter
                changed.update(change.leaves)
        except SheepdogError as error:
            done(dict.fromkeys(changes, int(error.result)))
            return
        except KeyError:
            done(dict.fromkeys(changes, int(Result.EIO)))
            return
        writes = self._writes(root, changed, counter, {"copies": self._copies, "client": client})

        def step(result: int, _: object = None) -> None:
            write = next(writes, None) if not result else None
            if write is not None:
                write(done=step)
                return
            self._certain = not result
            if not result:
                self._root, self._counter = root, counter
                self._leaves.update(changed)
            done(dict.fromkeys(changes, result))

        step(0)

    def _writes(
        self,
        root: BtreeNode,
        changed: dict[Oid, BtreeNode],
        counter: int,
        options: Mapping[str, Any],  # Any: as submit_write takes them
    ) -> Iterator[Callable[..., None]]:  # each is told done=...
        for oid, node in changed.items():
            old = self._leaves.get(oid)
            if old is None:
                yield partial(self._io.submit_create, oid, 0, node.pack(), **options)
                continue
            for offset, data in self._pieces(old, node):
                yield partial(self._io.submit_write, oid, offset, data, **options)
        for offset, data in self._pieces(self._root, root):
            yield partial(self._io.submit_write, self._inode, MAP_OFFSET + offset, data, **options)
        if counter != self._counter or not self._certain:
            data = counter.to_bytes(4, "little")
            yield partial(self._io.submit_write, self._inode, BTREE_COUNTER_OFFSET, data, **options)

    def _pieces(self, old: BtreeNode, new: BtreeNode) -> Iterator[tuple[int, Buffer]]:
        """What turns a stored node into another. Entries that only follow the old ones come before the head that counts
        them, so a growing volume does not rewrite its index for each object."""
        if old == new and self._certain:
            return
        packed = new.pack()
        if self._certain and old.depth == new.depth and len(new) > len(old) and new.entries.startswith(old.entries):
            yield _HEAD_BYTES + len(old.entries), packed[_HEAD_BYTES + len(old.entries) :]
            yield 0, packed[:_HEAD_BYTES]
        else:
            yield 0, packed


async def _read_node(io: ObjectIO, oid: int, offset: int, *, root: bool) -> Buffer:
    head = bytes(await read_object(io, oid, offset, _HEAD_BYTES))
    depth, count = int.from_bytes(head[2:4], "little"), int.from_bytes(head[4:8], "little")
    length = count * (16 if root and depth == INNER_DEPTH else 8)
    if length > 4 * MiB - _HEAD_BYTES:
        raise ProtocolError(f"oid={oid:016x} is no B-tree node: {count} entries")
    return head + bytes(await read_object(io, oid, offset + _HEAD_BYTES, length)) if length else head


async def load_map(io: ObjectIO, header: InodeHeader) -> FlatMap | TreeMap:
    """The map of the volume that the header describes.

    :raises SheepdogError: the map cannot be read.
    """
    if header.is_hypervolume:
        return await TreeMap.load(io, header)
    return await FlatMap.load(io, header)
