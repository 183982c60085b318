"""``dog node scrub``: what it asks for, and what it prints for what a sheep tells."""

from __future__ import annotations

import json
from struct import unpack_from
from typing import Any

import cbor2
import pytest
from clusters import Cluster

STATUS: dict[str, Any] = {
    "running": False, "waiting": False, "stopped": False, "rate": 32_000_000, "interval": 604_800, "next": 0,
    "started": 0, "finished": 0, "done": 30, "total": 40, "bytes": 3 << 20, "found": 3, "repaired": 1, "repairing": 0,
    "unknown": 5, "unrepairable": [["80a3f10000000001", -1, "it differs"], ["00a3f10000000002", 2, "it grew"]],
}  # fmt: skip


class Scrubbing(Cluster):
    """A sheep that tells this and remembers what it was asked for."""

    def __init__(self, status: object) -> None:
        super().__init__()
        self.asked: list[tuple[int, int]] = []
        self.table[0xD3] = self.answer
        self.status = status

    def answer(self, header: bytes, data: bytes) -> tuple[int, bytes, bytes]:
        self.asked.append(unpack_from("<II", header, 16))
        return 0, cbor2.dumps(self.status), b""


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ((), (0, 0)),
        (("status",), (0, 0)),
        (("start",), (1, 0)),
        (("start", "-R", "50"), (1, 50)),
        (("start", "--rate=7"), (1, 7)),
        (("stop",), (2, 0)),
    ],
)
def test_requests(words: tuple[str, ...], asked: tuple[int, int]) -> None:
    """Each word asks for its own; start and stop say nothing."""
    sheep = Scrubbing(STATUS)

    outcome = sheep.dog("node", "scrub", *words)

    assert (outcome.code, outcome.stderr, sheep.asked) == (0, "", [asked])
    assert bool(outcome.stdout) == (asked[0] == 0)


def test_text() -> None:
    """One fact per line, and what cannot be repaired by name."""
    outcome = Scrubbing(STATUS).dog("node", "scrub")

    assert outcome.stdout.decode().splitlines() == [
        "State:          idle",
        "Started:        never",
        "Finished:       never",
        "Objects:        30 of 40 (75.0%), 3.0 MB",
        "Rate:           32 MB/s at most",
        "Next:           only when asked for",
        "Unknown:        5",
        "Found:          3",
        "Repaired:       1",
        "Repairing:      0",
        "Unrepairable:   2",
        "  80a3f10000000001: it differs",
        "  00a3f10000000002 strip 2: it grew",
    ]


@pytest.mark.parametrize(
    ("more", "state"),
    [({"running": True}, "running"), ({"running": True, "waiting": True}, "waiting"), ({"stopped": True}, "stopped")],
)
def test_raw(more: dict[str, bool], state: str) -> None:
    """For scripts: a word, a blank, the value."""
    lines = Scrubbing({**STATUS, **more}).dog("node", "scrub", "status", "-r").stdout.decode().splitlines()

    assert lines[0] == f"state {state}"
    assert lines[-1] == "bad 00a3f10000000002 2 it grew"
    assert "bytes 3145728" in lines


def test_json() -> None:
    """The document is what the sheep told."""
    assert json.loads(Scrubbing(STATUS).dog("node", "scrub", "--json").stdout) == STATUS


@pytest.mark.parametrize(
    ("result", "code", "words"), [(0x05, 1, "does not scrub"), (0x8B, 1, "is a gateway"), (0x06, 1, "System error")]
)
def test_refused(result: int, code: int, words: str) -> None:
    """A sheep that cannot, a gateway, and any other refusal are told apart."""
    sheep = Cluster()
    sheep.table[0xD3] = lambda header, data: (result, b"", b"")

    outcome = sheep.dog("node", "scrub", "start")

    assert outcome.code == code
    assert words.lower() in outcome.stderr.lower()


def test_garbage() -> None:
    """An answer that is no map is an error of the protocol."""
    assert Scrubbing([1, 2]).dog("node", "scrub").code == 2


@pytest.mark.parametrize("rate", ["0", "-1", "x", "1.5", "100001"])
def test_bad_rate(rate: str) -> None:
    """The rate is whole MB/s."""
    outcome = Scrubbing(STATUS).dog("node", "scrub", "start", "-R", rate)

    assert outcome.code == 64
    assert "Invalid rate" in outcome.stderr
