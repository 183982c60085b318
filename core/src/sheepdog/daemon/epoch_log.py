"""This sheep's own record of the cluster: the config file and the log of epochs.

Epochs that began while this sheep was not there are asked from other members. The times of epochs are made equal on all
members (``stamp``), so that every sheep tells the same history.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

from sheepdog.daemon.interfaces import Backend, PeerCaller
from sheepdog.daemon.state import SheepState
from sheepdog.errors import ProtocolError, TransportError
from sheepdog.model.clusterinfo import DiskConfig
from sheepdog.model.epochs import EpochRecord
from sheepdog.model.node import Node, NodeId, VnodeMode
from sheepdog.model.ring import Ring
from sheepdog.wire.header import Request
from sheepdog.wire.opcodes import SHEEP_PROTO_VER, Op
from sheepdog.wire.results import Result

logger = logging.getLogger(__name__)

RECORD_BYTES_MAX = max(mode.nodes_max * mode.record_bytes for mode in VnodeMode) + 8
STAMPED_EPOCHS = 4  # how many of the newest epochs the oldest member states the time of


class EpochLog:
    """Config and epochs of one sheep. Everything is on disk when a method returns."""

    def __init__(self, state: SheepState, backend: Backend, peers: PeerCaller) -> None:
        self.own_ctime = 0  # of the cluster that this sheep's disks belong to, 0 for none
        self.own_epoch = 0  # the newest epoch that this sheep took part in
        self.clean = False  # the last run ended in an orderly shutdown
        self._doubtful = 0  # logged epochs up to this one may be of a history that a forced recovery cut off
        self._times: dict[int, int] = {}
        self._state = state
        self._backend = backend
        self._peers = peers

    async def load_config(self) -> DiskConfig | None:
        """The config of the cluster that the disks belong to, ``None`` for none."""
        config = await self._backend.executor.run(self._backend.storedir.read_config)
        if config is None or not config.ctime:
            return None
        self.own_ctime, self.clean = config.ctime, config.shutdown
        return config

    async def load_newest(self) -> tuple[int, tuple[Node, ...]]:
        """The newest epoch of this sheep and its members; 0 without any."""
        storedir = self._backend.storedir

        def read() -> tuple[int, EpochRecord | None]:
            for epoch in reversed(storedir.epochs()):
                record = storedir.read_epoch(epoch)
                if record is not None:
                    return epoch, record
            return 0, None

        epoch, record = await self._backend.executor.run(read)
        self.own_epoch = epoch
        if record is None:
            return 0, ()
        self._times[epoch] = record.time
        return epoch, record.nodes

    async def write_config(self, *, clean: bool = False) -> None:
        """The config file says what the state says.

        :param clean: this is a clean shutdown.
        """
        state, storedir = self._state, self._backend.storedir
        space = state.me.space

        def write() -> None:
            old = storedir.read_config()
            storedir.write_config(
                DiskConfig(
                    ctime=state.ctime,
                    flags=state.flags,
                    copies=state.copies,
                    default_store=state.store_name,
                    shutdown=clean,
                    copy_policy=state.copy_policy,
                    block_size_shift=state.block_size_shift,
                    space=space or (old.space if old is not None else 0),
                )
            )

        await self._backend.executor.run(write)
        self.own_ctime = state.ctime

    async def write(self, epoch: int, nodes: tuple[Node, ...], time: int) -> None:
        """``epoch`` is logged; this sheep takes part in it."""
        storedir = self._backend.storedir
        await self._backend.executor.run(partial(storedir.write_epoch, epoch, EpochRecord(nodes, time)))
        self._times[epoch] = time
        self.own_epoch = epoch

    async def forget(self, after: int) -> None:
        """No epoch above ``after`` is logged."""
        storedir = self._backend.storedir
        await self._backend.executor.run(partial(storedir.remove_epochs, after))
        self._doubtful = min(self.own_epoch, after)
        self._times = {epoch: time for epoch, time in self._times.items() if epoch <= after}

    # ---- times

    def time(self, epoch: int) -> int:
        """When ``epoch`` began, 0 when this sheep was not there."""
        return self._times.get(epoch, 0)

    def learn_time(self, epoch: int, time: int) -> None:
        """``epoch`` began at ``time``, says a member of it."""
        if time:
            self._times[epoch] = time

    def stamp(self) -> list[list[int]]:
        """The times of the newest epochs, for the other members."""
        return [[number, self._times[number]] for number in sorted(self._times)[-STAMPED_EPOCHS:]]

    async def stamped(self, entries: Any) -> None:
        """The times that another member states become ours.

        :raises ProtocolError: they are malformed.
        """
        storedir = self._backend.storedir
        for entry in entries if isinstance(entries, list) else ():
            if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(number, int) for number in entry)):
                raise ProtocolError("an epoch time is malformed")
            epoch, time = entry
            if self._times.get(epoch, time) == time or epoch > self._state.epoch:
                continue
            record = await self._backend.executor.run(partial(storedir.read_epoch, epoch))
            if record is not None:
                await self._backend.executor.run(partial(storedir.write_epoch, epoch, EpochRecord(record.nodes, time)))
                self._times[epoch] = time

    # ---- history

    async def complete(self, members: Sequence[NodeId]) -> None:
        """Every epoch up to the current one that some member can tell of is logged here.

        :param members: whom to ask, the likeliest to know first.
        """
        state, storedir = self._state, self._backend.storedir
        ctime = state.ctime
        await self._compare(members)
        known = set(await self._backend.executor.run(storedir.epochs))
        for epoch in range(state.epoch, 0, -1):
            if epoch in known:
                continue
            record = await self._fetch(members, epoch)
            if state.ctime != ctime:
                return  # formatted meanwhile: these epochs are history of another cluster
            if record is not None:
                await self._backend.executor.run(partial(storedir.write_epoch, epoch, record))

    async def _compare(self, members: Sequence[NodeId]) -> None:
        """Logged epochs that other members tell differently are replaced, down to the first that is the same."""
        storedir = self._backend.storedir
        while self._doubtful and members:
            epoch = self._doubtful
            ours = await self._backend.executor.run(partial(storedir.read_epoch, epoch))
            theirs = await self._fetch(members, epoch)
            if ours is None or theirs is None or ours.nodes == theirs.nodes:
                self._doubtful = 0
                return
            logger.warning("epoch=%d was logged in a history that the cluster does not share, replacing it", epoch)
            await self._backend.executor.run(partial(storedir.write_epoch, epoch, theirs))
            self._doubtful = epoch - 1

    async def ring(self, epoch: int, members: Sequence[NodeId]) -> Ring | None:
        """The ring of an epoch as it was logged here or at a member; ``None`` when nobody knows it."""
        record = await self._backend.executor.run(partial(self._backend.storedir.read_epoch, epoch))
        if record is None:
            record = await self._fetch(members, epoch)
        return None if record is None else Ring(record.nodes)

    async def _fetch(self, members: Sequence[NodeId], epoch: int) -> EpochRecord | None:
        for node in members:
            request = Request(Op.GET_EPOCH, proto=SHEEP_PROTO_VER, tgt_epoch=epoch, data_length=RECORD_BYTES_MAX)
            try:
                response = await self._peers.call(node, request)
                if response.result == Result.SUCCESS:
                    return EpochRecord.unpack(bytes(response.body), self._state.mode)
            except (TransportError, ProtocolError):
                continue  # another member may know
        return None
