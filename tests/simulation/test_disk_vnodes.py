"""Vnodes that belong to disks: guests work while disks and nodes come and go. Every failure names its seed."""

import pytest
import trio

from sheepdog.model.node import VnodeMode
from sheepdog.testing.simulation import simulate
from sheepdog.testing.simulation_workload import Workload

GiB = 1 << 30


def vnodes(simulation):
    """By number of the node, as each running sheep has them; all the same."""
    seen = {tuple(node.vnodes for node in one.sheep.state.ring.nodes) for one in simulation.running()}
    assert len(seen) == 1, seen
    return seen.pop()


async def scenario(simulation):
    """A disk fails under the guests, one is plugged, a node is killed while another loses a disk, all restart."""
    await simulation.start(4)
    await simulation.format(copies=3, shift=20)
    workload = Workload(simulation, rate=8)
    await workload.prepare(3)
    assert vnodes(simulation) == (512, 512, 512, 512)
    async with trio.open_nursery() as nursery:
        await workload.run(nursery)
        await trio.sleep(1)
        simulation.nodes[0].medium.break_disk("/a")
        simulation.nodes[0].paths.remove("/a")
        await simulation.until(lambda: vnodes_of(simulation, 0) == 256, "the failed disk to be announced")
        await simulation.nodes[1].plug("/more", 300 * GiB + 1)
        await simulation.until(lambda: vnodes_of(simulation, 1) == 512 + 76, "the plugged disk to be announced")
        await simulation.kill(2)
        await simulation.nodes[3].unplug("/b")
        await trio.sleep(2)
        await simulation.restart(2)
        await trio.sleep(1)
        workload.finish()
    await simulation.settled()
    assert vnodes(simulation) == (256, 588, 512, 256)
    workload.check_disks()
    await workload.check_reads()
    await simulation.idle()
    epoch = simulation.nodes[0].sheep.state.epoch

    for node in simulation.running():
        await node.kill()
    for node in simulation.nodes:
        node.storedir.remove_epochs(after=epoch)  # as if all had died at once
    for number in range(4):
        await simulation.restart(number)
    await simulation.settled()
    assert simulation.nodes[0].sheep.state.epoch == epoch
    workload.check_disks()


def vnodes_of(simulation, number):
    """Of one node, as the first sheep has them."""
    return simulation.nodes[0].sheep.state.ring.nodes[number].vnodes


@pytest.mark.parametrize("seed", [1, 2])
def test_disks_under_load(seed):
    """Weights follow the disks by themselves, no acknowledged write is lost, and all copies are where the ring of disks
    wants them, also after a restart in the same epoch."""
    simulate(seed, scenario, disks=("/a", "/b"), mode=VnodeMode.DISK)
