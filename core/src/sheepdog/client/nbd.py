"""A small blocking NBD client: one request at a time, for demonstrations, tests and people without qemu-img.

    with NbdClient.connect("127.0.0.1:10809") as client:
        client.go("alice")
        client.write(0, b"hello", fua=True)
        assert client.read(0, 5) == b"hello"

Speaks fixed newstyle negotiation with structured replies and base:allocation where the server has them, over TCP, Unix
sockets and TLS.
"""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass
from struct import Struct
from types import TracebackType

from sheepdog.errors import ProtocolError, RequestError, TransportError

TIMEOUT_S = 30.0
CHUNK_BYTES_MAX = 33 * 1024 * 1024  # of one chunk or option reply that we are willing to receive
_PIECE_BYTES = 32 * 1024 * 1024  # of a read or write, when the server does not say

_GREETING = Struct(">QQH")
_OPTION = Struct(">QII")
_OPTION_REPLY = Struct(">QIII")
_REQUEST = Struct(">IHHQQI")
_REPLY_MAGIC = Struct(">I")
_SIMPLE = Struct(">IQ")
_CHUNK = Struct(">HHQI")
_NBDMAGIC = 0x4E42444D41474943
_IHAVEOPT = 0x49484156454F5054
_OPTION_REPLY_MAGIC = 0x0003E889045565A9
_REQUEST_MAGIC = 0x25609513
_SIMPLE_MAGIC = 0x67446698
_CHUNK_MAGIC = 0x668E33EF

_OPT_ABORT, _OPT_LIST, _OPT_STARTTLS, _OPT_INFO, _OPT_GO = 2, 3, 5, 6, 7
_OPT_STRUCTURED, _OPT_SET_META = 8, 10
_REP_ACK, _REP_SERVER, _REP_INFO, _REP_META = 1, 2, 3, 4
_REP_ERROR = 1 << 31
_CMD_READ, _CMD_WRITE, _CMD_DISC, _CMD_FLUSH, _CMD_TRIM, _CMD_CACHE, _CMD_ZEROES, _CMD_STATUS = range(8)
_FUA, _NO_HOLE, _REQ_ONE, _FAST_ZERO = 1, 2, 8, 16
_TYPE_DATA, _TYPE_HOLE, _TYPE_STATUS, _TYPE_ERROR = 1, 2, 5, 1 << 15
_DONE = 1

_OPTION_ERRORS = {
    1: "not supported",
    2: "refused by policy",
    3: "invalid",
    4: "not possible there",
    5: "TLS is required",
    6: "no such export",
    7: "the server is shutting down",
    8: "a block size is required",
    9: "too big",
}


