"""An open volume: the map in memory, and the requests that go by it.

All opens of one volume in one sheep share a ``Head``. A request is cut into parts, one for each data object; a part
looks at the owner of its object in the map (wire protocol, sections 11.3 to 11.5):

* 0, a hole: reads are zeros; a write creates the object;
* our own vid: reads and writes go to the object as they are. This is the fast path: one small object, no task, no
  future;
* another vid: reads go there; a write creates our own object from that one (copy on write).

After a create the map entry is stored in the inode, and only then the write is complete. While an index is *busy* in
this way (or being freed) other changes of it wait; reads go by the old owner. Map changes are stored in *rounds*:
what becomes ready while a round is under way shares the next one.

When a write is refused because somebody made a snapshot (READONLY), or an object is missing that the map names, the
head is *reloaded*: the name is looked up again, header and map are read again, and the parts that met the trouble
start anew. A change of the map counts only if the volume was still no snapshot when it was stored; else it may have
come too late for the new head's copy of the map, and its write is repeated there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import anyio

from sheepdog.contracts.services import Buffer, Done
from sheepdog.daemon.fencing import Client, Clients
from sheepdog.daemon.volume_map import FlatMap, Sparse, TreeMap, load_map
from sheepdog.daemon.volumes_io import ObjectIO, VdiControl, error_of, read_object
from sheepdog.errors import InvalidParameters, SheepdogError, VdiLocked, VdiNotFound
from sheepdog.model.ids import inode_oid
from sheepdog.model.inode import FIELDS_BYTES, MAP_ENTRIES, InodeHeader
from sheepdog.wire.results import Result

logger = logging.getLogger(__name__)

MiB = 1024 * 1024
ZEROS = memoryview(bytes(4 * MiB))
ATTEMPTS_MAX = 10  # of one part; each failed one waits for a look-up in the whole cluster
DATA_PARTS_MAX = 32  # of one request in flight
FREE_PARTS_MAX = 256
ZERO_PARTS_MAX = 8

Spawn: TypeAlias = Callable[..., None]
"""``spawn(async_function, *args)``: a task that outlives the request that caused it."""


async def read_header(io: ObjectIO, vid: int) -> InodeHeader:
    """The header of an inode.

    :raises VdiNotFound: it was deleted.
    :raises SheepdogError: it cannot be read.
    """
    header = InodeHeader.unpack(await read_object(io, inode_oid(vid), 0, FIELDS_BYTES))
    if header.is_deleted:
        raise VdiNotFound(f"VDI {vid:x} was deleted")
    if not 12 <= header.block_size_shift <= 31:
        raise InvalidParameters(f"inode {vid:x} states an object size of 2^{header.block_size_shift}")
    if header.vdi_id != vid:
        raise InvalidParameters(f"inode {vid:x} says that it is {header.vdi_id:x}")
    return header


class Head:
    """One volume or snapshot that is open in this sheep."""

    def __init__(
        self, io: ObjectIO, control: VdiControl, spawn: Spawn, header: InodeHeader, map_: FlatMap | TreeMap
    ) -> None:
        self.io = io
        self._control = control
        self._spawn = spawn
        self.name = header.name
        self.snapshot = header.is_snapshot  # opened as a snapshot; stays one
        self.locked = False
        self.busy: dict[int, list[_Part]] = {}  # index -> changes that wait
        self._queued: dict[int, _Queued] = {}
        self._storing = False
        self._reloading = False
        self._waiting: list[_Part] = []  # for the reload
        self._touched: dict[int, int] | None = None  # changes stored while the map is read again
        self._reload_lock = anyio.Lock()
        self._adopt(header, map_)

    @classmethod
    async def load(cls, io: ObjectIO, control: VdiControl, spawn: Spawn, vid: int) -> Head:
        """The head of ``vid``, its map read.

        :raises SheepdogError: it cannot be read.
        """
        header = await read_header(io, vid)
        return cls(io, control, spawn, header, await load_map(io, header))

    def _adopt(self, header: InodeHeader, map_: FlatMap | TreeMap) -> None:
        self.header = header
        self.vid = header.vdi_id
        self.shift = header.block_size_shift
        self.size = header.vdi_size if header.is_hypervolume else min(header.vdi_size, MAP_ENTRIES << self.shift)
        self.object_bytes = 1 << self.shift
        self.offset_mask = self.object_bytes - 1
        self.copies = header.nr_copies
        self.policy = header.copy_policy
        self.map = map_
        self.owners = map_.owners

    # ---- requests

    def read(self, offset: int, length: int, done: Done) -> None:
        start = offset & self.offset_mask
        if 0 < length <= self.object_bytes - start and 0 <= offset <= self.size - length:
            _Read(self, offset >> self.shift, start, length, done).start()
        elif self._inside(offset, length, done):
            _ReadAll(self, offset, length, done)

    def write(self, offset: int, data: Buffer, done: Done, client: Client) -> None:
        length = len(data)
        start = offset & self.offset_mask
        if 0 < length <= self.object_bytes - start and 0 <= offset <= self.size - length:
            _Write(self, offset >> self.shift, start, data, done, client).start()
        elif self._inside(offset, length, done):
            view = memoryview(data)
            parts = (
                (_Write, index, start, view[at : at + count]) for index, start, at, count in self._cut(offset, length)
            )
            _Window(self, parts, DATA_PARTS_MAX, done, client)

    def discard(self, offset: int, length: int, done: Done, client: Client) -> None:
        if self._inside(offset, length, done):
            first, last = self._whole(offset, length)
            parts = ((_Free, index, 0, b"") for index, _ in self.map.allocated(first, last))
            _Window(self, parts, FREE_PARTS_MAX, done, client)

    def write_zeroes(self, offset: int, length: int, may_free: bool, done: Done, client: Client) -> None:
        if self._inside(offset, length, done):
            first, last = self._whole(offset, length) if may_free else (0, 0)
            parts = self._zero_parts(offset, length, first, last, may_free)
            _Window(self, parts, ZERO_PARTS_MAX, done, client)

    def _zero_parts(
        self, offset: int, length: int, first: int, last: int, may_free: bool
    ) -> Iterator[tuple[type[_Part], int, int, Buffer]]:
        kind = _Zero if may_free else _ZeroAllocated
        for index, start, _, count in self._cut(offset, length):
            if first <= index < last:
                if self.owners[index] or index in self.busy:
                    yield _Free, index, 0, b""
                continue
            for at in range(0, count, len(ZEROS)):
                yield kind, index, start + at, ZEROS[: min(len(ZEROS), count - at)]

    def extents(self, offset: int, length: int) -> list[tuple[int, bool]]:
        found: list[tuple[int, bool]] = []
        at, end = offset, offset + length
        for index, _ in self.map.allocated(offset >> self.shift, (end + self.offset_mask) >> self.shift):
            begin = max(index << self.shift, offset)
            stop = min((index + 1) << self.shift, end)
            if begin > at:
                found.append((begin - at, False))
            if begin == at and found and found[-1][1]:
                found[-1] = (found[-1][0] + stop - begin, True)
            else:
                found.append((stop - begin, True))
            at = stop
        if at < end:
            found.append((end - at, False))
        return found

    def flush(self, done: Done) -> None:
        self.io.submit_sync(lambda result, _: done(error_of(result), None))

    def _inside(self, offset: int, length: int, done: Done) -> bool:
        """Whether there is something to do; else ``done`` was called."""
        if offset < 0 or length < 0 or offset + length > self.size:
            done(InvalidParameters(f"bytes {offset}+{length} of a volume of {self.size} bytes"), None)
            return False
        return True

    def _cut(self, offset: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """(index, start in the object, start in the request, bytes) of each part."""
        at = 0
        while at < length:
            start = (offset + at) & self.offset_mask
            count = min(self.object_bytes - start, length - at)
            yield (offset + at) >> self.shift, start, at, count
            at += count

    def _whole(self, offset: int, length: int) -> tuple[int, int]:
        """Half-open range of the objects that lie completely in the range; the volume's last one may be cut short."""
        end = offset + length
        last = (end + self.offset_mask) >> self.shift if end == self.size else end >> self.shift
        return (offset + self.offset_mask) >> self.shift, last

    # ---- map changes

    def change(self, index: int, owner: int, vid: int, stored: ChangeStored, client: Client) -> None:
        """The entry of a busy index becomes ``owner``; ``stored(result)`` once that is in the inode of ``vid``."""
        self._queued[index] = (owner, vid, stored, client)
        if not self._storing:
            self._store()

    def _store(self) -> None:
        self._storing = True
        while self._queued:
            queued, self._queued = self._queued, {}
            changes: dict[int, int] = {}
            clients: dict[Client, None] = {}
            for index, (owner, vid, stored, client) in queued.items():
                if vid == self.vid:
                    changes[index] = owner
                    clients[client] = None
                else:
                    stored(Result.READONLY)
            if changes:
                client = next(iter(clients)) if len(clients) == 1 else Clients(list(clients))
                self.map.store(changes, partial(self._stored, self.vid, queued), client)
                return
        self._storing = False

    def _stored(self, vid: int, queued: Mapping[int, _Queued], results: Mapping[int, int]) -> None:
        late = vid != self.vid or self._control.readonly(vid)
        if not late:
            for index, result in results.items():
                if not result:
                    self.owners[index] = queued[index][0]
                    if self._touched is not None:
                        self._touched[index] = queued[index][0]
        for index, result in results.items():
            queued[index][2](Result.READONLY if late and not result else result)
        self._store()

    def release(self, index: int) -> None:
        """The index is not busy any more; what waited for it starts."""
        for part in self.busy.pop(index):
            part.start()

    # ---- reload

    def doubt(self, part: _Part) -> None:
        """The part starts again after the head was loaded again, or at once if it went by an older head."""
        if part.vid != self.vid:
            part.start()
            return
        self._waiting.append(part)
        if not self._reloading:
            self._reloading = True
            self._spawn(self._reload_for_parts)

    async def _reload_for_parts(self) -> None:
        error: Exception | None = SheepdogError("the sheep is stopping")  # unless the reload comes to an end
        try:
            await self.reload(look_up=True)
            error = None
        except SheepdogError as caught:
            error = caught
            logger.warning("cannot load volume %s again: %s", self.label, caught)
        finally:
            self._reloading = False
            waiting, self._waiting = self._waiting, []
            for part in waiting:
                if error is None:
                    part.start()
                else:
                    part.done(error, None)

    async def reload(self, *, look_up: bool) -> None:
        """Header and map are what the cluster has now, and what was stored through this head meanwhile.

        :param look_up: the name may have another vid by now (a snapshot was made).
        :raises SheepdogError: nothing changed; ``VdiNotFound`` if the volume was deleted.
        """
        async with self._reload_lock:
            if not look_up and not self.snapshot:
                look_up = (await read_header(self.io, self.vid)).is_snapshot
            vid = self.vid
            relocked = False
            if look_up and not self.snapshot:
                vid, _, _ = await self._control.lookup(self.name, b"", 0)
                if vid != self.vid and self.locked:
                    vid, relocked = await self._lock_again(vid)
            self._touched = {}
            try:
                header = await read_header(self.io, vid)
                map_ = await load_map(self.io, header)
                # no await from here on
                old = self.vid
                if vid == old:
                    map_ = self._merged(map_, self._touched)
                self._adopt(header, map_)
            finally:
                self._touched = None
        if vid != old:
            logger.info("volume %s goes on as vid=%x after vid=%x became a snapshot", self.label, vid, old)
            if relocked:
                self._spawn(self._release_lock, old)

    def _merged(self, loaded: FlatMap | TreeMap, touched: Mapping[int, int]) -> FlatMap | TreeMap:
        """The map just read, with what was stored while it was read."""
        if isinstance(loaded, TreeMap):
            # Changes are made to the tree in memory, so while any are made that one is the newer.
            return self.map if touched or self._storing else loaded
        owners = loaded.owners
        assert not isinstance(owners, Sparse), "a flat map is an array"
        if (missing := len(self.owners) - len(owners)) > 0:
            owners.frombytes(bytes(4 * missing))  # requests under way were measured by the older, larger size
        for index, owner in touched.items():
            owners[index] = owner
        return loaded

    async def _lock_again(self, vid: int) -> tuple[int, bool]:
        """(vid, whether it had to be locked): the working volume has another number than the one that was locked.

        A snapshot takes the lock along, and then it is ours already. Where the volume was deleted and made anew (dog's
        rollback) it is free.
        """
        try:
            vid, _, _ = await self._control.lock(self.name)
        except VdiLocked:
            return vid, False
        return vid, True

    async def _release_lock(self, vid: int) -> None:
        try:
            await self._control.release(vid)
        except SheepdogError as error:
            logger.warning("cannot release the lock of vid=%x: %s", vid, error)

    @property
    def label(self) -> str:
        """The name, for logs."""
        return self.name.decode(errors="backslashreplace")


