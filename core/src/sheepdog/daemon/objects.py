"""Awaitable object I/O for the control plane, on top of the gateway's callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio

from sheepdog.contracts.store import Buffer
from sheepdog.daemon.gateway import Gateway
from sheepdog.daemon.outbox import Outbox
from sheepdog.wire.results import error_for


class ObjectAccess:
    """``interfaces.Objects`` for one sheep. Raises the error of the result that a client would get."""

    def __init__(self, gateway: Gateway, outbox: Outbox) -> None:
        self._gateway = gateway
        self._outbox = outbox

    async def _done(self, oid: int, start: Callable[[Callable[[int, Any], None]], None]) -> Any:  # Any: bytes of a read
        event = anyio.Event()
        outcome: list[tuple[int, Any]] = []

        def done(result: int, data: Any) -> None:  # Any: as above
            outcome.append((result, data))
            event.set()

        with self._outbox:
            start(done)
        if not outcome:
            await event.wait()
        result, data = outcome[0]
        if result:
            raise error_for(result, f"oid={oid:016x}")
        return data

    async def read(self, oid: int, offset: int, length: int) -> Buffer:
        """``length`` bytes; what lies behind the stored size reads as zeros."""
        data: Buffer = await self._done(oid, lambda done: self._gateway.submit_read(oid, offset, length, done))
        return data

    async def write(self, oid: int, offset: int, data: Buffer) -> None:
        """Every current holder has the data. Inside an inode's map, references that are replaced are dropped."""
        await self._done(oid, lambda done: self._gateway.submit_write(oid, offset, data, done, checked=False))

    async def create(
        self, oid: int, offset: int, data: Buffer, cow_oid: int = 0, copies: int = 0, policy: int = 0
    ) -> None:
        """The object exists at full size with ``data`` at ``offset`` and zeros (or ``cow_oid``'s bytes) elsewhere."""
        await self._done(
            oid,
            lambda done: self._gateway.submit_create(
                oid, offset, data, done, cow_oid=cow_oid, copies=copies, policy=policy, checked=False
            ),
        )

    async def remove(self, oid: int) -> None:
        """No holder has the object."""
        await self._done(oid, lambda done: self._gateway.submit_remove(oid, lambda result: done(result, None)))
