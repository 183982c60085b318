"""A client that does what QEMU's old sheepdog driver did, step by step (wire protocol, section 11).

It shares no code with the client library, so a mistake there cannot hide one in the sheep. What is like QEMU: one
connection for data, on which requests are pipelined, and a new one for each control request; a broken data connection
is made again and everything unanswered is sent again; only the short inode is known; the map is kept in memory; a data
object that belongs to another number is copied on write, and the map entries of one guest request are written together
after its creates.
"""

from __future__ import annotations

import itertools
import socket
import struct
import time

PROTO = 1
READ, CREATE, WRITE = 0x02, 0x01, 0x03
NEW_VDI, LOCK_VDI, RELEASE_VDI, GET_VDI_INFO, READ_VDIS, FLUSH_VDI, DEL_VDI, DEFAULT = *range(0x11, 0x18), 0x18
F_WRITE, F_COW, F_CACHE, F_DIRECT = 1, 2, 4, 8
NO_OBJ, INVALID_PARMS, READONLY = 0x02, 0x05, 0x1A

HEADER_BYTES = 4664
SHORT_INODE_BYTES = 4198968
MAP_ENTRIES = 1 << 20
BITMAP_BYTES = 1 << 21
RETRY_S, GIVE_UP_S = 0.2, 60.0


class QemuError(Exception):
    """A request was refused; ``result`` says how."""

    def __init__(self, opcode: int, result: int) -> None:
        super().__init__(f"opcode 0x{opcode:02x}: result 0x{result:02x}")
        self.result = result


def vdi_hash(name: str) -> int:
    value = 0xCBF29CE484222325
    for byte in name.encode():
        value = (value ^ byte) * 0x100000001B3 & (1 << 64) - 1
    return value & 0xFFFFFF


def padded(text: str, size: int = 256) -> bytes:
    return text.encode().ljust(size, b"\0")


