"""Writes to a copy that is still being brought here: they wait for it, and are applied to it in the order they came.

A new holder of an object lacks it until recovery comes to it, and a change is complete only when every holder has it.
So the first write to the object has it fetched at once. What is fetched was read piece by piece while the other holders
went on applying changes: of each change it may have all, a part or nothing. That does no harm, because every change
that the other holders may have applied since the reading began waits here, and is applied to the whole afterwards: each
byte ends as the last change left it, and bytes that no change touched are the same in all pieces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from sheepdog.contracts.store import ShardKey
from sheepdog.daemon.shards import Shards
from sheepdog.daemon.state import SheepState
from sheepdog.wire.header import Request
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.recovery import Recovery
    from sheepdog.daemon.server import ClientConnection

Answer: TypeAlias = Callable[[int, Any], None]
_Held: TypeAlias = "tuple[ClientConnection, Request, Answer]"


class HeldWrites:
    """Of one sheep as a holder."""

    def __init__(self, state: SheepState, shards: Shards, recovery: Recovery) -> None:
        self._state = state
        self._shards = shards
        self._recovery = recovery
        self._held: dict[ShardKey, list[_Held]] = {}

    @property
    def nothing(self) -> bool:
        """No write waits for any copy."""
        return not self._held

    def write(self, key: ShardKey, connection: ClientConnection, request: Request, answer: Answer) -> None:
        """Bytes of a whole copy are replaced, now or as soon as the copy is here."""
        if key in self._held:
            # Also when the copy is here already, and what came earlier is not in it yet.
            self._held[key].append((connection, request, answer))
            return

        def written(result: int, data: Any) -> None:  # Any: changes carry no data
            if result:
                self.failed(key, connection, request, answer, result)
            else:
                answer(0, data)

        self._shards.write(key, request.offset, request.body, written)

    def failed(
        self, key: ShardKey, connection: ClientConnection, request: Request, answer: Answer, result: int
    ) -> None:
        """A write was tried and could not be made; if that is for want of the copy, it waits for it."""
        if result == Result.NO_OBJ:
            self._missed(key, connection, request, answer)
        else:
            answer(result, None)

    def _missed(self, key: ShardKey, connection: ClientConnection, request: Request, answer: Answer) -> None:
        held = self._held.get(key)
        if held is not None:
            held.append((connection, request, answer))
        elif self._recovery.has_no_room(key):
            answer(Result.NO_SPACE, None)  # the client is told, instead of waiting for a copy that cannot be made
        elif self._recovery.may_find(key.oid):
            self._held[key] = [(connection, request, answer)]
            self._recovery.fetch(key.oid, key.index, lambda result: self._fetched(key, result))
        else:
            answer(Result.NO_OBJ, None)

    def _fetched(self, key: ShardKey, result: int) -> None:
        for connection, request, answer in self._held.pop(key):
            if not connection.open:
                # Whoever sent it knows that it may be lost, and may have sent newer ones over another connection.
                answer(Result.NETWORK_ERROR, None)
            elif request.epoch != self._state.epoch:
                answer(Result.OLD_NODE_VER, None)
            elif result:
                # Without it the primary settles the object, which brings the copy.
                answer(Result.NO_SPACE if result == Result.NO_SPACE else Result.NO_OBJ, None)
            else:
                self._shards.write(key, request.offset, request.body, answer)
