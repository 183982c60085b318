"""The storage of one sheep: the store in use, its directory, its disks and what happens when one of them fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from sheepdog.contracts.services import Executor
from sheepdog.contracts.store import ObjectStore
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.state import SheepState
from sheepdog.daemon.stats import Stats
from sheepdog.errors import PluginError, RequestError, ShardCorrupt, StoreDeviceError, StoreError
from sheepdog.model.limits import NODE_DISKS_MAX
from sheepdog.model.node import VnodeMode
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.interfaces import Lifecycle, StoreDirectory
    from sheepdog.daemon.recovery import Recovery

logger = logging.getLogger(__name__)

T = TypeVar("T")
MakeStore = Callable[[str], ObjectStore]


class LocalBackend:
    """``interfaces.Backend``. A gateway has one too, without store and shards."""

    recovery: Recovery

    def __init__(
        self,
        state: SheepState,
        storedir: StoreDirectory,
        executor: Executor,
        stats: Stats,
        lifecycle: Lifecycle,
        *,
        make_store: MakeStore,
        store_names: Sequence[str],
        store: ObjectStore | None,
        store_name: str,
        fixed_name: str | None,
    ) -> None:
        """
        :param make_store: opens a store plugin by name on this sheep's disks.
        :param store: already open; ``None`` on a gateway.
        :param fixed_name: the store that this sheep always uses, whatever the cluster is formatted with.
        """
        self.storedir = storedir
        self.executor = executor
        self.stats = stats
        self.store_names = tuple(store_names)
        self.store = store
        self.store_name = store_name
        self._paths: list[str] = [] if store is None else list(store.weights())
        self.shards: Shards | None = None
        self.disks_changed: Callable[[], None] = _nothing
        """Called on the event loop when a disk came or went."""
        self._state = state
        self._lifecycle = lifecycle
        self._make_store = make_store
        self._fixed_name = fixed_name

    async def switch(self, store_name: str) -> None:
        """A store of that name is in use and holds nothing. A no-op on gateways.

        :raises RequestError: NO_STORE; nothing changed.
        """
        if store_name not in self.store_names:
            raise RequestError(f"no store {store_name!r} is installed", result=Result.NO_STORE)
        old = self.store
        if old is None:
            self.store_name = store_name
            return
        name = self._fixed_name or store_name

        def work() -> ObjectStore:
            if name == self.store_name:
                old.wipe()
                return old
            try:
                new = self._make_store(name)
            except PluginError as error:
                raise RequestError(str(error), result=Result.NO_STORE) from error
            old.wipe()
            old.close()
            new.wipe()
            return new

        self.store = await self.executor.run(work)
        self.store_name = name
        self._paths = list(self.store.weights())
        if self.shards is not None:
            self.shards.replace(self.store)
        self.disks_changed()  # another store knows nothing of disks that came or went since the start

    async def use(self, work: Callable[[ObjectStore], T]) -> T:
        """``work(store)`` on a worker thread; again without the disk that failed in it, as long as one is left.

        What it finds corrupt is reported.

        :raises StoreError: what ``work`` raised.
        """
        while True:
            store = self._own_store()
            try:
                return await self.executor.run(partial(work, store))
            except StoreDeviceError as error:
                if not self.device_failed(error):
                    raise
            except ShardCorrupt as error:
                assert self.shards is not None, "whoever has a store has shards"
                self.shards.corrupt(error)
                raise

    def device_failed(self, error: StoreDeviceError) -> bool:
        """A disk gave an error: it is taken out; says whether another one is left.

        With the last disk the sheep leaves the cluster. Called on the event loop.
        """
        store = self.store
        assert store is not None, "a gateway has no disks"
        path = error.path
        if path is not None and path not in self._paths:
            return bool(self._paths)  # taken out by an earlier error
        logger.error("disk %s failed: %s", path or "(unknown)", error)
        if path is not None and len(self._paths) > 1:
            try:
                store.remove_disk(path)
            except StoreError as failure:
                logger.error("disk %s cannot be taken out: %s", path, failure)
            else:
                self._paths.remove(path)
                self.recovery.lost_disk()
                self.disks_changed()
                return True
        self._lifecycle.stop(0, "no disks available, going down")
        return False

    async def plug(self, path: str) -> None:
        """The directory takes its share of the objects.

        :raises StoreError: nothing changed.
        """
        store = self._own_store()
        if self._state.mode is VnodeMode.DISK and len(self._paths) >= NODE_DISKS_MAX:
            raise StoreError(f"a sheep announces at most {NODE_DISKS_MAX} disks, and has that many")
        await self.executor.run(lambda: store.add_disk(path))
        self._paths.append(_without_slashes(path))
        self.recovery.disks_changed()
        self.disks_changed()

    async def unplug(self, path: str) -> None:
        """The directory is not used any more. With the last one the sheep leaves.

        :raises StoreError: nothing changed.
        """
        store = self._own_store()
        path = _without_slashes(path)
        if self._paths == [path]:
            self._lifecycle.stop(0, "no disks available, going down")
            return
        await self.executor.run(lambda: store.remove_disk(path))
        if path in self._paths:
            self._paths.remove(path)
        self.recovery.lost_disk()
        self.disks_changed()

    def _own_store(self) -> ObjectStore:
        if self.store is None:
            raise StoreError("a gateway has no disks")
        return self.store


def _nothing() -> None:
    """Nobody wants to know."""


def _without_slashes(path: str) -> str:
    """The path as a store names it."""
    return path.rstrip("/") or "/"
