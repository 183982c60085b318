"""A front end of one page that passes the kit, so the kit asks for nothing that only NBD has."""

from __future__ import annotations

from functools import partial

import anyio
import anyio.abc
import pytest

from sheepdog.contracts.frontend import FrontEnd
from sheepdog.errors import ConfigError, SheepdogError, TransportError
from sheepdog.testing.frontend_kit import FrontEndClient, FrontEndKit, connect

LINE_BYTES_MAX = 4096


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param


class LineFrontEnd(FrontEnd):
    """``open NAME``, ``read OFFSET LENGTH``, ``write OFFSET HEX``: a line each, answered by a line."""

    def __init__(self, options):
        if ":" not in options:
            raise ConfigError(f"{options!r} is no address")
        self._address = options

    async def serve(self, context, *, task_status):
        lines = {}
        failure = None
        async with anyio.create_task_group() as group:

            def accept(channel):
                line = lines[channel] = _Line(channel, context.volumes, group, partial(lines.pop, channel, None))
                return line

            try:
                listener = await context.services.transport.listen(self._address, accept)
            except TransportError as error:
                failure = error
            else:
                try:
                    task_status.started(listener.addresses)
                    await anyio.sleep_forever()
                finally:
                    with anyio.CancelScope(shield=True):
                        await listener.aclose()
                        for line in list(lines.values()):
                            line.channel.abort()
                            await line.close_volume()
        if failure is not None:
            raise failure


class _Line:
    def __init__(self, channel, volumes, group, gone):
        self.channel = channel
        self._volumes = volumes
        self._group = group
        self._gone = gone
        self._view = memoryview(bytearray(LINE_BYTES_MAX))
        self._filled = 0
        self._volume = None

    def get_buffer(self, size_hint):
        return self._view[self._filled :]

    def buffer_updated(self, count):
        self._filled += count
        while (end := bytes(self._view[: self._filled]).find(b"\n")) >= 0:
            words = bytes(self._view[:end]).decode("latin-1").split()
            rest = bytes(self._view[end + 1 : self._filled])
            self._view[: len(rest)] = rest
            self._filled = len(rest)
            self._command(words)
        if self._filled == LINE_BYTES_MAX:
            self._filled = 0
            self.channel.abort()

    def _command(self, words):
        try:
            match words:
                case ["open", name]:
                    self._group.start_soon(self._open, name)
                case ["read", offset, length] if self._volume:
                    self._volume.read(int(offset), int(length), lambda error, data: self._answer(error, data))
                case ["write", offset, data] if self._volume:
                    self._volume.write(int(offset), bytes.fromhex(data), lambda error, _: self._answer(error, b""))
                case _:
                    self.channel.abort()
        except ValueError:
            self.channel.abort()

    async def _open(self, name):
        try:
            self._volume = await self._volumes.open(name)
        except SheepdogError as error:
            self._answer(error, b"")
        else:
            self._answer(None, b"")

    def _answer(self, error, data):
        self.channel.write([b"error\n" if error else b"ok " + bytes(data).hex().encode() + b"\n"])

    async def close_volume(self):
        volume, self._volume = self._volume, None
        if volume is not None:
            await volume.aclose()

    def closed(self, error):
        self._gone()
        self._group.start_soon(self.close_volume)

    def writable(self):
        pass


class _Client(FrontEndClient):
    def __init__(self, stream):
        self._stream = stream
        self._rest = b""

    async def ask(self, line):
        await self._stream.send(line.encode() + b"\n")
        while b"\n" not in self._rest:
            self._rest += await self._stream.receive()
        answer, self._rest = self._rest.split(b"\n", 1)
        assert answer.startswith(b"ok"), answer
        return bytes.fromhex(answer[2:].decode())

    async def read(self, offset, length):
        return await self.ask(f"read {offset} {length}")

    async def write(self, offset, data):
        await self.ask(f"write {offset} {data.hex()}")

    async def aclose(self):
        await self._stream.aclose()


class TestLineFrontEnd(FrontEndKit):
    bad_options = ("nonsense",)

    def make(self, options):
        return LineFrontEnd(options)

    async def open(self, address, name):
        client = _Client(await connect(address))
        await client.ask(f"open {name}")
        return client
