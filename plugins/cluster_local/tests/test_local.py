"""The local driver against the conformance kit."""

from __future__ import annotations

import itertools

import pytest

from sheepdog.testing.cluster_kit import ClusterFactory, ClusterKit
from sheepdog.testing.cluster_worker import driver_cluster


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestLocal(ClusterKit):
    """All guarantees of the contract, with a timeout short enough for tests."""

    @pytest.fixture
    def cluster_factory(self, tmp_path, anyio_backend_name) -> ClusterFactory:
        names = itertools.count()
        backend = {"asyncio": "uvloop", "trio": "trio"}[anyio_backend_name]
        return lambda: driver_cluster(
            "sheepdog_cluster_local",
            f"{tmp_path}/cluster{next(names)},timeout=1500",
            backend=backend,
            pause_s=1.5,
            blip_s=0.1,
        )
