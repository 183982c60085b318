"""A server for clients of other processes, and a connection without a network."""

from __future__ import annotations

import struct
from contextlib import ExitStack

import pytest
from anyio.from_thread import start_blocking_portal

from sheepdog.api import Channel
from sheepdog.builtin.tcp import TcpTransport
from sheepdog.testing.frontend_kit import make_context
from sheepdog.testing.memory_volumes import MemoryVolumes
from sheepdog_frontend_nbd import sheepdog_frontend
from sheepdog_frontend_nbd.connection import Connection
from sheepdog_frontend_nbd.negotiation import Negotiation

MiB = 1024 * 1024
REQUEST = struct.Struct(">IHHQQI")


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def serve():
    """``address = serve(volumes, options)``: a front end in a thread of its own, until the test ends."""
    with ExitStack() as stack:
        portal = stack.enter_context(start_blocking_portal("asyncio", {"use_uvloop": True}))

        def start(volumes, options="127.0.0.1:0"):
            async def run(*, task_status):
                transport = TcpTransport()
                try:
                    await sheepdog_frontend(options).serve(make_context(volumes, transport), task_status=task_status)
                finally:
                    await transport.aclose()

            future, addresses = portal.start_task(run)
            stack.callback(future.cancel)
            return addresses[0]

        yield start


class FakeChannel(Channel):
    """Keeps what is written, one list entry for each write."""

    def __init__(self):
        self.writes = []
        self.is_congested = False
        self.paused = False
        self.closes = 0
        self.aborts = 0

    def write(self, buffers):
        self.writes.append(b"".join(bytes(buffer) for buffer in buffers))

    @property
    def congested(self):
        return self.is_congested

    def pause_reading(self):
        self.paused = True

    def resume_reading(self):
        self.paused = False

    def close(self):
        self.closes += 1

    def abort(self):
        self.aborts += 1

    @property
    def remote(self):
        return "test:1"

    @property
    def local(self):
        return "test:2"

    def taken(self):
        """What was written since the last call."""
        data = b"".join(self.writes)
        self.writes.clear()
        return data


class Wire:
    """A connection whose client is the test. Tasks of the negotiation run at once."""

    def __init__(self, volumes, *, read_only=False, start_tls=None, tls_missing=False):
        self.volumes = volumes
        self.channel = FakeChannel()
        self.ended = []
        self.connection = Connection(self.channel, self.ended.append)
        self.tasks = []
        Negotiation(
            self.connection,
            volumes,
            self.tasks.append,
            read_only=read_only,
            start_tls=start_tls,
            tls_missing=tls_missing,
        )

    async def settle(self):
        while self.tasks:
            await self.tasks.pop(0)()

    def feed(self, data, *, piece=None):
        """The client sends ``data``; as much as the connection takes at once, or in pieces."""
        view = memoryview(bytes(data))
        while view:
            target = self.connection.get_buffer(len(view))
            assert len(target), "a receiver's buffer is never empty"
            count = min(len(target), len(view), piece or len(view))
            target[:count] = view[:count]
            self.connection.buffer_updated(count)
            view = view[count:]

    def option(self, code, data=b""):
        self.feed(struct.pack(">QII", 0x49484156454F5054, code, len(data)) + data)

    async def go(self, name="disk", *, structured=False, status=False):
        """The export is chosen; what the server said is gone."""
        self.feed(struct.pack(">I", 3))
        if structured:
            self.option(8)
        encoded = name.encode()
        named = struct.pack(">I", len(encoded)) + encoded
        if status:
            self.option(10, named + struct.pack(">II", 1, 15) + b"base:allocation")
            await self.settle()
        self.option(7, named + struct.pack(">H", 0))
        await self.settle()
        assert self.connection.decoder.transmission, self.channel.taken()
        self.channel.taken()

    def request(self, command, offset=0, length=0, *, flags=0, cookie=1, payload=b""):
        """The client sends a request; returns what the server says at once."""
        self.feed(REQUEST.pack(0x25609513, flags, command, cookie, offset, length) + payload)
        return self.channel.taken()

    def errno(self, *args, **options):
        """The error number of a simple reply to a request."""
        reply = self.request(*args, **options)
        magic, errno, cookie = struct.unpack(">IIQ", reply[:16])
        assert (magic, cookie) == (0x67446698, options.get("cookie", 1)), reply
        return errno


@pytest.fixture
def volumes():
    volumes = MemoryVolumes()
    volumes.create("disk", 16 * MiB)
    return volumes


@pytest.fixture
def make_wire(volumes):
    """``wire = make_wire()``: a client's end of a connection to ``volumes``, or to others."""

    def make(**options):
        return Wire(options.pop("volumes", volumes), **options)

    return make
