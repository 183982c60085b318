"""The Network Block Device protocol as values and bytes; nothing here does I/O.

Numbers and layouts are those of the NBD protocol document (fixed newstyle negotiation, simple and structured replies).
Everything is in network byte order. What a client sends is taken apart by ``decoder``; this module names the parts and
makes what a server sends.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum, IntFlag
from struct import Struct
from struct import error as StructError

KiB = 1024
MiB = 1024 * KiB

NAME_BYTES_MAX = 4096  # of any string, as the protocol says
OPTION_BYTES_MAX = 64 * KiB  # data of one option
QUERIES_MAX = 64  # of one meta context option
REQUEST_BYTES_MAX = 32 * MiB  # payload of one read or write, as announced to clients
MINIMUM_BLOCK_BYTES = 1
PREFERRED_BLOCK_BYTES = 4096

GREETING_MAGIC = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003E889045565A9
REQUEST_MAGIC = 0x25609513
SIMPLE_REPLY_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF

BASE_ALLOCATION = "base:allocation"
BASE_ALLOCATION_ID = 1
STATE_HOLE = 1
STATE_ZERO = 2


class HandshakeFlag(IntFlag):
    """What both sides can do; the same numbers in both directions."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    """What a client asks for before it works on an export."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class Reply(IntEnum):
    """What an option is answered with. Errors have the highest bit set."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 1 << 31 | 1
    ERR_POLICY = 1 << 31 | 2
    ERR_INVALID = 1 << 31 | 3
    ERR_PLATFORM = 1 << 31 | 4
    ERR_TLS_REQD = 1 << 31 | 5
    ERR_UNKNOWN = 1 << 31 | 6
    ERR_SHUTDOWN = 1 << 31 | 7
    ERR_BLOCK_SIZE_REQD = 1 << 31 | 8
    ERR_TOO_BIG = 1 << 31 | 9


class Info(IntEnum):
    """Kinds of information about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class ExportFlag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    ROTATIONAL = 16
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    SEND_DF = 128
    CAN_MULTI_CONN = 256
    SEND_RESIZE = 512
    SEND_CACHE = 1024
    SEND_FAST_ZERO = 2048


class Command(IntEnum):
    """What a client asks of an export."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


# Plain numbers: they are looked at in every request, and a member of an enum costs several times as much.
CMD_READ = 0
CMD_WRITE = 1
FLAG_FUA = 1
FLAG_NO_HOLE = 2
FLAG_DF = 4
FLAG_REQ_ONE = 8
FLAG_FAST_ZERO = 16

FLAGS_OF: dict[int, int] = {
    Command.READ: FLAG_DF | FLAG_FUA,
    Command.WRITE: FLAG_FUA,
    Command.DISC: 0,
    Command.FLUSH: FLAG_FUA,
    Command.TRIM: FLAG_FUA,
    Command.CACHE: FLAG_FUA,
    Command.WRITE_ZEROES: FLAG_FUA | FLAG_NO_HOLE | FLAG_FAST_ZERO,
    Command.BLOCK_STATUS: FLAG_REQ_ONE | FLAG_FUA,
}
"""Flags that each command takes. FUA without a meaning is no error."""


class Errno(IntEnum):
    """Error numbers of replies."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class ChunkType(IntEnum):
    """Kinds of chunks of a structured reply."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 1 << 15 | 1
    ERROR_OFFSET = 1 << 15 | 2


CHUNK_DONE = 1

GREETING = Struct(">QQH")
CLIENT_FLAGS = Struct(">I")
OPTION_HEAD = Struct(">QII")
OPTION_REPLY = Struct(">QIII")
REQUEST = Struct(">IHHQQI")
SIMPLE_REPLY = Struct(">IIQ")
CHUNK = Struct(">IHHQI")
OFFSET_DATA_HEAD = Struct(">IHHQIQ")  # a chunk's head and the offset of its data
OFFSET_HOLE = Struct(">IHHQIQI")
_U32 = Struct(">I")
_EXPORT_INFO = Struct(">HQH")
_BLOCK_SIZE_INFO = Struct(">HIII")
_EXPORT_NAME_REPLY = Struct(">QH")


class ProtocolViolation(Exception):
    """Bytes that no correct client sends: the connection is closed. The message says what was wrong."""


class BadOption(Exception):
    """The data of an option makes no sense; the client is told so and may go on."""


# ---- negotiation, from the server


def greeting() -> bytes:
    """The first bytes of a server."""
    return GREETING.pack(GREETING_MAGIC, OPTION_MAGIC, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)


def option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    """One reply to an option."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def option_error(option: int, reply: int, message: str) -> bytes:
    """An error reply with a text for people."""
    return option_reply(option, reply, message.encode("utf-8", "replace")[:NAME_BYTES_MAX])


