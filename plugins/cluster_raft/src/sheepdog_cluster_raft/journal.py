"""What a voter must not forget: its log, its term and its vote, in one file that survives power loss.

The file is a sequence of frames: length and CRC-32 of the payload, 4 bytes each, big-endian, then the payload, a CBOR
array. Appends are gathered in memory until ``sync``, which is called before any promise leaves this server
(see ``transport``); so nobody counts on what a crash can cut off, and a torn last frame is dropped. The library's own
journal is a memory map that it never flushes, which would lose what others count on.

================================  =============================================================================
``[HEADER, version, address]``    the first frame; the directory belongs to that voter
``[ENTRY, index, term, command]`` appended
``[CUT, index]``                  entries from that index on were replaced by a leader's
``[CLEAR]``                       all entries were replaced by a snapshot
``[VOTE, term, candidate]``       the current term, and for whom we voted in it
================================  =============================================================================

The snapshot beside it is a single frame of the same kind. It is durable before the entries that it replaces go.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeAlias, overload

import cbor2
from pysyncobj.journal import Journal

FILE_VERSION = 1
FRAME = struct.Struct(">II")
FRAME_BYTES_MAX = 64 << 20

Entry: TypeAlias = tuple[bytes, int, int]  # command, index, term; in the library's order


class JournalDamaged(Exception):
    """The files of a voter cannot be used; the message says what is wrong with which."""


class Frame(IntEnum):
    HEADER = 1
    ENTRY = 2
    CUT = 3
    CLEAR = 4
    VOTE = 5
    SNAPSHOT = 6


def pack(fields: list[Any]) -> bytes:  # Any: what CBOR takes
    payload = cbor2.dumps(fields)
    return FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def unpack(data: bytes, at: int) -> tuple[list[Any], int] | None:  # Any: as pack
    """The frame at ``at``, and where it ends; None if there is no whole and sound one."""
    if at + FRAME.size > len(data):
        return None
    length, crc = FRAME.unpack_from(data, at)
    payload = data[at + FRAME.size : at + FRAME.size + length]
    if not 0 < length <= FRAME_BYTES_MAX or len(payload) < length or zlib.crc32(payload) != crc:
        return None
    return cbor2.loads(payload), at + FRAME.size + length


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_snapshot(path: Path, fields: list[Any]) -> None:  # Any: as pack
    """The file holds these fields, durably, when it has its final name."""
    with path.open("wb") as file:
        file.write(pack([Frame.SNAPSHOT, FILE_VERSION, *fields]))
        file.flush()
        os.fsync(file.fileno())


def read_snapshot(path: Path) -> list[Any]:  # Any: as pack
    """What ``write_snapshot`` was given.

    :raises JournalDamaged: the file is none.
    """
    found = unpack(path.read_bytes(), 0)
    if found is None or found[0][:2] != [Frame.SNAPSHOT, FILE_VERSION]:
        raise JournalDamaged(f"{path} is damaged")
    return found[0][2:]


class DurableJournal(Journal):  # type: ignore[misc]  # the library is not typed
    """The log of one voter, in ``directory/journal``.

    :raises JournalDamaged: what is there cannot be used, or belongs to another voter.
    """

    def __init__(self, directory: Path, address: str) -> None:
        self._directory = directory
        self._address = address
        self._path = directory / "journal"
        self._snapshot = directory / "snapshot"
        self._entries: list[Entry] = []
        self._term = 0
        self._vote: str | None = None
        self._pending: list[bytes] = []
        self._file: int | None = None
        if self._path.exists():
            self._load()
        self._match_snapshot()
        self._rewrite()  # without the torn end

    # -- files --------------------------------------------------------------------------------------------------

    def _load(self) -> None:
        data = self._path.read_bytes()
        at = 0
        for fields, at in self._frames(data):
            try:
                self._replay(fields)
            except (TypeError, ValueError, IndexError) as error:
                raise JournalDamaged(f"{self._path} is damaged before byte {at}: {error}") from error
        if at == 0 and data:
            raise JournalDamaged(f"{self._path} was not written by this driver")
        if at + FRAME.size <= len(data):
            # A torn append has nothing sound behind it. Entries there were promised to others.
            (length, _) = FRAME.unpack_from(data, at)
            if unpack(data, at + FRAME.size + length) is not None:
                raise JournalDamaged(f"{self._path} is damaged at byte {at}")

    @staticmethod
    def _frames(data: bytes) -> Iterator[tuple[list[Any], int]]:  # Any: as pack
        at = 0
        while (found := unpack(data, at)) is not None:
            at = found[1]
            yield found

    def _replay(self, fields: list[Any]) -> None:  # Any: as pack
        kind, *rest = fields
        match kind:
            case Frame.HEADER:
                version, address = rest
                if version != FILE_VERSION:
                    raise JournalDamaged(f"{self._path} has format {version}; this version knows {FILE_VERSION}")
                if address != self._address:
                    raise JournalDamaged(f"{self._path} belongs to the voter {address}, not to {self._address}")
            case Frame.ENTRY:
                index, term, command = rest
                if self._entries and index != self._entries[-1][1] + 1:
                    raise ValueError(f"entry {index} follows {self._entries[-1][1]}")
                self._entries.append((command, index, term))
            case Frame.CUT:
                del self._entries[rest[0] - self._entries[0][1] :]
            case Frame.CLEAR:
                self._entries.clear()
            case Frame.VOTE:
                self._term, self._vote = rest
            case _:
                raise ValueError(f"a frame of kind {kind}")

    def _match_snapshot(self) -> None:
        """The log begins where the snapshot ends, also after a crash between the making of the two.

        The library would drop the whole log otherwise, with entries that others count on.
        """
        if not self._snapshot.exists():
            if self._entries and self._entries[0][1] != 1:
                raise JournalDamaged(f"{self._path} begins at entry {self._entries[0][1]}, but its snapshot is missing")
            return
        before, last, *_ = read_snapshot(self._snapshot)
        at = before[1] - self._entries[0][1] if self._entries else 0
        if self._entries and at < 0:
            raise JournalDamaged(f"{self._snapshot} ends at entry {last[1]}, before the log begins")
        if [list(entry) for entry in self._entries[at : at + 2]] == [before, last]:
            del self._entries[:at]

    def _rewrite(self) -> None:
        """The file holds what is in memory, and nothing else."""
        self._close()
        self._pending.clear()
        temporary = self._path.with_suffix(".new")
        with temporary.open("wb") as file:
            file.write(pack([Frame.HEADER, FILE_VERSION, self._address]))
            file.write(pack([Frame.VOTE, self._term, self._vote]))
            for command, index, term in self._entries:
                file.write(pack([Frame.ENTRY, index, term, command]))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        sync_directory(self._directory)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def sync(self) -> None:
        """Everything up to now survives power loss."""
        if self._pending and self._file is not None:
            data = memoryview(b"".join(self._pending))
            while data:
                data = data[os.write(self._file, data) :]
            os.fdatasync(self._file)
            self._pending.clear()

    def _keep_snapshot(self) -> None:
        """The snapshot survives power loss; the library only gave it its name."""
        with suppress(FileNotFoundError):
            descriptor = os.open(self._snapshot, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(self._directory)

    # -- the library's interface --------------------------------------------------------------------------------

    def add(self, command: bytes, idx: int, term: int) -> None:
        command = bytes(command)
        self._entries.append((command, idx, term))
        self._pending.append(pack([Frame.ENTRY, idx, term, command]))

    def clear(self) -> None:
        self._keep_snapshot()
        self._entries.clear()
        self._pending.append(pack([Frame.CLEAR]))

    def deleteEntriesFrom(self, entryFrom: int) -> None:
        if entryFrom < len(self._entries):
            self._pending.append(pack([Frame.CUT, self._entries[entryFrom][1]]))
            del self._entries[entryFrom:]

    def deleteEntriesTo(self, entryTo: int) -> None:
        self._keep_snapshot()
        del self._entries[:entryTo]
        self._rewrite()

    @overload
    def __getitem__(self, item: int) -> Entry: ...
    @overload
    def __getitem__(self, item: slice) -> list[Entry]: ...
    def __getitem__(self, item: int | slice) -> Entry | list[Entry]:
        return self._entries[item]

    def __len__(self) -> int:
        return len(self._entries)

    def setCurrentTerm(self, term: int, votedForNodeId: str | None) -> None:
        self._term, self._vote = term, votedForNodeId
        self._pending.append(pack([Frame.VOTE, term, votedForNodeId]))

    def getCurrentTerm(self) -> int:
        return self._term

    def getVotedForNodeId(self) -> str | None:
        return self._vote

    def setRaftCommitIndex(self, raftCommitIndex: int) -> None:
        """Not kept: the next leader knows what is committed."""

    def getRaftCommitIndex(self) -> int:
        return 1

    def _destroy(self) -> None:
        self.sync()
        self._close()
