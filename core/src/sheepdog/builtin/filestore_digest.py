"""SHA-1 of object files, remembered beside files that are read-only.

The original keeps the digest of a snapshot's object in an attribute and believes it for ever. Here a second attribute
says of which modification time and size the digest was taken, so that a file that changed since is hashed again.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from struct import Struct

from sheepdog.builtin import filestore_io as io

DIGEST_ATTRIBUTE = "user.obj.sha1"  # 20 bytes, known to the original too
DIGEST_OF_ATTRIBUTE = "user.obj.sha1.of"  # modification time and size the digest was taken of

_DIGEST_OF = Struct("<QQ")
_DIGEST_BYTES = 20
# A file changed twice within one tick of the kernel's clock can show one time for both. A digest is remembered only
# if the clock has gone on by more than any tick since the last change.
_SETTLED_NS = 100_000_000


def digest_file(path: str, *, cache: bool) -> bytes:
    """SHA-1 of all bytes of the file.

    :param cache: the file is read-only: believe and leave a note of the digest beside it.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        before = os.fstat(fd)
        of = _DIGEST_OF.pack(before.st_mtime_ns, before.st_size)
        if cache:
            remembered = _remembered_digest(fd, of)
            if remembered is not None:
                return remembered
        sha1 = hashlib.sha1(usedforsecurity=False)
        buffer = memoryview(bytearray(io.CHUNK_BYTES))
        position = 0
        while count := io.read_all(fd, buffer, position):
            sha1.update(buffer[:count])
            position += count
        digest = sha1.digest()
        if cache:
            _remember_digest(fd, digest, of, before.st_mtime_ns)
        return digest
    finally:
        os.close(fd)


def _remembered_digest(fd: int, of: bytes) -> bytes | None:
    """The digest beside the file if it was taken of exactly this modification time and size.

    One that the original left has no such note and is not believed: it would hide that the file changed since.
    """
    try:
        if os.getxattr(fd, DIGEST_OF_ATTRIBUTE) == of:
            digest = os.getxattr(fd, DIGEST_ATTRIBUTE)
            return digest if len(digest) == _DIGEST_BYTES else None
    except OSError:  # none there, or none possible
        pass
    return None


def _remember_digest(fd: int, digest: bytes, of: bytes, mtime_ns: int) -> None:
    with suppress(OSError):  # a disk without room for attributes costs time, not correctness
        os.setxattr(fd, DIGEST_ATTRIBUTE, digest)
        after = os.fstat(fd)  # its ctime is now, by the file system's own clock
        if of == _DIGEST_OF.pack(after.st_mtime_ns, after.st_size) and after.st_ctime_ns - mtime_ns > _SETTLED_NS:
            os.setxattr(fd, DIGEST_OF_ATTRIBUTE, of)
