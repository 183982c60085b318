"""The adapter over anyio streams keeps the same promises as the protocol."""

import anyio
import anyio.abc
import pytest

from sheepdog.builtin.streams import StreamListening, StreamTransport, join_address, split_address
from sheepdog.builtin.tcp import _connect_stream, _listen_streams
from sheepdog.errors import TransportError
from sheepdog.testing.transport_kit import TransportKit, until


class TestStreams(TransportKit):
    @pytest.fixture
    async def transport(self, anyio_backend):
        transport = StreamTransport(_connect_stream, _listen_streams)
        yield transport
        await transport.aclose()

    async def test_accept_errors_are_survived(self, anyio_backend, listen_address):
        """A listener whose accept fails now and then goes on."""

        class Flaky(anyio.abc.Listener):
            def __init__(self, inner):
                self.inner = inner
                self.failures = 2

            async def serve(self, handler, task_group=None):
                if self.failures:
                    self.failures -= 1
                    raise OSError(24, "too many open files")
                await self.inner.serve(handler, task_group)

            async def aclose(self):
                await self.inner.aclose()

        async def listen(address):
            return [StreamListening(Flaky(one.listener), one.address) for one in await _listen_streams(address)]

        transport = StreamTransport(_connect_stream, listen)
        server = await self.serve(transport, listen_address)

        await self.connect(transport, server)

        await until(lambda: server.receivers, "the connection")
        await transport.aclose()


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("10.0.0.1:7000", ("10.0.0.1", 7000, None)),
        ("[fe80::1]:80", ("fe80::1", 80, None)),
        (":7000", ("", 7000, None)),
        ("unix:/var/lib/sock", ("", 0, "/var/lib/sock")),
    ],
)
def test_split_address(address, parts):
    """Host, port and path come apart, and together again."""
    assert split_address(address) == parts
    if parts[2] is None:
        assert join_address(parts[0], parts[1]) == address


@pytest.mark.parametrize("address", ["", "host", "host:", "host:-1", "host:65536", "fe80::1:80", "host:७", "unix:"])
def test_bad_addresses(address):
    """What is not an address is refused with a TransportError."""
    with pytest.raises(TransportError):
        split_address(address)
