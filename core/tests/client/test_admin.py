"""What a client learns about a cluster."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from sheepdog.client import admin
from sheepdog.client.connection import Connection
from sheepdog.errors import ProtocolError, RequestError
from sheepdog.model.clusterinfo import ClusterFlag, ClusterInfo
from sheepdog.model.epochs import EpochLogEntry, pack_epoch_log
from sheepdog.model.node import Node, NodeDisk, NodeId, VnodeMode, pack_nodes
from sheepdog.model.vid_bitmap import VidBitmap

if TYPE_CHECKING:
    from conftest import MemorySheep

NODES = tuple(Node(NodeId.of("127.0.0.1", 7000 + at), 128, at, 1 << 30) for at in range(3))


def test_node_list(sheep: MemorySheep, connection: Connection) -> None:
    """The nodes come back as they are; a refusal is an error with the result's text."""
    sheep.answers[0x82] = lambda header, body: (0, pack_nodes(NODES), b"")
    assert admin.node_list(connection.request) == NODES

    sheep.answers[0x82] = lambda header, body: (0x16, b"", b"")
    with pytest.raises(RequestError, match=r"^Waiting for cluster to be formatted$"):
        admin.node_list(connection.request)


def test_node_list_with_disks(sheep: MemorySheep, connection: Connection) -> None:
    """Records tell by their length that vnodes belong to disks, and then the log of epochs is read accordingly."""
    nodes = tuple(replace(node, disks=(NodeDisk(9, 1 << 40),)) for node in NODES)
    body = pack_nodes(nodes, VnodeMode.DISK)
    sheep.answers[0x82] = lambda header, _: (0, body, len(nodes).to_bytes(4, "little"))
    assert admin.members(connection.request) == (nodes, VnodeMode.DISK)
    assert admin.node_list(connection.request) == nodes
    # 5 records of 592 bytes are as long as 37 of 80: their number decides.
    many = tuple(Node(NodeId.of("127.0.0.1", 1 + at)) for at in range(37))
    sheep.answers[0x82] = lambda header, _: (0, pack_nodes(many), len(many).to_bytes(4, "little"))
    assert admin.members(connection.request) == (many, VnodeMode.NODE)

    entries = [EpochLogEntry(time=5, epoch=2, nodes=nodes), EpochLogEntry(time=4, epoch=1, nodes=nodes[:2])]
    sheep.answers[0x87] = lambda header, _: (0, pack_epoch_log(entries, 3, VnodeMode.DISK), b"")
    stat = admin.epoch_log(connection.request, epoch=2, node_slots=3, mode=VnodeMode.DISK)
    assert stat.entries == tuple(entries)

    info = ClusterInfo(flags=ClusterFlag.DISK_MODE, nodes=nodes)
    sheep.answers[0xBE] = lambda header, _: (0, info.pack(), b"")
    assert admin.cluster_info(connection.request) == info


def test_epoch_log_asks_again_with_more_room(sheep: MemorySheep, connection: Connection) -> None:
    """BUFFER_SMALL doubles the slots until every epoch fits."""
    entries = [EpochLogEntry(time=5, epoch=2, nodes=NODES), EpochLogEntry(time=4, epoch=1, nodes=NODES[:2])]

    def answer(header: bytes, body: bytes) -> tuple[int, bytes, bytes]:
        slots = int.from_bytes(header[40:44], "little")
        if slots < 3:
            return 0x88, b"", b""
        assert int.from_bytes(header[12:16], "little") == 2 * (48 + 80 * slots)
        return 0x17, pack_epoch_log(entries, slots), b""

    sheep.answers[0x87] = answer
    stat = admin.epoch_log(connection.request, epoch=2, node_slots=1)

    assert (stat.result, stat.epoch, stat.entries) == (0x17, 3, tuple(entries))
    assert len(sheep.requests) == 3


def test_newest_epoch(sheep: MemorySheep, connection: Connection) -> None:
    """The cluster's defaults come without its nodes, or not at all before format."""
    entry = EpochLogEntry(time=5, epoch=2, nodes=NODES, copies=2, store="plain")
    sheep.answers[0x87] = lambda header, body: (0, entry.pack(3)[:48], b"")
    result, newest = admin.newest_epoch(connection.request)
    assert result == 0 and newest is not None
    assert (newest.copies, newest.store, newest.nodes) == (2, "plain", ())

    sheep.answers[0x87] = lambda header, body: (0x16, b"", b"")
    assert admin.newest_epoch(connection.request) == (0x16, None)


def test_used_vids(sheep: MemorySheep, connection: Connection) -> None:
    """Deleted numbers are left out."""
    sheep.answers[0x15] = lambda header, body: (0, VidBitmap([1, 9, 0xFFFFFF]).pack(), b"")
    sheep.answers[0xC9] = lambda header, body: (0, VidBitmap([9, 10]).pack(), b"")

    assert admin.used_vids(connection.request) == [1, 0xFFFFFF]
    assert admin.any_vid(connection.request)


def test_vdi_states_ask_again(sheep: MemorySheep, connection: Connection) -> None:
    """The room for states doubles as long as it does not suffice."""
    rooms: list[int] = []

    def answer(header: bytes, body: bytes) -> tuple[int, bytes, bytes]:
        rooms.append(int.from_bytes(header[12:16], "little"))
        return (0x88, b"", b"") if len(rooms) < 3 else (0, b"", b"")

    sheep.answers[0xAB] = answer
    assert admin.vdi_states(connection.request) == ()
    assert rooms == [512 * 1428, 1024 * 1428, 2048 * 1428]


def test_structs() -> None:
    """Small structures, and what is too short for them."""
    state = struct.pack("<B3xIQQ", 1, 2, 3, 4)
    assert admin.unpack_recovery_state(state) == admin.RecoveryState(True, 2, 3, 4)
    throttle = admin.RecoveryThrottle(10, 100, True)
    assert admin.unpack_throttle(admin.pack_throttle(throttle)) == throttle
    assert admin.unpack_counters(struct.pack("<15Q", *range(15))) == admin.Counters(*range(15))
    disks = struct.pack("<i4xQQ4096s", 0, 7, 5, b"/d1").ljust(263680, b"\0") + b"\1" + bytes(7)
    assert admin.unpack_disks(disks) == [admin.Disk(0, 7, 5, b"/d1")]
    assert admin.unpack_disks(disks)[0].size == 12
    for unpack in (admin.unpack_recovery_state, admin.unpack_throttle, admin.unpack_counters, admin.unpack_disks):
        with pytest.raises(ProtocolError):
            unpack(b"short")
