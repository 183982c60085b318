"""The front end: listens, keeps the clients, and closes everything at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import anyio
import anyio.abc

from sheepdog import api
from sheepdog.api import Channel, ConfigError, FrontEnd, FrontEndContext, Receiver, SheepdogError, Volume
from sheepdog_frontend_nbd import protocol
from sheepdog_frontend_nbd.connection import Connection
from sheepdog_frontend_nbd.negotiation import Negotiation
from sheepdog_frontend_nbd.options import Options

if TYPE_CHECKING:
    from anyio.abc import TaskStatus

logger = logging.getLogger(__name__)

NEGOTIATION_S = 30.0  # then a client that has not chosen an export is disconnected
SWEEP_S = 5.0
STOP_S = 5.0  # for requests in flight when the front end ends


class NbdFrontEnd(FrontEnd):
    """Serves volumes as NBD exports."""

    def __init__(self, options: Options) -> None:
        if options.tls is not None and not hasattr(api, "TlsChannel"):
            raise ConfigError("nbd: this version of sheepdog-core offers no TLS")
        self._options = options

    async def serve(self, context: FrontEndContext, *, task_status: TaskStatus[tuple[str, ...]]) -> None:
        refused: SheepdogError | None = None  # raised outside of the group, which would wrap it
        async with anyio.create_task_group() as group:
            server = _Server(self._options, context, group)
            try:
                listener = await context.services.transport.listen(self._options.address, server.accept)
            except SheepdogError as error:
                refused = error
            else:
                try:
                    logger.info("nbd listens on %s", ", ".join(listener.addresses))
                    task_status.started(tuple(listener.addresses))
                    await server.sweep()
                finally:
                    with anyio.CancelScope(shield=True):
                        await listener.aclose()
                        await server.stop()
        if refused is not None:
            raise refused


class _Server:
    """The clients of one listening front end."""

    def __init__(self, options: Options, context: FrontEndContext, group: anyio.abc.TaskGroup) -> None:
        self._options = options
        self._clock = context.services.clock
        self._volumes = context.volumes
        self._group = group
        # Dictionaries keep the order of arrival, so everything is closed in the same order each time.
        self._clients: dict[_Client, None] = {}
        self._all_gone: anyio.Event | None = None

    def accept(self, channel: Channel) -> Receiver:
        if len(self._clients) >= self._options.connections_max or self._all_gone is not None:
            logger.warning("nbd client %s is refused: %d are connected", channel.remote, len(self._clients))
            channel.abort()
            return _Nobody()
        client = _Client(self, channel, self._clock.monotonic())
        self._clients[client] = None
        offered = self._options.tls is not None
        client.connection = self._connection(client, channel, offered=offered)
        channel.write([protocol.greeting()])
        if not offered:
            return client.connection
        client.receiver = client.connection
        return client

    def _connection(self, client: _Client, channel: Channel, *, offered: bool, zeroes: bool = True) -> Connection:
        """A connection that negotiates.

        :param offered: it may be upgraded to TLS; False where that has happened, or cannot.
        """
        upgraded = not offered and self._options.tls is not None
        connection = Connection(channel, client.ended, greeted=upgraded)
        Negotiation(
            connection,
            self._volumes,
            self.spawn,
            read_only=self._options.read_only,
            start_tls=(lambda: self._start_tls(client, connection)) if offered else None,
            tls_missing=offered and self._options.tls_required,
            tls_active=upgraded,
            zeroes=zeroes,
        )
        return connection

    def _start_tls(self, client: _Client, plain: Connection) -> None:
        zeroes = plain.negotiation.zeroes
        if plain.retire():
            # Whoever is in the middle could have put them there, to be taken for a part of the protected talk.
            logger.info("nbd client %s is disconnected: bytes between STARTTLS and its answer", client.channel.remote)
            client.channel.abort()
            client.receiver = _Gone(client)
            return

        def protected(channel: Channel) -> Receiver:
            client.connection = self._connection(client, channel, offered=False, zeroes=zeroes)
            return client.connection

        def failed(error: Exception) -> None:
            logger.info("nbd client %s: %s", client.channel.remote, error)
            self.gone(client)

        assert self._options.tls is not None, "STARTTLS is offered only with a certificate"
        client.receiver = api.TlsChannel(client.channel, self._options.tls, protected, server_side=True, failed=failed)

    def spawn(self, action: Callable[[], Coroutine[Any, Any, None]]) -> None:  # Any: types that nobody uses
        self._group.start_soon(action)

    def gone(self, client: _Client) -> None:
        """The client's connection has ended and none of its requests is in flight."""
        if client not in self._clients:
            return
        volume = client.take_volume()
        if volume is not None:
            self.spawn(lambda: self._close(client, volume))
        else:
            self._forget(client)

    async def _close(self, client: _Client, volume: Volume) -> None:
        try:
            with anyio.CancelScope(shield=True):
                await volume.aclose()
        except SheepdogError as error:
            logger.warning("cannot close %s: %s", volume.info.name, error)
        finally:
            self._forget(client)

    def _forget(self, client: _Client) -> None:
        self._clients.pop(client, None)
        if self._all_gone is not None and not self._clients:
            self._all_gone.set()

    async def sweep(self) -> None:
        """Disconnects clients that never come to the point."""
        while True:
            await anyio.sleep(SWEEP_S)
            now = self._clock.monotonic()
            for client in tuple(self._clients):
                if client.negotiating and now - client.since > NEGOTIATION_S:
                    logger.info("nbd client %s is disconnected: it chose no export in time", client.channel.remote)
                    client.channel.abort()

    async def stop(self) -> None:
        """Every client is disconnected, its requests answered if that does not take too long, its volume closed."""
        self._all_gone = anyio.Event()
        if not self._clients:
            return
        for client in tuple(self._clients):
            client.stop()
        with anyio.move_on_after(STOP_S):
            await self._all_gone.wait()
        for client in tuple(self._clients):
            client.channel.abort()
        with anyio.move_on_after(STOP_S):
            await self._all_gone.wait()
        for client in tuple(self._clients):  # requests that never end
            volume = client.take_volume()
            if volume is not None:
                await self._close(client, volume)
        self._clients.clear()