ChangeStored: TypeAlias = Callable[[int], None]
"""Told the result code of one map change; READONLY: it does not count, begin again."""

_Queued: TypeAlias = tuple[int, int, ChangeStored, Client]  # new owner, under which vid, whom to tell, for whom


class _Part:
    """What a request does to one data object."""

    __slots__ = ("attempts", "begin", "client", "data", "done", "doubted", "head", "index", "owner", "vid")

    def __init__(self, head: Head, index: int, begin: int, data: Buffer, done: Done, client: Client) -> None:
        self.head = head
        self.index = index
        self.begin = begin  # in the object
        self.data = data
        self.done = done
        self.client = client
        self.attempts = 0
        self.doubted = False
        self.vid = self.owner = 0  # what the last attempt went by

    def start(self) -> None:
        """One attempt."""
        raise AssertionError("a part says how it starts")

    def failed(self, result: int) -> None:
        """An attempt ended with an error: either another follows, or the request fails."""
        head = self.head
        self.attempts += 1
        if self.attempts <= ATTEMPTS_MAX:
            if result == Result.READONLY and not head.snapshot:
                head.doubt(self)
                return
            if result == Result.NO_OBJ:
                if self.index in head.busy:  # it is being freed
                    head.busy[self.index].append(self)
                    return
                if self.vid != head.vid or self.owner != head.owners[self.index]:
                    self.start()
                    return
                if not self.doubted:
                    self.doubted = True
                    head.doubt(self)
                    return
                logger.error("volume %s: oid=%06x%08x is missing", head.label, self.owner, self.index)
        self.done(error_of(result), None)


