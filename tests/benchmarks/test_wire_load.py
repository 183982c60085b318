"""The load generator does what a client does, measures, and notices lost writes; against a small server in here."""

import asyncio
import importlib.util
import struct
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def wire_load():
    spec = importlib.util.spec_from_file_location("wire_load", BENCHMARKS / "wire_load.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["wire_load"] = module
    spec.loader.exec_module(module)
    return module


class SmallSheep:
    """Enough of a sheep for one volume: lookup, creation, object reads and writes."""

    VID = 0xABCDEF

    def __init__(self, forgetful=False):
        self.names = set()
        self.objects = {}
        self.log = []
        self.forgetful = forgetful  # loses every 20th write
        self.writes = 0

    async def serve(self, reader, writer):
        try:
            while True:
                header = await reader.readexactly(48)
                _, op, flags, _, rid, length = struct.unpack_from("<BBHIII", header)
                body = await reader.readexactly(length) if flags & 1 else b""
                result, variant, data = self.handle(op, flags, header, length, body)
                writer.write(struct.pack("<BBHIIII", 0, op, 0, 1, rid, len(data), result) + variant.ljust(28, b"\0"))
                writer.write(data)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def handle(self, op, flags, header, length, body):
        oid, cow, copies, offset = struct.unpack_from("<QQB7xI", header, 16)
        self.log.append((op, oid, offset, length))
        if op in (0x11, 0x14):
            assert len(body) == 256
            name = body.rstrip(b"\0")
            if op == 0x14 and name not in self.names:
                return 8, b"", b""
            self.names.add(name)
            if op == 0x11:
                inode = bytearray(4198968)
                inode[554], inode[555] = 3, 22
                self.objects[1 << 63 | self.VID << 32] = inode
            return 0, struct.pack("<4xI", self.VID), b""
        if op == 1:
            assert copies == 3
            self.objects[oid] = bytearray(self.objects[cow]) if flags & 2 else bytearray(4 << 20)
        if oid not in self.objects:
            return 2, b"", b""
        target = self.objects[oid]
        if op == 2:
            return 0, b"", bytes(target[offset : offset + length])
        self.writes += 1
        if not (self.forgetful and self.writes % 20 == 0):
            target[offset : offset + len(body)] = body
        return 0, b"", b""


def run_against(wire_load, sheep, **options):
    async def main():
        server = await asyncio.start_server(sheep.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            return await wire_load.run(wire_load.Options(f"127.0.0.1:{port}", **options))
        finally:
            server.close()

    return asyncio.run(main())


SMALL = {"size": 16 << 20, "seconds": 20.0}


def test_creates_then_writes(wire_load):
    """A missing volume is created, each object before its map entry, and only then comes the load."""
    sheep = SmallSheep()

    report = run_against(wire_load, sheep, count=200, depth=8, **SMALL)

    assert report.requests == 200
    operations = [op for op, *_ in sheep.log]
    assert operations[:3] == [0x14, 0x11, 0x02]
    assert operations.count(0x01) == 4
    inode = sheep.objects[1 << 63 | sheep.VID << 32]
    assert struct.unpack_from("<5I", inode, 4664) == (sheep.VID,) * 4 + (0,)
    for index in range(4):
        create = sheep.log.index((0x01, sheep.VID << 32 | index, 0, 65536))
        entry = sheep.log.index((0x03, 1 << 63 | sheep.VID << 32, 4664 + 4 * index, 4))
        assert create < entry
    assert report.p50_ms <= report.p99_ms <= report.max_ms
    assert report.per_second > 0


def test_other_owners_are_copied(wire_load):
    """An object that the volume inherited is created with copy-on-write from its owner."""
    sheep = SmallSheep()
    run_against(wire_load, sheep, count=1, **SMALL)
    struct.pack_into("<I", sheep.objects[1 << 63 | sheep.VID << 32], 4664 + 8, 0x111111)
    sheep.objects[0x111111 << 32 | 2] = bytearray(b"\7" * (4 << 20))

    run_against(wire_load, sheep, count=1, **SMALL)

    assert sheep.objects[sheep.VID << 32 | 2][-1] == 7


@pytest.mark.parametrize("op", ["read", "write", "mixed"])
@pytest.mark.parametrize("pattern", ["random", "sequential"])
def test_verified(wire_load, op, pattern):
    """A correct server passes a verified load of every kind, over several connections."""
    report = run_against(
        wire_load, SmallSheep(), op=op, pattern=pattern, count=300, depth=4, connections=2, verify=True, **SMALL
    )

    assert report.requests == 300
    assert report.verified_blocks > 0 or op == "read"


def test_lost_writes_are_noticed(wire_load):
    """A server that acknowledges writes and drops some of them fails a verified load."""
    with pytest.raises(wire_load.LoadError):
        run_against(wire_load, SmallSheep(forgetful=True), op="mixed", count=400, depth=4, verify=True, **SMALL)


def test_large_blocks(wire_load):
    """Whole objects, larger than the receive buffer, are read in both modes."""
    for verify in (False, True):
        options = {"op": "read", "block": 4 << 20, "count": 8, "depth": 2, "verify": verify}
        report = run_against(wire_load, SmallSheep(), **options, **SMALL)
        assert report.requests == 8


def test_errors_end_the_load(wire_load):
    """A refused request ends the load with its result code."""
    sheep = SmallSheep()
    run_against(wire_load, sheep, count=1, **SMALL)
    del sheep.objects[sheep.VID << 32 | 1]

    with pytest.raises(wire_load.LoadError, match="0x2"):
        run_against(wire_load, sheep, count=200, **SMALL)


def test_sizes(wire_load):
    """Sizes are written as people write them."""
    assert [wire_load.parse_size(text) for text in ("512", "4k", "256M", "1G")] == [512, 4096, 256 << 20, 1 << 30]
