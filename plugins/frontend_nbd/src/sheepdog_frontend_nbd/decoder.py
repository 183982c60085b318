"""Takes apart what a client sends. No I/O, no idea of volumes; wrong bytes are a ``ProtocolViolation`` and nothing
else.

The decoder owns the receive buffer. Small things (options, requests, payloads up to ``COPY_BYTES_MAX``) are waited
for in that buffer and handed on when complete; payloads are copied out of it, because they outlive it. A larger
payload gets a buffer of its own which the following bytes are received into directly.

``blocked`` makes it stop between two messages; ``pump`` goes on.
"""

from __future__ import annotations

from typing import Protocol

from sheepdog_frontend_nbd.protocol import (
    CLIENT_FLAGS,
    CMD_WRITE,
    OPTION_BYTES_MAX,
    OPTION_HEAD,
    OPTION_MAGIC,
    REQUEST,
    REQUEST_BYTES_MAX,
    REQUEST_MAGIC,
    HandshakeFlag,
    KiB,
    ProtocolViolation,
)

RECEIVE_BYTES = 256 * KiB
COPY_BYTES_MAX = 64 * KiB
_ROOM_BYTES = 32 * KiB  # less than this free at the end, and what is left moves to the front
_REQUEST_BYTES = REQUEST.size


class Handler(Protocol):
    """Whoever acts on what the client says."""

    def client_flags(self, flags: int) -> None:
        """The first thing a client sends."""

    def option(self, code: int, data: bytes) -> None:
        """One option."""

    def request(
        self, flags: int, command: int, cookie: int, offset: int, length: int, payload: bytes | bytearray | None
    ) -> None:
        """One request; a payload only with a write, and then of ``length`` bytes."""


class Decoder:
    """One direction of one connection."""

    __slots__ = (
        "_body",
        "_body_end",
        "_body_view",
        "_buffer",
        "_end",
        "_greeted",
        "_handler",
        "_head",
        "_start",
        "_view",
        "blocked",
        "transmission",
    )

    def __init__(self, handler: Handler, *, greeted: bool = False, receive_bytes: int = RECEIVE_BYTES) -> None:
        """
        :param greeted: the client's flags came already (after STARTTLS).
        """
        assert receive_bytes >= COPY_BYTES_MAX + OPTION_HEAD.size + _ROOM_BYTES, receive_bytes
        self._handler = handler
        self._buffer = bytearray(receive_bytes)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._greeted = greeted
        self.blocked = False
        self.transmission = False  # set by the handler of the option that ends the negotiation
        self._body: bytearray | None = None
        self._body_view = self._view
        self._body_end = 0  # bytes of the body that are there
        self._head: tuple[int, int, int, int, int, int] = (0, 0, 0, 0, 0, 0)

    def get_buffer(self, size_hint: int = 0) -> memoryview:
        """Where the next bytes belong."""
        if self._body is not None:
            return self._body_view[self._body_end :]
        return self._view[self._end :]

    def received(self, count: int) -> None:
        """``count`` bytes are in the buffer.

        :raises ProtocolViolation: the connection must be closed.
        """
        body = self._body
        if body is None:
            self._end += count
        else:
            self._body_end += count
            if self._body_end < len(body):
                return
            self._body = None
            self._body_view = self._view
            _, flags, command, cookie, offset, length = self._head
            self._handler.request(flags, command, cookie, offset, length, body)
        self.pump()

    def pump(self) -> None:
        """Everything complete was handed on, unless ``blocked``.

        :raises ProtocolViolation: as ``received``.
        """
        if self._body is not None:
            return
        while not self.blocked:
            if self.transmission:
                self._requests()
                break
            if not self._negotiation():
                break
        start, end = self._start, self._end
        if start == end:
            self._start = self._end = 0
        elif len(self._buffer) - end < _ROOM_BYTES or self.blocked:
            self._buffer[: end - start] = self._buffer[start:end]
            self._start, self._end = 0, end - start

    @property
    def waiting(self) -> int:
        """Bytes received and not yet handed on."""
        return self._end - self._start

    def drop(self) -> None:
        """What was received is forgotten and nothing more is handed on."""
        self.blocked = True
        self._start = self._end = 0
        self._body = None
        self._body_view = self._view

    def _negotiation(self) -> bool:
        """One message of the negotiation was handed on; False if it is not complete."""
        start, there = self._start, self._end - self._start
        if not self._greeted:
            if there < CLIENT_FLAGS.size:
                return False
            (flags,) = CLIENT_FLAGS.unpack_from(self._buffer, start)
            if flags > HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES:  # ~ of such flags is not what it seems
                raise ProtocolViolation(f"client flags 0x{flags:x}")
            self._start += CLIENT_FLAGS.size
            self._greeted = True
            self._handler.client_flags(flags)
            return True
        if there < OPTION_HEAD.size:
            return False
        magic, code, length = OPTION_HEAD.unpack_from(self._buffer, start)
        if magic != OPTION_MAGIC:
            raise ProtocolViolation("an option without its magic")
        if length > OPTION_BYTES_MAX:
            raise ProtocolViolation(f"option {code} with {length} bytes of data")
        end = start + OPTION_HEAD.size + length
        if end > self._end:
            return False
        data = bytes(self._view[start + OPTION_HEAD.size : end])
        self._start = end
        self._handler.option(code, data)
        return True

    def _requests(self) -> None:
        buffer, view, handle = self._buffer, self._view, self._handler.request
        unpack = REQUEST.unpack_from
        start, end = self._start, self._end
        while end - start >= _REQUEST_BYTES and not self.blocked:
            head = unpack(buffer, start)
            magic, flags, command, cookie, offset, length = head
            if magic != REQUEST_MAGIC:
                raise ProtocolViolation("a request without its magic")
            body_start = start + _REQUEST_BYTES
            if command != CMD_WRITE:
                self._start = start = body_start
                handle(flags, command, cookie, offset, length, None)
                continue
            body_end = body_start + length
            if length <= COPY_BYTES_MAX:
                if body_end > end:
                    return
                self._start = start = body_end
                handle(flags, command, cookie, offset, length, bytes(view[body_start:body_end]))
                continue
            if length > REQUEST_BYTES_MAX:
                raise ProtocolViolation(f"a write of {length} bytes")
            body = bytearray(length)
            have = min(end, body_end) - body_start
            body[:have] = view[body_start : body_start + have]
            self._start = start = body_start + have
            if have == length:
                handle(flags, command, cookie, offset, length, body)
                continue
            self._head = head
            self._body = body
            self._body_view = memoryview(body)
            self._body_end = have
            return
