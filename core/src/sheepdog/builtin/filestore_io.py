"""File primitives of the file-per-object store: sparse and reserved files, whole writes, durable names, direct I/O.

Nothing here knows objects. Linux calls that Python's ``os`` lacks (``fallocate`` with a mode) go through ``ctypes``.
A block is 4 KiB: the unit in which zeros are found, skipped and punched (docs/on-disk.md, "Object I/O").
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

BLOCK_BYTES = 4096
SECTOR_BYTES = 512  # unit of st_blocks, and what O_DIRECT needs of offset and length
CHUNK_BYTES = 1 << 20  # read size of copies and digests

_COARSE_BYTES = 16 * BLOCK_BYTES
_ZERO_BLOCK = bytes(BLOCK_BYTES)
_ZERO_COARSE = bytes(_COARSE_BYTES)
_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02  # linux/falloc.h
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV})

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.fallocate.restype = ctypes.c_int
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_renameat2 = getattr(_libc, "renameat2", None)  # glibc has it since 2.28
if _renameat2 is not None:
    _renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    _renameat2.restype = ctypes.c_int


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """Whether the file system did it; False means that it cannot. Other trouble raises OSError."""
    while _libc.fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code == errno.EINTR:
            continue
        if code in _UNSUPPORTED:
            return False
        raise OSError(code, os.strerror(code))
    return True


def reserve(fd: int, size: int) -> None:
    """The file has ``size`` bytes and, where the file system can, their space."""
    if size and not _fallocate(fd, 0, 0, size):
        os.ftruncate(fd, size)


def reserve_range(fd: int, offset: int, length: int) -> None:
    """A write to this range will not run out of space half-way. No effect where the file system cannot reserve."""
    _fallocate(fd, _KEEP_SIZE, offset, length)


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """The range reads as zeros and takes no space; False if the file system cannot."""
    return _fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, length)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """All of ``data`` is in the file, however many calls that took."""
    while data:
        written = os.pwrite(fd, data, offset)
        data = data[written:]
        offset += written


def read_all(fd: int, buffer: memoryview, offset: int) -> int:
    """Fills ``buffer`` unless the file ends before; returns the count."""
    total = 0
    while buffer:
        count = os.preadv(fd, (buffer,), offset)
        if count == 0:
            break
        total += count
        offset += count
        buffer = buffer[count:]
    return total


def write_file(path: str, data: memoryview, offset: int, flags: int = 0) -> None:
    """The bytes of an existing file are replaced; ``flags`` are more flags for opening it."""
    fd = os.open(path, os.O_WRONLY | flags)
    try:
        write_all(fd, data, offset)
    finally:
        os.close(fd)


def read_file(path: str, buffer: memoryview, offset: int) -> int:
    """Fills ``buffer`` from a file unless that ends before; returns the count."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return read_all(fd, buffer, offset)
    finally:
        os.close(fd)


def trim_zero_blocks(data: memoryview, offset: int) -> tuple[int, int]:
    """Indexes ``(start, stop)`` of ``data`` without the whole zero blocks at both ends.

    Only blocks that are aligned in the *file* count; ``data`` begins at ``offset`` there. All zero: start == stop.
    """
    start, stop = 0, len(data)
    if offset % BLOCK_BYTES == 0:
        while stop - start >= _COARSE_BYTES and bytes(data[start : start + _COARSE_BYTES]) == _ZERO_COARSE:
            start += _COARSE_BYTES
        while stop - start >= BLOCK_BYTES and bytes(data[start : start + BLOCK_BYTES]) == _ZERO_BLOCK:
            start += BLOCK_BYTES
    if (offset + stop) % BLOCK_BYTES == 0:
        while stop - start >= BLOCK_BYTES and bytes(data[stop - BLOCK_BYTES : stop]) == _ZERO_BLOCK:
            stop -= BLOCK_BYTES
    return start, stop


def nonzero_runs(data: memoryview, offset: int) -> Iterator[tuple[int, int]]:
    """Index ranges of ``data`` that hold something, cut at file blocks; what is left out is zeros."""
    total = len(data)
    run_start = -1
    position = 0
    while position < total:
        length = BLOCK_BYTES - (offset + position) % BLOCK_BYTES
        if length == BLOCK_BYTES and bytes(data[position : position + _COARSE_BYTES]) == _ZERO_COARSE:
            length = _COARSE_BYTES
            zero = True
        else:
            piece = bytes(data[position : position + length])
            zero = piece == _ZERO_BLOCK[: len(piece)]
        if zero and run_start >= 0:
            yield run_start, position
            run_start = -1
        elif not zero and run_start < 0:
            run_start = position
        position += length
    if run_start >= 0:
        yield run_start, total


