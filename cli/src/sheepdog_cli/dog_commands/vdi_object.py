"""``dog vdi object``: which objects a vdi has, and where they are."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from sheepdog.errors import ProtocolError, TransportError
from sheepdog.model.ids import data_oid, format_oid
from sheepdog_cli.dog_commands.common import open_inode
from sheepdog_cli.output import print_json
from sheepdog_cli.session import EXIT_FAILURE, Quit, Session, Usage, complain, describe, fail
from sheepdog_cli.values import NO_SELECTOR

if TYPE_CHECKING:
    from sheepdog.model.node import Node

OP_EXIST = 0xBD
RESULT_SUCCESS = 0x00
RESULT_NO_OBJ = 0x02
RESULT_OLD_NODE_VER = 0x81
RESULT_NEW_NODE_VER = 0x82
INDEX_LIMIT = 1 << 32


def run(session: Session) -> None:
    word = session.nested[0]
    name = session.argument(0)
    if not name:
        raise Usage
    if word == "dump-inode":
        _dump(name)
        return
    index: int | None = session.options.get("index")
    if word == "map":
        _map(session, name, index)
    else:
        _location(session, name, index)


def check_index(index: int | None) -> None:
    """:raises Quit: the index is beyond what any vdi can have; said on stdout."""
    if index is not None and index >= INDEX_LIMIT:
        sys.stdout.write("The offset is too large!\n")
        raise Quit(EXIT_FAILURE)


def _map(session: Session, name: str, index: int | None) -> None:
    check_index(index)
    selector = session.options.get("snapshot", NO_SELECTOR)
    inode = open_inode(session, name, selector, then=f"FATAL: {name} not found")
    rows = inode.map.items() if index is None else iter([(index, inode.map.get(index))])
    if session.options.json:
        print_json([{"index": at, "vid": f"{vid:x}"} for at, vid in rows])
        return
    sys.stdout.write("Index       VID\n")
    for at, vid in rows:
        sys.stdout.write(f"{at:08d} {vid:8x}\n")


def _location(session: Session, name: str, index: int | None) -> None:
    from sheepdog.model.ring import Ring

    check_index(index)
    selector = session.options.get("snapshot", NO_SELECTOR)
    inode = open_inode(session, name, selector, then="FATAL: no inode objects")
    header = inode.header
    count = len(session.nodes)
    out = sys.stdout.write
    if index is None:
        oid, epoch = inode.oid, session.epoch
    else:
        owner = inode.map.get(index) if index < header.objects else 0
        if not owner:
            out(f"The inode object 0x{header.vdi_id:x} idx {index} is not allocated\n")
            return
        oid, epoch = data_oid(owner, index), session.epoch
    ring = Ring(session.nodes)
    wanted = [node.id.text for node in ring.holders(oid, header.nr_copies)]
    if session.options.json:
        answers = {node.id.text: _has(session, node, oid, epoch) for node in session.nodes}
        print_json({"oid": format_oid(oid), "copies": header.nr_copies, "nodes": answers, "placement": wanted})
        return
    if index is None:
        out(f"Looking for the inode object 0x{header.vdi_id:x} with {count} nodes\n\n")
    else:
        out(
            f"Looking for the object {format_oid(oid)} (vid 0x{header.vdi_id:x} idx {index}, "
            f"{header.nr_copies} copies) with {count} nodes\n\n"
        )
    for node in session.nodes:
        has = _has(session, node, oid, epoch)
        if has is not None:
            verb = "has" if has else "doesn't have"
            out(f"{node.id.text} {verb} the object\n")
    storing = sum(1 for node in session.nodes if node.vnodes)
    out("\n")
    if header.nr_copies > storing:
        out(
            f"Because number of nodes ({storing}) is less than number of copies ({header.nr_copies}), "
            "the object should be located at every nodes.\n"
        )
        return
    out("According to sheepdog algorithm, the object should be located at:\n")
    out(" ".join(wanted) + "\n")


def _has(session: Session, node: Node, oid: int, epoch: int) -> bool | None:
    """Whether the node has the object; None after saying on stderr why that is unknown."""
    try:
        result: int = session.call(OP_EXIST, node=node, oid=oid, epoch=epoch).result
    except TransportError:
        return None
    if result in (RESULT_SUCCESS, RESULT_NO_OBJ):
        return result == RESULT_SUCCESS
    if result in (RESULT_OLD_NODE_VER, RESULT_NEW_NODE_VER):
        complain("The node list has changed: please try again")
    else:
        complain(f"{node.id.text}: hit an unexpected error ({describe(result)})")
    return None


def _dump(path: str) -> None:
    from sheepdog.model.inode import INODE_BYTES, InodeHeader, allocated, map_view, refs_view
    from sheepdog_cli.session import name_text

    try:
        handle = open(path, "rb")  # noqa: SIM115  its two errors have two messages
    except OSError as error:
        fail(f"failed to open inode object file: {os.strerror(error.errno or 0)}")
    try:
        with handle:
            buffer = handle.read(INODE_BYTES)
        if len(buffer) < INODE_BYTES:
            raise OSError(0, "")
        header = InodeHeader.unpack(buffer)
    except (OSError, ProtocolError) as error:
        number = error.errno if isinstance(error, OSError) else 0
        fail(f"failed to read inode object file: {os.strerror(number or 0)}")
    out = sys.stdout.write
    out(f"name: {name_text(header.name)}\ntag: {name_text(header.tag)}\n")
    for field in ("create_time", "snap_ctime", "vm_clock_nsec"):
        out(f"{field}: {getattr(header, field):x}\n")
    numbers = ("vdi_size", "vm_state_size", "copy_policy", "store_policy", "nr_copies", "block_size_shift", "snap_id")
    for field in numbers:
        out(f"{field}: {getattr(header, field)}\n")
    for field in ("vdi_id", "parent_vdi_id"):
        out(f"{field}: {getattr(header, field):x}\n")
    out(f"btree_counter: {header.btree_counter}\ndata_vdi_id:\n")
    owned = list(allocated(map_view(buffer)))
    for index, vid in owned:
        out(f"{index}: {vid:x}\n")
    out("gref:\n")
    references = refs_view(buffer)
    for index, vid in owned:
        out(f"{index}: {vid:x}, {references[2 * index]}, {references[2 * index + 1]}\n")
