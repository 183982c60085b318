"""The cluster driver contract (async).

A driver gives membership and one totally ordered broadcast, nothing more; core derives admission, epochs, exclusive
sections and locks from them.

Ordering, the same for all members: everybody sees the same ``Joined``, ``Left``, ``Delivered`` and ``Updated`` in the
same order. A member's first event is its own ``Joined``. A sender receives its own broadcasts. Nothing from a node
follows its ``Left``. A dead member's ``Left`` appears within ``ClusterDriver.detection_s``. There is exactly one
``Left`` per death, and a node that comes back under the same identity is seen to leave before it is seen to join again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, TypeAlias

from sheepdog.model.node import Node, NodeId

PAYLOAD_BYTES_MAX = 128 * 1024  # of a broadcast or a greeting


@dataclass(frozen=True, slots=True)
class Joined:
    """``node`` is a member now. ``view`` lists all members, oldest first, ``node`` last."""

    node: Node
    greeting: bytes
    view: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Left:
    """``node`` is no member any more, by its own will or because it died."""

    node: Node
    view: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Delivered:
    """``sender`` broadcast ``payload``."""

    sender: NodeId
    payload: bytes


@dataclass(frozen=True, slots=True)
class Updated:
    """A member announced a new record (space, vnodes) for itself; its identity is unchanged."""

    node: Node
    view: tuple[Node, ...]


Event: TypeAlias = Joined | Left | Delivered | Updated


class ClusterSession(ABC):
    """Membership of one sheep, from its ``Joined`` to its ``Left``."""

    @abstractmethod
    def events(self) -> AsyncIterator[Event]:
        """All events from our own ``Joined`` on. Called once.

        :raises SessionLost: instead of the next event; nothing more will come.
        """

    @abstractmethod
    async def broadcast(self, payload: bytes) -> None:
        """The payload has its place in the order. Its ``Delivered`` may be seen before or after this returns.

        Cancelled, the payload is delivered to everybody or to nobody.

        :param payload: at most ``PAYLOAD_BYTES_MAX`` bytes.
        :raises PayloadTooLarge: nothing was sent.
        :raises SessionLost: the payload may or may not have been delivered to the others.
        :raises ClusterUnavailable: nothing was sent; trying again can help.
        """

    @abstractmethod
    async def update(self, node: Node) -> None:
        """Everybody sees ``Updated`` with this record of ours. Errors as ``broadcast``."""

    def alive(self) -> bool:
        """Whether this session certainly still stands at this moment. Cheap enough for every receive pass.

        Must be False, without waiting for anything, once the process was paused or cut off for so long that the others
        may have seen our ``Left``.
        """
        return True

    async def status(self) -> dict[str, Any]:  # Any: each driver reports fields of its own
        """What an operator wants to know: leader or ensemble, session state. Keys are lower-case words."""
        return {}


class ClusterDriver(ABC):
    """Made from the text after ``name:`` of ``sheep -c``. Nothing is opened before ``join``."""

    name: str = ""
    """What ``sheep -c`` calls it; for operators."""

    detection_s: float = 1.0
    """Upper bound, in seconds, between a death and the ``Left`` that the others see."""

    default_host: str | None = None
    """The address that a sheep announces without ``-y``; ``None`` means the first address that is not loopback."""

    @abstractmethod
    def join(self, me: Node, greeting: bytes) -> AbstractAsyncContextManager[ClusterSession]:
        """A session, left in order when the context ends.

        :param greeting: at most ``PAYLOAD_BYTES_MAX`` bytes, handed to everybody with our ``Joined``.
        :raises ConfigError: the options make no sense, or another live process uses our identity.
        :raises ClusterUnavailable: the service does not answer within a bounded time.
        """
