"""Both implementations of volumes, by the same checks."""

from __future__ import annotations

import pytest

from sheepdog.testing.memory_volumes import MemoryVolumes, VolumesCase, VolumesKit


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    return request.param


class MemoryCase(VolumesCase):
    def __init__(self):
        self.volumes = MemoryVolumes()

    async def create(self, name, size_bytes):
        self.volumes.create(name, size_bytes)

    async def snapshot(self, name, tag):
        self.volumes.snapshot(name, tag)

    async def resize(self, name, size_bytes):
        self.volumes.resize(name, size_bytes)


class GatewayCase(VolumesCase):
    def __init__(self, cluster, volumes):
        self.cluster = cluster
        self.volumes = volumes

    async def create(self, name, size_bytes):
        self.cluster.create_vdi(name, size_bytes)

    async def snapshot(self, name, tag):
        await self.cluster.snapshot_vdi(name, tag)

    async def resize(self, name, size_bytes):
        self.cluster.put_header(self.cluster.working(name), vdi_size=size_bytes)


class TestMemoryVolumes(VolumesKit):
    @pytest.fixture
    def case(self):
        return MemoryCase()


class TestGatewayVolumes(VolumesKit):
    @pytest.fixture(params=[None, 1], ids=["at-once", "later"])
    async def case(self, request, make_cluster):
        return GatewayCase(*make_cluster(request.param))
