"""Real etcd servers."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from sheepdog.testing import services
from sheepdog.testing.certificates import Authority
from sheepdog.testing.cluster_kit import once_is_enough


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    once_is_enough(items, Path(__file__).parent)


@pytest.fixture(autouse=True)
def no_hang(request):
    with services.hang_guard(request.config):
        yield


@pytest.fixture(scope="session")
def etcd(tmp_path_factory):
    """A server for the whole run; every test takes a prefix of its own."""
    with ExitStack() as stack:
        yield services.start_etcd(tmp_path_factory.mktemp("etcd"), stack)


@pytest.fixture
def own_server(tmp_path):
    """A server that the test may stop and restart."""
    with ExitStack() as stack:
        yield services.start_etcd(tmp_path, stack)


@pytest.fixture
def ensemble(tmp_path):
    """Three servers that need two for a quorum."""
    with ExitStack() as stack:
        yield services.start_etcd_ensemble(tmp_path, stack)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "authority")


@pytest.fixture
def tls_server(tmp_path, authority):
    """A server that wants a certificate of every client."""
    with ExitStack() as stack:
        yield services.start_etcd(tmp_path, stack, tls=services.Tls(authority.ca, *authority.issue("server")))
