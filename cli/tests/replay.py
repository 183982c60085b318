"""A scripted sheep: answers with what a real one answered when a session of the original dog was recorded.

``run_dog`` runs our dog inside this process with sockets that lead to the script, and returns what it printed, how it
ended and which requests it sent. The script refuses a request that the original did not send, so a session that runs to
its end asked exactly the same questions. What may differ is said in ``normal_request``.
"""

from __future__ import annotations

import io
import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from sheepdog.testing.vectors import Frame, frames, pattern
from sheepdog_cli import dog

OP_CREATE_OBJ = 0x01
OP_WRITE_OBJ = 0x03
OP_MAKE_FS = 0x84
OP_SET_RECOVERY = 0xCB
OP_SET_VNODES = 0xCC
INODE_BIT = 1 << 63
MAP_OFFSET, MAP_END = 4664, 4198968
INODE_BYTES = 12587576

# Answers when the script has none: our dog then fails in a visible way.
REFUSAL = bytes([0, 0]) + bytes(14) + (0x01).to_bytes(4, "little") + bytes(28)


@dataclass
class Exchange:
    """A recorded request and its answer."""

    request: Frame
    response: Frame | None = None
    used: bool = False


@dataclass
class Outcome:
    """What a run of dog led to."""

    code: int
    stdout: bytes
    stderr: str
    unexpected: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def load_session(name: str) -> list[Exchange]:
    """The exchanges of a recorded session, in the order in which the requests were sent."""
    waiting: dict[int, Exchange] = {}
    order = []
    for frame in frames(name):
        if frame.request:
            waiting[frame.conn] = Exchange(frame)
            order.append(waiting[frame.conn])
        else:
            waiting.pop(frame.conn).response = frame
    return order


def data_of(frame: Frame | None) -> bytes:
    """The body; zeros where the recording knows only its digest."""
    assert frame is not None
    return bytes(frame.data_bytes) if frame.data is None else frame.data


def normal_request(header: bytes, data: bytes) -> tuple[bytes, bytes]:
    """The request without what may differ between our dog and the original.

    * MAKE_FS carries the time.
    * SET_RECOVERY: the original leaves rubbish in the padding and does not fill in the flag "on", which we do.
    * SET_VNODES: the last four of the eight bytes are rubbish in the original.
    * Clearing a map: the original writes zeros to the end of the map, we stop at the last entry in use.
    * Whole inodes of loaded snapshots: the original keeps the reference counts of the saved cluster, ours are new.
    """
    opcode = header[1]
    if opcode == OP_MAKE_FS:
        header = header[:24] + bytes(8) + header[32:]
    elif opcode == OP_SET_RECOVERY:
        data = data[:4] + bytes(4) + data[8:16] + bytes(8)
    elif opcode == OP_SET_VNODES:
        data = data[:4]
    elif opcode == OP_WRITE_OBJ and int.from_bytes(header[16:24], "little") & INODE_BIT:
        offset = int.from_bytes(header[40:44], "little")
        if MAP_OFFSET <= offset < MAP_END and len(data) % 4 == 0 and not any(data):
            header, data = header[:12] + bytes(4) + header[16:], b""
    elif opcode == OP_CREATE_OBJ and len(data) == INODE_BYTES:
        data = data[:MAP_END]
    return header, data


class Script:
    """The recorded sheep.

    ``ordered``: requests must come in the recorded order. ``again``: these opcodes are answered as often as asked.
    """

    def __init__(self, exchanges: Sequence[Exchange], *, ordered: bool = True, again: frozenset[int]) -> None:
        self.exchanges = list(exchanges)
        self.ordered = ordered
        self.again = again
        self.unexpected: list[str] = []
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._clients: list[socket.socket] = []

    def connect(self, address: str) -> socket.socket:
        """A socket that leads to the script; takes the place of a TCP connection."""
        port = int(address.rpartition(":")[2])
        mine, theirs = socket.socketpair()
        thread = threading.Thread(target=self._serve, args=(theirs, port), daemon=True)
        thread.start()
        self._threads.append(thread)
        self._clients.append(mine)
        return mine

    def _serve(self, stream: socket.socket, port: int) -> None:
        with stream, stream.makefile("rb") as reader:
            while True:
                header = reader.read(48)
                if len(header) < 48:
                    return
                length = int.from_bytes(header[12:16], "little")
                data = reader.read(length) if header[2] & 1 else b""
                try:
                    stream.sendall(self._answer(port, header, data))
                except OSError:
                    return

    def _answer(self, port: int, header: bytes, data: bytes) -> bytes:
        wanted = normal_request(header, data)
        with self._lock:
            for exchange in self.exchanges:
                if exchange.used and header[1] not in self.again:
                    continue
                request = exchange.request
                if request.port == port and normal_request(request.header, data_of(request)) == wanted:
                    exchange.used = True
                    assert exchange.response is not None
                    return exchange.response.header + data_of(exchange.response)
                if self.ordered:
                    recorded = show(request.header, data_of(request))
                    self.unexpected.append(f"{port}: {show(header, data)}, recorded: {recorded}")
                    return REFUSAL
            self.unexpected.append(f"{port}: {show(header, data)}")
            return REFUSAL

    def finish(self) -> None:
        """All connections are closed and their threads gone."""
        for client in self._clients:
            client.close()
        for thread in self._threads:
            thread.join(10)

    @property
    def unused(self) -> list[str]:
        return [
            f"{exchange.request.port}: {show(exchange.request.header, data_of(exchange.request))}"
            for exchange in self.exchanges
            if not exchange.used
        ]


