"""Several sheep: who is a member, which epoch it is, who may come in."""

import itertools

import anyio
import pytest

from sheepdog.errors import JoinRefused
from sheepdog.model.clusterinfo import ClusterStatus
from sheepdog.model.epochs import unpack_epoch_log
from sheepdog.model.node import NodeId
from sheepdog.wire.opcodes import Op
from sheepdog.wire.payloads import ClusterRequest, pack_i32
from sheepdog.wire.results import Result

from .world import AUTO, machines

pytestmark = pytest.mark.anyio


async def formatted(world, count, **options):
    """That many sheep of a formatted cluster."""
    sheep = await world.start_all(*range(count), **options)
    assert (await sheep[0].format(copies=2, flags=0 if options.get("auto") is False else AUTO)).result == 0
    await world.agreed(*sheep, epoch=1)
    return sheep


async def epoch_list(sheep):
    """(epoch, node texts) as STAT_CLUSTER tells, newest first."""
    response = await sheep.ask(Op.STAT_CLUSTER, ClusterRequest(nodes_nr=16), data_length=1 << 20)
    return [(entry.epoch, tuple(node.id.text for node in entry.nodes)) for entry in unpack_epoch_log(response.body, 16)]


async def test_gather_and_format():
    """Unformatted sheep gather; a format through one of them reaches all before it is answered."""
    async with machines() as world:
        sheep = await world.start_all(0, 1, 2)
        await sheep[1].format(copies=2)

        assert {one.state.status for one in sheep} == {ClusterStatus.OK}
        assert len({str(one.view) for one in sheep}) == 1


async def test_oldest_dies():
    """MEM-1: the others go on without the sheep that started first, in the next epoch."""
    async with machines() as world:
        first, *others = await formatted(world, 3)
        await world.kill(first)
        await world.agreed(*others, epoch=2)

        for number, one in enumerate(others):
            assert (await one.new_vdi(b"v%d" % number))[0] == 0
        assert others[0].backend.recovery.changes == [(True, 3)]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
async def test_every_order_of_death(order):
    """MEM-2, MEM-3: whoever dies when, the cluster runs again exactly when the last survivor's members are back."""
    async with machines() as world:
        sheep = await formatted(world, 3)
        for step, number in enumerate(order[:-1]):
            await world.kill(sheep[number])
            await world.agreed(*(sheep[other] for other in order[step + 1 :]), epoch=step + 2)
        last = sheep[order[-1]]
        history = await epoch_list(last)
        await world.kill(last)
        back = []
        for number in order[:-1]:
            back.extend(await world.start_all(number))
            assert back[-1].state.status is ClusterStatus.WAIT
            assert (await back[-1].find(b"x"))[0] == Result.WAIT_FOR_JOIN
        back.extend(await world.start_all(order[-1]))
        await world.agreed(*back)

        assert (await epoch_list(back[0]))[-3:] == history
        assert back[0].state.epoch == 4
        # Two of them missed an epoch: what they hold may be outdated.
        assert [one.backend.recovery.retired for one in back] == [[1], [2], []]


async def test_rolling_replacement():
    """MEM-4: history that no starting sheep knows alone is put together from all of them."""
    async with machines() as world:
        sheep = await formatted(world, 2)
        for number in range(2, 5):
            await world.kill(sheep.pop(0))
            await world.agreed(*sheep)
            sheep.extend(await world.start_all(number))
            await world.agreed(*sheep)
        history = await epoch_list(sheep[0])
        assert [epoch for epoch, _ in history] == [7, 6, 5, 4, 3, 2, 1]
        await world.kill(*sheep)
        back = await world.start_all(*range(5))
        await world.agreed(*back)

        assert (await epoch_list(back[0]))[-7:] == history
        for one in back:
            assert await epoch_list(one) == await epoch_list(back[0])


@pytest.mark.parametrize("seed", range(4))
async def test_simultaneous_joins(seed):
    """MEM-6: all get in, all agree, one epoch each at most."""
    async with machines(seed=seed, delay_s_max=0.02) as world:
        (first,) = await formatted(world, 1)
        others = [world.start(number) for number in range(1, 9)]
        await world.agreed(first, *others)

        assert first.state.epoch <= 9
        epochs = [set(nodes) for _, nodes in reversed(await epoch_list(others[-1]))]
        assert all(before < after for before, after in itertools.pairwise(epochs))


