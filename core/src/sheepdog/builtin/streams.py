"""A transport out of any anyio byte stream.

For event loops without protocols (trio) and for third parties who have a stream and no wish to write callbacks: give
``StreamTransport`` one function that opens a stream and one that opens listeners. Each connection is one task with a
pump for each direction; all of them live in a task group that the transport owns and that ends in ``aclose``. Costs
some 20-40 µs for each message, where the protocol of ``builtin.tcp`` costs 2-4.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import anyio
import anyio.abc

from sheepdog.api import Accept, Address, Buffer, Channel, Listener, Receiver, Transport, TransportError

logger = logging.getLogger(__name__)

KiB = 1024
RECEIVE_BYTES = 256 * KiB
HIGH_WATER_BYTES = 1024 * KiB
LOW_WATER_BYTES = 256 * KiB
JOIN_BYTES = 64 * KiB  # small buffers leave joined, up to this much
CLEANUP_S = 5.0
KEEPALIVE = {socket.TCP_KEEPIDLE: 15, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 3}
UNACKED_S = 10  # the other host has not even confirmed that packets arrived; that of a stopped process does
ACCEPT_RETRY_S = 0.1  # after a failed accept, usually for lack of file descriptors


def split_address(address: Address) -> tuple[str, int, str | None]:
    """(host, port, None) of a TCP address, ('', 0, path) of a Unix one. An empty host means every interface.

    :raises TransportError: not understood.
    """
    if address.startswith("unix:"):
        if path := address.removeprefix("unix:"):
            return "", 0, path
        raise TransportError("address 'unix:' names no path")
    host, colon, port_text = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise TransportError(f"address {address!r}: an IPv6 address is written [address]:port")
    if not colon or not port_text.isascii() or not port_text.isdigit() or int(port_text) > 0xFFFF:
        raise TransportError(f"address {address!r} is not host:port, [v6]:port or unix:/path")
    return host, int(port_text), None


def join_address(host: str, port: int) -> Address:
    """'host:port', with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class HasOptions(Protocol):
    """A socket, or what an event loop gives out for one."""

    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...


def tune_socket(sock: HasOptions, *, outgoing: bool) -> None:
    """What every TCP connection between programs of a cluster should have.

    :param outgoing: we connected to a server, whose silence keeps requests waiting.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A host that lost its power sends no farewell: its connections end after half a minute of silence.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, option, seconds)
    if outgoing:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKED_S * 1000)


def _tune_stream(stream: anyio.abc.ByteStream, *, outgoing: bool) -> None:
    sock = stream.extra(anyio.abc.SocketAttribute.raw_socket, None)
    if sock is not None and sock.family != socket.AF_UNIX:
        tune_socket(sock, outgoing=outgoing)


class TaskHome:
    """A task group with an owner of its own, for an object that lives as long as the event loop pleases.

    Opened by the first ``group()``, closed by ``aclose()``. A task started in it must not let an exception out.
    """

    def __init__(self) -> None:
        self._group: anyio.abc.TaskGroup | None = None
        self._ended: anyio.Event | None = None
        self._owner: object = None  # asyncio keeps only weak references to its tasks

    async def group(self) -> anyio.abc.TaskGroup:
        if self._group is None:
            ready = anyio.Event()
            self._ended = anyio.Event()
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:
                import trio

                trio.lowlevel.spawn_system_task(self._hold, ready)
            else:
                self._owner = loop.create_task(self._hold(ready))
            await ready.wait()
        assert self._group is not None
        return self._group

    async def _hold(self, ready: anyio.Event) -> None:
        assert self._ended is not None
        try:
            async with anyio.create_task_group() as group:
                if self._group is None:
                    self._group = group
                ready.set()
                await anyio.sleep_forever()
        finally:
            self._ended.set()

    async def aclose(self) -> None:
        """Every task of the group has ended."""
        if self._group is not None and self._ended is not None:
            self._group.cancel_scope.cancel()
            with anyio.move_on_after(CLEANUP_S, shield=True):
                await self._ended.wait()


def call_soon(action: Callable[[], None]) -> None:
    """``action()`` runs in one of the next turns of the running event loop, asyncio's or trio's."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        import trio

        trio.lowlevel.current_trio_token().run_sync_soon(action)
    else:
        loop.call_soon(action)


