"""Requests and options on one connection, without a network."""

from __future__ import annotations

import struct

import pytest

from sheepdog.api import (
    Halted,
    InvalidParameters,
    ReadOnlyObject,
    RequestError,
    StoreError,
    StoreFull,
    VdiLocked,
)
from sheepdog_frontend_nbd import connection as connection_module
from sheepdog_frontend_nbd.exports import export_name, list_exports
from sheepdog_frontend_nbd.protocol import Errno, ExportFlag, Reply

pytestmark = pytest.mark.anyio

MiB = 1024 * 1024
KiB = 1024
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST = 1, 2, 4, 8, 16


def replies(data):
    """Option replies as (option, kind, data)."""
    found = []
    while data:
        magic, option, kind, length = struct.unpack(">QIII", data[:20])
        assert magic == 0x0003E889045565A9
        found.append((option, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def chunk(data):
    """A structured reply of one chunk as (kind, cookie, data)."""
    magic, flags, kind, cookie, length = struct.unpack(">IHHQI", data[:20])
    assert (magic, flags, len(data)) == (0x668E33EF, 1, 20 + length), data[:40]
    return kind, cookie, data[20:]


def string(text):
    return struct.pack(">I", len(text)) + text


# ---- negotiation


async def test_list_names_volumes_and_snapshots(make_wire, volumes):
    """LIST gives every volume, and snapshots as name@tag."""
    volumes.create("b", MiB)
    volumes.snapshot("disk", "monday")
    wire = make_wire()
    wire.feed(b"\0\0\0\3")

    wire.option(3)
    await wire.settle()

    found = replies(wire.channel.taken())
    names = [data[4 : 4 + struct.unpack(">I", data[:4])[0]] for _, kind, data in found if kind == Reply.SERVER]
    assert names == [b"b", b"disk@monday", b"disk"]
    assert found[-1] == (3, Reply.ACK, b"")


async def test_info_tells_size_and_abilities(make_wire):
    """INFO answers size, flags, block sizes, and what else was asked for, and leaves nothing open."""
    wire = make_wire()
    wire.feed(b"\0\0\0\3")

    wire.option(6, string(b"disk") + struct.pack(">HHH", 2, 1, 2))
    await wire.settle()

    found = replies(wire.channel.taken())
    kinds = {struct.unpack(">H", data[:2])[0]: data[2:] for _, kind, data in found if kind == Reply.INFO}
    size, flags = struct.unpack(">QH", kinds[0])
    assert size == 16 * MiB
    assert flags == (
        ExportFlag.HAS_FLAGS | ExportFlag.SEND_FLUSH | ExportFlag.SEND_FUA | ExportFlag.SEND_TRIM
        | ExportFlag.SEND_WRITE_ZEROES | ExportFlag.SEND_CACHE | ExportFlag.SEND_FAST_ZERO | ExportFlag.CAN_MULTI_CONN
    )  # fmt: skip
    assert struct.unpack(">III", kinds[3]) == (1, 4096, 32 * MiB)
    assert kinds[1] == b"disk"
    assert b"volume" in kinds[2]
    assert found[-1][1] == Reply.ACK
    assert wire.volumes.open_count == 0


@pytest.mark.parametrize(
    ("code", "data", "kind"),
    [
        (7, string(b"no such") + b"\0\0", Reply.ERR_UNKNOWN),
        (6, string(b"disk@never") + b"\0\0", Reply.ERR_UNKNOWN),
        (6, string(b"") + b"\0\0", Reply.ERR_UNKNOWN),
        (6, b"\0\0", Reply.ERR_INVALID),
        (6, string(b"disk") + b"\0\3\0\0", Reply.ERR_INVALID),
        (3, b"x", Reply.ERR_INVALID),
        (8, b"x", Reply.ERR_INVALID),
        (10, string(b"disk") + struct.pack(">I", 0), Reply.ERR_INVALID),  # before structured replies
        (5, b"", Reply.ERR_POLICY),
        (11, b"", Reply.ERR_UNSUP),
        (0x7FFFFFFF, b"what", Reply.ERR_UNSUP),
    ],
)
async def test_refused_options(make_wire, code, data, kind):
    """What cannot be is refused with its own error, and the client may go on."""
    wire = make_wire()
    wire.feed(b"\0\0\0\3")

    wire.option(code, data)
    await wire.settle()

    assert [(option, found) for option, found, _ in replies(wire.channel.taken())] == [(code, kind)]
    wire.option(8)
    assert replies(wire.channel.taken()) == [(8, Reply.ACK, b"")]


async def test_locked_volume_is_refused_by_policy(make_wire, volumes):
    """GO on a volume that another sheep holds is ERR_POLICY with the reason."""

    async def locked(name, **options):
        raise VdiLocked("VDI is already locked")

    volumes.open = locked
    wire = make_wire()
    wire.feed(b"\0\0\0\3")

    wire.option(7, string(b"disk") + b"\0\0")
    await wire.settle()

    assert replies(wire.channel.taken()) == [(7, Reply.ERR_POLICY, b"VDI is already locked")]


async def test_options_behind_a_waiting_one_keep_their_order(make_wire):
    """While an option waits for the cluster the next ones wait too."""
    wire = make_wire()

    wire.feed(b"\0\0\0\3" + b"".join(struct.pack(">QII", 0x49484156454F5054, code, 0) for code in (3, 8)))
    assert wire.channel.taken() == b""
    assert wire.channel.paused
    await wire.settle()

    assert [option for option, kind, _ in replies(wire.channel.taken()) if kind == Reply.ACK] == [3, 8]
    assert not wire.channel.paused


@pytest.mark.parametrize("zeroes", [True, False])
async def test_export_name_has_no_errors(make_wire, zeroes):
    """The old way to choose an export answers size and flags, padded unless the client knows better."""
    wire = make_wire()
    wire.feed(b"\0\0\0\1" if zeroes else b"\0\0\0\3")
    wire.option(1, b"disk")
    await wire.settle()

    answer = wire.channel.taken()
    assert len(answer) == (134 if zeroes else 10)
    assert struct.unpack(">Q", answer[:8]) == (16 * MiB,)
    assert wire.errno(WRITE, 0, 2, payload=b"ab") == 0

    other = make_wire()
    other.feed(b"\0\0\0\3")
    other.option(1, b"nothing")
    await other.settle()
    assert other.channel.taken() == b""
    assert other.channel.closes == 1


async def test_abort_is_acknowledged(make_wire):
    """ABORT is answered and the connection closed."""
    wire = make_wire()
    wire.feed(b"\0\0\0\3")

    wire.option(2)

    assert replies(wire.channel.taken()) == [(2, Reply.ACK, b"")]
    assert wire.channel.closes == 1


async def test_required_tls_comes_first(make_wire):
    """Where TLS is required nothing else is answered before it."""
    upgrades = []
    wire = make_wire(start_tls=lambda: upgrades.append(1), tls_missing=True)
    wire.feed(b"\0\0\0\3")

    for code in (3, 6, 7, 8, 99):
        wire.option(code)
    assert {kind for _, kind, _ in replies(wire.channel.taken())} == {Reply.ERR_TLS_REQD}
    wire.option(5, b"x")
    assert replies(wire.channel.taken())[0][1] == Reply.ERR_INVALID
    wire.option(5)
    assert replies(wire.channel.taken()) == [(5, Reply.ACK, b"")]
    assert upgrades == [1]

    other = make_wire(start_tls=lambda: None, tls_missing=True)
    other.feed(b"\0\0\0\3")
    other.option(1, b"disk")
    assert other.channel.closes == 1


async def test_endless_negotiation_is_ended(make_wire):
    """A client that asks for ever is disconnected."""
    wire = make_wire()
    wire.feed(b"\0\0\0\3")

    for _ in range(1001):
        wire.option(99)

    assert wire.channel.closes == 1


async def test_meta_contexts(make_wire):
    """base:allocation is listed and chosen; unknown contexts are not; the choice holds for its export only."""
    wire = make_wire()
    wire.feed(b"\0\0\0\3")
    wire.option(8)
    wire.channel.taken()

    answers = []
    listing, choosing = 9, 10
    asked = [(listing, []), (listing, [b"base:"]), (listing, [b"qemu:x"])]
    asked += [(choosing, [b"base:allocation", b"x:y"]), (choosing, [b"x:y"])]
    for code, queries in asked:
        wire.option(code, string(b"disk") + struct.pack(">I", len(queries)) + b"".join(map(string, queries)))
        await wire.settle()
        answers.append([kind for _, kind, _ in replies(wire.channel.taken())])

    yes, no = [Reply.META_CONTEXT, Reply.ACK], [Reply.ACK]
    assert answers == [yes, yes, no, yes, no]
    wire.option(7, string(b"disk") + b"\0\0")
    await wire.settle()
    wire.channel.taken()
    kind, _, data = chunk(wire.request(STATUS, 0, 512))
    assert (kind, data[:4]) == (0x8001, struct.pack(">I", Errno.EINVAL))  # the last choice was of nothing


# ---- requests


async def test_simple_replies(make_wire):
    """Without structured replies a read is a simple reply with its data behind it."""
    wire = make_wire()
    await wire.go()

    assert wire.errno(WRITE, 10, 5, payload=b"hello") == 0
    assert wire.request(READ, 9, 7, cookie=77) == struct.pack(">IIQ", 0x67446698, 0, 77) + b"\0hello\0"


async def test_structured_replies(make_wire):
    """Reads are one chunk of data, or a hole where nothing is; errors carry a text."""
    wire = make_wire()
    await wire.go(structured=True)
    assert wire.errno(WRITE, 10, 5, payload=b"hello") == 0

    assert chunk(wire.request(READ, 9, 7, cookie=3)) == (1, 3, struct.pack(">Q", 9) + b"\0hello\0")
    assert chunk(wire.request(READ, 8 * MiB, 64 * KiB, cookie=4, flags=DF)) == (
        2, 4, struct.pack(">QI", 8 * MiB, 64 * KiB),
    )  # fmt: skip
    assert chunk(wire.request(READ, 0, 0)) == (0, 1, b"")
    kind, _, data = chunk(wire.request(READ, 16 * MiB, 1))
    assert kind == 0x8001
    assert struct.unpack(">I", data[:4]) == (Errno.EINVAL,)
    assert b"end" in data[6:]


async def test_replies_of_one_receive_leave_together(make_wire):
    """Requests that arrive together are answered by one write to the channel."""
    wire = make_wire()
    await wire.go()

    wire.feed(b"".join(struct.pack(">IHHQQI", 0x25609513, 0, READ, n, n * 512, 512) for n in range(32)))

    assert len(wire.channel.writes) == 1
    assert len(wire.channel.writes[0]) == 32 * (16 + 512)


@pytest.mark.parametrize(
    ("error", "errno"),
    [
        (StoreFull("full"), Errno.ENOSPC),
        (ReadOnlyObject("ro"), Errno.EPERM),
        (InvalidParameters("bad"), Errno.EINVAL),
        (StoreError("disk"), Errno.EIO),
        (Halted("halt"), Errno.EIO),
        (RequestError("mem", result=0x12), Errno.ENOMEM),
        (RequestError("stopping", result=0x11), Errno.ESHUTDOWN),
        (RequestError("killed", result=0x8D), Errno.ESHUTDOWN),
        (RuntimeError("a bug"), Errno.EIO),
    ],
)
async def test_errors_have_numbers(make_wire, volumes, error, errno):
    """Each error of the volume is the number that clients know."""
    wire = make_wire()
    await wire.go()
    for method in ("write", "read", "flush", "discard", "write_zeroes"):
        volumes.fail_next(method, error)

    assert wire.errno(WRITE, 0, 1, payload=b"x") == errno
    assert wire.errno(READ, 0, 1) == errno
    assert wire.errno(FLUSH) == errno
    assert wire.errno(TRIM, 0, 4 * MiB) == errno
    assert wire.errno(ZEROES, 0, 1) == errno
    assert wire.errno(WRITE, 0, 1, payload=b"x") == 0


@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "errno"),
    [
        (READ, 16 * MiB, 1, 0, Errno.EINVAL),
        (READ, (1 << 64) - 1, 1, 0, Errno.EINVAL),
        (READ, 0, 1, 0x80, Errno.EINVAL),
        (WRITE, 16 * MiB - 1, 2, 0, Errno.ENOSPC),
        (WRITE, 0, 2, NO_HOLE, Errno.EINVAL),
        (TRIM, 16 * MiB, 1, 0, Errno.EINVAL),
        (ZEROES, 16 * MiB, 1, 0, Errno.ENOSPC),
        (CACHE, 16 * MiB, 1, 0, Errno.EINVAL),
        (FLUSH, 0, 0, 0x40, Errno.EINVAL),
        (STATUS, 0, 1, 0, Errno.EINVAL),  # not negotiated
        (99, 0, 0, 0, Errno.EINVAL),
    ],
)
async def test_requests_that_make_no_sense(make_wire, command, offset, length, flags, errno):
    """They are refused with the right number, and the connection goes on."""
    wire = make_wire()
    await wire.go()

    payload = b"xy"[:length] if command == WRITE else b""
    assert wire.errno(command, offset, length, flags=flags, payload=payload) == errno
    assert wire.errno(FLUSH) == 0


