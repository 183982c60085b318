"""A front end: who connects is told the first bytes of every volume, a line for each."""

from __future__ import annotations

from functools import partial

import anyio
from anyio.abc import TaskStatus

from sheepdog.api import Channel, ConfigError, FrontEnd, FrontEndContext, Receiver, completed, hookimpl

SHEEPDOG_API = (1, 0)


class Deaf:
    """The receiver of a client that has nothing to say."""

    def __init__(self) -> None:
        self._view = memoryview(bytearray(512))

    def get_buffer(self, size_hint: int) -> memoryview:
        return self._view

    def buffer_updated(self, count: int) -> None: ...

    def closed(self, error: Exception | None) -> None: ...

    def writable(self) -> None: ...


class Heads(FrontEnd):
    def __init__(self, address: str, length: int) -> None:
        self._address = address
        self._length = length

    async def serve(self, context: FrontEndContext, *, task_status: TaskStatus[tuple[str, ...]]) -> None:
        async def tell(channel: Channel) -> None:
            for info in await context.volumes.list():
                volume = await context.volumes.open(info.name, snapshot=info.snap_id if info.snapshot else None)
                try:
                    data = await completed(partial(volume.read, 0, self._length))
                finally:
                    await volume.aclose()
                channel.write([f"{info.name} {bytes(data).hex()}\n".encode()])
            channel.close()

        async with anyio.create_task_group() as group:

            def accept(channel: Channel) -> Receiver:
                group.start_soon(tell, channel)
                return Deaf()

            listener = await context.services.transport.listen(self._address, accept)
            try:
                task_status.started(listener.addresses)
                await anyio.sleep_forever()
            finally:
                with anyio.CancelScope(shield=True):
                    await listener.aclose()


@hookimpl
def sheepdog_frontend(options: str) -> FrontEnd:
    address, _, length = options.partition(",")
    if ":" not in address or not length.isdecimal():
        raise ConfigError(f"heads: {options!r}: write ADDRESS,LENGTH")
    return Heads(address, int(length))
