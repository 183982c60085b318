"""The 64-bit times of inodes, attributes and the cluster: seconds in the upper half, nanoseconds in the lower.

The original fills the lower half with microseconds times 1000. The cluster's creation time in this form is also its
identity, so it must survive every round trip unchanged: keep it as an integer and convert only to show it.
"""

from __future__ import annotations

from typing import NamedTuple


class Moment(NamedTuple):
    """A time split into its halves."""

    seconds: int
    nanoseconds: int


def pack_time(unix_time: float) -> int:
    """The form of ``unix_time`` (seconds since 1970), to the microsecond."""
    microseconds = round(unix_time * 1_000_000)
    seconds, rest = divmod(microseconds, 1_000_000)
    return (seconds & 0xFFFFFFFF) << 32 | rest * 1000


def split_time(ctime: int) -> Moment:
    """The two halves."""
    return Moment(ctime >> 32, ctime & 0xFFFFFFFF)


def unix_time(ctime: int) -> float:
    """Seconds since 1970."""
    seconds, nanoseconds = split_time(ctime)
    return seconds + nanoseconds / 1e9
