"""Cluster driver with embedded Raft: ``sheep -c raft:VOTER[,VOTER...][,self=VOTER,dir=PATH][,KEY=VALUE...]``.

Some of the sheep (three or five) are voters and hold the order; the others follow them. No other service is needed.
"""

from __future__ import annotations

from sheepdog.api import ClusterDriver, hookimpl
from sheepdog_cluster_raft.options import RaftOptions

__all__ = ["SHEEPDOG_API", "RaftOptions", "sheepdog_cluster_driver"]

SHEEPDOG_API = (1, 0)


@hookimpl
def sheepdog_cluster_driver(options: str) -> ClusterDriver:
    """A driver for the cluster that ``options`` (the text after ``raft:``) names. Nothing is opened yet.

    :raises ConfigError: the options cannot be understood.
    """
    parsed = RaftOptions.parse(options)
    from sheepdog_cluster_raft.driver import RaftDriver  # imports the library, which a wrong option need not

    return RaftDriver(parsed)
