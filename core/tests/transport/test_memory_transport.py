"""The simulated network: a transport like any other, repeatable, with faults that do what they say."""

import random

import anyio
import pytest
import trio
import trio.testing

from sheepdog.errors import TransportError
from sheepdog.testing.memory_transport import MemoryNetwork
from sheepdog.testing.transport_kit import ASYNCIO, TRIO, RecordingReceiver, TransportKit, noise, until


class TestMemory(TransportKit):
    @pytest.fixture(params=[ASYNCIO, TRIO])
    def anyio_backend(self, request):
        return request.param

    @pytest.fixture
    def network(self):
        return MemoryNetwork(random.Random(5))

    @pytest.fixture
    async def transport(self, network):
        transport = network.transport("client")
        yield transport
        await transport.aclose()
        await network.aclose()
        assert network.failures == []


class TestTornMemory(TestMemory):
    """The same with delays and with deliveries torn into arbitrary pieces."""

    large_bytes = 300_000

    @pytest.fixture
    def network(self):
        return MemoryNetwork(random.Random(6), latency_s=(0.0, 0.0005), tear=0.3)


@pytest.mark.anyio
class TestFaults:
    @pytest.fixture(params=[ASYNCIO, TRIO])
    def anyio_backend(self, request):
        return request.param

    @pytest.fixture
    async def network(self, anyio_backend):
        network = MemoryNetwork(random.Random(1))
        yield network
        await network.aclose()
        assert network.failures == []

    async def joined(self, network, one="a", other="b"):
        kit = TransportKit()
        server = await kit.serve(network.transport(other), f"{other}:7000")
        client = await kit.connect(network.transport(one), server)
        return client, server.receivers[0]

    async def test_partition_holds_back(self, network):
        """Across a partition nothing arrives; after it healed everything does, in order. Others are not touched."""
        client, server = await self.joined(network, "a", "b")
        other_client, other_server = await self.joined(network, "a", "c")
        network.partition(["a"], ["b"])
        client.channel.write([noise(1000)])
        other_client.channel.write([b"x"])
        await until(lambda: other_server.data == b"x", "the data of the others")
        assert server.data == b""

        network.heal()

        await until(lambda: server.data == noise(1000), "the data")

    async def test_connect_waits_for_a_partition(self, network):
        """A connect across a partition hangs until it heals, or until its caller gives up."""
        await self.joined(network, "a", "b")
        network.isolate("c", ["a", "b"])
        receivers = []

        def make(channel):
            receivers.append(RecordingReceiver(channel))
            return receivers[-1]

        with anyio.move_on_after(0.01) as scope:
            await network.transport("c").connect("b:7000", make)
        assert scope.cancelled_caught
        assert receivers == []
        network.heal("c")
        await network.transport("c").connect("b:7000", make)

        assert len(receivers) == 1

    async def test_break(self, network):
        """A broken connection is a TransportError at both ends."""
        client, server = await self.joined(network)

        network.break_connections("a", "b")

        await until(lambda: client.ended and server.ended, "both ends")
        assert isinstance(client.errors[0], TransportError)
        assert isinstance(server.errors[0], TransportError)

    async def test_kill(self, network):
        """Who talked to a killed host sees a reset; the dead hear nothing; it can listen again."""
        client, server = await self.joined(network)
        client.channel.write([b"never read"])

        network.kill("b")

        await until(lambda: client.ended, "the end")
        assert isinstance(client.errors[0], TransportError)
        assert server.errors == []
        assert server.data == b""
        with pytest.raises(TransportError):
            await network.transport("a").connect("b:7000", RecordingReceiver)
        await self.joined(network)

    async def test_changed_buffers_are_found_out(self, network):
        """A caller that changes a buffer after write corrupts what is delivered, so that a test notices."""
        client, server = await self.joined(network)
        buffer = bytearray(b"first")

        client.channel.write([buffer])
        buffer[:] = b"later"

        await until(lambda: server.data, "the data")
        assert server.data == b"later"


def test_same_seed_same_history():
    """Two runs from one seed deliver the same pieces at the same virtual times; another seed does not."""

    def history(seed):
        async def run():
            network = MemoryNetwork(random.Random(seed), latency_s=(0.001, 0.2), tear=0.5)
            events = []
            server = await TransportKit().serve(network.transport("b"), "b:1")
            client = await TransportKit().connect(network.transport("a"), server)
            server.receivers[0].on_data = lambda piece: events.append((trio.current_time(), piece))
            for index in range(50):
                client.channel.write([noise(500, index)])
                await trio.sleep(0.05)
            await until(lambda: len(server.receivers[0].data) == 25_000, "everything")
            await network.aclose()
            return [(round(when - events[0][0], 9), piece) for when, piece in events]

        return trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))

    assert history(3) == history(3)
    assert history(3) != history(4)
