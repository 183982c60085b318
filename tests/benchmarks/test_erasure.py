"""The measurement of erasure coding reports; only its part without a cluster is run here."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "erasure.py"


def test_coding():
    """Every coder and policy gives a rate for both directions, and plain Python is never missing."""
    arguments = [sys.executable, str(SCRIPT), "--only", "coding", "--seconds", "0.01", "--json"]
    done = subprocess.run(arguments, capture_output=True, check=True, timeout=120)

    found = json.loads(done.stdout)
    assert found[0]["ratio"] == 1 and all(row["mb_per_second"] > 0 and row["ratio"] > 0 for row in found)
    assert {row["what"].partition(",")[0] for row in found if row["target"] == "python 4:2"} == {"encode", "decode"}
    assert len({(row["target"], row["what"]) for row in found}) == len(found)
