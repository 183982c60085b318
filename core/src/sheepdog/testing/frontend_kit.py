"""Conformance kit of the front end contract.

A plugin's test file subclasses ``FrontEndKit`` and says how its front end is made and how a client of its protocol uses
a volume; it inherits a check for each sentence of the contract::

    class TestMine(FrontEndKit):
        bad_options = ("nonsense", "127.0.0.1:0,color=blue")

        def make(self, options): return MyFrontEnd(options)

        async def open(self, address, name): return await MyClient.connect(address, name)

The volumes are ``MemoryVolumes``; the network is the real one, on 127.0.0.1 with ports of the system's choice.
"""

from __future__ import annotations

import logging
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from time import monotonic, time
from typing import ClassVar, TypeVar

import anyio
import anyio.abc
import anyio.to_thread
import pytest

from sheepdog.builtin.tcp import TcpTransport
from sheepdog.contracts.frontend import FrontEnd, FrontEndContext
from sheepdog.contracts.services import Services, Volumes
from sheepdog.contracts.transport import Transport
from sheepdog.errors import ConfigError, TransportError
from sheepdog.testing.memory_volumes import MemoryVolumes

DEADLINE_S = 20.0
MiB = 1024 * 1024
T = TypeVar("T")


class SystemClock:
    """The clock of the machine."""

    def monotonic(self) -> float:
        return monotonic()

    def time(self) -> float:
        return time()


class ThreadExecutor:
    """Worker threads by way of anyio."""

    def submit(self, work: Callable[[], T], done: Callable[[Exception | None, T | None], None]) -> None:
        """Inline: what a front end has for workers is small."""
        try:
            result = work()
        except Exception as error:
            done(error, None)
        else:
            done(None, result)

    async def run(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)


def make_context(volumes: Volumes, transport: Transport) -> FrontEndContext:
    """What a front end is handed, with the machine's own clock and threads."""
    return FrontEndContext(Services(SystemClock(), random.Random(1), ThreadExecutor(), transport), volumes)


@asynccontextmanager
async def serving(
    front_end: FrontEnd, volumes: Volumes, transport: Transport | None = None
) -> AsyncIterator[tuple[str, ...]]:
    """The front end serves inside the block, which gets its addresses; it has ended after the block."""
    own = transport is None
    network = transport if transport is not None else TcpTransport()
    context = make_context(volumes, network)
    try:
        async with anyio.create_task_group() as group:
            yield await group.start(lambda *, task_status: front_end.serve(context, task_status=task_status))
            group.cancel_scope.cancel()
    finally:
        if own:
            with anyio.CancelScope(shield=True):
                await network.aclose()


class FrontEndClient(ABC):
    """A client that has a volume open through the front end."""

    @abstractmethod
    async def read(self, offset: int, length: int) -> bytes:
        """Bytes of the volume."""

    @abstractmethod
    async def write(self, offset: int, data: bytes) -> None:
        """The bytes are in the volume."""

    @abstractmethod
    async def aclose(self) -> None:
        """The connection is closed in an orderly way."""


async def connect(address: str) -> anyio.abc.ByteStream:
    """A plain connection to an address as transports write it."""
    if address.startswith("unix:"):
        return await anyio.connect_unix(address.removeprefix("unix:"))
    host, _, port = address.rpartition(":")
    return await anyio.connect_tcp(host.strip("[]"), int(port))


async def until(condition: Callable[[], object], what: str) -> None:
    """``condition()`` is true. Fails the test when that takes longer than the deadline."""
    with anyio.move_on_after(DEADLINE_S):
        while not condition():
            await anyio.sleep(0.002)
        return
    raise AssertionError(f"after {DEADLINE_S} s still waiting for {what}")


async def drained(stream: anyio.abc.ByteStream) -> bytes:
    """Everything the other side sends until it closes the connection."""
    data = b""
    with anyio.fail_after(DEADLINE_S):
        try:
            while True:
                data += await stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return data


