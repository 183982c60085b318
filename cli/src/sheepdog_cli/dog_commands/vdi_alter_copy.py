"""``dog vdi alter-copy``: another number of copies."""

from __future__ import annotations

import sys
from dataclasses import replace
from struct import Struct

from sheepdog_cli.dog_commands.common import failing_with, open_inode
from sheepdog_cli.dog_commands.vdi_walk import walk
from sheepdog_cli.output import QUESTION, confirm, confirm_banner
from sheepdog_cli.session import RESULT_SUCCESS, Session, complain, describe, fail, misuse, name_bytes

OP_ALTER_VDI_COPY = 0xC0
COPIES_DEFAULT = 3

# old_vid, new_vid, copies, set_bitmap, copy_policy, block_size_shift
VDI_STATE_VARIANT = Struct("<IIBBBB")


def wanted_copies(session: Session, what: str) -> int:
    """The number of copies asked for, after the questions about it.

    :raises Quit: an erasure code was asked for, or the number declined.
    """
    redundancy = session.options.get("copies")
    if redundancy is None:
        sys.stdout.write(f"The {what}'s redundancy level is not specified, use {COPIES_DEFAULT} as default.\n")
        copies = COPIES_DEFAULT
    elif redundancy.policy:
        misuse("Changing redundancy level of erasure coded vdi is not supported yet.")
    else:
        copies = redundancy.copies
    nodes = len(session.nodes)
    if copies > nodes and not session.options.force:
        confirm(f"Number of copies ({copies}) is larger than number of nodes ({nodes}).\n{QUESTION}")
    return copies


def run(session: Session) -> None:
    shown = session.arguments[0]
    copies = wanted_copies(session, "vdi")
    inode = open_inode(session, shown, header_only=True, then=f"Reading {shown}'s vdi object failure.")
    header = inode.header
    if header.copy_policy:
        fail(f"{shown}'s copy policy is erasure code, changing it is not supported yet.")
    if header.nr_copies == copies:
        fail(f"{shown}'s redundancy level is already set to {copies}, nothing changed.")
    relatives = [
        walked.header
        for walked in walk(session)
        if walked.header.vdi_id != header.vdi_id
        and (walked.header.name == name_bytes(shown) or walked.header.parent_vdi_id == header.vdi_id)
    ]
    if relatives or header.parent_vdi_id:
        complain("Only standalone vdi supports changing redundancy level.")
        fail(f"Please clone {shown} with -n (--no-share) option first.")
    if not session.options.force:
        confirm_banner(
            "Caution! Changing VDI's redundancy level will affect", "the VDI itself only and trigger recovery."
        )
    failure = f"Changing {shown}'s redundancy level failure."
    variant = VDI_STATE_VARIANT.pack(0, header.vdi_id, copies, 0, header.copy_policy, header.block_size_shift)
    with failing_with(failure):
        inode.write_header(replace(header, nr_copies=copies))
        response = session.call(OP_ALTER_VDI_COPY, variant=variant)
        if response.result != RESULT_SUCCESS:
            complain(describe(response.result))
            inode.write_header(header)  # what was refused has changed nothing
            fail(failure)
    complain(f"{shown}'s redundancy level is set to {copies}, the old one was {header.nr_copies}.")
