"""The etcd driver against the conformance kit and a real server."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from functools import partial

import etcd3
import pytest

from sheepdog.testing import services
from sheepdog.testing.cluster_kit import ClusterFactory, ClusterKit
from sheepdog.testing.cluster_worker import driver_cluster
from sheepdog.testing.service_kit import KitService, ServiceKit, StartService, StartTls, TlsDriver, TlsKit
from sheepdog_cluster_etcd.driver import EtcdDriver
from sheepdog_cluster_etcd.options import EtcdOptions

COUNTER = itertools.count()


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def driver(session_s, servers, connect_s) -> EtcdDriver:
    endpoints = tuple(("127.0.0.1", server.port) for server in servers)
    return EtcdDriver(EtcdOptions(endpoints, "/x", int(session_s), connect_timeout_s=connect_s))


def spoil(server) -> None:
    client = etcd3.client("127.0.0.1", server.port)
    client.put("/x/member/y", "something else")
    client.close()


class TestEtcd(ClusterKit, ServiceKit, TlsKit):
    """All guarantees of the contract, with the shortest lease that etcd grants."""

    wrong_name = "Hostname"

    @pytest.fixture
    def cluster_factory(self, etcd, anyio_backend_name) -> ClusterFactory:
        backend = {"asyncio": "uvloop", "trio": "trio"}[anyio_backend_name]
        return lambda: driver_cluster(
            "sheepdog_cluster_etcd",
            f"{etcd.address}/kit/{next(COUNTER)},ttl=1",
            backend=backend,
            pause_s=2.5,
            blip_s=0.1,
        )

    @pytest.fixture
    def start_service(self, tmp_path) -> StartService:
        with ExitStack() as stack:

            def start(count: int) -> KitService:
                if count == 1:
                    servers = [services.start_etcd(tmp_path, stack)]
                else:
                    servers = services.start_etcd_ensemble(tmp_path, stack)
                return KitService(servers, driver, partial(spoil, servers[0]))

            yield start

    @pytest.fixture
    def start_tls(self) -> StartTls:
        return lambda directory, stack, tls: services.start_etcd(directory, stack, tls=tls)

    @pytest.fixture
    def tls_driver(self) -> TlsDriver:
        def make(server, ca, certificate, connect_s) -> EtcdDriver:
            cert, key = map(str, certificate) if certificate else (None, None)
            endpoints = (("127.0.0.1", server.port),)
            return EtcdDriver(EtcdOptions(endpoints, "/x", 4, None, None, str(ca), cert, key, connect_s))

        return make
