"""Volumes in memory for tests of front ends, and the checks that every implementation of volumes passes.

``MemoryVolumes`` stands for the volumes of a cluster. Volumes are made with ``create`` and frozen with ``snapshot``;
faults are asked for with ``fail_next`` and ``hold``. ``VolumesKit`` is what it has in common with the real ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from sheepdog.contracts.services import Buffer, Done, Volume, VolumeInfo, Volumes, completed
from sheepdog.errors import InvalidParameters, ReadOnlyObject, TagNotFound, VdiLocked, VdiNotFound

KiB = 1024
MiB = 1024 * KiB
OBJECT_BYTES = 4 * MiB


class _Content:
    """What one volume or snapshot holds: its objects, by index."""

    def __init__(self, info: VolumeInfo) -> None:
        self.info = info
        self.objects: dict[int, bytearray] = {}
        self.unflushed = 0  # changes since the last flush
        self.openers = 0
        self.writers = 0


class MemoryVolumes:
    """Volumes that live in this object. Requests complete before they return, unless held back.

    :param exclusive: a second writable open is refused, as in a cluster with locks when another sheep has the volume.
    """

    def __init__(self, *, exclusive: bool = False) -> None:
        self._contents: list[_Content] = []
        self._next_vid = 0x7C2B25
        self.abandoned = 0  # opens of which ``abandon`` was called
        self._exclusive = exclusive
        self._fail: list[tuple[str, Exception]] = []
        self._held: list[Callable[[], None]] | None = None
        self.calls: list[str] = []  # method names in the order of their calls
        self.flushes = 0

    # ---- what a test arranges

    def create(self, name: str, size_bytes: int, *, object_bytes: int = OBJECT_BYTES) -> VolumeInfo:
        """An empty volume of that name exists."""
        self._next_vid += 1
        info = VolumeInfo(name, self._next_vid, size_bytes, object_bytes, False, "", 1)
        self._contents.append(_Content(info))
        return info

    def snapshot(self, name: str, tag: str) -> VolumeInfo:
        """A frozen copy of the volume exists; the volume goes on under a new number."""
        working = self._find(name, None)
        frozen = _Content(replace(working.info, snapshot=True, tag=tag))
        frozen.objects = {index: bytearray(data) for index, data in working.objects.items()}
        self._contents.append(frozen)
        self._next_vid += 1
        working.info = replace(working.info, vid=self._next_vid, snap_id=working.info.snap_id + 1)
        return frozen.info

    def resize(self, name: str, size_bytes: int) -> None:
        """The volume is larger; opens see it after ``refresh``."""
        working = self._find(name, None)
        working.info = replace(working.info, size_bytes=size_bytes)

    def fail_next(self, method: str, error: Exception) -> None:
        """The next call of that method of any volume ends with ``error``."""
        self._fail.append((method, error))

    def hold(self) -> None:
        """Requests do not complete until ``let_go``."""
        self._held = []

    @property
    def held(self) -> int:
        """How many requests wait for ``let_go``."""
        return len(self._held or ())

    def let_go(self, *, newest_first: bool = False) -> None:
        """Everything held back completes, and nothing is held any more."""
        held, self._held = self._held or [], None
        for complete in reversed(held) if newest_first else held:
            complete()

    @property
    def open_count(self) -> int:
        """Opens that were not closed."""
        return sum(content.openers for content in self._contents)

    def unflushed(self, name: str) -> int:
        """Changes of the volume since its last flush."""
        return self._find(name, None).unflushed

    def content(self, name: str) -> bytes:
        """Every byte of a volume."""
        working = self._find(name, None)
        return bytes(_read(working, 0, working.info.size_bytes))

    # ---- what a front end uses

    async def list(self) -> Sequence[VolumeInfo]:
        return sorted((content.info for content in self._contents), key=lambda info: (info.name, info.snap_id))

    async def open(self, name: str, *, snapshot: str | int | None = None, read_only: bool = False) -> MemoryVolume:
        await anyio.lowlevel.checkpoint()
        content = self._find(name, snapshot)
        read_only = read_only or content.info.snapshot
        if self._exclusive and not read_only and content.writers:
            raise VdiLocked(f"VDI {name} is locked")
        content.openers += 1
        content.writers += not read_only
        return MemoryVolume(self, content, read_only)

    def _find(self, name: str, snapshot: str | int | None) -> _Content:
        named = [content for content in self._contents if content.info.name == name]
        for content in named:
            info = content.info
            if snapshot is None and not info.snapshot:
                return content
            if snapshot is not None and info.snapshot and snapshot in (info.tag, info.snap_id):
                return content
        if snapshot is not None and any(not content.info.snapshot for content in named):
            raise TagNotFound(f"no snapshot {snapshot!r} of {name}")
        raise VdiNotFound(f"no VDI {name!r}")

    def complete(self, method: str, action: Callable[[], Any], done: Done) -> None:  # Any: what done is given
        """Ends a request as the test wants it."""
        self.calls.append(method)
        for entry in self._fail:
            if entry[0] == method:
                self._fail.remove(entry)
                done(entry[1], None)
                return

        def complete() -> None:
            try:
                result = action()
            except (InvalidParameters, ReadOnlyObject) as error:
                done(error, None)
            else:
                done(None, result)

        if self._held is not None:
            self._held.append(complete)
        else:
            complete()


class MemoryVolume:
    """One open of a volume in memory."""

    def __init__(self, volumes: MemoryVolumes, content: _Content, read_only: bool) -> None:
        self.info = content.info
        self.read_only = read_only
        self._volumes = volumes
        self._content = content
        self._closed = False
        self.abandoned = False

    def read(self, offset: int, length: int, done: Done) -> None:
        def action() -> bytearray:
            self._check(offset, length)
            return _read(self._content, offset, length)

        self._volumes.complete("read", action, done)

    def write(self, offset: int, data: Buffer, done: Done) -> None:
        def action() -> None:
            self._check(offset, len(data), change=True)
            object_bytes = self.info.object_bytes
            view = memoryview(data)
            at = 0
            while at < len(view):
                index, start = divmod(offset + at, object_bytes)
                count = min(object_bytes - start, len(view) - at)
                target = self._content.objects.get(index)
                if target is None:
                    target = self._content.objects[index] = bytearray(object_bytes)
                target[start : start + count] = view[at : at + count]
                at += count

        self._volumes.complete("write", action, done)

    def discard(self, offset: int, length: int, done: Done) -> None:
        def action() -> None:
            self._check(offset, length, change=True)
            for index in _whole(self.info, offset, length):
                self._content.objects.pop(index, None)

        self._volumes.complete("discard", action, done)

    def write_zeroes(self, offset: int, length: int, may_free: bool, done: Done) -> None:
        def action() -> None:
            self._check(offset, length, change=True)
            object_bytes = self.info.object_bytes
            whole = _whole(self.info, offset, length) if may_free else range(0)
            at = offset
            while at < offset + length:
                index, start = divmod(at, object_bytes)
                count = min(object_bytes - start, offset + length - at)
                if index in whole:
                    self._content.objects.pop(index, None)
                elif index in self._content.objects or not may_free:
                    target = self._content.objects.setdefault(index, bytearray(object_bytes))
                    target[start : start + count] = bytes(count)
                at += count

        self._volumes.complete("write_zeroes", action, done)

    def flush(self, done: Done) -> None:
        def action() -> None:
            self._check(0, 0)
            self._content.unflushed = 0
            self._volumes.flushes += 1

        self._volumes.complete("flush", action, done)

    def extents(self, offset: int, length: int) -> Sequence[tuple[int, bool]]:
        self._check(offset, length)
        found: list[tuple[int, bool]] = []
        at = offset
        while at < offset + length:
            index, start = divmod(at, self.info.object_bytes)
            count = min(self.info.object_bytes - start, offset + length - at)
            allocated = index in self._content.objects
            if found and found[-1][1] == allocated:
                found[-1] = (found[-1][0] + count, allocated)
            else:
                found.append((count, allocated))
            at += count
        return found

    async def refresh(self) -> None:
        self.info = self._content.info

    def abandon(self) -> None:
        self.abandoned = True  # nothing waits for a cluster here
        self._volumes.abandoned += 1

    async def aclose(self) -> None:
        if not self._closed:
            self._closed = True
            self._content.openers -= 1
            self._content.writers -= not self.read_only

    def _check(self, offset: int, length: int, *, change: bool = False) -> None:
        if self._closed:
            raise InvalidParameters("the volume is closed")
        if change:
            if self.read_only:
                raise ReadOnlyObject(f"volume {self.info.name} is open read-only")
            self._content.unflushed += 1
        if offset < 0 or length < 0 or offset + length > self._content.info.size_bytes:
            raise InvalidParameters(f"bytes {offset}+{length} of a volume of {self._content.info.size_bytes} bytes")


def _read(content: _Content, offset: int, length: int) -> bytearray:
    buffer = bytearray(length)
    object_bytes = content.info.object_bytes
    at = 0
    while at < length:
        index, start = divmod(offset + at, object_bytes)
        count = min(object_bytes - start, length - at)
        if index in content.objects:
            buffer[at : at + count] = content.objects[index][start : start + count]
        at += count
    return buffer


def _whole(info: VolumeInfo, offset: int, length: int) -> range:
    end = offset + length
    last = -(-end // info.object_bytes) if end == info.size_bytes else end // info.object_bytes
    return range(-(-offset // info.object_bytes), last)


class VolumesCase(ABC):
    """What a kit needs of an implementation: volumes, and a way to arrange them."""

    volumes: Volumes

    @abstractmethod
    async def create(self, name: str, size_bytes: int) -> None:
        """An empty volume exists."""

    @abstractmethod
    async def snapshot(self, name: str, tag: str) -> None:
        """A snapshot exists. Opens of the volume are not told."""

    @abstractmethod
    async def resize(self, name: str, size_bytes: int) -> None:
        """The volume is larger. Opens of the volume are not told."""


class VolumesKit:
    """Subclass it and give the fixture ``case``, a ``VolumesCase`` without volumes."""

    pytestmark = pytest.mark.anyio

    @staticmethod
    async def _read(volume: Volume, offset: int, length: int) -> bytes:
        return bytes(await completed(lambda done: volume.read(offset, length, done)))

    @staticmethod
    async def _write(volume: Volume, offset: int, data: bytes) -> None:
        await completed(lambda done: volume.write(offset, data, done))

    async def test_fresh_volume_is_zero(self, case: VolumesCase) -> None:
        """A fresh volume reads as zeros and says that nothing is allocated."""
        await case.create("disk", 10 * MiB)
        volume = await case.volumes.open("disk")

        assert await self._read(volume, 4 * MiB - 100, 200) == bytes(200)
        assert list(volume.extents(0, 10 * MiB)) == [(10 * MiB, False)]
        assert (volume.info.name, volume.info.size_bytes, volume.read_only) == ("disk", 10 * MiB, False)
        await volume.aclose()

    async def test_reads_give_what_was_written(self, case: VolumesCase) -> None:
        """Bytes written are read back, over the borders of objects too, and survive close and open."""
        await case.create("disk", 12 * MiB)
        volume = await case.volumes.open("disk")
        data = bytes(range(256)) * 20 * KiB  # 5 MiB

        await self._write(volume, 4 * MiB - 1000, data)
        await self._write(volume, 4 * MiB - 3, b"border")

        expected = bytearray(12 * MiB)
        expected[4 * MiB - 1000 : 4 * MiB - 1000 + len(data)] = data
        expected[4 * MiB - 3 : 4 * MiB + 3] = b"border"
        assert await self._read(volume, 0, 12 * MiB) == expected
        await volume.aclose()
        volume = await case.volumes.open("disk")
        assert await self._read(volume, 0, 12 * MiB) == expected
        await volume.aclose()

    async def test_ranges_beyond_the_end_are_refused(self, case: VolumesCase) -> None:
        """A range that is not inside the volume answers InvalidParameters and changes nothing."""
        await case.create("disk", 5 * MiB)
        volume = await case.volumes.open("disk")
        starts: list[Callable[[Done], None]] = [
            lambda done: volume.read(5 * MiB, 1, done),
            lambda done: volume.read(-1, 1, done),
            lambda done: volume.write(5 * MiB - 1, b"ab", done),
            lambda done: volume.discard(0, 5 * MiB + 1, done),
            lambda done: volume.write_zeroes(4 * MiB, 2 * MiB, True, done),
        ]

        for start in starts:
            with pytest.raises(InvalidParameters):
                await completed(start)
        assert await self._read(volume, 0, 5 * MiB) == bytes(5 * MiB)
        await volume.aclose()

    async def test_discard_frees_whole_objects(self, case: VolumesCase) -> None:
        """Discard frees the objects that lie inside the range and leaves the rest alone; they can be written again."""
        await case.create("disk", 15 * MiB)
        volume = await case.volumes.open("disk")
        await self._write(volume, 0, b"\xaa" * 15 * MiB)

        await completed(lambda done: volume.discard(MiB, 14 * MiB, done))

        assert list(volume.extents(0, 15 * MiB)) == [(4 * MiB, True), (11 * MiB, False)]
        assert await self._read(volume, 0, 15 * MiB) == b"\xaa" * 4 * MiB + bytes(11 * MiB)
        await self._write(volume, 8 * MiB, b"again")
        assert await self._read(volume, 8 * MiB, 8) == b"again\0\0\0"
        await volume.aclose()

    @pytest.mark.parametrize("may_free", [True, False])
    async def test_zeroes_read_as_zeros(self, case: VolumesCase, may_free: bool) -> None:
        """write_zeroes makes exactly the range read as zeros; it frees objects only when it may, and then it does."""
        await case.create("disk", 16 * MiB)
        volume = await case.volumes.open("disk")
        await self._write(volume, 0, b"\xbb" * 12 * MiB)

        await completed(lambda done: volume.write_zeroes(MiB, 14 * MiB, may_free, done))

        assert await self._read(volume, 0, 16 * MiB) == b"\xbb" * MiB + bytes(15 * MiB)
        if may_free:
            assert list(volume.extents(0, 16 * MiB)) == [(4 * MiB, True), (12 * MiB, False)]
        else:
            assert list(volume.extents(0, 16 * MiB)) == [(16 * MiB, True)]
        await volume.aclose()

    async def test_flush_and_empty_requests(self, case: VolumesCase) -> None:
        """A flush succeeds; requests of no bytes do too."""
        await case.create("disk", 4 * MiB)
        volume = await case.volumes.open("disk")

        await completed(volume.flush)
        assert await self._read(volume, 4 * MiB, 0) == b""
        await self._write(volume, 0, b"")
        await completed(lambda done: volume.discard(0, 0, done))
        await volume.aclose()

    async def test_snapshots_keep_their_content(self, case: VolumesCase) -> None:
        """An open volume goes on after somebody made a snapshot; the snapshot is read-only and keeps the old bytes."""
        await case.create("disk", 8 * MiB)
        volume = await case.volumes.open("disk")
        await self._write(volume, 0, b"old" * 1000)

        await case.snapshot("disk", "monday")
        await self._write(volume, 3, b"new")
        await self._write(volume, 5 * MiB, b"only in the new one")

        assert await self._read(volume, 0, 9) == b"oldnewold"
        for which in ("monday", 1):
            frozen = await case.volumes.open("disk", snapshot=which)
            assert (frozen.read_only, frozen.info.snapshot, frozen.info.tag) == (True, True, "monday")
            assert await self._read(frozen, 0, 9) == b"oldoldold"
            assert await self._read(frozen, 5 * MiB, 9) == bytes(9)
            with pytest.raises(ReadOnlyObject):
                await self._write(frozen, 0, b"x")
            await frozen.aclose()
        await volume.aclose()
        volume = await case.volumes.open("disk")
        assert await self._read(volume, 5 * MiB, 19) == b"only in the new one"
        assert await self._read(volume, 0, 9) == b"oldnewold"
        await volume.aclose()

    async def test_names_that_do_not_exist(self, case: VolumesCase) -> None:
        """Unknown names and snapshots have their own errors, and leave nothing open."""
        await case.create("disk", 4 * MiB)

        with pytest.raises(VdiNotFound):
            await case.volumes.open("dusk")
        with pytest.raises(TagNotFound):
            await case.volumes.open("disk", snapshot="monday")
        with pytest.raises(TagNotFound):
            await case.volumes.open("disk", snapshot=7)

    async def test_list_is_ordered(self, case: VolumesCase) -> None:
        """Volumes and snapshots are listed by name and snapshot id."""
        await case.create("disk", 4 * MiB)
        await case.create("a", 8 * MiB)
        await case.snapshot("disk", "monday")

        listed = [(info.name, info.snapshot, info.tag, info.snap_id) for info in await case.volumes.list()]

        assert listed == [("a", False, "", 1), ("disk", True, "monday", 1), ("disk", False, "", 2)]

    async def test_refresh_sees_the_new_size(self, case: VolumesCase) -> None:
        """After somebody made the volume larger, refresh shows it and the new part can be written."""
        await case.create("disk", 4 * MiB)
        volume = await case.volumes.open("disk")
        await self._write(volume, 100, b"kept")

        await case.resize("disk", 9 * MiB)
        await volume.refresh()

        assert volume.info.size_bytes == 9 * MiB
        await self._write(volume, 9 * MiB - 4, b"tail")
        assert await self._read(volume, 9 * MiB - 8, 8) == b"\0\0\0\0tail"
        assert await self._read(volume, 100, 4) == b"kept"
        await volume.aclose()

    async def test_opens_share_state(self, case: VolumesCase) -> None:
        """What one open wrote, another sees at once; read-only opens refuse changes; a closed open refuses all."""
        await case.create("disk", 8 * MiB)
        first = await case.volumes.open("disk")
        second = await case.volumes.open("disk", read_only=True)

        await self._write(first, 4 * MiB - 2, b"seen")

        assert await self._read(second, 4 * MiB - 2, 4) == b"seen"
        with pytest.raises(ReadOnlyObject):
            await self._write(second, 0, b"x")
        await first.aclose()
        await first.aclose()
        with pytest.raises(InvalidParameters):
            await self._read(first, 0, 1)
        assert await self._read(second, 4 * MiB - 2, 4) == b"seen"
        await second.aclose()

    async def test_many_requests_at_once(self, case: VolumesCase) -> None:
        """Concurrent writes to neighbouring and equal objects all take effect."""
        await case.create("disk", 24 * MiB)
        volume = await case.volumes.open("disk")
        count = 96

        async with anyio.create_task_group() as group:
            for i in range(count):
                group.start_soon(self._write, volume, i * 256 * KiB, bytes([i + 1]) * 1000)

        for i in range(count):
            assert await self._read(volume, i * 256 * KiB, 1001) == bytes([i + 1]) * 1000 + b"\0"
        assert list(volume.extents(0, 24 * MiB)) == [(24 * MiB, True)]
        await volume.aclose()
