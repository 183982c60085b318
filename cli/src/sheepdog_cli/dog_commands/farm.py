"""The directory of cluster snapshots on disk: content files, each written once, and the log that names them."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import replace

from sheepdog.errors import ProtocolError
from sheepdog.model.farm import (
    LOG_NAME,
    OBJECTS_NAME,
    SnapshotLog,
    SnapshotRecord,
    TrunkEntry,
    content_path,
    digest_of,
    pack_slice_list,
    pack_trunk,
    slices,
    unpack_slice_list,
    unpack_trunk,
)

Buffer = bytes | bytearray | memoryview


class FarmError(Exception):
    """The directory cannot be used, or something in it is not what its name says."""


class Farm:
    """One directory with any number of cluster snapshots. Different threads may store objects at once."""

    def __init__(self, path: str) -> None:
        """The directory exists afterwards.

        :raises FarmError: it cannot be made or read; the message has the lines to print.
        """
        self._objects = os.path.join(path, OBJECTS_NAME)
        self._log_path = os.path.join(path, LOG_NAME)
        if os.path.exists(path) and not os.path.isdir(path):
            reason = os.strerror(errno.ENOTDIR)
            raise FarmError(f"Path is not a directory: {path}\nFail to create directory: {reason}")
        try:
            os.makedirs(path, 0o755, exist_ok=True)
            os.makedirs(self._objects, 0o755, exist_ok=True)
            for number in range(256):
                os.makedirs(os.path.join(self._objects, f"{number:02x}"), 0o755, exist_ok=True)
            with open(self._log_path, "ab"):
                pass
            with open(self._log_path, "rb") as source:
                self.log = SnapshotLog.unpack(source.read())
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise FarmError(f"{reason}\nFail to create directory: {reason}") from error
        except ProtocolError as error:
            raise FarmError(str(error)) from error

    def find(self, tag: bytes) -> SnapshotRecord | None:
        """The snapshot with that tag."""
        return next((record for record in self.log.records if record.tag == tag), None)

    def at(self, index: int) -> SnapshotRecord | None:
        """The snapshot with that index."""
        return next((record for record in self.log.records if record.index == index), None)

    def add(self, defaults: SnapshotLog, tag: bytes, time: int, entries: Sequence[TrunkEntry]) -> None:
        """The snapshot is in the log, durably.

        :param defaults: the cluster's copies, policy and shift; kept from the first snapshot of a directory.
        :raises FarmError: the directory cannot be written.
        """
        trunk = self._store(pack_trunk(list(entries)))
        log = self.log if self.log.records else replace(defaults, records=())
        index = max((record.index for record in log.records), default=0) + 1
        self.log = replace(log, records=(*log.records, SnapshotRecord(index, tag, time, trunk)))
        self._write(self._log_path, self.log.pack())

    def store_object(self, data: Buffer) -> bytes:
        """The digest under which ``load_object`` finds the data.

        :raises FarmError: the directory cannot be written.
        """
        return self._store(pack_slice_list([self._store(piece) for piece in slices(data)]))

    def load_object(self, digest: bytes) -> bytes:
        """The data stored under the digest, verified.

        :raises FarmError: missing or damaged.
        """
        return b"".join(self._load(piece) for piece in self._slice_list(digest))

    def load_head(self, digest: bytes) -> bytes:
        """The first slice of an object.

        :raises FarmError: missing or damaged.
        """
        found = self._slice_list(digest)
        return self._load(found[0]) if found else b""

    def trunk(self, record: SnapshotRecord) -> tuple[TrunkEntry, ...]:
        """The objects of a snapshot.

        :raises FarmError: missing or damaged.
        """
        try:
            return unpack_trunk(self._load(record.trunk))
        except ProtocolError as error:
            raise FarmError(str(error)) from error

    def _slice_list(self, digest: bytes) -> tuple[bytes, ...]:
        try:
            return unpack_slice_list(self._load(digest))
        except ProtocolError as error:
            raise FarmError(str(error)) from error

    def _path(self, digest: bytes) -> str:
        return os.path.join(self._objects, *content_path(digest))

    def _store(self, data: Buffer) -> bytes:
        digest = digest_of(data)
        path = self._path(digest)
        if not os.path.exists(path):
            self._write(path, data)
        return digest

    def _load(self, digest: bytes) -> bytes:
        path = self._path(digest)
        try:
            with open(path, "rb") as source:
                data = source.read()
        except OSError as error:
            raise FarmError(f"cannot read {path}: {os.strerror(error.errno or 0)}") from error
        if digest_of(data) != digest:
            raise FarmError(f"{path} is damaged: its content has another SHA-1")
        return data

    @staticmethod
    def _write(path: str, data: Buffer) -> None:
        import threading

        # Under another name first: a file that is there is complete, whenever we are stopped.
        temporary = f"{path}.{os.getpid()}.{threading.get_ident()}.tmp"
        try:
            with open(temporary, "wb") as target:
                target.write(data)
                target.flush()
                os.fsync(target.fileno())
            os.rename(temporary, path)
        except OSError as error:
            raise FarmError(f"cannot write {path}: {os.strerror(error.errno or 0)}") from error
