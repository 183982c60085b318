"""Attributes of a VDI: one small object per key, found by hash and linear probing.

Layout and probing: docs, data model, section 6. The object's vid part is the hash of the VDI's *name*, its index the
attribute id; ids go up from ``hashing.attribute_id`` until the slot with the same header, or an empty one, is met.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

from sheepdog.errors import InvalidParameters, ProtocolError
from sheepdog.model.hashing import attribute_id, vdi_hash
from sheepdog.model.ids import INDEX_MASK, Oid, attribute_oid
from sheepdog.model.inode import check_name, cut_name
from sheepdog.model.limits import ATTRIBUTE_VALUE_BYTES_MAX

Buffer = bytes | bytearray | memoryview

ATTRIBUTE_BYTES = 66320
ATTRIBUTE_HEADER_BYTES = 784
VALUE_OFFSET = ATTRIBUTE_HEADER_BYTES

# name, tag, ctime, snap_id, value_len, key
_HEADER = Struct("<256s256sQII256s")
assert _HEADER.size == ATTRIBUTE_HEADER_BYTES
assert ATTRIBUTE_HEADER_BYTES + ATTRIBUTE_VALUE_BYTES_MAX == ATTRIBUTE_BYTES


@dataclass(frozen=True, slots=True)
class Attribute:
    """A key and its value.

    :param name: of the VDI; empty in a tombstone.
    :param tag: of the snapshot the attribute belongs to, or empty.
    :param ctime: creation time of the VDI, filled in by the server.
    :param snap_id: of the snapshot, or 0.
    :param value: at most 65536 bytes.
    """

    name: bytes
    tag: bytes = b""
    ctime: int = 0
    snap_id: int = 0
    key: bytes = b""
    value: bytes = b""

    def __post_init__(self) -> None:
        check_name(self.name)
        check_name(self.tag, "tag")
        check_name(self.key, "key")
        if len(self.value) > ATTRIBUTE_VALUE_BYTES_MAX:
            raise InvalidParameters(f"an attribute value has at most {ATTRIBUTE_VALUE_BYTES_MAX} bytes")

    def pack_header(self) -> bytes:
        """The first 784 bytes."""
        return _HEADER.pack(self.name, self.tag, self.ctime, self.snap_id, len(self.value), self.key)

    def pack(self) -> bytes:
        """66320 bytes."""
        return (self.pack_header() + self.value).ljust(ATTRIBUTE_BYTES, b"\0")

    @classmethod
    def unpack(cls, buffer: Buffer) -> Attribute:
        """From a whole object, or as much of it as the value needs.

        :raises ProtocolError: too short for the value that it announces, or the value is too long.
        """
        if len(buffer) < ATTRIBUTE_HEADER_BYTES:
            raise ProtocolError(f"an attribute has at least {ATTRIBUTE_HEADER_BYTES} bytes, not {len(buffer)}")
        name, tag, ctime, snap_id, value_bytes, key = _HEADER.unpack_from(buffer)
        if value_bytes > ATTRIBUTE_VALUE_BYTES_MAX or ATTRIBUTE_HEADER_BYTES + value_bytes > len(buffer):
            raise ProtocolError(f"an attribute of {len(buffer)} bytes announces a value of {value_bytes}")
        value = bytes(buffer[VALUE_OFFSET : VALUE_OFFSET + value_bytes])
        return cls(cut_name(name[:-1]), cut_name(tag[:-1]), ctime, snap_id, cut_name(key[:-1]), value)

    @property
    def is_tombstone(self) -> bool:
        """It was deleted; searches go on behind it."""
        return not self.name

    def same_slot(self, other: Attribute) -> bool:
        """Both are about the same key of the same VDI or snapshot."""
        return (self.name, self.tag, self.snap_id, self.key) == (other.name, other.tag, other.snap_id, other.key)

    @property
    def first_id(self) -> int:
        """The attribute id where the search begins."""
        return attribute_id(self.name, self.tag, self.snap_id, self.key)

    def oid_at(self, attr_id: int) -> Oid:
        """The object of the slot ``attr_id``, which wraps at 2^32."""
        return attribute_oid(vdi_hash(self.name), attr_id & INDEX_MASK)
