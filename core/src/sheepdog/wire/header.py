"""The 48-byte request and response headers.

Only the common part and the object variant are unpacked at once, because object I/O is what must be quick; the other
variants (``sheepdog.wire.payloads``) are read from ``Request.variant`` by whoever handles the opcode. Layout: wire
protocol, sections 3 and 4.
"""

from __future__ import annotations

from struct import Struct
from typing import ClassVar, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

HEADER_BYTES = 48
VARIANT_OFFSET = 16
RESPONSE_VARIANT_OFFSET = 20

FLAG_WRITE = 0x0001

# proto, opcode, flags, epoch, id, data_length | oid, cow_oid, copies, copy_policy, ec_index, reserved, tgt_epoch,
# offset, tail
REQUEST = Struct("<BBHIIIQQBBBBIII")
# proto, opcode, flags, epoch, id, data_length, result, variant
RESPONSE = Struct("<BBHIIII28s")
RESPONSE_HEAD = Struct("<BBHIIII")
_ZEROS28 = bytes(28)
assert REQUEST.size == RESPONSE.size == HEADER_BYTES


class Request:
    """One request. ``body`` is owned by the request (empty without the WRITE flag).

    ``tail`` is the u32 at offset 44: padding for clients, between our own sheep the low-water mark of completed writes.
    """

    __slots__ = (
        "body",
        "copies",
        "copy_policy",
        "cow_oid",
        "data_length",
        "ec_index",
        "epoch",
        "flags",
        "id",
        "offset",
        "oid",
        "opcode",
        "proto",
        "tail",
        "tgt_epoch",
        "variant",
    )

    def __init__(
        self,
        opcode: int,
        *,
        proto: int = 2,
        flags: int = 0,
        epoch: int = 0,
        id: int = 0,  # noqa: A002  the name of the field on the wire
        data_length: int = 0,
        oid: int = 0,
        cow_oid: int = 0,
        copies: int = 0,
        copy_policy: int = 0,
        ec_index: int = 0,
        tgt_epoch: int = 0,
        offset: int = 0,
        tail: int = 0,
        variant: bytes | None = None,
        body: Buffer = b"",
    ) -> None:
        self.opcode = opcode
        self.proto = proto
        self.flags = flags
        self.epoch = epoch
        self.id = id
        self.data_length = data_length
        self.oid = oid
        self.cow_oid = cow_oid
        self.copies = copies
        self.copy_policy = copy_policy
        self.ec_index = ec_index
        self.tgt_epoch = tgt_epoch
        self.offset = offset
        self.tail = tail
        self.variant = variant
        self.body = body

    def pack(self) -> bytes:
        """The header: the object variant, or ``variant`` (at most 32 bytes) where one was given."""
        if self.variant is None:
            return REQUEST.pack(
                self.proto, self.opcode, self.flags, self.epoch, self.id, self.data_length,
                self.oid, self.cow_oid, self.copies, self.copy_policy, self.ec_index, 0,
                self.tgt_epoch, self.offset, self.tail,
            )  # fmt: skip
        head = RESPONSE_HEAD.pack(self.proto, self.opcode, self.flags, self.epoch, self.id, self.data_length, 0)
        return (head[:VARIANT_OFFSET] + self.variant).ljust(HEADER_BYTES, b"\0")

    def __repr__(self) -> str:
        return f"Request(opcode=0x{self.opcode:02x}, id={self.id}, flags=0x{self.flags:x}, oid={self.oid:016x})"


def unpack_request(buffer: Buffer, offset: int = 0) -> Request:
    """The request whose header starts at ``offset``; the body is for the caller to attach."""
    request = Request.__new__(Request)
    (
        request.proto, request.opcode, request.flags, request.epoch, request.id, request.data_length,
        request.oid, request.cow_oid, request.copies, request.copy_policy, request.ec_index, _,
        request.tgt_epoch, request.offset, request.tail,
    ) = REQUEST.unpack_from(buffer, offset)  # fmt: skip
    request.variant = None if request.opcode in _OBJECT_OPCODES else bytes(buffer[offset + 16 : offset + 48])
    request.body = b""
    return request


# Opcodes whose variant is the object one and nothing else: the hot path skips a copy for them.
_OBJECT_OPCODES = frozenset({0x01, 0x02, 0x03, 0x04, 0xA3, 0xA4, 0xA5, 0xA6, 0xE1, 0xE3, 0xE4})


class Response:
    """One response. ``variant`` holds the 28 bytes behind the result."""

    __slots__ = ("body", "data_length", "epoch", "id", "opcode", "result", "variant")

    flags: ClassVar[int] = FLAG_WRITE  # whatever the header says: the data that it announces follows

    def __init__(
        self,
        result: int = 0,
        *,
        opcode: int = 0,
        epoch: int = 0,
        id: int = 0,  # noqa: A002  the name of the field on the wire
        variant: bytes = b"",
        body: Buffer = b"",
    ) -> None:
        self.result = result
        self.opcode = opcode
        self.epoch = epoch
        self.id = id
        self.variant = variant
        self.body = body
        self.data_length = len(body)

    def pack(self) -> bytes:
        """The header. As the original's, its version and flags are 0."""
        return pack_response(self.opcode, self.epoch, self.id, len(self.body), self.result, self.variant)

    def __repr__(self) -> str:
        return f"Response(result=0x{self.result:02x}, opcode=0x{self.opcode:02x}, id={self.id})"


def pack_response(opcode: int, epoch: int, id_: int, data_length: int, result: int, variant: bytes = b"") -> bytes:
    """A response header; ``variant`` (at most 28 bytes) is padded with zeros by the struct."""
    return RESPONSE.pack(0, opcode, 0, epoch, id_, data_length, result, variant)


def unpack_response(buffer: Buffer, offset: int = 0) -> Response:
    """The response whose header starts at ``offset``; the body is for the caller to attach."""
    response = Response.__new__(Response)
    (_, response.opcode, _, response.epoch, response.id, response.data_length, response.result, response.variant) = (
        RESPONSE.unpack_from(buffer, offset)
    )
    response.body = b""
    return response
