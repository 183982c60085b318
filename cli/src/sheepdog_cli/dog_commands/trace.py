"""``dog trace``: what a sheep did, by request (``sheepdog.daemon.tracing``), or by function in an original.

The buffer that ``disable`` fetches is an array of 80-byte items: i32 kind (0 entry, 1 return), thread name (20 bytes),
i32 depth, function name (36 bytes), then two u64, the times of entry and return in nanoseconds.
"""

from __future__ import annotations

import os
import sys
from struct import Struct

from sheepdog.errors import TransportError
from sheepdog_cli.session import RESULT_EIO, RESULT_SUCCESS, Quit, Session, Usage, complain, describe, fail

OP_TRACE_STATUS = 0x95
OP_TRACE_READ_BUF = 0x96
OP_TRACE_ENABLE = 0x9B
OP_TRACE_DISABLE = 0x9C

RESULT_INVALID_PARMS = 0x05
RESULT_NO_SUPPORT = 0x8B
RESULT_AGAIN = 0x8F

TRACE_FILE = os.path.join(os.environ.get("TMPDIR") or "/tmp", "tracefile")
BUFFER_BYTES = 1 << 20
STATUS_BYTES = 1 << 20
RETURN = 1
_ITEM = Struct("<i20si36sQQ")


def run(session: Session) -> None:
    name = session.command.name
    if name == "graph":
        _graph(session)
    elif name == "status":
        _status(session)
    else:
        _switch(session, session.arguments[0], enable=name == "enable")


def _result(session: Session, opcode: int, body: bytes | None = None) -> int:
    try:
        return session.call(opcode, variant=bytes(32), body=body).result
    except TransportError:
        return RESULT_EIO


def _switch(session: Session, tracer: str, *, enable: bool) -> None:
    result = _result(session, OP_TRACE_ENABLE if enable else OP_TRACE_DISABLE, os.fsencode(tracer) + b"\0")
    if result == RESULT_NO_SUPPORT:
        fail(f"no such tracer {tracer}")
    if result == RESULT_INVALID_PARMS:
        fail(f"tracer {tracer} is {'already' if enable else 'not'} enabled")
    if result != RESULT_SUCCESS:
        fail(describe(result))
    if not enable:
        _fetch(session)


def _fetch(session: Session) -> None:
    try:
        with open(TRACE_FILE, "wb") as target:
            while True:
                response = session.call(OP_TRACE_READ_BUF, data_length=BUFFER_BYTES)
                target.write(response.body)
                if response.result == RESULT_AGAIN:
                    continue
                if response.result != RESULT_SUCCESS:
                    fail(describe(response.result))
                return
    except OSError as error:
        fail(f"cannot write {TRACE_FILE}: {os.strerror(error.errno or 0)}")
    except TransportError:
        raise Quit(1) from None


def _status(session: Session) -> None:
    try:
        response = session.call(OP_TRACE_STATUS, data_length=STATUS_BYTES)
    except TransportError:
        raise Quit(1) from None
    if response.result != RESULT_SUCCESS:
        complain(describe(response.result))
        raise Quit(1)
    sys.stdout.write(bytes(response.body).split(b"\0", 1)[0].decode("utf-8", "replace"))


def _graph(session: Session) -> None:
    if not session.nested:
        raise Usage
    try:
        with open(TRACE_FILE, "rb") as source:
            data = source.read()
    except FileNotFoundError:
        data = b""
    except OSError as error:
        fail(f"cannot read {TRACE_FILE}: {os.strerror(error.errno or 0)}")
    items = list(_ITEM.iter_unpack(data[: len(data) // _ITEM.size * _ITEM.size]))
    if not items:
        fail("trace file is empty")
    if session.nested[0] == "cat":
        _cat(items)
    else:
        _stat(items)


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "replace")


def _cat(items: list[tuple[int, bytes, int, bytes, int, int]]) -> None:
    out = sys.stdout.write
    out("   Thread Name      |  Time(us)  |  Function Graph\n" + "-" * 50 + "\n")
    for kind, thread, depth, function, entered, returned in items:
        out(f"{_text(thread):<20}|")
        if kind == RETURN:
            microseconds, rest = divmod(max(returned - entered, 0), 1000)
            out(f"{microseconds:8d}.{rest:<3d}|")
        else:
            out(" " * 12 + "|")
        out("   " * max(depth, 0) + ("}" if kind == RETURN else f"{_text(function)}() {{") + "\n")


def _stat(items: list[tuple[int, bytes, int, bytes, int, int]]) -> None:
    totals: dict[str, tuple[int, int]] = {}
    for kind, _, _, function, entered, returned in items:
        if kind == RETURN:
            time, calls = totals.get(_text(function), (0, 0))
            totals[_text(function)] = (time + max(returned - entered, 0), calls + 1)
    out = sys.stdout.write
    out("   Total (s)   Per Call (ms)   Calls   Name\n")
    for name, (time, calls) in sorted(totals.items(), key=lambda entry: -entry[1][0]):
        out(f"{time / 1e9:10.3f}   {time / calls / 1e6:10.3f}        {calls:5d}   {name}\n")
