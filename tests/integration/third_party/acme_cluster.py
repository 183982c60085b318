"""A cluster driver for a cluster of one, as somebody writes it who has only docs/plugins.md and the contracts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from sheepdog.api import (
    PAYLOAD_BYTES_MAX,
    ClusterDriver,
    ClusterSession,
    ConfigError,
    Delivered,
    Event,
    Joined,
    Node,
    PayloadTooLarge,
    Updated,
    hookimpl,
)

SHEEPDOG_API = (1, 0)


class AloneSession(ClusterSession):
    def __init__(self, me: Node, greeting: bytes) -> None:
        self._me = me
        self._send, self._receive = anyio.create_memory_object_stream[Event](1000)
        self._send.send_nowait(Joined(me, greeting, (me,)))

    async def events(self) -> AsyncIterator[Event]:
        async for event in self._receive:
            yield event

    async def broadcast(self, payload: bytes) -> None:
        if len(payload) > PAYLOAD_BYTES_MAX:
            raise PayloadTooLarge(f"{len(payload)} bytes")
        await self._send.send(Delivered(self._me.id, payload))

    async def update(self, node: Node) -> None:
        self._me = node
        await self._send.send(Updated(node, (node,)))

    def close(self) -> None:
        self._send.close()
        self._receive.close()


class AloneDriver(ClusterDriver):
    name = "alone"
    default_host = "127.0.0.1"

    @asynccontextmanager
    async def join(self, me: Node, greeting: bytes) -> AsyncIterator[ClusterSession]:
        session = AloneSession(me, greeting)
        try:
            yield session
        finally:
            session.close()


@hookimpl
def sheepdog_cluster_driver(options: str) -> ClusterDriver:
    if options:
        raise ConfigError(f"alone: {options!r}: this driver has no options")
    return AloneDriver()