async def test_oversized_reads_are_refused(make_wire, volumes):
    """A read above the announced maximum is EINVAL, or EOVERFLOW when the client wants it in one piece; who has no
    structured replies cannot want that."""
    volumes.create("big", 64 * MiB)
    wire = make_wire()
    await wire.go("big")
    assert wire.errno(READ, 0, 32 * MiB + 1) == Errno.EINVAL
    assert wire.errno(CACHE, 0, 32 * MiB + 1) == Errno.EINVAL

    structured = make_wire()
    await structured.go("big", structured=True)
    for flags, errno in ((DF, Errno.EOVERFLOW), (0, Errno.EINVAL), (FUA | DF, Errno.EOVERFLOW)):
        kind, _, data = chunk(structured.request(READ, 0, 32 * MiB + 1, flags=flags))
        assert (kind, data[:4]) == (0x8001, struct.pack(">I", errno))
    assert wire.errno(READ, 0, 1, flags=DF) == Errno.EINVAL
    assert len(structured.request(READ, 0, 32 * MiB)) == 20 + 12  # a hole


async def test_oversized_write_ends_the_connection(make_wire):
    """The payload of a write above the maximum is not taken in."""
    wire = make_wire()
    await wire.go()

    wire.request(WRITE, 0, 32 * MiB + 1)

    assert wire.channel.closes == 1


