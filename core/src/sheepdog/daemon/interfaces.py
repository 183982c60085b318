"""What the control plane needs from the rest of the daemon, and nothing more.

The data path implements these; the tests of the control plane bring their own. So neither imports the other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar

from sheepdog.contracts.services import Executor
from sheepdog.contracts.store import ObjectStore
from sheepdog.model.clusterinfo import DiskConfig
from sheepdog.model.epochs import EpochRecord
from sheepdog.model.node import NodeId
from sheepdog.model.ring import Ring
from sheepdog.wire.header import Request, Response

T = TypeVar("T")
Buffer: TypeAlias = bytes | bytearray | memoryview


class Objects(Protocol):
    """Object I/O through the gateway of this sheep: placed, replicated, retried over epoch changes.

    All raise the error of the result that a client would get: ``ObjectNotFound``, ``StoreFull``, ``Halted``, ...
    """

    async def read(self, oid: int, offset: int, length: int) -> Buffer:
        """``length`` bytes; what lies behind the stored size reads as zeros."""

    async def write(self, oid: int, offset: int, data: Buffer) -> None:
        """Every current holder has the data. Inside an inode's map, references that are replaced are dropped."""

    async def create(
        self, oid: int, offset: int, data: Buffer, cow_oid: int = 0, copies: int = 0, policy: int = 0
    ) -> None:
        """The object exists at full size with ``data`` at ``offset`` and zeros (or ``cow_oid``'s bytes) elsewhere."""

    async def remove(self, oid: int) -> None:
        """No holder has the object."""


class PeerCaller(Protocol):
    """Requests to other sheep."""

    async def call(self, node: NodeId, request: Request) -> Response:
        """The answer, whatever its result.

        :raises TransportError: there was none; the request may have been carried out.
        """


class Gateway(Protocol):
    """The data path of this sheep as far as the control plane must wait for it."""

    async def drain(self, vid: int) -> None:
        """Every write to data objects of ``vid`` that was under way here at the call is complete or refused."""


@dataclass(frozen=True, slots=True)
class RecoveryStatus:
    """What STAT_RECOVERY shows. ``phase``: 0 preparing the list, 1 recovering, 2 notifying.

    ``unfinished``: something is still missing here, even if recovery is switched off or can do no more at present.
    """

    in_recovery: bool = False
    phase: int = 0
    finished: int = 0
    total: int = 0
    unfinished: bool = False


class Recovery(Protocol):
    """Brings data back to full redundancy. None of the synchronous calls waits for anything."""

    def status(self) -> RecoveryStatus:
        """Where the current recovery stands."""

    def membership_changed(self, old_ring: Ring, lifted: bool) -> None:
        """Recovery towards ``state.ring`` starts, or the running one is replaced.

        :param old_ring: where objects were before; the same as the new one when nothing moved (unclean restart).
        :param lifted: a new epoch began, so completion must be announced.
        """

    def copies_changed(self, vid: int, before: int, after: int) -> None:
        """A volume has another number of copies, which recovery brings about."""

    def volume_deleted(self) -> None:
        """A volume is deleted for good: what it may have left behind is to be removed."""

    async def retire_all(self, epoch: int) -> None:
        """Every live shard of this sheep is in the stale area of ``epoch``: it may be outdated."""

    def enabled_changed(self) -> None:
        """``state.recovery_disabled`` has changed."""

    def completed(self, epoch: int, node: NodeId) -> None:
        """``node`` announced that its recovery to ``epoch`` is complete."""

    def reset(self) -> None:
        """The cluster was formatted: nothing is left to recover and no epoch was gathered yet."""

    async def cleanup(self) -> None:
        """The stale area of this sheep is emptied, as far as no other sheep needs what is in it.

        :raises RequestError: NODE_IN_RECOVERY.
        """

    def throttle(self) -> tuple[int, int, bool]:
        """(objects, milliseconds, on)."""

    def set_throttle(self, count: int, interval_ms: int, on: bool) -> None:
        """At most ``count`` objects start per ``interval_ms``; ``on`` False lifts the limit."""


class StoreDirectory(Protocol):
    """Config and epoch files (sync, durable when they return). Called from worker threads."""

    def read_config(self) -> DiskConfig | None:
        """The config file, ``None`` before the first format."""

    def write_config(self, config: DiskConfig) -> None:
        """The config file holds ``config``."""

    def epochs(self) -> Sequence[int]:
        """Numbers of all epoch files, ascending."""

    def read_epoch(self, epoch: int) -> EpochRecord | None:
        """One epoch file, ``None`` when it is missing or damaged."""

    def write_epoch(self, epoch: int, record: EpochRecord) -> None:
        """The epoch file holds ``record``."""

    def remove_epochs(self, after: int = 0) -> None:
        """No epoch file with a number above ``after`` is left."""


class Statistics(Protocol):
    """Counters of STAT."""

    def counters(self) -> Sequence[int]:
        """The 15 numbers of STAT in wire order."""


class Backend(Protocol):
    """The storage of this sheep. A gateway has no store, but it has config and epoch files."""

    @property
    def store(self) -> ObjectStore | None:
        """The store in use; ``None`` on a gateway and before the first format."""

    @property
    def store_name(self) -> str:
        """Its name, empty without one."""

    @property
    def store_names(self) -> Sequence[str]:
        """Names of all stores that this sheep could use, in the order GET_STORE_LIST shows them."""

    @property
    def storedir(self) -> StoreDirectory:
        """Config and epoch files."""

    @property
    def executor(self) -> Executor:
        """For everything of the store that may block."""

    @property
    def recovery(self) -> Recovery:
        """The recovery of this sheep."""

    @property
    def stats(self) -> Statistics:
        """Counters."""

    async def use(self, work: Callable[[ObjectStore], T]) -> T:
        """``work(store)`` on a worker thread; again without the disk that failed in it, as long as one is left.

        What it finds corrupt is reported.

        :raises StoreError: what ``work`` raised. Not to be called on a gateway.
        """

    async def switch(self, store_name: str) -> None:
        """A store of that name is in use and holds nothing. A no-op on gateways.

        :raises RequestError: NO_STORE; nothing changed.
        """

    async def plug(self, path: str) -> None:
        """The directory takes its share of the objects; recovery was told.

        :raises StoreError: nothing changed.
        """

    async def unplug(self, path: str) -> None:
        """The directory is not used any more; recovery was told. The sheep leaves when it was the last.

        :raises StoreError: nothing changed.
        """


class Lifecycle(Protocol):
    """The end of the process, in order."""

    def stop(self, exit_code: int, reason: str) -> None:
        """Listening ends, requests in flight are finished, the cluster is left, then the process exits. Returns at
        once."""


Spawn: TypeAlias = Callable[..., None]
"""``spawn(async_function, *args)``: a task in a group that outlives connections."""

Work: TypeAlias = Callable[[], Awaitable[None]]
