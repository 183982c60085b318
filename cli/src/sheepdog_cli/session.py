"""What a command of dog works with: the sheep it talks to, its options, and how it ends.

Messages that many commands share are printed here, in the words that scripts know.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from sheepdog.client.connection import (
    ConnectError,
    Connection,
    ConnectionLost,
    Response,
    format_address,
    open_socket,
)
from sheepdog.errors import ProtocolError, RequestError, TransportError
from sheepdog_cli.table import Command, Nested

if TYPE_CHECKING:
    import socket

    from sheepdog.model.node import Node, VnodeMode

EXIT_SUCCESS = 0
EXIT_FAILURE = 1
EXIT_SYSTEM = 2
EXIT_EXISTS = 3
EXIT_MISSING = 5
EXIT_USAGE = 64
EXIT_DAEMON_REFUSED = 255

RESULT_SUCCESS = 0
RESULT_EIO = 0x03

CONNECT_ATTEMPTS = 2


class Quit(Exception):
    """The command ends with this exit code; everything was printed already."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Usage(Quit):
    """As ``Quit``, but the usage of the command follows on stdout."""

    def __init__(self, code: int = EXIT_USAGE) -> None:
        super().__init__(code)


def complain(text: str) -> None:
    """One line on stderr, after everything that stdout got before."""
    sys.stdout.flush()
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def fail(text: str, code: int = EXIT_FAILURE) -> NoReturn:
    complain(text)
    raise Quit(code)


def misuse(*lines: str) -> NoReturn:
    """The lines on stderr, the usage on stdout, exit 64."""
    for line in lines:
        complain(line)
    raise Usage


def describe(result: int) -> str:
    """The words for a result code."""
    from sheepdog.wire.results import describe as words

    return words(result)


def decode_map(body: bytes | bytearray | memoryview) -> dict[str, Any] | None:  # Any: what CBOR can say
    """The CBOR map of an answer; ``None`` if it is none."""
    import cbor2

    try:
        found = cbor2.loads(body)
    except (cbor2.CBORDecodeError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class Options:
    """The options of one invocation; what was not given is None or False."""

    def __init__(self) -> None:
        self.raw = False
        self.verbose = False
        self.time = False
        self.json = False
        self.force = False
        self.values: dict[str, Any] = {}  # Any: each option has its own type, made by sheepdog_cli.values

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def get(self, name: str, default: Any = None) -> Any:  # Any: as above
        return self.values.get(name, default)


class Session:
    """One invocation of dog.

    Connections are kept by address and made when first needed. A request that finds no sheep says so on stderr and
    raises ``TransportError``; the command then adds its own line.
    """

    def __init__(
        self,
        command: Command,
        nested: Sequence[Nested],
        options: Options,
        arguments: Sequence[str],
        host: str,
        port: int,
        connect: Callable[[str], socket.socket] = open_socket,
    ) -> None:
        self.command = command
        self.nested = [word.name for word in nested]
        self.options = options
        self.arguments = list(arguments)
        self.host = host
        self.port = port
        self.address = format_address(host, port)
        self.nodes: tuple[Node, ...] = ()
        self.mode: VnodeMode  # what the vnodes of the cluster belong to; known with its nodes
        self.epoch = 0
        self._connect = connect
        self._connections: dict[str, Connection] = {}

    def argument(self, index: int) -> str | None:
        """The argument at ``index``; None if there is none."""
        return self.arguments[index] if index < len(self.arguments) else None

    def open(self, address: str | None = None) -> Connection:
        """A connection of the caller's own, to the contacted sheep or another.

        :raises ConnectError: after saying so on stderr.
        """
        for attempt in range(CONNECT_ATTEMPTS):
            try:
                return Connection(address or self.address, connect=self._connect)
            except ConnectError as error:
                complain(str(error))
                if attempt == CONNECT_ATTEMPTS - 1:
                    raise
        raise AssertionError("unreachable")

    def call(self, opcode: int, *, node: Node | None = None, **fields: Any) -> Response:  # Any: Connection.request
        """The answer of the contacted sheep, or of ``node``.

        :raises TransportError: no sheep there, or it died; said on stderr already.
        """
        address = self.address if node is None else format_address(node.id.host, node.id.port)
        connection = self._connections.get(address)
        if connection is None:
            connection = self._connections[address] = self.open(address)
        try:
            return connection.request(opcode, **fields)
        except (ConnectionLost, ProtocolError) as error:
            complain(str(error))
            connection.close()
            del self._connections[address]
            raise error if isinstance(error, TransportError) else ConnectionLost(str(error)) from error

    def simple(self, opcode: int, *, node: Node | None = None, **fields: Any) -> Response:  # Any: as above
        """As ``call``; a refusal is said on stderr.

        :raises RequestError: the sheep refused.
        """
        response = self.call(opcode, node=node, **fields)
        if response.result != RESULT_SUCCESS:
            words = describe(response.result)
            complain(f"Response's result: {words}")
            raise RequestError(words, result=response.result)
        return response

    def load_nodes(self) -> None:
        """``nodes``, ``mode`` and ``epoch`` are those of the contacted sheep.

        :raises Quit: they cannot be had; said on stderr.
        """
        from sheepdog.client import admin

        try:
            self.nodes, self.mode = admin.members(self.call)
            self.epoch = admin.current_epoch(self.call)
        except RequestError as error:
            complain(f"Failed to update node list: {describe(error.result)}")
            fail("Failed to get node list", EXIT_SYSTEM)
        except TransportError:
            fail("Failed to get node list", EXIT_SYSTEM)

    def close(self) -> None:
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()


def pad(text: str, width: int) -> str:
    """The text in a column of so many bytes, as printf counts them; to the right of it if ``width`` is negative."""
    import os

    blanks = " " * (abs(width) - len(os.fsencode(text)))
    return blanks + text if width < 0 else text + blanks


def name_bytes(text: str) -> bytes:
    """A vdi name, tag or key as it is stored: cut to 255 bytes, without the NUL."""
    import os

    return os.fsencode(text)[:255]


def name_text(raw: bytes) -> str:
    """The stored form for people; bytes that are no text come through unchanged when written to stdout."""
    import os

    return os.fsdecode(raw)
