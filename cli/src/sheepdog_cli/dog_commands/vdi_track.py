"""``dog vdi track``: where an object belonged in each epoch."""

from __future__ import annotations

import sys

from sheepdog.client import admin
from sheepdog.errors import ProtocolError, RequestError, TransportError
from sheepdog.model.ids import data_oid, format_oid
from sheepdog.model.ring import Ring
from sheepdog_cli.dog_commands.common import open_inode
from sheepdog_cli.dog_commands.vdi_object import check_index
from sheepdog_cli.output import print_json
from sheepdog_cli.session import EXIT_SYSTEM, RESULT_SUCCESS, Quit, Session, complain, describe
from sheepdog_cli.values import NO_SELECTOR


def run(session: Session) -> None:
    options = session.options
    index: int | None = options.get("index")
    given: int | None = options.get("oid")
    check_index(index)
    selector = options.get("snapshot", NO_SELECTOR)
    inode = open_inode(session, session.arguments[0], selector, then="FATAL: no inode objects")
    header = inode.header
    vid, copies, count = header.vdi_id, header.nr_copies, len(session.nodes)
    if given is not None:
        oid = given
        heading = f"Tracking the object {format_oid(oid)} (the inode vid 0x{vid:x}) with {count} nodes"
    elif index is not None:
        owner = inode.map.get(index)
        oid = data_oid(owner, index) if owner else 0
        heading = f"Tracking the object {format_oid(oid)} (the inode vid 0x{vid:x} idx {index}) with {count} nodes"
    else:
        oid = inode.oid
        heading = f"Tracking the inode object 0x{vid:x} with {count} nodes"
    try:
        stat = admin.epoch_log(session.call, epoch=session.epoch, node_slots=count, mode=session.mode)
    except (RequestError, ProtocolError) as error:
        complain(str(error))
        raise Quit(EXIT_SYSTEM) from None
    except TransportError:
        raise Quit(EXIT_SYSTEM) from None
    if stat.result != RESULT_SUCCESS:
        complain(f"Response's result: {describe(stat.result)}")
        raise Quit(EXIT_SYSTEM)
    places = [(entry.epoch, _places(Ring(entry.nodes), oid, copies)) for entry in stat.entries]
    if options.json:
        print_json(
            {
                "oid": format_oid(oid),
                "copies": copies,
                "epochs": [{"epoch": epoch, "nodes": nodes} for epoch, nodes in places],
            }
        )
        return
    out = sys.stdout.write
    out(heading + "\n")
    for epoch, nodes in places:
        out(f"\nobj {format_oid(oid)} locations at epoch {epoch}, copies = {copies}\n" + "-" * 51 + "\n")
        out("".join(node + "\n" for node in nodes))


def _places(ring: Ring, oid: int, copies: int) -> list[str]:
    if len(ring.storage) < copies:
        return [node.id.text for node in ring.storage]
    return [node.id.text for node in ring.holders(oid, copies)]
