"""``dog vdi rollback``: back to a snapshot."""

from __future__ import annotations

import sys

from sheepdog.client import volume
from sheepdog.errors import RequestError, TransportError
from sheepdog_cli.dog_commands.common import open_inode
from sheepdog_cli.dog_commands.vdi_delete import NotOpened, delete
from sheepdog_cli.output import confirm
from sheepdog_cli.session import RESULT_EIO, Quit, Session, describe, fail, misuse, name_bytes

QUESTION = "This operation discards any changes made since the previous\nsnapshot was taken.  Continue? [yes/no]: "


def run(session: Session) -> None:
    shown = session.arguments[0]
    selector = session.options.get("snapshot")
    if not selector:
        misuse("Please specify the '-s' option")
    header = open_inode(session, shown, selector, header_only=True).header
    if not session.options.force:
        confirm(QUESTION)
    try:
        # Without a working vdi there is nothing to discard: an earlier rollback was interrupted behind this.
        delete(session, shown, missing_ok=True)
    except (NotOpened, Quit):
        fail("Failed to delete the current state")
    try:
        made = volume.create_vdi(
            session.call,
            name_bytes(shown),
            size=header.vdi_size,
            base_vid=header.vdi_id,
            copies=header.nr_copies,
            policy=header.copy_policy,
            store_policy=header.store_policy,
            shift=header.block_size_shift,
        )
    except RequestError as error:
        fail(f"Failed to create VDI {shown}: {error}")
    except TransportError:
        fail(f"Failed to create VDI {shown}: {describe(RESULT_EIO)}")
    if session.options.verbose:
        prefix = "" if session.options.raw else "New VDI ID of rollbacked VDI: "
        sys.stdout.write(f"{prefix}{made.vid:x}\n")
