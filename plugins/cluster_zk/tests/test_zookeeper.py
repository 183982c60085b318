"""The ZooKeeper driver against the conformance kit and a real server."""

from __future__ import annotations

import itertools

import pytest

from sheepdog.testing.cluster_kit import ClusterFactory, ClusterKit
from sheepdog.testing.cluster_worker import driver_cluster

COUNTER = itertools.count()


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestZookeeper(ClusterKit):
    """All guarantees of the contract, with the shortest session time that does not lie on a busy machine."""

    @pytest.fixture
    def cluster_factory(self, zookeeper, anyio_backend_name) -> ClusterFactory:
        backend = {"asyncio": "uvloop", "trio": "trio"}[anyio_backend_name]
        return lambda: driver_cluster(
            "sheepdog_cluster_zk",
            f"{zookeeper.address}/kit/{next(COUNTER)},timeout=1200",
            backend=backend,
            pause_s=2.0,
            blip_s=0.1,
        )
