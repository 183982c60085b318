"""TLS between a channel and its receiver, without I/O of its own.

``TlsChannel`` is the receiver of a plain channel and the channel of the receiver above it; records are made and read in
memory (``ssl.MemoryBIO``), so it works on every event loop and over every transport. It can start with the connection
(``TlsTransport`` wraps a whole transport) or in mid-stream, as NBD's STARTTLS does: put a ``Switch`` between the
channel and whoever negotiates, and point it at a ``TlsChannel`` when both sides have agreed.

Bounded: at most a few receives' worth of records waits undecoded while reading is paused; what is written goes straight
to the plain channel, whose congestion is ours.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Sequence

import anyio

from sheepdog.api import Accept, Address, Buffer, Channel, Listener, Receiver, Transport, TransportError
from sheepdog.builtin.streams import call_soon, split_address

logger = logging.getLogger(__name__)

KiB = 1024
RECEIVE_BYTES = 64 * KiB
RECORD_BYTES = 16 * KiB  # the most that TLS puts into one record
LEFTOVER_BYTES_MAX = 256 * KiB


class Switch:
    """A receiver that passes everything on to another one, which may be exchanged between two calls."""

    __slots__ = ("receiver",)

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver

    def get_buffer(self, size_hint: int) -> memoryview:
        return self.receiver.get_buffer(size_hint)

    def buffer_updated(self, count: int) -> None:
        self.receiver.buffer_updated(count)

    def closed(self, error: Exception | None) -> None:
        self.receiver.closed(error)

    def writable(self) -> None:
        self.receiver.writable()


class TlsChannel(Channel):
    """TLS over ``plain``, whose receiver this is.

    When the handshake is done, ``accept(self)`` makes the receiver above, which hears only decrypted bytes; the channel
    is not used before. An end without TLS's own farewell is a ``TransportError`` in that receiver's ``closed``.

    :param server_hostname: the name that the certificate must carry; clients only.
    :param failed: called once, instead of ``accept``, when the handshake fails or the connection ends before that.
    """

    def __init__(
        self,
        plain: Channel,
        context: ssl.SSLContext,
        accept: Accept,
        *,
        server_side: bool,
        server_hostname: str | None = None,
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        self._plain = plain
        self._accept = accept
        self._failed = failed
        if context.protocol is ssl.PROTOCOL_TLS_SERVER:
            # Nobody resumes sessions here. A ticket that comes when the client has closed makes its system reset the
            # connection, and what it sent last is lost on the way.
            context.num_tickets = 0
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=server_hostname
        )
        self._view = memoryview(bytearray(RECEIVE_BYTES))
        self._receiver: Receiver | None = None
        self._paused = False
        self._stepping = False
        self._closing = False  # nothing more is written or received
        self._farewell = False  # the other side said that it is done, or we closed
        self._ended = False
        self._error: Exception | None = None
        self._step()  # a client speaks first

    # what the receiver above uses

    def write(self, buffers: Sequence[Buffer]) -> None:
        if self._closing or self._receiver is None:
            return
        # Small buffers share a record: each record costs 22 bytes and a pass of the cipher.
        small: list[Buffer] = []
        small_bytes = 0
        for buffer in buffers:
            if small_bytes + len(buffer) > RECORD_BYTES:
                self._encrypt(b"".join(small))
                small, small_bytes = [], 0
            if len(buffer) > RECORD_BYTES:
                self._encrypt(buffer)
            else:
                small.append(buffer)
                small_bytes += len(buffer)
        self._encrypt(b"".join(small))
        self._send_records()

    @property
    def congested(self) -> bool:
        return self._plain.congested

    def pause_reading(self) -> None:
        if not self._closing:
            self._paused = True
            self._plain.pause_reading()

    def resume_reading(self) -> None:
        if self._paused:
            self._paused = False
            # What was received before the pause is handed over later: calls to a receiver never overlap.
            call_soon(self._resume)

    def close(self) -> None:
        if not self._closing:
            self._closing = self._farewell = True
            self._say_farewell()
            self._plain.close()

    def abort(self) -> None:
        self._closing = self._farewell = True
        self._plain.abort()

    @property
    def remote(self) -> Address:
        return self._plain.remote

    @property
    def local(self) -> Address:
        return self._plain.local

    def peer_certificate(self) -> dict[str, object] | None:
        """The other side's verified certificate as ``ssl`` shows it; ``None`` if it sent none."""
        return dict(self._tls.getpeercert() or {}) or None

    # what the channel below calls

    def get_buffer(self, size_hint: int) -> memoryview:
        return self._view

    def buffer_updated(self, count: int) -> None:
        self.feed(self._view[:count])

    def feed(self, data: Buffer) -> None:
        """``data`` came from the other side. Used directly for bytes that came in one receive with the upgrade."""
        self._incoming.write(data)
        self._step()
        if self._incoming.pending > LEFTOVER_BYTES_MAX:
            self._fail(TransportError(f"{self.remote} sends although it was not read from"))

    def writable(self) -> None:
        if self._receiver is not None:
            self._receiver.writable()

    def closed(self, error: Exception | None) -> None:
        if self._ended:
            return
        self._ended = self._closing = True
        if error is None and not self._farewell:
            error = TransportError(f"{self.remote} ended the connection without ending TLS")
        error = self._error or error
        if self._receiver is not None:
            self._receiver.closed(error)
        elif self._failed is not None:
            self._failed(error or TransportError(f"the TLS handshake with {self.remote} was given up"))

    # the engine

    def _step(self) -> None:
        """Whatever can go on with the bytes at hand has gone on."""
        if self._stepping or self._closing:
            return
        self._stepping = True
        try:
            if self._receiver is None:
                self._tls.do_handshake()
                self._send_records()
                self._receiver = self._accept(self)
            self._decrypt(self._receiver)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self._fail(error)
        finally:
            self._stepping = False
        self._send_records()

    def _decrypt(self, receiver: Receiver) -> None:
        while not self._paused and not self._closing and (self._incoming.pending or self._tls.pending()):
            target = receiver.get_buffer(RECORD_BYTES)
            try:
                count = int(self._tls.read(len(target), target))  # with a buffer, read returns the count of bytes
            except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                count = 0
            if not count:
                self.close()  # the other side is done; so are we
                return
            receiver.buffer_updated(count)

    def _resume(self) -> None:
        if not self._paused and not self._closing:
            self._plain.resume_reading()
            self._step()

    def _encrypt(self, data: Buffer) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._tls.write(rest) :]
        except ssl.SSLError as error:
            self._fail(error)

    def _send_records(self) -> None:
        if self._outgoing.pending:
            self._plain.write([self._outgoing.read()])

    def _say_farewell(self) -> None:
        try:
            self._tls.unwrap()
        except (ssl.SSLError, ValueError):
            pass  # it waits for the other side's farewell, which nobody needs, or the handshake is not done
        self._send_records()

    def _fail(self, error: Exception) -> None:
        if self._error is None and not self._closing:
            if not isinstance(error, TransportError):
                what = "handshake" if self._receiver is None else "connection"
                failure = TransportError(f"TLS {what} with {self.remote} failed: {error}")
                failure.__cause__ = error
                error = failure
            self._error = error
            self._closing = True
            self._send_records()  # the alert tells the other side why
            self._plain.close()


