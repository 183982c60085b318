"""Sans-I/O framing: bytes in, complete requests or responses out.

The decoder owns one receive buffer. A body that is mostly still to come gets a buffer of its own, so that a 4 MiB write
is received where it is needed; a small body is copied out of the shared buffer (4 KiB: 0.2 µs), after which the buffer
can be reused at once. Bodies handed out are therefore always owned by their request.

Everything is bounded: a header that announces more than ``body_bytes_max`` is a ``ProtocolError``, and the memory of
one connection is the receive buffer plus one body. Whoever may have to do with objects that are larger says so by
``larger``, which is asked only when a body is beyond the limit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeAlias, TypeVar

from sheepdog.errors import ProtocolError
from sheepdog.wire.header import (
    FLAG_WRITE,
    HEADER_BYTES,
    Request,
    Response,
    unpack_request,
    unpack_response,
)

KiB = 1024
MiB = 1024 * KiB

RECEIVE_BYTES = 128 * KiB
DIRECT_BYTES_MIN = 64 * KiB  # bodies from here on are received into their own buffer
BODY_BYTES_MAX = 64 * MiB

F = TypeVar("F", Request, Response)

Place: TypeAlias = Callable[[F], memoryview | None]  # where the body of a frame goes; None: into a new buffer


class Decoder(Generic[F]):
    """Turns a byte stream into frames.

    Call ``get_buffer``, fill it, call ``received(count)``, which returns every frame completed by these bytes.

    :raises ProtocolError: from ``received``; the connection must be closed, earlier frames of the pass are lost.
    """

    __slots__ = (
        "_body",
        "_body_filled",
        "_buffer",
        "_end",
        "_frame",
        "_larger",
        "_place",
        "_start",
        "_unpack",
        "_view",
        "body_bytes_max",
    )

    def __init__(
        self,
        unpack: Callable[[memoryview, int], F],
        body_bytes_max: int,
        larger: Callable[[], int] | None,
        place: Place[F] | None = None,
    ) -> None:
        self._unpack: Callable[[memoryview, int], F] = unpack
        self.body_bytes_max = body_bytes_max
        self._larger = larger
        self._place: Place[F] | None = place
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0  # unread bytes are buffer[start:end]
        self._end = 0
        self._frame: F | None = None  # a frame whose body is being received directly
        self._body: memoryview | None = None
        self._body_filled = 0

    def get_buffer(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._body is not None:
            return self._body[self._body_filled :]
        return self._view[self._end :]

    @property
    def idle(self) -> bool:
        """No frame is half received."""
        return self._body is None and self._start == self._end

    def received(self, count: int) -> list[F]:
        """The frames that are complete now, in order."""
        frames: list[F] = []
        if self._body is not None:
            self._body_filled += count
            if self._body_filled < len(self._body):
                return frames
            frame = self._frame
            assert frame is not None, "a body without its frame"
            self._frame = self._body = None
            frames.append(frame)
            return frames
        self._end += count
        start, end = self._start, self._end
        view, unpack = self._view, self._unpack
        while end - start >= HEADER_BYTES:
            frame = unpack(view, start)
            length = frame.data_length
            if not length or not frame.flags & FLAG_WRITE:
                start += HEADER_BYTES
                frames.append(frame)
                continue
            if length > self.body_bytes_max and (self._larger is None or length > self._larger()):
                raise ProtocolError(f"a body of {length} bytes is announced, at most {self.body_bytes_max} are allowed")
            body_start = start + HEADER_BYTES
            if end - body_start >= length:
                frame.body = bytes(view[body_start : body_start + length])
                start = body_start + length
                frames.append(frame)
                continue
            if length >= DIRECT_BYTES_MIN:
                given = self._place(frame) if self._place is not None else None
                if given is None:
                    frame.body = bytearray(length)
                    body = memoryview(frame.body)
                else:
                    frame.body = body = given[:length]  # shorter than announced: the rest cannot be placed
                    if len(body) < length:
                        raise ProtocolError(f"a body of {length} bytes is announced, {len(body)} were asked for")
                here = end - body_start
                body[:here] = view[body_start:end]
                self._frame = frame
                self._body = body
                self._body_filled = here
                start = end
            break
        if start == end:
            self._start = self._end = 0
        else:
            if RECEIVE_BYTES - start < HEADER_BYTES + DIRECT_BYTES_MIN:
                # The rest of a small frame must fit: it is shorter than a header and a small body.
                remaining = end - start
                self._buffer[:remaining] = self._buffer[start:end]
                start, end = 0, remaining
            self._start, self._end = start, end
        return frames


def request_decoder(
    body_bytes_max: int = BODY_BYTES_MAX, *, larger: Callable[[], int] | None = None
) -> Decoder[Request]:
    """For the server side of a connection.

    :param larger: the size of the largest object that there can be at this moment.
    """
    return Decoder(unpack_request, body_bytes_max, larger)


def response_decoder(
    body_bytes_max: int = BODY_BYTES_MAX,
    *,
    larger: Callable[[], int] | None = None,
    place: Place[Response] | None = None,
) -> Decoder[Response]:
    """For the client side of a connection; ``larger`` as in ``request_decoder``.

    :param place: where a large body is received to; a small one is never asked about.
    """
    return Decoder(unpack_response, body_bytes_max, larger, place)
