"""Volumes over a blocking connection: look up, open, read, write with copy-on-write, create, snapshot, delete.

This is the client side of the protocol's sections 11.2 to 11.6, request for request as the original's tools send it:
the client splits by object, copies on write, and writes the map entry after each object that it created. It assumes to
be the only writer of a volume, as every block client does.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from sheepdog.client.admin import Call, expect, refused
from sheepdog.client.block_map import BlockMap, block_map
from sheepdog.client.connection import Buffer, Response
from sheepdog.errors import RequestError, TransportError
from sheepdog.model.ids import data_oid, format_oid, inode_oid
from sheepdog.model.inode import HEADER_BYTES, INODE_BYTES, NAME_BYTES, InodeHeader

OP_CREATE_AND_WRITE_OBJ = 0x01
OP_READ_OBJ = 0x02
OP_WRITE_OBJ = 0x03
OP_DISCARD_OBJ = 0x05
OP_NEW_VDI = 0x11
OP_GET_VDI_INFO = 0x14
OP_DEL_VDI = 0x17

FLAG_COW = 0x0002
FLAG_CACHE = 0x0004
FLAG_DIRECT = 0x0008

RESULT_SUCCESS = 0x00
RESULT_EIO = 0x03
RESULT_READONLY = 0x1A

RECLAIM_ENTRIES = 128  # map entries cleared by one request

_VDI = Struct("<QIBBBBII8x")


class ObjectReadError(RequestError):
    """An object could not be read; the message is the one that dog prints."""


class ObjectWriteError(RequestError):
    """An object could not be written; the message is the one that dog prints."""


class OpenError(RequestError):
    """A vdi could not be opened; the message is the one that dog prints."""


class FoundVdi(NamedTuple):
    """What a lookup by name or a creation says."""

    vid: int
    attr_id: int
    copies: int
    block_size_shift: int


def pack_vdi_variant(
    *,
    size: int = 0,
    base_vid: int = 0,
    copies: int = 0,
    policy: int = 0,
    store_policy: int = 0,
    shift: int = 0,
    snap_id: int = 0,
    lock_type: int = 0,
) -> bytes:
    """The vdi variant of a request header."""
    return _VDI.pack(size, base_vid, copies, policy, store_policy, shift, snap_id, lock_type)


def unpack_vdi_reply(response: Response) -> FoundVdi:
    """The vdi variant of a response header."""
    header = response.header
    return FoundVdi(response.u32(24), response.u32(28), header[32], header[33])


def name_and_tag(name: bytes, tag: bytes = b"") -> bytes:
    """512 bytes: both fields padded with NUL."""
    return name.ljust(NAME_BYTES, b"\0") + tag.ljust(NAME_BYTES, b"\0")


def find_vdi(call: Call, name: bytes, *, snap_id: int = 0, tag: bytes = b"") -> FoundVdi:
    """The working vdi of that name, or the snapshot.

    :raises RequestError: with NO_VDI, NO_TAG or the state of the cluster; the message is the result's text.
    """
    variant = pack_vdi_variant(snap_id=snap_id)
    return unpack_vdi_reply(expect(call(OP_GET_VDI_INFO, variant=variant, body=name_and_tag(name, tag))))


def open_vdi(
    call: Call, name: bytes, *, snap_id: int = 0, tag: bytes = b"", header_only: bool = False, direct: bool = True
) -> Inode:
    """The inode of that vdi or snapshot.

    :param header_only: without its map, as much as a change of the header needs.
    :raises OpenError: not found or not readable; the message names what was asked for.
    :raises TransportError: no sheep.
    """
    import os

    try:
        found = find_vdi(call, name, snap_id=snap_id, tag=tag)
        return Inode.read(call, found.vid, header_only=header_only, direct=direct)
    except RequestError as error:
        raise OpenError(
            f"Failed to open VDI {os.fsdecode(name)} (snapshot id: {snap_id} snapshot tag: {os.fsdecode(tag)}): "
            f"{error_text(error)}",
            result=error.result,
        ) from error


def error_text(error: RequestError) -> str:
    """The text of the error's result code."""
    from sheepdog.wire.results import describe

    return describe(error.result)


