"""Sizes as people read and write them."""

from __future__ import annotations

import re

UNITS = ("MB", "GB", "TB", "PB", "EB", "ZB", "YB")
MiB = 1 << 20
U64 = 1 << 64
RATE_MAX = 100_000  # MB/s, faster than any disk

_SIZE = re.compile(r"([-+]?)(\d+)?(?:\.(\d*))?([BKMGTP]?)\Z", re.IGNORECASE | re.ASCII)
_SHIFTS = {"": 0, "B": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}

SUFFIX_HINT = (
    "You may use B, K, M, G, T or P suffixes for bytes, kilobytes, megabytes, gigabytes, terabytes and petabytes."
)


def parse_size(text: str) -> int | None:
    """Bytes meant by a number with an optional fraction and one optional suffix letter; None if it is none.

    A negative number wraps to a huge one, which every limit then refuses.
    """
    match = _SIZE.match(text)
    if match is None:
        return None
    sign, whole, fraction, suffix = match.groups()
    if not whole and not fraction:
        return None
    shift = _SHIFTS[suffix.upper()]
    size = int(whole or 0) << shift
    if fraction:
        size += (int(fraction) << shift) // 10 ** len(fraction)
    return -size % U64 if sign == "-" else size


def format_size(size: int, raw: bool = False) -> str:
    """Bytes as ``40 MB`` or ``1.5 GB``; with ``raw`` the plain number."""
    if raw:
        return str(size)
    value = size / MiB
    for unit in UNITS:
        if value < 1024 or unit == UNITS[-1]:
            break
        value /= 1024
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"


def parse_decimal(text: str, low: int, high: int) -> int | None:
    """A strictly decimal number (no sign, no blank) with low <= number <= high, else None."""
    if not text.isascii() or not text.isdigit() or len(text) > 40:
        return None
    number = int(text)
    return number if low <= number <= high else None
