"""What a guest gave up on one sheep is not done after what it did through another one, however the network holds it."""

import pytest
import trio

from sheepdog.model.ids import data_oid
from sheepdog.testing.simulation import simulate
from sheepdog.wire.header import Request
from sheepdog.wire.opcodes import Op

COPIES = 2
OLD, NEW = b"old" * 512, b"new" * 512


async def cut(simulation, gateway, primary):
    """Nothing passes between the two, but both go on."""
    simulation.network.cut(gateway.host, primary.host)


async def cut_and_broken(simulation, gateway, primary):
    """Besides, the connection breaks, so that what is sent waits for a new one."""
    await cut(simulation, gateway, primary)
    simulation.network.break_connections(gateway.host, primary.host)


async def isolated(simulation, gateway, primary):
    """The gateway reaches nobody, not even the guest."""
    simulation.isolate(gateway.number)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("through_primary", [False, True], ids=["gateway", "primary"])
@pytest.mark.parametrize("lasting_s", [0.3, 4.0])
@pytest.mark.parametrize("fault", [cut, cut_and_broken, isolated])
def test_a_write_that_was_given_up_is_not_made_after_newer_ones(fault, lasting_s, through_primary, seed):
    """A guest whose gateway cannot reach the primary goes on through another sheep, or the primary itself; the write
    that it gave up does not come back when the network is whole again."""

    async def scenario(simulation):
        await simulation.start(4)
        await simulation.format(copies=COPIES, shift=20)
        admin, guest = simulation.client("dog"), simulation.client("guest")
        oid = data_oid(await admin.create_volume("disk", 1 << 20), 0)
        await admin.create(oid)
        holders = list(simulation.copies_of(oid, COPIES))
        primary = simulation.nodes[holders[0]]
        gateway, other = (node for node in simulation.nodes if node.number not in holders)
        guest.gateway = gateway.number
        await guest.write(oid, 0, b"first")
        await fault(simulation, gateway, primary)
        request = Request(Op.WRITE_OBJ, oid=oid, offset=0, body=OLD)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.attempt, request)
            await trio.sleep(0.2)
            guest.move(abruptly=True)
        guest.gateway = (primary if through_primary else other).number
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(heal_later, simulation, lasting_s)
            await guest.write(oid, 0, OLD)
            await guest.write(oid, 0, NEW)
            took = trio.current_time() - began
        await trio.sleep(3)
        await simulation.settled()

        assert simulation.check_copies(oid, COPIES)[: len(NEW)] == NEW
        for node in simulation.nodes:
            admin.gateway = node.number
            admin.move()
            assert await admin.read(oid, 0, len(NEW)) == NEW
        await simulation.idle()
        return took

    assert simulate(seed, scenario) < 3


async def heal_later(simulation, after_s):
    await trio.sleep(after_s)
    simulation.heal()


def test_a_fence_ends_no_connection_when_all_is_well():
    """New clients come and write while others do: no connection between sheep is given up for it."""

    async def scenario(simulation):
        await simulation.start(4)
        await simulation.format(copies=COPIES, shift=20)
        admin = simulation.client("dog")
        oid = data_oid(await admin.create_volume("disk", 1 << 20), 0)
        await admin.create(oid)

        async def guest(number):
            client = simulation.client(f"vm{number}")
            for count in range(5):
                await client.write(oid, number * 512, bytes([count]) * 512)
                client.move()

        before = connections(simulation)
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(guest, number)
        assert before <= connections(simulation)
        await simulation.idle()

    simulate(1, scenario)


def connections(simulation):
    """The connections between sheep that stand."""
    return {connection for node in simulation.nodes for connection in node.sheep.fences.incoming}
