"""A plain blocking connection to a sheep: one request, one answer, no threads and no event loop.

The admin tool, tests and scripts use it, so importing it costs next to nothing (``socket`` and ``struct``). Requests
of one connection never overlap; whoever wants several in flight opens several connections. A peer that is alive but
slow is waited for without limit, as the original's tools do; a peer that died or became unreachable is noticed through
the socket's end or TCP keep-alive, so a caller never hangs on a dead sheep.

Addresses are ``host:port``, ``[v6]:port`` or ``unix:/path/of/the/socket``.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from struct import Struct
from typing import TypeAlias

from sheepdog.errors import ProtocolError, TransportError
from sheepdog.wire.header import FLAG_WRITE, HEADER_BYTES, REQUEST, RESPONSE

Buffer: TypeAlias = bytes | bytearray | memoryview

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 7000

PROTO_CLIENT = 0x02  # opcodes below 0x80
PROTO_SHEEP = 0x0A  # all others
_COMMON = Struct("<BBHIII")

# A dead machine is noticed after about 5 + 3 * 5 seconds of silence; a live one may take as long as it likes.
KEEPALIVE_IDLE_S = 5
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_COUNT = 3
UNACKNOWLEDGED_MS_MAX = 20_000


class ConnectError(TransportError):
    """Nothing answers at the address; the message is the one that the command line prints."""


class ConnectionLost(TransportError):
    """The sheep went away between request and answer. Whether it acted on the request is unknown."""


class Response:
    """What a sheep answered. ``body`` has exactly the bytes that followed the header, at most what was asked for."""

    __slots__ = ("body", "epoch", "header", "id", "result", "variant")

    epoch: int
    id: int
    result: int
    variant: bytes

    def __init__(self, header: bytes, body: bytearray) -> None:
        (_, _, _, self.epoch, self.id, _, self.result, self.variant) = RESPONSE.unpack(header)
        self.header = header
        self.body = body

    def u32(self, offset: int) -> int:
        """The little-endian number at ``offset`` of the header (offsets as the protocol's tables give them)."""
        return int.from_bytes(self.header[offset : offset + 4], "little")

    def u64(self, offset: int) -> int:
        return int.from_bytes(self.header[offset : offset + 8], "little")

    def __repr__(self) -> str:
        return f"Response(result=0x{self.result:02x}, epoch={self.epoch}, body={len(self.body)} bytes)"


def parse_address(address: str) -> tuple[str, int] | str:
    """``(host, port)``, or the path of a Unix socket.

    :raises ValueError: neither form.
    """
    if address.startswith("unix:"):
        return address[5:]
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit():
        raise ValueError(f"address {address!r} is not host:port, [v6]:port or unix:/path")
    return host.removeprefix("[").removesuffix("]"), int(port)


def format_address(host: str, port: int) -> str:
    """``host:port``; an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_socket(address: str) -> socket.socket:
    """A connected stream socket with keep-alive and without Nagle's delay.

    :raises ConnectError: with the text ``failed to connect to HOST:PORT: REASON``.
    """
    target = parse_address(address)
    shown = address.removeprefix("unix:")
    if isinstance(target, str):
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            stream.connect(target)
        except OSError as error:
            stream.close()
            raise ConnectError(f"failed to connect to {shown}: {_reason(error)}") from error
        return stream
    try:
        stream = socket.create_connection(target)
    except OSError as error:
        raise ConnectError(f"failed to connect to {shown}: {_reason(error)}") from error
    stream.settimeout(None)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEPALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEPALIVE_COUNT),
        ("TCP_USER_TIMEOUT", UNACKNOWLEDGED_MS_MAX),
    ):
        option = getattr(socket, name, None)
        if option is not None:
            stream.setsockopt(socket.IPPROTO_TCP, option, value)
    return stream


def _reason(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return str(error.strerror)
    return os.strerror(error.errno) if error.errno else str(error)


class Connection:
    """One open connection. Use it from one thread at a time, as a context manager or with ``close``."""

    __slots__ = ("_stream", "address", "broken")

    def __init__(self, address: str, *, connect: Callable[[str], socket.socket] = open_socket) -> None:
        """Connected when it returns.

        :param connect: makes the socket; tests pass a scripted one.
        :raises ConnectError: nothing listens there.
        """
        self.address = address
        self.broken = False
        self._stream = connect(address)

    def request(
        self,
        opcode: int,
        *,
        flags: int = 0,
        epoch: int = 0,
        request_id: int = 0,
        data_length: int = 0,
        oid: int = 0,
        cow_oid: int = 0,
        copies: int = 0,
        copy_policy: int = 0,
        ec_index: int = 0,
        tgt_epoch: int = 0,
        offset: int = 0,
        variant: bytes | None = None,
        body: Buffer | None = None,
        into: memoryview | None = None,
    ) -> Response:
        """The answer of the sheep, whatever its result code is.

        :param variant: the 32 bytes from offset 16 (shorter is padded); without it the object fields are sent.
        :param body: sets the WRITE flag and is sent behind the header.
        :param data_length: room for the answer, in bytes; ignored when there is a body.
        :param into: where the answer's body goes, so that large reads are not copied; at least ``data_length`` long.
        :raises ConnectionLost: the sheep closed or died; the connection is unusable.
        :raises ProtocolError: it answered with more than was asked for; the connection is unusable.
        """
        if body is not None:
            flags |= FLAG_WRITE
            data_length = len(body)
        proto = PROTO_SHEEP if opcode >= 0x80 else PROTO_CLIENT
        if variant is None:
            header = REQUEST.pack(
                proto, opcode, flags, epoch, request_id, data_length,
                oid, cow_oid, copies, copy_policy, ec_index, 0, tgt_epoch, offset, 0,
            )  # fmt: skip
        else:
            common = _COMMON.pack(proto, opcode, flags, epoch, request_id, data_length)
            header = common + variant.ljust(HEADER_BYTES - len(common), b"\0")
        try:
            self._send(header, body)
        except OSError as error:
            self.broken = True
            raise ConnectionLost("failed to send a request") from error
        try:
            return self._receive(data_length, into)
        except OSError as error:
            self.broken = True
            raise ConnectionLost("failed to read a response") from error

    def _send(self, header: bytes, body: Buffer | None) -> None:
        if not body:
            self._stream.sendall(header)
            return
        sent = self._stream.sendmsg([header, body])
        if sent < HEADER_BYTES:
            self._stream.sendall(header[sent:])
            sent = HEADER_BYTES
        if sent < HEADER_BYTES + len(body):
            self._stream.sendall(memoryview(body)[sent - HEADER_BYTES :])

    def _receive(self, body_bytes_max: int, into: memoryview | None) -> Response:
        header = bytearray(HEADER_BYTES)
        self._fill(memoryview(header))
        length = int.from_bytes(header[12:16], "little")
        if length > body_bytes_max:
            self.broken = True
            raise ProtocolError(f"{self.address} answered with {length} bytes where {body_bytes_max} were asked for")
        if into is not None:
            self._fill(into[:length])
            return Response(bytes(header), bytearray())
        body = bytearray(length)
        if length:
            self._fill(memoryview(body))
        return Response(bytes(header), body)

    def _fill(self, view: memoryview) -> None:
        filled = 0
        while filled < len(view):
            count = self._stream.recv_into(view[filled:])
            if not count:
                self.broken = True
                raise ConnectionLost("failed to read a response")
            filled += count

    def close(self) -> None:
        """The socket is closed; repeating it is harmless."""
        self._stream.close()

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
