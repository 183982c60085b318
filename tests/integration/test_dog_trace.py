"""``dog trace`` with real sheep: requests are recorded between enable and disable, fetched, and drawn."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scenes import KiB, pattern, read, write

from sheepdog.testing.cluster import SheepCluster

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


@pytest.fixture
def cluster(
    start_cluster: Callable[..., SheepCluster], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> SheepCluster:
    """One node and one volume; dog puts what it fetches into a directory of the test."""
    cluster = start_cluster(1, driver="local", store="plain", redundancy="1")
    cluster.format("-z", "20")
    cluster.dog("vdi", "create", "v", "2M")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return cluster


def refused(cluster: SheepCluster, *words: str, message: str) -> None:
    done = cluster.dog("trace", *words, check=False)
    assert (done.returncode, done.stdout, done.stderr.decode()) == (1, b"", f"{message}\n")


def text(cluster: SheepCluster, *words: str, **options: Any) -> str:
    return cluster.dog("trace", *words, **options).stdout.decode()


def test_graph(cluster: SheepCluster, tmp_path: Path) -> None:
    """What is asked while the tracer is on is recorded, from the request to its answer, and nothing else is."""
    write(cluster, "v", 0, pattern(1, 4 * KiB))
    refused(cluster, "graph", "cat", message="trace file is empty")
    assert text(cluster, "status") == "graph\tdisabled\nloop_checker\tdisabled\n"
    refused(cluster, "disable", "graph", message="tracer graph is not enabled")
    refused(cluster, "enable", "nosuch", message="no such tracer nosuch")

    assert text(cluster, "enable", "graph") == ""
    assert text(cluster, "status") == "graph\tenabled\nloop_checker\tdisabled\n"
    refused(cluster, "enable", "graph", message="tracer graph is already enabled")
    for _ in range(3):
        assert read(cluster, "v", 0, 4 * KiB) == pattern(1, 4 * KiB)
    assert text(cluster, "disable", "graph") == ""
    read(cluster, "v", 0, 4 * KiB)

    assert (tmp_path / "tracefile").stat().st_size % 80 == 0
    drawn = text(cluster, "graph", "cat").splitlines()
    assert drawn[0] == "   Thread Name      |  Time(us)  |  Function Graph" and drawn[1] == "-" * 50
    reads = [index for index, line in enumerate(drawn) if line.endswith("|            |READ_OBJ() {")]
    assert reads and re.fullmatch(r".{20}\| *\d+\.\d{1,3} *\|}", drawn[reads[0] + 1])
    totals = text(cluster, "graph", "stat").splitlines()
    assert totals[0] == "   Total (s)   Per Call (ms)   Calls   Name"
    (calls,) = (int(line.split()[2]) for line in totals[1:] if line.endswith(" READ_OBJ"))
    assert calls == len(reads) >= 3
    assert not any("TRACE" in line for line in totals)


def test_loop_checker(cluster: SheepCluster) -> None:
    """It can be on beside the other one, and each is switched by itself."""
    for tracer in ("graph", "loop_checker"):
        cluster.dog("trace", "enable", tracer)
    cluster.dog("trace", "disable", "graph")
    assert text(cluster, "status") == "graph\tdisabled\nloop_checker\tenabled\n"

    cluster.dog("trace", "disable", "loop_checker")

    assert text(cluster, "status") == "graph\tdisabled\nloop_checker\tdisabled\n"
