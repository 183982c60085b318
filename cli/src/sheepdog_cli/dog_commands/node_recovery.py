"""``dog node recovery``: who recovers, and how fast it may."""

from __future__ import annotations

import sys
import time

from sheepdog.client import admin
from sheepdog.errors import ProtocolError, TransportError
from sheepdog_cli.output import Progress, print_json
from sheepdog_cli.session import (
    EXIT_DAEMON_REFUSED,
    EXIT_USAGE,
    RESULT_SUCCESS,
    Quit,
    Session,
    complain,
    describe,
    fail,
)
from sheepdog_cli.sizes import parse_decimal

STATE_BYTES = 24
POLL_S = 1.0
PREPARING, RECOVERING, NOTIFYING = 0, 1, 2
HEADING = "Nodes In Recovery:\n  Id   Host:Port         V-Nodes       Zone       Progress\n"


def run(session: Session) -> None:
    word = session.nested[0] if session.nested else "info"
    if word == "set-throttle":
        _set_throttle(session)
    elif word == "get-throttle":
        _get_throttle(session)
    elif "progress" in session.options:
        _follow(session)
    else:
        _info(session)


def _state(session: Session, node: object = None) -> admin.RecoveryState:
    try:
        response = session.call(admin.OP_STAT_RECOVERY, node=node, data_length=STATE_BYTES)  # type: ignore[arg-type]  # a Node
        if response.result != RESULT_SUCCESS:
            complain(describe(response.result))
            raise Quit(1)
        return admin.unpack_recovery_state(response.body)
    except ProtocolError as error:
        complain(str(error))
    except TransportError:
        pass  # said already
    raise Quit(1)


def _info(session: Session) -> None:
    raw, as_json = session.options.raw, session.options.json
    out = sys.stdout.write
    if not (raw or as_json):
        out(HEADING)
    documents = []
    for number, node in enumerate(session.nodes):
        state = _state(session, node)
        if not state.in_recovery:
            continue
        if as_json:
            documents.append(
                {
                    "id": number,
                    "host": node.id.host,
                    "port": node.id.port,
                    "phase": ("preparing", "recovering", "notifying")[min(state.phase, NOTIFYING)],
                    "finished": state.finished,
                    "total": state.total,
                }
            )
        elif raw:
            out(f"{number} {node.id.text} {node.vnodes} {node.zone} {state.finished} {state.total}\n")
        else:
            percent = state.finished * 100 / state.total if state.total else 0.0
            out(f"{number:4d}   {node.id.text:<20}{node.vnodes:5d}{node.zone:11d}{percent:11.1f}%\n")
    if as_json:
        print_json(documents)


def _follow(session: Session) -> None:
    out = sys.stdout
    progress: Progress | None = None
    shown = ""
    while True:
        state = _state(session)
        if not state.in_recovery:
            break
        text = ""
        if state.phase == PREPARING:
            text = "\rpreparing a checked object list..."
        elif state.phase == NOTIFYING:
            text = "\rnotifying a completion of recovery..."
        else:
            if progress is None or progress.total != state.total:
                progress = Progress(state.total, count=True)
            progress.set(state.finished)
        if text and text != shown and out.isatty():
            out.write(text)
            out.flush()
        shown = text or shown
        time.sleep(POLL_S)
    if progress is not None and progress.done != progress.total:
        progress.set(progress.total)
    elif shown and out.isatty():
        out.write("\n")


def _set_throttle(session: Session) -> None:
    count_text, interval_text = session.argument(0), session.argument(1)
    if count_text is None or interval_text is None:
        shown = [text if text is not None else "(null)" for text in (count_text, interval_text)]
        fail(f"Invalid interval max ({shown[0]}), interval ({shown[1]})", EXIT_USAGE)
    count = parse_decimal(count_text, 0, (1 << 32) - 1)
    if count is None:
        fail(f"Invalid max ({count_text})", EXIT_USAGE)
    interval = parse_decimal(interval_text, 0, (1 << 63) - 1)
    if interval is None:
        fail(f"Invalid interval ({interval_text})", EXIT_USAGE)
    if (count == 0) != (interval == 0):
        fail(f"Invalid interval max ({count_text}), interval ({interval_text})", EXIT_USAGE)
    throttle = admin.RecoveryThrottle(count, interval, count > 0)
    try:
        response = session.call(admin.OP_SET_RECOVERY, body=admin.pack_throttle(throttle))
    except TransportError:
        fail("Failed to execute request", EXIT_DAEMON_REFUSED)
    if response.result != RESULT_SUCCESS:
        complain(describe(response.result))
        fail("Failed to execute request", EXIT_DAEMON_REFUSED)


def _get_throttle(session: Session) -> None:
    try:
        response = session.call(admin.OP_GET_RECOVERY, data_length=STATE_BYTES)
        if response.result != RESULT_SUCCESS:
            complain(describe(response.result))
            fail("Failed to execute request", EXIT_DAEMON_REFUSED)
        throttle = admin.unpack_throttle(response.body)
    except (TransportError, ProtocolError):
        fail("Failed to execute request", EXIT_DAEMON_REFUSED)
    if session.options.json:
        print_json({"max": throttle.max_exec_count, "interval_ms": throttle.interval_ms, "on": throttle.on})
        return
    complain(f"max ({throttle.max_exec_count}), interval ({throttle.interval_ms})")
