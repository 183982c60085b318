"""Conformance kit of the transport contract.

A plugin's test file subclasses ``TransportKit`` and supplies the fixture ``transport`` (and ``listen_address`` and
``dead_address`` if "127.0.0.1:0" and a closed TCP port do not fit); it inherits a check for every sentence of the
contract. Every check runs on the event loops that the fixture ``anyio_backend`` lists::

    class TestMine(TransportKit):
        @pytest.fixture
        async def transport(self, anyio_backend):
            transport = MyTransport()
            yield transport
            await transport.aclose()

Checks wait for conditions with a deadline (``until``) and never sleep for luck.
"""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import anyio
import anyio.lowlevel
import pytest

from sheepdog.contracts.transport import Address, Channel, Listener, Transport
from sheepdog.errors import TransportError

DEADLINE_S = 20.0
KiB = 1024
MiB = 1024 * KiB

ASYNCIO = pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio")
UVLOOP = pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop")
TRIO = pytest.param(("trio", {}), id="trio")


async def until(condition: Callable[[], object], what: str = "the condition", deadline_s: float = DEADLINE_S) -> None:
    """``condition()`` is true. Fails the test when that takes longer than the deadline."""
    with anyio.move_on_after(deadline_s):
        while not condition():  # the condition is the tester's, nothing announces it
            await anyio.sleep(0.001)
        return
    raise AssertionError(f"after {deadline_s} s still waiting for {what}")


class RecordingReceiver:
    """Keeps everything that it is told and fails loudly when calls overlap or follow the end."""

    def __init__(self, channel: Channel, buffer_bytes: int = 64 * KiB) -> None:
        self.channel = channel
        self.data = bytearray()
        self.errors: list[Exception | None] = []  # of closed(): must have one entry at the end
        self.writable_count = 0
        self.faults: list[str] = []  # broken promises of the transport
        self.updates = 0
        self.on_data: Callable[[bytes], None] | None = None
        self.on_writable: Callable[[], None] | None = None
        self._buffer = bytearray(buffer_bytes)
        self._lent = False
        self._busy = False

    @property
    def ended(self) -> bool:
        return bool(self.errors)

    @contextmanager
    def calling(self, what: str) -> Iterator[None]:
        """Whatever the transport calls while this is open is a fault."""
        assert not self._busy, what
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _check(self, what: str) -> None:
        if self.errors:
            self.faults.append(f"{what} after closed()")
        if self._busy:
            self.faults.append(f"{what} from inside another call")

    def get_buffer(self, size_hint: int) -> memoryview:
        self._check("get_buffer")
        self._lent = True
        return memoryview(self._buffer)

    def buffer_updated(self, count: int) -> None:
        self._check("buffer_updated")
        if not self._lent:
            self.faults.append("buffer_updated without get_buffer")
        if not 1 <= count <= len(self._buffer):
            self.faults.append(f"buffer_updated({count}) for a buffer of {len(self._buffer)}")
        self._lent = False
        self.updates += 1
        piece = bytes(self._buffer[:count])
        self.data += piece
        if self.on_data is not None:
            with self.calling("buffer_updated"):
                self.on_data(piece)

    def closed(self, error: Exception | None) -> None:
        self._check("closed")
        self.errors.append(error)

    def writable(self) -> None:
        self._check("writable")
        self.writable_count += 1
        if self.on_writable is not None:
            with self.calling("writable"):
                self.on_writable()


class Server:
    """A listener that keeps the receivers of what it accepted."""

    def __init__(self) -> None:
        self.receivers: list[RecordingReceiver] = []
        self.on_accept: Callable[[RecordingReceiver], None] | None = None
        self.buffer_bytes = 64 * KiB
        self.listener: Listener

    @property
    def address(self) -> Address:
        return self.listener.addresses[0]

    def accept(self, channel: Channel) -> RecordingReceiver:
        receiver = RecordingReceiver(channel, self.buffer_bytes)
        self.receivers.append(receiver)
        if self.on_accept is not None:
            self.on_accept(receiver)
        return receiver


def _equal(wanted: int, current: Callable[[], int]) -> bool:
    return current() == wanted


def echo(receiver: RecordingReceiver) -> None:
    """``Server.on_accept``: everything received is sent back."""
    receiver.on_data = lambda piece: receiver.channel.write([piece])


def noise(count: int, seed: int = 1) -> bytes:
    """``count`` bytes without a pattern, the same for the same seed."""
    return random.Random(seed).randbytes(count)