def create_vdi(
    call: Call,
    name: bytes,
    *,
    size: int,
    base_vid: int = 0,
    copies: int = 0,
    policy: int = 0,
    store_policy: int = 0,
    shift: int = 0,
    snap_id: int = 0,
) -> FoundVdi:
    """A new vdi exists.

    :param base_vid: the vdi or snapshot that it continues or clones; 0 for a fresh one.
    :param snap_id: not 0 to make ``base_vid``, the working vdi, a snapshot.
    :raises RequestError: refused; the message is the result's text.
    """
    variant = pack_vdi_variant(
        size=size,
        base_vid=base_vid,
        copies=copies,
        policy=policy,
        store_policy=store_policy,
        shift=shift,
        snap_id=snap_id,
    )
    return unpack_vdi_reply(expect(call(OP_NEW_VDI, variant=variant, body=name.ljust(NAME_BYTES, b"\0"))))


def delete_vdi(call: Call, name: bytes, *, snap_id: int = 0, tag: bytes = b"") -> None:
    """The vdi or snapshot is deleted. Its map must have been cleared before.

    :raises RequestError: refused; the message is the result's text.
    """
    variant = pack_vdi_variant(snap_id=snap_id)
    expect(call(OP_DEL_VDI, variant=variant, body=name_and_tag(name, tag)))


def read_object(call: Call, oid: int, length: int, *, offset: int = 0, direct: bool = True) -> bytearray:
    """``length`` bytes of an object; what lies behind its end reads as zeros.

    :raises ObjectReadError: refused.
    """
    response = call(OP_READ_OBJ, flags=FLAG_DIRECT if direct else 0, oid=oid, offset=offset, data_length=length)
    if response.result != RESULT_SUCCESS:
        raise ObjectReadError(f"Failed to read object {format_oid(oid)} {refused(response)}", result=response.result)
    if len(response.body) < length:
        response.body.extend(bytes(length - len(response.body)))
    return response.body


def write_object(
    call: Call,
    oid: int,
    data: Buffer,
    *,
    offset: int = 0,
    copies: int,
    policy: int = 0,
    create: bool = False,
    cow_oid: int = 0,
    flags: int = 0,
) -> None:
    """The bytes are on every current holder of the object.

    :param create: make the object; its other bytes are zero, or those of ``cow_oid``.
    :param flags: DIRECT or CACHE.
    :raises ObjectWriteError: refused.
    """
    response = call(
        OP_CREATE_AND_WRITE_OBJ if create else OP_WRITE_OBJ,
        flags=flags | (FLAG_COW if cow_oid else 0),
        oid=oid,
        cow_oid=cow_oid,
        copies=copies,
        copy_policy=policy,
        offset=offset,
        body=data,
    )
    if response.result != RESULT_SUCCESS:
        raise ObjectWriteError(f"Failed to write object {format_oid(oid)}: {refused(response)}", result=response.result)


class Inode:
    """An inode as read from the cluster. ``map`` is empty when only the header was read."""

    __slots__ = ("_map", "buffer", "call", "header")

    def __init__(self, call: Call, buffer: bytearray) -> None:
        self.call = call
        self.buffer = buffer
        self.header = InodeHeader.unpack(buffer)
        self._map: BlockMap | None = None

    @classmethod
    def read(cls, call: Call, vid: int, *, header_only: bool = False, direct: bool = True) -> Inode:
        """:raises ObjectReadError: refused."""
        length = HEADER_BYTES if header_only else INODE_BYTES
        return cls(call, read_object(call, inode_oid(vid), length, direct=direct))

    @property
    def vid(self) -> int:
        return self.header.vdi_id

    @property
    def oid(self) -> int:
        return inode_oid(self.header.vdi_id)

    @property
    def object_bytes(self) -> int:
        return 1 << self.header.block_size_shift

    @property
    def map(self) -> BlockMap:
        """Which vid owns which data object."""
        if self._map is None:
            self._map = block_map(self)
        return self._map

    def write(self, data: Buffer, *, offset: int = 0, flags: int = 0) -> None:
        """The bytes are in the stored inode, not in ``buffer``.

        :raises ObjectWriteError: refused.
        """
        header = self.header
        write_object(
            self.call, self.oid, data, offset=offset, copies=header.nr_copies, policy=header.copy_policy, flags=flags
        )

    def write_header(self, header: InodeHeader, *, flags: int = FLAG_DIRECT) -> None:
        """The header is stored; bytes of it that nobody knows stay as they were read.

        :raises ObjectWriteError: refused.
        """
        fields = header.pack()[:572]
        stored = fields + bytes(self.buffer[len(fields) : HEADER_BYTES])
        write_object(
            self.call, self.oid, stored, copies=self.header.nr_copies, policy=self.header.copy_policy, flags=flags
        )
        self.header = header


class Piece(NamedTuple):
    """A range of a volume inside one object."""

    object_index: int
    offset: int
    length: int


