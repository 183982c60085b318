"""The pytest plugin that ships with core.

``sheep_cluster`` gives a factory for clusters of real processes::

    def test_survives(sheep_cluster):
        cluster = sheep_cluster(3)
        cluster.format()
        cluster.kill(1)
        cluster.wait_recovered()

Every cluster is gone after its test, and the logs of its sheep are shown with a test that fails. The kits' assertions
are rewritten like those of a test module, so a plugin author sees values and not only "assert False".
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from sheepdog.testing.cluster import SheepCluster

for _kit in ("cluster_kit", "store_kit", "redundancy_kit", "transport_kit", "frontend_kit"):
    pytest.register_assert_rewrite(f"sheepdog.testing.{_kit}")

_CLUSTERS: pytest.StashKey[list[SheepCluster]] = pytest.StashKey()


def pytest_configure(config: pytest.Config) -> None:
    """The marks of this plugin are known, so a plugin author can run with ``--strict-markers``."""
    for line in (
        "processes: starts real sheep processes",
        "service: needs a ZooKeeper or etcd server of this machine",
        "vm: boots a virtual machine",
        "slow: takes more than ten seconds",
    ):
        config.addinivalue_line("markers", line)


@pytest.fixture
def sheep_cluster(request: pytest.FixtureRequest) -> Iterator[Callable[..., SheepCluster]]:
    """A function that starts a ``SheepCluster``: it takes the arguments of that class; the sheep are members when it
    returns. Formatting is up to the test."""
    from sheepdog.testing.cluster import SheepCluster

    clusters: list[SheepCluster] = []
    request.node.stash[_CLUSTERS] = clusters

    def start(*arguments: Any, **options: Any) -> SheepCluster:  # Any: handed on to SheepCluster
        cluster = SheepCluster(*arguments, **options)
        clusters.append(cluster)
        cluster.start()
        return cluster

    yield start
    for cluster in reversed(clusters):
        cluster.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test shows the ends of its sheep's logs."""
    report = yield
    if report.failed and call.when == "call":
        clusters: list[SheepCluster] = item.stash.get(_CLUSTERS, [])
        for number, cluster in enumerate(clusters):
            report.sections.append((f"sheep logs of cluster {number}", cluster.logs()))
    return report
