"""``dog cluster driver``: what it prints for what a sheep tells."""

from __future__ import annotations

import json
from typing import Any

import cbor2
import pytest
from clusters import Cluster

STATUS: dict[str, Any] = {
    "driver": "raft",
    "detection_s": 4.0,
    "session": "alive",
    "status": {"voters": "10.0.0.4:7100", "leader": "10.0.0.4:7100", "quorum": True, "members": 2, "lease": None},
    "round_trip_s": 0.0123,
    "members": ["10.0.0.4:7000", "10.0.0.5:7000"],
}
LOST = {"driver": "zookeeper", "detection_s": 4.0, "session": "none", "status": {}, "error": "no member", "members": []}


def told(status: object) -> Cluster:
    """A sheep that tells this."""
    cluster = Cluster()
    cluster.table[0xD2] = lambda header, data: (0, cbor2.dumps(status), b"")
    return cluster


def test_text() -> None:
    """Name, session, the driver's own words, members and round trip, one per line."""
    outcome = told(STATUS).dog("cluster", "driver")

    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.stdout.decode().splitlines() == [
        "Driver:         raft",
        "Session:        alive",
        "Voters:         10.0.0.4:7100",
        "Leader:         10.0.0.4:7100",
        "Quorum:         yes",
        "Lease:          none",
        "Members:        2 (10.0.0.4:7000, 10.0.0.5:7000)",
        "Detection:      a dead member is out within 4.0 s",
        "Round trip:     12.3 ms",
    ]


def test_raw() -> None:
    """For scripts: a word, a blank, the value."""
    lines = told(STATUS).dog("cluster", "driver", "-r").stdout.decode().splitlines()

    assert lines[0] == "driver raft" and lines[-1] == "round_trip 12.3 ms"


def test_json() -> None:
    """The document is what the sheep told."""
    assert json.loads(told(STATUS).dog("cluster", "driver", "--json").stdout) == STATUS


def test_no_session() -> None:
    """A sheep without a session says why, and the exit code tells."""
    outcome = told(LOST).dog("cluster", "driver")

    assert outcome.code == 2
    assert outcome.stdout.decode().splitlines()[-1] == "Error:          no member"


@pytest.mark.parametrize(
    ("result", "words"),
    [(0x05, "cannot tell about its cluster driver"), (0x01, "Failed to get the state of the cluster driver: ")],
)
def test_refused(result: int, words: str) -> None:
    """An original sheep answers that it does not know the question; dog says what that means."""
    outcome = Cluster(result).dog("cluster", "driver")

    assert (outcome.code, outcome.stdout) == (1, b"")
    assert words in outcome.stderr


@pytest.mark.parametrize("body", [b"", b"\xff", cbor2.dumps([1]), cbor2.dumps({"status": 5})])
def test_nonsense(body: bytes) -> None:
    """An answer that is no map of words is an error, not a traceback."""
    cluster = Cluster()
    cluster.table[0xD2] = lambda header, data: (0, body, b"")
    outcome = cluster.dog("cluster", "driver")

    assert outcome.code == 1 and "not understood" in outcome.stderr
