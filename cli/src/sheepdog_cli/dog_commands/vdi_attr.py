"""``dog vdi setattr`` and ``dog vdi getattr``."""

from __future__ import annotations

import sys

from sheepdog.client import volume
from sheepdog.errors import ProtocolError, TransportError
from sheepdog.model.attribute import ATTRIBUTE_BYTES, Attribute
from sheepdog.model.ids import attribute_oid
from sheepdog.model.limits import ATTRIBUTE_VALUE_BYTES_MAX
from sheepdog_cli.output import print_bytes
from sheepdog_cli.session import (
    EXIT_EXISTS,
    EXIT_FAILURE,
    EXIT_MISSING,
    EXIT_SYSTEM,
    RESULT_EIO,
    Session,
    complain,
    describe,
    fail,
    misuse,
    name_bytes,
)

OP_GET_VDI_ATTR = 0x89
FLAG_CREAT = 0x0100
FLAG_EXCL = 0x0200
FLAG_DEL = 0x0400

RESULT_SUCCESS = 0x00
RESULT_NO_OBJ = 0x02
RESULT_VDI_EXIST = 0x04
RESULT_NO_VDI = 0x08


def run(session: Session) -> None:
    if not session.argument(1):
        misuse("Please specify the attribute key")
    if session.command.name == "setattr":
        _set(session)
    else:
        _get(session)


def _request(session: Session, value: bytes, flags: int) -> tuple[int, volume.FoundVdi]:
    attribute = Attribute(name=name_bytes(session.arguments[0]), key=name_bytes(session.arguments[1]), value=value)
    response = session.call(OP_GET_VDI_ATTR, flags=flags, variant=bytes(32), body=attribute.pack())
    return response.result, volume.unpack_vdi_reply(response)


def _set(session: Session) -> None:
    key = session.arguments[1]
    delete = "delete" in session.options
    value = b""
    if not delete:
        text = session.argument(2)
        if text is None:
            value = sys.stdin.buffer.read(ATTRIBUTE_VALUE_BYTES_MAX)
        else:
            import os

            value = os.fsencode(text)[:ATTRIBUTE_VALUE_BYTES_MAX]
    flags = FLAG_DEL if delete else FLAG_CREAT
    if "exclusive" in session.options and not delete:
        flags |= FLAG_EXCL
    try:
        result, _ = _request(session, value, flags)
    except TransportError:
        fail(f"Failed to set attribute: {describe(RESULT_EIO)}")
    if result == RESULT_SUCCESS:
        return
    if result == RESULT_VDI_EXIST:
        fail(f"The attribute '{key}' already exists", EXIT_EXISTS)
    if result == RESULT_NO_OBJ:
        fail(f"Attribute '{key}' not found", EXIT_MISSING)
    if result == RESULT_NO_VDI:
        fail("VDI not found", EXIT_MISSING)
    fail(f"Failed to set attribute: {describe(result)}", EXIT_FAILURE)


def _get(session: Session) -> None:
    key = session.arguments[1]
    try:
        result, found = _request(session, b"", 0)
    except TransportError:
        fail(f"Failed to find attribute oid: {describe(RESULT_EIO)}", EXIT_MISSING)
    if result == RESULT_NO_OBJ:
        fail(f"Attribute '{key}' not found", EXIT_MISSING)
    if result == RESULT_NO_VDI:
        fail("VDI not found", EXIT_MISSING)
    if result != RESULT_SUCCESS:
        fail(f"Failed to find attribute oid: {describe(result)}", EXIT_MISSING)
    oid = attribute_oid(found.vid, found.attr_id)
    try:
        attribute = Attribute.unpack(volume.read_object(session.call, oid, ATTRIBUTE_BYTES))
    except volume.ObjectReadError as error:
        complain(str(error))
        fail(f"Failed to read attribute oid: {describe(error.result)}", EXIT_SYSTEM)
    except (TransportError, ProtocolError):
        fail(f"Failed to read attribute oid: {describe(RESULT_EIO)}", EXIT_SYSTEM)
    print_bytes(attribute.value)
