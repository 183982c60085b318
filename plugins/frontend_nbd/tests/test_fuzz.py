"""A whole connection under whatever clients say: it never raises, and every answer is one."""

from __future__ import annotations

import struct

import anyio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sheepdog.testing.memory_volumes import MemoryVolumes

MiB = 1024 * 1024
WRITE, DISC = 1, 2
# The fixture only makes connections, a new one for each example.
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def string(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def option(code: int, data: bytes) -> bytes:
    return struct.pack(">QII", 0x49484156454F5054, code, len(data)) + data


names = st.sampled_from([b"disk", b"disk@1", b"disk@tag", b"none", b"", b"\xff", b"disk@"])
exports = st.builds(
    lambda name, kinds: string(name) + struct.pack(f">H{len(kinds)}H", len(kinds), *kinds),
    names, st.lists(st.integers(0, 5), max_size=4),
)  # fmt: skip
contexts = st.builds(
    lambda name, queries: string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries)),
    names, st.lists(st.sampled_from([b"base:allocation", b"base:", b"qemu:x", b""]), max_size=3),
)  # fmt: skip
options = st.one_of(
    st.builds(option, st.sampled_from([6, 6, 9, 10, 7]), exports | contexts),
    st.builds(option, st.sampled_from([3, 5, 8]), st.just(b"") | st.binary(max_size=3)),
    st.builds(option, st.integers(3, 1 << 32 - 1), st.binary(max_size=40)),
)
u64 = st.integers(0, (1 << 64) - 1)
offsets = st.integers(0, 17 * MiB) | u64
lengths = st.sampled_from([0, 1, 512, 65536, 4 * MiB, 16 * MiB, 33 * MiB, (1 << 32) - 1]) | st.integers(0, 1 << 20)
commands = st.sampled_from([0, 0, 3, 4, 5, 6, 7]) | st.integers(8, 0xFFFF)
flags = st.sampled_from([0, 0, 0, 1, 2, 4, 8, 16, 19]) | st.integers(0, 0xFFFF)
requests = st.lists(
    st.tuples(flags, commands, offsets, lengths, st.just(b""))
    | st.builds(lambda f, at, data: (f, WRITE, at, len(data), data), flags, offsets, st.binary(max_size=5000)),
    max_size=12,
)  # fmt: skip


def read_option_replies(data: bytes) -> list[tuple[int, int]]:
    """(option, kind) of each reply; whatever else the bytes are is an error."""
    found = []
    while data:
        magic, code, kind, length = struct.unpack(">QIII", data[:20])
        assert magic == 0x0003E889045565A9
        assert len(data) >= 20 + length
        found.append((code, kind))
        data = data[20 + length :]
    return found


def read_replies(data: bytes, reads: dict[int, int]) -> list[int]:
    """The cookies of all answers, in order. ``reads``: the length of each read, by its cookie."""
    found = []
    while data:
        (magic,) = struct.unpack(">I", data[:4])
        if magic == 0x67446698:
            errno, cookie = struct.unpack(">IQ", data[4:16])
            end = 16 + (reads.get(cookie, 0) if not errno else 0)
        else:
            assert magic == 0x668E33EF
            done, _, cookie, length = struct.unpack(">HHQI", data[4:20])
            assert done == 1
            end = 20 + length
        assert len(data) >= end
        found.append(cookie)
        data = data[end:]
    return found


@FUZZ
@given(
    haggling=st.lists(options, max_size=8),
    structured=st.booleans(),
    name=st.sampled_from(["disk", "disk@tag"]),
    sent=requests,
    piece=st.integers(1, 5000),
)
def test_everything_is_answered(make_wire, haggling, structured, name, sent, piece):
    """Options in any order and requests of any kind, in pieces of any size: each option gets at least one reply, each
    request exactly one, of the right form, and the connection then still works."""

    async def talk():
        volumes = MemoryVolumes()
        volumes.create("disk", 16 * MiB)
        volumes.snapshot("disk", "tag")
        wire = make_wire(volumes=volumes)
        wire.feed(b"\0\0\0\3")
        for one in haggling:
            wire.feed(one, piece=piece)
            await wire.settle()
            answers = read_option_replies(wire.channel.taken())
            assert answers
            assert {code for code, _ in answers} == {int.from_bytes(one[8:12], "big")}
            if wire.connection.decoder.transmission:
                assert answers[-1][1] == 1
                break
        if not wire.connection.decoder.transmission:
            if structured:
                wire.option(8)
            wire.option(7, string(name.encode()) + b"\0\0")
            await wire.settle()
            wire.channel.taken()
        reads = {}
        stream = b""
        for cookie, (request_flags, command, offset, length, payload) in enumerate(sent):
            if command == 0:
                reads[cookie] = length
            stream += struct.pack(">IHHQQI", 0x25609513, request_flags, command, cookie, offset, length) + payload
        wire.feed(stream, piece=piece)
        answered = read_replies(wire.channel.taken(), reads)
        assert sorted(answered) == list(range(len(sent)))
        assert wire.errno(3, cookie=99) == 0
        wire.request(DISC)
        assert wire.channel.closes == 1

    anyio.run(talk)


@FUZZ
@given(data=st.binary(max_size=4000), piece=st.integers(1, 5000), start=st.booleans())
def test_noise_costs_a_connection(make_wire, data, piece, start):
    """Arbitrary bytes, from the first one on or instead of requests: nothing is raised, and at most the connection
    ends."""

    async def talk():
        volumes = MemoryVolumes()
        volumes.create("disk", 16 * MiB)
        wire = make_wire(volumes=volumes)
        if start:
            wire.feed(data, piece=piece)
        else:
            await wire.go()
            wire.feed(data, piece=piece)
        await wire.settle()
        wire.connection.closed(None)
        assert len(wire.ended) == 1

    anyio.run(talk)
