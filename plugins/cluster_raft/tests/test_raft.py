"""The Raft driver against the conformance kit: members follow voters."""

from __future__ import annotations

import itertools
from contextlib import asynccontextmanager

import anyio.to_thread
import pytest

from sheepdog.testing.cluster_kit import ClusterFactory, ClusterKit
from sheepdog.testing.cluster_worker import driver_cluster
from sheepdog.testing.service_kit import KitServers, ServersKit, StartServers
from sheepdog_cluster_raft.driver import RaftDriver
from sheepdog_cluster_raft.options import RaftOptions


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Voter:
    """One of a group of voters, for the kit."""

    def __init__(self, group, index: int) -> None:
        self.group = group
        self.index = index

    def start(self) -> None:
        self.group.start(self.index)

    def stop(self) -> None:
        self.group.stop(self.index)

    def wait(self) -> None:
        self.group.wait()


class TestRaft(ClusterKit, ServersKit):
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

    @pytest.fixture
    def start_servers(self, tmp_path, make_voters) -> StartServers:
        def start(count: int) -> KitServers[Voter]:
            group = make_voters(tmp_path / "servers", count)

            def driver(session_s, voters, connect_s) -> RaftDriver:
                peers = tuple(group.addresses[voter.index] for voter in voters)
                return RaftDriver(
                    RaftOptions(peers, group.secret, "none", timeout_s=session_s, connect_timeout_s=connect_s)
                )

            return KitServers([Voter(group, index) for index in range(count)], driver)

        return start
