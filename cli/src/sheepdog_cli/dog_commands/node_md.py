"""``dog node md``: the disks of nodes."""

from __future__ import annotations

import os
import sys

from sheepdog.client import admin
from sheepdog.errors import ProtocolError, TransportError
from sheepdog_cli.dog_commands.node_info import percent
from sheepdog_cli.output import confirm_banner, print_json
from sheepdog_cli.session import RESULT_EIO, RESULT_SUCCESS, Session, Usage, complain, describe, fail, name_text
from sheepdog_cli.sizes import format_size

OP_MD_PLUG = 0xB2
OP_MD_UNPLUG = 0xB3


def run(session: Session) -> None:
    if not session.nested:
        raise Usage
    word = session.nested[0]
    if word == "info":
        _info(session)
        return
    if not session.options.force:
        confirm_banner(
            "Caution! The directories to be plugged will be purged."
            if word == "plug"
            else "Caution! Recovery will be triggered after unplugging."
        )
    body = os.fsencode(session.arguments[0]) + b"\0"
    failure = "Failed to execute request, look for sheep.log for more information"
    try:
        response = session.call(OP_MD_PLUG if word == "plug" else OP_MD_UNPLUG, body=body)
    except TransportError:
        fail(failure)
    if response.result != RESULT_SUCCESS:
        fail(failure)


def _info(session: Session) -> None:
    raw, as_json = session.options.raw, session.options.json
    every = "all" in session.options
    out = sys.stdout.write
    if not (raw or as_json):
        out("Id\tSize\tUsed\tAvail\tUse%\tPath\n")
    documents = []
    for number, node in enumerate(session.nodes if every else (None,)):
        if every and not (raw or as_json):
            out(f"Node {number}:\n")
        where = session.address if node is None else node.id.text
        for disk in _disks(session, node):
            path = name_text(disk.path)
            if as_json:
                sizes = {"size": disk.size, "used": disk.used, "free": disk.free}
                documents.append({"node": where, "id": disk.number, **sizes, "path": path})
            elif raw:
                share = percent(disk.used, disk.size)
                out(f"{where} {disk.number} {disk.size} {disk.used} {disk.free} {share}% {path}\n")
            else:
                columns = "".join(f"\t{format_size(size)}" for size in (disk.size, disk.used, disk.free))
                out(f"{disk.number:2d}{columns}\t{percent(disk.used, disk.size):3d}%\t{path}\n")
    if as_json:
        print_json(documents)


def _disks(session: Session, node: object) -> list[admin.Disk]:
    failure = "failed to get multi-disk information: "
    try:
        response = session.call(admin.OP_MD_INFO, node=node, data_length=admin.MD_INFO_BYTES)  # type: ignore[arg-type]  # a Node
        if response.result != RESULT_SUCCESS:
            fail(failure + describe(response.result))
        return admin.unpack_disks(response.body)
    except ProtocolError as error:
        complain(str(error))
    except TransportError:
        pass  # said already
    fail(failure + describe(RESULT_EIO))
