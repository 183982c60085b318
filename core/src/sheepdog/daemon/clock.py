"""The real clock. A simulation hands in one of its own."""

from __future__ import annotations

import time


class SystemClock:
    """``services.Clock`` from the operating system."""

    __slots__ = ()

    monotonic = staticmethod(time.monotonic)
    time = staticmethod(time.time)
