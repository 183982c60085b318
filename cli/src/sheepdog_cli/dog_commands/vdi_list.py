"""``dog vdi list``."""

from __future__ import annotations

import sys
import time

from sheepdog.model.ids import index_of, is_data, vid_of
from sheepdog_cli.dog_commands.common import flag_of
from sheepdog_cli.dog_commands.vdi_walk import WalkedVdi, walk
from sheepdog_cli.output import print_json
from sheepdog_cli.session import EXIT_FAILURE, Quit, Session, name_bytes, name_text, pad
from sheepdog_cli.sizes import format_size
from sheepdog_cli.values import format_redundancy

HEADING = "  Name        Id    Size    Used  Shared    Creation time   VDI id  Copies  Tag   Block Size Shift\n"


def run(session: Session) -> None:
    options = session.options
    wanted = session.argument(0)
    name = None if wanted is None else name_bytes(wanted)
    oid: int | None = options.get("oid")
    if not (options.raw or options.json):
        sys.stdout.write(HEADING)
    if oid is not None and not is_data(oid):
        raise Quit(EXIT_FAILURE)
    documents = []
    for walked in walk(session, maps=True):
        if name is not None and walked.header.name != name:
            continue
        if oid is not None and (index_of(oid), vid_of(oid)) not in walked.items():
            continue
        if options.json:
            documents.append(_document(walked))
        else:
            sys.stdout.write(_row(walked, options.raw))
    if options.json:
        print_json(documents)


def _row(walked: WalkedVdi, raw: bool) -> str:
    header = walked.header
    own, shared = walked.counts()
    size = format_size(header.vdi_size, raw)
    used = format_size(own << header.block_size_shift, raw)
    inherited = format_size(shared << header.block_size_shift, raw)
    snap_id = header.snap_id if header.is_snapshot else 0
    copies = format_redundancy(header.nr_copies, header.copy_policy)
    name, tag = name_text(header.name), name_text(header.tag)
    created = header.create_time >> 32
    flag = flag_of(header)
    if raw:
        escaped = "".join("\\" + letter if letter in " \t\\" else letter for letter in name)
        return (
            f"{'=' if flag == ' ' else flag} {escaped} {snap_id} {size} {used} {inherited} {created} "
            f"{header.vdi_id:x} {copies} {tag} {header.block_size_shift}\n"
        )
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(created))
    return (
        f"{flag} {pad(name, 8)} {snap_id:5d} {size:>7} {used:>7} {inherited:>7} {when}  "
        f"{header.vdi_id:7x} {copies:>6} {pad(tag, -13)} {header.block_size_shift:3d}\n"
    )


def _document(walked: WalkedVdi) -> dict[str, object]:
    header = walked.header
    own, shared = walked.counts()
    return {
        "name": name_text(header.name),
        "vid": f"{header.vdi_id:x}",
        "snapshot": header.is_snapshot,
        "snap_id": header.snap_id if header.is_snapshot else 0,
        "tag": name_text(header.tag),
        "parent_vid": f"{header.parent_vdi_id:x}" if header.parent_vdi_id else None,
        "clone": header.is_clone,
        "size": header.vdi_size,
        "used": own << header.block_size_shift,
        "shared": shared << header.block_size_shift,
        "created": header.create_time >> 32,
        "redundancy": format_redundancy(header.nr_copies, header.copy_policy),
        "block_size_shift": header.block_size_shift,
        "hyper": header.is_hypervolume,
    }
