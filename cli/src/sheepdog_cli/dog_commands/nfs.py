"""``dog nfs``: exports of builds that have NFS."""

from __future__ import annotations

from sheepdog.errors import TransportError
from sheepdog_cli.session import EXIT_SYSTEM, RESULT_EIO, RESULT_SUCCESS, Session, describe, fail, name_bytes

OP_NFS_CREATE = 0xBB
OP_NFS_DELETE = 0xBC


def run(session: Session) -> None:
    name = session.arguments[0]
    opcode = OP_NFS_CREATE if session.command.name == "create" else OP_NFS_DELETE
    try:
        result = session.call(opcode, variant=bytes(32), body=name_bytes(name) + b"\0").result
    except TransportError:
        result = RESULT_EIO
    if result != RESULT_SUCCESS:
        # The text says "create" for both; scripts know it so.
        fail(f"failed to create nfs {name}, {describe(result)}", EXIT_SYSTEM)
