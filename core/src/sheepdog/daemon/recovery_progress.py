"""How far recovery has come, for the log and for observers: one line for each percent, at most."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sheepdog.daemon.interfaces import RecoveryStatus
from sheepdog.daemon.state import SheepState
from sheepdog.plugins import Announcer
from sheepdog.wire.payloads import RecoveryPhase

logger = logging.getLogger(__name__)


class ProgressReport:
    """Looks at the state of recovery now and then and tells what is new."""

    def __init__(self, status: Callable[[], RecoveryStatus], state: SheepState, announcer: Announcer) -> None:
        self._status = status
        self._state = state
        self._announcer = announcer
        self._told: tuple[int, int] | None = None  # percent, objects in all; None while nothing is recovered

    def tick(self) -> None:
        """Called from a timer; costs nothing worth mentioning while nothing is recovered."""
        now = self._status()
        if now.in_recovery and now.total and now.phase != RecoveryPhase.PREPARING:
            self._tell(now.finished, now.total)
        elif not now.in_recovery and self._told is not None:
            _, total = self._told
            if not now.unfinished:
                self._tell(total, total)
            self._told = None

    def _tell(self, finished: int, total: int) -> None:
        percent = finished * 100 // total
        if self._told == (percent, total):
            return
        self._told = percent, total
        logger.info("object recovery progress %3.0f%% ", percent)
        self._announcer.recovery_progressed(self._state.epoch, finished, total)
