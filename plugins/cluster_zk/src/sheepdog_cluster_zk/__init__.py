"""Cluster driver on Apache ZooKeeper: ``sheep -c zookeeper:HOST:PORT[,HOST:PORT...][/CLUSTERID][,timeout=MS]``."""

from __future__ import annotations

from sheepdog.api import ClusterDriver, hookimpl
from sheepdog_cluster_zk.options import ZookeeperOptions

__all__ = ["SHEEPDOG_API", "ZookeeperOptions", "sheepdog_cluster_driver"]

SHEEPDOG_API = (1, 0)


@hookimpl
def sheepdog_cluster_driver(options: str) -> ClusterDriver:
    """A driver for the cluster that ``options`` (the text after ``zookeeper:``) names. Nothing is opened yet.

    :raises ConfigError: the options cannot be understood.
    """
    # here, because kazoo takes 150 ms to import and the options may be wrong
    parsed = ZookeeperOptions.parse(options)
    from sheepdog_cluster_zk.driver import ZookeeperDriver

    return ZookeeperDriver(parsed)
