"""Sheep with a network of their own for the traffic among them (``sheep -i``)."""

from __future__ import annotations

from collections.abc import Callable

import invariants
import pytest
from load import Load

from sheepdog.testing import network
from sheepdog.testing.cluster import SheepCluster
from sheepdog.testing.services import missing_service

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]


def test_a_dead_second_network_is_done_without(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """REC-20: the traffic among sheep takes the second network; when every packet of one sheep's is lost in the middle
    of writes, they go on over the main address, the log says so, nobody leaves, and all copies are equal."""
    if (lacking := network.why_not()) is not None:
        missing_service(lacking)
    with network.Network(3, second=True) as wires:
        cluster = fresh_cluster(3, driver="local", network=wires)
        cluster.format("-z", "20")
        epoch = cluster.epoch(0)
        with Load(cluster, "io", guests=3, seed=20) as load:
            load.progress(20)
            used = [second_network_bytes(wires, index) for index in range(3)]
            wires.cut_second(1)
            load.progress(20)
        load.verify()
        log = cluster.sheep[0].log_tail(1 << 20)
        assert min(used) > 1 << 20, "the content of the volumes went over it"
        assert f"fallback to main address of node={cluster.sheep[1].address}" in log
        assert cluster.epoch(0) == epoch
        invariants.identical(cluster)
        for guest in load.guests:
            checked = cluster.dog("vdi", "check", guest.name)
            assert b"fixed" not in checked.stdout, checked.stdout
        for sheep in cluster.sheep:
            cluster.stop(sheep.index)


def second_network_bytes(wires: network.Network, index: int) -> int:
    """What the second interface of a sheep has received."""
    with wires.beside(index), open("/proc/thread-self/net/dev") as file:
        (line,) = (line for line in file if line.lstrip().startswith("second:"))
    return int(line.split(":")[1].split()[0])
