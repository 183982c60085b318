"""``dog vdi snapshot``."""

from __future__ import annotations

import sys

from sheepdog.client import volume
from sheepdog.errors import RequestError, TransportError
from sheepdog_cli.dog_commands.common import failing_with, open_inode
from sheepdog_cli.session import RESULT_EIO, Session, complain, describe, fail, misuse, name_bytes
from sheepdog_cli.values import NO_SELECTOR

RESULT_NO_TAG = 0x0E


def run(session: Session) -> None:
    shown = session.arguments[0]
    name = name_bytes(shown)
    selector = session.options.get("snapshot", NO_SELECTOR)
    if selector.snap_id:
        misuse("Please specify a non-integer value for a snapshot tag name")
    if "reduce-identical-snapshots" in session.options and not _has_own_objects(session, shown):
        if session.options.verbose:
            complain(f"VDI {shown} doesn't have its own objects, skipping creation of snapshot")
        return
    _check_tag_is_free(session, shown, name, selector.tag)
    inode = open_inode(session, shown, header_only=True)
    header = inode.header
    if header.is_hypervolume:
        fail("creating a snapshot of hypervolume is not supported")
    with failing_with(None):
        # The daemon copies the tag with the inode that it sets aside, so the tag must stand there before.
        volume.set_tag(inode, selector.tag)
    try:
        made = volume.create_vdi(
            session.call,
            name,
            size=header.vdi_size,
            base_vid=header.vdi_id,
            copies=header.nr_copies,
            policy=header.copy_policy,
            store_policy=header.store_policy,
            shift=header.block_size_shift,
            snap_id=1,
        )
    except RequestError as error:
        fail(f"Failed to create snapshot for {shown}: {error}")
    except TransportError:
        fail(f"Failed to create snapshot for {shown}: {describe(RESULT_EIO)}")
    if session.options.verbose:
        if session.options.raw:
            sys.stdout.write(f"{made.vid:x} {header.vdi_id:x}\n")
        else:
            sys.stdout.write(
                f"new VID of original VDI: {made.vid:x}, VDI ID of newly created snapshot: {header.vdi_id:x}\n"
            )


def _has_own_objects(session: Session, shown: str) -> bool:
    inode = open_inode(session, shown)
    return any(vid == inode.vid for _, vid in inode.map.items())


def _check_tag_is_free(session: Session, shown: str, name: bytes, tag: bytes) -> None:
    try:
        found = volume.find_vdi(session.call, name, tag=tag)
    except TransportError:
        fail(f"Failed to create snapshot for {shown}: {describe(RESULT_EIO)}")
    except RequestError as error:
        if error.result == RESULT_NO_TAG:
            return
        fail(f"Failed to create snapshot for {shown}: {error}")
    with failing_with(f"Failed to create snapshot for {shown}: {describe(RESULT_EIO)}"):
        inode = volume.Inode.read(session.call, found.vid, header_only=True)
    if inode.header.is_snapshot:
        text = tag.decode(errors="surrogateescape")
        fail(f"Failed to create snapshot for {shown}, maybe snapshot id (0) or tag ({text}) is existed")