class TlsTransport(Transport):
    """Every connection of ``inner`` is TLS from its first byte; receivers are made when the handshake is done.

    :param client: for connections that we make; ``None`` if we make none.
    :param server: for connections that we accept; ``None`` if we accept none.
    """

    def __init__(self, inner: Transport, client: ssl.SSLContext | None, server: ssl.SSLContext | None) -> None:
        self._inner = inner
        self._client = client
        self._server = server

    async def connect(self, address: Address, make_receiver: Accept) -> Channel:
        context = self._client
        if context is None:
            raise TransportError("no TLS settings for outgoing connections")
        host = split_address(address)[0] or "localhost"
        decided = anyio.Event()
        errors: list[Exception] = []
        channels: list[Channel] = []

        def established(channel: Channel) -> Receiver:
            channels.append(channel)
            decided.set()
            return make_receiver(channel)

        def failed(error: Exception) -> None:
            errors.append(error)
            decided.set()

        def wrap(plain: Channel) -> Receiver:
            return TlsChannel(plain, context, established, server_side=False, server_hostname=host, failed=failed)

        plain = await self._inner.connect(address, wrap)
        try:
            await decided.wait()
        except BaseException:
            plain.abort()
            raise
        if errors:
            raise errors[0]
        return channels[0]

    async def listen(self, address: Address, accept: Accept) -> Listener:
        context = self._server
        if context is None:
            raise TransportError("no TLS settings for incoming connections")

        def failed(error: Exception) -> None:
            logger.info("connection refused: %s", error)

        def wrap(plain: Channel) -> Receiver:
            return TlsChannel(plain, context, accept, server_side=True, failed=failed)

        return await self._inner.listen(address, wrap)

    async def aclose(self) -> None:
        await self._inner.aclose()
