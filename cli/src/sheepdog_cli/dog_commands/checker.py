"""Compares all copies of objects and repairs them; several objects at a time, each thread with its own connections.

What is seen from outside may be a write on its way, so it is only a reason to look again. Whether a copy is replaced or
a strip made anew is decided by the object's primary, alone in the object's lane. Sheep of the original know nothing of
that for strips; there dog writes the strip itself, as the original does.
"""

from __future__ import annotations

import sys
import threading
import time
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
from sheepdog.wire.extensions import COMPARE, REPAIR_NEEDLESS, SETTLE
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
RESULT_INVALID_PARMS = 0x05
RESULT_OLD_NODE_VER = 0x81
RESULT_NEW_NODE_VER = 0x82

THREADS = 8
LOOKS = 3  # a difference that is still there after so many is no write on its way
PAUSE_S = 0.2
BLOCK_BYTES = 4096  # of a strip; a multiple of every stripe's share in it

_FORW = Struct("<Q16sH6x")


class Stopped(Exception):
    """The check cannot go on; the message says why."""


class _Corrupt(Exception):
    """The holder of a strip knows that it is not what was stored."""


class Checker:
    """Checks the objects of one vdi. ``wrong``: how many objects were found that are not as they should be."""

    def __init__(
        self, session: Session, header: InodeHeader, progress: Progress | None = None, *, dry_run: bool = False
    ) -> None:
        """:param dry_run: say what is wrong and change nothing.

        :raises Quit: too few zones for the erasure code, or nothing installed that knows it; said on stderr.
        """
        self.wrong = 0
        self._dry_run = dry_run
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
            self._end_bar()
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

    def _digests(self, oid: int, holders: tuple[Node, ...]) -> tuple[dict[int, bytes], set[int]]:
        """Of the copies, by holder, and who says that the checksums of its own do not fit."""
        digests: dict[int, bytes] = {}
        corrupt: set[int] = set()
        for at, node in enumerate(holders):
            response = self._call(node, oid, OP_GET_HASH, oid=oid, tgt_epoch=self._session.epoch)
            if response.result == RESULT_SUCCESS:
                digests[at] = response.header[24:44]
            elif response.result == RESULT_EIO:
                corrupt.add(at)
            elif response.result != RESULT_NO_OBJ:
                raise Stopped(f"failed to read {format_oid(oid)} from {node.id.text}, {describe(response.result)}")
        return digests, corrupt

    def _check_copies(self, oid: int, holders: tuple[Node, ...]) -> None:
        digests, corrupt = self._digests(oid, holders)
        for _ in range(LOOKS - 1):
            # Only where nothing is repaired: a repair is looked into by the primary.
            if len(set(digests.values())) < 2 or not (self._dry_run or _no_majority(digests)):
                break
            time.sleep(PAUSE_S)
            digests, corrupt = self._digests(oid, holders)
        if not digests:
            self._wrong(f"no good copy of {format_oid(oid)}" if corrupt else f"no node has {format_oid(oid)}")
            return
        if _no_majority(digests):
            self._wrong(f"no majority of {format_oid(oid)}")
            return
        digest, _ = Counter(digests.values()).most_common(1)[0]
        if self._dry_run:
            found = [
                f"{'corrupt' if at in corrupt else 'differing' if at in digests else 'missing'} {format_oid(oid)}"
                f" on {node.id.text}"
                for at, node in enumerate(holders)
                if digests.get(at) != digest
            ]
            self._say(*found)
            return
        source = next(holders[at] for at in digests if digests[at] == digest)
        for at, node in enumerate(holders):
            if digests.get(at) == digest:
                continue
            variant = _FORW.pack(oid, source.id.address, source.id.port)
            response = self._call(node, oid, OP_REPAIR_REPLICA, variant=variant)
            if response.result == RESULT_SUCCESS:
                if response.variant[0] == REPAIR_NEEDLESS and at not in corrupt:
                    continue  # a write was on its way when we compared
                known = at in digests or at in corrupt
                self._say(f"fixed {'replica' if known else 'missing'} {format_oid(oid)}")
            else:
                self._wrong(f"failed to repair object {format_oid(oid)} from {source.id.text} to {node.id.text}")

    # --- strips ---

    def _strip(self, oid: int, node: Node, at: int, length: int) -> bytearray | None:
        """``None`` if there is none there.

        :raises _Corrupt: there is one, of which its holder knows that it is wrong.
        """
        epoch = self._session.epoch
        response = self._call(
            node, oid, OP_READ_PEER, epoch=epoch, tgt_epoch=epoch, oid=oid, ec_index=at, data_length=length
        )
        if response.result == RESULT_SUCCESS:
            return response.body
        if response.result == RESULT_NO_OBJ:
            return None
        if response.result == RESULT_EIO:
            raise _Corrupt
        raise Stopped(f"failed to read {format_oid(oid)} from {node.id.text}, {describe(response.result)}")

    def _strips(self, oid: int, holders: tuple[Node, ...], length: int) -> tuple[dict[int, bytearray], set[int]]:
        """The strips that are there and may be right, by index, and the indexes of those that are corrupt."""
        strips: dict[int, bytearray] = {}
        corrupt: set[int] = set()
        for at, node in enumerate(holders):
            try:
                strip = self._strip(oid, node, at, length)
            except _Corrupt:
                corrupt.add(at)
                continue
            if strip is not None:
                strips[at] = strip
        return strips, corrupt

    def _check_strips(self, oid: int, holders: tuple[Node, ...], scheme: RedundancyScheme) -> None:
        length = scheme.shard_bytes(object_bytes(oid, self._header.block_size_shift))
        strips, corrupt = self._strips(oid, holders, length)
        steady: dict[int, bytearray] = strips
        for _ in range(LOOKS - 1):
            if len(strips) < len(holders) or _fit(scheme, steady):
                break
            time.sleep(PAUSE_S)
            before = strips
            strips, corrupt = self._strips(oid, holders, length)
            steady = _unchanged(before, strips)
        missing = [at for at in range(len(holders)) if at not in strips]
        if not missing:
            if not _fit(scheme, steady):
                self._wrong(f"object {format_oid(oid)} is inconsistent")
            return
        spare = scheme.shards - scheme.shards_to_read
        if len(missing) > spare:
            self._wrong(
                f"failed to rebuild object {format_oid(oid)}. {len(missing)} copies get lost, more than {spare}"
            )
        elif self._dry_run:
            self._say(
                *(f"{_word(at, corrupt)} {format_oid(oid)}, copy index {at} on {holders[at].id.text}" for at in missing)
            )
        else:
            enough = dict(list(strips.items())[: scheme.shards_to_read])
            self._mend_strips(oid, holders, {at: bytes(scheme.rebuild(at, enough)) for at in missing}, corrupt)

    def _mend_strips(self, oid: int, holders: tuple[Node, ...], wanted: dict[int, bytes], corrupt: set[int]) -> None:
        asked = self._call(holders[0], oid, COMPARE if corrupt else SETTLE, epoch=self._session.epoch, oid=oid)
        if asked.result in (RESULT_OLD_NODE_VER, RESULT_NEW_NODE_VER):
            raise Stopped(f"failed to read {format_oid(oid)} from {holders[0].id.text}, {describe(asked.result)}")
        for at, strip in wanted.items():
            node = holders[at]
            if asked.result == RESULT_INVALID_PARMS:
                mended = self._write_strip(oid, node, at, strip)
            else:
                mended = self._is_there(oid, node, at, len(strip))
            if mended:
                self._say(f"fixed {_word(at, corrupt)} {format_oid(oid)}, copy index {at}")
            else:
                self._wrong(f"failed to repair object {format_oid(oid)} from {holders[0].id.text} to {node.id.text}")

    def _is_there(self, oid: int, node: Node, at: int, length: int) -> bool:
        try:
            return self._strip(oid, node, at, length) is not None
        except _Corrupt:
            return False

    def _write_strip(self, oid: int, node: Node, at: int, strip: bytes) -> bool:
        response = self._call(
            node, oid, OP_CREATE_AND_WRITE_PEER, epoch=self._session.epoch, oid=oid, ec_index=at,
            copies=self._header.nr_copies, copy_policy=self._header.copy_policy, body=strip,
        )  # fmt: skip
        return bool(response.result == RESULT_SUCCESS)

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

    def _say(self, *lines: str) -> None:
        with self._lock:
            self._end_bar()
            self.wrong += bool(lines)
            sys.stdout.write("".join(line + "\n" for line in lines))

    def _wrong(self, text: str) -> None:
        with self._lock:
            self._end_bar()
            self.wrong += 1
            complain(text)

    def _end_bar(self) -> None:
        if self._progress is not None:
            self._progress.end()


