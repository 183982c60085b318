"""Cluster driver for several sheep on one host: ``sheep -c local[:FILE][,timeout=MS]``.

All sheep that name the same FILE form one cluster. There is no coordinator process: FILE is an append-only log, and the
kernel supplies the total order (``O_APPEND``), the liveness (file locks, process descriptors) and the common clock.
"""

from __future__ import annotations

from sheepdog.api import ClusterDriver, hookimpl
from sheepdog_cluster_local.driver import LocalDriver
from sheepdog_cluster_local.options import LocalOptions

__all__ = ["SHEEPDOG_API", "LocalDriver", "LocalOptions", "sheepdog_cluster_driver"]

SHEEPDOG_API = (1, 0)


@hookimpl
def sheepdog_cluster_driver(options: str) -> ClusterDriver:
    """A driver for the cluster that ``options`` (the text after ``local:``) names. Nothing is opened yet.

    :raises ConfigError: the options cannot be understood.
    """
    return LocalDriver(LocalOptions.parse(options))
