"""The blocking connection: framing, bounds, and what a dead or strange sheep leads to."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sheepdog.client.connection import (
    ConnectError,
    Connection,
    ConnectionLost,
    format_address,
    open_socket,
    parse_address,
)
from sheepdog.errors import ProtocolError
from sheepdog.wire.header import unpack_request


def scripted(answer: Callable[[socket.socket], None]) -> Connection:
    """A connection to a function that gets the other end of the socket."""
    mine, theirs = socket.socketpair()

    def serve() -> None:
        with theirs:
            answer(theirs)

    threading.Thread(target=serve, daemon=True).start()
    return Connection("test:1", connect=lambda _: mine)


def receive(stream: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = stream.recv(count - len(data))
        if not piece:
            break
        data += piece
    return data


def response(length: int, result: int = 0) -> bytes:
    return struct.pack("<BBHIIII28s", 0, 2, 0, 7, 9, length, result, b"\1\2\3\4")


@pytest.mark.parametrize(
    ("address", "parsed"),
    [
        ("127.0.0.1:7000", ("127.0.0.1", 7000)),
        ("[::1]:7001", ("::1", 7001)),
        ("host:1", ("host", 1)),
        ("unix:/a/b:c", "/a/b:c"),
    ],
)
def test_addresses(address: str, parsed: object) -> None:
    """Both kinds of addresses are understood, and written back the same."""
    assert parse_address(address) == parsed
    if isinstance(parsed, tuple):
        assert format_address(*parsed) == address


@pytest.mark.parametrize("address", ["", "host", "host:", "host:x", "host:-1"])
def test_bad_addresses(address: str) -> None:
    """Everything else is refused before anything is opened."""
    with pytest.raises(ValueError, match="is not host:port"):
        open_socket(address)


def test_request_and_response() -> None:
    """A request is 48 bytes and its body; the answer's fields and body come back."""
    seen: list[bytes] = []

    def answer(stream: socket.socket) -> None:
        seen.append(receive(stream, 48 + 5))
        stream.sendall(response(0))
        seen.append(receive(stream, 48))
        stream.sendall(response(3) + b"abc")

    with scripted(answer) as connection:
        connection.request(0x03, oid=0x1234, offset=77, copies=2, copy_policy=0x11, body=b"hello")
        found = connection.request(0xA4, epoch=5, tgt_epoch=4, ec_index=3, data_length=10, request_id=9)

    written, read = unpack_request(seen[0]), unpack_request(seen[1])
    assert (written.proto, written.opcode, written.flags, written.data_length) == (2, 3, 1, 5)
    assert (written.oid, written.offset, written.copies, written.copy_policy) == (0x1234, 77, 2, 0x11)
    assert seen[0][48:] == b"hello"
    assert (read.proto, read.epoch, read.tgt_epoch, read.ec_index, read.id) == (0x0A, 5, 4, 3, 9)
    assert (found.result, found.epoch, found.id, bytes(found.body)) == (0, 7, 9, b"abc")
    assert found.u32(20) == 0x04030201


def test_variant() -> None:
    """Other variants replace the object fields and are padded."""
    seen: list[bytes] = []

    def answer(stream: socket.socket) -> None:
        seen.append(receive(stream, 48))
        stream.sendall(response(0))

    with scripted(answer) as connection:
        connection.request(0x85, variant=b"\x01\x02")

    assert seen[0][16:] == b"\x01\x02" + bytes(30)


def test_large_bodies() -> None:
    """Bodies far beyond a socket's buffer go through in both directions, also into a given buffer."""
    size = 9 << 20
    sent: list[bytes] = []

    def answer(stream: socket.socket) -> None:
        sent.append(receive(stream, 48 + size)[48:])
        stream.sendall(response(0))
        receive(stream, 48)
        stream.sendall(response(size) + bytes(size - 1) + b"x")

    target = bytearray(size)
    body = b"a" * size
    with scripted(answer) as connection:
        connection.request(3, body=body)
        found = connection.request(2, data_length=size, into=memoryview(target))

    assert sent[0] == body
    assert found.body == b"" and target.endswith(b"\0x")


def test_answer_larger_than_asked_for() -> None:
    """A sheep that sends more than the room it was given is refused, whatever it announces."""

    def answer(stream: socket.socket) -> None:
        receive(stream, 48)
        stream.sendall(response(0xFFFFFFFF))

    with scripted(answer) as connection:
        with pytest.raises(ProtocolError):
            connection.request(2, data_length=10)

        assert connection.broken


@pytest.mark.parametrize("part", [b"", response(4)[:20], response(4), response(4) + b"ab"])
def test_sheep_that_dies_while_answering(part: bytes) -> None:
    """Wherever the answer ends early, the caller learns it at once."""

    def answer(stream: socket.socket) -> None:
        receive(stream, 48)
        stream.sendall(part)

    with scripted(answer) as connection:
        with pytest.raises(ConnectionLost, match="failed to read a response"):
            connection.request(2, data_length=4)

        assert connection.broken


def test_nothing_listens() -> None:
    """The message names the address and the system's reason."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(ConnectError) as caught:
            Connection(f"127.0.0.1:{port}")

    assert str(caught.value) == f"failed to connect to 127.0.0.1:{port}: Connection refused"


def test_unix_socket(tmp_path: Path) -> None:
    """The same protocol over a Unix socket; a missing one is an error of the same kind."""
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            stream, _ = listener.accept()
            with stream:
                receive(stream, 48)
                stream.sendall(response(0, result=2))

        threading.Thread(target=serve, daemon=True).start()
        with Connection(f"unix:{path}") as connection:
            assert connection.request(2).result == 2
    with pytest.raises(ConnectError, match=r"failed to connect to .*/none: No such file or directory"):
        Connection(f"unix:{tmp_path}/none")
