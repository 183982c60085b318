"""What a voter makes of entries that come twice, in part, or from an old leader: the library alone gets these wrong."""

from __future__ import annotations

import logging

import pytest

from sheepdog.testing.services import free_ports
from sheepdog_cluster_raft.options import RaftOptions
from sheepdog_cluster_raft.server import ReplicatedLog, beat_entry


@pytest.fixture
def log(tmp_path):
    """One of three voters, which hears of the others what the test says; its first entry has index 1."""
    addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(3))
    log = ReplicatedLog(RaftOptions(addresses, "for tests", addresses[0], str(tmp_path)), tmp_path, lambda _: None)
    log.sent = []
    log._SyncObj__transport.send = lambda _, message: log.sent.append(message)
    yield log
    log.destroy()


def entries(*terms: tuple[int, int]) -> list[tuple[bytes, int, int]]:
    """As the library sends them: (index, term) of each; what they say does not matter here."""
    return [(b"\1" + beat_entry(b"", index, (0, b"")), index, term) for index, term in terms]


def hear(log, term, before, *news, commit=1) -> None:
    """The leader of ``term`` says what follows the entry ``before``, an (index, term)."""
    leader = sorted(log.otherNodes, key=lambda node: node.id)[0]
    message = {"type": "append_entries", "term": term, "commit_index": commit}
    message |= {"entries": entries(*news), "prevLogIdx": before[0], "prevLogTerm": before[1]}
    log._SyncObj__onMessageReceived(leader, message)
    log._SyncObj__applyLogEntries()


def holds(log) -> list[tuple[int, int]]:
    return [(index, term) for _, index, term in log._SyncObj__raftLog[1:]]


@pytest.fixture
def filled(log):
    """It has entries 2 to 5 of term 1, and has applied them."""
    first = log._SyncObj__raftLog[0]
    hear(log, 1, (first[1], first[2]), (2, 1), (3, 1), (4, 1), (5, 1), commit=5)
    assert holds(log) == [(2, 1), (3, 1), (4, 1), (5, 1)] and log.raftLastApplied == 5
    log.sent.clear()
    return log


@pytest.mark.parametrize("news", [(), ((3, 1),), ((3, 1), (4, 1)), ((3, 1), (4, 1), (5, 1))])
def test_again(filled, news, caplog):
    """What comes once more, perhaps in part, takes nothing away that this voter has promised to keep."""
    with caplog.at_level(logging.WARNING):
        hear(filled, 1, (2, 1), *news, commit=5)

    assert holds(filled) == [(2, 1), (3, 1), (4, 1), (5, 1)]
    assert [(answer["success"], answer["next_node_idx"]) for answer in filled.sent] == [(True, 3 + len(news))]
    assert not caplog.records


def test_again_and_more(filled):
    """What is new behind what comes once more is appended."""
    hear(filled, 1, (3, 1), (4, 1), (5, 1), (6, 1), commit=6)

    assert holds(filled)[-2:] == [(5, 1), (6, 1)] and filled.raftLastApplied == 6


def test_other_entries(log):
    """From the first entry on that the leader of a later term has otherwise, its own count."""
    first = log._SyncObj__raftLog[0]
    hear(log, 1, (first[1], first[2]), (2, 1), (3, 1), (4, 1), (5, 1), commit=3)
    hear(log, 2, (2, 1), (3, 1), (4, 2), commit=4)

    assert holds(log) == [(2, 1), (3, 1), (4, 2)] and log.raftLastApplied == 4


def test_old_tail(log):
    """Entries that a later leader has not spoken of stay, and are not taken for committed."""
    first = log._SyncObj__raftLog[0]
    hear(log, 1, (first[1], first[2]), (2, 1), (3, 1), (4, 1), (5, 1), commit=2)
    hear(log, 2, (3, 1), commit=9)

    assert holds(log) == [(2, 1), (3, 1), (4, 1), (5, 1)]
    assert log.raftLastApplied == 3
    assert log.sent[-1]["next_node_idx"] == 4


def test_answer_of_another_term(log):
    """What a server had in a term that is over does not count for the leader of this one."""
    node = sorted(log.otherNodes, key=lambda node: node.id)[0]
    log._SyncObj__setCurrentTerm(3, None)
    log._SyncObj__onBecomeLeader()
    answer = {"type": "next_node_idx", "next_node_idx": 2, "reset": False, "success": True}
    log._SyncObj__onMessageReceived(node, {**answer, "term": 2})
    old = log._SyncObj__raftMatchIndex[node]
    log._SyncObj__onMessageReceived(node, {**answer, "term": 3})

    assert (old, log._SyncObj__raftMatchIndex[node]) == (0, 1)
