"""The text after ``local:``: ``[FILE][,timeout=MS]``."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sheepdog.api import ConfigError

DEFAULT_FILE = "/tmp/sheepdog_shm"
DEFAULT_TIMEOUT_MS = 5000
TIMEOUT_MS_MIN = 100  # below this, ordinary scheduling delay looks like a pause
TIMEOUT_MS_MAX = 3_600_000


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """Where the cluster meets and how long a member may be silent.

    :param enter_timeout_s: how long a join waits for others who join; they need microseconds unless they are stopped.
    :param compact_bytes: so much log is written between two attempts to give disk space back.
    """

    file: str = DEFAULT_FILE
    timeout_s: float = DEFAULT_TIMEOUT_MS / 1000
    enter_timeout_s: float = 5.0
    compact_bytes: int = 4 * 1024 * 1024

    @classmethod
    def parse(cls, text: str) -> LocalOptions:
        """The options that ``text`` states. A relative FILE is taken from the current directory of this moment.

        :raises ConfigError: an unknown option, or a timeout outside ``TIMEOUT_MS_MIN``..``TIMEOUT_MS_MAX`` (inclusive).
        """
        name, *rest = text.split(",")
        if "=" in name and not name.startswith(("/", ".")):
            rest.insert(0, name)
            name = ""
        timeout_ms = DEFAULT_TIMEOUT_MS
        for part in rest:
            key, _, value = part.partition("=")
            if key.strip() != "timeout":
                raise ConfigError(f"unknown option {part!r} of cluster driver local; known: FILE, timeout=MS")
            try:
                timeout_ms = int(value)
            except ValueError:
                timeout_ms = -1
            if not TIMEOUT_MS_MIN <= timeout_ms <= TIMEOUT_MS_MAX:
                raise ConfigError(
                    f"invalid timeout {value!r} of cluster driver local: "
                    f"milliseconds from {TIMEOUT_MS_MIN} to {TIMEOUT_MS_MAX} are allowed"
                )
        return cls(os.path.abspath(name or DEFAULT_FILE), timeout_ms / 1000)