async def test_flush_and_fua_reach_the_volume(make_wire, volumes):
    """A flush is a flush; FUA answers only after one; a failed flush fails the write."""
    wire = make_wire()
    await wire.go()

    assert wire.errno(WRITE, 0, 1, payload=b"x") == 0
    assert volumes.unflushed("disk") == 1
    assert wire.errno(FLUSH) == 0
    assert volumes.unflushed("disk") == 0
    for command, length, payload in ((WRITE, 1, b"y"), (TRIM, 4 * MiB, b""), (ZEROES, 100, b"")):
        assert wire.errno(command, 0, length, flags=FUA, payload=payload) == 0
        assert volumes.unflushed("disk") == 0
    assert volumes.flushes == 4
    volumes.fail_next("flush", StoreError("no"))
    assert wire.errno(WRITE, 0, 1, flags=FUA, payload=b"z") == Errno.EIO


async def test_trim_and_zeroes(make_wire, volumes):
    """TRIM frees whole objects; WRITE_ZEROES frees them unless NO_HOLE; both leave zeros."""
    wire = make_wire()
    await wire.go(structured=True, status=True)
    assert wire.errno(WRITE, 0, 16 * MiB, payload=b"\xaa" * 16 * MiB) == 0

    assert wire.errno(TRIM, 0, 4 * MiB) == 0
    assert wire.errno(ZEROES, 4 * MiB, 4 * MiB) == 0
    assert wire.errno(ZEROES, 8 * MiB, 4 * MiB, flags=NO_HOLE) == 0

    kind, _, data = chunk(wire.request(STATUS, 0, 16 * MiB))
    assert kind == 5
    assert struct.unpack(">I4I", data) == (1, 8 * MiB, 3, 8 * MiB, 0)
    assert volumes.content("disk") == bytes(12 * MiB) + b"\xaa" * 4 * MiB


