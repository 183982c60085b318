"""A real etcd server."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from sheepdog.testing import services
from sheepdog.testing.cluster_kit import once_is_enough
from sheepdog.testing.services import no_hang  # noqa: F401  a fixture for all tests here


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    once_is_enough(items, Path(__file__).parent)


@pytest.fixture(scope="session")
def etcd(tmp_path_factory):
    """A server for the whole run; every test takes a prefix of its own."""
    with ExitStack() as stack:
        yield services.start_etcd(tmp_path_factory.mktemp("etcd"), stack)