class Server:
    """A sheep, by TCP (``host:port``) or through its Unix socket (``unix:PATH``)."""

    def __init__(self, address: str) -> None:
        self.address = address

    def connect(self) -> socket.socket:
        if self.address.startswith("unix:"):
            stream = socket.socket(socket.AF_UNIX)
            stream.settimeout(GIVE_UP_S)
            stream.connect(self.address.removeprefix("unix:"))
            return stream
        host, _, port = self.address.rpartition(":")
        stream = socket.create_connection((host, int(port)), timeout=GIVE_UP_S)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return stream

    def control(self, header: bytes, body: bytes = b"") -> tuple[bytes, bytes]:
        """(header, body) of the answer, on a connection of its own."""
        with self.connect() as stream:
            stream.sendall(header + body)
            answer = exactly(stream, 48)
            return answer, exactly(stream, int.from_bytes(answer[12:16], "little"))

    def vdi(
        self, opcode: int, name: str, tag: str | None = None, *, flags: int = 0, snap_id: int = 0, size: int = 0,
        base: int = 0, copies: int = 0, policy: int = 0, shift: int = 0,
    ) -> int:  # fmt: skip
        """The number in the answer to a request about a volume."""
        body = padded(name) + (padded(tag) if tag is not None else b"")
        header = struct.pack(
            "<BBHIIIQIBBBBII8x",
            PROTO, opcode, F_WRITE | flags, 0, 0, len(body), size, base, copies, policy, 0, shift, snap_id, 0,
        )  # fmt: skip
        answer, _ = self.control(header, body)
        result = int.from_bytes(answer[16:20], "little")
        if result:
            raise QemuError(opcode, result)
        return int.from_bytes(answer[24:28], "little")

    def object(
        self, opcode: int, oid: int, offset: int, data: bytes = b"", *, length: int = 0, copies: int = 0
    ) -> bytes:
        """An object read or written outside of the data connection."""
        answer, body = self.control(object_header(opcode, 0, oid, 0, offset, data, length, copies, 0), data)
        result = int.from_bytes(answer[16:20], "little")
        if result:
            raise QemuError(opcode, result)
        return body

    # ---- what qemu-img does

    def create(self, name: str, size: int, *, base: int = 0, snapshot: bool = False, inode: Inode | None = None) -> int:
        """``qemu-img create``: the default object size of the cluster is asked for first."""
        answer, _ = self.control(struct.pack("<BBHIII32x", PROTO, DEFAULT, 0, 0, 0, 0))
        copies, policy, shift = answer[20], answer[21], answer[22]
        if inode is not None:
            copies, policy, shift = inode.copies, inode.policy, inode.shift
        return self.vdi(
            NEW_VDI, name, size=size, base=base, copies=copies, policy=policy, shift=shift, snap_id=int(snapshot)
        )

    def snapshots(self, name: str) -> list[tuple[int, str]]:
        """(id, tag) of each snapshot of the name: the numbers behind its hash are walked as long as they are used."""
        answer, bitmap = self.control(struct.pack("<BBHIII32x", PROTO, READ_VDIS, 0, 0, 0, BITMAP_BYTES))
        assert len(bitmap) == BITMAP_BYTES, answer
        found = []
        vid = vdi_hash(name)
        while bitmap[vid // 8] >> vid % 8 & 1:
            inode = Inode(self.object(READ, 1 << 63 | vid << 32, 0, length=HEADER_BYTES))
            if inode.name == name and inode.snap_ctime:
                found.append((inode.snap_id, inode.tag))
            vid = (vid + 1) % (1 << 24)
        return found


def exactly(stream: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = stream.recv(min(size - len(data), 1 << 20))
        if not more:
            raise ConnectionError("the sheep closed the connection")
        data += more
    return bytes(data)


def object_header(
    opcode: int, number: int, oid: int, cow_oid: int, offset: int, data: bytes, length: int, copies: int, flags: int
) -> bytes:
    """As QEMU fills it: the version is left 0, and the offset has 64 bits."""
    if opcode != READ:
        flags |= F_WRITE
        length = len(data)
    return struct.pack("<BBHIIIQQBBBxIQ", 0, opcode, flags, 0, number, length, oid, cow_oid, copies, 0, 0, 0, offset)


class Inode:
    """The short inode, or its header alone."""

    def __init__(self, raw: bytes) -> None:
        self.raw = bytearray(raw)

    def _text(self, at: int) -> str:
        return bytes(self.raw[at : at + 256]).split(b"\0")[0].decode()

    def _number(self, at: int, size: int) -> int:
        return int.from_bytes(self.raw[at : at + size], "little")

    name = property(lambda self: self._text(0))
    tag = property(lambda self: self._text(256))
    snap_ctime = property(lambda self: self._number(520, 8))
    vdi_size = property(lambda self: self._number(536, 8))
    policy = property(lambda self: self._number(552, 1))
    copies = property(lambda self: self._number(554, 1))
    shift = property(lambda self: self._number(555, 1))
    snap_id = property(lambda self: self._number(556, 4))
    vid = property(lambda self: self._number(560, 4))
    parent = property(lambda self: self._number(564, 4))

    def put(self, at: int, value: bytes) -> None:
        self.raw[at : at + len(value)] = value

    def entry(self, index: int) -> int:
        return self._number(HEADER_BYTES + 4 * index, 4)

    @property
    def oid(self) -> int:
        return 1 << 63 | self.vid << 32


class QemuDisk:
    """An open image: ``sheepdog:NAME`` or ``sheepdog:NAME:SNAPSHOT`` (decimal: an id, else a tag)."""

    def __init__(self, server: Server, name: str, snapshot: str = "") -> None:
        self.server = server
        self.name = name
        snap_id = int(snapshot) if snapshot.isdecimal() else 0
        tag = "" if snap_id else snapshot
        self._numbers = itertools.count(1)
        self._stream = server.connect()
        self._cache = F_CACHE
        vid = server.vdi(LOCK_VDI, name, tag, snap_id=snap_id)
        self.inode = self._read_inode(vid)
        self.is_snapshot = bool(snap_id or tag)
        self.reconnected = 0

    def _read_inode(self, vid: int) -> Inode:
        raw = self.server.object(READ, 1 << 63 | vid << 32, 0, length=SHORT_INODE_BYTES)
        assert len(raw) == SHORT_INODE_BYTES
        return Inode(raw)

    def close(self) -> None:
        self._stream.close()
        body = self.name.encode() + b"\0"
        header = struct.pack(
            "<BBHIIIQI20x", PROTO, RELEASE_VDI, F_WRITE, 0, 0, len(body), 0, self.inode.vid
        )  # fmt: skip
        answer, _ = self.server.control(header, body)
        assert answer[16:20] == bytes(4), "RELEASE_VDI is always a success"

    # ---- the data connection

    def _pipeline(self, requests: list[tuple[int, int, int, int, bytes, int]]) -> list[tuple[int, bytes]]:
        """(result, body) of each (opcode, oid, cow oid, offset, data, length), all of them in flight at once."""
        waiting = {}
        for position, (opcode, oid, cow_oid, offset, data, length) in enumerate(requests):
            number = next(self._numbers)
            flags = (F_COW if cow_oid else 0) | (self._cache if opcode != READ else 0)
            head = object_header(opcode, number, oid, cow_oid, offset, data, length, self.inode.copies, flags)
            waiting[number] = position, head + data
        answers: list[tuple[int, bytes]] = [(0, b"")] * len(requests)
        deadline = time.monotonic() + GIVE_UP_S
        fresh = False
        while waiting:
            try:
                if fresh:
                    self._stream = self.server.connect()
                    self.reconnected += 1
                self._stream.sendall(b"".join(packet for _, packet in waiting.values()))
                while waiting:
                    head = exactly(self._stream, 48)
                    body = exactly(self._stream, int.from_bytes(head[12:16], "little"))
                    position, _ = waiting.pop(int.from_bytes(head[8:12], "little"))
                    answers[position] = int.from_bytes(head[16:20], "little"), body
            except OSError:
                if time.monotonic() > deadline:
                    raise
                self._stream.close()
                time.sleep(RETRY_S)
                fresh = True
        return answers

    def _pieces(self, offset: int, length: int) -> list[tuple[int, int, int, int]]:
        """(index, offset inside, start in the buffer, length) of each object in a range."""
        size = 1 << self.inode.shift
        found = []
        at = 0
        while at < length:
            index, inside = divmod(offset + at, size)
            count = min(size - inside, length - at)
            found.append((index, inside, at, count))
            at += count
        return found

    # ---- the guest's requests

    def read(self, offset: int, length: int) -> bytes:
        content = bytearray(length)
        wanted = [piece for piece in self._pieces(offset, length) if self.inode.entry(piece[0])]
        requests = [
            (READ, self.inode.entry(index) << 32 | index, 0, inside, b"", count) for index, inside, _, count in wanted
        ]
        for (result, body), (_, _, at, count) in zip(self._pipeline(requests), wanted, strict=True):
            if result:
                raise QemuError(READ, result)
            assert len(body) == count
            content[at : at + count] = body
        return bytes(content)

    def write(self, offset: int, data: bytes) -> None:
        if self.is_snapshot:
            self.branch()
        pieces = self._pieces(offset, len(data))
        while pieces:
            own = self.inode.vid
            requests = []
            for index, inside, at, count in pieces:
                entry = self.inode.entry(index)
                cow = entry << 32 | index if entry not in (0, own) else 0
                opcode = WRITE if entry == own else CREATE
                requests.append((opcode, own << 32 | index, cow, inside, data[at : at + count], 0))
            left = []
            created = []
            for (result, _), piece, request in zip(self._pipeline(requests), pieces, requests, strict=True):
                if result == READONLY:
                    left.append(piece)
                elif result:
                    raise QemuError(request[0], result)
                elif request[0] == CREATE:
                    self.inode.put(HEADER_BYTES + 4 * piece[0], own.to_bytes(4, "little"))
                    created.append(piece[0])
            if created:
                self._store_entries(min(created), max(created))
            if left:
                self._reload()
            pieces = left

    def _store_entries(self, first: int, last: int) -> None:
        start, end = HEADER_BYTES + 4 * first, HEADER_BYTES + 4 * (last + 1)
        ((result, _),) = self._pipeline([(WRITE, self.inode.oid, 0, start, bytes(self.inode.raw[start:end]), 0)])
        if result:
            raise QemuError(WRITE, result)

    def _reload(self) -> None:
        """Somebody took a snapshot: the name has another number now; the map stays, so every write copies."""
        vid = self.server.vdi(GET_VDI_INFO, self.name, "")
        if vid != self.inode.vid:
            self.inode.put(0, self.server.object(READ, 1 << 63 | vid << 32, 0, length=HEADER_BYTES))

    def discard(self, offset: int, length: int) -> None:
        """Whole objects are given up by clearing their map entries."""
        for index, _, _, count in self._pieces(offset, length):
            if count == 1 << self.inode.shift and self.inode.entry(index):
                self.inode.put(HEADER_BYTES + 4 * index, bytes(4))
                self._store_entries(index, index)

    def flush(self) -> bool:
        """Whether the server keeps a cache. Like QEMU this asks only until it was told that there is none."""
        if self._cache != F_CACHE:
            return False
        ((result, _),) = self._pipeline([(FLUSH_VDI, self.inode.oid, 0, 0, b"", 0)])
        if result == INVALID_PARMS:
            self._cache = F_DIRECT
        elif result:
            raise QemuError(FLUSH_VDI, result)
        return self._cache == F_CACHE

    def truncate(self, size: int) -> None:
        """Grows the image."""
        self.inode.put(536, size.to_bytes(8, "little"))
        self._write_header()

    def _write_header(self) -> None:
        self.server.object(WRITE, self.inode.oid, 0, bytes(self.inode.raw[:HEADER_BYTES]), copies=self.inode.copies)

    # ---- snapshots

    def snapshot(self, tag: str, *, vm_state_bytes: int = 0) -> None:
        """``savevm`` without the state, or ``qemu-img snapshot -c``: tag and state size go into the header."""
        self.inode.put(256, padded(tag))
        self.inode.put(544, vm_state_bytes.to_bytes(8, "little"))
        self._write_header()
        vid = self.server.create(
            self.name, self.inode.vdi_size, base=self.inode.vid, snapshot=True, inode=self.inode
        )  # fmt: skip
        self.inode = self._read_inode(vid)

    def go_to(self, snapshot: str) -> None:
        """``loadvm`` without the state, or ``qemu-img snapshot -a``."""
        snap_id = int(snapshot) if snapshot.isdecimal() else 0
        vid = self.server.vdi(GET_VDI_INFO, self.name, "" if snap_id else snapshot, snap_id=snap_id)
        self.inode = self._read_inode(vid)
        self.branch()

    def branch(self) -> None:
        """The working volume is deleted and a new one begins at the snapshot that is open."""
        try:
            self.server.vdi(DEL_VDI, self.name)
            deleted = True
        except QemuError:
            deleted = False
        base = self.inode
        vid = self.server.create(self.name, base.vdi_size, base=base.vid, snapshot=not deleted, inode=base)
        self.inode = self._read_inode(vid)
        self.is_snapshot = False

    def save_vm_state(self, data: bytes) -> None:
        size = 1 << self.inode.shift
        for number, at in enumerate(range(0, len(data), size)):
            oid = 1 << 62 | self.inode.vid << 32 | number
            self.server.object(CREATE, oid, 0, data[at : at + size], copies=self.inode.copies)

    def load_vm_state(self, length: int) -> bytes:
        """Of the snapshot that the working volume began at."""
        size = 1 << self.inode.shift
        return b"".join(
            self.server.object(
                READ, 1 << 62 | self.inode.parent << 32 | number, 0, length=min(size, length - at),
                copies=self.inode.copies,
            )
            for number, at in enumerate(range(0, length, size))
        )  # fmt: skip
