"""``dog cluster driver``: what keeps the cluster together, as the contacted sheep sees it."""

from __future__ import annotations

import sys
from typing import Any

from sheepdog.errors import TransportError
from sheepdog_cli.output import print_json
from sheepdog_cli.session import EXIT_SYSTEM, RESULT_SUCCESS, Quit, Session, decode_map, describe, fail

OP_DRIVER_STATUS = 0xD2  # of sheepdog.wire.extensions
RESULT_INVALID_PARMS = 0x05
ANSWER_BYTES_MAX = 1 << 20


def run(session: Session) -> None:
    status = _ask(session)
    if session.options.json:
        print_json(status)
    else:
        for label, text in _rows(status):
            word = label.lower().replace(" ", "_")
            sys.stdout.write(f"{word} {text}\n" if session.options.raw else f"{label + ':':16}{text}\n")
    if "error" in status:
        raise Quit(EXIT_SYSTEM)


def _ask(session: Session) -> dict[str, Any]:  # Any: whatever the driver reports
    try:
        response = session.call(OP_DRIVER_STATUS, data_length=ANSWER_BYTES_MAX)
    except TransportError:
        raise Quit(EXIT_SYSTEM) from None
    if response.result == RESULT_INVALID_PARMS:
        fail("This sheep cannot tell about its cluster driver (it is an original one, or an older one)")
    if response.result != RESULT_SUCCESS:
        fail(f"Failed to get the state of the cluster driver: {describe(response.result)}")
    status = decode_map(response.body)
    if status is None or not isinstance(status.get("status", {}), dict):
        fail("The answer about the cluster driver is not understood")
    return status


def _rows(status: dict[str, Any]) -> list[tuple[str, str]]:  # Any: as above
    members = status.get("members", ())
    rows = [("Driver", str(status.get("driver"))), ("Session", str(status.get("session")))]
    rows += [(str(key).capitalize().replace("_", " "), _text(value)) for key, value in status.get("status", {}).items()]
    rows = [(label, text) for label, text in rows if label != "Members"]
    rows.append(("Members", f"{len(members)} ({', '.join(map(str, members))})" if members else "0"))
    if "detection_s" in status:
        rows.append(("Detection", f"a dead member is out within {status['detection_s']:.1f} s"))
    if "round_trip_s" in status:
        rows.append(("Round trip", f"{status['round_trip_s'] * 1000:.1f} ms"))
    if "error" in status:
        rows.append(("Error", str(status["error"])))
    return rows


def _text(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
