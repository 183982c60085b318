"""A cluster under faults keeps what it acknowledged, and its copies equal. Every failure names its seed.

SHEEPDOG_SEEDS chooses the seeds: "7" or "100-200"; SHEEPDOG_RATE the requests per second of each guest's lanes. What
once found a bug stands in regressions.txt beside this file and always runs: lines of "fault seed rate".
"""

import os
from pathlib import Path

import pytest
import trio

from sheepdog.testing.simulation import SimulationFailed, simulate
from sheepdog.testing.simulation_workload import Workload

COPIES = 3
DEFAULT_SEEDS = "1-2"
RATE = float(os.environ.get("SHEEPDOG_RATE", "8"))


def seeds():
    first, _, last = os.environ.get("SHEEPDOG_SEEDS", DEFAULT_SEEDS).partition("-")
    return list(range(int(first), int(last or first) + 1))


def cases():
    """(fault, seed, rate) of every run."""
    chosen = [(faults, seed, RATE) for faults in FAULTS for seed in seeds()]
    for line in Path(__file__).with_name("regressions.txt").read_text().splitlines():
        words = line.partition("#")[0].split()
        if words:
            name, seed, rate = words
            chosen.append((next(faults for faults in FAULTS if faults.__name__ == name), int(seed), float(rate)))
    return chosen


async def under_faults(simulation, faults, *, nodes=4, rounds=3, rate=RATE):
    """Guests work while ``faults`` strikes ``rounds`` times; afterwards everything is whole."""
    await simulation.start(nodes)
    await simulation.format(copies=COPIES, shift=20)
    workload = Workload(simulation, rate=rate)
    await workload.prepare(COPIES)
    rng = simulation.fork_random()
    async with trio.open_nursery() as nursery:
        await workload.run(nursery)
        for _ in range(rounds):
            await trio.sleep(rng.uniform(0.2, 3))
            await faults(simulation, rng)
        await trio.sleep(1)
        workload.finish()
    await judge(simulation, workload)
    return workload


async def judge(simulation, workload):
    """Everything is whole, and nothing is left over."""
    await simulation.settled()
    workload.check_disks()
    await workload.check_reads()
    await simulation.idle()


async def calm(simulation, rng):
    """Nothing happens."""


async def broken_connections(simulation, rng):
    """Connections between sheep and to guests break, now and then all of one node."""
    node = rng.choice(simulation.nodes)
    other = rng.choice([*simulation.nodes, None])
    simulation.trace(f"break {node.number} {other and other.number}")
    simulation.network.break_connections(node.host, other and other.host)


async def killed(simulation, rng):
    """One sheep is killed and comes back, soon or after the others have recovered."""
    node = rng.choice(simulation.nodes)
    await node.kill()
    if rng.random() < 0.5:
        await simulation.settled()
    else:
        await trio.sleep(rng.uniform(0, 2))
    await simulation.restart(node.number)
    await simulation.settled()


async def isolated(simulation, rng):
    """One sheep is cut off from everybody, for a moment or until it was reported dead."""
    node = rng.choice(simulation.nodes)
    simulation.isolate(node.number)
    await trio.sleep(rng.choice((0.1, 1.0, 5.0)))
    simulation.heal()
    await simulation.settled()


async def parted(simulation, rng):
    """Two sheep do not reach each other for a while, though both are members."""
    one, other = rng.sample(simulation.nodes, 2)
    simulation.trace(f"part {one.number} {other.number}")
    simulation.network.cut(one.host, other.host)
    await trio.sleep(rng.choice((0.1, 1.0, 6.0)))
    simulation.heal()


async def mixed(simulation, rng):
    """Any of them."""
    await rng.choice((broken_connections, killed, isolated, parted))(simulation, rng)


FAULTS = (calm, broken_connections, killed, isolated, parted, mixed)


@pytest.mark.parametrize(
    ("faults", "seed", "rate"),
    [pytest.param(*case, id=f"{case[0].__name__}-{case[1]}-{case[2]:g}") for case in cases()],
)
def test_acknowledged_writes_survive(faults, seed, rate):
    """Reads return what was acknowledged, and the copies are equal when the cluster has recovered."""
    workload = simulate(seed, lambda simulation: under_faults(simulation, faults, rate=rate))

    assert workload.requests > 20


@pytest.mark.parametrize("seed", seeds()[:2])
def test_power_failure_of_all(seed):
    """With durable writes, what was acknowledged survives a power failure of every node at once."""

    async def scenario(simulation):
        await simulation.start(3)
        await simulation.format(copies=COPIES, shift=20)
        workload = Workload(simulation)
        await workload.prepare(COPIES)
        async with trio.open_nursery() as nursery:
            await workload.run(nursery)
            await trio.sleep(3)
            for node in simulation.nodes:
                await node.kill(power=True)
            await trio.sleep(1)
            for node in simulation.nodes:
                await simulation.restart(node.number)
            await trio.sleep(5)
            workload.finish()
        await judge(simulation, workload)

    simulate(seed, scenario, nosync=False)


def test_one_seed_one_history():
    """The same seed gives the same history, to the last microsecond; another seed gives another."""

    def history(seed):
        async def scenario(simulation):
            workload = await under_faults(simulation, mixed, rounds=2)
            return simulation.history, workload.requests, trio.current_time()

        return simulate(seed, scenario)

    assert history(11) == history(11)
    assert history(11) != history(12)


def test_the_judge_notices():
    """A copy that rots is found by the comparison of the disks, and the failure names the seed."""

    async def scenario(simulation):
        from sheepdog.contracts.store import REPLICA, ShardKey
        from sheepdog.model.ids import data_oid

        workload = await under_faults(simulation, calm, rounds=1)
        index = min(workload.owners)
        oid = data_oid(workload.owners[index], index)
        holder = next(iter(simulation.copies_of(oid, COPIES)))
        simulation.nodes[holder].medium.rot(ShardKey(oid, REPLICA), 5)
        workload.check_disks()

    with pytest.raises(SimulationFailed, match=r"seed 9.*differs"):
        simulate(9, scenario)
