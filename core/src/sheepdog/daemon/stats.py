"""Counters of one sheep since its start, as ``dog node stat`` shows them."""

from __future__ import annotations

from sheepdog.wire.extensions import FORWARD_CREATE, FORWARD_WRITE, SETTLE
from sheepdog.wire.header import FLAG_WRITE, Request
from sheepdog.wire.opcodes import Op

_WRITES = (
    Op.WRITE_OBJ, Op.CREATE_AND_WRITE_OBJ, Op.WRITE_PEER, Op.CREATE_AND_WRITE_PEER, FORWARD_WRITE, FORWARD_CREATE,
)  # fmt: skip
_READS = (Op.READ_OBJ, Op.READ_PEER)


class Requests:
    """Of one kind of callers."""

    __slots__ = ("active", "by_opcode", "rx_bytes", "tx_bytes")

    def __init__(self) -> None:
        self.active = 0
        self.by_opcode = [0] * 256
        self.rx_bytes = 0
        self.tx_bytes = 0

    def began(self, request: Request) -> None:
        """The request was taken up; its end lowers ``active``."""
        self.active += 1
        self.by_opcode[request.opcode] += 1
        if request.flags & FLAG_WRITE:
            self.rx_bytes += request.data_length
        else:
            self.tx_bytes += request.data_length

    @property
    def total(self) -> int:
        """Taken up so far."""
        return sum(self.by_opcode)

    @property
    def reads(self) -> int:
        return sum(self.by_opcode[opcode] for opcode in _READS)

    @property
    def writes(self) -> int:
        """With creations."""
        return sum(self.by_opcode[opcode] for opcode in _WRITES)

    @property
    def removes(self) -> int:
        """With everything else."""
        return self.total - self.reads - self.writes


class Stats:
    """Requests and bytes, as gateway (from clients) and as peer (from other sheep)."""

    def __init__(self) -> None:
        self.gateway = Requests()
        self.peer = Requests()
        self.gateway_flushes = 0

    def requests(self) -> int:
        """Taken up so far, of clients and of other sheep."""
        return self.gateway.total + self.peer.total

    def client_requests(self) -> int:
        """As ``requests``, without those by which other sheep have objects settled, or bring copies and strips."""
        return self.requests() - self.peer.by_opcode[SETTLE] - self.peer.by_opcode[Op.CREATE_AND_WRITE_PEER]

    def counters(self) -> tuple[int, ...]:
        """The 15 numbers of STAT in wire order."""
        gateway, peer = self.gateway, self.peer
        return (
            gateway.active, peer.active, gateway.total, peer.total, gateway.rx_bytes, gateway.tx_bytes, peer.rx_bytes,
            peer.tx_bytes, gateway.removes, gateway.reads, gateway.writes, self.gateway_flushes, peer.removes,
            peer.reads, peer.writes,
        )  # fmt: skip