async def test_gateways():
    """GW-1..4: gateways are members without vnodes, and end when the last storage sheep is gone."""
    async with machines() as world:
        (store,) = await formatted(world, 1)
        gateways = [world.start(number, gateway=True) for number in (1, 2)]
        await world.agreed(store, *gateways)
        assert [node.vnodes for node in store.state.ring.nodes] == [128, 0, 0]
        epoch = store.state.epoch
        await world.kill(store)
        for gateway in gateways:
            await gateway.ended.wait()

        assert [gateway.stopped for gateway in gateways] == [(0, "only gateway nodes are remaining, exiting")] * 2
        assert max(gateways[0].epochs) == epoch


async def test_foreign_store():
    """MEM-9, MEM-10: a sheep of another cluster is refused before anything changes, whatever its epoch is."""
    async with machines() as world:
        (foreign,) = await world.start_all(5)
        await foreign.format(ctime=500)
        foreign.disks.records[9] = foreign.disks.records[1]
        await world.stop(foreign)
        sheep = await formatted(world, 2)
        refused = world.start(5)
        await refused.ended.wait()
        (fresh,) = await world.start_all(6)

        assert isinstance(refused.error, JoinRefused)
        assert str(refused.error) == f"joining node ctime doesn't match: 500 vs {sheep[0].state.ctime}"
        await world.agreed(*sheep, fresh, epoch=2)
        assert not refused.backend.recovery.retired


async def test_foreign_meets_waiting():
    """MEM-11: a waiting cluster refuses strangers too, and runs when its own are back."""
    async with machines() as world:
        (foreign,) = await world.start_all(5)
        await foreign.format(ctime=500)
        await world.stop(foreign)
        await world.kill(*await formatted(world, 2))
        (one,) = await world.start_all(0)
        refused = world.start(5)
        await refused.ended.wait()
        assert isinstance(refused.error, JoinRefused)
        (two,) = await world.start_all(1)

        await world.agreed(one, two)


async def test_strategies():
    """VN-6: a formatted cluster refuses storage sheep that number vnodes in the other way, and takes any gateway."""
    async with machines() as world:
        sheep = await formatted(world, 1)
        refused = world.start(1, auto=False)
        await refused.ended.wait()
        (gateway,) = await world.start_all(2, gateway=True, auto=False)

        assert str(refused.error) == "failed to join for vnodes strategy unmatch.  cluster:auto, joined:fixed"
        await world.agreed(*sheep, gateway, epoch=2)


async def test_mixed_strategies():
    """VN-5: sheep of both strategies can gather, but no format fits them."""
    async with machines() as world:
        one, _ = await world.start_all(0) + await world.start_all(1, auto=False)

        assert (await one.format()).result == Result.INVALID_VNODES_STRATEGY
        assert (await one.format(flags=0)).result == Result.INVALID_VNODES_STRATEGY
        assert one.state.status is ClusterStatus.WAIT


async def test_clean_nodes_first():
    """MEM-12: the old configuration wins over sheep that were never formatted, whoever starts first."""
    async with machines() as world:
        old = await formatted(world, 3)
        ctime = old[0].state.ctime
        await world.kill(*old)
        new = await world.start_all(3, 4, 5)
        assert new[0].state.status is ClusterStatus.WAIT
        back = await world.start_all(0, 1)
        assert {one.state.status for one in back + new} == {ClusterStatus.WAIT}
        back += await world.start_all(2)
        await world.agreed(*back, *new, epoch=2)

        assert {one.state.ctime for one in new} == {ctime}
        assert {one.disks.config.ctime for one in new} == {ctime}
        assert [len(nodes) for _, nodes in await epoch_list(new[0])] == [6, 3]


async def test_shutdown_and_return():
    """MEM-13: after shutdown the cluster waits for everybody, then goes on in the same epoch without recovery."""
    async with machines() as world:
        sheep = await formatted(world, 4)
        await sheep[2].ask(Op.SHUTDOWN)
        for one in sheep:
            await one.ended.wait()
        back = await world.start_all(3, 2, 1)
        assert {one.state.status for one in back} == {ClusterStatus.WAIT}
        assert [epoch for epoch, _ in await epoch_list(back[0])] == [1]
        back += await world.start_all(0)
        await world.agreed(*back, epoch=1)

        assert [one.backend.recovery.changes for one in back] == [[]] * 4