@pytest.mark.anyio
class TransportKit:
    """One check for each promise of ``contracts/transport.py``."""

    large_bytes = 4 * MiB
    flood_bytes_max = 64 * MiB
    """A channel whose other side does not read is congested after at most this much was written."""

    @pytest.fixture(params=[ASYNCIO, UVLOOP, TRIO])
    def anyio_backend(self, request: pytest.FixtureRequest) -> object:
        return request.param

    @pytest.fixture
    async def transport(self, anyio_backend: object) -> Transport:
        raise AssertionError("a subclass of the kit supplies the fixture 'transport'")

    @pytest.fixture
    def listen_address(self) -> Address:
        return "127.0.0.1:0"

    @pytest.fixture
    def dead_address(self) -> Iterator[Address]:
        """An address where nobody listens."""
        with socket.socket() as bound:  # bound and not listening: refused, and nobody else can take it
            bound.bind(("127.0.0.1", 0))
            yield f"127.0.0.1:{bound.getsockname()[1]}"

    async def serve(self, transport: Transport, address: Address) -> Server:
        server = Server()
        server.listener = await transport.listen(address, server.accept)
        return server

    async def connect(self, transport: Transport, server: Server, buffer_bytes: int = 64 * KiB) -> RecordingReceiver:
        receivers: list[RecordingReceiver] = []

        def make(channel: Channel) -> RecordingReceiver:
            receivers.append(RecordingReceiver(channel, buffer_bytes))
            return receivers[0]

        with anyio.fail_after(DEADLINE_S):
            channel = await transport.connect(server.address, make)
        assert len(receivers) == 1 and receivers[0].channel is channel
        return receivers[0]

    async def pair(self, transport: Transport, address: Address) -> tuple[RecordingReceiver, RecordingReceiver]:
        """(client, server) ends of one connection."""
        server = await self.serve(transport, address)
        client = await self.connect(transport, server)
        await until(lambda: server.receivers, "the connection to be accepted")
        return client, server.receivers[0]

    # addresses

    async def test_addresses(self, transport: Transport, listen_address: Address) -> None:
        """A listener names a real address that can be connected to, and both ends know each other."""
        client, server = await self.pair(transport, listen_address)

        assert client.channel.remote and server.channel.remote
        assert client.channel.local and server.channel.local
        if not client.channel.remote.startswith("unix:"):
            assert client.channel.remote == server.channel.local
            assert not client.channel.remote.endswith(":0")

    async def test_refused(self, transport: Transport, dead_address: Address) -> None:
        """Where nobody listens, connect raises TransportError and makes no receiver."""
        made: list[Channel] = []

        def make(channel: Channel) -> RecordingReceiver:
            made.append(channel)
            return RecordingReceiver(channel)

        with anyio.fail_after(DEADLINE_S), pytest.raises(TransportError):
            await transport.connect(dead_address, make)

        assert made == []

    @pytest.mark.parametrize("address", ["nonsense", "host:port", "127.0.0.1:99999", "", "unix:"])
    async def test_not_understood(self, transport: Transport, address: Address) -> None:
        """An address that cannot be understood is a TransportError, in connect and in listen."""
        with pytest.raises(TransportError):
            await transport.connect(address, RecordingReceiver)
        with pytest.raises(TransportError):
            await transport.listen(address, RecordingReceiver)

    async def test_busy(self, transport: Transport, listen_address: Address) -> None:
        """A second listener on the same address is a TransportError, and the first goes on."""
        server = await self.serve(transport, listen_address)

        with pytest.raises(TransportError):
            await transport.listen(server.address, server.accept)

        await self.connect(transport, server)
        await until(lambda: server.receivers, "the connection to be accepted")

    async def test_listener_closes(self, transport: Transport, listen_address: Address) -> None:
        """After aclose of the listener nobody can connect; connections made before go on; the address is free again."""
        server = await self.serve(transport, listen_address)
        client = await self.connect(transport, server)
        await until(lambda: server.receivers, "the connection to be accepted")

        await server.listener.aclose()

        with anyio.fail_after(DEADLINE_S), pytest.raises(TransportError):
            await transport.connect(server.address, RecordingReceiver)
        client.channel.write([b"still here"])
        await until(lambda: server.receivers[0].data == b"still here", "data of the old connection")
        again = await self.serve(transport, server.address)
        await self.connect(transport, again)

    # bytes

    async def test_order(self, transport: Transport, listen_address: Address) -> None:
        """Buffers arrive in order, as if joined, whatever their type and size, empty ones included."""
        client, server = await self.pair(transport, listen_address)
        rng = random.Random(7)
        sent = bytearray()

        for index in range(400):
            piece = rng.randbytes(rng.choice([0, 1, 2, 48, 511, 4096, 70_000 if index % 40 == 0 else 3]))
            sent += piece
            kind = rng.choice([bytes, bytearray, memoryview])
            client.channel.write([kind(piece[:1]), kind(piece[1:])] if rng.random() < 0.5 else [kind(piece)])
            if rng.random() < 0.05:
                await anyio.lowlevel.checkpoint()

        await until(lambda: len(server.data) >= len(sent), "everything sent")
        assert server.data == sent
        assert server.faults == []

    async def test_echo(self, transport: Transport, listen_address: Address) -> None:
        """What is written from inside buffer_updated is sent; many small messages go both ways."""
        server = await self.serve(transport, listen_address)
        server.on_accept = echo
        client = await self.connect(transport, server)
        sent = noise(50_000)

        for start in range(0, len(sent), 100):
            client.channel.write([sent[start : start + 100]])

        await until(lambda: len(client.data) >= len(sent), "the echo")
        assert client.data == sent
        assert client.faults == server.receivers[0].faults == []

    async def test_tiny_buffers(self, transport: Transport, listen_address: Address) -> None:
        """A receiver may hand out buffers much smaller than what arrives."""
        server = await self.serve(transport, listen_address)
        server.buffer_bytes = 7
        client = await self.connect(transport, server)
        sent = noise(10_000)

        client.channel.write([sent])

        await until(lambda: server.receivers and len(server.receivers[0].data) >= len(sent), "everything sent")
        assert server.receivers[0].data == sent
        assert server.receivers[0].faults == []

    async def test_large_both_ways(self, transport: Transport, listen_address: Address) -> None:
        """Large bodies with small headers between them cross in both directions at once."""
        client, server = await self.pair(transport, listen_address)
        there, back = noise(self.large_bytes, 1), noise(self.large_bytes, 2)

        for _ in range(2):
            client.channel.write([b"h" * 48, there])
            server.channel.write([b"r" * 48, memoryview(back)])

        total = 2 * (48 + self.large_bytes)
        await until(lambda: len(server.data) >= total and len(client.data) >= total, "everything sent")
        assert server.data == (b"h" * 48 + there) * 2
        assert client.data == (b"r" * 48 + back) * 2

    async def test_many_connections(self, transport: Transport, listen_address: Address) -> None:
        """Fifty connections at once keep their bytes apart."""
        server = await self.serve(transport, listen_address)
        server.on_accept = echo
        clients: list[RecordingReceiver] = []

        async def one(index: int) -> None:
            client = await self.connect(transport, server)
            clients.append(client)
            client.channel.write([noise(3000, index)])
            await until(lambda: len(client.data) >= 3000, "the echo")
            assert client.data == noise(3000, index)

        async with anyio.create_task_group() as group:
            for index in range(50):
                group.start_soon(one, index)

        assert len(server.receivers) == 50
        for client in clients:
            client.channel.close()
        await until(lambda: all(receiver.ended for receiver in clients + server.receivers), "all ends")
        assert [receiver.errors for receiver in clients] == [[None]] * 50

    # flow control

    async def test_congestion(self, transport: Transport, listen_address: Address) -> None:
        """A peer that does not read congests the channel within bounds; once it drained, writable() comes."""
        client, server = await self.pair(transport, listen_address)
        server.channel.pause_reading()
        assert not client.channel.congested
        written = 0
        body = noise(MiB)

        def congested() -> bool:
            return client.channel.congested

        turns_congested = 0
        while turns_congested < 20 and written < self.flood_bytes_max:
            if not congested():
                turns_congested = 0
                client.channel.write([body])
                written += len(body)
            turns_congested += congested()
            await anyio.sleep(0.001)

        assert congested()
        writable_count = client.writable_count  # the system's own buffers may have drained it for a moment
        state_in_callback: list[bool] = []
        client.on_writable = lambda: state_in_callback.append(client.channel.congested)
        server.channel.resume_reading()
        await until(lambda: len(server.data) >= written, "everything sent")
        await until(lambda: client.writable_count > writable_count, "writable()")
        assert state_in_callback == [False]
        assert not client.channel.congested
        assert server.data == body * (written // len(body))

    async def test_no_writable_without_congestion(self, transport: Transport, listen_address: Address) -> None:
        """writable() is not called on a channel that was never congested."""
        client, server = await self.pair(transport, listen_address)

        for _ in range(20):
            client.channel.write([noise(1000)])
            await anyio.lowlevel.checkpoint()

        await until(lambda: len(server.data) == 20_000, "everything sent")
        assert client.writable_count == 0

    async def test_pause_reading(self, transport: Transport, listen_address: Address) -> None:
        """While reading is paused nothing arrives; pausing and resuming twice is harmless; nothing is lost."""
        client, server = await self.pair(transport, listen_address)
        server.channel.pause_reading()
        server.channel.pause_reading()
        before = server.updates
        client.channel.write([noise(300_000)])
        for _ in range(50):
            await anyio.sleep(0.001)

        assert server.updates == before
        with server.calling("resume_reading"):
            server.channel.resume_reading()
            server.channel.resume_reading()
        await until(lambda: len(server.data) == 300_000, "everything sent")
        assert server.data == noise(300_000)
        assert server.faults == []

    async def test_pause_from_inside(self, transport: Transport, listen_address: Address) -> None:
        """pause_reading from inside buffer_updated stops the very next one."""
        client, server = await self.pair(transport, listen_address)
        server.on_data = lambda piece: server.channel.pause_reading()
        client.channel.write([noise(400_000)])

        for turn in range(1, 4):
            await until(partial(_equal, turn, lambda: server.updates), "one receive")
            for _ in range(20):
                await anyio.sleep(0.0005)
            assert server.updates == turn
            server.channel.resume_reading()

        server.on_data = None
        server.channel.resume_reading()
        await until(lambda: len(server.data) == 400_000, "everything sent")
        assert server.data == noise(400_000)

    # ends

    async def test_close_flushes(self, transport: Transport, listen_address: Address) -> None:
        """close() sends everything queued first; both sides are told once, without an error, later."""
        client, server = await self.pair(transport, listen_address)
        sent = noise(self.large_bytes + 12345)

        with client.calling("close"):
            client.channel.write([sent])
            client.channel.close()
        assert not client.ended

        await until(lambda: client.ended and server.ended, "both ends")
        assert server.data == sent
        assert client.errors == [None]
        assert server.errors == [None]
        assert client.faults == server.faults == []

    async def test_close_from_inside(self, transport: Transport, listen_address: Address) -> None:
        """A receiver may reply and close from inside buffer_updated; the reply arrives."""
        client, server = await self.pair(transport, listen_address)

        def reply(piece: bytes) -> None:
            server.channel.write([b"bye"])
            server.channel.close()

        server.on_data = reply
        client.channel.write([b"hello"])

        await until(lambda: client.ended and server.ended, "both ends")
        assert client.data == b"bye"
        assert client.errors == server.errors == [None]
        assert client.faults == server.faults == []

    async def test_no_data_after_close(self, transport: Transport, listen_address: Address) -> None:
        """After close() or abort() from inside buffer_updated nothing more is received."""
        for end in ("close", "abort"):
            await self._no_data_after(end, transport, listen_address)

    async def _no_data_after(self, end: str, transport: Transport, listen_address: Address) -> None:
        client, server = await self.pair(transport, listen_address)
        server.on_data = lambda piece: getattr(server.channel, end)()
        client.channel.write([noise(500_000)])

        await until(lambda: client.ended and server.ended, "both ends")
        assert server.updates == 1
        assert server.faults == []

    async def test_abort(self, transport: Transport, listen_address: Address) -> None:
        """abort() ends both sides without waiting for a peer that does not read; they are told once, later."""
        client, server = await self.pair(transport, listen_address)
        server.channel.pause_reading()
        for _ in range(16):
            client.channel.write([noise(MiB)])
        await anyio.lowlevel.checkpoint()

        with client.calling("abort"):
            client.channel.abort()
        assert not client.ended

        await until(lambda: client.ended, "the end")
        server.channel.resume_reading()
        await until(lambda: server.ended, "the other end")
        assert len(client.errors) == len(server.errors) == 1
        assert len(server.data) < 16 * MiB
        assert client.faults == server.faults == []

    async def test_abort_breaks_close(self, transport: Transport, listen_address: Address) -> None:
        """A close that waits for a peer which does not read can be cut short by abort."""
        client, server = await self.pair(transport, listen_address)
        server.channel.pause_reading()
        client.channel.write([noise(MiB)] * (self.flood_bytes_max // MiB))
        client.channel.close()
        for _ in range(20):
            await anyio.sleep(0.001)
        assert not client.ended

        client.channel.abort()

        await until(lambda: client.ended, "the end")
        assert len(client.errors) == 1

    async def test_ends_repeat_harmlessly(self, transport: Transport, listen_address: Address) -> None:
        """Every method is harmless after the end, and closed() still comes exactly once."""
        client, server = await self.pair(transport, listen_address)

        def everything(channel: Channel) -> None:
            channel.close()
            channel.write([b"too late"])
            channel.pause_reading()
            channel.resume_reading()
            channel.close()
            channel.abort()
            channel.abort()
            channel.close()

        everything(client.channel)
        await until(lambda: client.ended and server.ended, "both ends")
        everything(client.channel)
        everything(server.channel)
        for _ in range(5):
            await anyio.sleep(0.001)

        assert len(client.errors) == len(server.errors) == 1
        assert server.data == b""
        assert client.faults == server.faults == []

    async def test_write_to_a_gone_peer(self, transport: Transport, listen_address: Address) -> None:
        """Writing to a peer that aborted never raises; closed() tells."""
        client, server = await self.pair(transport, listen_address)

        server.channel.abort()
        for _ in range(100):
            client.channel.write([noise(10_000)])
            if client.ended:
                break
            await anyio.sleep(0.001)

        await until(lambda: client.ended, "the end")
        assert len(client.errors) == 1
        assert client.errors[0] is None or isinstance(client.errors[0], TransportError)

    async def test_peer_ends_while_paused(self, transport: Transport, listen_address: Address) -> None:
        """A paused channel delivers what came before the peer's end, then tells of the end, once it is resumed."""
        client, server = await self.pair(transport, listen_address)
        server.channel.pause_reading()
        client.channel.write([b"last words"])
        client.channel.close()
        await until(lambda: client.ended, "our end")

        server.channel.resume_reading()

        await until(lambda: server.ended, "the other end")
        assert server.data == b"last words"
        assert server.errors == [None]

    # cancellation and the end of everything

    async def test_cancelled_connect(self, transport: Transport, listen_address: Address) -> None:
        """A connect cancelled at whatever moment leaves no open connection behind."""
        server = await self.serve(transport, listen_address)
        clients: list[RecordingReceiver] = []

        def make(channel: Channel) -> RecordingReceiver:
            clients.append(RecordingReceiver(channel))
            return clients[-1]

        finished = 0
        for turns in range(12):
            async with anyio.create_task_group() as group:

                async def connect() -> None:
                    nonlocal finished
                    channel = await transport.connect(server.address, make)
                    finished += 1
                    channel.close()

                group.start_soon(connect)
                for _ in range(turns):
                    await anyio.lowlevel.checkpoint()
                group.cancel_scope.cancel()

        await until(lambda: all(receiver.ended for receiver in clients + server.receivers), "every connection to end")
        await self.connect(transport, server)

    async def test_aclose(self, transport: Transport, listen_address: Address) -> None:
        """aclose of the transport ends every connection and listener; each receiver is told once."""
        client, server = await self.pair(transport, listen_address)
        address = server.channel.local

        await transport.aclose()

        await until(lambda: client.ended and server.ended, "both ends")
        assert len(client.errors) == len(server.errors) == 1
        assert client.faults == server.faults == []
        if address.startswith("unix:"):
            return
        probe = type(transport)() if type(transport).__name__ == "TcpTransport" else None
        if probe is not None:
            with pytest.raises(TransportError):
                await probe.connect(address, RecordingReceiver)
            await probe.aclose()

    async def test_refusing_acceptor(self, transport: Transport, listen_address: Address) -> None:
        """A connection that is closed from inside accept ends in order, and the listener goes on."""
        server = await self.serve(transport, listen_address)
        server.on_accept = lambda receiver: receiver.channel.close()
        clients: list[RecordingReceiver] = []

        for _ in range(3):
            clients.append(await self.connect(transport, server))
            await until(lambda: clients[-1].ended, "the end")

        assert [receiver.data for receiver in server.receivers] == [b"", b"", b""]
        await until(lambda: all(receiver.ended for receiver in server.receivers), "the ends")