class NbdError(RequestError):
    """The server refused a request. ``errno`` is the number it gave, 0 for a refused option."""

    def __init__(self, message: str, errno: int = 0) -> None:
        super().__init__(message, result=0x15 if errno == 28 else 0x03)
        self.errno = errno


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What the server says of an export. ``flags`` are the transmission flags of the protocol."""

    name: str
    size_bytes: int
    flags: int
    block_bytes: tuple[int, int, int] | None  # smallest, preferred, largest request
    description: str

    @property
    def read_only(self) -> bool:
        return bool(self.flags & 2)


class NbdClient:
    """One connection. Not for use by several threads at once."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._cookie = 0
        self._structured = False
        self._context: int | None = None  # number of base:allocation
        self._piece_bytes = _PIECE_BYTES
        self.info: ExportInfo | None = None

    @classmethod
    def connect(
        cls,
        address: str,
        *,
        tls: ssl.SSLContext | None = None,
        server_hostname: str | None = None,
        structured: bool = True,
        timeout_s: float = TIMEOUT_S,
    ) -> NbdClient:
        """A connection that has not chosen an export.

        :param address: ``host:port``, ``[v6]:port`` or ``unix:PATH``.
        :param tls: TLS is asked for, and nothing is sent without it.
        :param server_hostname: the name in the server's certificate when it is not the host of the address.
        :param structured: False: simple replies, no block status.
        :raises TransportError: no connection.
        :raises ProtocolError: no NBD server of the newstyle kind.
        :raises NbdError: the server has no TLS.
        """
        host = "localhost"
        try:
            if address.startswith("unix:"):
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    sock.settimeout(timeout_s)
                    sock.connect(address.removeprefix("unix:"))
                except BaseException:
                    sock.close()
                    raise
            else:
                host, _, port = address.rpartition(":")
                host = host.strip("[]") or "localhost"
                sock = socket.create_connection((host, int(port)), timeout_s)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except (OSError, ValueError) as error:
            raise TransportError(f"no connection to {address}: {error}") from error
        client = cls(sock)
        try:
            client._greet()
            if tls is not None:
                client._start_tls(tls, server_hostname or host)
            if structured:
                client._structured = client._option(_OPT_STRUCTURED, optional=True) is not None
        except BaseException:
            client.close()
            raise
        return client

    def __enter__(self) -> NbdClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.disconnect()
        else:
            self.close()

    # ---- negotiation

    def list_exports(self) -> list[tuple[str, str]]:
        """(name, description) of every export, in the server's order."""
        found = []
        for kind, data in self._option(_OPT_LIST) or ():
            if kind == _REP_SERVER:
                length = int.from_bytes(data[:4], "big")
                found.append((_text(data[4 : 4 + length]), _text(data[4 + length :])))
        return found

    def query(self, name: str) -> ExportInfo:
        """What the server says of an export, without choosing it.

        :raises NbdError: there is no such export, or it cannot be used.
        """
        return self._info(_OPT_INFO, name)

    def go(self, name: str) -> ExportInfo:
        """The export is chosen; reads and writes go to it.

        :raises NbdError: there is no such export, or it cannot be used. Another may be tried.
        """
        if self._structured:
            encoded = _name(name)
            data = len(encoded).to_bytes(4, "big") + encoded + (1).to_bytes(4, "big") + _string(b"base:allocation")
            for kind, reply in self._option(_OPT_SET_META, data, optional=True) or ():
                if kind == _REP_META:
                    self._context = int.from_bytes(reply[:4], "big")
        self.info = self._info(_OPT_GO, name)
        if self.info.block_bytes is not None:
            self._piece_bytes = min(self.info.block_bytes[2], _PIECE_BYTES)
        return self.info

    def _info(self, option: int, name: str) -> ExportInfo:
        wanted = b"".join(kind.to_bytes(2, "big") for kind in (2, 3))
        replies = self._option(option, _string(_name(name)) + (2).to_bytes(2, "big") + wanted)
        size_bytes = flags = -1
        block_bytes = None
        description = ""
        for kind, data in replies or ():
            if kind != _REP_INFO:
                continue
            what = int.from_bytes(data[:2], "big")
            if what == 0 and len(data) == 12:
                size_bytes, flags = int.from_bytes(data[2:10], "big"), int.from_bytes(data[10:], "big")
            elif what == 2:
                description = _text(data[2:])
            elif what == 3 and len(data) == 14:
                low, preferred, high = (int.from_bytes(data[at : at + 4], "big") for at in (2, 6, 10))
                block_bytes = (low, preferred, high)
        if size_bytes < 0:
            raise ProtocolError("the server does not say how large the export is")
        return ExportInfo(name, size_bytes, flags, block_bytes, description)

    def _greet(self) -> None:
        first, second, flags = _GREETING.unpack(self._receive(_GREETING.size))
        if first != _NBDMAGIC or second != _IHAVEOPT or not flags & 1:
            raise ProtocolError("this is no NBD server with fixed newstyle negotiation")
        self._send((flags & 3).to_bytes(4, "big"))

    def _start_tls(self, context: ssl.SSLContext, hostname: str) -> None:
        self._option(_OPT_STARTTLS)
        try:
            self._socket = context.wrap_socket(self._socket, server_hostname=hostname)
        except (OSError, ssl.SSLError) as error:
            raise TransportError(f"the TLS handshake failed: {error}") from error

    def _option(self, option: int, data: bytes = b"", *, optional: bool = False) -> list[tuple[int, bytes]] | None:
        """The replies before the acknowledgement; ``None`` if an optional one is refused."""
        assert self.info is None, "options come before the export is chosen"
        self._send(_OPTION.pack(_IHAVEOPT, option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        while True:
            magic, echoed, kind, length = _OPTION_REPLY.unpack(self._receive(_OPTION_REPLY.size))
            if magic != _OPTION_REPLY_MAGIC or echoed != option or length > CHUNK_BYTES_MAX:
                raise ProtocolError("the server's answer to an option makes no sense")
            reply = bytes(self._receive(length))
            if kind == _REP_ACK:
                return replies
            if kind & _REP_ERROR:
                if optional:
                    return None
                reason = _OPTION_ERRORS.get(kind & ~_REP_ERROR, f"error {kind & ~_REP_ERROR}")
                raise NbdError(f"{reason}: {_text(reply)}" if reply else reason)
            replies.append((kind, reply))

    # ---- requests

    @property
    def size_bytes(self) -> int:
        """Of the chosen export."""
        assert self.info is not None, "no export is chosen"
        return self.info.size_bytes

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes.

        :raises NbdError: refused; ``errno`` says why.
        :raises TransportError: the connection broke.
        """
        buffer = bytearray(length)
        for at in range(0, length, self._piece_bytes):
            count = min(self._piece_bytes, length - at)
            self._request(_CMD_READ, 0, offset + at, count, into=memoryview(buffer)[at : at + count])
        if not length:
            self._request(_CMD_READ, 0, offset, 0, into=memoryview(buffer))
        return bytes(buffer)

    def write(self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False) -> None:
        """The bytes are written; with ``fua`` they are on stable storage.

        :raises NbdError: refused; ``errno`` says why.
        :raises TransportError: the connection broke; some bytes may be written.
        """
        view = memoryview(data).cast("B")
        for at in range(0, len(view), self._piece_bytes):
            piece = view[at : at + self._piece_bytes]
            self._request(_CMD_WRITE, _FUA if fua else 0, offset + at, len(piece), body=piece)

    def flush(self) -> None:
        """Everything written before is on stable storage."""
        self._request(_CMD_FLUSH, 0, 0, 0)

    def trim(self, offset: int, length: int, *, fua: bool = False) -> None:
        """The content of the range is not needed any more."""
        self._request(_CMD_TRIM, _FUA if fua else 0, offset, length)

    def write_zeroes(
        self, offset: int, length: int, *, no_hole: bool = False, fast: bool = False, fua: bool = False
    ) -> None:
        """The range reads as zeros.

        :param no_hole: it stays allocated.
        :param fast: refused (errno 95) where it would not be quicker than writing zeros.
        """
        flags = (_NO_HOLE if no_hole else 0) | (_FAST_ZERO if fast else 0) | (_FUA if fua else 0)
        self._request(_CMD_ZEROES, flags, offset, length)

    def cache(self, offset: int, length: int) -> None:
        """The range will be read soon."""
        self._request(_CMD_CACHE, 0, offset, length)

    def block_status(self, offset: int, length: int, *, one: bool = False) -> list[tuple[int, int]]:
        """(length, state) from ``offset`` on, perhaps not up to the end of the range. State: 1 hole, 2 zeros.

        :param one: only the first piece.
        :raises NbdError: the server has no block status.
        """
        if self._context is None:
            raise NbdError("the server offers no block status", 22)
        data = self._request(_CMD_STATUS, _REQ_ONE if one else 0, offset, length)
        return [
            (int.from_bytes(data[at : at + 4], "big"), int.from_bytes(data[at + 4 : at + 8], "big"))
            for at in range(4, len(data), 8)
        ]

    def map(self) -> list[tuple[int, int, int]]:
        """(offset, length, state) of the whole export."""
        found: list[tuple[int, int, int]] = []
        at = 0
        while at < self.size_bytes:
            for length, state in self.block_status(at, min(self.size_bytes - at, 1 << 30)):
                if found and found[-1][2] == state:
                    found[-1] = (found[-1][0], found[-1][1] + length, state)
                else:
                    found.append((at, length, state))
                at += length
        return found

    def disconnect(self) -> None:
        """The server was told goodbye (or the negotiation was given up) and the connection is closed."""
        try:
            if self.info is not None:
                self._send(_REQUEST.pack(_REQUEST_MAGIC, 0, _CMD_DISC, 0, 0, 0))
            else:
                self._option(_OPT_ABORT, optional=True)
        except TransportError:
            pass  # it is closed already
        self.close()

    def close(self) -> None:
        """The connection is closed, without a word; a call of another thread that waits for an answer fails."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # it is closed already
        self._socket.close()

    def _request(
        self,
        command: int,
        flags: int,
        offset: int,
        length: int,
        *,
        body: memoryview | None = None,
        into: memoryview | None = None,
    ) -> bytes:
        """Sends one request and takes its whole reply; data of a read goes to ``into``, block status is returned."""
        assert self.info is not None, "no export is chosen"
        self._cookie += 1
        self._send(_REQUEST.pack(_REQUEST_MAGIC, flags, command, self._cookie, offset, length))
        if body is not None:
            self._send(body)
        result = b""
        failure: NbdError | None = None
        while True:
            (magic,) = _REPLY_MAGIC.unpack(self._receive(_REPLY_MAGIC.size))
            if magic == _SIMPLE_MAGIC:
                errno, cookie = _SIMPLE.unpack(self._receive(_SIMPLE.size))
                self._check_cookie(cookie)
                if errno:
                    raise NbdError(f"the server answers with error {errno}", errno)
                if into is not None:
                    self._receive_into(into)
                return result
            if magic != _CHUNK_MAGIC or not self._structured:
                raise ProtocolError(f"a reply begins with 0x{magic:08x}")
            chunk_flags, kind, cookie, size = _CHUNK.unpack(self._receive(_CHUNK.size))
            self._check_cookie(cookie)
            if size > CHUNK_BYTES_MAX:
                raise ProtocolError(f"a chunk of {size} bytes")
            if kind == _TYPE_DATA and into is not None and size >= 8:
                at = int.from_bytes(self._receive(8), "big") - offset
                if at < 0 or at + size - 8 > len(into):
                    raise ProtocolError("data outside of what was asked for")
                self._receive_into(into[at : at + size - 8])
            else:
                data = bytes(self._receive(size))
                if kind & _TYPE_ERROR:
                    errno = int.from_bytes(data[:4], "big")
                    message = _text(data[6 : 6 + int.from_bytes(data[4:6], "big")])
                    failure = NbdError(message or f"the server answers with error {errno}", errno)
                elif kind == _TYPE_STATUS:
                    result = data
                elif kind == _TYPE_HOLE and into is not None:
                    at, count = int.from_bytes(data[:8], "big") - offset, int.from_bytes(data[8:], "big")
                    if at < 0 or at + count > len(into):
                        raise ProtocolError("a hole outside of what was asked for")
                    into[at : at + count] = bytes(count)
            if chunk_flags & _DONE:
                if failure is not None:
                    raise failure
                return result

    def _check_cookie(self, cookie: int) -> None:
        if cookie != self._cookie:
            raise ProtocolError("a reply to another request")

    # ---- bytes

    def _send(self, data: bytes | memoryview) -> None:
        try:
            self._socket.sendall(data)
        except OSError as error:
            raise TransportError(f"the NBD connection broke: {error}") from error

    def _receive(self, length: int) -> bytearray:
        buffer = bytearray(length)
        self._receive_into(memoryview(buffer))
        return buffer

    def _receive_into(self, view: memoryview) -> None:
        while view:
            try:
                count = self._socket.recv_into(view)
            except OSError as error:
                raise TransportError(f"the NBD connection broke: {error}") from error
            if not count:
                raise TransportError("the NBD server closed the connection")
            view = view[count:]


def _name(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _string(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data
