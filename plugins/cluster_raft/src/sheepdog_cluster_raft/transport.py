"""The library's connections, with two rules of ours.

* No promise leaves this server before its journal is on disk: a vote or an answer that others count on survives power
  loss. The rule stands here because everything passes here. Messages that promise nothing do not wait, so one flush
  serves all commands that came meanwhile.
* Whoever has not shown that it knows the secret cannot make us keep much, be it somebody who comes to us or somebody at
  the address of a member. The library decrypts and verifies a message before it unpickles it, but it waits for as many
  bytes as a stranger announces, and for as many strangers as come.

A follower listens as well, for those who want to join by it. It answers them and does nothing else for them.

Private parts of the library are touched here and in ``server``; the version is pinned for that.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable
from typing import Any

from pysyncobj.tcp_server import SERVER_STATE, TcpServer
from pysyncobj.transport import TCPTransport

logger = logging.getLogger(__name__)

WHO_VOTES = "sheepdog_voters"  # the message that a member answers with the voters that it knows
LISTEN_AGAIN_S = 1.0
FIRST_BYTES_MAX = 4096  # of a message on a connection whose other side we do not know yet
BYTES_MAX = 64 << 20  # of any other message; our batches are a few MiB
STRANGERS_MAX = 64  # connections that have not said who they are
STRANGER_S = 5.0  # that long

NO_PROMISES = ("apply_command", "apply_command_response")  # a wish, and at which place of the log it may come true

LENGTH = struct.Struct("=i")


def bound(conn: Any, known: Callable[[], bool]) -> None:  # Any: a connection of the library
    """It ends when its other side sends more than there is reason to; whoever it is, or before it is ``known``."""
    read = conn._TcpConnection__processRead

    def bounded() -> bool:
        going_on: bool = read()
        familiar = known()
        buffer = conn._TcpConnection__readBuffer
        length = LENGTH.unpack_from(buffer)[0] if len(buffer) >= LENGTH.size else 0
        if not 0 <= length <= (BYTES_MAX if familiar else FIRST_BYTES_MAX):
            conn.disconnect()
            return False
        # An honest stranger says one thing at a time, so it never fills more than two messages.
        if not familiar and len(buffer) > 2 * FIRST_BYTES_MAX:
            conn.disconnect()
            return False
        return going_on

    conn._TcpConnection__processRead = bounded


class GuardedTransport(TCPTransport):  # type: ignore[misc]  # the library is not typed
    """As the library's; ``sync`` is called before any promise is sent."""

    def __init__(self, syncObj: Any, selfNode: Any, otherNodes: Any) -> None:
        self.sync: Callable[[], None] = lambda: None
        self._since_s: dict[Any, float] = {}  # strangers, oldest first; Any: not typed
        self._answers_at = ""  # for messages
        self._tried_s = float("-inf")  # to listen, in vain
        super().__init__(syncObj, selfNode, otherNodes)
        if selfNode is not None:
            self._answers_at = selfNode.address

    def listen(self, address: str) -> None:
        """A follower answers there as soon as it can. A voter does anyway."""
        self._answers_at = address
        conf = self._syncObj.conf
        host, _, port = address.rpartition(":")
        self._server = TcpServer(
            self._syncObj._poller,
            "::" if ":" in host else "0.0.0.0",  # as the library does for voters
            port,
            onNewConnection=self._onNewIncomingConnection,
            sendBufferSize=conf.sendBufferSize,
            recvBufferSize=conf.recvBufferSize,
            connectionTimeout=conf.connectionTimeout,
        )

    def _keep_listening(self) -> None:
        """Whoever listens does so again: the library gives up its port when a connection cannot be accepted.

        A follower whose port is taken serves all the same; it listens when the port is free.
        """
        server = self._server
        if not self._ready or server is None or server._TcpServer__state == SERVER_STATE.BINDED:
            return
        now_s = time.monotonic()
        if now_s - self._tried_s < LISTEN_AGAIN_S:
            return
        try:
            server.bind()
        except OSError as error:
            server.unbind()
            if self._tried_s == float("-inf"):
                logger.warning("cannot listen at %s: %s; it is tried again", self._answers_at, error.strerror)
            self._tried_s = now_s
        else:
            self._tried_s = float("-inf")

    def addNode(self, node: Any) -> None:
        super().addNode(node)
        connection = self._connections.get(node)
        if connection is not None:
            bound(connection, lambda: connection.sendRandKey is not None)

    def _onIncomingMessageReceived(self, conn: Any, message: Any) -> None:
        introduced = bool(conn.sendRandKey)
        if self._selfIsReadonlyNode and introduced and message != [WHO_VOTES]:
            conn.disconnect()
            return
        super()._onIncomingMessageReceived(conn, message)

    def send(self, node: Any, message: Any) -> bool:  # Any: not typed
        if message["type"] not in NO_PROMISES:
            self.sync()
        if message["type"] == "next_node_idx":
            message["term"] = self._syncObj.raftCurrentTerm  # whose leader it is meant for
        sent: bool = super().send(node, message)
        return sent

    def _onNewIncomingConnection(self, conn: Any) -> None:
        super()._onNewIncomingConnection(conn)
        bound(conn, lambda: conn not in self._unknownConnections)
        self._since_s[conn] = time.monotonic()
        self._dismiss()

    def _dismiss(self) -> None:
        """Strangers that are too many, or take too long, are gone."""
        self._since_s = {conn: since for conn, since in self._since_s.items() if conn in self._unknownConnections}
        now_s = time.monotonic()
        for number, (conn, since_s) in enumerate(list(self._since_s.items())):
            if now_s - since_s > STRANGER_S or len(self._since_s) - number > STRANGERS_MAX:
                conn.disconnect()

    def _onTick(self) -> None:
        super()._onTick()
        self._keep_listening()
        if self._since_s:
            self._dismiss()
