"""The directory of ``dog cluster snapshot``: content-addressed files and a log of snapshots.

A *content file* is named by the SHA-1 of what is in it. Objects are cut into slices of 128 KiB, each a content file;
the digests of an object's slices make a slice list, a content file too; a *trunk* names the slice list of every object
of one snapshot, and a record of the log ``user_snap`` names the trunk. Layouts: docs, on-disk layout, section 9.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct

from sheepdog.errors import ProtocolError
from sheepdog.model.inode import check_name, cut_name

Buffer = bytes | bytearray | memoryview

SLICE_BYTES = 128 << 10
DIGEST_BYTES = 20
MAGIC = 0xFEE1C001
VERSION = 1
LOG_NAME = "user_snap"
OBJECTS_NAME = "objects"

_HEADER = Struct("<IIBBB21x")
_RECORD = Struct("<i256s4xQ20s4x")
_TRUNK = Struct("<QBBBx20s")
LOG_HEADER_BYTES = _HEADER.size
LOG_RECORD_BYTES = _RECORD.size
TRUNK_ENTRY_BYTES = _TRUNK.size
assert (LOG_HEADER_BYTES, LOG_RECORD_BYTES, TRUNK_ENTRY_BYTES) == (32, 296, 32)


def digest_of(data: Buffer) -> bytes:
    """The SHA-1 that names a content file (20 bytes). An address, not a defence."""
    return hashlib.sha1(data, usedforsecurity=False).digest()


def content_path(digest: bytes) -> tuple[str, str]:
    """(directory, file) of a content file under ``objects``."""
    text = digest.hex()
    return text[:2], text[2:]


def slices(data: Buffer) -> Iterator[memoryview]:
    """The slices of an object, the last one maybe shorter."""
    view = memoryview(data)
    return (view[at : at + SLICE_BYTES] for at in range(0, len(view), SLICE_BYTES))


def pack_slice_list(digests: Iterator[bytes] | list[bytes]) -> bytes:
    """The content of a slice list."""
    return b"".join(digests)


def unpack_slice_list(buffer: Buffer) -> tuple[bytes, ...]:
    """The digests of an object's slices.

    :raises ProtocolError: no whole number of digests.
    """
    if len(buffer) % DIGEST_BYTES:
        raise ProtocolError(f"a slice list of {len(buffer)} bytes is no multiple of {DIGEST_BYTES}")
    return tuple(bytes(buffer[at : at + DIGEST_BYTES]) for at in range(0, len(buffer), DIGEST_BYTES))


@dataclass(frozen=True, slots=True)
class TrunkEntry:
    """One object of a snapshot and the digest of its slice list."""

    oid: int
    copies: int
    copy_policy: int
    block_size_shift: int
    digest: bytes

    def pack(self) -> bytes:
        """32 bytes."""
        return _TRUNK.pack(self.oid, self.copies, self.copy_policy, self.block_size_shift, self.digest)


def pack_trunk(entries: list[TrunkEntry] | tuple[TrunkEntry, ...]) -> bytes:
    """The content of a trunk."""
    return b"".join(entry.pack() for entry in entries)


def unpack_trunk(buffer: Buffer) -> tuple[TrunkEntry, ...]:
    """The entries of a trunk.

    :raises ProtocolError: no whole number of entries.
    """
    if len(buffer) % TRUNK_ENTRY_BYTES:
        raise ProtocolError(f"a trunk of {len(buffer)} bytes is no multiple of {TRUNK_ENTRY_BYTES}")
    return tuple(TrunkEntry(*fields) for fields in _TRUNK.iter_unpack(bytes(buffer)))


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """One snapshot of the cluster.

    :param index: 1, 2, ... in order of saving.
    :param time: seconds since 1970.
    :param trunk: digest of its trunk.
    """

    index: int
    tag: bytes
    time: int
    trunk: bytes

    def __post_init__(self) -> None:
        check_name(self.tag, "tag")

    def pack(self) -> bytes:
        """296 bytes."""
        return _RECORD.pack(self.index, self.tag, self.time, self.trunk)


@dataclass(frozen=True, slots=True)
class SnapshotLog:
    """The file ``user_snap``: the cluster's defaults when it was begun, and every snapshot saved since."""

    copies: int
    copy_policy: int
    block_size_shift: int
    records: tuple[SnapshotRecord, ...] = ()

    def pack_header(self) -> bytes:
        """32 bytes."""
        return _HEADER.pack(MAGIC, VERSION, self.copies, self.copy_policy, self.block_size_shift)

    def pack(self) -> bytes:
        """The whole file."""
        return self.pack_header() + b"".join(record.pack() for record in self.records)

    @classmethod
    def unpack(cls, buffer: Buffer) -> SnapshotLog:
        """From the file's content; an empty file is a log that was not begun (``copies`` 0).

        :raises ProtocolError: not such a log, another version, or cut short.
        """
        if len(buffer) == 0:
            return cls(0, 0, 0)
        if len(buffer) < LOG_HEADER_BYTES or (len(buffer) - LOG_HEADER_BYTES) % LOG_RECORD_BYTES:
            raise ProtocolError(f"a snapshot log of {len(buffer)} bytes is cut short")
        magic, version, copies, copy_policy, shift = _HEADER.unpack_from(buffer)
        if magic != MAGIC:
            raise ProtocolError(f"not a snapshot log: magic 0x{magic:08x}")
        if version != VERSION:
            raise ProtocolError(f"a snapshot log of version {version}, not {VERSION}")
        records = tuple(
            SnapshotRecord(index, cut_name(tag[:-1]), time, trunk)
            for index, tag, time, trunk in _RECORD.iter_unpack(bytes(buffer[LOG_HEADER_BYTES:]))
        )
        return cls(copies, copy_policy, shift, records)
