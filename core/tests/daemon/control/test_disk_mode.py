"""Sheep whose vnodes belong to disks: what they announce, when that makes an epoch, and whom they refuse."""

import pytest

from sheepdog.daemon.admission import Member, Transfer, refusal
from sheepdog.daemon.messages import Greeting
from sheepdog.daemon.state import SheepState
from sheepdog.errors import JoinRefused
from sheepdog.model.clusterinfo import ClusterFlag, ClusterInfo, ClusterStatus
from sheepdog.model.epochs import EpochRecord, unpack_epoch_log
from sheepdog.model.node import Node, NodeId, VnodeMode, unpack_nodes
from sheepdog.model.ring import node_disk
from sheepdog.model.vdi_state import VdiState
from sheepdog.wire.opcodes import SHEEP_PROTO_VER, Op
from sheepdog.wire.payloads import ClusterRequest, NodeResponse, pack_i32
from sheepdog.wire.results import Result

from .world import AUTO, GiB, machines

pytestmark = pytest.mark.anyio

DISK = VnodeMode.DISK
SIZES = ({"/a": 8 * GiB, "/b": 40 * GiB}, {"/a": 12 * GiB, "/b": 20 * GiB}, {"/c": 100 * GiB})
VNODES = [2 + 10, 3 + 5, 25]


async def three(world):
    """Three sheep of a formatted cluster, with two, two and one disks."""
    sheep = [(await world.start_all(number, sizes=dict(sizes)))[0] for number, sizes in enumerate(SIZES)]
    assert (await sheep[0].format(copies=2)).result == 0
    await world.agreed(*sheep, epoch=1)
    return sheep


def vnodes(sheep):
    """As one sheep's ring has them."""
    return [node.vnodes for node in sheep.state.ring.nodes]


async def test_answers():
    """Everything with node records has the longer ones, and the flag of the cluster says so, whatever dog knew."""
    async with machines() as world:
        one, *_ = await three(world)
        nodes = await one.ask(Op.GET_NODE_LIST, data_length=6144 * 80)
        assert NodeResponse.unpack(nodes.variant).nr_nodes == 3
        assert len(nodes.body) == 3 * 592
        listed = unpack_nodes(nodes.body, DISK)
        assert [node.vnodes for node in listed] == VNODES
        assert [node.space for node in listed] == [sum(sizes.values()) for sizes in SIZES]
        assert [node.disks for node in listed] == [tuple(node_disk(*disk) for disk in sizes.items()) for sizes in SIZES]
        info = await one.ask(Op.CLUSTER_INFO, data_length=491408)
        assert len(info.body) == 491408
        assert ClusterInfo.unpack(info.body).nodes == listed
        assert (await one.ask(Op.CLUSTER_INFO, data_length=491407)).result == Result.BUFFER_SMALL
        stat = await one.ask(Op.STAT_CLUSTER, ClusterRequest(nodes_nr=4), data_length=48 + 4 * 592)
        (entry,) = unpack_epoch_log(stat.body, 4, DISK)
        assert (entry.nodes, entry.flags) == (listed, ClusterFlag.AUTO_VNODES | ClusterFlag.DISK_MODE)
        epoch = await one.ask(Op.GET_EPOCH, data_length=3 * 592 + 8, tgt_epoch=1)
        assert EpochRecord.unpack(epoch.body, DISK).nodes == listed
        assert one.disks.config.flags == ClusterFlag.AUTO_VNODES | ClusterFlag.DISK_MODE
        assert (await one.ask(Op.SET_VNODES, body=pack_i32(5))).result == Result.INVALID_VNODES_STRATEGY


async def test_before_format():
    """A sheep that was never formatted tells its kind, too."""
    async with machines() as world:
        (one,) = await world.start_all(0, sizes={"/a": 9 * GiB})
        info = ClusterInfo.unpack((await one.ask(Op.CLUSTER_INFO, data_length=491568)).body)

        assert info.flags == ClusterFlag.AUTO_VNODES | ClusterFlag.DISK_MODE
        assert unpack_nodes((await one.ask(Op.GET_NODE_LIST, data_length=592)).body, DISK)[0].vnodes == 3


@pytest.mark.parametrize("by_disk", [False, True])
async def test_format_flag(by_disk):
    """An original dog of that kind names it when it formats: right for one kind of cluster, refused by the other."""
    async with machines() as world:
        (one,) = await world.start_all(0, **({"sizes": {"/a": GiB}} if by_disk else {}))
        answer = await one.format(flags=AUTO | ClusterFlag.DISK_MODE)

        assert answer.result == (0 if by_disk else Result.INVALID_PARMS)


async def test_disks_change():
    """A disk that comes or goes, or has another size, begins an epoch with its weight in it; one that weighs the same
    in vnodes does not. The sum of the sizes is kept as that of the node."""
    async with machines() as world:
        one, two, three_ = await three(world)
        two.disks.sizes["/new"] = 400 * GiB
        two.control.disk_list.changed()
        await world.agreed(one, two, three_, epoch=2)
        assert vnodes(three_) == [12, 108, 25]
        await world.until(lambda: two.disks.config.space == 432 * GiB, "config")
        del two.disks.sizes["/a"], two.disks.sizes["/b"]
        two.control.disk_list.changed()
        two.control.disk_list.changed()
        await world.agreed(one, two, three_, epoch=3)
        assert vnodes(one) == [12, 100, 25]
        assert one.backend.recovery.changes == [(True, 3), (True, 3)]

        one.disks.sizes["/a"] -= 1
        three_.disks.sizes["/c"] += 1
        await one.ask(Op.REWEIGHT)
        await world.agreed(one, two, three_, epoch=4)
        assert vnodes(two) == [12, 100, 26]
        await one.ask(Op.REWEIGHT)
        await one.ask(Op.ENABLE_RECOVER)  # comes after it in the order
        assert two.state.epoch == 4