class _Read(_Part):
    """Bytes of one object."""

    __slots__ = ("length",)

    def __init__(self, head: Head, index: int, begin: int, length: int, done: Done) -> None:
        self.head = head
        self.index = index
        self.begin = begin
        self.length = length
        self.done = done
        self.attempts = 0
        self.doubted = False

    def start(self) -> None:
        head = self.head
        self.vid = head.vid
        owner = self.owner = head.owners[self.index]
        if owner:
            head.io.submit_read(owner << 32 | self.index, self.begin, self.length, self._got)
        else:
            length = self.length
            self.done(None, ZEROS[:length] if length <= len(ZEROS) else bytes(length))

    def _got(self, result: int, data: Any) -> None:  # Any: the bytes on success
        if result:
            self.failed(result)
        else:
            self.done(None, data)


class _Write(_Part):
    """Bytes of one object are replaced."""

    __slots__ = ()

    def start(self) -> None:
        head = self.head
        index = self.index
        if index in head.busy:
            head.busy[index].append(self)
            return
        vid = self.vid = head.vid
        owner = self.owner = head.owners[index]
        if owner == vid:
            head.io.submit_write(
                vid << 32 | index, self.begin, self.data, self._written, copies=head.copies, policy=head.policy,
                client=self.client,
            )  # fmt: skip
        else:
            self._create()

    def _written(self, result: int, _: object) -> None:
        if result:
            self.failed(result)
        else:
            self.done(None, None)

    def _create(self) -> None:
        whole = len(self.data) == self.head.object_bytes
        self._submit_create(self.begin, self.data, 0 if whole else self.owner)

    def _submit_create(self, begin: int, data: Buffer, source: int) -> None:
        head, index = self.head, self.index
        head.busy[index] = []
        head.io.submit_create(
            self.vid << 32 | index, begin, data, self._created,
            cow_oid=source << 32 | index if source else 0, copies=head.copies, policy=head.policy, client=self.client,
        )  # fmt: skip

    def _created(self, result: int, _: object) -> None:
        if result:
            self._stored(result)
        else:
            self.head.change(self.index, self.vid, self.vid, self._stored, self.client)

    def _stored(self, result: int) -> None:
        self.head.release(self.index)
        if result:
            self.failed(result)
        else:
            self.done(None, None)


