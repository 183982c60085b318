"""Sheep with a second network for their own traffic."""

import logging

import trio

from sheepdog.daemon.peers import ANSWER_S, CONNECT_S
from sheepdog.testing.simulation import simulate
from sheepdog.testing.simulation_workload import Workload

COPIES = 3


def test_a_dead_second_network_is_done_without(caplog):
    """REC-20: when one node's I/O interface loses every packet in the middle of writes, these go on over the main
    addresses, the log says so, nobody leaves, and all copies are equal."""
    caplog.set_level(logging.WARNING, "sheepdog.daemon.peers")

    async def scenario(simulation):
        await simulation.start(4)
        await simulation.format(copies=COPIES, shift=20)
        epoch = simulation.nodes[0].sheep.state.epoch
        workload = Workload(simulation, rate=20, snapshots=0, discards=0)
        await workload.prepare(COPIES)
        async with trio.open_nursery() as nursery:
            await workload.run(nursery)
            await trio.sleep(1)
            used = [node for node in simulation.nodes if over_second_network(simulation, node)]
            lost = simulation.nodes[1]
            simulation.network.isolate(lost.io_host, [node.io_host for node in simulation.nodes])
            await trio.sleep(1)
            before = workload.requests
            await trio.sleep(ANSWER_S + CONNECT_S + 5)
            assert workload.requests > before + 100
            workload.finish()
        assert used == simulation.nodes
        assert f"fallback to main address of node={lost.address}" in caplog.text
        assert {node.sheep.state.epoch for node in simulation.nodes} == {epoch}
        await simulation.settled()
        workload.check_disks()
        await workload.check_reads()
        await simulation.idle()

    simulate(1, scenario, second_network=True)


def over_second_network(simulation, node):
    return any(channel.host == node.io_host for channel in simulation.network.channels)
