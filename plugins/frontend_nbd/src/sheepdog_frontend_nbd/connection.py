"""One client: a receiver on a channel that answers requests to completion.

Negotiation may have to wait (a volume is opened, exports are listed), so each option that waits is a task; meanwhile
nothing more is read. After that there are no tasks: a request is checked, handed to the volume with a callback, and the
callback queues the reply. Replies that are ready when a receive has been worked through leave in one write.

Bounds: requests in flight, bytes in flight (data of reads and writes) and what the channel has queued. Beyond any of
them the connection is not read from until there is room again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from sheepdog.api import Buffer, Channel, InvalidParameters, ReadOnlyObject, SheepdogError, StoreFull, Volume
from sheepdog_frontend_nbd import protocol
from sheepdog_frontend_nbd.decoder import Decoder
from sheepdog_frontend_nbd.protocol import (
    CHUNK_DONE,
    CHUNK_MAGIC,
    CMD_READ,
    CMD_WRITE,
    FLAG_FAST_ZERO,
    FLAG_FUA,
    FLAG_NO_HOLE,
    FLAG_REQ_ONE,
    OFFSET_DATA_HEAD,
    SIMPLE_REPLY,
    SIMPLE_REPLY_MAGIC,
    ChunkType,
    Command,
    Errno,
    KiB,
    MiB,
    ProtocolViolation,
)

if TYPE_CHECKING:
    from sheepdog_frontend_nbd.negotiation import Negotiation

logger = logging.getLogger(__name__)

REQUESTS_MAX = 256
INFLIGHT_BYTES_MAX = 64 * MiB
HOLE_BYTES_MIN = 32 * KiB  # shorter reads are not worth asking whether they are a hole
EXTENTS_MAX = 16 * KiB  # descriptors in one block status reply
_LENGTH_MAX = (1 << 32) - 1
_OFFSET_DATA = int(ChunkType.OFFSET_DATA)
_RESULT_NO_MEM = 0x12
_RESULTS_SHUTDOWN = (0x11, 0x8D)


def errno_of(error: Exception) -> Errno:
    """The number that a client is told."""
    if isinstance(error, StoreFull):
        return Errno.ENOSPC
    if isinstance(error, ReadOnlyObject):
        return Errno.EPERM
    if isinstance(error, InvalidParameters):
        return Errno.EINVAL
    if isinstance(error, SheepdogError):
        if error.result == _RESULT_NO_MEM:
            return Errno.ENOMEM
        if error.result in _RESULTS_SHUTDOWN:
            return Errno.ESHUTDOWN
    return Errno.EIO


class Connection:
    """The receiver of one client's bytes.

    ``ended`` is called once, when the connection is gone and no request of it is in flight any more.
    """

    def __init__(
        self,
        channel: Channel,
        ended: Callable[[Connection], None],
        *,
        greeted: bool = False,
    ) -> None:
        self.channel = channel
        self.volume: Volume | None = None
        self.negotiation: Negotiation  # set by its own constructor
        self.decoder = Decoder(self, greeted=greeted)
        self.structured = False
        self.block_status = False
        self.retired = False  # TLS took over the channel
        self._ended = ended
        self._size_bytes = 0
        self._read_only = True
        self._read_flags = FLAG_FUA
        self._out: list[Buffer] = []
        self._passing = False  # a receive is being worked through
        self._inflight = 0
        self._inflight_bytes = 0
        self._negotiating = False  # an option waits for something
        self._paused = False
        self._closing = False  # no more requests; closed when those in flight have ended
        self._closed = False
        self._gone = False  # the channel has ended
        self._told = False

    # ---- the receiver

    def get_buffer(self, size_hint: int) -> memoryview:
        return self.decoder.get_buffer(size_hint)

    def buffer_updated(self, count: int) -> None:
        if self._closing:
            return  # whatever follows a goodbye or a violation
        self._passing = True
        try:
            self.decoder.received(count)
        except ProtocolViolation as violation:
            self._violated(violation)
        self._end_pass()

    def closed(self, error: Exception | None) -> None:
        if error is not None:
            logger.debug("nbd client %s: %s", self.channel.remote, error)
        self._gone = self._closing = True
        if self._inflight and self.volume is not None:
            self.volume.abandon()  # the client may send it again through another sheep, and newer writes after it
        self._out.clear()
        self.decoder.drop()
        self._tell_ended()

    def writable(self) -> None:
        self._balance()

    # ---- flow

    def _violated(self, violation: ProtocolViolation) -> None:
        logger.info("nbd client %s is disconnected: %s", self.channel.remote, violation)
        self.finish()

    def finish(self) -> None:
        """Nothing more is read; the connection is closed when requests in flight have been answered."""
        self._closing = True
        self.decoder.drop()
        if not self._inflight and not self._passing:
            self._flush()
            self._close()

    def _close(self) -> None:
        if not self._gone and not self._closed:
            self._closed = True
            self.channel.close()

    def retire(self) -> int:
        """The channel belongs to somebody else from now on. What was queued has left.

        :return: bytes that were received and not looked at.
        """
        self._flush()
        self.retired = self._gone = self._closing = self._told = True
        waiting = self.decoder.waiting
        self.decoder.drop()
        return waiting

    def stop(self) -> None:
        """The front end ends: as ``finish``, and an idle client is disconnected at once."""
        self.finish()

    def _end_pass(self) -> None:
        """Replies leave; then whatever the bounds allow goes on."""
        decoder = self.decoder
        while True:
            self._passing = False
            self._flush()
            if self._closing:
                if not self._inflight:
                    self._close()
                return
            blocked = self._over()
            if not blocked and decoder.blocked:
                # Callbacks made room while the pass ran, or an option has been answered.
                decoder.blocked = False
                self._passing = True
                try:
                    decoder.pump()
                except ProtocolViolation as violation:
                    self._violated(violation)
                continue
            decoder.blocked = blocked
            if blocked != self._paused:
                self._paused = blocked
                if blocked:
                    self.channel.pause_reading()
                else:
                    self.channel.resume_reading()
            return

    def _over(self) -> bool:
        return (
            self._negotiating
            or self._inflight >= REQUESTS_MAX
            or self._inflight_bytes >= INFLIGHT_BYTES_MAX
            or self.channel.congested
        )

    def _balance(self) -> None:
        """Something ended outside of a pass."""
        if not self._passing and (self.decoder.blocked or self._closing):
            self._end_pass()

    def _flush(self) -> None:
        out = self._out
        if out:
            self._out = []
            if not self._gone:
                self.channel.write(out)

    def send(self, data: Buffer) -> None:
        """``data`` leaves, in order."""
        self._out.append(data)
        if not self._passing:
            self._flush()

    # ---- negotiation

    def client_flags(self, flags: int) -> None:
        self.negotiation.client_flags(flags)

    def option(self, code: int, data: bytes) -> None:
        self.negotiation.option(code, data)

    def hold(self) -> None:
        """Nothing more is read until ``go_on``."""
        self._negotiating = True
        self.decoder.blocked = True

    def go_on(self) -> None:
        """The option that was held up is answered."""
        self._negotiating = False
        self._balance()
        self._tell_ended()

    def serve(self, volume: Volume, *, read_only: bool, structured: bool, block_status: bool) -> None:
        """From now on the client sends requests for ``volume``, which this connection closes when it ends."""
        self.volume = volume
        self.structured = structured
        self.block_status = block_status
        self._size_bytes = volume.info.size_bytes
        self._read_only = read_only
        self._read_flags = FLAG_FUA | protocol.FLAG_DF if structured else FLAG_FUA
        self.decoder.transmission = True

    def _tell_ended(self) -> None:
        if self._gone and not self._inflight and not self._negotiating and not self._told:
            self._told = True
            self._ended(self)

    # ---- requests

    def request(
        self, flags: int, command: int, cookie: int, offset: int, length: int, payload: bytes | bytearray | None
    ) -> None:
        if command == CMD_READ:
            if (
                0 < length <= protocol.REQUEST_BYTES_MAX
                and offset + length <= self._size_bytes
                and not flags & ~self._read_flags
            ):
                volume = self.volume
                assert volume is not None, "requests follow the choice of an export"
                if self.structured and length >= HOLE_BYTES_MIN and self._is_hole(volume, offset, length):
                    self._out.append(protocol.hole_chunk(cookie, offset, length))
                    return
                inflight = self._inflight = self._inflight + 1
                self._inflight_bytes += length
                if inflight >= REQUESTS_MAX or self._inflight_bytes >= INFLIGHT_BYTES_MAX:
                    self.decoder.blocked = True
                volume.read(offset, length, partial(self._read_done, cookie, offset, length))
            else:
                self._odd_read(flags, cookie, offset, length)
        elif command == CMD_WRITE:
            if not self._read_only and offset + length <= self._size_bytes and not flags & ~FLAG_FUA:
                volume = self.volume
                assert volume is not None and payload is not None, "a write has a payload"
                inflight = self._inflight = self._inflight + 1
                self._inflight_bytes += length
                if inflight >= REQUESTS_MAX or self._inflight_bytes >= INFLIGHT_BYTES_MAX:
                    self.decoder.blocked = True
                volume.write(offset, payload, partial(self._changed, cookie, length, flags & FLAG_FUA))
            elif flags & ~FLAG_FUA:
                self._error(cookie, Errno.EINVAL)
            else:
                self._error(cookie, Errno.EPERM if self._read_only else Errno.ENOSPC)
        else:
            self._other(flags, command, cookie, offset, length)

    def _read_done(
        self,
        cookie: int,
        offset: int,
        length: int,
        error: Exception | None,
        data: Any,  # Any: a buffer
    ) -> None:
        if error is None and len(data) == length:
            out = self._out
            if self.structured:
                out.append(OFFSET_DATA_HEAD.pack(CHUNK_MAGIC, CHUNK_DONE, _OFFSET_DATA, cookie, 8 + length, offset))
            else:
                out.append(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, 0, cookie))
            out.append(data)
        else:
            self._read_error(cookie, errno_of(error) if error else Errno.EIO, str(error or "short read"))
        self._inflight -= 1
        self._inflight_bytes -= length
        if not self._passing:
            self._completed()

    def _changed(self, cookie: int, length: int, fua: int, error: Exception | None, _: Any) -> None:  # Any: nothing
        """A command that answers without data has ended, but for the flush that FUA asks for."""
        if fua and error is None:
            volume = self.volume
            assert volume is not None, "requests follow the choice of an export"
            volume.flush(partial(self._changed, cookie, length, 0))
            return
        self._out.append(SIMPLE_REPLY.pack(SIMPLE_REPLY_MAGIC, errno_of(error) if error is not None else 0, cookie))
        self._inflight -= 1
        self._inflight_bytes -= length
        if not self._passing:
            self._completed()

    def _completed(self) -> None:
        """A request ended outside of a pass."""
        if self._gone:
            self._out.clear()
            self._tell_ended()
        elif self.decoder.blocked or self._closing:
            self._end_pass()
        else:
            self._flush()

    def _begin(self, length: int = 0) -> None:
        self._inflight += 1
        self._inflight_bytes += length
        if self._inflight >= REQUESTS_MAX or self._inflight_bytes >= INFLIGHT_BYTES_MAX:
            self.decoder.blocked = True

    def _odd_read(self, flags: int, cookie: int, offset: int, length: int) -> None:
        if flags & ~self._read_flags:
            self._read_error(cookie, Errno.EINVAL, "unknown flags")
        elif offset + length > self._size_bytes:
            self._read_error(cookie, Errno.EINVAL, "beyond the end of the export")
        elif length > protocol.REQUEST_BYTES_MAX:
            # EOVERFLOW means "not in one piece", which only a client says that forbade pieces.
            errno = Errno.EOVERFLOW if flags & protocol.FLAG_DF else Errno.EINVAL
            self._read_error(cookie, errno, f"at most {protocol.REQUEST_BYTES_MAX} bytes at once")
        else:
            self._out.append(protocol.none_chunk(cookie) if self.structured else protocol.simple_reply(cookie))

    def _read_error(self, cookie: int, errno: int, message: str) -> None:
        # Reads and block status have structured errors only, once structured replies were agreed on.
        if self.structured:
            self._out.append(protocol.error_chunk(cookie, errno, message))
        else:
            self._out.append(protocol.simple_reply(cookie, errno))

    def _error(self, cookie: int, errno: int) -> None:
        self._out.append(protocol.simple_reply(cookie, errno))

    def _other(self, flags: int, command: int, cookie: int, offset: int, length: int) -> None:
        volume = self.volume
        assert volume is not None, "requests follow the choice of an export"
        allowed = protocol.FLAGS_OF.get(command)
        if command == Command.BLOCK_STATUS:
            self._block_status(volume, flags, cookie, offset, length)
        elif command == Command.DISC:
            self.finish()
        elif allowed is None or flags & ~allowed:
            self._error(cookie, Errno.EINVAL)
        elif command == Command.FLUSH:
            self._begin()
            volume.flush(partial(self._changed, cookie, 0, 0))
        elif command == Command.CACHE:
            self._cache(volume, cookie, offset, length)
        elif self._read_only:
            self._error(cookie, Errno.EPERM)
        elif offset + length > self._size_bytes:
            self._error(cookie, Errno.ENOSPC if command == Command.WRITE_ZEROES else Errno.EINVAL)
        elif command == Command.TRIM:
            self._begin()
            volume.discard(offset, length, partial(self._changed, cookie, 0, flags & FLAG_FUA))
        elif flags & FLAG_FAST_ZERO and not self._is_fast(volume, flags, offset, length):
            self._error(cookie, Errno.ENOTSUP)
        else:
            self._begin()
            done = partial(self._changed, cookie, 0, flags & FLAG_FUA)
            volume.write_zeroes(offset, length, not flags & FLAG_NO_HOLE, done)

    def _is_hole(self, volume: Volume, offset: int, length: int) -> bool:
        extents = volume.extents(offset, length)
        return len(extents) == 1 and not extents[0][1]

    def _is_fast(self, volume: Volume, flags: int, offset: int, length: int) -> bool:
        """Whether zeroing is quicker than writing zeros: only map entries change, no data is written."""
        if flags & FLAG_NO_HOLE:
            return False
        object_bytes = volume.info.object_bytes
        end = offset + length
        head = min(-offset % object_bytes, length)
        tail = end % object_bytes if end != self._size_bytes and head < length else 0
        return (not head or self._is_hole(volume, offset, head)) and (
            not tail or self._is_hole(volume, end - tail, tail)
        )

    def _cache(self, volume: Volume, cookie: int, offset: int, length: int) -> None:
        """The range is read and thrown away, which leaves it in the page caches of the holders."""
        if offset + length > self._size_bytes or length > protocol.REQUEST_BYTES_MAX:
            self._error(cookie, Errno.EINVAL)
        else:
            self._begin(length)
            volume.read(offset, length, partial(self._changed, cookie, length, 0))

    def _block_status(self, volume: Volume, flags: int, cookie: int, offset: int, length: int) -> None:
        allowed = protocol.FLAGS_OF[Command.BLOCK_STATUS]
        if not self.block_status or flags & ~allowed or not length or offset + length > self._size_bytes:
            self._read_error(cookie, Errno.EINVAL, "base:allocation is not agreed on, or not inside the export")
            return
        extents = volume.extents(offset, length)[: 1 if flags & FLAG_REQ_ONE else EXTENTS_MAX]
        states = [
            (count, 0 if allocated else protocol.STATE_HOLE | protocol.STATE_ZERO) for count, allocated in extents
        ]
        self._out.append(protocol.block_status_chunk(cookie, protocol.BASE_ALLOCATION_ID, states))
