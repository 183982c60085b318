"""What the log and observers are told of recovery."""

from __future__ import annotations

import logging
from types import SimpleNamespace

from sheepdog.daemon.interfaces import RecoveryStatus
from sheepdog.daemon.recovery_progress import ProgressReport
from sheepdog.plugins import Announcer


def test_a_line_for_each_percent(caplog):
    """REC-18: while objects are recovered each new percent is told once, with the line that scripts know; the last one
    when everything is there; nothing is told of the list being made, nor when recovery stops with something missing."""
    caplog.set_level(logging.INFO)
    heard = []
    announcer = Announcer({"sheepdog_recovery_progressed": [lambda **told: heard.append(tuple(told.values()))]})
    history = [
        RecoveryStatus(),
        RecoveryStatus(True, 0, 0, 0),
        RecoveryStatus(True, 1, 0, 300),
        RecoveryStatus(True, 1, 1, 300),
        RecoveryStatus(True, 1, 3, 300),
        RecoveryStatus(True, 2, 300, 300),
        RecoveryStatus(),
        RecoveryStatus(),
        RecoveryStatus(True, 1, 30, 60, unfinished=True),
        RecoveryStatus(unfinished=True),
    ]
    states = iter(history)
    report = ProgressReport(lambda: next(states), SimpleNamespace(epoch=3), announcer)
    for _ in history:
        report.tick()

    assert heard == [(3, 0, 300), (3, 3, 300), (3, 300, 300), (3, 30, 60)]
    assert caplog.messages == [f"object recovery progress {percent:>3}% " for percent in (0, 1, 100, 50)]
