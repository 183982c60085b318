"""The front end contract (async): serves volumes by another protocol inside a sheep.

A front end gets the in-process volume API, never the wire. It listens through the transport that it is handed, so its
data path can be callbacks as core's own is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sheepdog.contracts.services import Services, Volumes

if TYPE_CHECKING:  # anyio takes 50 ms to import, and most that import this module do not run a loop
    from anyio.abc import TaskStatus


@dataclass(frozen=True, slots=True)
class FrontEndContext:
    """What a front end may use."""

    services: Services
    volumes: Volumes


class FrontEnd(ABC):
    """Made from the text that the operator gave for it, for example the argument of ``sheep --nbd``."""

    @abstractmethod
    async def serve(self, context: FrontEndContext, *, task_status: TaskStatus[tuple[str, ...]]) -> None:
        """Serves until cancelled, then closes everything it opened.

        ``task_status.started(addresses)`` is called once it listens.

        :raises TransportError: the address cannot be bound.
        :raises ConfigError: the options make no sense (also from the constructor).
        """
