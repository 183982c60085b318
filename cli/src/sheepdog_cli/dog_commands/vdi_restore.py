"""``dog vdi restore``: a new snapshot from an old one and a backup stream.

The protocol has no "make this a snapshot of that": a snapshot is what a working vdi becomes when a new one takes its
place. So a working vdi is made on top of the chosen snapshot, the differences are written to it, and then the former
working vdi is put back in its place, which turns the restored one into a snapshot.

A working vdi without changes of its own is deleted first and made again afterwards, as the original does. One with
changes is kept: it becomes a snapshot without tag itself, and the name goes on from it.
"""

from __future__ import annotations

import sys

from sheepdog.client import volume
from sheepdog.errors import ProtocolError, RequestError, TransportError
from sheepdog.model.backup import BackupRecord, read_backup
from sheepdog.model.inode import InodeHeader
from sheepdog_cli.dog_commands.common import complain_object, open_inode
from sheepdog_cli.dog_commands.vdi_delete import RESULT_NO_VDI, delete
from sheepdog_cli.output import Progress
from sheepdog_cli.session import (
    EXIT_FAILURE,
    EXIT_SYSTEM,
    RESULT_EIO,
    Quit,
    Session,
    complain,
    describe,
    fail,
    misuse,
    name_bytes,
    name_text,
)

HEADER_BYTES = 8


def run(session: Session) -> None:
    shown = session.arguments[0]
    selector = session.options.get("snapshot")
    if not selector:
        misuse("We can restore a backup file only to snapshots", "Please specify the '-s' option")
    if sys.stdin.isatty():
        misuse("stdin must be pipe")
    wanted = f"Snapshot ID {selector.snap_id} or tag {name_text(selector.tag)} doesn't exist"
    base = open_inode(session, shown, selector, then=wanted)
    stream = sys.stdin.buffer
    head = stream.read(HEADER_BYTES)
    rest = [head]

    def read(count: int) -> bytes:
        return rest.pop() if rest else stream.read(count)

    # The stream is looked at before anything changes.
    if not _is_backup(head):
        fail("The backup file is corrupted", EXIT_SYSTEM)
    current = _current(session, shown)
    resume_vid = _make_room(session, shown, current)
    made = _create(session, shown, base.header, base_vid=base.vid, snapshot=resume_vid == _vid_of(current))
    like = base.header if current is None else current.header
    try:
        _apply(session, base, made, read)
    except Quit:
        _undo(session, shown, like, resume_vid)
        raise
    _create(session, shown, like, base_vid=resume_vid or made, snapshot=True)


def _is_backup(head: bytes) -> bool:
    end = [head, b"\xff" * 4 + bytes(12)]
    try:
        return list(read_backup(lambda _: end.pop(0))) == []
    except (ProtocolError, IndexError):
        return False
    except Exception:  # struct.error of a short header
        return False


def _vid_of(inode: volume.Inode | None) -> int:
    return -1 if inode is None else inode.vid


def _current(session: Session, shown: str) -> volume.Inode | None:
    try:
        return volume.open_vdi(session.call, name_bytes(shown), direct=False)
    except volume.OpenError as error:
        if error.result == RESULT_NO_VDI:
            return None  # only snapshots are left of the name
        complain_object(error)
        fail(str(error))
    except TransportError:
        raise Quit(EXIT_FAILURE) from None


def _make_room(session: Session, shown: str, current: volume.Inode | None) -> int:
    """The vid that the next working vdi must have as its parent; 0 for the restored one itself."""
    if current is None:
        return 0
    changed = any(vid == current.vid for _, vid in current.map.items())
    if changed or not current.header.parent_vdi_id:
        return current.vid
    try:
        volume.clear_map(current, batch=session.options.get("nr-batched-reclamation", volume.RECLAIM_ENTRIES))
        volume.delete_vdi(session.call, name_bytes(shown))
    except RequestError as error:
        complain_object(error)
        fail("Failed to delete the current state")
    except TransportError:
        fail("Failed to delete the current state")
    return current.header.parent_vdi_id


def _create(session: Session, shown: str, like: InodeHeader, *, base_vid: int, snapshot: bool) -> int:
    try:
        return volume.create_vdi(
            session.call,
            name_bytes(shown),
            size=like.vdi_size,
            base_vid=base_vid,
            copies=like.nr_copies,
            policy=like.copy_policy,
            store_policy=like.store_policy,
            shift=like.block_size_shift,
            snap_id=1 if snapshot else 0,
        ).vid
    except RequestError as error:
        fail(f"Failed to create VDI {shown}: {error}")
    except TransportError:
        fail(f"Failed to create VDI {shown}: {describe(RESULT_EIO)}")


def _apply(session: Session, base: volume.Inode, vid: int, read: object) -> None:
    """The differences are written to the vdi ``vid``, whose map is still that of ``base``."""
    buffer = bytearray(base.buffer)
    buffer[560:564] = vid.to_bytes(4, "little")
    disk = volume.Volume(volume.Inode(session.call, buffer), flags=volume.FLAG_DIRECT)
    # A stream does not say how long it is; its records go through the volume in order.
    progress = Progress(disk.size)
    try:
        for record in read_backup(read):  # type: ignore[arg-type]  # a function of one int
            _check(record, disk)
            disk.write_piece(volume.Piece(record.index, record.offset, len(record.data)), record.data)
            progress.set(min((record.index + 1) * disk.inode.object_bytes, disk.size))
        progress.set(disk.size)
    except ProtocolError:
        fail("failed to read backup data", EXIT_SYSTEM)
    except RequestError as error:
        complain_object(error)
        fail("failed to restore backup", EXIT_FAILURE)
    except TransportError:
        fail("failed to restore backup", EXIT_FAILURE)
    finally:
        progress.end()


def _check(record: BackupRecord, disk: volume.Volume) -> None:
    """:raises ProtocolError: the record lies outside the vdi."""
    inside = record.offset + len(record.data) <= disk.inode.object_bytes
    if not inside or record.index >= disk.inode.header.objects:
        raise ProtocolError(f"a backup record for object {record.index} does not fit the vdi")


def _undo(session: Session, shown: str, like: InodeHeader, resume_vid: int) -> None:
    """After a failure: the half restored vdi is gone and the name has its working vdi back."""
    try:
        delete(session, shown)
        if resume_vid:
            _create(session, shown, like, base_vid=resume_vid, snapshot=False)
    except Exception:
        complain("failed to resume the current vdi")
