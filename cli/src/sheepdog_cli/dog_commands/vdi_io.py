"""``dog vdi read`` and ``dog vdi write``: raw bytes between a volume and a pipe."""

from __future__ import annotations

import os
import stat
import sys
from typing import BinaryIO

from sheepdog.client import volume
from sheepdog.errors import RequestError, TransportError
from sheepdog_cli.dog_commands.common import complain_object, open_inode, volume_size
from sheepdog_cli.output import Progress
from sheepdog_cli.session import EXIT_FAILURE, EXIT_SYSTEM, Session, fail
from sheepdog_cli.values import NO_SELECTOR

REQUEST_BYTES_MAX = 4 << 20  # larger objects are moved in several requests


def run(session: Session) -> None:
    if session.command.name == "read":
        _read(session)
    else:
        _write(session)


def _range(session: Session) -> tuple[int, int | None]:
    offset_text, length_text = session.argument(1), session.argument(2)
    offset = 0 if offset_text is None else volume_size(offset_text)
    return offset, None if length_text is None else volume_size(length_text)


def _read(session: Session) -> None:
    offset, length = _range(session)
    inode = open_inode(session, session.arguments[0], session.options.get("snapshot", NO_SELECTOR))
    disk = volume.Volume(inode)
    if offset > disk.size:
        fail("Read offset is beyond the end of the VDI", EXIT_FAILURE)
    length = disk.size - offset if length is None else min(length, disk.size - offset)
    sys.stdout.flush()
    out = sys.stdout.buffer
    zeros = memoryview(bytes(min(inode.object_bytes, REQUEST_BYTES_MAX)))
    progress = Progress(length, data_on_stdout=True)
    for piece in volume.split(offset, length, inode.object_bytes):
        for part in _parts(piece):
            try:
                hole = not inode.map.get(part.object_index)
                data = zeros[: part.length] if hole else disk.read_piece(part)
            except (RequestError, TransportError) as error:
                progress.end()
                complain_object(error)
                fail("Failed to read VDI", EXIT_FAILURE)
            try:
                out.write(data)
                out.flush()
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                # What is left in the buffer can never be written; the interpreter must not try again at exit.
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115  closed with the process
                progress.end()
                fail(f"Failed to write to stdout: {reason}", EXIT_SYSTEM)
            progress.advance(part.length)


def _parts(piece: volume.Piece) -> list[volume.Piece]:
    return [
        volume.Piece(piece.object_index, piece.offset + start, min(REQUEST_BYTES_MAX, piece.length - start))
        for start in range(0, piece.length, REQUEST_BYTES_MAX)
    ]


def _write(session: Session) -> None:
    offset, length = _range(session)
    inode = open_inode(session, session.arguments[0])
    disk = volume.Volume(inode, flags=volume.FLAG_CACHE if "writeback" in session.options else 0)
    if offset > disk.size:
        fail("Write offset is beyond the end of the VDI", EXIT_FAILURE)
    length = disk.size - offset if length is None else min(length, disk.size - offset)
    progress = Progress(min(length, _rest_of(sys.stdin.buffer)))
    try:
        for piece in volume.split(offset, length, inode.object_bytes):
            if not _write_piece(disk, piece, progress):
                return
    finally:
        progress.end()


def _rest_of(source: BinaryIO) -> int:
    """How many bytes there are still to read: a guess where only reading tells."""
    try:
        status = os.fstat(source.fileno())
        if stat.S_ISREG(status.st_mode):
            return max(status.st_size - source.tell(), 0)
    except OSError:
        pass  # no file at all
    return sys.maxsize


def _write_piece(disk: volume.Volume, piece: volume.Piece, progress: Progress) -> bool:
    """The range has what stdin gave, zeros behind its end. False when stdin ended."""
    was_hole = not disk.inode.map.get(piece.object_index)
    ended = False
    for number, part in enumerate(_parts(piece)):
        data = bytearray(part.length)
        filled = 0
        if not ended:
            try:
                filled = _fill(sys.stdin.buffer, memoryview(data))
            except OSError as error:
                fail(f"Failed to read from stdin: {os.strerror(error.errno or 0)}", EXIT_SYSTEM)
            ended = filled < part.length
            if not filled and (number == 0 or was_hole):
                return False
        elif was_hole:
            return False  # what we made reads as zeros already
        try:
            disk.write_piece(part, data)
        except (RequestError, TransportError) as error:
            progress.end()
            complain_object(error)
            fail("Failed to write VDI", EXIT_FAILURE)
        progress.advance(filled)
    return not ended


def _fill(source: BinaryIO, view: memoryview) -> int:
    filled = 0
    while filled < len(view):
        count = source.readinto(view[filled:])  # type: ignore[attr-defined]  # a buffered stream
        if not count:
            break
        filled += count
    return filled
