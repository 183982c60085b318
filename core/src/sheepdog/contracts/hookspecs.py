"""Hook specifications: what a plugin may say to core, and what core announces to observers.

A plugin is a module. It states ``SHEEPDOG_API = (major, minor)`` and marks its functions with ``hookimpl``; the names
and arguments of those functions are the ones below. An implementation may leave out arguments that it does not need,
so a specification can gain an argument without breaking anybody.

``sheepdog_<noun>`` makes something and is called on exactly one plugin, the chosen one. ``sheepdog_<past tense>``
announces something to every observer (entry point group ``sheepdog.observer``). Announcements are made on the event
loop: an observer returns quickly, and what it raises is logged and forgotten.

The two markers leave the same attributes on a function as pluggy's own; writing them here keeps the 35 ms import of
pluggy out of ``sheepdog.api``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from sheepdog.contracts.cluster import ClusterDriver
    from sheepdog.contracts.frontend import FrontEnd
    from sheepdog.contracts.redundancy import RedundancyFactory
    from sheepdog.contracts.store import ObjectStore, StoreOptions
    from sheepdog.contracts.transport import Transport
    from sheepdog.model.node import Node

PROJECT = "sheepdog"

F = TypeVar("F", bound=Callable[..., Any])  # Any: hooks differ in their signatures; each specification states its own


def hookimpl(function: F) -> F:
    """``function`` implements the hook that has its name."""
    options = {
        "wrapper": False,
        "hookwrapper": False,
        "optionalhook": False,
        "tryfirst": False,
        "trylast": False,
        "specname": None,
    }
    setattr(function, f"{PROJECT}_impl", options)
    return function


def _hookspec(function: F) -> F:
    options = {"firstresult": False, "historic": False, "warn_on_impl": None, "warn_on_impl_args": None}
    setattr(function, f"{PROJECT}_spec", options)
    return function


# ---- makers: called on the chosen plugin alone


@_hookspec
def sheepdog_cluster_driver(options: str, directory: str) -> ClusterDriver:  # type: ignore[empty-body]  # a specification
    """A cluster driver that has not opened anything yet.

    :param options: the text after ``name:`` of ``sheep -c``, unchanged; empty when there is none.
    :param directory: the base directory of the sheep, absolute. A driver that must remember something keeps it in a
        subdirectory that has the driver's name.
    :raises ConfigError: the options make no sense; the message says what to write instead.
    """


@_hookspec
def sheepdog_object_store(options: StoreOptions) -> ObjectStore:  # type: ignore[empty-body]  # a specification
    """An open store over the given disks.

    :raises StoreError: no disk is usable.
    """


@_hookspec
def sheepdog_redundancy() -> RedundancyFactory:  # type: ignore[empty-body]  # a specification has no body
    """A maker of redundancy schemes; it needs nothing and opens nothing."""


@_hookspec
def sheepdog_transport() -> Transport:  # type: ignore[empty-body]  # a specification has no body
    """A transport, made inside the event loop that will use it."""


@_hookspec
def sheepdog_frontend(options: str) -> FrontEnd:  # type: ignore[empty-body]  # a specification has no body
    """A front end that does not listen yet.

    :param options: what the operator wrote for it, for example the argument of ``sheep --nbd``.
    :raises ConfigError: the options make no sense.
    """


# ---- announcements: called on every observer


@_hookspec
def sheepdog_started(node: Node, epoch: int) -> None:
    """This sheep is a member of the cluster and serves requests. ``epoch`` is 0 while the cluster is not formatted."""


@_hookspec
def sheepdog_stopped(node: Node) -> None:
    """This sheep serves no requests any more."""


@_hookspec
def sheepdog_epoch_changed(epoch: int, nodes: tuple[Node, ...]) -> None:
    """The cluster's membership is ``nodes`` from ``epoch`` on; requests of older epochs are refused."""


@_hookspec
def sheepdog_recovery_progressed(epoch: int, done: int, total: int) -> None:
    """``done`` of ``total`` objects are where ``epoch`` wants them on this sheep. Both equal: recovery is over."""


@_hookspec
def sheepdog_object_corrupt(oid: int, index: int, reason: str) -> None:
    """A stored shard is not what it should be. ``index`` is -1 for a whole copy."""


MAKERS = (
    "sheepdog_cluster_driver",
    "sheepdog_object_store",
    "sheepdog_redundancy",
    "sheepdog_transport",
    "sheepdog_frontend",
)
ANNOUNCEMENTS = (
    "sheepdog_started",
    "sheepdog_stopped",
    "sheepdog_epoch_changed",
    "sheepdog_recovery_progressed",
    "sheepdog_object_corrupt",
)
