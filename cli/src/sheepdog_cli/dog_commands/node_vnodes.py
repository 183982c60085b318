"""``dog node vnodes set``: another number of virtual nodes."""

from __future__ import annotations

from sheepdog.errors import TransportError
from sheepdog_cli.session import (
    EXIT_DAEMON_REFUSED,
    EXIT_USAGE,
    RESULT_SUCCESS,
    Session,
    Usage,
    complain,
    describe,
    fail,
)
from sheepdog_cli.sizes import parse_decimal

OP_SET_VNODES = 0xCC
BODY_BYTES = 8  # the original sends eight; only the first four count


def run(session: Session) -> None:
    if not session.nested:
        raise Usage
    text = session.arguments[0]
    count = parse_decimal(text, 1, 65535)
    if count is None:
        fail(f"Invalid number of vnodes '{text}': must be an integer between 1 and 65535", EXIT_USAGE)
    try:
        response = session.call(OP_SET_VNODES, body=count.to_bytes(BODY_BYTES, "little"))
    except TransportError:
        fail("Failed to execute request", EXIT_DAEMON_REFUSED)
    if response.result != RESULT_SUCCESS:
        complain(describe(response.result))
        fail("Failed to execute request", EXIT_DAEMON_REFUSED)
