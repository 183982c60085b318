"""A small sheep in memory for the tests of the client, over a real socket."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest

from sheepdog.client.connection import Connection
from sheepdog.model.hashing import vdi_hash
from sheepdog.model.ids import inode_oid
from sheepdog.model.inode import INODE_BYTES, InodeHeader

NO_OBJ, VDI_EXIST, INVALID, NO_VDI = 0x02, 0x04, 0x05, 0x08


class MemorySheep:
    """Objects in a dictionary, working vdis by name; requests are kept as (opcode, flags, oid, offset, body)."""

    def __init__(self) -> None:
        self.objects: dict[int, bytearray] = {}
        self.vdis: dict[bytes, int] = {}
        self.requests: list[tuple[int, int, int, int, bytes]] = []
        self.answers: dict[int, Callable[[bytes, bytes], tuple[int, bytes, bytes]]] = {}
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                stream, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(stream,), daemon=True).start()

    def _serve(self, stream: socket.socket) -> None:
        with stream, stream.makefile("rb") as reader:
            while len(header := reader.read(48)) == 48:
                length = int.from_bytes(header[12:16], "little")
                body = reader.read(length) if header[2] & 1 else b""
                result, answer, variant = self._handle(header, body, length)
                request_id = int.from_bytes(header[8:12], "little")
                head = struct.pack("<BBHIIII", 0, header[1], 0, 3, request_id, len(answer), result)
                stream.sendall(head + variant.ljust(28, b"\0") + answer)

    def _handle(self, header: bytes, body: bytes, length: int) -> tuple[int, bytes, bytes]:
        opcode = header[1]
        flags = int.from_bytes(header[2:4], "little")
        oid, cow_oid = struct.unpack_from("<QQ", header, 16)
        offset = int.from_bytes(header[40:44], "little")
        self.requests.append((opcode, flags, oid, offset, bytes(body)))
        if opcode in self.answers:
            return self.answers[opcode](header, body)
        if opcode == 0x01:
            size = INODE_BYTES if oid >> 63 else 4 << 20
            content = bytearray(self.objects[cow_oid]) if flags & 2 else bytearray(size)
            content[offset : offset + len(body)] = body
            self.objects[oid] = content
            return 0, b"", b""
        if opcode in (0x02, 0x03):
            stored = self.objects.get(oid)
            if stored is None:
                return NO_OBJ, b"", b""
            if opcode == 0x02:
                return 0, bytes(stored[offset : offset + length]), b""
            stored[offset : offset + len(body)] = body
            return 0, b"", b""
        if opcode == 0x11:
            return self._new_vdi(header, body)
        if opcode == 0x14:
            vid = self.vdis.get(body[:256].rstrip(b"\0"))
            return (NO_VDI, b"", b"") if vid is None else (0, b"", struct.pack("<4xIIBB", vid, 0, 1, 22))
        return INVALID, b"", b""

    def _new_vdi(self, header: bytes, body: bytes) -> tuple[int, bytes, bytes]:
        size, base, copies, policy, store_policy, shift = struct.unpack_from("<QIBBBB", header, 16)
        name = body.rstrip(b"\0")
        if name in self.vdis:
            return VDI_EXIST, b"", b""
        vid = vdi_hash(name)
        inode = InodeHeader(
            name=name, vdi_size=size, nr_copies=copies or 1, copy_policy=policy, store_policy=store_policy,
            block_size_shift=shift or 22, snap_id=1, vdi_id=vid, parent_vdi_id=base,
        )  # fmt: skip
        content = bytearray(INODE_BYTES)
        if base:
            content[:] = self.objects[inode_oid(base)]
        elif store_policy:
            content[4664:4672] = bytes.fromhex("7462010000000000")
        content[:4664] = inode.pack()
        self.objects[inode_oid(vid)] = content
        self.vdis[name] = vid
        return 0, b"", struct.pack("<4xIIBB", vid, 0, 1, 22)


@pytest.fixture
def sheep() -> Iterator[MemorySheep]:
    made = MemorySheep()
    yield made
    made.listener.close()


@pytest.fixture
def connection(sheep: MemorySheep) -> Iterator[Connection]:
    with Connection(sheep.address) as made:
        yield made
