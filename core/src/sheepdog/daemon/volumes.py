"""The volumes of the cluster, as front ends inside this sheep see them.

``GatewayVolumes`` finds and opens them; what an open volume does with requests is in ``volumes_head``, how its map is
kept in ``volume_map``, what both need from the daemon in ``volumes_io``.

Opens of one volume share one head: a working volume by its name, because its vid changes with each snapshot, and a
snapshot by its vid. The first writable open locks the volume (clusters formatted with locks), the last writable close
gives the lock back.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio

from sheepdog.contracts.services import Buffer, Done, VolumeInfo
from sheepdog.daemon.fencing import Client
from sheepdog.daemon.volumes_head import Head, Spawn
from sheepdog.daemon.volumes_io import ObjectIO, VdiControl
from sheepdog.errors import InvalidParameters, ReadOnlyObject, SheepdogError, VdiNotFound
from sheepdog.model.inode import InodeHeader, check_name

__all__ = ["GatewayVolumes", "ObjectIO", "Spawn", "VdiControl"]

logger = logging.getLogger(__name__)

CLEANUP_S = 5.0


def decode_name(name: bytes) -> str:
    """A VDI name or tag as text; bytes that are no UTF-8 survive the way back."""
    return name.decode("utf-8", "surrogateescape")


def encode_name(name: str) -> bytes:
    """The bytes of a VDI name or tag.

    :raises InvalidParameters: too long, a NUL inside, or no possible name.
    """
    try:
        return check_name(name.encode("utf-8", "surrogateescape"))
    except UnicodeEncodeError as error:
        raise InvalidParameters(f"no VDI can have the name {name!r}") from error


def info_of(header: InodeHeader) -> VolumeInfo:
    """A volume as front ends list it."""
    return VolumeInfo(
        name=decode_name(header.name),
        vid=header.vdi_id,
        size_bytes=header.vdi_size,
        object_bytes=1 << header.block_size_shift,
        snapshot=header.is_snapshot,
        tag=decode_name(header.tag),
        snap_id=header.snap_id,
    )


class GatewayVolumes:
    """The volumes, through the gateway of this sheep."""

    def __init__(self, io: ObjectIO, control: VdiControl, spawn: Spawn) -> None:
        """
        :param spawn: starts tasks that outlive requests; such a task raises nothing.
        """
        self._io = io
        self._control = control
        self._spawn = spawn
        self._heads: dict[bytes | int, tuple[Head, list[OpenVolume]]] = {}
        self._doors: dict[bytes | int, tuple[anyio.Lock, int]] = {}

    async def list(self) -> Sequence[VolumeInfo]:
        found = [info_of(header) for _, header in await self._control.list_vdis() if not header.is_deleted]
        return sorted(found, key=lambda info: (info.name, info.snap_id))

    async def open(self, name: str, *, snapshot: str | int | None = None, read_only: bool = False) -> OpenVolume:
        encoded = encode_name(name)
        if not encoded:
            raise VdiNotFound("a VDI has a name")
        vid = 0
        key: bytes | int = encoded
        if snapshot is not None:
            tag, number = (b"", snapshot) if isinstance(snapshot, int) else (encode_name(snapshot), 0)
            if not tag and not 0 < number < 1 << 32:
                raise InvalidParameters(f"no snapshot {snapshot!r}")
            vid, _, _ = await self._control.lookup(encoded, tag, number)
            key = vid
            read_only = True
        async with self._alone(key):
            head, users = self._heads.get(key) or (None, [])
            lock = not read_only and (head is None or not head.locked)
            if lock:
                vid, _, _ = await self._control.lock(encoded)
            try:
                if head is None:
                    if not vid:
                        vid, _, _ = await self._control.lookup(encoded, b"", 0)
                    head = await Head.load(self._io, self._control, self._spawn, vid)
                    if key != vid and head.snapshot:
                        # Between look-up and reading somebody made a snapshot: the name has another vid now.
                        head.snapshot = False
                        await head.reload(look_up=True)
                else:
                    await head.reload(look_up=bool(vid) and vid != head.vid)
            except BaseException:
                if lock:
                    with anyio.move_on_after(CLEANUP_S, shield=True):
                        await self._release(vid)
                raise
            # no await from here on
            head.locked = head.locked or lock
            volume = OpenVolume(self, key, head, read_only)
            users.append(volume)
            self._heads[key] = (head, users)
            return volume

    async def close(self, key: bytes | int, volume: OpenVolume) -> None:
        """The volume is not in use by this opener any more."""
        async with self._alone(key):
            head, users = self._heads[key]
            if volume not in users:
                return
            users.remove(volume)
            if not users:
                del self._heads[key]
            if head.locked and all(user.read_only for user in users):
                head.locked = False
                await self._release(head.vid)

    async def _release(self, vid: int) -> None:
        try:
            await self._control.release(vid)
        except SheepdogError as error:
            logger.warning("cannot release the lock of vid=%x: %s", vid, error)

    @asynccontextmanager
    async def _alone(self, key: bytes | int) -> AsyncIterator[None]:
        """Opening and closing of one volume happen one after the other."""
        lock, users = self._doors.get(key) or (anyio.Lock(), 0)
        self._doors[key] = (lock, users + 1)
        try:
            async with lock:
                yield
        finally:
            lock, users = self._doors[key]
            if users == 1:
                del self._doors[key]
            else:
                self._doors[key] = (lock, users - 1)


class OpenVolume:
    """One open of a volume or snapshot."""

    def __init__(self, volumes: GatewayVolumes, key: bytes | int, head: Head, read_only: bool) -> None:
        self.info = info_of(head.header)
        self.read_only = read_only
        self._volumes = volumes
        self._key = key
        self._head = head
        self._closed = False
        self._client = Client()

    def read(self, offset: int, length: int, done: Done) -> None:
        if self._closed:
            done(_closed(), None)
        else:
            self._head.read(offset, length, done)

    def write(self, offset: int, data: Buffer, done: Done) -> None:
        if self._closed or self.read_only:
            self._refuse(done)
        else:
            self._head.write(offset, data, done, self._client)

    def discard(self, offset: int, length: int, done: Done) -> None:
        if self._closed or self.read_only:
            self._refuse(done)
        else:
            self._head.discard(offset, length, done, self._client)

    def write_zeroes(self, offset: int, length: int, may_free: bool, done: Done) -> None:
        if self._closed or self.read_only:
            self._refuse(done)
        else:
            self._head.write_zeroes(offset, length, may_free, done, self._client)

    def flush(self, done: Done) -> None:
        if self._closed:
            done(_closed(), None)
        else:
            self._head.flush(done)

    def extents(self, offset: int, length: int) -> Sequence[tuple[int, bool]]:
        """:raises InvalidParameters: the range is not inside the volume."""
        if offset < 0 or length < 0 or offset + length > self._head.size:
            raise InvalidParameters(f"bytes {offset}+{length} of a volume of {self._head.size} bytes")
        return self._head.extents(offset, length)

    async def refresh(self) -> None:
        if self._closed:
            raise _closed()
        await self._head.reload(look_up=False)
        self.info = info_of(self._head.header)

    def abandon(self) -> None:
        self._client.open = False

    async def aclose(self) -> None:
        """Requests under way still end; new ones are refused. Repeating it is harmless."""
        if self._closed:
            return
        self._closed = True
        with anyio.CancelScope(shield=True):
            await self._volumes.close(self._key, self)

    def _refuse(self, done: Done) -> None:
        done(_closed() if self._closed else ReadOnlyObject(f"volume {self.info.name} is open read-only"), None)


def _closed() -> InvalidParameters:
    return InvalidParameters("the volume is closed")