def server_reply(name: bytes, description: bytes) -> bytes:
    """One export in the answer to LIST."""
    return option_reply(Option.LIST, Reply.SERVER, _U32.pack(len(name)) + name + description)


def export_info(option: int, size_bytes: int, flags: int) -> bytes:
    """Size and abilities of an export."""
    return option_reply(option, Reply.INFO, _EXPORT_INFO.pack(Info.EXPORT, size_bytes, flags))


def block_size_info(option: int) -> bytes:
    """What sizes of requests the server takes."""
    data = _BLOCK_SIZE_INFO.pack(Info.BLOCK_SIZE, MINIMUM_BLOCK_BYTES, PREFERRED_BLOCK_BYTES, REQUEST_BYTES_MAX)
    return option_reply(option, Reply.INFO, data)


def text_info(option: int, kind: Info, text: bytes) -> bytes:
    """Name or description of an export."""
    return option_reply(option, Reply.INFO, kind.to_bytes(2, "big") + text[:NAME_BYTES_MAX])


def meta_context(option: int, number: int, name: str) -> bytes:
    """One meta context in the answer to LIST_META_CONTEXT or SET_META_CONTEXT."""
    return option_reply(option, Reply.META_CONTEXT, _U32.pack(number) + name.encode())


def export_name_reply(size_bytes: int, flags: int, *, zeroes: bool) -> bytes:
    """The answer to EXPORT_NAME, which has no errors."""
    return _EXPORT_NAME_REPLY.pack(size_bytes, flags) + bytes(124 if zeroes else 0)


# ---- negotiation, from the client


def _string(data: bytes, at: int) -> tuple[bytes, int]:
    (length,) = _U32.unpack_from(data, at)
    at += _U32.size
    if length > NAME_BYTES_MAX or at + length > len(data):
        raise BadOption("a string is longer than allowed, or than its option")
    return data[at : at + length], at + length


def parse_info(data: bytes) -> tuple[bytes, list[int]]:
    """(export name, kinds of information asked for) of INFO and GO.

    :raises BadOption: not that.
    """
    try:
        name, at = _string(data, 0)
        count = int.from_bytes(data[at : at + 2], "big")
        rest = data[at + 2 :]
    except StructError as error:
        raise BadOption("too short") from error
    if len(data) < at + 2 or len(rest) != 2 * count:
        raise BadOption("the number of information requests does not fit the length")
    return name, [int.from_bytes(rest[i : i + 2], "big") for i in range(0, len(rest), 2)]


def parse_meta_context(data: bytes) -> tuple[bytes, list[bytes]]:
    """(export name, queries) of LIST_META_CONTEXT and SET_META_CONTEXT.

    :raises BadOption: not that, or too many queries.
    """
    try:
        name, at = _string(data, 0)
        (count,) = _U32.unpack_from(data, at)
        at += _U32.size
        if count > QUERIES_MAX:
            raise BadOption("too many queries")
        queries = []
        for _ in range(count):
            query, at = _string(data, at)
            queries.append(query)
    except StructError as error:
        raise BadOption("too short") from error
    if at != len(data):
        raise BadOption("bytes are left over")
    return name, queries


# ---- replies


def simple_reply(cookie: int, errno: int = 0) -> bytes:
    """The head of a simple reply; data of a read follows."""
    return SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, errno, cookie)


def data_head(cookie: int, offset: int, length: int) -> bytes:
    """What precedes the data of a read in a structured reply of one chunk."""
    return OFFSET_DATA_HEAD.pack(CHUNK_MAGIC, CHUNK_DONE, ChunkType.OFFSET_DATA, cookie, 8 + length, offset)


def hole_chunk(cookie: int, offset: int, length: int) -> bytes:
    """A whole read that is zeros, without sending them."""
    return OFFSET_HOLE.pack(CHUNK_MAGIC, CHUNK_DONE, ChunkType.OFFSET_HOLE, cookie, 12, offset, length)


def none_chunk(cookie: int) -> bytes:
    """A structured reply without content."""
    return CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE, ChunkType.NONE, cookie, 0)


def error_chunk(cookie: int, errno: int, message: str = "") -> bytes:
    """A structured reply that is an error."""
    text = message.encode("utf-8", "replace")[:1024]
    data = _U32.pack(errno) + len(text).to_bytes(2, "big") + text
    return CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE, ChunkType.ERROR, cookie, len(data)) + data


def block_status_chunk(cookie: int, context: int, extents: Sequence[tuple[int, int]]) -> bytes:
    """(length, state) of consecutive ranges."""
    data = b"".join(
        [_U32.pack(context), *(length.to_bytes(4, "big") + state.to_bytes(4, "big") for length, state in extents)]
    )
    return CHUNK.pack(CHUNK_MAGIC, CHUNK_DONE, ChunkType.BLOCK_STATUS, cookie, len(data)) + data
