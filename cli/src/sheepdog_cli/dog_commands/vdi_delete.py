"""``dog vdi delete``."""

from __future__ import annotations

from sheepdog.client import volume
from sheepdog.errors import RequestError, TransportError
from sheepdog_cli.dog_commands.common import complain_object, open_failure
from sheepdog_cli.session import (
    EXIT_FAILURE,
    EXIT_MISSING,
    RESULT_EIO,
    Options,
    Quit,
    Session,
    complain,
    describe,
    fail,
    name_bytes,
)
from sheepdog_cli.values import NO_SELECTOR, Selector

RESULT_NO_VDI = 0x08


def run(session: Session) -> None:
    shown = session.arguments[0]
    selector = session.options.get("snapshot", NO_SELECTOR)
    try:
        delete(session, shown, selector, entries_max=session.options.get("max-reclaim"))
    except NotOpened as error:
        raise Quit(EXIT_MISSING if error.result == RESULT_NO_VDI else EXIT_FAILURE) from None


class NotOpened(Exception):
    """The vdi could not be opened; said on stderr."""

    def __init__(self, result: int) -> None:
        super().__init__(result)
        self.result = result


def delete(
    session: Session,
    shown: str,
    selector: Selector = NO_SELECTOR,
    *,
    entries_max: int | None = None,
    missing_ok: bool = False,
) -> None:
    """The vdi or snapshot is gone; with ``entries_max`` only that many of its map entries.

    :param missing_ok: that there is none is no error.
    :raises NotOpened: it cannot be opened; said on stderr.
    :raises Quit: refused; said on stderr.
    """
    options: Options = session.options
    inode = _open(session, shown, selector, missing_ok)
    if inode is None:
        return
    try:
        # The daemon itself removes the objects of a hypervolume; its map has no references to drop.
        if entries_max is not None or not inode.header.is_hypervolume:
            volume.clear_map(
                inode,
                batch=options.get("nr-batched-reclamation", volume.RECLAIM_ENTRIES),
                pause_s=options.get("reclamation-interval", 0),
                entries_max=entries_max,
            )
        if entries_max is None:
            volume.delete_vdi(session.call, name_bytes(shown), snap_id=selector.snap_id, tag=selector.tag)
    except RequestError as error:
        complain_object(error)
        fail(f"Failed to delete {shown}: {describe(error.result)}")
    except TransportError:
        fail(f"Failed to delete {shown}: {describe(RESULT_EIO)}")


def _open(session: Session, shown: str, selector: Selector, missing_ok: bool) -> volume.Inode | None:
    try:
        return volume.open_vdi(
            session.call, name_bytes(shown), snap_id=selector.snap_id, tag=selector.tag, direct=False
        )
    except volume.OpenError as error:
        if missing_ok and error.result == RESULT_NO_VDI:
            return None
        complain_object(error)
        complain(open_failure(shown, selector, describe(error.result)))
        raise NotOpened(error.result) from None
    except TransportError:
        complain(open_failure(shown, selector, describe(RESULT_EIO)))
        raise NotOpened(RESULT_EIO) from None
