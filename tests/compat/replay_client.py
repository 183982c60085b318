"""Plays the client's side of recorded sessions to our sheep and tells where the answers differ.

A recording is a list of frames. Requests go out in the recorded order, each on the connection it was sent on, and where
the recording has an answer the player reads one, so that what happened at the same time then happens at the same time
now. Both answers are then brought to one form - ports become node numbers, directories become names, what the original
leaves undefined is cut away - and compared byte by byte.

What cannot be equal is named in ``EXCLUDED``, and nothing else is left out of the comparison. Some requests are
addressed to the holder of an object. Where an object lives depends on the ports of the nodes, which differ from the
recorded ones, so those requests go to the node that has the same rank among the holders.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from struct import unpack_from

from sheepdog.model.epochs import EPOCH_LOG_HEAD_BYTES
from sheepdog.model.ids import is_attribute, is_inode
from sheepdog.model.node import NODE_BYTES, Node, unpack_nodes
from sheepdog.model.ring import Ring
from sheepdog.model.vdi_state import VDI_STATE_BYTES
from sheepdog.testing.vectors import expand, vectors_path
from sheepdog.wire.header import HEADER_BYTES
from sheepdog.wire.opcodes import Op, op_name
from sheepdog.wire.payloads import MD_INFO_BYTES, RECOVERY_STATE_BYTES, MdInfo, Stat
from sheepdog.wire.results import Result

RECORDED_HOST = "127.0.0.1"
RECORDED_PORT = 7900  # node i listened on 7900 + i
RECORDED_PATHS = b"/srv/"
ANSWER_TIMEOUT_S = 30.0
RESTORED = frozenset({0x491497})  # the working volume that the sessions "dog-vdi-restore-*" made

# The only fields that are not compared, and why. Everything else of every frame of every session is.
EXCLUDED: Mapping[str, str] = {
    "inode 512..528, attribute 512..520": "times; only whether they are zero, and well-formed, is compared",
    "STAT_CLUSTER entry 8..16": "time of the epoch; only zero or not zero is compared",
    "node 0..24 outside of epochs": "addresses of the original's memory",
    "STAT_CLUSTER entry behind the last node": "what the original's buffer held before",
    "node 72..80, STAT_SHEEP sizes, MD_INFO free and used": "sizes of the file system of the machine",
    "node 64..66 in an old epoch whose nodes differed in size": "virtual nodes follow those sizes",
    "GET_HASH of an inode": "covers its times; holders that were equal must be equal",
    "STAT peer counters": "a change goes to one primary here and to every holder there",
    "STAT gateway counters": "the original counts its own inode I/O too; only zero or not zero is compared",
    "vdi_state 12..16 of RESTORED": "the original names the retired working volume, not the inode's parent",
    "epoch of the answer to REWEIGHT": "the new epochs begin while it is answered",
    "fields in the refusal of NEW_VDI": "undefined",
}


@dataclass(frozen=True, slots=True)
class Frame:
    """One line of a recording."""

    conn: int
    number: int
    request: bool
    port: int
    header: bytes
    size: int
    data: bytes | None  # None: only the digest is known
    digest: str | None

    @property
    def opcode(self) -> int:
        return self.header[1]

    @property
    def id(self) -> int:
        return int.from_bytes(self.header[8:12], "little")

    @property
    def result(self) -> int:
        return int.from_bytes(self.header[16:20], "little")

    @property
    def oid(self) -> int:
        return int.from_bytes(self.header[16:24], "little")

    @property
    def offset(self) -> int:
        return int.from_bytes(self.header[40:44], "little")


def read_frames(file: str) -> list[Frame]:
    """The frames of one recording, in recorded order."""
    frames = []
    with (vectors_path() / "wire" / file).open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            size = row["data_len"]
            if not size:
                data: bytes | None = b""
            elif row["data"] is not None:
                data = bytes.fromhex(row["data"])
            else:
                data = expand(row["data_nonzero"], size)
            frames.append(
                Frame(
                    conn=row["conn"],
                    number=row["t"],
                    request=row["dir"] == "c2s",
                    port=row["port"],
                    header=bytes.fromhex(row["header"]),
                    size=size,
                    data=data,
                    digest=row.get("data_sha256"),
                )
            )
    return frames


# ---- the two worlds


class World:
    """How one side of the comparison names nodes and directories."""

    def __init__(self, ports: Sequence[int], path: bytes) -> None:
        """:param path: what the names of directories begin with."""
        self.ports = tuple(ports)
        self.path = path

    def index(self, port: int) -> int:
        """Which node has that port."""
        return self.ports.index(port)


# ---- one form for both


def _nonzero(buffer: bytearray, start: int, end: int) -> None:
    """The bytes tell only whether they were all zero."""
    known = any(buffer[start:end])
    buffer[start:end] = bytes(end - start)
    buffer[start] = known


def _blank(buffer: bytearray, *ranges: tuple[int, int]) -> None:
    for start, end in ranges:
        buffer[start:end] = bytes(end - start)


def _time(buffer: bytearray, start: int) -> None:
    """Of a time in the form of inodes only that it is one is left: microseconds beside seconds, or zero."""
    seconds, fraction = buffer[start + 4 : start + 8], int.from_bytes(buffer[start : start + 4], "little")
    formed = fraction < 1_000_000_000 and fraction % 1000 == 0 and (any(seconds) or not fraction)
    buffer[start : start + 8] = (b"time" if any(seconds) else b"none") + (b"good" if formed else b"bad ")


def _node(world: World, raw: bytes, *, vnodes: bool, live: bool) -> bytes:
    record = bytearray(raw)
    _blank(record, (72, 80))
    if live:
        _blank(record, (0, 24))
    if not vnodes:
        _blank(record, (64, 66))
    _node_id(world, record, 24)
    return bytes(record)


def _node_id(world: World, record: bytearray, at: int) -> None:
    port = int.from_bytes(record[at + 16 : at + 18], "little")
    if port:
        record[at + 16 : at + 18] = world.index(port).to_bytes(2, "little")


def _nodes(world: World, raw: bytes, *, vnodes: bool = True, live: bool = True) -> bytes:
    """:param live: taken from the memory of the sheep, not from an epoch file."""
    assert len(raw) % NODE_BYTES == 0, f"{len(raw)} bytes are no whole number of nodes"
    return b"".join(
        _node(world, raw[at : at + NODE_BYTES], vnodes=vnodes, live=live) for at in range(0, len(raw), NODE_BYTES)
    )


def _epoch_log(world: World, raw: bytes, slots: int) -> bytes:
    parts = []
    stride = EPOCH_LOG_HEAD_BYTES + slots * NODE_BYTES
    for at in range(0, len(raw), stride):
        head = bytearray(raw[at : at + EPOCH_LOG_HEAD_BYTES])
        if len(head) >= 16:
            _nonzero(head, 8, 16)
        count = int.from_bytes(head[20:24], "little") if slots else 0
        # The slots behind the last node keep what the original's buffer held before.
        nodes = raw[at + EPOCH_LOG_HEAD_BYTES : at + stride][: count * NODE_BYTES]
        spaces = [node.space for node in unpack_nodes(nodes)]
        same = not spaces or max(spaces) < min(spaces) * 1.01
        parts += [bytes(head), _nodes(world, nodes, vnodes=same, live=False)]
    return b"".join(parts)


def _cluster_info(world: World, raw: bytes) -> bytes:
    count = int.from_bytes(raw[2:4], "little")
    end = 48 + count * NODE_BYTES
    return raw[:48] + _nodes(world, raw[48:end]) + raw[end:]


def _vdi_states(world: World, raw: bytes) -> bytes:
    parts = []
    for at in range(0, len(raw), VDI_STATE_BYTES):
        entry = bytearray(raw[at : at + VDI_STATE_BYTES])
        if int.from_bytes(entry[:4], "little") in RESTORED:
            _nonzero(entry, 12, 16)
        _node_id(world, entry, 20)
        parts.append(bytes(entry))
    return b"".join(parts)


def _md_info(world: World, raw: bytes) -> bytes:
    info = MdInfo.unpack(raw.ljust(MD_INFO_BYTES, b"\0"))
    disks = [replace(disk, free=0, used=0, path="") for disk in info.disks]
    paths = [disk.path.encode().replace(world.path, b"/") for disk in info.disks]
    return repr((disks, paths, len(raw))).encode()


def _object(request: Frame, raw: bytes) -> bytes:
    oid, offset = request.oid, request.offset
    times = (512, 520) if is_inode(oid) else (512,) if is_attribute(oid) else ()
    content = bytearray(raw)
    for start in times:
        if start - offset >= 0 and start + 8 - offset <= len(raw):
            _time(content, start - offset)
    return bytes(content)


def _stat(raw: bytes) -> bytes:
    counters = unpack_from(f"<{len(raw) // 8}Q", raw)
    names = [field.name for field in fields(Stat)]
    used = [name for name, value in zip(names, counters, strict=True) if value and name.startswith("gateway")]
    return repr(used).encode()


def variant_of(request: Frame, header: bytes) -> bytes:
    """What an answer's header says behind the result."""
    variant = bytearray(header[20:])
    result = int.from_bytes(header[16:20], "little")
    if request.opcode == Op.STAT_SHEEP:
        _blank(variant, (12, 28))
    elif request.opcode == Op.GET_HASH and is_inode(request.oid):
        _blank(variant, (4, 24))
    elif request.opcode == Op.NEW_VDI and result != Result.SUCCESS:
        _blank(variant, (4, 8), (12, 14))
    return bytes(variant)


