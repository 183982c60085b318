"""What a sheep tells: recorded answers of the original, and bounds."""

import logging

import pytest

from sheepdog.daemon.config import LOGGING_LEVELS
from sheepdog.model.clusterinfo import CLUSTER_INFO_BYTES, ClusterInfo
from sheepdog.model.epochs import EpochRecord, unpack_epoch_log
from sheepdog.model.ids import data_oid, inode_oid
from sheepdog.testing.vectors import exchanges
from sheepdog.wire.header import unpack_request
from sheepdog.wire.opcodes import Op
from sheepdog.wire.payloads import (
    MD_INFO_BYTES,
    ClusterRequest,
    ForwRequest,
    HashResponse,
    NodeResponse,
    Throttle,
    pack_i32,
    pack_oids,
    unpack_i32,
    unpack_oids,
    unpack_store_list,
)
from sheepdog.wire.results import Result

from .world import GiB, machines

pytestmark = pytest.mark.anyio
TEST = 0x7C2B25


async def replay(sheep, session, *opcodes):
    """Sends the recorded requests with these opcodes; gives (request, our response, recorded response frame)."""
    answers = []
    for asked, told in exchanges(session):
        request = unpack_request(asked.header)
        if opcodes and request.opcode not in opcodes:
            continue
        request.body = asked.data or b""
        answers.append((request, await sheep.dispatch.call(request), told))
    return answers


def same_answer(request, ours, told, *, variant=True):
    assert ours.result == told.result, Op(request.opcode).name
    assert len(ours.body) == told.data_bytes, Op(request.opcode).name
    if variant and not told.result:
        assert ours.variant.ljust(28, b"\0") == told.header[20:], Op(request.opcode).name


@pytest.mark.parametrize(
    ("session", "opcodes", "bodies"),
    [
        ("dog-vdi-create-unformatted-1n.jsonl", (), False),
        ("dog-cluster-info-unformatted-1n.jsonl", (), False),
        ("dog-cluster-format-1n.jsonl", (), False),
    ],
)
async def test_recorded_before_format(session, opcodes, bodies):
    """An unformatted sheep answers dog as the original did: same results, same lengths."""
    async with machines() as world:
        (sheep,) = await world.start_all(0)
        for request, ours, told in await replay(sheep, session, *opcodes):
            same_answer(request, ours, told)


@pytest.mark.parametrize(
    "session",
    [
        "dog-vdi-create-thin-1n.jsonl",
        "dog-cluster-recover-force-refused-1n.jsonl",
        "dog-cluster-recover-disable-1n.jsonl",
        "dog-node-stat-1n.jsonl",
        "dog-node-recovery-1n.jsonl",
        "dog-node-md-info-1n.jsonl",
        "dog-node-log-level-get-1n.jsonl",
        "dog-cluster-info-1n.jsonl",
        "dog-vdi-open-missing-1n.jsonl",
    ],
)
async def test_recorded(session):
    """A formatted sheep answers dog as the original did: same results, variants and lengths."""
    async with machines() as world:
        (sheep,) = await world.start_all(0)
        await sheep.format()
        for request, ours, told in await replay(sheep, session):
            if request.opcode >= 0x10:
                same_answer(request, ours, told)


async def test_recorded_life_of_a_volume():
    """Create, duplicate, snapshot, clone and attributes: numbers and results of a whole recorded day."""
    async with machines() as world:
        (sheep,) = await world.start_all(0)
        await sheep.format()
        for session, opcodes in (
            ("dog-vdi-create-thin-1n.jsonl", (Op.NEW_VDI,)),
            ("dog-vdi-create-duplicate-1n.jsonl", (Op.NEW_VDI,)),
            ("dog-vdi-setattr-1n.jsonl", (Op.GET_VDI_ATTR,)),
            ("dog-vdi-setattr-exclusive-exists-1n.jsonl", (Op.GET_VDI_ATTR,)),
            ("dog-vdi-getattr-1n.jsonl", (Op.GET_VDI_ATTR,)),
            ("dog-vdi-getattr-missing-1n.jsonl", (Op.GET_VDI_ATTR,)),
            ("dog-vdi-snapshot-1n.jsonl", (Op.GET_VDI_INFO, Op.NEW_VDI)),
            ("dog-vdi-setattr-delete-1n.jsonl", (Op.GET_VDI_ATTR,)),
        ):
            pairs = await replay(sheep, session, *opcodes)
            assert pairs, session
            for request, ours, told in pairs:
                same_answer(request, ours, told, variant=told.result == 0)