class StreamChannel(Channel):
    """A channel over a byte stream. Nothing moves until ``run`` does."""

    def __init__(self, stream: anyio.abc.ByteStream, local: Address, remote: Address) -> None:
        self._stream = stream
        self._local = local
        self._remote = remote
        self._queue: list[Buffer] = []
        self._queued_bytes = 0
        self._congested = False
        self._closing = False  # nothing more is queued or received
        self._aborted = False
        self._paused = False
        self._written = anyio.Event()  # something was queued, or the channel is closing
        self._resumed = anyio.Event()
        self._scope: anyio.CancelScope | None = None
        self._error: Exception | None = None

    def write(self, buffers: Sequence[Buffer]) -> None:
        if self._closing:
            return
        self._queue.extend(buffers)
        self._queued_bytes += sum(map(len, buffers))
        if self._queued_bytes > HIGH_WATER_BYTES:
            self._congested = True
        self._written.set()

    @property
    def congested(self) -> bool:
        return self._congested

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        if self._paused:
            self._paused = False
            self._resumed.set()

    def close(self) -> None:
        self._closing = True
        self._written.set()
        self._resumed.set()

    def abort(self) -> None:
        self._aborted = True
        self._queue = []
        self.close()
        if self._scope is not None:
            self._scope.cancel()

    @property
    def remote(self) -> Address:
        return self._remote

    @property
    def local(self) -> Address:
        return self._local

    async def run(self, receiver: Receiver) -> None:
        """Moves bytes until the connection ends, then tells ``receiver``. Cancelled, the connection is aborted."""
        try:
            async with anyio.create_task_group() as group:
                self._scope = group.cancel_scope
                if self._aborted:
                    group.cancel_scope.cancel()
                group.start_soon(self._guarded, self._receive, receiver, group.cancel_scope)
                group.start_soon(self._guarded, self._send, receiver, group.cancel_scope)
        finally:
            self._closing = self._aborted = True
            self._congested = False
            self._queue = []
            with anyio.CancelScope(shield=True), suppress(Exception):
                await anyio.aclose_forcefully(self._stream)
            try:
                receiver.closed(self._error)
            except Exception:
                logger.exception("the receiver of %s failed", self._remote)

    async def _guarded(
        self, pump: Callable[[Receiver], Awaitable[None]], receiver: Receiver, scope: anyio.CancelScope
    ) -> None:
        try:
            await pump(receiver)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, OSError) as error:
            lost = TransportError(f"the connection to {self._remote} broke: {error.__cause__ or error}")
            lost.__cause__ = error
            self._error = lost
            scope.cancel()
        except Exception:
            logger.exception("the receiver of %s failed", self._remote)
            scope.cancel()

    async def _receive(self, receiver: Receiver) -> None:
        while not self._closing:
            if not await self._reading():
                return
            try:
                data = memoryview(await self._stream.receive(RECEIVE_BYTES))
            except anyio.EndOfStream:
                self.close()  # what is queued is sent first
                return
            while data:
                if not await self._reading():
                    return
                target = receiver.get_buffer(len(data))
                count = min(len(target), len(data))
                target[:count] = data[:count]
                receiver.buffer_updated(count)
                data = data[count:]

    async def _reading(self) -> bool:
        """Waits while reading is paused; False when the channel closes."""
        while self._paused and not self._closing:
            self._resumed = anyio.Event()
            await self._resumed.wait()
        return not self._closing

    async def _send(self, receiver: Receiver) -> None:
        while True:
            while not self._queue:
                if self._closing:
                    assert self._scope is not None
                    self._scope.cancel()
                    return
                self._written = anyio.Event()
                await self._written.wait()
            queue, self._queue = self._queue, []
            small: list[Buffer] = []
            small_bytes = 0
            for buffer in queue:
                if small_bytes + len(buffer) <= JOIN_BYTES:
                    small.append(buffer)
                    small_bytes += len(buffer)
                    continue
                await self._send_joined(small, small_bytes, receiver)
                small, small_bytes = [buffer], len(buffer)
            await self._send_joined(small, small_bytes, receiver)

    async def _send_joined(self, buffers: list[Buffer], count: int, receiver: Receiver) -> None:
        if count:
            await self._stream.send(b"".join(buffers))
        self._queued_bytes -= count
        if self._congested and self._queued_bytes < LOW_WATER_BYTES:
            self._congested = False
            receiver.writable()