def body_of(world: World, request: Frame, body: bytes) -> bytes:
    """The body of an answer in the form that both sides share."""
    match request.opcode:
        case Op.GET_NODE_LIST | Op.FORCE_RECOVER:
            return _nodes(world, body)
        case Op.STAT_CLUSTER:
            return _epoch_log(world, body, int.from_bytes(request.header[40:44], "little"))
        case Op.CLUSTER_INFO:
            return _cluster_info(world, body)
        case Op.GET_VDI_COPIES:
            return _vdi_states(world, body)
        case Op.MD_INFO:
            return _md_info(world, body)
        case Op.READ_OBJ | Op.READ_PEER:
            return _object(request, body)
        case Op.STAT:
            return _stat(body)
        case Op.STAT_RECOVERY:
            assert len(body) in (0, RECOVERY_STATE_BYTES)
            return body[:1] + body[4:]
        case _:
            return body


def first_difference(ours: bytes, recorded: bytes) -> str:
    """Where two byte strings part."""
    if len(ours) != len(recorded):
        return f"{len(ours)} bytes instead of {len(recorded)}"
    at = next(i for i in range(len(ours)) if ours[i] != recorded[i])
    count = sum(a != b for a, b in zip(ours, recorded, strict=True))
    return f"from byte {at} {ours[at : at + 24].hex()} instead of {recorded[at : at + 24].hex()} ({count} bytes differ)"


