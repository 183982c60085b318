"""Volumes: splitting, holes, copy-on-write, the two forms of the map, and what is sent in which order."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from sheepdog.client import volume
from sheepdog.client.connection import Connection
from sheepdog.client.volume import Piece, Volume, split
from sheepdog.errors import RequestError
from sheepdog.model import btree
from sheepdog.model.ids import data_oid, inode_oid

if TYPE_CHECKING:
    from conftest import MemorySheep

MiB = 1 << 20
OBJECT = 4 * MiB


def create(connection: Connection, name: bytes, size: int, **options: int) -> int:
    return volume.create_vdi(connection.request, name, size=size, **options).vid


def test_split() -> None:
    """A range is cut at object borders and nowhere else."""
    assert list(split(3, 5, 4)) == [Piece(0, 3, 1), Piece(1, 0, 4)]
    assert list(split(8, 4, 4)) == [Piece(2, 0, 4)]
    assert list(split(8, 0, 4)) == []


def test_read_of_holes_sends_nothing(sheep: MemorySheep, connection: Connection) -> None:
    """What was never written reads as zeros, without a request."""
    create(connection, b"a", 64 * MiB)
    disk = Volume.open(connection.request, b"a")
    before = len(sheep.requests)

    assert disk.read(OBJECT - 10, 20) == bytes(20)
    assert len(sheep.requests) == before


def test_random_writes(connection: Connection) -> None:
    """Any sequence of writes reads back as a plain array of bytes would, also after opening again."""
    size = 20 * MiB + 12345
    create(connection, b"a", size)
    disk = Volume.open(connection.request, b"a")
    model = bytearray(size)
    rng = random.Random(7)
    for _ in range(12):
        offset = rng.randrange(size)
        data = rng.randbytes(rng.choice([1, 511, 4096, 5 * MiB]))[: size - offset]
        disk.write(offset, data)
        model[offset : offset + len(data)] = data

    assert disk.read(0, size) == model
    assert Volume.open(connection.request, b"a").read(0, size) == model


def test_object_first_then_map(sheep: MemorySheep, connection: Connection) -> None:
    """A new object is created before the map names it; a second write to it touches no map."""
    vid = create(connection, b"a", 64 * MiB)
    disk = Volume.open(connection.request, b"a")
    del sheep.requests[:]
    disk.write(OBJECT + 5, b"x")
    disk.write(OBJECT + 6, b"y")

    assert [request[:4] for request in sheep.requests] == [
        (0x01, 1, data_oid(vid, 1), 5),
        (0x03, 1, inode_oid(vid), 4664 + 4),
        (0x03, 1, data_oid(vid, 1), 6),
    ]
    assert sheep.requests[1][4] == vid.to_bytes(4, "little")


def test_copy_on_write(sheep: MemorySheep, connection: Connection) -> None:
    """A clone gets an object of its own from the base's, whose content stays."""
    base = create(connection, b"base", 16 * MiB)
    Volume.open(connection.request, b"base").write(0, b"b" * 100)
    clone = create(connection, b"clone", 16 * MiB, base_vid=base)
    disk = Volume.open(connection.request, b"clone")
    del sheep.requests[:]
    disk.write(10, b"c")

    assert sheep.requests[0][:3] == (0x01, 3, data_oid(clone, 0))
    assert disk.read(0, 100) == b"b" * 10 + b"c" + b"b" * 89
    assert Volume.open(connection.request, b"base").read(0, 100) == b"b" * 100


def test_discard(sheep: MemorySheep, connection: Connection) -> None:
    """Whole objects leave the map, also a short last one; parts of objects stay."""
    size = 2 * OBJECT + 100
    create(connection, b"a", size)
    disk = Volume.open(connection.request, b"a")
    disk.write(0, b"x" * size)
    disk.discard(1, size - 1)

    assert disk.read(0, size) == b"x" * OBJECT + bytes(OBJECT + 100)
    assert dict(Volume.open(connection.request, b"a").inode.map.items()).keys() == {0}


