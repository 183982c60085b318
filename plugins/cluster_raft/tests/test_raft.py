"""The Raft driver against the conformance kit: members follow voters."""

from __future__ import annotations

import itertools
from contextlib import asynccontextmanager

import anyio.to_thread
import pytest

from sheepdog.testing.cluster_kit import ClusterFactory, ClusterKit
from sheepdog.testing.cluster_worker import driver_cluster


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class TestRaft(ClusterKit):
    """All guarantees of the contract."""

    @pytest.fixture
    def cluster_factory(self, tmp_path, anyio_backend_name, make_voters) -> ClusterFactory:
        backend = {"asyncio": "uvloop", "trio": "trio"}[anyio_backend_name]
        count = itertools.count()

        @asynccontextmanager
        async def cluster():
            # The voters know nothing of the loop that members run on: one loop meets three of them, the other one.
            number = 1 if anyio_backend_name == "trio" else 3
            voters = await anyio.to_thread.run_sync(make_voters, tmp_path / str(next(count)), number)
            options = f"{voters.text},timeout=1500"
            async with driver_cluster(
                "sheepdog_cluster_raft", options, backend=backend, pause_s=2.5, blip_s=0.1
            ) as cluster:
                yield cluster

        return cluster