class _Zero(_Write):
    """Bytes of one object read as zeros; a hole may stay one."""

    __slots__ = ()

    def start(self) -> None:
        head = self.head
        if not head.owners[self.index] and self.index not in head.busy:
            self._hole()
        else:
            super().start()

    def _hole(self) -> None:
        self.done(None, None)

    def _create(self) -> None:
        if not self.owner or len(self.data) == self.head.object_bytes:
            self._submit_create(0, b"", 0)  # a new object is all zeros
        else:
            super()._create()


class _ZeroAllocated(_Zero):
    """Bytes of one object read as zeros, and later writes there need no new space."""

    __slots__ = ()

    def _hole(self) -> None:
        _Write.start(self)


class _Free(_Part):
    """The volume has a hole in place of one object."""

    __slots__ = ()

    def start(self) -> None:
        head = self.head
        index = self.index
        if index in head.busy:
            head.busy[index].append(self)
            return
        self.vid = head.vid
        self.owner = head.owners[index]
        if not self.owner:
            self.done(None, None)
            return
        head.busy[index] = []
        head.change(index, 0, self.vid, self._stored, self.client)

    def _stored(self, result: int) -> None:
        head = self.head
        if result:
            head.release(self.index)
            self.failed(result)
        elif head.map.frees or self.owner != self.vid:
            self._freed(0)
        else:
            head.io.submit_remove(self.vid << 32 | self.index, self._freed, client=self.client)

    def _freed(self, result: int) -> None:
        if result and result != Result.NO_OBJ:
            logger.warning("oid=%06x%08x is left behind: result=0x%02x", self.vid, self.index, result)
        self.head.release(self.index)
        self.done(None, None)


