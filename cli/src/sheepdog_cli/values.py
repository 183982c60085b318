"""Turns option arguments of dog into values; a bad one ends the program with the message that it deserves."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sheepdog_cli.session import EXIT_FAILURE, EXIT_USAGE, Options, Quit, complain, fail
from sheepdog_cli.sizes import RATE_MAX, parse_decimal

if TYPE_CHECKING:
    from sheepdog.model.policy import CopyPolicy

U32_MAX = (1 << 32) - 1
U64_MAX = (1 << 64) - 1


class Selector:
    """Which snapshot: by id (then ``tag`` is empty) or by tag (then ``snap_id`` is 0). False where it names none."""

    __slots__ = ("snap_id", "tag")

    def __init__(self, snap_id: int = 0, tag: bytes = b"") -> None:
        self.snap_id = snap_id
        self.tag = tag

    def __bool__(self) -> bool:
        return bool(self.snap_id or self.tag)


NO_SELECTOR = Selector()


def format_redundancy(copies: int, policy: int) -> str:
    """``2``, or ``4:2`` for an erasure code."""
    if policy == 0:
        return str(copies)
    return f"{(policy >> 4) * 2}:{policy & 0x0F}"


def _redundancy(text: str) -> CopyPolicy:
    from sheepdog.errors import ConfigError
    from sheepdog.model.policy import CopyPolicy

    try:
        return CopyPolicy.parse(text)
    except ConfigError:
        complain(f"Invalid parameter {text}")
        complain("To create replicated vdi, set -c x")
        complain("  x(1 to 31)   - number of replicated copies")
        complain("To create erasure coded vdi, set -c x:y")
        complain("  x(2,4,8,16)  - number of data strips")
        fail("  y(1 to 15)   - number of parity strips")


def _snapshot(text: str) -> Selector:
    from sheepdog_cli.session import name_bytes

    if text.isascii() and text.isdigit():
        number = int(text) if len(text) < 20 else U64_MAX
        if number == 0:
            fail("The snapshot id must be larger than zero")
        return Selector(snap_id=min(number, U32_MAX))
    return Selector(tag=name_bytes(text))


def _shift(text: str) -> int:
    leading = re.match(r"\s*[-+]?\d+", text, re.ASCII)
    shift = int(leading.group()) if leading else 0
    if shift > 31:
        fail("Object Size is limited to 2^31. Please set shift bit lower than 31")
    if shift < 20:
        fail("Object Size is larger than 2^20. Please set shift bit larger than 20")
    return shift


def _index(text: str) -> int:
    if re.fullmatch(r"\d+", text, re.ASCII):
        return int(text)
    if re.fullmatch(r"0[xX][0-9a-fA-F]+", text):
        return int(text, 16)
    fail("The index must be a decimal integer or a hexadecimal integer started with 0x")


def parse_oid(text: str) -> int | None:
    """A 64-bit number in hex, with or without ``0x``; None if it is none."""
    if not re.fullmatch(r"(0[xX])?[0-9a-fA-F]+", text):
        return None
    oid = int(text, 16)
    return oid if oid <= U64_MAX else None


def _oid(text: str) -> int:
    oid = parse_oid(text)
    if oid is None:
        fail("object id must be a hex integer")
    return oid


def _count(text: str, what: str) -> int:
    if not re.fullmatch(r"[-+]?\d+", text, re.ASCII):
        fail(f"The {what} is invalid: {text}")
    number = int(text)
    if number < 0 or (number == 0 and not what.startswith("interval")):
        # The missing blank is part of the interface.
        fail(f"The {what} must bepositive integer")
    return number


def _version(text: str) -> str:
    if text not in ("v0.7", "v0.8"):
        complain(f"unknown original version: {text}")
        fail("valid versions are v0.7 or v0.8")
    return text


def _queue(text: str) -> str:
    if text not in ("ordered", "dynamic", "fixed"):
        complain(f"unknown workqueue type: {text}")
        fail("assumed workqueue types: ordered, dynamic", 2)
    return text


def _number(text: str) -> int:
    number = parse_decimal(text, 1, U32_MAX)
    if number is None:
        complain(f"Invalid number '{text}'")
        raise Quit(EXIT_FAILURE)
    return number


def _rate(text: str) -> int:
    rate = parse_decimal(text, 1, RATE_MAX)
    if rate is None:
        fail(f"Invalid rate '{text}': must be an integer between 1 and {RATE_MAX} (MB/s)", EXIT_USAGE)
    return rate


def parse_port(text: str) -> int:
    """A TCP port.

    :raises Quit: it is none; said on stderr.
    """
    port = parse_decimal(text, 1, 65535)
    if port is None:
        fail(f"Invalid port number '{text}'", EXIT_USAGE)
    return port


def resolve(text: str) -> str:
    """The address that the name or literal stands for.

    :raises Quit: it cannot be resolved; said on stderr.
    """
    if re.fullmatch(r"\d{1,3}(\.\d{1,3}){3}", text, re.ASCII) and all(int(part) < 256 for part in text.split(".")):
        return text
    import socket

    try:
        found = socket.getaddrinfo(text, None, type=socket.SOCK_STREAM) if text else []
    except (OSError, UnicodeError):
        found = []
    if not found:
        fail(f"Invalid ip address {text}")
    # A name with both kinds of addresses means the IPv4 one, which is what sheep listen on most often.
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)
    return str(found[0][4][0])


def apply(options: Options, family: str, letter: str, name: str, text: str) -> None:
    """The option is recorded in ``options``.

    :raises Quit: its argument is bad; said on stderr.
    """
    value: Any = True  # Any: each option has its own type
    if not letter:
        pass  # those without a letter are flags
    elif letter == "a":
        value = resolve(text)
    elif letter == "p":
        value = parse_port(text)
    elif letter == "c":
        value = _redundancy(text)
    elif letter == "z":
        value = _shift(text)
    elif letter == "i":
        value = _index(text)
    elif letter == "B":
        value = _count(text, "number of batched reclamation")
    elif letter == "I":
        value = _count(text, "interval of batched reclamation")
    elif family == "vdi" and letter in "sF":
        value = _snapshot(text)
    elif family == "vdi" and letter == "o":
        value = _oid(text)
    elif family == "vdi" and letter == "m":
        value = _count(text, "maximum number of reclamation")
    elif family == "node" and letter == "R":
        value = _rate(text)
    elif family == "cluster" and letter == "b":
        value = text
    elif family == "upgrade" and letter == "o":
        value = _version(text)
    elif family == "benchmark" and letter == "w":
        value = _queue(text)
    elif family == "benchmark" and letter in "tn":
        value = _number(text)
    if name in ("raw", "verbose", "time", "json", "force"):
        setattr(options, name, True)
    else:
        options.values[name] = value
