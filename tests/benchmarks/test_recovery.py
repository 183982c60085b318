"""The benchmark of recovery runs on real sheep and gives all its figures; how good they are is not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "recovery.py"


def test_rows():
    """The plain copy, each recovery and each load have a row, and what a death took away is what comes back."""
    arguments = [sys.executable, str(SCRIPT), "--size", "48", "--seconds", "0.3", "--op", "write", "--json"]
    done = subprocess.run(arguments, capture_output=True, check=True, timeout=110)

    rows = {row["what"]: row for row in json.loads(done.stdout)}
    assert list(rows) == [
        "plain copy", "idle: writes of 4 KiB", "idle: reads of 4 KiB", "death", "join", "death, writes",
        "death, writes of 4 KiB", "join, writes", "join, writes of 4 KiB",
    ]  # fmt: skip
    moved = [rows[what] for what in ("death", "join", "death, writes", "join, writes")]
    assert all(row["mb"] > 0 and row["mb_per_second"] > 0 and row["of_copy"] > 0 for row in moved)
    assert {row["mb"] for row in moved} == {moved[0]["mb"]}, "the same objects each time"
    assert all(rows[f"{what}, writes of 4 KiB"]["p99_ms"] > 0 for what in ("death", "join"))
