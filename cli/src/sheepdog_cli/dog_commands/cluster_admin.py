"""``dog cluster shutdown``, ``reweight`` and ``recover``: requests without arguments to the whole cluster."""

from __future__ import annotations

import sys

from sheepdog.errors import RequestError, TransportError
from sheepdog_cli.output import QUESTION, confirm
from sheepdog_cli.session import RESULT_SUCCESS, Quit, Session, Usage, describe, fail

OP_SHUTDOWN = 0x85
OP_FORCE_RECOVER = 0x8A
OP_ENABLE_RECOVER = 0xA8
OP_DISABLE_RECOVER = 0xA9
OP_REWEIGHT = 0xB5
NODE_LIST_BYTES = 6144 * 80

CAUTION = """\
Caution! First try to start every node of the cluster; it then goes on by itself.
Force only when nodes are lost for good: objects whose copies were all on the
missing nodes are lost, and those nodes must not come back with their old data
afterwards.

"""


def run(session: Session) -> None:
    if session.command.name == "recover":
        _recover(session)
        return
    opcode = OP_SHUTDOWN if session.command.name == "shutdown" else OP_REWEIGHT
    try:
        session.simple(opcode)
    except (RequestError, TransportError):
        if opcode == OP_SHUTDOWN:
            fail("failed to execute request")
        raise Quit(1) from None


def _recover(session: Session) -> None:
    if not session.nested:
        raise Usage
    word = session.nested[0]
    if word == "force":
        _force(session)
        return
    try:
        session.simple(OP_ENABLE_RECOVER if word == "enable" else OP_DISABLE_RECOVER)
    except (RequestError, TransportError):
        raise Quit(1) from None
    sys.stdout.write(f"Cluster recovery: {word}\n")


def _force(session: Session) -> None:
    if not session.options.force:
        confirm(CAUTION + QUESTION)
    try:
        response = session.call(OP_FORCE_RECOVER, data_length=NODE_LIST_BYTES)
    except TransportError:
        fail("failed to execute request")
    if response.result != RESULT_SUCCESS:
        fail(f"failed to execute request, {describe(response.result)}")