async def test_change_without_a_session():
    """A disk that fails while the sheep has no session is announced once it has one again."""
    async with machines() as world:
        sheep = await three(world)
        world.hub.expire(sheep[1].node.id)
        await world.until(lambda: not sheep[1].control.membership.admitted, "loss of the session")
        del sheep[1].disks.sizes["/a"]
        sheep[1].control.disk_list.changed()
        await world.until(lambda: vnodes(sheep[0]) == [12, 5, 25], "the new weight")
        await world.agreed(*sheep)

        assert sheep[1].disks.records[sheep[1].state.epoch].nodes[1].disks == (node_disk("/b", 20 * GiB),)


@pytest.mark.parametrize("lost", [False, True])
async def test_restart(lost):
    """When all are back the cluster goes on in its epoch, or begins one if a sheep came with other disks (placement and
    recovery, section 6)."""
    async with machines() as world:
        await world.kill(*await three(world))
        back = []
        for number, sizes in enumerate(SIZES):
            there = {"/b": sizes["/b"]} if lost and number == 1 else dict(sizes)
            back += await world.start_all(number, sizes=there)
        await world.agreed(*back, epoch=2 if lost else 1)

        assert vnodes(back[0]) == ([12, 5, 25] if lost else VNODES)
        assert [one.backend.recovery.changes for one in back] == [[(lost, 3)]] * 3


@pytest.mark.parametrize("formatted", [False, True])
@pytest.mark.parametrize("by_disk", [False, True])
@pytest.mark.parametrize("gateway", [False, True])
async def test_other_kind(by_disk, gateway, formatted):
    """A sheep or a gateway of the other kind is refused by a word on how to start it, before anything changes."""
    kinds = ({}, {"sizes": {"/a": 9 * GiB}})
    async with machines() as world:
        (member,) = await world.start_all(0, **kinds[by_disk])
        if formatted:
            await member.format()
        refused = world.start(1, gateway=gateway, **kinds[not by_disk])
        await refused.ended.wait()
        (same,) = await world.start_all(2, gateway=True, **kinds[by_disk])

        assert isinstance(refused.error, JoinRefused)
        assert str(refused.error) == (
            f"failed to join for vnode mode unmatch.  cluster:{'disk' if by_disk else 'node'}, "
            f"joined:{'node' if by_disk else 'disk'}; "
            f"every sheep of this cluster is started {'with' if by_disk else 'without'} --disk-vnodes"
        )
        assert [node.id for node in same.state.ring.nodes] == [member.node.id, same.node.id]
        assert member.state.epoch == (2 if formatted else 0)
        assert member.state.status is (ClusterStatus.OK if formatted else ClusterStatus.WAIT)


def test_no_more_members():
    """The 831st member is refused, because no record of the cluster would have room for it."""
    state = SheepState(Node(NodeId.of("10.0.0.1", 1)), DISK)
    greeting = Greeting(SHEEP_PROTO_VER, 1, vnode_mode=DISK)
    members = {number: Member(state.me, greeting, admitted=True) for number in range(829)}
    joiner = Member(Node(NodeId.of("10.0.0.2", 1)), greeting)
    assert refusal(state, members, joiner) is None
    members[829] = Member(state.me, greeting, admitted=True)

    assert refusal(state, members, joiner) == "failed to join, the cluster has 830 members, which is the most"


def test_messages():
    """What joins carry keeps the disks of all members, and takes no room for disks that nobody has."""
    nodes = tuple(
        Node(NodeId.of("10.0.0.1", port), port % 3, 1, 5, tuple(node_disk(f"/{at}", at) for at in range(port)))
        for port in (1, 2, 32)
    )
    greeting = Greeting(SHEEP_PROTO_VER, 7, vnode_mode=DISK, members=nodes, inventory=(VdiState(5, 1),))
    assert Greeting.unpack(greeting.pack()) == greeting
    assert len(greeting.pack()) < 3 * 80 + 35 * 16 + 400
    plain = Greeting(SHEEP_PROTO_VER, 7, members=tuple(Node(node.id) for node in nodes))
    assert Greeting.unpack(plain.pack()) == plain

    state = SheepState(nodes[0], DISK)
    transfer = Transfer(
        position=1, status=ClusterStatus.OK, ctime=1, epoch=2, flags=ClusterFlag.DISK_MODE, copies=1, copy_policy=0,
        block_size_shift=22, store="plain", recovery_disabled=False, epoch_nodes=nodes, epoch_time=3,
        before_nodes=nodes[:1], lifted=True, members=(Member(nodes[2], greeting, admitted=True),), vdis=state.vdis,
        claims=[], extras={},
    )  # fmt: skip
    read = Transfer.unpack(transfer.pack())
    assert (read.epoch_nodes, read.before_nodes, read.members[0].node) == (nodes, nodes[:1], nodes[2])
