"""``dog node scrub``: the search for corrupt objects, on the contacted node or on all."""

from __future__ import annotations

import sys
import time
from struct import Struct
from typing import TYPE_CHECKING, Any

from sheepdog.errors import TransportError
from sheepdog_cli.output import print_json
from sheepdog_cli.session import EXIT_SYSTEM, RESULT_SUCCESS, Quit, Session, complain, decode_map, describe, fail
from sheepdog_cli.sizes import format_size

if TYPE_CHECKING:
    from sheepdog.model.node import Node

OP_SCRUB = 0xD3  # of sheepdog.wire.extensions
RESULT_INVALID_PARMS = 0x05
RESULT_NO_SUPPORT = 0x8B
ANSWER_BYTES_MAX = 1 << 20

_COMMAND = Struct("<II")
_WORDS = {"status": 0, "start": 1, "stop": 2}


def run(session: Session) -> None:
    word = session.nested[0] if session.nested else "status"
    every = "all" in session.options
    nodes: list[Node | None] = [None]
    if every:
        if not session.nodes:
            session.load_nodes()
        nodes = [node for node in session.nodes if node.vnodes]  # a gateway stores nothing
    documents = []
    for node in nodes:
        status = _ask(session, node, _WORDS[word], session.options.get("rate", 0))
        if word != "status":
            continue
        if session.options.json:
            documents.append({"node": node.id.text, **status} if node is not None else status)
        else:
            if node is not None and not session.options.raw:
                sys.stdout.write(f"Node {node.id.text}\n")
            prefix = f"{node.id.text} " if node is not None and session.options.raw else ""
            _show(status, prefix, session.options.raw)
    if word == "status" and session.options.json:
        print_json(documents if every else documents[0])


def _ask(session: Session, node: Node | None, command: int, rate: int) -> dict[str, Any]:  # Any: a CBOR map
    try:
        response = session.call(OP_SCRUB, node=node, variant=_COMMAND.pack(command, rate), data_length=ANSWER_BYTES_MAX)
    except TransportError:
        raise Quit(EXIT_SYSTEM) from None
    where = session.address if node is None else node.id.text
    if response.result == RESULT_INVALID_PARMS:
        fail(f"The sheep at {where} does not scrub (it is an original one, or an older one)")
    if response.result == RESULT_NO_SUPPORT:
        fail(f"The sheep at {where} is a gateway, which stores nothing")
    if response.result != RESULT_SUCCESS:
        fail(f"The scrub of {where} cannot be controlled: {describe(response.result)}")
    status = decode_map(response.body)
    if status is None:
        complain(f"The answer of {where} is not understood")
        raise Quit(EXIT_SYSTEM)
    return status


def _show(status: dict[str, Any], prefix: str, raw: bool) -> None:  # Any: as above
    for label, text in _rows(status, raw):
        word = label.lower().replace(" ", "_")
        sys.stdout.write(f"{prefix}{word} {text}\n" if raw else f"{label + ':':16}{text}\n")
    for oid, index, reason in status["unrepairable"]:
        strip = "" if index < 0 else f" strip {index}"
        sys.stdout.write(f"{prefix}bad {oid} {index} {reason}\n" if raw else f"  {oid}{strip}: {reason}\n")


def _rows(status: dict[str, Any], raw: bool) -> list[tuple[str, str]]:  # Any: as above
    if status["running"]:
        state = "waiting" if status["waiting"] else "running"
    else:
        state = "stopped" if status["stopped"] else "idle"
    rows = [("State", state)]
    if raw:
        rows += [(name.capitalize(), str(status[name])) for name in ("started", "finished", "next", "done", "total")]
        rows += [("Bytes", str(status["bytes"])), ("Rate", str(status["rate"]))]
    else:
        done, total = status["done"], status["total"]
        percent = f" ({done * 100 / total:.1f}%)" if total else ""
        rows.append(("Started", _when(status["started"])))
        if not status["running"]:
            rows.append(("Finished", _when(status["finished"]) if not status["stopped"] else "not yet"))
        rows.append(("Objects", f"{done} of {total}{percent}, {format_size(status['bytes'])}"))
        rows.append(("Rate", f"{status['rate'] / 1_000_000:g} MB/s at most"))
        if not status["running"]:
            rows.append(("Next", _when(status["next"]) if status["next"] else "only when asked for"))
    rows += [(name.capitalize(), str(status[name])) for name in ("unknown", "found", "repaired", "repairing")]
    rows.append(("Unrepairable", str(len(status["unrepairable"]))))
    return rows


def _when(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "never"
