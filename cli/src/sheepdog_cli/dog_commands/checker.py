"""Compares all copies of objects and repairs them; several objects at a time, each thread with its own connections."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from struct import Struct
from typing import TYPE_CHECKING, Any

from sheepdog.client.connection import Connection, Response
from sheepdog.errors import ProtocolError, SheepdogError, TransportError
from sheepdog.model.ids import always_replicated, format_oid, object_bytes
from sheepdog.model.inode import InodeHeader
from sheepdog.model.ring import Ring
from sheepdog.wire.extensions import REPAIR_NEEDLESS
from sheepdog_cli.output import Progress
from sheepdog_cli.session import EXIT_FAILURE, RESULT_EIO, Quit, Session, complain, describe, fail

if TYPE_CHECKING:
    from sheepdog.contracts.redundancy import RedundancyScheme
    from sheepdog.model.node import Node

OP_CREATE_AND_WRITE_PEER = 0xA3
OP_READ_PEER = 0xA4
OP_GET_HASH = 0xB4
OP_REPAIR_REPLICA = 0xC5

RESULT_SUCCESS = 0x00
RESULT_NO_OBJ = 0x02

THREADS = 8

_FORW = Struct("<Q16sH6x")


class Stopped(Exception):
    """The check cannot go on; the message says why."""


class Checker:
    """Checks the objects of one vdi."""

    def __init__(self, session: Session, header: InodeHeader, progress: Progress | None = None) -> None:
        """:raises Quit: too few zones for the erasure code, or nothing installed that knows it; said on stderr."""
        self._session = session
        self._header = header
        self._ring = Ring(session.nodes)
        self._scheme: RedundancyScheme | None = None
        self._progress = progress
        self._lock = threading.Lock()
        self._local = threading.local()
        self._connections: list[Connection] = []
        if header.copy_policy:
            if self._ring.zones < header.nr_copies:
                fail("ABORT: Not enough active zones for consistency-checking erasure coded VDI")
            self._scheme = _scheme(header)

    def check(self, oids: Iterable[int]) -> None:
        """Every object was compared, and repaired where that was possible.

        :raises Quit: an object could not be looked at; said on stderr.
        """
        failures = []
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                for failure in pool.map(self._guarded, oids):
                    if failure is not None:
                        failures.append(failure)
                        pool.shutdown(wait=False, cancel_futures=True)
                        break
        finally:
            for connection in self._connections:
                connection.close()
        if failures:
            if failures[0]:
                complain(failures[0])
            raise Quit(EXIT_FAILURE)

    def _guarded(self, oid: int) -> str | None:
        try:
            self._check_object(oid)
        except Stopped as stopped:
            return str(stopped)
        if self._progress is not None:
            with self._lock:
                self._progress.advance(object_bytes(oid, self._header.block_size_shift))
        return None

    def _check_object(self, oid: int) -> None:
        holders = self._ring.holders(oid, self._header.nr_copies)
        if self._scheme is not None and not always_replicated(oid):
            self._check_strips(oid, holders, self._scheme)
        else:
            self._check_copies(oid, holders)

    # --- copies ---

    def _check_copies(self, oid: int, holders: tuple[Node, ...]) -> None:
        epoch = self._session.epoch
        digests: dict[int, bytes] = {}
        for at, node in enumerate(holders):
            response = self._call(node, oid, OP_GET_HASH, oid=oid, tgt_epoch=epoch)
            if response.result == RESULT_SUCCESS:
                digests[at] = response.header[24:44]
            elif response.result != RESULT_NO_OBJ:
                raise Stopped(f"failed to read {format_oid(oid)} from {node.id.text}, {describe(response.result)}")
        if not digests:
            self._complain(f"no node has {format_oid(oid)}")
            return
        digest, votes = Counter(digests.values()).most_common(1)[0]
        if votes * 2 <= len(digests):
            self._complain(f"no majority of {format_oid(oid)}")
            return
        source = next(holders[at] for at in digests if digests[at] == digest)
        for at, node in enumerate(holders):
            if digests.get(at) == digest:
                continue
            variant = _FORW.pack(oid, source.id.address, source.id.port)
            response = self._call(node, oid, OP_REPAIR_REPLICA, variant=variant)
            if response.result == RESULT_SUCCESS:
                if response.variant[0] == REPAIR_NEEDLESS:
                    continue  # a write was on its way when we compared
                self._say(f"fixed {'replica' if at in digests else 'missing'} {format_oid(oid)}")
            else:
                self._complain(f"failed to repair object {format_oid(oid)} from {source.id.text} to {node.id.text}")

    # --- strips ---

    def _check_strips(self, oid: int, holders: tuple[Node, ...], scheme: RedundancyScheme) -> None:
        length = scheme.shard_bytes(object_bytes(oid, self._header.block_size_shift))
        strips: dict[int, bytearray] = {}
        for at, node in enumerate(holders):
            response = self._call(
                node, oid, OP_READ_PEER, epoch=self._session.epoch, tgt_epoch=self._session.epoch,
                oid=oid, ec_index=at, data_length=length,
            )  # fmt: skip
            if response.result == RESULT_SUCCESS:
                strips[at] = response.body
            elif response.result != RESULT_NO_OBJ:
                raise Stopped(f"failed to read {format_oid(oid)} from {node.id.text}, {describe(response.result)}")
        missing = [at for at in range(len(holders)) if at not in strips]
        if not missing:
            if not scheme.verify(strips):
                self._complain(f"object {format_oid(oid)} is inconsistent")
            return
        spare = scheme.shards - scheme.shards_to_read
        if len(missing) > spare:
            self._complain(
                f"failed to rebuild object {format_oid(oid)}. {len(missing)} copies get lost, more than {spare}"
            )
            return
        enough = dict(list(strips.items())[: scheme.shards_to_read])
        for at in missing:
            self._write_strip(oid, holders[at], at, bytes(scheme.rebuild(at, enough)))

    def _write_strip(self, oid: int, node: Node, at: int, strip: bytes) -> None:
        response = self._call(
            node, oid, OP_CREATE_AND_WRITE_PEER, epoch=self._session.epoch, oid=oid, ec_index=at,
            copies=self._header.nr_copies, copy_policy=self._header.copy_policy, body=strip,
        )  # fmt: skip
        if response.result == RESULT_SUCCESS:
            self._say(f"fixed missing {format_oid(oid)}, copy index {at}")
        else:
            self._complain(f"failed to repair object {format_oid(oid)} from {self._session.address} to {node.id.text}")

    # --- talking ---

    def _call(self, node: Node, about: int, opcode: int, **fields: Any) -> Response:  # Any: Connection.request
        pool: dict[str, Connection] | None = getattr(self._local, "pool", None)
        if pool is None:
            pool = self._local.pool = {}
        address = node.id.text
        try:
            connection = pool.get(address)
            if connection is None:
                connection = pool[address] = self._session.open(address)
                self._connections.append(connection)
            return connection.request(opcode, **fields)
        except (TransportError, ProtocolError) as error:
            raise Stopped(f"failed to read {format_oid(about)} from {address}, {describe(RESULT_EIO)}") from error

    def _say(self, text: str) -> None:
        with self._lock:
            sys.stdout.write(text + "\n")

    def _complain(self, text: str) -> None:
        with self._lock:
            complain(text)


def _scheme(header: InodeHeader) -> RedundancyScheme:
    from sheepdog import plugins

    try:
        for factory in plugins.make_redundancies():
            if factory.accepts(header.copy_policy):
                return factory.scheme(header.copy_policy, header.nr_copies)
    except SheepdogError as error:
        fail(str(error))
    fail("no installed plugin knows this erasure code; try: pip install sheepdog-redundancy-ec")