async def test_fast_zero_is_honest(make_wire):
    """FAST_ZERO succeeds where only the map changes and is ENOTSUP where data would be written."""
    wire = make_wire()
    await wire.go()
    assert wire.errno(WRITE, 0, 8 * MiB, payload=b"\xaa" * 8 * MiB) == 0

    assert wire.errno(ZEROES, 0, 4 * MiB, flags=FAST) == 0  # a whole object
    assert wire.errno(ZEROES, 0, 100, flags=FAST) == 0  # a hole by now
    assert wire.errno(ZEROES, 4 * MiB, 100, flags=FAST) == Errno.ENOTSUP
    assert wire.errno(ZEROES, 4 * MiB + 1, 4 * MiB, flags=FAST) == Errno.ENOTSUP
    assert wire.errno(ZEROES, 2 * MiB, 5 * MiB, flags=FAST) == Errno.ENOTSUP
    assert wire.errno(ZEROES, 12 * MiB, 4 * MiB, flags=FAST | NO_HOLE) == Errno.ENOTSUP
    assert wire.errno(ZEROES, 2 * MiB, 14 * MiB, flags=FAST) == 0


async def test_block_status_of_one_extent(make_wire):
    """REQ_ONE gives the first extent, within the range; without it all of them."""
    wire = make_wire()
    await wire.go(structured=True, status=True)
    wire.errno(WRITE, 4 * MiB, 1, payload=b"x")

    one = chunk(wire.request(STATUS, MiB, 10 * MiB, flags=REQ_ONE))[2]
    everything = chunk(wire.request(STATUS, MiB, 10 * MiB))[2]

    assert struct.unpack(">I2I", one) == (1, 3 * MiB, 3)
    assert struct.unpack(">I6I", everything) == (1, 3 * MiB, 3, 4 * MiB, 0, 3 * MiB, 3)
    assert chunk(wire.request(STATUS, 0, 0))[0] == 0x8001


