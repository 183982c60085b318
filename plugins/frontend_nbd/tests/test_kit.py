"""The front end by the checks that every front end passes."""

from __future__ import annotations

from functools import partial

import anyio.to_thread
import pytest

from sheepdog.client.nbd import NbdClient
from sheepdog.testing.frontend_kit import FrontEndClient, FrontEndKit
from sheepdog_frontend_nbd import sheepdog_frontend


@pytest.fixture(params=[("asyncio", {"use_uvloop": True}), ("trio", {})], ids=["uvloop", "trio"])
def anyio_backend(request):
    return request.param


class KitClient(FrontEndClient):
    def __init__(self, client):
        self._client = client

    async def read(self, offset, length):
        return await anyio.to_thread.run_sync(self._client.read, offset, length, abandon_on_cancel=True)

    async def write(self, offset, data):
        await anyio.to_thread.run_sync(self._client.write, offset, data, abandon_on_cancel=True)

    async def aclose(self):
        await anyio.to_thread.run_sync(self._client.disconnect)


class _NbdKit(FrontEndKit):
    bad_options = (
        "nonsense", "127.0.0.1:port", "127.0.0.1:70000", "unix:", "::1:10809",
        "127.0.0.1:0,color=blue", "127.0.0.1:0,max-connections=0", "127.0.0.1:0,max-connections=many",
        "127.0.0.1:0,read-only=yes", "127.0.0.1:0,tls=require", "127.0.0.1:0,tls=maybe",
        "127.0.0.1:0,tls-cert=/nowhere",
        "127.0.0.1:0,tls-cert=/nowhere,tls-key=/nowhere", "127.0.0.1:0,tls-ca=/nowhere",
        "127.0.0.1:0,read-only,read-only",
    )  # fmt: skip

    def make(self, options):
        return sheepdog_frontend(options)

    async def open(self, address, name):
        client = await anyio.to_thread.run_sync(partial(NbdClient.connect, address))
        await anyio.to_thread.run_sync(client.go, name)
        return KitClient(client)


class TestOverTcp(_NbdKit):
    pass


class TestOverUnixSocket(_NbdKit):
    @pytest.fixture(autouse=True)
    def _socket(self, tmp_path):
        self.options = f"unix:{tmp_path}/nbd.sock"