async def test_force_recover():
    """MEM-14: a waiting cluster can be made to run with whom it has; a running one cannot."""
    async with machines() as world:
        sheep = await formatted(world, 3)
        refused = await sheep[0].ask(Op.FORCE_RECOVER, data_length=4096)
        await world.kill(*sheep)
        back = await world.start_all(0, 1, 7)
        answer = await back[2].ask(Op.FORCE_RECOVER, data_length=4096)
        await world.agreed(*back, epoch=2)
        (lost,) = await world.start_all(2)
        await world.agreed(*back, lost, epoch=3)

        assert refused.result == Result.FORCE_RECOVER
        assert (answer.result, len(answer.body)) == (0, 3 * 80)
        assert lost.backend.recovery.retired == [1]
        assert [one.backend.recovery.changes[0] for one in back] == [(True, 3)] * 3


async def test_crash_together():
    """MEM-15: all die at once, all come back at once, in the same epoch and with every volume."""
    async with machines(seed=3, delay_s_max=0.01) as world:
        sheep = await formatted(world, 5)
        await sheep[1].new_vdi(b"test")
        for _ in range(3):
            await world.kill(*sheep)
            sheep = [world.start(number) for number in range(5)]
            await world.agreed(*sheep, epoch=1)

        for one in sheep:
            assert await one.find(b"test") == (0, 0x7C2B25)


async def test_identity_is_the_address():
    """MEM-18: the same disks under another address are no member of the last epoch."""
    async with machines() as world:
        await world.kill(*await formatted(world, 2))
        for number in range(2):
            world.disks[NodeId.of("127.0.0.2", 7000 + number)] = world.disks[NodeId.of("127.0.0.1", 7000 + number)]
        moved = await world.start_all(0, 1, host="127.0.0.2")
        assert {one.state.status for one in moved} == {ClusterStatus.WAIT}
        await world.kill(*moved)
        back = await world.start_all(0, 1)

        await world.agreed(*back, epoch=1)


@pytest.mark.parametrize("victim", [0, 2])
async def test_session_loss(victim):
    """MEM-20: a sheep whose session expired stops serving at once and comes back as the same process."""
    async with machines() as world:
        sheep = await formatted(world, 3)
        lost = sheep[victim]
        statuses = []
        lost.state.observe(lambda: statuses.append(lost.state.status))
        world.hub.expire(lost.node.id)
        await world.until(lambda: lost.state.status is ClusterStatus.WAIT, "stop of service")
        await world.agreed(*sheep, epoch=3)

        assert statuses[0] is ClusterStatus.WAIT
        assert (await sheep[1].new_vdi(b"test"))[0] == 0
        for one in sheep:
            assert (await one.find(b"test"))[0] == 0


async def test_volumes_that_were_made_before():
    """Who was not a member all the time since a volume was made does not claim to know all that descends from it."""
    async with machines() as world:
        sheep = await formatted(world, 3)
        _, old = await sheep[0].new_vdi(b"old")
        assert [one.state.vdis.born for one in sheep] == [{old}] * 3
        world.hub.expire(sheep[2].node.id)
        await world.until(lambda: sheep[2].state.status is ClusterStatus.WAIT, "stop of service")
        await world.agreed(*sheep, epoch=3)
        _, new = await sheep[1].new_vdi(b"new")

        assert [one.state.vdis.born for one in sheep] == [{old, new}, {old, new}, {new}]


async def test_operation_during_session_loss():
    """MEM-20: what waits for the cluster when the session ends fails instead of hanging."""
    async with machines() as world:
        sheep = await formatted(world, 2)
        world.space.fail = lambda operation, oid: world.hub.expire(sheep[1].node.id) if operation == "create" else None
        with anyio.fail_after(10):
            result, _ = await sheep[1].new_vdi(b"test")
        world.space.fail = None
        await world.agreed(*sheep)

        assert result in (Result.CLUSTER_ERROR, Result.SUCCESS)
        assert (await sheep[0].new_vdi(b"next"))[0] == 0


async def test_welcomer_dies_while_joining():
    """The oldest member dies right after it accepted somebody: another one hands over the state."""
    async with machines() as world:
        sheep = await formatted(world, 3)
        await sheep[0].new_vdi(b"test")
        world.cut.add(sheep[0].node.id)  # it can broadcast, but nobody can fetch from it
        joiner = world.start(3)
        await world.until(lambda: any("7003" in n.id.text for n in sheep[1].state.ring.nodes), "acceptance")
        await world.kill(sheep[0])
        world.cut.clear()
        await world.agreed(*sheep[1:], joiner)

        assert (await joiner.find(b"test"))[0] == 0