def test_clear_map(sheep: MemorySheep, connection: Connection) -> None:
    """The map is cleared in batches of allocated entries; a limit leaves the rest."""
    create(connection, b"a", 64 * MiB)
    disk = Volume.open(connection.request, b"a")
    for index in (0, 2, 3, 7, 9):
        disk.write(index * OBJECT, b"x")
    inode = volume.open_vdi(connection.request, b"a")
    del sheep.requests[:]
    volume.clear_map(inode, batch=2, entries_max=4)

    assert [(request[3], len(request[4])) for request in sheep.requests] == [(4664, 12), (4664 + 12, 20)]
    assert [index for index, _ in inode.map.items()] == [9]
    volume.clear_map(inode)
    assert list(volume.open_vdi(connection.request, b"a").map.items()) == []


def test_header_change_keeps_unknown_bytes(sheep: MemorySheep, connection: Connection) -> None:
    """Bytes of the header that nobody knows are written back as they were."""
    from dataclasses import replace

    vid = create(connection, b"a", 16 * MiB)
    sheep.objects[inode_oid(vid)][600:603] = b"old"
    inode = volume.open_vdi(connection.request, b"a", header_only=True)
    inode.write_header(replace(inode.header, vdi_size=32 * MiB))

    stored = volume.open_vdi(connection.request, b"a")
    assert stored.header.vdi_size == 32 * MiB
    assert sheep.objects[inode_oid(vid)][600:603] == b"old"


def test_messages(sheep: MemorySheep, connection: Connection) -> None:
    """Errors carry the lines that dog prints, and the result code."""
    vid = create(connection, b"a", 16 * MiB)
    disk = Volume.open(connection.request, b"a")
    disk.write(0, b"x")
    del sheep.objects[data_oid(vid, 0)]

    oid = f"{data_oid(vid, 0):016x}"
    with pytest.raises(volume.ObjectReadError, match=f"^Failed to read object {oid} No object found$"):
        disk.read(0, 1)
    with pytest.raises(volume.ObjectWriteError, match=f"^Failed to write object {oid}: No object found$"):
        disk.write(0, b"y")
    with pytest.raises(volume.OpenError) as caught:
        volume.open_vdi(connection.request, b"none", tag=b"t")
    assert str(caught.value) == "Failed to open VDI none (snapshot id: 0 snapshot tag: t): No VDI found"
    assert caught.value.result == 0x08
    with pytest.raises(RequestError, match=r"^VDI exists already$"):
        create(connection, b"a", 1)


def test_hypervolume(sheep: MemorySheep, connection: Connection) -> None:
    """Far apart offsets of a hypervolume; the root is written with the header, then the counter."""
    vid = create(connection, b"h", 5 << 40, store_policy=1)
    disk = Volume.open(connection.request, b"h")
    del sheep.requests[:]
    disk.write(4 << 40, b"far")
    disk.write(OBJECT, b"near")

    assert [(request[0], request[2], request[3]) for request in sheep.requests[:3]] == [
        (0x01, data_oid(vid, 1 << 20), 0),
        (0x03, inode_oid(vid), 0),
        (0x03, inode_oid(vid), 568),
    ]
    again = Volume.open(connection.request, b"h")
    assert again.read(4 << 40, 3) == b"far" and again.read(OBJECT, 4) == b"near"
    assert list(again.inode.map.items()) == [(1, vid), (1 << 20, vid)]


def test_hypervolume_splits(sheep: MemorySheep, connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many objects the map grows leaves; every object is still found, and a cleared one is gone."""
    from sheepdog.client import tree_map

    def small_insert(*args: object, **kwargs: object) -> object:
        return btree.insert(*args, **kwargs, leaf_entries_max=4, inner_entries_max=64)  # type: ignore[arg-type]

    monkeypatch.setattr(tree_map, "insert", small_insert)
    vid = create(connection, b"h", 5 << 40, store_policy=1)
    inode = volume.open_vdi(connection.request, b"h")
    indexes = list(range(0, 60, 3))
    random.Random(3).shuffle(indexes)
    for index in indexes:
        inode.map.store(index, vid)
    inode.map.clear(30, 33)

    again = volume.open_vdi(connection.request, b"h")
    left = sorted(set(indexes) - {30, 33})
    assert [index for index, _ in again.map.items()] == left
    assert all(again.map.get(index) == (vid if index in left else 0) for index in range(70))
    assert again.header.btree_counter > 1
