"""The comparison of durable writes measures and reports; only its parts without a cluster are run here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "durable.py"


@pytest.mark.parametrize(("part", "rows"), [("local", 5), ("coding", 6)])
def test_parts(part, rows):
    """Each part gives one row for each load, with a rate."""
    arguments = [sys.executable, str(SCRIPT), "--only", part, "--seconds", "0.05", "--json"]
    done = subprocess.run(arguments, capture_output=True, check=True, timeout=60)

    found = json.loads(done.stdout)
    assert len(found) == rows
    assert all(row["per_second"] > 0 and row["mb_per_second"] > 0 for row in found)
    assert len({(row["target"], row["what"], row["depth"]) for row in found}) == rows
