"""``dog benchmark io``: writes whole objects of a preallocated vdi, round robin. Meant to be combined with ``-T``."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from sheepdog.client import volume
from sheepdog.client.connection import Connection
from sheepdog.errors import RequestError, TransportError
from sheepdog.model.ids import data_oid, format_oid
from sheepdog_cli.dog_commands.common import complain_object, name_text_cut, open_failure
from sheepdog_cli.output import confirm
from sheepdog_cli.session import EXIT_SYSTEM, RESULT_EIO, Quit, Session, complain, describe, fail, name_bytes
from sheepdog_cli.values import NO_SELECTOR

WRITES_DEFAULT = 1000
DYNAMIC_THREADS = 16
QUESTION = (
    "Caution! benchmark io command will erase all data of target VDI.\n Are you sure you want to continue? [yes/no]"
)


def run(session: Session) -> None:
    options = session.options
    shown = session.arguments[0]
    if not options.force:
        confirm(QUESTION)
    inode = _open(session, shown)
    owned = dict(inode.map.items())
    count = inode.header.objects
    if not count or any(owned.get(index) != inode.vid for index in range(count)):
        fail(f"VDI {shown} has unallocated data", EXIT_SYSTEM)
    queue = options.get("workqueue", "ordered")
    threads = {"ordered": 1, "dynamic": DYNAMIC_THREADS}.get(queue) or options.get("nr-threads", 1)
    writer = _Writer(session, inode)
    try:
        with ThreadPoolExecutor(threads) as pool:
            indexes = (number % count for number in range(options.get("total", WRITES_DEFAULT)))
            for failure in pool.map(writer.write, indexes):
                if failure is not None:
                    pool.shutdown(cancel_futures=True)
                    fail(failure)
    finally:
        writer.close()


def _open(session: Session, shown: str) -> volume.Inode:
    try:
        return volume.open_vdi(session.call, name_bytes(shown))
    except volume.OpenError as error:
        complain_object(error)
        result = error.result
    except TransportError:
        result = RESULT_EIO
    complain(open_failure(name_text_cut(shown), NO_SELECTOR, describe(result)))
    complain(f"failed to lookup VDI {shown}: {describe(result)}")
    raise Quit(EXIT_SYSTEM)


class _Writer:
    """Writes objects; each thread has a connection of its own."""

    def __init__(self, session: Session, inode: volume.Inode) -> None:
        self._session = session
        self._inode = inode
        self._zeros = bytes(inode.object_bytes)
        self._local = threading.local()
        self._connections: list[Connection] = []

    def write(self, index: int) -> str | None:
        """What went wrong, if something did."""
        header = self._inode.header
        oid = data_oid(header.vdi_id, index)
        try:
            connection = getattr(self._local, "connection", None)
            if connection is None:
                connection = self._local.connection = self._session.open()
                self._connections.append(connection)
            volume.write_object(
                connection.request, oid, self._zeros, copies=header.nr_copies, policy=header.copy_policy
            )
        except RequestError as error:
            return f"failed to write object {format_oid(oid)}, {describe(error.result)}"
        except TransportError:
            return f"failed to write object {format_oid(oid)}, {describe(RESULT_EIO)}"
        return None

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
