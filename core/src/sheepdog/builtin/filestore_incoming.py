"""Temporary files of the file-per-object store: a whole shard is written there and then takes its name."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress

from sheepdog.api import Buffer, Incoming, StoreBusy, StoreError
from sheepdog.builtin import filestore_io as io
from sheepdog.builtin.filestore_disk import Disk

FILE_MODE = 0o660
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_WRITE = os.O_WRONLY


def new_file(disk: Disk, path: str) -> int:
    """Descriptor of a new file on the disk."""
    try:
        return os.open(path, _CREATE, FILE_MODE)
    except FileNotFoundError:  # somebody removed the sub-directory; the disk itself was found good
        disk.make_directories()
        return os.open(path, _CREATE, FILE_MODE)


class IncomingFile(Incoming):
    """As every other file it is open for moments only, and made once: if it vanishes, nobody goes on with a part."""

    def __init__(
        self, disk: Disk, temporary: str, size_bytes: int, *, sparse: bool, become: Callable[[bool], None]
    ) -> None:
        """:param become: gives the file its name; told whether that is to survive power loss."""
        self._disk = disk
        self._temporary = temporary
        self._size_bytes = size_bytes
        self._sparse = sparse
        self._become = become
        self._lock = threading.Lock()
        self._made = False
        self._space_bytes = 0  # that was written, so that it has its space

    def write(self, data: Buffer, *, offset_bytes: int) -> None:
        view = memoryview(data)
        try:
            self._make()
            fd = os.open(self._temporary, _WRITE)
            try:
                if self._sparse:
                    for start, stop in io.nonzero_runs(view, offset_bytes):
                        io.write_all(fd, view[start:stop], offset_bytes + start)
                else:
                    start, stop = io.trim_zero_blocks(view, offset_bytes)
                    io.write_all(fd, view[start:stop], offset_bytes + start)
                    with self._lock:
                        self._space_bytes += stop - start
            finally:
                os.close(fd)
        except OSError as error:
            raise self._trouble(error) from error

    def _make(self) -> None:
        with self._lock:
            if self._made:
                return
            # An unmounted disk leaves an empty directory behind that would take the file without complaint.
            self._disk.check()
            fd = new_file(self._disk, self._temporary)
            self._made = True
            try:
                os.ftruncate(fd, self._size_bytes)
            finally:
                os.close(fd)

    def finish(self, *, durable: bool) -> None:
        try:
            try:
                self._make()
                reserves = not self._sparse and self._space_bytes != self._size_bytes
                if reserves or durable:
                    fd = os.open(self._temporary, _WRITE)
                    try:
                        if reserves:
                            io.reserve(fd, self._size_bytes)
                        if durable:
                            os.fdatasync(fd)
                    finally:
                        os.close(fd)
                self._become(durable)
            except BaseException:
                self.discard()
                raise
        except OSError as error:
            raise self._trouble(error) from error
        self._made = False

    def discard(self) -> None:
        if self._made:
            with suppress(OSError):
                os.unlink(self._temporary)

    def _trouble(self, error: OSError) -> StoreError:
        if isinstance(error, FileNotFoundError):
            self._disk.check()
            return StoreBusy(f"{os.path.basename(self._temporary)} was removed before it was whole")
        return self._disk.trouble(error, f"writing {os.path.basename(self._temporary)}")