class Died(Exception):
    """Raised by an answer: the sheep dies instead."""


class Answers:
    """A sheep made of one function: ``answer(opcode, header, data)`` gives (result, body, variant)."""

    def __init__(self, answer: Callable[[int, bytes, bytes], tuple[int, bytes, bytes]]) -> None:
        self._answer = answer
        self.epoch = 1
        self.opcodes: list[int] = []

    def connect(self, address: str) -> socket.socket:
        mine, theirs = socket.socketpair()
        threading.Thread(target=self._serve, args=(theirs,), daemon=True).start()
        return mine

    def _serve(self, stream: socket.socket) -> None:
        with stream, stream.makefile("rb") as reader:
            while len(header := reader.read(48)) == 48:
                length = int.from_bytes(header[12:16], "little")
                data = reader.read(length) if header[2] & 1 else b""
                self.opcodes.append(header[1])
                try:
                    result, body, variant = self._answer(header[1], header, data)
                except Died:
                    return
                head = header[:4] + self.epoch.to_bytes(4, "little") + header[8:12] + len(body).to_bytes(4, "little")
                try:
                    stream.sendall(head + result.to_bytes(4, "little") + variant.ljust(28, b"\0") + body)
                except OSError:
                    return


def show(header: bytes, data: bytes) -> str:
    """A request for messages of failing tests."""
    text = f"op={header[1]:02x} flags={int.from_bytes(header[2:4], 'little'):x} "
    text += f"epoch={int.from_bytes(header[4:8], 'little')} length={int.from_bytes(header[12:16], 'little')} "
    return text + f"variant={header[16:].hex()} data={data[:32].hex()}"


@contextmanager
def standard_streams(stdin: bytes):
    """stdin, stdout and stderr of the process are in memory; yields the two outputs."""
    kept = sys.stdin, sys.stdout, sys.stderr
    out, err = io.BytesIO(), io.BytesIO()
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8", errors="surrogateescape")
    sys.stdout = io.TextIOWrapper(out, encoding="utf-8", errors="surrogateescape", write_through=True)
    sys.stderr = io.TextIOWrapper(err, encoding="utf-8", errors="surrogateescape", write_through=True)
    streams = sys.stdout, sys.stderr
    try:
        yield out, err
    finally:
        for stream in streams:
            stream.flush()
            stream.detach()
        sys.stdin, sys.stdout, sys.stderr = kept


def run_dog(
    words: Sequence[str],
    *,
    stdin: bytes = b"",
    connect: Callable[[str], socket.socket] | None = None,
) -> Outcome:
    """What dog prints and returns for ``words`` (without the program's name)."""
    with standard_streams(stdin) as (out, err):
        arguments = ["dog", *words]
        code = dog.run(arguments) if connect is None else dog.run(arguments, connect)
        sys.stdout.flush()
        sys.stderr.flush()
        outcome = Outcome(code, out.getvalue(), err.getvalue().decode(errors="surrogateescape"))
    return outcome


def replay(
    session: str,
    words: Sequence[str],
    *,
    stdin: bytes = b"",
    ordered: bool = True,
    port: int = 7900,
    again: frozenset[int] = frozenset(),
) -> Outcome:
    """Runs dog against the recorded session."""
    script = Script(load_session(session), ordered=ordered, again=again)
    kept = os.environ.get("SHEEPDOG_DOG_PORT")
    os.environ["SHEEPDOG_DOG_PORT"] = str(port)
    try:
        outcome = run_dog(words, stdin=stdin, connect=script.connect)
    finally:
        if kept is None:
            del os.environ["SHEEPDOG_DOG_PORT"]
        else:
            os.environ["SHEEPDOG_DOG_PORT"] = kept
        script.finish()
    outcome.unexpected = script.unexpected
    outcome.unused = script.unused
    return outcome


def recorded_stdin(text: str) -> bytes:
    """The input of a recorded session as its index describes it."""
    match = re.fullmatch(r"pattern\(seed=(\d+), offset=(\d+), length=(\d+)\)", text)
    if match:
        return pattern(*map(int, match.groups()))
    return text.encode()
