"""The library's connections, with two rules of ours.

* No promise leaves this server before its journal is on disk: a vote or an answer that others count on survives power
  loss. The rule stands here because everything passes here. Messages that promise nothing do not wait, so one flush
  serves all commands that came meanwhile.
* Whoever has not shown that it knows the secret cannot make us keep much. The library decrypts and verifies a message
  before it unpickles it, but it waits for as many bytes as a stranger announces, and for as many strangers as come.

Private parts of the library are touched here and in ``server``; the version is pinned for that.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any

from pysyncobj.transport import TCPTransport

FIRST_BYTES_MAX = 4096  # of a message on a connection whose other side we do not know yet
BYTES_MAX = 64 << 20  # of any other message; our batches are a few MiB
STRANGERS_MAX = 64  # connections that have not said who they are
STRANGER_S = 5.0  # that long

NO_PROMISES = ("apply_command", "apply_command_response")  # a wish, and at which place of the log it may come true

LENGTH = struct.Struct("=i")


class GuardedTransport(TCPTransport):  # type: ignore[misc]  # the library is not typed
    """As the library's; ``sync`` is called before any promise is sent."""

    def __init__(self, syncObj: Any, selfNode: Any, otherNodes: Any) -> None:
        self.sync: Callable[[], None] = lambda: None
        self._since_s: dict[Any, float] = {}  # strangers, oldest first; Any: not typed
        super().__init__(syncObj, selfNode, otherNodes)

    def send(self, node: Any, message: Any) -> bool:  # Any: not typed
        if message["type"] not in NO_PROMISES:
            self.sync()
        if message["type"] == "next_node_idx":
            message["term"] = self._syncObj.raftCurrentTerm  # whose leader it is meant for
        sent: bool = super().send(node, message)
        return sent

    def _onNewIncomingConnection(self, conn: Any) -> None:
        super()._onNewIncomingConnection(conn)
        read = conn._TcpConnection__processRead

        def bounded() -> bool:
            going_on: bool = read()
            known = conn not in self._unknownConnections
            buffer = conn._TcpConnection__readBuffer
            length = LENGTH.unpack_from(buffer)[0] if len(buffer) >= LENGTH.size else 0
            if not 0 <= length <= (BYTES_MAX if known else FIRST_BYTES_MAX):
                conn.disconnect()
                return False
            # An honest stranger says one thing at a time, so it never fills more than two messages.
            if not known and len(buffer) > 2 * FIRST_BYTES_MAX:
                conn.disconnect()
                return False
            return going_on

        conn._TcpConnection__processRead = bounded
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
        if self._since_s:
            self._dismiss()
