"""The built-in transport on every event loop, TCP and Unix sockets."""

import os
import socket

import anyio
import pytest

from sheepdog.builtin import streams, tcp
from sheepdog.builtin.streams import tune_socket
from sheepdog.builtin.tcp import HIGH_WATER_BYTES, TcpTransport, sheepdog_transport
from sheepdog.contracts.transport import Channel
from sheepdog.errors import TransportError
from sheepdog.testing.transport_kit import ASYNCIO, UVLOOP, RecordingReceiver, TransportKit, until


class TestTcp(TransportKit):
    @pytest.fixture
    async def transport(self, anyio_backend):
        transport = sheepdog_transport()
        yield transport
        await transport.aclose()

    async def test_all_interfaces(self, transport):
        """Without a host it listens on every interface, on one port."""
        server = await self.serve(transport, ":0")
        ports = {address.rpartition(":")[2] for address in server.listener.addresses}
        (port,) = ports

        await transport.connect(f"127.0.0.1:{port}", RecordingReceiver)

        await until(lambda: server.receivers, "the connection")

    async def test_silent_host(self, transport, listen_address, monkeypatch):
        """Both sides ask the other host for signs of life; who waits for answers does not wait long for them."""
        made = []

        def recording(sock, *, outgoing):
            tune_socket(sock, outgoing=outgoing)
            alive = sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            made.append((outgoing, alive, sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)))

        for module in (streams, tcp):
            monkeypatch.setattr(module, "tune_socket", recording)
        server = await self.serve(transport, listen_address)

        await transport.connect(server.address, RecordingReceiver)
        await until(lambda: server.receivers, "the connection")

        assert sorted(made) == [(False, 1, 0), (True, 1, 10_000)]

    async def test_v6(self, transport):
        """IPv6 addresses are written with brackets, both ways."""
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 loopback here")

        client, _ = await self.pair(transport, "[::1]:0")

        assert client.channel.remote.startswith("[::1]:")

    async def test_peer_process_dies(self, transport, listen_address):
        """A reset (a peer that died with unread data) is told with a TransportError, once."""
        server = await self.serve(transport, listen_address)
        host, _, port = server.address.rpartition(":")
        with socket.create_connection((host, int(port))) as raw:
            await until(lambda: server.receivers, "the connection")
            raw.sendall(b"half a")
            await until(lambda: server.receivers[0].data == b"half a", "the data")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")

        await until(lambda: server.receivers[0].ended, "the end")
        (error,) = server.receivers[0].errors
        assert isinstance(error, TransportError)


class TestUnix(TransportKit):
    @pytest.fixture
    async def transport(self, anyio_backend):
        transport = TcpTransport()
        yield transport
        await transport.aclose()

    @pytest.fixture
    def listen_address(self, tmp_path):
        return f"unix:{tmp_path}/sock"

    @pytest.fixture
    def dead_address(self, tmp_path):
        return f"unix:{tmp_path}/nobody"

    async def pair(self, transport, address):
        if os.path.exists(address.removeprefix("unix:")):
            address += "-second"
        return await super().pair(transport, address)

    async def test_stale_socket(self, transport, tmp_path):
        """A socket file left behind by a process that died is replaced."""
        path = str(tmp_path / "stale")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)

        server = await self.serve(transport, f"unix:{path}")

        await self.connect(transport, server)
        await until(lambda: server.receivers, "the connection")

    async def test_long_path(self, transport, tmp_path):
        """A path longer than a socket address can hold works like any other."""
        directory = tmp_path / ("d" * 100) / ("e" * 100)
        directory.mkdir(parents=True)

        server = await self.serve(transport, f"unix:{directory}/sock")

        await self.connect(transport, server)
        await until(lambda: server.receivers, "the connection")

    async def test_other_files_are_kept(self, transport, tmp_path):
        """A file that is no socket is not removed."""
        path = tmp_path / "precious"
        path.write_text("data")

        with pytest.raises(TransportError):
            await transport.listen(f"unix:{path}", RecordingReceiver)

        assert path.read_text() == "data"

    async def test_socket_file_goes(self, transport, listen_address, tmp_path):
        """Closing the listener removes its socket file."""
        server = await self.serve(transport, listen_address)
        assert (tmp_path / "sock").exists()

        await server.listener.aclose()

        assert not (tmp_path / "sock").exists()


@pytest.mark.anyio
class TestCork:
    @pytest.fixture(params=[ASYNCIO, UVLOOP])
    def anyio_backend(self, request):
        return request.param

    async def test_replies_of_one_receive_leave_together(self):
        """What is written while one receive is handled reaches the asyncio transport in one call for each channel."""
        transport = TcpTransport()
        kit = TransportKit()
        server = await kit.serve(transport, "127.0.0.1:0")
        client = await kit.connect(transport, server)
        await until(lambda: server.receivers, "the connection")
        receiver = server.receivers[0]
        calls = []

        class Spy:
            def __init__(self, inner):
                self.inner = inner

            def __getattr__(self, name):
                if name in ("write", "writelines"):
                    calls.append(name)
                return getattr(self.inner, name)

        receiver.channel._transport = Spy(receiver.channel._transport)

        def reply(piece):
            for _ in range(10):
                receiver.channel.write([b"x" * 48, b"y" * 100])

        receiver.on_data = reply
        client.channel.write([b"go"])

        await until(lambda: len(client.data) == 1480, "the replies")
        assert calls == ["write"]
        await transport.aclose()

    async def test_large_writes_do_not_wait(self):
        """A channel that is written more than the high-water mark inside one turn is congested at once."""
        transport = TcpTransport()
        kit = TransportKit()
        server = await kit.serve(transport, "127.0.0.1:0")
        client = await kit.connect(transport, server)
        await until(lambda: server.receivers, "the connection")
        server.receivers[0].channel.pause_reading()

        for _ in range(64):
            client.channel.write([bytes(HIGH_WATER_BYTES)])

        assert client.channel.congested
        await transport.aclose()

    async def test_failing_acceptor(self):
        """An acceptor that raises costs its connection only."""
        transport = TcpTransport()
        accepted = []

        def accept(channel: Channel):
            accepted.append(channel)
            if len(accepted) == 1:
                raise ValueError("not today")
            return RecordingReceiver(channel)

        listener = await transport.listen("127.0.0.1:0", accept)
        receivers = []

        def make(channel):
            receivers.append(RecordingReceiver(channel))
            return receivers[-1]

        with anyio.fail_after(10):
            await transport.connect(listener.addresses[0], make)
            await until(lambda: receivers[0].ended, "the end of the first")
            await transport.connect(listener.addresses[0], make)
            await until(lambda: len(accepted) == 2, "the second")

        assert not receivers[1].ended
        await transport.aclose()
