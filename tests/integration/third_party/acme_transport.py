"""A transport over whatever streams anyio can open."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anyio

from sheepdog.api import Address, StreamListening, StreamTransport, Transport, TransportError, hookimpl

SHEEPDOG_API = (1, 0)


async def connect(address: Address) -> tuple[anyio.abc.ByteStream, Address, Address]:
    try:
        if address.startswith("unix:"):
            return await anyio.connect_unix(address.removeprefix("unix:")), "unix:", address
        host, _, port = address.rpartition(":")
        return await anyio.connect_tcp(host, int(port)), "acme", address
    except OSError as error:
        raise TransportError(f"no connection to {address}: {error}") from error


async def listen(address: Address) -> Sequence[StreamListening]:
    try:
        if address.startswith("unix:"):
            path = Path(address.removeprefix("unix:"))
            path.unlink(missing_ok=True)
            return [StreamListening(await anyio.create_unix_listener(path), address, lambda: path.unlink())]
        host, _, port = address.rpartition(":")
        found = await anyio.create_tcp_listener(local_host=host or None, local_port=int(port))
        return [
            StreamListening(one, f"{host}:{one.extra(anyio.abc.SocketAttribute.local_port)}") for one in found.listeners
        ]
    except OSError as error:
        raise TransportError(f"cannot listen on {address}: {error}") from error


@hookimpl
def sheepdog_transport() -> Transport:
    return StreamTransport(connect, listen)
