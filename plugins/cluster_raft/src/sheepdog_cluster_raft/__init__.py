"""Cluster driver with embedded Raft: ``sheep -c raft:VOTER[,VOTER...],password-file=PATH[,KEY=VALUE...]``.

Some of the sheep (three or five) are voters and hold the order; the others follow them. No other service is needed.
"""

from __future__ import annotations

import os

from sheepdog.api import ClusterDriver, hookimpl
from sheepdog_cluster_raft.options import RaftOptions

__all__ = ["SHEEPDOG_API", "RaftOptions", "sheepdog_cluster_driver"]

SHEEPDOG_API = (1, 0)


@hookimpl
def sheepdog_cluster_driver(options: str, directory: str | None) -> ClusterDriver:
    """A driver for the cluster that ``options`` (the text after ``raft:``) names. Nothing is opened yet.

    :param directory: the base directory of the sheep; vote and log are kept in ``raft`` below it.
    :raises ConfigError: the options cannot be understood.
    """
    parsed = RaftOptions.parse(options, os.path.join(directory, "raft") if directory else None)
    from sheepdog_cluster_raft.driver import RaftDriver  # imports the library, which a wrong option need not

    return RaftDriver(parsed)
