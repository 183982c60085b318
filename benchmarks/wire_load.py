"""Load generator that speaks the Sheepdog wire protocol to one sheep.

Meant to cost as little CPU as Python can, because client and cluster share the machine: headers are packed by hand,
there is one ``BufferedProtocol`` for each connection on uvloop, all requests that one receive sets free leave in one
write, and bodies of reads are skipped without a copy unless they are verified.

It behaves as a block client does (docs/wire-protocol.md): looks the volume up (or creates it), reads its inode, creates
missing objects with CREATE_AND_WRITE_OBJ and then their map entries with WRITE_OBJ, and from then on reads and writes
inside objects that exist.

    python benchmarks/wire_load.py --address 127.0.0.1:7000 --vdi bench --op write --block 4k --depth 16 --seconds 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import resource
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

OBJECT_REQUEST = struct.Struct("<BBHIIIQQBBBBIII")  # the last field is padding
VDI_REQUEST = struct.Struct("<BBHIIIQIBBBBII8x")
RESPONSE = struct.Struct("<BBHIIII")
HEADER_BYTES = 48
PROTO_VER = 2

CREATE_AND_WRITE_OBJ, READ_OBJ, WRITE_OBJ = 0x01, 0x02, 0x03
NEW_VDI, GET_VDI_INFO = 0x11, 0x14
WRITE, COW = 0x01, 0x02
NO_VDI = 0x08

INODE_BIT = 1 << 63
COPIES_OFFSET, SHIFT_OFFSET, MAP_OFFSET, SHORT_INODE_BYTES = 554, 555, 4664, 4198968
KiB, MiB, GiB = 1024, 1024**2, 1024**3
RECEIVE_BYTES = 1 * MiB
SETUP_DEPTH = 4
STALL_S = 60.0  # without any response


class LoadError(Exception):
    """The sheep refused, answered what no correct sheep answers, or stopped answering."""


@dataclass
class Options:
    address: str
    vdi: str = "bench"
    op: str = "write"  # read, write or mixed
    pattern: str = "random"  # random or sequential
    block: int = 4 * KiB
    depth: int = 16  # requests in flight on each connection
    connections: int = 1
    size: int = 256 * MiB  # of the volume, when it is created; the load uses this much of it
    seconds: float = 5.0
    count: int = 0  # requests; 0: as many as fit into the time
    verify: bool = False
    seed: int = 1
    until: Callable[[], bool] | None = None  # ends the load before its time


@dataclass
class Report:
    op: str
    pattern: str
    block: int
    depth: int
    connections: int
    requests: int
    seconds: float
    per_second: float
    mb_per_second: float  # 10^6 bytes
    p50_ms: float
    p95_ms: float
    p99_ms: float
    p999_ms: float
    max_ms: float
    client_cpu_us: float  # of this process, for each request
    verified_blocks: int


def object_request(
    opcode: int, flags: int, request_id: int, length: int, oid: int, offset: int, copies: int, cow_oid: int = 0
) -> bytes:
    """The 48 bytes of an object request."""
    return OBJECT_REQUEST.pack(
        PROTO_VER, opcode, flags, 0, request_id, length, oid, cow_oid, copies, 0, 0, 0, 0, offset, 0
    )


class Connection(asyncio.BufferedProtocol):
    """Splits what arrives into responses and hands all that one receive completed to ``on_pass``."""

    def __init__(self) -> None:
        self.buffer = bytearray(RECEIVE_BYTES)
        self.view = memoryview(self.buffer)
        self.filled = 0
        self.body_left = 0
        self.keep_bodies = False
        self.bodies: dict[int, bytearray] = {}
        self.headers: dict[int, bytes] = {}  # with keep_bodies
        self.current = (0, 0)  # (id, result) of the response whose body is arriving
        self.waiters: dict[int, asyncio.Future[int]] = {}
        self.on_pass: Callable[[list[tuple[int, int]]], None] = self._answer_waiters
        self.on_lost: Callable[[Exception], None] | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's is no subclass of asyncio.Transport

    def connection_lost(self, exc: Exception | None) -> None:
        lost = exc or ConnectionError("the sheep closed the connection")
        for waiter in self.waiters.values():
            if not waiter.done():
                waiter.set_exception(lost)
        if self.on_lost is not None:
            self.on_lost(lost)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.view[self.filled :]

    def buffer_updated(self, nbytes: int) -> None:
        end = self.filled + nbytes
        position = 0
        completed: list[tuple[int, int]] = []
        while True:
            if self.body_left:
                taken = min(self.body_left, end - position)
                if self.keep_bodies and taken:
                    self.bodies.setdefault(self.current[0], bytearray()).extend(self.view[position : position + taken])
                position += taken
                self.body_left -= taken
                if self.body_left:
                    break
                completed.append(self.current)
            if end - position < HEADER_BYTES:
                break
            _, _, _, _, request_id, length, result = RESPONSE.unpack_from(self.buffer, position)
            if self.keep_bodies:
                self.headers[request_id] = bytes(self.view[position : position + HEADER_BYTES])
            position += HEADER_BYTES
            if length:
                self.current = (request_id, result)
                self.body_left = length
            else:
                completed.append((request_id, result))
        rest = end - position
        if rest and position:
            self.buffer[:rest] = self.buffer[position:end]
        self.filled = rest
        if completed:
            self.on_pass(completed)

    def _answer_waiters(self, completed: list[tuple[int, int]]) -> None:
        for request_id, result in completed:
            waiter = self.waiters.pop(request_id, None)
            if waiter is not None and not waiter.done():
                waiter.set_result(result)

    async def call(
        self, request_id: int, request: bytes, body: bytes | bytearray | memoryview = b""
    ) -> tuple[int, bytes, bytearray]:
        """(result, header, body) of the response. For everything but the measured load."""
        waiter = self.waiters[request_id] = asyncio.get_running_loop().create_future()
        self.keep_bodies = True
        self.transport.write(request)
        if len(body):
            self.transport.write(body)
        result = await asyncio.wait_for(waiter, STALL_S)
        return result, self.headers.pop(request_id), self.bodies.pop(request_id, bytearray())


async def connect(address: str) -> Connection:
    loop = asyncio.get_running_loop()
    if address.startswith("unix:"):
        _, connection = await loop.create_unix_connection(Connection, address.removeprefix("unix:"))
    else:
        host, _, port = address.rpartition(":")
        _, connection = await loop.create_connection(Connection, host.strip("[]"), int(port))
    return connection


@dataclass
class Target:
    """The volume as a client sees it."""

    vid: int
    copies: int
    object_bytes: int
    map: list[int]


async def open_volume(connection: Connection, name: str, size: int) -> Target:
    """The volume ``name``, created with ``size`` bytes if there is none."""
    field = name.encode().ljust(256, b"\0")
    for opcode in (GET_VDI_INFO, NEW_VDI):
        request = VDI_REQUEST.pack(PROTO_VER, opcode, WRITE, 0, 1, 256, size, 0, 0, 0, 0, 0, 0, 0)
        result, header, _ = await connection.call(1, request, field)
        if result != NO_VDI:
            break
    if result:
        raise LoadError(f"volume {name!r}: result {result:#x}")
    (vid,) = struct.unpack_from("<I", header, 24)
    request = object_request(READ_OBJ, 0, 2, SHORT_INODE_BYTES, INODE_BIT | vid << 32, 0, 0)
    result, _, inode = await connection.call(2, request)
    if result or len(inode) != SHORT_INODE_BYTES:
        raise LoadError(f"inode of {vid:x}: result {result:#x}, {len(inode)} bytes")
    objects = -(-size // (1 << inode[SHIFT_OFFSET]))
    entries = struct.unpack_from(f"<{objects}I", inode, MAP_OFFSET)
    return Target(vid, inode[COPIES_OFFSET], 1 << inode[SHIFT_OFFSET], list(entries))


async def create_objects(connection: Connection, target: Target) -> int:
    """Every object of the load belongs to the volume itself. Returns the count of those that were created."""
    missing = [index for index, owner in enumerate(target.map) if owner != target.vid]
    body = bytes(min(64 * KiB, target.object_bytes))

    async def create(index: int) -> None:
        owner = target.map[index]
        request = object_request(
            CREATE_AND_WRITE_OBJ, WRITE | (COW if owner else 0), 10 + index, len(body),
            target.vid << 32 | index, 0, target.copies, owner << 32 | index if owner else 0,
        )  # fmt: skip
        result, _, _ = await connection.call(10 + index, request, body)
        if result:
            raise LoadError(f"creating object {index}: result {result:#x}")
        entry = struct.pack("<I", target.vid)
        request = object_request(
            WRITE_OBJ, WRITE, 10 + index, 4, INODE_BIT | target.vid << 32, MAP_OFFSET + 4 * index, target.copies
        )
        result, _, _ = await connection.call(10 + index, request, entry)
        if result:
            raise LoadError(f"map entry of object {index}: result {result:#x}")
        target.map[index] = target.vid

    for start in range(0, len(missing), SETUP_DEPTH):
        await asyncio.gather(*(create(index) for index in missing[start : start + SETUP_DEPTH]))
    return len(missing)


class Positions:
    """Which block comes next; never one that is in flight when ``exclusive``."""

    def __init__(self, options: Options, target: Target, rng: random.Random) -> None:
        self.per_object = target.object_bytes // options.block
        self.blocks = min(options.size // options.block, len(target.map) * self.per_object)
        if not self.blocks or not self.per_object:
            raise LoadError("the volume is smaller than one block, or the block larger than an object")
        self.random = rng
        self.sequential = options.pattern == "sequential"
        self.exclusive = options.verify
        self.in_flight: set[int] = set()
        self.next = 0

    def take(self) -> int:
        while True:
            if self.sequential:
                block = self.next
                self.next = (block + 1) % self.blocks
            else:
                block = int(self.random.random() * self.blocks)
            if not self.exclusive:
                return block
            if block not in self.in_flight:
                self.in_flight.add(block)
                return block

    def release(self, block: int) -> None:
        self.in_flight.discard(block)


def pattern_of(block: int, generation: int, size: int) -> bytes:
    """The content of a block after its ``generation``-th write."""
    unit = struct.pack("<QQ", block, generation)
    return (unit * (-(-size // len(unit))))[:size]


class Load:
    """The measured part: keeps ``depth`` requests in flight on every connection until the end is reached."""

    def __init__(self, options: Options, target: Target, connections: list[Connection]) -> None:
        self.options = options
        self.target = target
        self.connections = connections
        self.random = random.Random(options.seed)
        self.positions = Positions(options, target, self.random)
        if options.verify and options.connections * options.depth > self.positions.blocks // 2:
            raise LoadError("too few blocks for a verified load at this depth")
        self.generations: dict[int, int] = {}  # of blocks that we wrote
        self.body = self.random.randbytes(options.block)
        self.latencies: list[float] = []
        self.in_flight = 0
        self.issued = 0
        self.deadline = 0.0
        self.verified = 0
        self.finished: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> float:
        """Seconds from the first request to the last response."""
        started = time.perf_counter()
        self.deadline = started + self.options.seconds
        for connection in self.connections:
            connection.keep_bodies = self.options.verify
            worker = _Worker(self, connection)
            connection.on_pass = worker.on_pass
            connection.on_lost = self.fail
            worker.start()
        watch = asyncio.get_running_loop().create_task(self._watch())
        try:
            await self.finished
        finally:
            watch.cancel()
        return time.perf_counter() - started

    async def _watch(self) -> None:
        while True:
            before = len(self.latencies)
            await asyncio.sleep(STALL_S)
            if len(self.latencies) == before:
                self.fail(LoadError(f"no response for {STALL_S:.0f} s, {self.in_flight} requests in flight"))

    def fail(self, error: Exception) -> None:
        if not self.finished.done():
            self.finished.set_exception(error)

    def more(self) -> bool:
        if self.options.until is not None and self.options.until():
            return False
        if self.options.count:
            return self.issued < self.options.count
        return time.perf_counter() < self.deadline

    def written_is(self, block: int) -> bytes | None:
        generation = self.generations.get(block)
        return None if generation is None else pattern_of(block, generation, self.options.block)

    async def verify_written(self) -> None:
        """Every block that was written reads back as what was acknowledged last."""
        connection = self.connections[0]
        connection.on_pass = connection._answer_waiters
        size, per_object = self.options.block, self.positions.per_object

        async def check(slot: int, block: int) -> None:
            index, offset = divmod(block, per_object)
            request = object_request(
                READ_OBJ, 0, slot, size, self.target.vid << 32 | index, offset * size, self.target.copies
            )
            result, _, data = await connection.call(slot, request)
            if result or bytes(data) != self.written_is(block):
                raise LoadError(f"block {block} (object {index}, offset {offset * size}) lost a write: {result:#x}")
            self.verified += 1

        blocks = sorted(self.generations)
        for start in range(0, len(blocks), SETUP_DEPTH * 4):
            await asyncio.gather(
                *(check(1000 + slot, block) for slot, block in enumerate(blocks[start : start + SETUP_DEPTH * 4]))
            )


class _Worker:
    """One connection of a load. The id of a request is its slot."""

    def __init__(self, load: Load, connection: Connection) -> None:
        self.load = load
        self.connection = connection
        depth = load.options.depth
        self.started = [0.0] * depth
        self.blocks = [0] * depth
        self.writing: list[int] = [0] * depth  # generation that is being written, 0 for a read
        vid, copies, size = load.target.vid, load.target.copies, load.options.block
        self.oid_base = vid << 32
        self.copies = copies
        self.size = size

    def start(self) -> None:
        self.issue([slot for slot in range(self.load.options.depth) if self.load.more()])

    def on_pass(self, completed: list[tuple[int, int]]) -> None:
        load = self.load
        now = time.perf_counter()
        latencies, started = load.latencies, self.started
        for slot, result in completed:
            latencies.append(now - started[slot])
            if result:
                load.fail(LoadError(f"request on block {self.blocks[slot]}: result {result:#x}"))
                return
        load.in_flight -= len(completed)
        if load.options.verify and not self._verified(completed):
            return
        if load.more():
            self.issue([slot for slot, _ in completed])
        elif not load.in_flight and not load.finished.done():
            load.finished.set_result(None)

    def _verified(self, completed: list[tuple[int, int]]) -> bool:
        load = self.load
        for slot, _ in completed:
            block = self.blocks[slot]
            load.positions.release(block)
            if self.writing[slot]:
                load.generations[block] = self.writing[slot]
                continue
            data = self.connection.bodies.pop(slot, b"")
            expected = load.written_is(block)
            if len(data) != self.size or (expected is not None and data != expected):
                load.fail(LoadError(f"block {block} does not read as it was written"))
                return False
            load.verified += expected is not None
        return True

    def issue(self, slots: list[int]) -> None:
        load = self.load
        size, per_object, options = self.size, load.positions.per_object, load.options
        take, pack = load.positions.take, OBJECT_REQUEST.pack
        out: list[bytes] = []
        now = time.perf_counter()
        for slot in slots:
            if options.count and load.issued >= options.count:
                break
            block = take()
            self.blocks[slot] = block
            self.started[slot] = now
            index, place = divmod(block, per_object)
            writes = options.op == "write" or (options.op == "mixed" and load.random.random() < 0.5)
            opcode, flags = (WRITE_OBJ, WRITE) if writes else (READ_OBJ, 0)
            out.append(
                pack(
                    PROTO_VER, opcode, flags, 0, slot, size, self.oid_base | index, 0, self.copies, 0, 0, 0, 0,
                    place * size, 0,
                )
            )  # fmt: skip
            if not writes:
                self.writing[slot] = 0
            elif options.verify:
                self.writing[slot] = load.generations.get(block, 0) + 1
                out.append(pattern_of(block, self.writing[slot], size))
            else:
                out.append(load.body)
            load.issued += 1
            load.in_flight += 1
        if out:
            self.connection.transport.writelines(out)
        if not load.in_flight and not load.finished.done():
            load.finished.set_result(None)


def percentile(ordered: list[float], fraction: float) -> float:
    """Milliseconds."""
    return round(ordered[min(len(ordered) - 1, int(len(ordered) * fraction))] * 1000, 3)


async def run(options: Options) -> Report:
    """One load, from looking the volume up to verified data.

    :raises LoadError: the sheep refused or misbehaved.
    """
    connections = [await connect(options.address) for _ in range(options.connections)]
    try:
        target = await open_volume(connections[0], options.vdi, options.size)
        await create_objects(connections[0], target)
        load = Load(options, target, connections)
        before = resource.getrusage(resource.RUSAGE_SELF)
        seconds = await load.run()
        after = resource.getrusage(resource.RUSAGE_SELF)
        if options.verify:
            await load.verify_written()
    finally:
        for connection in connections:
            connection.on_lost = None
            connection.transport.abort()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    ordered = sorted(load.latencies)
    done = len(ordered)
    if not done:
        raise LoadError("no request was completed")
    return Report(
        op=options.op,
        pattern=options.pattern,
        block=options.block,
        depth=options.depth,
        connections=options.connections,
        requests=done,
        seconds=round(seconds, 3),
        per_second=round(done / seconds, 1),
        mb_per_second=round(done * options.block / seconds / 1e6, 2),
        p50_ms=percentile(ordered, 0.5),
        p95_ms=percentile(ordered, 0.95),
        p99_ms=percentile(ordered, 0.99),
        p999_ms=percentile(ordered, 0.999),
        max_ms=percentile(ordered, 1.0),
        client_cpu_us=round(cpu_s / done * 1e6, 2),
        verified_blocks=load.verified,
    )


def parse_size(text: str) -> int:
    """'4k', '256M', '1G' or plain bytes."""
    factors = {"k": KiB, "m": MiB, "g": GiB}
    factor = factors.get(text[-1:].lower(), 1)
    return int(text if factor == 1 else text[:-1]) * factor


def run_on_loop(options: Options) -> Report:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(run(options))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run(options))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="load one sheep over the Sheepdog wire protocol")
    parser.add_argument("--address", required=True, help="host:port or unix:/path of a sheep")
    parser.add_argument("--vdi", default="bench", help="volume, created when it does not exist")
    parser.add_argument("--op", choices=("read", "write", "mixed"), default="write")
    parser.add_argument("--pattern", choices=("random", "sequential"), default="random")
    parser.add_argument("--block", type=parse_size, default=4 * KiB, help="bytes, for example 4k")
    parser.add_argument("--depth", type=int, default=16, help="requests in flight on each connection")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--size", type=parse_size, default=256 * MiB, help="how much of the volume is used")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--count", type=int, default=0, help="requests instead of seconds")
    parser.add_argument("--verify", action="store_true", help="check every read, and every written block at the end")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    chosen = vars(parser.parse_args(arguments))
    as_json = chosen.pop("json")
    try:
        report = run_on_loop(Options(**chosen))
    except (LoadError, OSError, TimeoutError) as error:
        print(f"wire_load: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        print(
            f"{report.op} {report.pattern} block {report.block} depth {report.depth} x {report.connections}: "
            f"{report.per_second:.0f}/s {report.mb_per_second:.1f} MB/s, p50 {report.p50_ms} p99 {report.p99_ms} "
            f"max {report.max_ms} ms, client CPU {report.client_cpu_us} us each"
            + (f", {report.verified_blocks} blocks verified" if report.verified_blocks else "")
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
