"""The file that a local cluster shares, and what the kernel promises about it.

Layout::

    0        header: magic, version, token of this log (random, new with each reset), position of the newest snapshot
    4096     1024 slots of 64 bytes, one per session: session id, heartbeat, position up to which the session has read
    69632    the log: records, appended and never changed

*Order.* A write to a regular file opened with ``O_APPEND`` holds the inode lock from choosing the offset to the last
byte. So records never interleave, their order in the file is the order of the cluster, and no lock of ours is held that
a stopped process could keep. A stop signal acts only after the system call; a kill may cut a record short, and then
the next record follows the stump directly. Readers tell a stump from damage, see :class:`Cursor`.

*Liveness.* A session holds an exclusive open-file-description lock on the bytes of its slot. The kernel drops it when
the process dies, whatever the reason.

*Reset.* Whoever comes first, while no slot is locked, empties the log. Taking a slot and resetting happen under the
lock of the header, which nobody needs for anything but joining.

*Compaction.* The log position only grows; the disk space below the newest snapshot and below every reader is given
back by punching a hole. A reader announces its position in its slot *before* it looks at the snapshot position a second
time, and the one who compacts publishes the snapshot *before* it looks at the slots; so one of the two notices.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import stat
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from sheepdog.api import PAYLOAD_BYTES_MAX, ClusterUnavailable, ConfigError, RecordDamaged

MAGIC = b"sheepdog local\x00\x00"
VERSION = 1
HEADER = struct.Struct("<16sI4x8s")  # magic, version, token
SNAPSHOT = struct.Struct("<QQ")  # position, its complement: a torn read is noticed
SNAPSHOT_AT = 64
SLOTS_AT = 4096
SLOT = struct.Struct("<16sQQ")  # session id, heartbeat (CLOCK_MONOTONIC ns), position read up to
SLOT_BYTES = 64
SLOT_COUNT = 1024
LOG_AT = SLOTS_AT + SLOT_COUNT * SLOT_BYTES
TOKEN_BYTES = 8
FRAME = struct.Struct("<8sII")  # token, body bytes, CRC-32 of body
BODY_BYTES_MAX = PAYLOAD_BYTES_MAX + 768 * 1024  # a snapshot of 1024 members fits as well, with 32 disks each
_CHUNK_BYTES = 64 * 1024
_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, len, pid
_FALLOC_FL_KEEP_SIZE = 1
_FALLOC_FL_PUNCH_HOLE = 2

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Slot:
    """What a session publishes besides the log."""

    session: bytes
    beat_ns: int
    position: int


class Rendezvous:
    """FILE, opened. ``close`` gives up the slot and with it the proof that we live."""

    def __init__(self, path: str) -> None:
        """Opens or creates FILE, without joining.

        :raises ConfigError: it cannot be opened, or is something else than a file of ours.
        """
        self.path = path
        self.slot = -1
        self.token = b""
        try:
            # O_NONBLOCK: a FIFO of that name must not hang us
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot open cluster file {path}: {error.strerror}") from error
        try:
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                raise ConfigError(f"cluster file {path} is not a regular file; name another one: -c local:FILE")
            # pwrite on an O_APPEND descriptor would append (Linux), so the log has a descriptor of its own
            self._log_fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            os.close(self._fd)
            raise ConfigError(f"cannot open cluster file {path}: {error.strerror}") from error
        except ConfigError:
            os.close(self._fd)
            raise

    def close(self) -> None:
        os.close(self._log_fd)
        os.close(self._fd)

    # -- locks --------------------------------------------------------------------------------------------------

    def _try_lock(self, start: int, length: int) -> bool:
        request = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, request)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                return False
            raise
        return True

    def _unlock(self, start: int, length: int) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, start, length, 0))

    def _locked_by_other(self, start: int, length: int) -> int | None:
        """Start of the first locked range in there, or None. Our own locks do not count."""
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0))
        kind, _, found, _, _ = _FLOCK.unpack(answer)
        return None if kind == fcntl.F_UNLCK else int(found)

    @contextlib.contextmanager
    def try_compaction_lock(self) -> Iterator[bool]:
        """Whether nobody else compacts at this time. Held by a stopped process it costs disk space, nothing else."""
        got = self._try_lock(SNAPSHOT_AT, SNAPSHOT.size)
        try:
            yield got
        finally:
            if got:
                self._unlock(SNAPSHOT_AT, SNAPSHOT.size)

    # -- joining ------------------------------------------------------------------------------------------------

    def try_enter(self, session: bytes, beat_ns: int) -> bool:
        """We hold a slot and the log is ready; False if another one is entering at this moment.

        :raises ConfigError: FILE is not ours, or damaged.
        :raises ClusterUnavailable: all slots are taken, or FILE was replaced meanwhile.
        """
        if not self._try_lock(0, 1):
            return False
        try:
            if not self.still_there():
                raise ClusterUnavailable(f"cluster file {self.path} was replaced while joining")
            self._check_or_reset()
            for index in range(SLOT_COUNT):
                if self._try_lock(SLOTS_AT + index * SLOT_BYTES, SLOT_BYTES):
                    self.slot = index
                    self.write_slot(session, beat_ns, 0)
                    return True
            raise ClusterUnavailable(f"all {SLOT_COUNT} places of cluster file {self.path} are taken")
        except OSError as error:
            raise ClusterUnavailable(f"cluster file {self.path}: {error.strerror}") from error
        finally:
            self._unlock(0, 1)

    def _check_or_reset(self) -> None:
        """With the header locked: the header is ours and whole; the log is empty if nobody uses it."""
        head = os.pread(self._fd, HEADER.size, 0)
        size = os.fstat(self._fd).st_size
        if head.strip(b"\0"):
            advice = f"remove it if no sheep uses it, or name another one: -c local:FILE ({self.path})"
            if len(head) < HEADER.size:
                raise ConfigError(f"cluster file is truncated to {size} bytes; {advice}")
            magic, version, token = HEADER.unpack(head)
            if magic != MAGIC:
                raise ConfigError(f"cluster file was not made by this cluster driver; {advice}")
            if version != VERSION:
                raise ConfigError(f"cluster file has format {version}, this driver writes {VERSION}; {advice}")
            if self._locked_by_other(SLOTS_AT, LOG_AT - SLOTS_AT) is not None:
                if size < LOG_AT:
                    raise ConfigError(f"cluster file is truncated to {size} bytes while in use; {advice}")
                self.token = token
                return
        elif size > LOG_AT:  # zeros up to there are what a killed creator leaves
            raise ConfigError(
                f"cluster file was not made by this cluster driver; name another one: -c local:FILE ({self.path})"
            )
        # Nobody is there: what it holds is of no use to anybody.
        self.token = os.urandom(TOKEN_BYTES)
        os.ftruncate(self._fd, 0)
        os.ftruncate(self._fd, LOG_AT)
        os.pwrite(self._fd, HEADER.pack(MAGIC, VERSION, self.token), 0)

    def still_there(self) -> bool:
        """Whether FILE is still the file we opened and, once entered, holds the same log."""
        try:
            mine, log, named = os.fstat(self._fd), os.fstat(self._log_fd), os.stat(self.path)
        except OSError:
            return False
        if len({(mine.st_dev, mine.st_ino), (log.st_dev, log.st_ino), (named.st_dev, named.st_ino)}) > 1:
            return False
        return not self.token or os.pread(self._fd, HEADER.size, 0) == HEADER.pack(MAGIC, VERSION, self.token)

    def touch(self) -> None:
        """FILE looks recently used, so that cleaners of /tmp leave it alone."""
        os.utime(self._fd)

    # -- slots --------------------------------------------------------------------------------------------------

    def write_slot(self, session: bytes, beat_ns: int, position: int) -> None:
        os.pwrite(self._fd, SLOT.pack(session, beat_ns, position), SLOTS_AT + self.slot * SLOT_BYTES)

    def read_slot(self, index: int) -> Slot:
        return Slot(*SLOT.unpack(os.pread(self._fd, SLOT.size, SLOTS_AT + index * SLOT_BYTES)))

    def slot_locked(self, index: int) -> bool:
        """Whether a living process holds the slot."""
        return index == self.slot or self._locked_by_other(SLOTS_AT + index * SLOT_BYTES, SLOT_BYTES) is not None

    # -- log ----------------------------------------------------------------------------------------------------

    def append(self, body: bytes) -> int:
        """The record is in the log, whole; its position is somewhere at or after the size before the call.

        :returns: the size of the log file afterwards, at least.
        :raises ClusterUnavailable: no space; readers skip what was written.
        """
        frame = FRAME.pack(self.token, len(body), zlib.crc32(body)) + body
        try:
            written = os.write(self._log_fd, frame)
        except OSError as error:
            raise ClusterUnavailable(f"cannot write cluster file {self.path}: {error.strerror}") from error
        if written != len(frame):
            raise ClusterUnavailable(f"no space for cluster file {self.path}")
        return os.fstat(self._fd).st_size

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def pread(self, length: int, position: int) -> bytes:
        return os.pread(self._fd, length, position)

    def snapshot_position(self) -> int:
        """Where the newest snapshot record begins; 0 if there is none yet."""
        for _ in range(100):
            position, complement = SNAPSHOT.unpack(os.pread(self._fd, SNAPSHOT.size, SNAPSHOT_AT))
            if position == 0 == complement or position ^ complement == (1 << 64) - 1:
                return int(position)
        raise RecordDamaged("the snapshot position is garbled")

    def publish_snapshot(self, position: int) -> None:
        os.pwrite(self._fd, SNAPSHOT.pack(position, position ^ ((1 << 64) - 1)), SNAPSHOT_AT)

    def discard_before(self, position: int) -> None:
        """Disk space of the log below ``position`` is free again. Nothing happens where the file system cannot."""
        length = position - LOG_AT
        if length > 0:
            mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
            _libc.fallocate(self._fd, mode, ctypes.c_int64(LOG_AT), ctypes.c_int64(length))


class Cursor:
    """Reads the log record by record from ``position``; any number of cursors read the same sequence.

    What a killed writer leaves is a proper prefix of a record, directly followed by the next record. It is skipped once
    that next record is there; until then it cannot be told from a write in progress. Everything else that is not
    a record is damage.
    """

    def __init__(self, rendezvous: Rendezvous, position: int) -> None:
        self.position = position
        self._rendezvous = rendezvous
        self._chunk = b""
        self._chunk_at = position

    def _bytes(self, length: int) -> bytes:
        """Up to ``length`` bytes at ``position``, fewer at the end of the log."""
        begin = self.position - self._chunk_at
        if begin + length > len(self._chunk):
            self._chunk = self._rendezvous.pread(max(length, _CHUNK_BYTES), self.position)
            self._chunk_at, begin = self.position, 0
        return self._chunk[begin : begin + length]

    def next(self) -> bytes | None:
        """The body of the next record, or None at the end of the log.

        :raises RecordDamaged: no record can be there.
        """
        while True:
            head = self._bytes(FRAME.size)
            if not head:
                if self._rendezvous.size() < self.position:
                    raise RecordDamaged(f"the log ends before position {self.position}")
                return None
            length = -1
            if len(head) == FRAME.size:
                token, body_bytes, checksum = FRAME.unpack(head)
                length = body_bytes if token == self._rendezvous.token else -1
                if 0 <= length <= BODY_BYTES_MAX:
                    body = self._bytes(FRAME.size + length)[FRAME.size :]
                    if len(body) == length and zlib.crc32(body) == checksum:
                        self.position += FRAME.size + length
                        return body
            stump = self._stump(length)
            if stump is None:
                return None
            self.position += stump

    def _stump(self, length: int) -> int | None:
        """Bytes to skip to the next record; None if there is no next record yet.

        :raises RecordDamaged: what stands here is not the beginning of a record.
        """
        token = self._rendezvous.token
        data = self._rendezvous.pread(FRAME.size + 2 * BODY_BYTES_MAX, self.position)
        # stumps too short to hold a whole token, then a token or the end
        prefixes = b"|".join(re.escape(token[:cut]) for cut in range(TOKEN_BYTES - 1, 0, -1))
        if not re.match(b"(?:" + prefixes + b")*(?:" + re.escape(token) + rb"|\Z)", data, re.DOTALL):
            raise RecordDamaged(f"no record begins at position {self.position}")
        first = begin = data.find(token, 1)
        if length > BODY_BYTES_MAX and not 0 <= first < FRAME.size:  # else the length is bytes of the next record
            raise RecordDamaged(f"impossible record length at position {self.position}")
        while begin >= 0:
            head = data[begin : begin + FRAME.size]
            if len(head) < FRAME.size:
                return None
            _, next_length, checksum = FRAME.unpack(head)
            body = data[begin + FRAME.size : begin + FRAME.size + next_length]
            if len(body) == next_length and zlib.crc32(body) == checksum:
                if 0 <= length <= first - FRAME.size:
                    raise RecordDamaged(f"a whole record with a wrong checksum at position {self.position}")
                return begin  # several stumps may lie before it
            begin = data.find(token, begin + 1)
        return None
