"""``dog vdi backup``: what differs between two snapshots, as a stream."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

from sheepdog.client import volume
from sheepdog.errors import RequestError, TransportError
from sheepdog.model.backup import BackupRecord, Buffer, difference, write_backup
from sheepdog.model.ids import data_oid
from sheepdog_cli.dog_commands.common import complain_object, open_inode
from sheepdog_cli.output import Progress
from sheepdog_cli.session import EXIT_FAILURE, EXIT_SYSTEM, RESULT_EIO, Session, fail, misuse

RESULT_MASK = 0xFFFFFFFF


def run(session: Session) -> None:
    base, target = session.options.get("from"), session.options.get("snapshot")
    if not base or not target:
        misuse("Please specify snapshots with '-F' and '-s' options")
    name = session.arguments[0]
    old = open_inode(session, name, base)
    new = open_inode(session, name, target)
    sys.stdout.flush()
    out = sys.stdout.buffer
    what = "header"
    try:
        for piece in write_backup(_differences(session, old, new)):
            out.write(piece)
            what = "data"
        out.flush()
    except OSError as error:
        # What is left in the buffer can never be written; the interpreter must not try again at exit.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  closed with the process
        fail(f"failed to write backup {what}, {os.strerror(error.errno or 0)}", EXIT_SYSTEM)


def _differences(session: Session, old: volume.Inode, new: volume.Inode) -> Iterator[BackupRecord]:
    size = new.object_bytes
    before, after = dict(old.map.items()), dict(new.map.items())
    # Objects of snapshots never change, so what both name is one and the same.
    indexes = sorted(index for index in before.keys() | after.keys() if before.get(index) != after.get(index))
    progress = Progress(size * len(indexes), data_on_stdout=True)
    try:
        for index in indexes:
            new_data = _object(session, after.get(index, 0), index, size)
            old_data = _object(session, before.get(index, 0), index, size)
            found = difference(old_data, new_data)
            if found is not None:
                offset, length = found
                yield BackupRecord(index, offset, memoryview(new_data)[offset : offset + length])
            progress.advance(size)
    finally:
        progress.end()


def _object(session: Session, owner: int, index: int, size: int) -> Buffer:
    if not owner:
        return bytes(size)
    oid = data_oid(owner, index)
    try:
        return volume.read_object(session.call, oid, size)
    except RequestError as error:
        complain_object(error)
        fail(f"Failed to read object {oid:x}, {error.result}", EXIT_FAILURE)
    except TransportError:
        fail(f"Failed to read object {oid:x}, {RESULT_EIO}", EXIT_FAILURE)
