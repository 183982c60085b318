"""What the in-process volumes need from the rest of the daemon, and nothing more.

The gateway has the methods of ``ObjectIO``; the control plane brings ``VdiControl``. Tests bring their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from sheepdog.contracts.services import Buffer, completed
from sheepdog.daemon.fencing import Client
from sheepdog.errors import SheepdogError
from sheepdog.model.inode import InodeHeader
from sheepdog.wire.results import Result, error_for

ResultDone: TypeAlias = Callable[[int, Any], None]  # wire result code (0 is success); the bytes of a read
ChangeDone: TypeAlias = Callable[[int], None]


class ObjectIO(Protocol):
    """Object requests in callback form. ``done`` is called once, on the loop, perhaps before the method returns.

    Data is lent until ``done`` was called. Results that a retry can mend are retried below, as long as ``client`` is
    there, if one is given; what arrives here is final.
    """

    def submit_read(self, oid: int, offset: int, length: int, done: ResultDone) -> None:
        """``done(0, buffer)`` with exactly ``length`` bytes."""

    def submit_write(
        self,
        oid: int,
        offset: int,
        data: Buffer,
        done: ResultDone,
        *,
        copies: int = 0,
        policy: int = 0,
        client: Client | None = None,
    ) -> None:
        """Bytes of an existing object are replaced at every holder."""

    def submit_create(
        self,
        oid: int,
        offset: int,
        data: Buffer,
        done: ResultDone,
        *,
        cow_oid: int = 0,
        copies: int = 0,
        policy: int = 0,
        client: Client | None = None,
    ) -> None:
        """The object exists: ``data``, and around it the bytes of ``cow_oid`` or zeros."""

    def submit_remove(self, oid: int, done: ChangeDone, *, client: Client | None = None) -> None:
        """The object is gone everywhere; NO_OBJ if nobody had it."""

    def submit_sync(self, done: ResultDone) -> None:
        """Everything acknowledged is on stable storage at all holders."""


class VdiControl(Protocol):
    """Names, numbers and locks of VDIs."""

    async def lookup(self, name: bytes, tag: bytes, snapid: int) -> tuple[int, int, int]:
        """(vid, copies, block size shift). Never falls between the two halves of a snapshot.

        :raises VdiNotFound: no such name.
        :raises TagNotFound: no such snapshot of the name.
        """

    async def lock(self, name: bytes) -> tuple[int, int, int]:
        """As ``lookup`` of the working VDI, which is locked for this sheep now (in clusters formatted with locks).

        The lock follows the working VDI when a snapshot gives it a new number; ``release`` of either number ends it.

        :raises VdiLocked: it is locked already.
        """

    async def release(self, vid: int) -> None:
        """The lock that ``lock`` took is given back; harmless when there is none."""

    async def list_vdis(self) -> Sequence[tuple[int, InodeHeader]]:
        """Every VDI and snapshot that is not deleted."""

    def readonly(self, vid: int) -> bool:
        """Whether this sheep knows by now that the VDI is a snapshot."""


async def read_object(io: ObjectIO, oid: int, offset: int, length: int) -> bytes | bytearray | memoryview:
    """``length`` bytes of an object.

    :raises SheepdogError: the error that the result stands for.
    """

    def start(done: Callable[[Exception | None, Any], None]) -> None:
        io.submit_read(oid, offset, length, lambda result, data: done(error_of(result), data))

    data: Buffer = await completed(start)
    return data


def error_of(result: int) -> SheepdogError | None:
    """The error that a result code stands for, ``None`` for success."""
    return error_for(result) if result != Result.SUCCESS else None
