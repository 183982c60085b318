"""A cluster made of a table of answers."""

from __future__ import annotations

import struct
from collections.abc import Callable

from replay import Answers, Outcome, run_dog

from sheepdog.model.inode import INODE_BYTES, InodeHeader
from sheepdog.model.node import Node, NodeId, pack_nodes
from sheepdog.model.vid_bitmap import VidBitmap

MiB = 1 << 20
WAIT_FOR_FORMAT = 0x16
WAITING = "Waiting for cluster to be formatted"
NODES = (
    Node(NodeId.of("10.0.0.4", 7000), 128, 67108874, 1 << 40),
    Node(NodeId.of("10.0.0.5", 7000), 131, 83886090, 1 << 40),
    Node(NodeId.of("2001:db8::9", 7000), 0, 150994954, 0),
)
FORCE_OPS = {0x15, 0x18, 0x82, 0x84, 0x85, 0x87, 0x8A, 0x90, 0xAB, 0xB9, 0xBE, 0xC9, 0xCA, 0xCB}

Answer = tuple[int, bytes, bytes]


class Cluster:
    """Answers from a table; what is not in it is refused with ``otherwise``."""

    def __init__(self, otherwise: int = 0x05, nodes: tuple[Node, ...] = NODES) -> None:
        self.table: dict[int, Callable[[bytes, bytes], Answer]] = {
            0x82: lambda header, data: (0, pack_nodes(nodes), b""),
            0x87: lambda header, data: (0, b"", b""),
        }
        self.otherwise = otherwise
        self.inodes: dict[int, bytearray] = {}
        self.seen: list[tuple[int, bytes, bytes]] = []
        self.sheep = Answers(self._answer)

    def _answer(self, opcode: int, header: bytes, data: bytes) -> Answer:
        self.seen.append((opcode, header, data))
        if opcode in self.table:
            return self.table[opcode](header, data)
        return self.otherwise, b"", b""

    def add_vdi(self, header: InodeHeader, entries: dict[int, int] | None = None) -> None:
        """The vdi can be listed, found by name and tag, and its inode read."""
        content = bytearray(INODE_BYTES)
        content[:4664] = header.pack()
        for index, vid in (entries or {}).items():
            content[4664 + 4 * index : 4668 + 4 * index] = vid.to_bytes(4, "little")
        self.inodes[header.vdi_id] = content
        self.table[0x15] = lambda head, data: (0, VidBitmap(self.inodes).pack(), b"")
        self.table[0xC9] = lambda head, data: (0, VidBitmap().pack(), b"")
        self.table[0x02] = self._read
        self.table[0x14] = self._find

    def _read(self, header: bytes, data: bytes) -> Answer:
        vid = int.from_bytes(header[20:23], "little")
        offset, length = int.from_bytes(header[40:44], "little"), int.from_bytes(header[12:16], "little")
        if not header[23] or vid not in self.inodes:
            return 0x02, b"", b""
        return 0, bytes(self.inodes[vid][offset : offset + length]), b""

    def _find(self, header: bytes, data: bytes) -> Answer:
        name, tag = data[:256].rstrip(b"\0"), data[256:].rstrip(b"\0")
        for vid, content in self.inodes.items():
            inode = InodeHeader.unpack(content)
            if inode.name == name and inode.tag == tag and inode.is_snapshot == bool(tag):
                return 0, b"", struct.pack("<4xIIBB", vid, 0, 1, 22)
        return (0x0E if tag else 0x08), b"", b""

    def dog(self, *words: str, stdin: bytes = b"") -> Outcome:
        return run_dog(words, stdin=stdin, connect=self.sheep.connect)
