"""A single sheep: from the first start through format to volumes and the end."""

import pytest

from sheepdog.errors import StoreDeviceError
from sheepdog.model.clusterinfo import CLUSTER_INFO_BYTES, ClusterInfo, ClusterStatus
from sheepdog.model.epochs import unpack_epoch_log
from sheepdog.model.node import unpack_nodes
from sheepdog.model.vid_bitmap import VidBitmap
from sheepdog.wire.opcodes import Op
from sheepdog.wire.payloads import ClusterRequest
from sheepdog.wire.results import Result

from .world import machines

pytestmark = pytest.mark.anyio


async def test_unformatted():
    """A sheep without a config gathers members, and says that it waits for format."""
    async with machines() as world:
        (sheep,) = await world.start_all(0)
        stat = await sheep.ask(Op.STAT_CLUSTER, ClusterRequest(nodes_nr=1), data_length=4096)
        nodes = await sheep.ask(Op.GET_NODE_LIST, data_length=4096)

        assert stat.result == Result.WAIT_FOR_FORMAT
        assert not stat.body
        assert [node.id for node in unpack_nodes(nodes.body)] == [sheep.node.id]
        assert (await sheep.new_vdi(b"test"))[0] == Result.WAIT_FOR_FORMAT


async def test_format():
    """After format the cluster runs in epoch 1, and its config and epoch file are stored."""
    async with machines() as world:
        (sheep,) = await world.start_all(0)
        assert (await sheep.format(copies=2, ctime=77)).result == Result.SUCCESS
        stat = await sheep.ask(Op.STAT_CLUSTER, ClusterRequest(nodes_nr=2), data_length=4096)
        (entry,) = unpack_epoch_log(stat.body, 2)

        assert (stat.result, entry.epoch, entry.ctime, entry.copies, entry.store) == (0, 1, 77, 2, "plain")
        assert [node.id for node in entry.nodes] == [sheep.node.id]
        assert sheep.disks.config.ctime == 77
        assert list(sheep.disks.records) == [1]
        info = await sheep.ask(Op.CLUSTER_INFO, data_length=CLUSTER_INFO_BYTES)
        assert ClusterInfo.unpack(info.body).status == ClusterStatus.OK


async def test_unknown_store():
    """A store that nobody installed is refused, and nothing changes."""
    async with machines() as world:
        (sheep,) = await world.start_all(0)
        assert (await sheep.format(store="farm")).result == Result.NO_STORE
        assert sheep.state.status is ClusterStatus.WAIT
        assert not sheep.disks.wiped


async def test_create_and_list():
    """A created volume is found by name and has its bit; a second one of the name is refused."""
    async with machines() as world:
        (sheep,) = await world.start_all(0)
        await sheep.format()

        assert await sheep.new_vdi(b"test") == (0, 0x7C2B25)
        assert await sheep.new_vdi(b"test") == (Result.VDI_EXIST, 0)
        assert await sheep.find(b"test") == (0, 0x7C2B25)
        assert (await sheep.find(b"other"))[0] == Result.NO_VDI
        bitmap = await sheep.ask(Op.READ_VDIS, data_length=2097152)
        assert list(VidBitmap.unpack(bitmap.body)) == [0x7C2B25]


async def test_delete():
    """A deleted volume's inode stays without a name and size, and its number is not used again."""
    async with machines() as world:
        (sheep,) = await world.start_all(0)
        await sheep.format()
        await sheep.new_vdi(b"test")

        assert await sheep.delete(b"test") == 0
        header = world.space.header(0x7C2B25)
        assert (header.name, header.vdi_size, header.vdi_id) == (b"", 0, 0x7C2B25)
        assert await sheep.delete(b"test") == Result.NO_VDI
        assert await sheep.new_vdi(b"test") == (0, 0x7C2B26)


async def test_restart():
    """Everything is there again after a restart, including which numbers belong to deleted volumes."""
    async with machines() as world:
        (sheep,) = await world.start_all(0)
        await sheep.format()
        await sheep.new_vdi(b"a")
        await sheep.new_vdi(b"b")
        await sheep.delete(b"b")
        await world.stop(sheep)
        (again,) = await world.start_all(0)

        assert again.state.status is ClusterStatus.OK
        assert again.state.epoch == 1
        assert (await again.find(b"a"))[0] == 0
        assert (await again.find(b"b"))[0] == Result.NO_VDI
        assert len(again.state.vdis.deleted) == 1
        assert again.backend.recovery.changes == [(False, 1)]  # the stop was not clean
        assert not again.disks.wiped - sheep.disks.wiped


async def test_clean_restart():
    """After an orderly shutdown nothing is recovered; the mark counts once."""
    async with machines() as world:
        (sheep,) = await world.start_all(0)
        await sheep.format()
        assert (await sheep.ask(Op.SHUTDOWN)).result in (0, Result.SHUTDOWN)
        await sheep.ended.wait()
        assert sheep.stopped == (0, "shutdown")
        assert sheep.disks.config.shutdown
        (again,) = await world.start_all(0)

        assert again.backend.recovery.changes == []
        assert not again.disks.config.shutdown


async def test_format_again():
    """A second format makes a new cluster: epoch 1 again, no volumes."""
    async with machines() as world:
        (sheep,) = await world.start_all(0)
        await sheep.format(ctime=1)
        await sheep.new_vdi(b"test")
        assert (await sheep.format(ctime=2)).result == 0

        assert (await sheep.find(b"test"))[0] == Result.NO_VDI
        assert (sheep.state.epoch, sheep.state.ctime) == (1, 2)


async def test_format_fails_on_a_sheep():
    """A sheep whose disks cannot be formatted leaves with an error; the others are formatted."""
    async with machines() as world:
        one, two = await world.start_all(0, 1)

        async def broken(name):
            raise StoreDeviceError("no such disk")

        two.backend.switch = broken
        assert (await one.format()).result == Result.SUCCESS
        await two.ended.wait()

        assert two.stopped[0] == 1
        await world.agreed(one)