async def test_all_old_members_die_while_joining():
    """Nobody is left who knew the state: the joiner goes on with what its own disks say."""
    async with machines() as world:
        (old,) = await formatted(world, 1)
        world.cut.add(old.node.id)
        joiner = world.start(1)
        await world.until(lambda: len(old.state.ring.nodes) == 2, "acceptance")
        await world.kill(old)
        world.cut.clear()
        await world.until(lambda: joiner.control.membership.admitted, "foundation")

        assert joiner.state.status is ClusterStatus.WAIT
        (back,) = await world.start_all(0)
        await world.agreed(joiner, back)


async def test_vnodes():
    """VN-8: fixed numbers can be changed at run time, each time in a new epoch; automatic ones and gateways' cannot."""
    async with machines() as world:
        one, two = await formatted(world, 2, auto=False, vnodes=60)
        assert (await one.ask(Op.SET_VNODES, body=pack_i32(90))).result == 0
        await world.agreed(one, two, epoch=2)
        assert [node.vnodes for node in two.state.ring.nodes] == [90, 60]
        assert (await one.ask(Op.SET_VNODES, body=pack_i32(0))).result == Result.INVALID_PARMS
        assert (await one.ask(Op.SET_VNODES, body=pack_i32(65536))).result == Result.INVALID_PARMS
        (gateway,) = await world.start_all(2, gateway=True, auto=False)
        assert (await gateway.ask(Op.SET_VNODES, body=pack_i32(5))).result == Result.GATEWAY_MODE

    async with machines() as world:
        (auto,) = await formatted(world, 1)
        assert (await auto.ask(Op.SET_VNODES, body=pack_i32(5))).result == Result.INVALID_VNODES_STRATEGY


async def test_reweight():
    """VN-3: a new size is announced in a new epoch and kept; without a change nothing happens."""
    async with machines() as world:
        one, two = await formatted(world, 2)
        one.disks.usage_bytes *= 3
        await two.ask(Op.REWEIGHT)
        await world.agreed(one, two, epoch=2)
        await two.ask(Op.REWEIGHT)
        await two.ask(Op.ENABLE_RECOVER)  # comes after it in the order

        assert [node.vnodes for node in two.state.ring.nodes] == [192, 64]
        assert two.state.epoch == 2
        await world.until(lambda: one.disks.config.space == one.disks.usage_bytes, "config")


async def test_kill_node():
    """MEM-25: a killed sheep leaves in order."""
    async with machines() as world:
        one, two = await formatted(world, 2)
        await one.ask(Op.KILL_NODE)
        await one.ended.wait()
        await world.agreed(two, epoch=2)

        assert one.stopped[0] == 0


async def test_replicated_settings():
    """Defaults and switches reach everybody, and whoever joins later."""
    async with machines() as world:
        sheep = await formatted(world, 2)
        assert (await sheep[0].ask(Op.ALTER_CLUSTER_COPY, ClusterRequest(copies=4))).result == 0
        assert (await sheep[0].ask(Op.ALTER_CLUSTER_COPY, ClusterRequest(copies=4, copy_policy=1))).result == 5
        await sheep[1].ask(Op.DISABLE_RECOVER)
        sheep += await world.start_all(2)

        assert [(one.state.copies, one.state.recovery_disabled) for one in sheep] == [(4, True)] * 3
        assert [one.disks.config.copies for one in sheep] == [4] * 3


async def test_completion_of_recovery():
    """Every member hears who has recovered to which epoch."""
    async with machines() as world:
        one, two = await formatted(world, 2)
        await one.control.announce_recovered(1)
        await world.until(lambda: two.backend.recovery.completions, "completion")

        assert two.backend.recovery.completions == [(1, one.node.id)]


async def test_forked_history():
    """A sheep that logged epochs which a forced recovery cut off takes over the history of the others."""
    async with machines() as world:
        one, two, three = await formatted(world, 3)
        await world.kill(one)
        await world.agreed(two, three, epoch=2)
        await world.kill(two)
        await world.agreed(three, epoch=3)
        await world.kill(three)
        (one,) = await world.start_all(0)
        await one.ask(Op.FORCE_RECOVER, data_length=4096)
        await world.agreed(one, epoch=2)
        (four,) = await world.start_all(3)
        (three,) = await world.start_all(2)
        await world.agreed(one, four, three, epoch=4)

        await world.until(lambda: three.epochs == one.epochs, "common history")
