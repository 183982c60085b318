"""``dog vdi clone``."""

from __future__ import annotations

import sys

from sheepdog.client import volume
from sheepdog.errors import RequestError, TransportError
from sheepdog.model.ids import data_oid
from sheepdog_cli.dog_commands.common import failing_with, open_inode
from sheepdog_cli.output import Progress
from sheepdog_cli.session import RESULT_EIO, Session, describe, fail, misuse, name_bytes


def run(session: Session) -> None:
    source, target = session.arguments[0], session.argument(1)
    if not target:
        misuse("Destination VDI name must be specified")
    selector = session.options.get("snapshot")
    if not selector:
        misuse("Only snapshot VDIs can be cloned", "Please specify the '-s' option")
    alone = "no-share" in session.options
    inode = open_inode(session, source, selector)
    header = inode.header
    try:
        made = volume.create_vdi(
            session.call,
            name_bytes(target),
            size=header.vdi_size,
            base_vid=0 if alone else header.vdi_id,
            copies=header.nr_copies,
            policy=header.copy_policy,
            store_policy=header.store_policy,
            shift=header.block_size_shift,
        )
    except RequestError as error:
        fail(f"Failed to create VDI {target}: {error}")
    except TransportError:
        fail(f"Failed to create VDI {target}: {describe(RESULT_EIO)}")
    if alone or "prealloc" in session.options:
        with failing_with(None):
            _fill(session, inode, made.vid, holes="prealloc" in session.options)
    if session.options.verbose:
        prefix = "" if session.options.raw else "VDI ID of newly created clone: "
        sys.stdout.write(f"{prefix}{made.vid:x}\n")


def _fill(session: Session, source: volume.Inode, vid: int, *, holes: bool) -> None:
    target = volume.Inode.read(session.call, vid)
    disk = volume.Volume(target, flags=volume.FLAG_DIRECT)
    size = source.header.vdi_size
    progress = Progress(size)
    indexes = range(source.header.objects) if holes else (index for index, _ in source.map.items())
    for index in indexes:
        owner = source.map.get(index)
        if owner:
            data = volume.read_object(session.call, data_oid(owner, index), source.object_bytes)
            disk.write_piece(volume.Piece(index, 0, len(data)), data)
        else:
            disk.write_piece(volume.Piece(index, 0, 0), b"")
        progress.set(min((index + 1) * source.object_bytes, size))
    progress.set(size)
