"""The framing: whole requests come out however the bytes come in, and nothing unbounded goes on."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.errors import ProtocolError
from sheepdog.testing.vectors import vectors_path
from sheepdog.wire.codec import BODY_BYTES_MAX, DIRECT_BYTES_MIN, request_decoder, response_decoder
from sheepdog.wire.header import HEADER_BYTES, Request, Response, unpack_request, unpack_response


def feed(decoder, data, cuts):
    """All frames of ``data``, delivered in pieces that end at the given places."""
    frames = []
    position = 0
    for cut in [*sorted(cut % (len(data) + 1) for cut in cuts), len(data)]:
        while position < cut:
            buffer = decoder.get_buffer()
            assert len(buffer) > 0
            count = min(len(buffer), cut - position)
            buffer[:count] = data[position : position + count]
            position += count
            frames.extend(decoder.received(count))
    return frames


bodies = st.one_of(
    st.binary(max_size=200),
    st.integers(DIRECT_BYTES_MIN - 2, DIRECT_BYTES_MIN + 2).map(lambda size: bytes([size % 251]) * size),
)
requests = st.builds(
    lambda opcode, id_, oid, offset, body: Request(
        opcode, id=id_, oid=oid, offset=offset, flags=1 if body else 0, data_length=len(body), body=body
    ),
    st.sampled_from([0x01, 0x02, 0x03, 0xA5]),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**32 - 1),
    bodies,
)


@given(st.lists(requests, max_size=6), st.lists(st.integers(0, 10**6), max_size=12))
def test_requests_survive_any_cutting(sent, cuts):
    """Encode and decode are inverse, wherever the stream is cut."""
    data = b"".join(request.pack() + request.body for request in sent)
    decoder = request_decoder()

    got = feed(decoder, data, cuts)

    assert [(r.pack(), bytes(r.body)) for r in got] == [(r.pack(), r.body) for r in sent]
    assert decoder.idle


@given(st.lists(st.tuples(st.integers(0, 2**32 - 1), bodies), max_size=5), st.lists(st.integers(0, 10**6), max_size=9))
def test_responses_survive_any_cutting(sent, cuts):
    """The same for answers, whose body needs no flag."""
    answers = [Response(0, opcode=2, id=id_, body=body) for id_, body in sent]
    data = b"".join(answer.pack() + bytes(answer.body) for answer in answers)

    got = feed(response_decoder(), data, cuts)

    assert [(r.id, bytes(r.body)) for r in got] == sent


@given(st.binary(max_size=5000), st.lists(st.integers(0, 5000), max_size=8))
def test_garbage_never_does_more_than_fail(data, cuts):
    """Any bytes are frames, the beginning of one, or a ProtocolError."""
    try:
        feed(request_decoder(), data, cuts)
    except ProtocolError:
        pass


def test_small_bodies_are_owned():
    """A small body stays as it was when the receive buffer is used again."""
    decoder = request_decoder()
    first = Request(3, flags=1, data_length=4, body=b"aaaa")
    second = Request(3, flags=1, data_length=4, body=b"bbbb")
    got = feed(decoder, first.pack() + b"aaaa", []) + feed(decoder, second.pack() + b"bbbb", [])

    assert [bytes(request.body) for request in got] == [b"aaaa", b"bbbb"]


def test_large_body_has_its_own_buffer():
    """Once its header is known, a large body is received where it stays."""
    decoder = request_decoder()
    request = Request(3, flags=1, data_length=1 << 20)
    feed(decoder, request.pack(), [])

    buffer = decoder.get_buffer()

    assert len(buffer) == 1 << 20


@pytest.mark.parametrize("length", [BODY_BYTES_MAX + 1, 2**32 - 1])
def test_oversized_body_is_refused(length):
    """A header that announces too much is refused before anything is allocated."""
    request = Request(3, flags=1, data_length=length)
    with pytest.raises(ProtocolError):
        feed(request_decoder(), request.pack(), [])


def test_bodies_as_large_as_objects():
    """Where there are objects that are larger than the limit, a body may be as large as the largest one, no more."""
    largest = BODY_BYTES_MAX
    decoder = request_decoder(larger=lambda: largest)
    request = Request(3, flags=1, data_length=BODY_BYTES_MAX + 1)
    largest += 1
    assert feed(decoder, request.pack(), []) == []
    assert len(decoder.get_buffer()) == BODY_BYTES_MAX + 1
    with pytest.raises(ProtocolError):
        feed(request_decoder(larger=lambda: largest - 1), request.pack(), [])


def test_length_without_write_flag_is_no_body():
    """Without WRITE the length only announces the client's buffer."""
    request = Request(2, data_length=2**32 - 1)

    assert len(feed(request_decoder(), request.pack() * 2, [])) == 2


def recorded():
    path = vectors_path() / "wire"
    return sorted(path.glob("*.jsonl"))


def test_recorded_headers_round_trip():
    """Every recorded header decodes and encodes to the same bytes (padding included, as far as it is ours to send)."""
    count = 0
    for file in recorded():
        for line in file.read_text().splitlines():
            frame = json.loads(line)
            raw = bytes.fromhex(frame["header"])
            assert len(raw) == HEADER_BYTES
            if frame["dir"] == "c2s":
                request = unpack_request(raw)
                assert request.pack()[:35] == raw[:35], file.name
                assert request.pack()[36:] == raw[36:], file.name
            else:
                response = unpack_response(raw)
                response.body = bytes(response.data_length)
                assert response.pack() == raw, file.name
            count += 1
    assert count > 1000


def test_recorded_sessions_decode_as_streams():
    """Each recorded connection is a stream of whole frames with the recorded body lengths."""
    for file in recorded()[:60]:
        streams = {}
        lengths = {}
        for line in file.read_text().splitlines():
            frame = json.loads(line)
            key = (frame["conn"], frame["port"], frame["dir"])
            streams.setdefault(key, []).append(bytes.fromhex(frame["header"]) + bytes(frame["data_len"]))
            lengths.setdefault(key, []).append(frame["data_len"])
        for key, pieces in streams.items():
            decoder = request_decoder() if key[2] == "c2s" else response_decoder()
            got = feed(decoder, b"".join(pieces), [])
            assert [len(frame.body) for frame in got] == lengths[key], (file.name, key)


def test_a_body_goes_where_it_is_wanted():
    """A large body is received in the place that was given for it; one that does not fit ends the connection."""
    large = bytes(range(256)) * (DIRECT_BYTES_MIN // 128)
    place = bytearray(len(large))
    answer = Response(id=7, body=large)
    decoder = response_decoder(place=lambda response: memoryview(place) if response.id == 7 else None)
    (frame,) = feed(decoder, answer.pack() + large, [100_000])
    assert place == large and frame.body.obj is place
    answer.id = 8
    (frame,) = feed(decoder, answer.pack() + large, [100_000])
    assert frame.body == large and frame.body is not place
    narrow = response_decoder(place=lambda _: memoryview(bytearray(len(large) - 1)))
    with pytest.raises(ProtocolError):
        feed(narrow, answer.pack() + large, [100_000])