@dataclass(frozen=True, slots=True)
class StreamListening:
    """One listener of a ``ListenStreams``. ``forget`` is called once, after it was closed."""

    listener: anyio.abc.Listener[anyio.abc.ByteStream]
    address: Address
    forget: Callable[[], None] = lambda: None


ConnectStream: TypeAlias = Callable[[Address], Awaitable[tuple[anyio.abc.ByteStream, Address, Address]]]
"""Opens a stream: (stream, local address, remote address). Raises TransportError; cancelled, it leaves nothing open."""
ListenStreams: TypeAlias = Callable[[Address], Awaitable[Sequence[StreamListening]]]
"""Opens listeners. Raises TransportError."""
RemoteOf: TypeAlias = Callable[[anyio.abc.ByteStream], Address]


def remote_of_socket(stream: anyio.abc.ByteStream) -> Address:
    """The peer's address if the stream has a socket below it."""
    name = stream.extra(anyio.abc.SocketAttribute.remote_address, None)
    return join_address(str(name[0]), int(name[1])) if isinstance(name, tuple) else f"unix:{name or ''}"


class StreamListener(Listener):
    def __init__(self, listening: Sequence[StreamListening]) -> None:
        self._listening = tuple(listening)
        self._open = list(listening)
        self.scope = anyio.CancelScope()

    @property
    def addresses(self) -> tuple[Address, ...]:
        return tuple(listening.address for listening in self._listening)

    async def aclose(self) -> None:
        self.scope.cancel()
        with anyio.move_on_after(CLEANUP_S, shield=True):
            while self._open:
                listening = self._open.pop(0)
                await listening.listener.aclose()
                listening.forget()


class StreamTransport(Transport):
    """Connections are streams that ``connect`` opens and the listeners of ``listen`` accept."""

    def __init__(self, connect: ConnectStream, listen: ListenStreams, remote_of: RemoteOf = remote_of_socket) -> None:
        self._connect = connect
        self._listen = listen
        self._remote_of = remote_of
        self._home = TaskHome()
        self._listeners: list[StreamListener] = []

    async def connect(self, address: Address, make_receiver: Accept) -> Channel:
        group = await self._home.group()
        stream, local, remote = await self._connect(address)
        _tune_stream(stream, outgoing=True)
        # No await from here on: a cancelled call leaves nothing open.
        channel = StreamChannel(stream, local, remote)
        group.start_soon(self._run, channel, make_receiver(channel))
        return channel

    async def listen(self, address: Address, accept: Accept) -> Listener:
        group = await self._home.group()
        listener = StreamListener(await self._listen(address))
        self._listeners.append(listener)
        group.start_soon(self._accept, listener, accept, group)
        return listener

    async def aclose(self) -> None:
        for listener in self._listeners:
            await listener.aclose()
        await self._home.aclose()

    async def _accept(self, listener: StreamListener, accept: Accept, group: anyio.abc.TaskGroup) -> None:
        with listener.scope:
            async with anyio.create_task_group() as serving:
                for listening in listener._listening:
                    serving.start_soon(self._serve, listening, accept, group)

    async def _serve(self, listening: StreamListening, accept: Accept, group: anyio.abc.TaskGroup) -> None:
        async def accepted(stream: anyio.abc.ByteStream) -> None:
            _tune_stream(stream, outgoing=False)
            channel = StreamChannel(stream, listening.address, self._remote_of(stream))
            try:
                receiver = accept(channel)
            except Exception:
                logger.exception("connection from %s was not accepted", channel.remote)
                await anyio.aclose_forcefully(stream)
                return
            await self._run(channel, receiver)

        while True:
            try:
                await listening.listener.serve(accepted, group)
            except anyio.ClosedResourceError:
                return
            except Exception as error:
                logger.warning("cannot accept connections on %s: %s", listening.address, error)
                await anyio.sleep(ACCEPT_RETRY_S)

    async def _run(self, channel: StreamChannel, receiver: Receiver) -> None:
        try:
            await channel.run(receiver)
        except Exception:
            logger.exception("connection with %s failed", channel.remote)