def _word(at: int, corrupt: set[int]) -> str:
    return "corrupt" if at in corrupt else "missing"


def _no_majority(digests: dict[int, bytes]) -> bool:
    return bool(digests) and Counter(digests.values()).most_common(1)[0][1] * 2 <= len(digests)


def _fit(scheme: RedundancyScheme, strips: dict[int, bytearray]) -> bool:
    return not any(strips.values()) or scheme.verify(strips)


def _unchanged(before: dict[int, bytearray], now: dict[int, bytearray]) -> dict[int, bytearray]:
    """Of all strips the blocks that no strip has changed in between: what does not fit together there is no write."""
    if before.keys() != now.keys():
        return now
    length = len(next(iter(now.values()), b""))
    every = [slice(start, start + BLOCK_BYTES) for start in range(0, length, BLOCK_BYTES)]
    blocks = [block for block in every if all(before[at][block] == strip[block] for at, strip in now.items())]
    return {at: bytearray().join(strip[block] for block in blocks) for at, strip in now.items()}


def _scheme(header: InodeHeader) -> RedundancyScheme:
    from sheepdog import plugins

    try:
        for factory in plugins.make_redundancies():
            if factory.accepts(header.copy_policy):
                return factory.scheme(header.copy_policy, header.nr_copies)
    except SheepdogError as error:
        fail(str(error))
    fail("no installed plugin knows this erasure code; try: pip install sheepdog-redundancy-ec")
