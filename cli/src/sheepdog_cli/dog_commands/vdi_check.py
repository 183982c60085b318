"""``dog vdi check``: compares the copies of a vdi and repairs them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sheepdog.errors import TransportError
from sheepdog.model.ids import data_oid, format_oid, object_bytes, vmstate_oid
from sheepdog.model.inode import InodeHeader, object_count
from sheepdog.model.ring import Ring
from sheepdog_cli.dog_commands.checker import Checker
from sheepdog_cli.dog_commands.common import open_inode
from sheepdog_cli.output import Progress
from sheepdog_cli.session import EXIT_FAILURE, RESULT_EIO, RESULT_SUCCESS, Quit, Session, complain, describe, name_text
from sheepdog_cli.values import NO_SELECTOR

if TYPE_CHECKING:
    from sheepdog.client import volume

OP_OIDS_EXIST = 0xC6
FLAG_PIGGYBACK = 0x0010
RESULT_NO_OBJ = 0x02
OIDS_PER_REQUEST = 1 << 18


def run(session: Session) -> None:
    shown = session.arguments[0]
    selector = session.options.get("snapshot", NO_SELECTOR)
    inode = open_inode(session, shown, selector, then="FATAL: no inode objects")
    oids = list(objects_of(inode))
    if "exist" in session.options:
        _check_existence(session, shown, inode.header, oids)
        return
    if check_objects(session, inode.header, oids) and "dry-run" in session.options:
        raise Quit(EXIT_FAILURE)


def objects_of(inode: volume.Inode) -> Iterator[int]:
    """The inode object, the nodes of a hypervolume's tree, every allocated data object, and the vm state."""
    header = inode.header
    yield inode.oid
    yield from inode.map.nodes()
    for index, owner in inode.map.items():
        yield data_oid(owner, index)
    if header.is_snapshot:
        for number in range(object_count(header.vm_state_size, header.block_size_shift)):
            yield vmstate_oid(header.vdi_id, number)


def check_objects(session: Session, header: InodeHeader, oids: list[int]) -> int:
    """The objects were compared and repaired, and that was said; with --dry-run only compared.

    Returns how many were not as they should be.

    :raises Quit: one could not be looked at; said on stderr.
    """
    dry_run = "dry-run" in session.options
    progress = Progress(sum(object_bytes(oid, header.block_size_shift) for oid in oids))
    checker = Checker(session, header, progress, dry_run=dry_run)
    checker.check(oids)
    sys.stdout.write(f"finish check{'' if dry_run else '&repair'} {name_text(header.name)}\n")
    return checker.wrong


def _check_existence(session: Session, shown: str, header: InodeHeader, oids: list[int]) -> None:
    ring = Ring(session.nodes)
    wanted: dict[str, list[int]] = {node.id.text: [] for node in session.nodes}
    for oid in oids:
        for node in ring.holders(oid, header.nr_copies):
            wanted[node.id.text].append(oid)
    lost = 0
    for node in session.nodes:
        mine = wanted[node.id.text]
        for start in range(0, len(mine), OIDS_PER_REQUEST):
            part = mine[start : start + OIDS_PER_REQUEST]
            body = b"".join(oid.to_bytes(8, "little") for oid in part)
            try:
                response = session.call(OP_OIDS_EXIST, node=node, flags=FLAG_PIGGYBACK, body=body)
            except TransportError:
                complain(f"failed to check objects on {node.id.text}, {describe(RESULT_EIO)}")
                raise Quit(EXIT_FAILURE) from None
            if response.result == RESULT_SUCCESS:
                continue
            if response.result != RESULT_NO_OBJ:
                complain(f"failed to check objects on {node.id.text}, {describe(response.result)}")
                raise Quit(EXIT_FAILURE)
            for at in range(0, len(response.body), 8):
                oid = int.from_bytes(response.body[at : at + 8], "little")
                sys.stdout.write(f"[{node.id.text}] oid {format_oid(oid)} is missing.\n")
                lost += 1
    if lost:
        sys.stdout.write(f"{shown} lost {lost} object(s).\n")
        raise Quit(EXIT_FAILURE)
    sys.stdout.write(f"{shown} is fine, no object is missing.\n")