class _Client:
    """One client, and (where TLS is offered) the receiver of its bytes, which changes when TLS begins."""

    __slots__ = ("_server", "channel", "connection", "receiver", "since")

    connection: Connection
    receiver: Receiver

    def __init__(self, server: _Server, channel: Channel, since: float) -> None:
        self._server = server
        self.channel = channel
        self.since = since

    @property
    def negotiating(self) -> bool:
        return not self.connection.decoder.transmission

    def take_volume(self) -> Volume | None:
        """The volume that is open for this client, which is not any more."""
        volume, self.connection.volume = self.connection.volume, None
        return volume

    def ended(self, connection: Connection) -> None:
        self._server.gone(self)

    def stop(self) -> None:
        if self.connection.retired:
            self.channel.abort()  # in the middle of a TLS handshake
        else:
            self.connection.stop()

    def get_buffer(self, size_hint: int) -> memoryview:
        return self.receiver.get_buffer(size_hint)

    def buffer_updated(self, count: int) -> None:
        self.receiver.buffer_updated(count)

    def closed(self, error: Exception | None) -> None:
        self.receiver.closed(error)

    def writable(self) -> None:
        self.receiver.writable()


class _Nobody:
    """The receiver of a connection that is being refused."""

    def __init__(self) -> None:
        self._view = memoryview(bytearray(1024))

    def get_buffer(self, size_hint: int) -> memoryview:
        return self._view

    def buffer_updated(self, count: int) -> None:
        """Nobody listens."""

    def closed(self, error: Exception | None) -> None:
        """Nobody minds."""

    def writable(self) -> None:
        """Nothing is written."""


class _Gone(_Nobody):
    """The receiver of a client that is being disconnected."""

    def __init__(self, client: _Client) -> None:
        super().__init__()
        self._client = client

    def closed(self, error: Exception | None) -> None:
        self._client.ended(self._client.connection)