async def test_epoch_log():
    """STAT_CLUSTER: newest first, as many as fit; too few slots for the nodes of an epoch is BUFFER_SMALL."""
    async with machines() as world:
        sheep = await world.start_all(0, 1)
        await sheep[0].format()
        sheep += await world.start_all(2)
        one = sheep[0]
        await world.agreed(*sheep, epoch=2)

        async def ask(slots, room):
            return await one.ask(Op.STAT_CLUSTER, ClusterRequest(nodes_nr=slots), data_length=room)

        assert (await ask(2, 4096)).result == Result.BUFFER_SMALL
        both = unpack_epoch_log((await ask(3, 4096)).body, 3)
        assert [(entry.epoch, len(entry.nodes), bool(entry.ctime)) for entry in both] == [(2, 3, True), (1, 2, False)]
        newest = unpack_epoch_log((await ask(3, 48 + 240)).body, 3)
        assert [entry.epoch for entry in newest] == [2]
        (flags,) = unpack_epoch_log((await ask(0, 48)).body, 0)
        assert (flags.epoch, flags.nodes, flags.flags) == (2, (), 4)
        assert not (await ask(0, 0)).body


async def test_get_epoch():
    """GET_EPOCH gives a log entry, refuses unknown ones and never more than the room."""
    async with machines() as world:
        (sheep,) = await world.start_all(0)
        await sheep.format()
        answer = await sheep.ask(Op.GET_EPOCH, data_length=88, tgt_epoch=1)
        assert [node.id for node in EpochRecord.unpack(answer.body).nodes] == [sheep.node.id]
        assert (await sheep.ask(Op.GET_EPOCH, data_length=88, tgt_epoch=2)).result == Result.NO_TAG
        assert (await sheep.ask(Op.GET_EPOCH, data_length=87, tgt_epoch=1)).result == Result.BUFFER_SMALL


@pytest.mark.parametrize(
    ("opcode", "size"),
    [
        (Op.GET_NODE_LIST, 80),
        (Op.CLUSTER_INFO, CLUSTER_INFO_BYTES),
        (Op.GET_VDI_COPIES, 1428),
        (Op.STAT, 120),
        (Op.STAT_RECOVERY, 24),
        (Op.GET_LOGLEVEL, 4),
        (Op.GET_VNODES, 4),
        (Op.GET_RECOVERY, 24),
        (Op.MD_INFO, MD_INFO_BYTES),
        (Op.GET_OBJ_LIST, 8),
    ],
)
async def test_never_more_than_the_room(opcode, size):
    """An answer that does not fit is BUFFER_SMALL; one that just fits is given."""
    async with machines() as world:
        (sheep,) = await world.start_all(0)
        await sheep.format()
        await sheep.new_vdi(b"test")
        small = await sheep.ask(opcode, data_length=size - 1)
        assert (small.result, len(small.body)) == (Result.BUFFER_SMALL, 0)
        fits = await sheep.ask(opcode, data_length=size)
        assert (fits.result, len(fits.body)) == (0, size)


@pytest.mark.parametrize("opcode", [Op.READ_VDIS, Op.READ_DEL_VDIS])
async def test_bitmaps_have_one_size(opcode):
    """The bitmaps are given to requests for exactly 2 MiB."""
    async with machines() as world:
        (sheep,) = await world.start_all(0)
        assert (await sheep.ask(opcode, data_length=2097151)).result == Result.INVALID_PARMS
        assert len((await sheep.ask(opcode, data_length=2097152)).body) == 2097152


