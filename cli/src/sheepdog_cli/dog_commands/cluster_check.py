"""``dog cluster check``: ``vdi check`` of everything."""

from __future__ import annotations

import sys

from sheepdog_cli.dog_commands.vdi_check import check_objects, objects_of
from sheepdog_cli.dog_commands.vdi_walk import walk
from sheepdog_cli.session import EXIT_FAILURE, Quit, Session, name_text


def run(session: Session) -> None:
    wrong = 0
    for walked in walk(session, maps=True):
        header = walked.header
        name = name_text(header.name)
        if header.is_snapshot:
            sys.stdout.write(f'fix snapshot {name} (id: {header.snap_id}, tag: "{name_text(header.tag)}")\n')
        else:
            sys.stdout.write(f"fix vdi {name}\n")
        try:
            wrong += check_objects(session, header, list(objects_of(walked.inode())))
        except Quit:
            wrong += 1
            continue  # said already; the other vdis are checked all the same
    if wrong and "dry-run" in session.options:
        raise Quit(EXIT_FAILURE)
