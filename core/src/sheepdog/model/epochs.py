"""Epochs: the counter of membership configurations and the log of who was a member in each.

One file per epoch holds the node records and the time it was written; STAT_CLUSTER shows the same as a list of entries
with a 48-byte head. How long a record is depends on what vnodes belong to (``VnodeMode``). Layouts: docs, on-disk
layout, section 4, and wire protocol, section 9.6.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct

from sheepdog.errors import InvalidParameters, ProtocolError
from sheepdog.model.clusterinfo import NO_FLAGS, ClusterFlag, pack_store_name, unpack_store_name
from sheepdog.model.node import Node, VnodeMode, pack_nodes, unpack_nodes

Buffer = bytes | bytearray | memoryview

EPOCH_LOG_HEAD_BYTES = 48
_TIME = Struct("<q")
# ctime, time, epoch, nr_nodes, disable_recovery, nr_copies, copy_policy, flags, store
_HEAD = Struct("<QQIIBBB3xH16s")
assert _HEAD.size == EPOCH_LOG_HEAD_BYTES


def epoch_before(one: int, other: int) -> bool:
    """``one`` is older than ``other``; the 32-bit counter may have wrapped in between."""
    return (one - other) & 0x80000000 != 0


def epoch_after(one: int, other: int) -> bool:
    """``one`` is newer than ``other``."""
    return epoch_before(other, one)


def epoch_file_name(epoch: int) -> str:
    """Eight decimal digits."""
    return f"{epoch:08d}"


def parse_epoch_file_name(name: str) -> int | None:
    """The epoch of a file in the epoch directory; ``None`` for temporary and foreign files."""
    return int(name) if len(name) == 8 and name.isascii() and name.isdigit() else None


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """Members of one epoch and when it began (seconds since 1970). The content of an epoch file and of GET_EPOCH."""

    nodes: tuple[Node, ...]
    time: int

    def pack(self, mode: VnodeMode = VnodeMode.NODE) -> bytes:
        """The records, then the time."""
        return pack_nodes(self.nodes, mode) + _TIME.pack(self.time)

    @classmethod
    def unpack(cls, buffer: Buffer, mode: VnodeMode = VnodeMode.NODE) -> EpochRecord:
        """From a file or a GET_EPOCH reply.

        :raises ProtocolError: the length does not fit whole records and a time.
        """
        end = len(buffer) - _TIME.size
        if end < 0 or end % mode.record_bytes:
            raise ProtocolError(f"an epoch record of {len(buffer)} bytes does not hold whole nodes and a time")
        return cls(unpack_nodes(memoryview(buffer)[:end], mode), _TIME.unpack_from(buffer, end)[0])


@dataclass(frozen=True, slots=True)
class EpochLogEntry:
    """One line of ``dog cluster info``.

    All fields besides ``time``, ``epoch`` and ``nodes`` are filled in the newest entry only and zero elsewhere.
    """

    time: int
    epoch: int
    nodes: tuple[Node, ...]
    ctime: int = 0
    disable_recovery: bool = False
    copies: int = 0
    copy_policy: int = 0
    flags: ClusterFlag = NO_FLAGS
    store: str = ""

    def pack(self, node_slots: int, mode: VnodeMode = VnodeMode.NODE) -> bytes:
        """48 bytes and ``node_slots`` records, the unused ones zero.

        :raises InvalidParameters: more nodes than slots.
        """
        if len(self.nodes) > node_slots:
            raise InvalidParameters(f"{len(self.nodes)} nodes do not fit {node_slots} slots")
        head = _HEAD.pack(
            self.ctime,
            self.time,
            self.epoch,
            len(self.nodes),
            self.disable_recovery,
            self.copies,
            self.copy_policy,
            self.flags,
            pack_store_name(self.store),
        )
        return (head + pack_nodes(self.nodes, mode)).ljust(epoch_entry_bytes(node_slots, mode), b"\0")

    @classmethod
    def unpack(cls, buffer: Buffer, mode: VnodeMode = VnodeMode.NODE) -> EpochLogEntry:
        """One entry with its slots.

        :raises ProtocolError: shorter than the head and the records it announces.
        """
        if len(buffer) < EPOCH_LOG_HEAD_BYTES:
            raise ProtocolError(f"an epoch entry has at least {EPOCH_LOG_HEAD_BYTES} bytes, not {len(buffer)}")
        ctime, time, epoch, count, disable_recovery, copies, copy_policy, flags, store = _HEAD.unpack_from(buffer)
        end = epoch_entry_bytes(count, mode)
        if end > len(buffer):
            raise ProtocolError(f"an epoch entry of {len(buffer)} bytes announces {count} nodes")
        return cls(
            time=time,
            epoch=epoch,
            nodes=unpack_nodes(memoryview(buffer)[EPOCH_LOG_HEAD_BYTES:end], mode),
            ctime=ctime,
            disable_recovery=bool(disable_recovery),
            copies=copies,
            copy_policy=copy_policy,
            flags=ClusterFlag(flags),
            store=unpack_store_name(store),
        )


def epoch_entry_bytes(node_slots: int, mode: VnodeMode = VnodeMode.NODE) -> int:
    """Length of an entry with room for so many nodes."""
    return EPOCH_LOG_HEAD_BYTES + node_slots * mode.record_bytes


def pack_epoch_log(entries: Iterable[EpochLogEntry], node_slots: int, mode: VnodeMode = VnodeMode.NODE) -> bytes:
    """The entries of a STAT_CLUSTER reply, in the order given (newest first)."""
    return b"".join(entry.pack(node_slots, mode) for entry in entries)


def unpack_epoch_log(buffer: Buffer, node_slots: int, mode: VnodeMode = VnodeMode.NODE) -> tuple[EpochLogEntry, ...]:
    """All entries of a STAT_CLUSTER reply.

    :raises ProtocolError: the length is no multiple of an entry's, or an entry announces more than its slots.
    """
    stride = epoch_entry_bytes(node_slots, mode)
    if len(buffer) % stride:
        raise ProtocolError(f"an epoch log of {len(buffer)} bytes is no multiple of {stride}")
    view = memoryview(buffer)
    return tuple(EpochLogEntry.unpack(view[at : at + stride], mode) for at in range(0, len(buffer), stride))
