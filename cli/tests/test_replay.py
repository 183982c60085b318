"""Our dog sends what the original sent, and prints what it printed, in every recorded session."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import replay
from replay import recorded_stdin

from sheepdog.testing.vectors import find_vectors, session_index, vectors_path

# Requests of these sessions run in parallel in the original, so only their set is compared.
PARALLEL = ("vdi-check-", "cluster-check-", "cluster-snapshot-save-", "cluster-snapshot-load-")

# Sessions whose output cannot be the original's, and why.
OTHER_STDOUT = {
    "dog-node-stat-used-1n": "the original prints the read count under Write and the write count under Read",
    "dog-node-stat-used-3n": "the original prints the read count under Write and the write count under Read",
    "dog-cluster-recover-force-refused-1n": "the wording of the caution is ours",
    "dog-cluster-recover-force-refused-3n": "the wording of the caution is ours",
    "dog-cluster-recover-force-3v": "the wording of the caution is ours",
    "dog-cluster-snapshot-load-3n": "the drawing of the banner is ours",
    "dog-cluster-snapshot-load-declined-1n": "the drawing of the banner is ours",
}

# Sessions in which our dog asks less than the original, in another order.
FEWER_REQUESTS = {
    "dog-vdi-backup-1n": "objects that both snapshots share are not read and compared with themselves",
    "dog-vdi-backup-3n": "objects that both snapshots share are not read and compared with themselves",
    "dog-vdi-restore-1n": "inodes are read once; the working vdi is looked at before it is deleted",
    "dog-vdi-restore-3n": "inodes are read once; the working vdi is looked at before it is deleted",
}

# Sessions in which our dog asks for more than was recorded, so that the scripted sheep cannot answer.
MORE_REQUESTS = {
    "dog-cluster-snapshot-load-3n": "deleted vdis between those that are loaded get inodes without a "
    "name; otherwise names are not found up to the newest snapshot",
}

# Before our dog speaks of damage it looks again, since it may have seen a write on its way. The recording knows only
# digests of the strips, so what is replayed does not fit together.
LOOKS_AGAIN = {"dog-vdi-check-ec-3n": frozenset({0xA4})}

ANSWERS = {
    "cluster recover force": b"yes\n",
    "cluster snapshot load": b"yes\n",
}


def index() -> list[dict]:
    if find_vectors() is None:
        return []
    return [row for row in session_index() if row.get("client") == "dog" and row.get("file")]


def name_of(row: dict) -> str:
    return row["file"].removesuffix(".jsonl")


def stdin_of(row: dict) -> bytes:
    for start, answer in ANSWERS.items():
        if " ".join(row["args"]).startswith("dog " + start):
            return answer
    if row["stdin"] == "stdout of the dog-vdi-backup session":
        session = row["file"].replace("restore", "backup")
        words = ["vdi", "backup", "thin", "-F", "snap1", "-s", "snap2"]
        return replay.replay(session, words, ordered=False).stdout
    return recorded_stdin(row["stdin"])


def test_recordings_are_there() -> None:
    """The recorded sessions are part of what CI checks; elsewhere they may be missing."""
    assert vectors_path()


def saved_cluster(tmp_path: Path, cluster: str) -> Path:
    """The directory that the recorded ``cluster snapshot save`` made."""
    target = tmp_path / "cs"
    session = f"dog-cluster-snapshot-save-{cluster}.jsonl"
    saved = replay.replay(session, ["cluster", "snapshot", "save", "cs1", str(target)], ordered=False)
    assert saved.code == 0, saved.stderr
    return target


@pytest.mark.parametrize("row", [pytest.param(row, id=name_of(row)) for row in index()])
def test_session(row: dict, tmp_path: Path) -> None:
    """Same requests, same output, same exit code."""
    name = name_of(row)
    if name in MORE_REQUESTS:
        pytest.skip(MORE_REQUESTS[name])
    words = list(row["args"][1:])
    if words[:2] == ["cluster", "snapshot"]:
        directory = tmp_path / "cs"
        if words[2] != "save":
            directory = saved_cluster(tmp_path, row["cluster"])
        words = [str(directory) if word == "/srv/cs" else word for word in words]
    ordered = name not in FEWER_REQUESTS and not any(part in name for part in PARALLEL)

    outcome = replay.replay(
        row["file"], words, stdin=stdin_of(row), ordered=ordered, again=LOOKS_AGAIN.get(name, frozenset())
    )

    assert outcome.unexpected == []
    if name not in FEWER_REQUESTS:
        assert outcome.unused == []
    assert outcome.code == row["exit"], outcome.stderr
    if name not in OTHER_STDOUT:
        check_stdout(row, outcome.stdout)


def check_stdout(row: dict, stdout: bytes) -> None:
    if "stdout" in row and row["stdout_len"] < 4096:
        assert stdout == row["stdout"].encode("latin-1")
    assert len(stdout) == row["stdout_len"], stdout[:2000]
    if "stdout_sha256" in row:
        assert hashlib.sha256(stdout).hexdigest() == row["stdout_sha256"], stdout[:2000]
