"""``dog node log level``: how much a sheep logs."""

from __future__ import annotations

from sheepdog.errors import TransportError
from sheepdog_cli.output import print_json
from sheepdog_cli.session import EXIT_DAEMON_REFUSED, RESULT_SUCCESS, Quit, Session, Usage, complain, describe, fail

OP_GET_LOGLEVEL = 0xB9
OP_SET_LOGLEVEL = 0xBA
LEVELS = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")


def run(session: Session) -> None:
    if len(session.nested) < 2:
        raise Usage
    word = session.nested[1]
    if word == "list" and session.options.json:
        print_json([{"level": name, "number": number} for number, name in enumerate(LEVELS)])
    elif word == "list":
        _list()
    elif word == "get":
        _get(session)
    else:
        _set(session, session.arguments[0])


def _list() -> None:
    for number, name in enumerate(LEVELS):
        complain(f"{name}\t({number})")


def _get(session: Session) -> None:
    try:
        response = session.call(OP_GET_LOGLEVEL, data_length=4)
    except TransportError:
        fail("Failed to execute request", EXIT_DAEMON_REFUSED)
    number = int.from_bytes(response.body[:4], "little")
    if response.result != RESULT_SUCCESS or number >= len(LEVELS):
        complain(describe(response.result))
        fail("Failed to execute request", EXIT_DAEMON_REFUSED)
    if session.options.json:
        print_json({"level": LEVELS[number], "number": number})
        return
    complain(f"{LEVELS[number]} ({number})")


def _set(session: Session, name: str) -> None:
    if name not in LEVELS:
        complain(f"invalid loglevel: {name}")
        complain("available loglevels:")
        _list()
        raise Quit(EXIT_DAEMON_REFUSED)
    try:
        response = session.call(OP_SET_LOGLEVEL, body=LEVELS.index(name).to_bytes(4, "little"))
    except TransportError:
        fail("Failed to execute request", EXIT_DAEMON_REFUSED)
    if response.result != RESULT_SUCCESS:
        complain(describe(response.result))
        fail("Failed to execute request", EXIT_DAEMON_REFUSED)