def split(offset: int, length: int, object_bytes: int) -> Iterator[Piece]:
    """The range by objects, ascending."""
    end = offset + length
    while offset < end:
        index, inside = divmod(offset, object_bytes)
        step = min(object_bytes - inside, end - offset)
        yield Piece(index, inside, step)
        offset += step


class Volume:
    """An open volume: reads and writes any range. One request at a time."""

    def __init__(self, inode: Inode, *, flags: int = 0) -> None:
        """:param flags: sent with every write (CACHE)."""
        self.inode = inode
        self.flags = flags

    @classmethod
    def open(cls, call: Call, name: bytes, *, snap_id: int = 0, tag: bytes = b"") -> Volume:
        """:raises OpenError: not found or not readable."""
        return cls(open_vdi(call, name, snap_id=snap_id, tag=tag))

    @property
    def size(self) -> int:
        return self.inode.header.vdi_size

    def read_piece(self, piece: Piece) -> bytes | bytearray:
        """The bytes of one object's range; holes read as zeros.

        :raises ObjectReadError: refused.
        """
        vid = self.inode.map.get(piece.object_index)
        if not vid:
            return bytes(piece.length)
        return read_object(
            self.inode.call, data_oid(vid, piece.object_index), piece.length, offset=piece.offset, direct=False
        )

    def read(self, offset: int, length: int) -> bytes:
        """:raises ObjectReadError: refused."""
        return b"".join(self.read_piece(piece) for piece in split(offset, length, self.inode.object_bytes))

    def write_piece(self, piece: Piece, data: Buffer) -> None:
        """The bytes are stored, and the map names the object.

        :raises ObjectWriteError: refused.
        """
        inode = self.inode
        header = inode.header
        owner = inode.map.get(piece.object_index)
        create = owner != header.vdi_id
        write_object(
            inode.call,
            data_oid(header.vdi_id, piece.object_index),
            data,
            offset=piece.offset,
            copies=header.nr_copies,
            policy=header.copy_policy,
            create=create,
            cow_oid=data_oid(owner, piece.object_index) if create and owner else 0,
            flags=self.flags,
        )
        if create:
            inode.map.store(piece.object_index, header.vdi_id, flags=self.flags)

    def write(self, offset: int, data: Buffer) -> None:
        """:raises ObjectWriteError: refused; earlier objects of the range are written."""
        view = memoryview(data)
        done = 0
        for piece in split(offset, len(view), self.inode.object_bytes):
            self.write_piece(piece, view[done : done + piece.length])
            done += piece.length

    def discard(self, offset: int, length: int) -> None:
        """Whole objects inside the range are freed and read as zeros; the rest is left alone.

        :raises ObjectWriteError: refused.
        """
        size = self.inode.object_bytes
        for piece in split(offset, length, size):
            last = piece.object_index == self.inode.header.objects - 1
            whole = piece.offset == 0 and (piece.length == size or (last and offset + length >= self.size))
            if whole and self.inode.map.get(piece.object_index):
                self.inode.map.store(piece.object_index, 0)


def clear_map(
    inode: Inode, *, batch: int = RECLAIM_ENTRIES, pause_s: float = 0, entries_max: int | None = None
) -> None:
    """All map entries are 0 (the first ``entries_max`` allocated ones), so the daemon drops the references.

    :param batch: allocated entries per request.
    :param pause_s: wait between two requests.
    :raises ObjectWriteError: refused; entries before it are cleared.
    """
    import time

    pending: list[int] = []
    first = True

    def flush() -> None:
        nonlocal first
        if not pending:
            return
        if pause_s and not first:
            time.sleep(pause_s)
        first = False
        inode.map.clear(pending[0], pending[-1])
        pending.clear()

    for count, (index, _) in enumerate(list(inode.map.items())):
        if entries_max is not None and count >= entries_max:
            break
        pending.append(index)
        if len(pending) >= batch:
            flush()
    flush()


def set_tag(inode: Inode, tag: bytes) -> None:
    """The stored inode has that tag.

    :raises ObjectWriteError: refused.
    """
    inode.write(tag.ljust(NAME_BYTES, b"\0"), offset=NAME_BYTES)


__all__ = [
    "Inode",
    "ObjectReadError",
    "ObjectWriteError",
    "OpenError",
    "Piece",
    "TransportError",
    "Volume",
    "clear_map",
    "create_vdi",
    "delete_vdi",
    "find_vdi",
    "open_vdi",
    "read_object",
    "split",
    "write_object",
]
