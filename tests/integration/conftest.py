"""Clusters of real processes for the tests of this directory.

A cluster is shared by the tests of a module, which keep out of each other's way by the names of their volumes. Whatever
a test does, no sheep may answer it with a traceback in its log: that is checked after every test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sheepdog.testing.cluster import SheepCluster

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "third_party"), str(HERE.parent)]  # scenes, plugins of others, builders

_running: list[SheepCluster] = []
_read: dict[Path, int] = {}


def _tracebacks() -> list[str]:
    """What the logs of all sheep say of unexpected exceptions since the last call."""
    found = []
    for cluster in _running:
        for path in sorted(cluster.base.glob("*.log")):
            with path.open("rb") as log:
                log.seek(_read.get(path, 0))
                text = log.read()
                _read[path] = log.tell()
            at = text.find(b"Traceback (most recent call last)")
            if at >= 0:
                found.append(f"{path.name}: ...{text[max(0, at - 400) : at + 4000].decode(errors='replace')}")
    return found


@pytest.fixture(autouse=True)
def no_traceback() -> Iterator[None]:
    """No sheep logged a traceback during the test."""
    yield
    found = _tracebacks()
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def start_cluster() -> Iterator[Callable[..., SheepCluster]]:
    """A function with the arguments of ``SheepCluster`` that starts one; it ends with the module.

    Tests of what depends on members that come and go leave the driver to SHEEPDOG_TEST_CLUSTER; those of dog's output
    and the like name the local one.
    """
    mine: list[SheepCluster] = []

    def start(*arguments: Any, **options: Any) -> SheepCluster:  # Any: handed on to SheepCluster
        cluster = SheepCluster(*arguments, **options)
        mine.append(cluster)
        _running.append(cluster)
        cluster.start()
        return cluster

    yield start
    for cluster in mine:
        codes = {index: cluster.stop(index) for index, sheep in enumerate(cluster.sheep) if sheep.running}
        found = _tracebacks()
        _running.remove(cluster)
        cluster.close()
        assert not found, "\n".join(found)
        assert not any(codes.values()), f"exit codes of the sheep at the end: {codes}"


@pytest.fixture
def fresh_cluster(start_cluster: Callable[..., SheepCluster]) -> Iterator[Callable[..., SheepCluster]]:
    """As ``start_cluster``, for a cluster that only one test uses: its processes end with the test."""
    mine: list[SheepCluster] = []

    def start(*arguments: Any, **options: Any) -> SheepCluster:  # Any: handed on to SheepCluster
        cluster = start_cluster(*arguments, **options)
        mine.append(cluster)
        return cluster

    yield start
    for cluster in mine:
        for index, sheep in enumerate(cluster.sheep):
            if sheep.running:
                cluster.stop(index)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked ``soak`` run only with ``-m soak``, which is what ``./check --soak`` says."""
    if "soak" in (config.getoption("markexpr") or ""):
        return
    kept = [item for item in items if item.get_closest_marker("soak") is None]
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failed test shows the ends of the logs of the sheep that run."""
    report = yield
    if report.failed:
        for number, cluster in enumerate(_running):
            report.sections.append((f"sheep logs of cluster {number}", cluster.logs()))
    return report
