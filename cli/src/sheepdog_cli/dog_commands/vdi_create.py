"""``dog vdi create``."""

from __future__ import annotations

import sys

from sheepdog.client import admin, volume
from sheepdog.errors import ProtocolError, RequestError, TransportError
from sheepdog.model.inode import object_count
from sheepdog.model.limits import HYPERVOLUME_BYTES_MAX, HYPERVOLUME_SHIFT, flat_bytes_max
from sheepdog_cli.dog_commands.common import volume_size
from sheepdog_cli.output import Progress
from sheepdog_cli.session import EXIT_FAILURE, Quit, Session, complain, describe, fail, misuse, name_bytes
from sheepdog_cli.sizes import format_size

RESULT_EIO = 0x03
RESULT_WAIT_FOR_FORMAT = 0x16


def run(session: Session) -> None:
    options = session.options
    shown = session.arguments[0]
    name = name_bytes(shown)
    hyper = "hyper" in options
    given_shift: int = options.get("block_size_shift", 0)
    text = session.argument(1)
    if text is None:
        misuse("Please specify the VDI size")
    size = volume_size(text)
    if hyper and given_shift:
        fail("Don't specify both -y and -z options, please")
    if hyper:
        shift = HYPERVOLUME_SHIFT
    else:
        shift = given_shift or _default_shift(session, shown)
    _check_size(size, hyper, shift)
    redundancy = options.get("copies")
    try:
        created = volume.create_vdi(
            session.call,
            name,
            size=size,
            copies=redundancy.copies if redundancy else 0,
            policy=redundancy.policy if redundancy else 0,
            store_policy=1 if hyper else 0,
            # The cluster knows its own default; a shift is sent only where it was chosen.
            shift=shift if hyper else given_shift,
        )
    except TransportError:
        fail(f"Failed to create VDI {shown}: {describe(RESULT_EIO)}")
    except RequestError as error:
        fail(f"Failed to create VDI {shown}: {error}")
    if "prealloc" in options:
        _preallocate(session, created.vid, size)
    if options.verbose:
        sys.stdout.write(f"{created.vid:x}\n" if options.raw else f"VDI ID of newly created VDI: {created.vid:x}\n")


def _default_shift(session: Session, shown: str) -> int:
    try:
        info = admin.cluster_info(session.call)
    except TransportError:
        fail(f"Failed to create VDI {shown}: {describe(RESULT_EIO)}")
    except (RequestError, ProtocolError) as error:
        fail(f"Failed to create VDI {shown}: {error}")
    if info.block_size_shift == 0:
        fail(f"Failed to create VDI {shown}: {describe(RESULT_WAIT_FOR_FORMAT)}")
    return info.block_size_shift


def _check_size(size: int, hyper: bool, shift: int) -> None:
    if size > HYPERVOLUME_BYTES_MAX:
        misuse("VDI size is too large")
    limit = flat_bytes_max(shift)
    if not hyper and size > limit:
        misuse(
            f"VDI size is larger than {format_size(limit)} bytes, please use '-y' to create a hyper volume with size "
            f"up to {format_size(HYPERVOLUME_BYTES_MAX)} bytes or use '-z' to create larger object size volume"
        )


def _preallocate(session: Session, vid: int, size: int) -> None:
    try:
        inode = volume.Inode.read(session.call, vid)
        shift = inode.header.block_size_shift
        progress = Progress(size)
        disk = volume.Volume(inode, flags=volume.FLAG_DIRECT)
        for index in range(object_count(size, shift)):
            disk.write_piece(volume.Piece(index, 0, 0), b"")
            progress.advance(min(1 << shift, size - progress.done))
    except RequestError as error:
        complain(str(error))
        raise Quit(EXIT_FAILURE) from None
    except TransportError:
        raise Quit(EXIT_FAILURE) from None
