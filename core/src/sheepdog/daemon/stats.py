"""Counters of one sheep since its start, as ``dog node stat`` shows them."""

from __future__ import annotations

from sheepdog.wire.extensions import FORWARD_CREATE, FORWARD_WRITE
from sheepdog.wire.header import FLAG_WRITE, Request
from sheepdog.wire.opcodes import Op

_WRITES = frozenset(
    {
        Op.WRITE_OBJ, Op.CREATE_AND_WRITE_OBJ, Op.WRITE_PEER, Op.CREATE_AND_WRITE_PEER, FORWARD_WRITE, FORWARD_CREATE,
    }
)  # fmt: skip
_READS = frozenset({Op.READ_OBJ, Op.READ_PEER})


class Stats:
    """Requests and bytes, as gateway (from clients) and as peer (from other sheep)."""

    __slots__ = (
        "gateway_active", "gateway_flushes", "gateway_reads", "gateway_removes", "gateway_rx_bytes", "gateway_total",
        "gateway_tx_bytes", "gateway_writes", "peer_active", "peer_reads", "peer_removes", "peer_rx_bytes",
        "peer_total", "peer_tx_bytes", "peer_writes",
    )  # fmt: skip

    def __init__(self) -> None:
        for name in self.__slots__:
            setattr(self, name, 0)

    gateway_active: int
    gateway_total: int
    gateway_rx_bytes: int
    gateway_tx_bytes: int
    gateway_removes: int
    gateway_reads: int
    gateway_writes: int
    gateway_flushes: int
    peer_active: int
    peer_total: int
    peer_rx_bytes: int
    peer_tx_bytes: int
    peer_removes: int
    peer_reads: int
    peer_writes: int

    def gateway_began(self, request: Request) -> None:
        """A client's object request was taken up; its end lowers ``gateway_active``."""
        self.gateway_active += 1
        self.gateway_total += 1
        if request.flags & FLAG_WRITE:
            self.gateway_rx_bytes += request.data_length
        else:
            self.gateway_tx_bytes += request.data_length
        if request.opcode in _READS:
            self.gateway_reads += 1
        elif request.opcode in _WRITES:
            self.gateway_writes += 1
        else:
            self.gateway_removes += 1

    def peer_began(self, request: Request) -> None:
        """Another sheep's request was taken up; its end lowers ``peer_active``."""
        self.peer_active += 1
        self.peer_total += 1
        if request.flags & FLAG_WRITE:
            self.peer_rx_bytes += request.data_length
        else:
            self.peer_tx_bytes += request.data_length
        if request.opcode in _READS:
            self.peer_reads += 1
        elif request.opcode in _WRITES:
            self.peer_writes += 1
        else:
            self.peer_removes += 1

    def requests(self) -> int:
        """Taken up so far, of clients and of other sheep."""
        return self.gateway_total + self.peer_total

    def counters(self) -> tuple[int, ...]:
        """The 15 numbers of STAT in wire order."""
        return (
            self.gateway_active, self.peer_active, self.gateway_total, self.peer_total, self.gateway_rx_bytes,
            self.gateway_tx_bytes, self.peer_rx_bytes, self.peer_tx_bytes, self.gateway_removes, self.gateway_reads,
            self.gateway_writes, self.gateway_flushes, self.peer_removes, self.peer_reads, self.peer_writes,
        )  # fmt: skip
