"""Shared locks: keeps the inodes that several gateways' clients hold in memory coherent (data model, section 10).

Only volumes under a shared lock are concerned. A sheep whose clients change the map first invalidates the other
participants; an invalidated participant's clients (those that set the TGT flag) are refused until they have read the
short inode again, which validates it. For everybody else each question here is one test of a number.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from sheepdog.daemon.interfaces import Spawn
from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.state import SheepState
from sheepdog.errors import SheepdogError
from sheepdog.model.ids import is_inode, vid_of
from sheepdog.model.inode import SHORT_INODE_BYTES
from sheepdog.model.vdi_state import LockState, SharedState
from sheepdog.wire.header import Request
from sheepdog.wire.opcodes import Op

logger = logging.getLogger(__name__)


class Announce(Protocol):
    """Tells all participants; ``control.coherence``."""

    def __call__(self, vid: int, *, validate: bool) -> Awaitable[None]: ...


class Coherence:
    """The gateway's side of shared locks."""

    def __init__(self, state: SheepState, announce: Announce, spawn: Spawn, outbox: Outbox) -> None:
        self._state = state
        self._announce = announce
        self._spawn = spawn
        self._outbox = outbox

    def _participation(self, oid: int) -> SharedState | None:
        known = self._state.vdis.get(vid_of(oid))
        if known is None or known.lock_state is not LockState.SHARED:
            return None
        return known.participant(self._state.me.id)

    @staticmethod
    def is_refresh(request: Request) -> bool:
        """The one read that an invalidated client may make: the short inode from its beginning."""
        return (
            request.opcode == Op.READ_OBJ
            and not request.offset
            and request.data_length == SHORT_INODE_BYTES
            and is_inode(request.oid)
        )

    def refuses(self, request: Request) -> bool:
        """A client with the TGT flag must read the inode again before this request."""
        return self._participation(request.oid) is SharedState.INVALIDATED and not self.is_refresh(request)

    def refreshed(self, oid: int, then: Callable[[], None]) -> None:
        """A client has read the short inode: this sheep is valid again, then ``then()``."""
        if self._participation(oid) is SharedState.INVALIDATED:
            self._spawn(self._tell, vid_of(oid), True, then)
        else:
            then()

    def before_map_write(self, oid: int, then: Callable[[], None]) -> None:
        """The other participants are invalidated, unless we are the present modifier; then ``then()``."""
        state = self._participation(oid)
        if state is None or state is SharedState.MODIFIED:
            then()
        else:
            self._spawn(self._tell, vid_of(oid), False, then)

    async def _tell(self, vid: int, validate: bool, then: Callable[[], None]) -> None:
        try:
            await self._announce(vid, validate=validate)
        except SheepdogError as error:
            # The lock went meanwhile: there is nobody left to keep coherent with.
            logger.info("vid=%x is no longer shared by this sheep: %s", vid, error)
        with self._outbox:
            then()