def fill_new(fd: int, data: memoryview, offset: int, size: int, *, sparse: bool) -> None:
    """The empty file becomes ``size`` bytes: ``data`` at ``offset``, zeros elsewhere.

    Zero blocks are not written. Sparse files take space for what was written only, others are reserved first, so
    that a lack of space shows before anything else happens.
    """
    if sparse:
        os.ftruncate(fd, size)
        for start, stop in nonzero_runs(data, offset):
            write_all(fd, data[start:stop], offset + start)
        return
    start, stop = trim_zero_blocks(data, offset)
    if stop - start != size:
        reserve(fd, size)
    write_all(fd, data[start:stop], offset + start)


def write_sparse(path: str, data: memoryview, offset: int, *, durable: bool, punch: bool) -> bool:
    """Zero blocks at both ends become holes; the rest is reserved before it is written: all of it or nothing.

    :param punch: the file system can make holes, as far as is known.
    :return: whether it still seems so.
    """
    fd = os.open(path, os.O_WRONLY)
    try:
        start, stop = trim_zero_blocks(data, offset) if punch else (0, len(data))
        if stop > start:
            reserve_range(fd, offset + start, stop - start)
            write_all(fd, data[start:stop], offset + start)
        for begin, end in ((0, start), (stop, len(data))):
            if begin < end and not (punch and punch_hole(fd, offset + begin, end - begin)):
                punch = False
                write_all(fd, data[begin:end], offset + begin)
        if durable:
            os.fdatasync(fd)
    finally:
        os.close(fd)
    return punch


class SourceFailed(Exception):
    """Reading the source of a copy failed, as opposed to writing the target."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


@contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceFailed(error) from error


def copy_contents(source: int, target: int) -> None:
    """The empty ``target`` equals ``source`` in bytes, in modification time, and in whether all its space is reserved.

    :raises SourceFailed: the source cannot be read. Any other OSError is the target's.
    """
    with _reading():
        status = os.fstat(source)
    size = status.st_size
    if status.st_blocks * SECTOR_BYTES >= size:
        reserve(target, size)
    else:
        os.ftruncate(target, size)
    buffer = memoryview(bytearray(min(CHUNK_BYTES, max(size, 1))))
    position = 0
    while position < size:
        with _reading():
            try:
                begin = os.lseek(source, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole is left
                    break
                raise
            position = os.lseek(source, begin, os.SEEK_HOLE)
        while begin < position:
            with _reading():
                count = os.preadv(source, (buffer[: position - begin],), begin)
            if count == 0:
                break
            write_all(target, buffer[:count], begin)
            begin += count
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))


def sync_directory(path: str) -> None:
    """Names that were made, changed or removed in the directory so far survive power loss."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def exchange(one: str, other: str) -> bool:
    """Each of the two names has the other's file, in one step; False where the system or the file system cannot."""
    if _renameat2 is None:
        return False
    if _renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), one)


def file_id(path: str) -> int:
    """Tells the file from all others of its disk, whatever its name; the same after a restart."""
    return os.stat(path).st_ino


class _Bounce(threading.local):
    """A page-aligned buffer per thread: what callers lend is rarely aligned as O_DIRECT wants it."""

    buffer: mmap.mmap | None = None

    def view(self, length: int) -> memoryview:
        if self.buffer is None or len(self.buffer) < length:
            self.buffer = mmap.mmap(-1, max(length, CHUNK_BYTES))
        return memoryview(self.buffer)[:length]


_bounce = _Bounce()


def direct_possible(offset: int, length: int) -> bool:
    """Offset and length are multiples of 512 and there is something to move."""
    return length > 0 and offset % SECTOR_BYTES == 0 and length % SECTOR_BYTES == 0


def direct_supported(path: str) -> bool:
    """The file system opens files for direct I/O; ``path`` is free for a file that is gone afterwards.

    Where nothing can be made there the answer is yes: the first request will tell what the matter is.
    """
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError as error:
        return error.errno != errno.EINVAL
    finally:
        with suppress(OSError):
            os.unlink(path)  # some make the file before they refuse it
    return True


def write_direct(path: str, data: memoryview, offset: int, *, durable: bool) -> bool:
    """Writes past the page cache; False, with nothing written, where the file system or its block size forbids it."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_DIRECT | (os.O_DSYNC if durable else 0))
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    try:
        with _bounce.view(len(data)) as view:
            view[:] = data
            try:
                written = os.pwrite(fd, view, offset)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return False
                raise
            # A rest is not aligned any more by right; the plain path takes the whole again.
            return written == len(data)
    finally:
        os.close(fd)


def read_direct(path: str, buffer: memoryview, offset: int) -> int | None:
    """Reads past the page cache; returns the count, or None where the file system or its block size forbids it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    try:
        with _bounce.view(len(buffer)) as view:
            try:
                count = os.preadv(fd, (view,), offset)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return None
                raise
            if count < len(buffer) and offset + count < os.fstat(fd).st_size:
                return None
            buffer[:count] = view[:count]
            return count
    finally:
        os.close(fd)