# ---- playing


class Wire:
    """One connection. Answers are handed out by id, in the order in which they came."""

    def __init__(self, port: int) -> None:
        self._stream = socket.create_connection((RECORDED_HOST, port), timeout=ANSWER_TIMEOUT_S)
        self._stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._early: list[tuple[bytes, bytes]] = []

    def send(self, header: bytes, body: bytes) -> None:
        self._stream.sendall(header + body)

    def answer(self, request_id: int) -> tuple[bytes, bytes]:
        """(header, body) of the next answer with that id."""
        for index, (header, _) in enumerate(self._early):
            if int.from_bytes(header[8:12], "little") == request_id:
                return self._early.pop(index)
        while True:
            header = self._exactly(HEADER_BYTES)
            body = self._exactly(int.from_bytes(header[12:16], "little"))
            if int.from_bytes(header[8:12], "little") == request_id:
                return header, body
            self._early.append((header, body))

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view = memoryview(data)
        while view:
            count = self._stream.recv_into(view)
            assert count, "the sheep closed the connection"
            view = view[count:]
        return bytes(data)

    def close(self) -> None:
        self._stream.close()


@dataclass(slots=True)
class Player:
    """Plays sessions of one recorded cluster to one cluster of ours."""

    recorded: World
    ours: World
    our_nodes: Callable[[], Sequence[Node]]
    recorded_nodes: tuple[Node, ...] = ()
    _hashes: dict[tuple[bytes, int], bytes] = field(default_factory=dict)

    def play(self, file: str, before: Callable[[Frame, Frame], None] | None = None) -> list[str]:
        """The differences, one line each; none is what everybody hopes for.

        :param before: called with each request and its recorded answer, just before the request is sent.
        """
        frames = read_frames(file)
        answers = _answers(frames)
        wires: dict[tuple[int, int], Wire] = {}
        sent: dict[int, tuple[Frame, Wire]] = {}
        differences: list[str] = []
        self._hashes = {}
        try:
            for frame in frames:
                if frame.request:
                    answer = answers[frame.number]
                    if before is not None:
                        before(frame, answer)
                    if frame.opcode == Op.OIDS_EXIST:
                        differences += self._play_oids_exist(frame, answer)
                        continue
                    port = self._port(frame)
                    wire = wires.get((frame.conn, port))
                    if wire is None:
                        wire = wires[frame.conn, port] = Wire(port)
                    wire.send(*self._request(frame))
                    sent[answer.number] = (frame, wire)
                elif frame.number in sent:
                    request, wire = sent.pop(frame.number)
                    header, body = wire.answer(request.id)
                    found = list(self._compare(request, frame, header, body))
                    differences += [f"{file} frame {frame.number} ({_name(request)}): {line}" for line in found]
                    if request.opcode == Op.GET_NODE_LIST and frame.data:
                        self.recorded_nodes = unpack_nodes(frame.data)
        finally:
            for wire in wires.values():
                wire.close()
        return differences

    def _request(self, frame: Frame) -> tuple[bytes, bytes]:
        """Header and body as they were sent, but for the names of directories."""
        assert frame.data is not None, f"request {frame.number} cannot be rebuilt"
        if frame.opcode not in (Op.MD_PLUG, Op.MD_UNPLUG):
            return frame.header, frame.data
        body = frame.data.replace(self.recorded.path, self.ours.path)
        return frame.header[:12] + len(body).to_bytes(4, "little") + frame.header[16:], body

    def _port(self, frame: Frame) -> int:
        """Where the request goes: the node of the same number, or of the same rank among an object's holders."""
        index = self.recorded.index(frame.port)
        if frame.opcode in (Op.GET_HASH, Op.EXIST, Op.READ_PEER):
            return self._holder(frame.oid, frame.port)
        return self.ours.ports[index]

    def _holder(self, oid: int, recorded_port: int) -> int:
        ranks = [node.id.port for node in Ring(self.recorded_nodes).holders(oid, len(self.recorded_nodes))]
        nodes = self.our_nodes()
        return Ring(nodes).holders(oid, len(nodes))[ranks.index(recorded_port)].id.port

    def _play_oids_exist(self, request: Frame, answer: Frame) -> list[str]:
        """One question about many objects: each goes to the holder of the same rank, the answers are joined."""
        assert request.data is not None
        assert answer.data is not None
        missing = b""
        result = int(Result.SUCCESS)
        for at in range(0, len(request.data), 8):
            oid = int.from_bytes(request.data[at : at + 8], "little")
            wire = Wire(self._holder(oid, request.port))
            try:
                header = bytearray(request.header)
                header[12:16] = (8).to_bytes(4, "little")
                wire.send(bytes(header), request.data[at : at + 8])
                head, body = wire.answer(request.id)
                missing += body
                result = int.from_bytes(head[16:20], "little") or result
            finally:
                wire.close()
        if (result, missing) != (answer.result, answer.data):
            return [f"frame {answer.number} ({_name(request)}): {result}, {missing.hex()} are missing"]
        return []

    def _compare(self, request: Frame, recorded: Frame, header: bytes, body: bytes) -> Iterator[str]:
        for what, start, end in (
            ("version", 0, 1),
            ("opcode", 1, 2),
            ("flags", 2, 4),
            ("epoch", 4, 8),
            ("id", 8, 12),
            ("data_length", 12, 16),
            ("result", 16, 20),
        ):
            ours, theirs = (int.from_bytes(side[start:end], "little") for side in (header, recorded.header))
            if ours != theirs and not (what == "epoch" and request.opcode == Op.REWEIGHT):
                yield f"{what} is 0x{ours:x} instead of 0x{theirs:x}"
        ours_variant, recorded_variant = variant_of(request, header), variant_of(request, recorded.header)
        if ours_variant != recorded_variant:
            yield f"the fields of the header are {ours_variant.hex()} instead of {recorded_variant.hex()}"
        if request.opcode == Op.GET_HASH and recorded.result == Result.SUCCESS:
            key = (recorded.header[24:44], request.oid)
            if self._hashes.setdefault(key, header[24:44]) != header[24:44]:
                yield "the digest differs from that of another holder"
        if recorded.data is None:
            if hashlib.sha256(body).hexdigest() != recorded.digest:
                yield "the digest of the body differs"
            return
        ours_body = body_of(self.ours, request, body)
        recorded_body = body_of(self.recorded, request, recorded.data)
        if ours_body != recorded_body:
            yield f"body: {first_difference(ours_body, recorded_body)}"


def _answers(frames: Sequence[Frame]) -> dict[int, Frame]:
    """Which answer belongs to which request, by their numbers."""
    waiting: dict[tuple[int, int], list[int]] = {}
    found: dict[int, Frame] = {}
    for frame in frames:
        key = (frame.conn, frame.id)
        if frame.request:
            waiting.setdefault(key, []).append(frame.number)
        else:
            found[waiting[key].pop(0)] = frame
    assert not any(waiting.values()), "requests without a recorded answer"
    return found


def _name(frame: Frame) -> str:
    name = op_name(frame.opcode)
    return f"{name} {frame.oid:016x}" if frame.opcode in (Op.READ_OBJ, Op.WRITE_OBJ, Op.READ_PEER) else name