class FrontEndKit(ABC):
    """See the module. Runs on the event loops that the fixture ``anyio_backend`` lists."""

    pytestmark: ClassVar = pytest.mark.anyio

    options: ClassVar[str] = "127.0.0.1:0"  # that make the front end listen anywhere
    bad_options: ClassVar[Sequence[str]] = ("nonsense",)

    @abstractmethod
    def make(self, options: str) -> FrontEnd:
        """The front end, as the plugin's hook makes it."""

    @abstractmethod
    async def open(self, address: str, name: str) -> FrontEndClient:
        """A client with that volume open."""

    def at(self, address: str) -> str:
        """Options that make the front end listen at an address that another one reported."""
        return address

    @pytest.fixture
    def volumes(self) -> MemoryVolumes:
        volumes = MemoryVolumes()
        volumes.create("disk", 8 * MiB)
        return volumes

    async def test_serves_a_volume(self, volumes: MemoryVolumes) -> None:
        """What a client writes is in the volume, and what is in the volume a client reads."""
        async with serving(self.make(self.options), volumes) as addresses:
            assert addresses
            client = await self.open(addresses[0], "disk")
            await client.write(1000, b"through the front end")

            assert volumes.content("disk")[1000:1021] == b"through the front end"
            assert await client.read(998, 5) == b"\0\0thr"
            await client.aclose()
            await until(lambda: volumes.open_count == 0, "the volume to be closed")

    async def test_vanished_client_leaves_nothing_open(self, volumes: MemoryVolumes) -> None:
        """The volume of a client that is gone is closed, even if requests were in flight."""
        async with serving(self.make(self.options), volumes) as addresses:
            client = await self.open(addresses[0], "disk")
            volumes.hold()
            async with anyio.create_task_group() as group:
                group.start_soon(client.read, 0, 512)
                await until(lambda: volumes.held, "a request in flight")
                group.cancel_scope.cancel()
            await client.aclose()
            volumes.let_go()

            await until(lambda: volumes.open_count == 0, "the volume to be closed")

    async def test_cancelled_closes_everything(self, volumes: MemoryVolumes) -> None:
        """Cancelled, it disconnects clients, closes their volumes and gives its address back."""
        async with serving(self.make(self.options), volumes) as addresses:
            client = await self.open(addresses[0], "disk")
            await client.write(0, b"x")
            silent = await connect(addresses[0])

        assert volumes.open_count == 0
        await drained(silent)  # ends
        await silent.aclose()
        await client.aclose()
        async with serving(self.make(self.at(addresses[0])), volumes) as again:
            assert again == addresses

    async def test_busy_address_is_a_transport_error(self, volumes: MemoryVolumes) -> None:
        """An address that somebody listens on is a TransportError, and ``started`` is not called."""
        async with serving(self.make(self.options), volumes) as addresses:
            second = self.make(self.at(addresses[0]))
            started: list[object] = []
            transport = TcpTransport()

            class Status:
                def started(self, value: object = None) -> None:
                    started.append(value)

            with pytest.raises(TransportError):
                await second.serve(make_context(volumes, transport), task_status=Status())
            await transport.aclose()
            assert not started

    async def test_bad_options_are_config_errors(self, volumes: MemoryVolumes) -> None:
        """Options that make no sense are a ConfigError, from the constructor or from ``serve``."""
        for options in self.bad_options:
            with pytest.raises(ConfigError):
                await self.make(options).serve(
                    make_context(volumes, TcpTransport()), task_status=anyio.TASK_STATUS_IGNORED
                )

    @pytest.mark.parametrize("seed", range(6))
    async def test_garbage_costs_one_connection(
        self, volumes: MemoryVolumes, seed: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Bytes of no sense end the connection they came on (or are ignored), and nothing else."""
        generator = random.Random(seed)
        garbage = [
            generator.randbytes(generator.randrange(1, 2000)),
            bytes(generator.randrange(1, 5000)),
            b"\xff" * generator.randrange(1, 5000),
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            generator.randbytes(100_000),
        ]
        with caplog.at_level(logging.ERROR):
            async with serving(self.make(self.options), volumes) as addresses:
                good = await self.open(addresses[0], "disk")
                for data in garbage:
                    stream = await connect(addresses[0])
                    try:
                        await stream.send(data)
                        await stream.send_eof()
                        await drained(stream)
                    except (anyio.BrokenResourceError, OSError):
                        pass  # closed already
                    await stream.aclose()
                await good.write(5, b"still there")

                assert await good.read(5, 11) == b"still there"
                await good.aclose()
                fresh = await self.open(addresses[0], "disk")
                await fresh.aclose()
                await until(lambda: volumes.open_count == 0, "volumes to be closed")
        assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
