"""The ZooKeeper driver against the conformance kit and a real server."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from functools import partial

import pytest
from kazoo.client import KazooClient

from sheepdog.testing import services
from sheepdog.testing.cluster_kit import ClusterFactory, ClusterKit
from sheepdog.testing.cluster_worker import driver_cluster
from sheepdog.testing.service_kit import KitService, ServiceKit, StartService, StartTls, TlsDriver, TlsKit
from sheepdog_cluster_zk.driver import ZookeeperDriver
from sheepdog_cluster_zk.options import ZookeeperOptions

COUNTER = itertools.count()


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def driver(session_s, servers, connect_s) -> ZookeeperDriver:
    addresses = tuple(server.address for server in servers)
    return ZookeeperDriver(ZookeeperOptions(addresses, "/x", session_s, connect_timeout_s=connect_s))


def spoil(server) -> None:
    client = KazooClient(server.address)
    client.start()
    client.create("/x/state", b"something else", makepath=True)
    client.stop()
    client.close()


class TestZookeeper(ClusterKit, ServiceKit, TlsKit):
    """All guarantees of the contract, with the shortest session time that does not lie on a busy machine."""

    wrong_name = "CERTIFICATE_VERIFY_FAILED"
    strange_client = "do not agree on encryption"

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

    @pytest.fixture
    def start_service(self, tmp_path) -> StartService:
        with ExitStack() as stack:

            def start(count: int) -> KitService:
                if count == 1:
                    servers = [services.start_zookeeper(tmp_path, stack)]
                else:
                    servers = services.start_zookeeper_ensemble(tmp_path, stack)
                return KitService(servers, driver, partial(spoil, servers[0]))

            yield start

    @pytest.fixture
    def start_tls(self) -> StartTls:
        return lambda directory, stack, tls: services.start_zookeeper(directory, stack, tls=tls)

    @pytest.fixture
    def tls_driver(self) -> TlsDriver:
        def make(server, ca, certificate, connect_s) -> ZookeeperDriver:
            cert, key = map(str, certificate) if certificate else (None, None)
            options = ZookeeperOptions(
                (server.address,), "/x", 4.0, tls=True, ca=str(ca), cert=cert, key=key, connect_timeout_s=connect_s
            )
            return ZookeeperDriver(options)

        return make