async def test_cache_reads(make_wire, volumes):
    """CACHE reads the range and answers without data."""
    wire = make_wire()
    await wire.go()
    volumes.calls.clear()

    assert wire.request(CACHE, 0, 4096) == struct.pack(">IIQ", 0x67446698, 0, 1)
    assert volumes.calls == ["read"]


@pytest.mark.parametrize("which", ["disk@monday", "disk@1", "server"])
async def test_read_only_exports(make_wire, volumes, which):
    """Snapshots, and everything on a read-only server, can be read and not changed."""
    volumes.snapshot("disk", "monday")
    wire = make_wire(read_only=which == "server")
    await wire.go("disk" if which == "server" else which)

    assert wire.errno(WRITE, 0, 1, payload=b"x") == Errno.EPERM
    assert wire.errno(TRIM, 0, 4 * MiB) == Errno.EPERM
    assert wire.errno(ZEROES, 0, 1) == Errno.EPERM
    assert wire.errno(FLUSH) == 0
    assert wire.request(READ, 0, 1)[16:] == b"\0"


async def test_tag_of_digits_is_found(make_wire, volumes):
    """A number that is no snapshot id is tried as a tag; a name with an at sign is that volume first."""
    volumes.snapshot("disk", "2024")
    volumes.create("a@b", MiB)

    for name in ("disk@2024", "a@b"):
        wire = make_wire()
        await wire.go(name)
        assert wire.errno(FLUSH) == 0


async def test_listed_snapshots_are_found_by_their_names(make_wire, volumes):
    """Every name in LIST opens what it stands for, also when a tag looks like the id of another snapshot or has an at
    sign in it."""
    for tag in ("3", "monday", "x@y"):
        volumes.snapshot("disk", tag)

    for name, _ in await list_exports(volumes):
        wire = make_wire()
        await wire.go(name)
        assert export_name(wire.connection.volume.info) == name


# ---- bounds and ends


async def test_requests_in_flight_are_bounded(make_wire, volumes):
    """Beyond the limit nothing is read from the client until requests end; then everything is answered."""
    wire = make_wire()
    await wire.go()
    volumes.hold()
    count = connection_module.REQUESTS_MAX + 50
    volumes.calls.clear()

    wire.feed(b"".join(struct.pack(">IHHQQI", 0x25609513, 0, READ, n, 0, 512) for n in range(count)))

    assert volumes.held == connection_module.REQUESTS_MAX
    assert wire.channel.paused
    volumes.let_go()
    assert len(volumes.calls) == count
    assert not wire.channel.paused
    assert len(wire.channel.taken()) == count * (16 + 512)


