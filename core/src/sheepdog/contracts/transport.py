"""The transport contract: callbacks in, buffers out.

A transport moves bytes between two processes and knows nothing of frames. The receiver (core's codec) hands out the
buffer that the next bytes land in, so a 4 MiB body is received where it is needed. Everything here is called on the
event loop's thread; nothing here blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

# ("tcp", host, port) is written "host:port" or "[v6]:port"; a Unix socket is written "unix:/path".
Address: TypeAlias = str


class Receiver(Protocol):
    """What core gives a transport for each connection. Calls never overlap."""

    def get_buffer(self, size_hint: int) -> memoryview:
        """A writable, non-empty buffer for the next bytes. Valid until the next ``buffer_updated``."""

    def buffer_updated(self, count: int) -> None:
        """``count`` (>= 1) bytes are in the buffer that ``get_buffer`` returned last. Never raises."""

    def closed(self, error: Exception | None) -> None:
        """The connection is gone, exactly once, and nothing else follows. ``None`` means an orderly end."""

    def writable(self) -> None:
        """A channel that was congested has drained below its low-water mark."""


class Channel(ABC):
    """One connection, as core sees it."""

    @abstractmethod
    def write(self, buffers: Sequence[Buffer]) -> None:
        """Queue the buffers in order, as if joined. Never blocks, never raises; ignored after the end.

        The channel owns every buffer until it was sent: the caller must not change them any more.
        """

    @property
    @abstractmethod
    def congested(self) -> bool:
        """More than the high-water mark is queued. Core then stops reading from whoever causes the writes."""

    @abstractmethod
    def pause_reading(self) -> None:
        """No more ``buffer_updated`` until ``resume_reading``. Repeating it is harmless."""

    @abstractmethod
    def resume_reading(self) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """End after everything queued was sent. ``closed(None)`` follows later, not from inside this call."""

    @abstractmethod
    def abort(self) -> None:
        """End now; what is queued is lost. ``closed(...)`` follows later, not from inside this call."""

    @property
    @abstractmethod
    def remote(self) -> Address:
        """The other side, for logs."""

    @property
    @abstractmethod
    def local(self) -> Address: ...


Accept: TypeAlias = Callable[[Channel], Receiver]


class Listener(ABC):
    """A listening socket. Connections already accepted outlive it."""

    @property
    @abstractmethod
    def addresses(self) -> tuple[Address, ...]:
        """Where it listens, with the real port when port 0 was asked for."""

    @abstractmethod
    async def aclose(self) -> None:
        """Stops accepting."""


class Transport(ABC):
    """Makes connections. Used inside one running event loop."""

    @abstractmethod
    async def connect(self, address: Address, make_receiver: Accept) -> Channel:
        """A connection is open; ``make_receiver(channel)`` was called and receives its bytes.

        The caller puts a deadline around it; cancelled, it leaves nothing open.

        :raises TransportError: refused, unreachable or not understood.
        """

    @abstractmethod
    async def listen(self, address: Address, accept: Accept) -> Listener:
        """``accept(channel)`` is called for each new connection and returns its receiver.

        :raises TransportError: the address is in use or cannot be bound.
        """

    async def aclose(self) -> None:
        """Everything this transport opened is closed. Called once, at the end."""