async def test_sizes_and_stores():
    """Storage of a sheep and of a gateway; the stores it could use."""
    async with machines() as world:
        sheep, gateway = await world.start_all(0) + await world.start_all(1, gateway=True)
        await sheep.format()
        stored = NodeResponse.unpack((await sheep.ask(Op.STAT_SHEEP)).variant)
        empty = NodeResponse.unpack((await gateway.ask(Op.STAT_SHEEP)).variant)
        assert (stored.store_size, stored.store_free) == (10 * GiB, 9 * GiB)
        assert (empty.store_size, empty.store_free) == (0, 0)
        names = await sheep.ask(Op.GET_STORE_LIST, data_length=512)
        assert (unpack_store_list(names.body), bytes(names.body[:12])) == (("tree", "plain"), b"tree plain \0")
        info = ClusterInfo.unpack((await gateway.ask(Op.CLUSTER_INFO, data_length=CLUSTER_INFO_BYTES)).body)
        assert (info.epoch, info.default_store, len(info.nodes), info.proto_ver) == (1, "plain", 2, 10)


async def test_log_level():
    """The level is the one in force, for plugins and libraries too, and can be changed within its bounds."""
    logger = logging.getLogger()
    before = logger.level
    try:
        async with machines() as world:
            (sheep,) = await world.start_all(0)
            for number, level in enumerate(LOGGING_LEVELS):
                logger.setLevel(level)
                assert unpack_i32((await sheep.ask(Op.GET_LOGLEVEL, data_length=4)).body) == number
            assert (await sheep.ask(Op.SET_LOGLEVEL, body=pack_i32(3))).result == 0
            assert unpack_i32((await sheep.ask(Op.GET_LOGLEVEL, data_length=4)).body) == 3
            assert logger.level == logging.ERROR
            for level in (-1, 8):
                assert (await sheep.ask(Op.SET_LOGLEVEL, body=pack_i32(level))).result == Result.INVALID_PARMS
    finally:
        logger.setLevel(before)


async def test_objects_of_this_sheep():
    """Lists, existence, digests and repair of what is stored here."""
    async with machines() as world:
        one, two = await world.start_all(0, 1)
        await one.format()
        await one.new_vdi(b"test")
        inode, missing = inode_oid(TEST), data_oid(TEST, 0)
        assert unpack_oids((await one.ask(Op.GET_OBJ_LIST, data_length=80)).body) == [inode]
        assert (await one.ask(Op.EXIST, oid=inode)).result == 0
        assert (await one.ask(Op.EXIST, oid=missing)).result == Result.NO_OBJ
        lacking = await one.ask(Op.OIDS_EXIST, body=pack_oids([inode, missing]))
        assert (lacking.result, unpack_oids(lacking.body)) == (Result.NO_OBJ, [missing])
        assert (await one.ask(Op.OIDS_EXIST, body=pack_oids([inode]))).result == 0
        assert HashResponse.unpack((await one.ask(Op.GET_HASH, oid=inode)).variant).digest == bytes([7]) * 20
        assert (await one.ask(Op.GET_HASH, oid=missing, tgt_epoch=1)).result == Result.NO_OBJ
        wanted = ForwRequest(missing, two.node.id.address, two.node.id.port)
        assert (await one.ask(Op.REPAIR_REPLICA, wanted)).result == Result.NO_OBJ  # there is no data path here


async def test_nothing_to_do():
    """Operations that the original had given up are answered as it does."""
    async with machines() as world:
        (sheep,) = await world.start_all(0)
        await sheep.format()
        for opcode, result in (
            (Op.FLUSH_VDI, Result.INVALID_PARMS),
            (Op.FLUSH_DEL_CACHE, 0),
            (Op.DELETE_CACHE, 0),
            (Op.TRACE_ENABLE, Result.NO_SUPPORT),
            (Op.TRACE_READ_BUF, Result.AGAIN),
            (Op.SNAPSHOT, Result.INVALID_PARMS),
        ):
            assert (await sheep.ask(opcode)).result == result
        assert (await sheep.ask(Op.SET_RECOVERY, body=Throttle(10, 100, 1).pack())).result == 0
        assert (await sheep.ask(Op.SET_RECOVERY, body=b"short")).result == Result.INVALID_PARMS