class _ReadAll:
    """A read over several objects: each part lands in one buffer."""

    __slots__ = ("_buffer", "_done", "_error", "_left")

    def __init__(self, head: Head, offset: int, length: int, done: Done) -> None:
        self._buffer = memoryview(bytearray(length))
        self._done = done
        self._error: Exception | None = None
        cuts = list(head._cut(offset, length))
        self._left = len(cuts) + 1
        for index, start, at, count in cuts:
            if head.owners[index]:
                _Read(head, index, start, count, partial(self._one, at)).start()
            else:
                self._left -= 1
        self._one(0, None, b"")

    def _one(self, at: int, error: Exception | None, data: Any) -> None:  # Any: the bytes on success
        if error is not None:
            self._error = self._error or error
        else:
            self._buffer[at : at + len(data)] = data
        self._left -= 1
        if not self._left:
            self._done(self._error, None if self._error else self._buffer)


class _Window:
    """A request of many parts, a bounded number of them in flight. After an error no more are started."""

    __slots__ = ("_client", "_done", "_error", "_head", "_inflight", "_max", "_parts", "_pumping")

    def __init__(
        self,
        head: Head,
        parts: Iterator[tuple[type[_Part], int, int, Buffer]],
        inflight_max: int,
        done: Done,
        client: Client,
    ) -> None:
        self._client = client
        self._head = head
        self._parts: Iterator[tuple[type[_Part], int, int, Buffer]] | None = parts
        self._max = inflight_max
        self._done = done
        self._error: Exception | None = None
        self._inflight = 0
        self._pumping = False
        self._pump()

    def _pump(self) -> None:
        self._pumping = True  # a part that ends at once must not recurse
        while self._parts is not None and self._inflight < self._max:
            part = next(self._parts, None)
            if part is None or self._error is not None:
                self._parts = None
                break
            kind, index, begin, data = part
            self._inflight += 1
            kind(self._head, index, begin, data, self._one, self._client).start()
        self._pumping = False
        if self._parts is None and not self._inflight:
            self._done(self._error, None)

    def _one(self, error: Exception | None, _: object) -> None:
        self._error = self._error or error
        self._inflight -= 1
        if not self._pumping:
            self._pump()
