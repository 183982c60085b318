"""Taking apart what clients send, whatever it is and however it is cut."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepdog_frontend_nbd import protocol
from sheepdog_frontend_nbd.decoder import COPY_BYTES_MAX, Decoder
from sheepdog_frontend_nbd.protocol import OPTION_MAGIC, REQUEST_BYTES_MAX, REQUEST_MAGIC, BadOption, ProtocolViolation

GREETED = b"\0\0\0\3"


class Recorder:
    """Keeps what the decoder hands on; GO ends the negotiation."""

    def __init__(self):
        self.heard = []
        self.decoder = Decoder(self)

    def client_flags(self, flags):
        self.heard.append(("flags", flags))

    def option(self, code, data):
        self.heard.append(("option", code, data))
        if code == protocol.Option.GO:
            self.decoder.transmission = True

    def request(self, flags, command, cookie, offset, length, payload):
        self.heard.append((command, flags, cookie, offset, length, None if payload is None else bytes(payload)))

    def feed(self, data, pieces=(1 << 30,)):
        view = memoryview(data)
        turn = 0
        while view:
            target = self.decoder.get_buffer()
            assert len(target)
            count = min(len(target), len(view), pieces[turn % len(pieces)])
            turn += 1
            target[:count] = view[:count]
            self.decoder.received(count)
            view = view[count:]


def option(code, data=b""):
    return struct.pack(">QII", OPTION_MAGIC, code, len(data)) + data


def request(command, flags=0, cookie=0, offset=0, length=0, payload=b""):
    return struct.pack(">IHHQQI", REQUEST_MAGIC, flags, command, cookie, offset, length) + payload


u64 = st.integers(0, (1 << 64) - 1)
options = st.builds(lambda code, data: ("option", code, data), st.integers(8, 1 << 31), st.binary(max_size=300))
plain_requests = st.tuples(
    st.integers(2, 0xFFFF), st.integers(0, 0xFFFF), u64, u64, st.integers(0, (1 << 32) - 1), st.none()
)
payloads = st.one_of(
    st.binary(max_size=200),
    st.sampled_from([COPY_BYTES_MAX - 1, COPY_BYTES_MAX, COPY_BYTES_MAX + 1, 300_000]).map(lambda n: b"\x5a" * n),
)
writes = st.builds(lambda f, c, o, d: (1, f, c, o, len(d), d), st.integers(0, 0xFFFF), u64, u64, payloads)
pieces = st.lists(st.sampled_from([1, 3, 27, 28, 29, 1000, 65536, 1 << 20]), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.lists(options, max_size=5), st.lists(st.one_of(plain_requests, writes), max_size=8), pieces)
def test_any_cutting_gives_the_same_messages(before, requests, cut):
    """What a client sends is handed on complete and in order, however the network cuts it."""
    data = GREETED + b"".join(option(code, data) for _, code, data in before) + option(protocol.Option.GO)
    for command, flags, cookie, offset, length, payload in requests:
        data += request(command, flags, cookie, offset, length, payload or b"")
    if len(data) > 20_000:
        cut = [max(count, 1000) for count in cut]
    recorder = Recorder()

    recorder.feed(data, cut)

    assert recorder.heard == [("flags", 3), *before, ("option", 7, b""), *requests]
    assert recorder.decoder.waiting == 0


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=4000), pieces, st.sampled_from([b"", GREETED, GREETED + option(7)]))
def test_garbage_is_a_violation_and_nothing_else(data, cut, before):
    """Arbitrary bytes are waited for or refused; no other exception leaves the decoder."""
    recorder = Recorder()

    try:
        recorder.feed(before + data, cut)
    except ProtocolViolation:
        pass

    assert recorder.decoder.waiting <= len(before) + len(data)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_option_data_parses_or_is_bad(data):
    """The data of an option is understood or a BadOption, never a traceback."""
    for parse in (protocol.parse_info, protocol.parse_meta_context):
        try:
            name, rest = parse(data)
        except BadOption:
            continue
        assert isinstance(name, bytes) and isinstance(rest, list)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=100), st.lists(st.binary(max_size=50), max_size=5))
def test_meta_context_queries_survive(name, queries):
    """Names and queries come out as they went in."""
    strings = [struct.pack(">I", len(text)) + text for text in (name, *queries)]
    data = strings[0] + struct.pack(">I", len(queries)) + b"".join(strings[1:])

    assert protocol.parse_meta_context(data) == (name, queries)


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\4",
        GREETED + b"IHAVEOPQ" + bytes(8),
        GREETED + struct.pack(">QII", OPTION_MAGIC, 3, protocol.OPTION_BYTES_MAX + 1),
        GREETED + option(7) + struct.pack(">IHHQQI", REQUEST_MAGIC + 1, 0, 0, 0, 0, 0),
        GREETED + option(7) + struct.pack(">IHHQQI", REQUEST_MAGIC, 0, 1, 0, 0, REQUEST_BYTES_MAX + 1),
    ],
    ids=["flags", "option magic", "large option", "request magic", "large write"],
)
def test_violations(data):
    """Unknown flags, wrong magic numbers and sizes beyond the limits end the connection."""
    with pytest.raises(ProtocolViolation):
        Recorder().feed(data)


def test_large_payload_is_received_in_place():
    """A payload above 64 KiB gets a buffer of its own, into which the rest is received."""
    recorder = Recorder()
    recorder.feed(GREETED + option(7))

    recorder.feed(request(1, length=1 << 20, payload=b"abc"))

    assert len(recorder.decoder.get_buffer()) == (1 << 20) - 3
    recorder.feed(b"d" * ((1 << 20) - 3) + request(0, length=5))
    assert recorder.heard[-2][5] == b"abc" + b"d" * ((1 << 20) - 3)
    assert recorder.heard[-1][0] == 0


def test_blocked_decoder_keeps_its_messages():
    """While blocked nothing is handed on, and nothing is lost."""
    recorder = Recorder()
    recorder.feed(GREETED + option(7))
    recorder.decoder.blocked = True

    recorder.feed(request(0, cookie=1) + request(0, cookie=2))
    assert len(recorder.heard) == 2
    recorder.decoder.blocked = False
    recorder.decoder.pump()

    assert [entry[2] for entry in recorder.heard[2:]] == [1, 2]
