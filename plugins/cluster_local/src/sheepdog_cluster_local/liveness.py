"""Whether a member lives, judged from outside: its lock, its process, its heartbeat."""

from __future__ import annotations

import os
import time
from typing import NamedTuple

from sheepdog.api import GroupMember
from sheepdog_cluster_local.rendezvous import Rendezvous


class Traces(NamedTuple):
    """The notes of a member: where to look whether it lives."""

    slot: int
    pid: int
    pid_started: int  # field 22 of /proc/PID/stat: tells a reused pid
    pid_space: int  # inode of the pid namespace: a pid means nothing elsewhere
    timeout_ms: int

    @classmethod
    def of(cls, member: GroupMember) -> Traces:
        return cls(*member.notes)


def pid_space() -> int:
    """A number that is the same for processes which mean the same by a pid; 0 if that cannot be known."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def pid_started(pid: int) -> int | None:
    """When the process began, in ticks since boot; None if it is gone or waits only for its parent (zombie)."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            # the name in parentheses may hold blanks and parentheses
            state, *rest = file.read(4096).rpartition(b")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in (b"Z", b"X") else int(rest[18])


def process_gone(traces: Traces, space: int) -> bool:
    """Whether the process certainly ended. False when nothing can be said."""
    if not space or traces.pid_space != space or traces.pid == os.getpid():
        return False
    return pid_started(traces.pid) != traces.pid_started


def silent_or_unlocked(rendezvous: Rendezvous, member: GroupMember) -> str | None:
    """Why ``member`` is dead by the evidence in FILE; None if it lives."""
    traces = Traces.of(member)
    if not rendezvous.slot_locked(traces.slot):
        return "its process ended"
    slot = rendezvous.read_slot(traces.slot)
    if slot.session != member.session:
        return "its place has another owner"
    limit_ns = traces.timeout_ms * 1_000_000
    # Read again before the verdict: a read that races the write may see half of each heartbeat.
    if time.monotonic_ns() - slot.beat_ns > limit_ns < time.monotonic_ns() - rendezvous.read_slot(traces.slot).beat_ns:
        return f"no heartbeat for {traces.timeout_ms} ms"
    return None
