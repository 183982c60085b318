"""Cluster driver on etcd: ``sheep -c etcd:HOST:PORT[,HOST:PORT...][/PREFIX][,ttl=SECONDS]``."""

from __future__ import annotations

import os

from sheepdog.api import ClusterDriver, hookimpl
from sheepdog_cluster_etcd.options import EtcdOptions

__all__ = ["SHEEPDOG_API", "EtcdOptions", "sheepdog_cluster_driver"]

SHEEPDOG_API = (1, 0)


@hookimpl
def sheepdog_cluster_driver(options: str) -> ClusterDriver:
    """A driver for the cluster that ``options`` (the text after ``etcd:``) names. Nothing is opened yet.

    :raises ConfigError: the options cannot be understood.
    """
    # here, because gRPC takes long to import and the options may be wrong
    parsed = EtcdOptions.parse(options)
    # Its handlers around fork() wait for gRPC's threads while they hold the interpreter's lock. We only ever fork to
    # start another program, which needs none of that.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    from sheepdog_cluster_etcd.driver import EtcdDriver

    return EtcdDriver(parsed)
