"""A client of a simulated cluster: what a guest's block driver, or dog, does."""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING

import trio

from sheepdog.contracts.transport import Channel
from sheepdog.errors import TransportError
from sheepdog.wire.codec import response_decoder
from sheepdog.wire.header import FLAG_WRITE, Request, Response
from sheepdog.wire.opcodes import SHEEP_PROTO_VER, Flag, Op
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.testing.simulation import Simulation

ANSWER_S = 400.0  # virtual; a request without an answer for so long is a failure of the cluster

# What a client of a sheep that is not ready yet sees; it tries again, as a guest does that waits for its storage.
TRY_AGAIN = frozenset({Result.WAIT_FOR_JOIN, Result.WAIT_FOR_FORMAT, Result.KILLED, Result.SHUTDOWN, Result.HALT})

_VDI_VARIANT = Struct("<QIBBBBII8x")


class _Connection:
    """Receiver of one connection of a client."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.decoder = response_decoder()
        self.waiting: dict[int, tuple[trio.Event, list[Response]]] = {}
        self.open = True

    def get_buffer(self, size_hint: int) -> memoryview:
        return self.decoder.get_buffer()

    def buffer_updated(self, count: int) -> None:
        for response in self.decoder.received(count):
            event, answers = self.waiting.pop(response.id)
            answers.append(response)
            event.set()

    def closed(self, error: Exception | None) -> None:
        self.open = False
        for event, _ in self.waiting.values():
            event.set()

    def writable(self) -> None:
        """Requests of a simulated client are few."""


class SimulatedClient:
    """Speaks the wire protocol to one sheep at a time, and to another one when the connection breaks.

    As a block driver does, it sends a request again until it was answered: everything is done at least once.
    """

    def __init__(self, simulation: Simulation, name: str) -> None:
        self.simulation = simulation
        self.host = name
        self.random = simulation.fork_random()
        self.gateway: int | None = None  # the number of the sheep to talk to; None for any
        self._transport = simulation.network.transport(name)
        self._connection: _Connection | None = None
        self._connecting = trio.Lock()
        self._next_id = 1

    async def succeed(self, request: Request) -> Response:
        """The answer, which is SUCCESS."""
        response = await self.request(request)
        assert response.result == Result.SUCCESS, f"{request!r}: {Result(response.result).name}"
        return response

    async def request(self, request: Request) -> Response:
        """The final answer to ``request``, sent again over broken connections and to sheep that are not ready.

        :raises AssertionError: no answer within ``ANSWER_S``.
        """
        deadline = trio.current_time() + ANSWER_S
        while True:
            with trio.move_on_at(deadline):
                response = await self.attempt(request)
                if response is not None and response.result not in TRY_AGAIN:
                    return response
                await trio.sleep(self.random.uniform(0.05, 0.3))
                continue
            raise AssertionError(f"{self.host}: no answer to {request!r}; {self.simulation.describe()}")

    async def attempt(self, request: Request) -> Response | None:
        """The answer, or ``None`` when the connection could not be made or broke."""
        request.proto = SHEEP_PROTO_VER if request.opcode >= 0x80 else 2
        if len(request.body):
            request.flags |= FLAG_WRITE
            request.data_length = len(request.body)
        connection = await self._connected()
        if connection is None:
            return None
        request.id = self._next_id
        self._next_id += 1
        event = trio.Event()
        answers: list[Response] = []
        connection.waiting[request.id] = (event, answers)
        connection.channel.write([request.pack(), request.body])
        await event.wait()
        return answers[0] if answers else None

    async def _connected(self) -> _Connection | None:
        async with self._connecting:
            if self._connection is not None and self._connection.open:
                return self._connection
            self._connection = None
            running = self.simulation.running()
            if not running:
                return None
            address = (
                self.random.choice(running) if self.gateway is None else self.simulation.nodes[self.gateway]
            ).address
            made: list[_Connection] = []

            def make(channel: Channel) -> _Connection:
                made.append(_Connection(channel))
                return made[0]

            try:
                with trio.fail_after(5):
                    await self._transport.connect(address, make)
            except (TransportError, trio.TooSlowError):
                return None
            self._connection = made[0]
            return self._connection

    def move(self, *, abruptly: bool = False) -> None:
        """The next request goes to a sheep chosen anew, as after a migration. No effect with requests in flight.

        :param abruptly: the connection breaks, and what is in flight is sent again through another sheep.
        """
        connection = self._connection
        if connection is None:
            return
        if abruptly:
            connection.channel.abort()
        elif not connection.waiting:
            connection.channel.close()
            self._connection = None

    # ---- volumes

    async def create_volume(self, name: str, size: int, copies: int = 0) -> int:
        """The vid of a new volume."""
        variant = _VDI_VARIANT.pack(size, 0, copies, 0, 0, 0, 0, 0)
        response = await self.request(Request(Op.NEW_VDI, variant=variant, body=name.encode().ljust(256, b"\0")))
        # A create that was sent twice finds its own work.
        assert response.result in (Result.SUCCESS, Result.VDI_EXIST), Result(response.result).name
        return await self.find_volume(name)

    async def snapshot(self, name: str, vid: int, size: int) -> int:
        """The volume, now ``vid``, goes on under the vid that is returned; what it was remains as a snapshot."""
        variant = _VDI_VARIANT.pack(size, vid, 0, 0, 0, 0, 1, 0)
        while True:
            request = Request(
                Op.NEW_VDI, proto=2, variant=variant, flags=FLAG_WRITE, body=name.encode().ljust(256, b"\0")
            )
            request.data_length = len(request.body)
            with trio.move_on_after(ANSWER_S):
                await self.attempt(request)
            # Whatever the answer was, or if there was none: what counts is whether the volume has moved on.
            for _ in range(5):
                working = await self.find_volume(name)
                if working != vid:
                    return working
                await trio.sleep(2)

    async def find_volume(self, name: str) -> int:
        """The vid of an existing volume."""
        variant = _VDI_VARIANT.pack(0, 0, 0, 0, 0, 0, 0, 0)
        request = Request(Op.GET_VDI_INFO, variant=variant, body=name.encode().ljust(256, b"\0"))
        response = await self.succeed(request)
        return int.from_bytes(response.variant[4:8], "little")

    async def read(self, oid: int, offset: int, length: int) -> bytes:
        response = await self.succeed(Request(Op.READ_OBJ, oid=oid, offset=offset, data_length=length))
        assert len(response.body) == length, f"{len(response.body)} bytes instead of {length}"
        return bytes(response.body)

    async def write(self, oid: int, offset: int, data: bytes) -> None:
        await self.succeed(Request(Op.WRITE_OBJ, oid=oid, offset=offset, body=data))

    async def create(self, oid: int, data: bytes = b"", offset: int = 0, cow_oid: int = 0) -> None:
        flags = FLAG_WRITE | (Flag.COW if cow_oid else 0)
        request = Request(Op.CREATE_AND_WRITE_OBJ, oid=oid, offset=offset, body=data, cow_oid=cow_oid, flags=flags)
        await self.succeed(request)
