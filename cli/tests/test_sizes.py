"""Sizes as people read and write them."""

from __future__ import annotations

import pytest

from sheepdog_cli.sizes import format_size, parse_decimal, parse_size

KiB, MiB, GiB, TiB, PiB = (1 << shift for shift in (10, 20, 30, 40, 50))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64k", 64 * KiB),
        ("64K", 64 * KiB),
        ("1.5G", 3 * GiB // 2),
        (".5m", MiB // 2),
        ("3.M", 3 * MiB),
        ("512b", 512),
        ("4T", 4 * TiB),
        ("16P", 16 * PiB),
        ("+1K", KiB),
        ("18014398509481985", 18014398509481985),
        ("-1", (1 << 64) - 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    """Good sizes; large ones are exact."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "12MB", "ten", "3X", "K", ".", "1 K", " 1", "0x10", "1e3", "1.2.3", "--1", "\u0663"]
)
def test_bad_sizes(text: str) -> None:
    """Everything else is no size."""
    assert parse_size(text) is None


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.0 MB"),
        (512 * KiB, "0.5 MB"),
        (int(9.96 * MiB), "10.0 MB"),
        (40 * MiB, "40 MB"),
        (3 * GiB, "3.0 GB"),
        (int(1023.9 * MiB), "1024 MB"),
        (1024 * MiB, "1.0 GB"),
        (4 * TiB, "4.0 TB"),
        (16 * PiB, "16 PB"),
        (1 << 90, "1024 YB"),
    ],
)
def test_format(size: int, text: str) -> None:
    """One decimal below ten, none above, units of 1024."""
    assert format_size(size) == text
    assert format_size(size, raw=True) == str(size)


@pytest.mark.parametrize(("text", "number"), [("1", 1), ("65535", 65535), ("007", 7)])
def test_decimal(text: str, number: int) -> None:
    """Strictly decimal numbers in range."""
    assert parse_decimal(text, 1, 65535) == number


@pytest.mark.parametrize(
    "text", ["", "0", "65536", "65537", "4294967297", "-1", "q", "80x", "+", "-", "+5", " 5", "0x5", "5 ", "\u0663"]
)
def test_bad_decimal(text: str) -> None:
    """No sign, no blank, no hex, no trailing letters, nothing out of range."""
    assert parse_decimal(text, 1, 65535) is None
