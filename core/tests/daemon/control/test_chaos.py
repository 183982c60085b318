"""Random faults from a seed: in the end everybody agrees, and what was acknowledged is there."""

import random

import anyio
import pytest

from sheepdog.model.clusterinfo import ClusterStatus
from sheepdog.model.ids import inode_oid, is_inode, vid_of

from .world import machines

pytestmark = pytest.mark.anyio
SHEEP = 5
STEPS = 25


@pytest.fixture
def anyio_backend():
    """Only where time is virtual: half a minute of faults takes a moment."""
    import trio.testing

    return ("trio", {"clock": trio.testing.MockClock(autojump_threshold=0)})


class Client:
    """Creates, snapshots and deletes volumes through any sheep, and keeps in mind what was acknowledged."""

    def __init__(self, world, chaos):
        self._world = world
        self._chaos = chaos
        self.known = {}  # name -> must exist (True), must not (False), or an operation failed half-way (None)

    async def run(self):
        number = 0
        while True:
            await anyio.sleep(self._chaos.uniform(0, 0.2))
            live = [self._world.live[node] for node in sorted(self._world.live)]
            if not live:
                continue
            sheep = self._chaos.choice(live)
            number += 1
            name = b"v%d" % number
            if self.known and self._chaos.random() < 0.6:
                name = self._chaos.choice(sorted(self.known))
            wanted = self._chaos.choice(["create", "create", "snapshot", "delete"])
            try:
                with anyio.fail_after(15):
                    await getattr(self, "_" + wanted)(sheep, name)
            except TimeoutError:
                pass  # the sheep died under the operation

    async def _create(self, sheep, name):
        before = self.known.get(name, False)
        if before is False:
            self.known[name] = None  # until the answer is there
        result, _ = await sheep.new_vdi(name, size=8 << 20)
        if result == 0:
            assert before is not True, f"{name} was created twice"
            self.known[name] = True
        elif result == 0x04:
            assert before is not False, f"{name} exists without having been created"

    async def _snapshot(self, sheep, name):
        result, vid = await sheep.find(name)
        if result == 0:
            await sheep.new_vdi(name, base=vid, snapid=1)

    async def _delete(self, sheep, name):
        before = self.known.get(name, False)
        self.known[name] = None
        result = await sheep.delete(name)
        if result == 0:
            self.known[name] = False
        elif result == 0x08:
            assert before is not True, f"{name} vanished"
            self.known[name] = False if before is False else None


async def storm(world, chaos):
    """Kills, stops, expired sessions, cut-off sheep, restarts."""
    for _ in range(STEPS):
        await anyio.sleep(chaos.uniform(0, 1.5))
        live = [world.live[node] for node in sorted(world.live)]
        members = {node.id for node in world.hub.view}
        action = chaos.choice(["kill", "stop", "expire", "partition", "start", "start", "heal", "unreachable"])
        victim = chaos.choice(live) if live else None
        if action == "start" or victim is None:
            down = [number for number in range(SHEEP) if all(one.node.id.port != 7000 + number for one in live)]
            if down:
                world.start(chaos.choice(down))
        elif action == "kill" and len(live) > 1:
            await world.kill(victim)
        elif action == "stop" and len(live) > 1:
            await world.stop(victim)
        elif action == "expire" and victim.node.id in members:
            world.hub.expire(victim.node.id)
        elif action == "partition":
            world.hub.partition(victim.node.id)
        elif action == "unreachable":
            world.cut.add(victim.node.id)
        elif action == "heal":
            world.hub.heal()
            world.cut.clear()


async def check(seed):
    chaos = random.Random(seed)
    async with machines(seed=seed, delay_s_max=0.05) as world:
        sheep = await world.start_all(*range(SHEEP))
        await sheep[0].format()
        client = Client(world, chaos)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.run)
            await storm(world, chaos)
            world.hub.heal()
            world.cut.clear()
            tasks.cancel_scope.cancel()
        for number in range(SHEEP):
            if all(node.port != 7000 + number for node in world.live):
                world.start(number)
        everybody = [world.live[node] for node in sorted(world.live)]
        assert len(everybody) == SHEEP
        await world.agreed(*everybody)

        def replicated(one):
            return one.state.vdis.states(), one.control.sections.claims, one.control.vdis.half_done

        await world.until(lambda: all(replicated(one) == replicated(everybody[0]) for one in everybody), "equal states")
        assert {one.state.status for one in everybody} == {ClusterStatus.OK}
        for name, exists in sorted(client.known.items()):
            for one in (everybody[0], everybody[-1]):
                with anyio.fail_after(20):
                    result, vid = await one.find(name)
                if exists is not None:
                    assert result == (0 if exists else 0x08), f"{name}: {result}"
                if result == 0:
                    assert not world.space.header(vid).is_snapshot
                    assert not one.state.vdis.readonly(vid)
        heads = {}
        for oid in sorted(world.space.pages):
            if is_inode(oid) and vid_of(oid) in everybody[0].state.vdis.in_use:
                header = world.space.header(vid_of(oid))
                if header.name and not header.is_snapshot:
                    assert header.name not in heads, "two working volumes of one name"
                    heads[header.name] = inode_oid(header.vdi_id)
        with anyio.fail_after(20):
            assert (await everybody[1].new_vdi(b"afterwards"))[0] == 0


@pytest.mark.parametrize("seed", [0, 1, 7, 37, 45, 51])  # from 7 on: seeds that found something
async def test_faults_from_a_seed(seed):
    """Whatever happens to sheep and sessions: afterwards all agree and keep every acknowledged volume."""
    await check(seed)
