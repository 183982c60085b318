"""``dog node kill``: one node stops in order."""

from __future__ import annotations

from sheepdog.errors import RequestError, TransportError
from sheepdog_cli.session import EXIT_USAGE, Session, fail
from sheepdog_cli.sizes import parse_decimal

OP_KILL_NODE = 0x9A


def run(session: Session) -> None:
    text = session.argument(0)
    local = "local" in session.options
    node = None
    if text is None:
        if not local:
            fail("please specify -l option or node id", EXIT_USAGE)
    elif local:
        fail("don't use -l option and specify node id at the same time", EXIT_USAGE)
    else:
        number = parse_decimal(text, 0, (1 << 63) - 1)
        if number is None:
            fail(f"Invalid node id '{text}', please specify a numeric value", EXIT_USAGE)
        if number >= len(session.nodes):
            fail(f"Invalid node id '{number}'", EXIT_USAGE)
        node = session.nodes[number]
    try:
        session.simple(OP_KILL_NODE, node=node)
    except (RequestError, TransportError):
        fail("Failed to execute request")