async def test_bytes_in_flight_are_bounded(make_wire, volumes):
    """Large reads count by their size."""
    volumes.create("big", 64 * MiB)
    wire = make_wire()
    await wire.go("big")
    volumes.hold()

    wire.feed(b"".join(struct.pack(">IHHQQI", 0x25609513, 0, READ, n, 0, 32 * MiB) for n in range(5)))

    assert volumes.held == 2
    assert wire.channel.paused
    volumes.let_go(newest_first=True)
    assert len(wire.channel.taken()) == 5 * (16 + 32 * MiB)


async def test_congestion_stops_reading(make_wire):
    """A client that does not take its answers is not read from."""
    wire = make_wire()
    await wire.go()

    wire.channel.is_congested = True
    wire.request(READ, 0, 512)
    assert wire.channel.paused
    wire.channel.is_congested = False
    wire.connection.writable()

    assert not wire.channel.paused


async def test_disc_waits_for_what_is_in_flight(make_wire, volumes):
    """After DISC nothing more is read; requests in flight are answered before the connection closes."""
    wire = make_wire()
    await wire.go()
    volumes.hold()

    wire.request(WRITE, 0, 1, payload=b"x")
    wire.request(DISC)
    wire.feed(b"whatever follows" * 1000)
    assert wire.channel.closes == 0
    volumes.let_go()

    assert wire.channel.taken() == struct.pack(">IIQ", 0x67446698, 0, 1)
    assert wire.channel.closes >= 1
    assert wire.ended == []
    wire.connection.closed(None)
    assert wire.ended == [wire.connection]
    assert volumes.abandoned == 0


async def test_lost_connection_ends_when_requests_have_ended(make_wire, volumes):
    """The end is told once, after the last request came back, so the volume is not closed under it."""
    wire = make_wire()
    await wire.go()
    volumes.hold()
    wire.request(READ, 0, 512)
    wire.request(WRITE, 0, 1, payload=b"x", flags=FUA)

    wire.connection.closed(ConnectionResetError("gone"))
    assert wire.ended == []
    assert volumes.abandoned == 1  # a write that waits for the cluster must not be made after what the client does next
    volumes.let_go()

    assert wire.ended == [wire.connection]
    assert wire.channel.taken() == b""


async def test_lost_while_opening(make_wire):
    """A client that vanishes while its volume is opened does not leave the volume behind."""
    wire = make_wire()
    wire.feed(b"\0\0\0\3")
    wire.option(7, string(b"disk") + b"\0\0")

    wire.connection.closed(None)
    assert wire.ended == []
    await wire.settle()

    assert wire.ended == [wire.connection]
    assert wire.connection.volume is not None  # for its owner to close


async def test_violation_with_requests_in_flight(make_wire, volumes):
    """Garbage behind good requests: those are answered, then the connection closes."""
    wire = make_wire()
    await wire.go()
    volumes.hold()

    wire.request(READ, 0, 512)
    wire.feed(b"garbage that is no request at all, certainly")
    wire.feed(b"more" * 100_000)
    volumes.let_go()

    assert len(wire.channel.taken()) == 16 + 512
    assert wire.channel.closes >= 1


@pytest.mark.parametrize("piece", [1, 7, 4096])
async def test_large_write_in_pieces(make_wire, volumes, piece):
    """A payload above 64 KiB arrives whole however it is cut, and the next request is found behind it."""
    wire = make_wire()
    await wire.go()
    data = bytes(range(256)) * 300
    stream = struct.pack(">IHHQQI", 0x25609513, 0, WRITE, 1, 5, len(data)) + data
    stream += struct.pack(">IHHQQI", 0x25609513, 0, READ, 2, 5, 10)

    wire.feed(stream, piece=piece)

    assert wire.channel.taken()[-10:] == data[:10]
    assert volumes.content("disk")[5 : 5 + len(data)] == data
