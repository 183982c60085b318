"""A store in memory that fails on request: full, busy, a broken disk, and power loss that drops what was not flushed.

The *medium* outlives the store, as a disk outlives a process: a second store made with the same medium finds what the
first one left. What is there and what would survive a power loss are kept apart::

    medium = MemoryMedium()
    store = MemoryStore(StoreOptions(("/d",)), medium)
    ...
    medium.lose_power()      # what was not flushed is gone
    store = MemoryStore(StoreOptions(("/d",)), medium)

Deterministic: power loss drops everything that was not flushed, unless a ``random.Random`` decides for each shard.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterable, Iterator
from typing import TypeAlias

from sheepdog.contracts.store import Buffer, DiskInfo, ObjectStore, ShardKey, StoreOptions, Usage
from sheepdog.errors import ConfigError, ObjectNotFound, StoreBusy, StoreDeviceError, StoreError, StoreFull
from sheepdog.model.hashing import hash_oid

CAPACITY_BYTES = 1 << 40

_LIVE = -1  # in place of an epoch
_Name: TypeAlias = tuple[ShardKey, int]  # a shard, live or set aside at an epoch


class _Disk:
    """Shards by name: as they are, and as a power loss would leave them."""

    def __init__(self) -> None:
        self.now: dict[_Name, bytearray] = {}
        self.safe: dict[_Name, bytes] = {}
        self.weight_bytes = 0
        self.broken = False
        self.busy = 0

    def used_bytes(self) -> int:
        return sum(map(len, self.now.values()))

    def flush(self, name: _Name) -> None:
        if name in self.now:
            self.safe[name] = bytes(self.now[name])
        else:
            self.safe.pop(name, None)

    def lose(self, name: _Name) -> None:
        if name in self.safe:
            self.now[name] = bytearray(self.safe[name])
        else:
            self.now.pop(name, None)


class MemoryMedium:
    """What several stores in a row share, and the levers of a test."""

    def __init__(self, capacity_bytes: int = CAPACITY_BYTES) -> None:
        """:param capacity_bytes: of each disk."""
        self.capacity_bytes = capacity_bytes
        self.flush_count = 0  # of shards, by ``sync`` and by durable calls
        self.lock = threading.RLock()
        self._disks: dict[str, _Disk] = {}

    def disk(self, path: str) -> _Disk:
        """The disk of that path, a new one if there was none."""
        if path not in self._disks:
            self._disks[path] = _Disk()
        return self._disks[path]

    def lose_power(self, chance: random.Random | None = None) -> None:
        """What was not flushed is gone; with ``chance``, each shard keeps or loses its unflushed state as a whole.

        A store that is open must not be used afterwards; make a new one.
        """
        with self.lock:
            for path in sorted(self._disks):
                disk = self._disks[path]
                for name in sorted(disk.now.keys() | disk.safe.keys()):
                    if chance is None or chance.random() < 0.5:
                        disk.lose(name)
                    else:
                        disk.flush(name)

    def weigh(self, path: str, weight_bytes: int) -> None:
        """The disk counts as one of that size, from its first use on, until it is weighed again."""
        self.disk(path).weight_bytes = weight_bytes

    def break_disk(self, path: str) -> None:
        """Everything that touches the disk raises ``StoreDeviceError`` from now on."""
        self.disk(path).broken = True

    def keep_busy(self, path: str, count: int) -> None:
        """The next ``count`` calls that touch the disk raise ``StoreBusy``."""
        self.disk(path).busy = count

    def rot(self, key: ShardKey, offset_bytes: int = 0) -> None:
        """One byte of the live shard has changed by itself, on the medium."""
        for disk in self._disks.values():
            if (key, _LIVE) in disk.now:
                disk.now[key, _LIVE][offset_bytes] ^= 0xFF
                disk.flush((key, _LIVE))


class MemoryStore(ObjectStore):
    """Every shard in a bytearray. ``try_read_into`` always answers, unless ``cached`` is set to False."""

    def __init__(self, options: StoreOptions, medium: MemoryMedium) -> None:
        if not options.disks:
            raise ConfigError("There isn't any available disk!")
        self.cached = True
        self._medium = medium
        self._paths = sorted(dict.fromkeys(options.disks))
        for path in self._paths:
            disk = medium.disk(path)
            disk.weight_bytes = disk.weight_bytes or medium.capacity_bytes - disk.used_bytes()

    # ---- where a shard is

    def _touch(self, path: str) -> _Disk:
        disk = self._medium.disk(path)
        if disk.broken:
            raise StoreDeviceError(f"disk {path} failed", path=path)
        if disk.busy > 0:
            disk.busy -= 1
            raise StoreBusy(f"disk {path} is busy")
        return disk

    def _home(self, key: ShardKey) -> _Disk:
        if not self._paths:
            raise StoreDeviceError("there is no disk left")
        return self._touch(self._paths[hash_oid(key.oid) % len(self._paths)])

    def _holder(self, key: ShardKey, epoch: int = _LIVE) -> _Disk:
        """The disk with that version, the home of the shard first.

        :raises ObjectNotFound: no disk has it.
        """
        home = self._home(key)
        if (key, epoch) in home.now:
            return home
        for path in self._paths:
            disk = self._medium.disk(path)
            if disk is not home and (key, epoch) in self._touch(path).now:
                return disk
        raise ObjectNotFound(f"no object {key.oid:016x} index {key.index} epoch {epoch}")

    def _room(self, disk: _Disk, wanted_bytes: int) -> None:
        if disk.used_bytes() + wanted_bytes > self._medium.capacity_bytes:
            raise StoreFull("no space")

    def _flush(self, key: ShardKey) -> None:
        """The shard, its set-aside versions and the absence of what was removed survive power loss."""
        for path in self._paths:
            disk = self._medium.disk(path)
            for name in [name for name in disk.now.keys() | disk.safe.keys() if name[0] == key]:
                disk.flush(name)
        self._medium.flush_count += 1

    # ---- the contract

    def create(
        self, key: ShardKey, data: Buffer, *, offset_bytes: int, size_bytes: int, sparse: bool, durable: bool
    ) -> None:
        assert offset_bytes >= 0 and offset_bytes + len(data) <= size_bytes, (key, offset_bytes, len(data), size_bytes)
        with self._medium.lock:
            disk = self._home(key)
            self._room(disk, size_bytes - len(disk.now.get((key, _LIVE), b"")))
            fresh = bytearray(size_bytes)
            fresh[offset_bytes : offset_bytes + len(data)] = data
            for path in self._paths:
                self._medium.disk(path).now.pop((key, _LIVE), None)
            disk.now[key, _LIVE] = fresh
            if durable:
                self._flush(key)

    def write(self, key: ShardKey, data: Buffer, *, offset_bytes: int, durable: bool) -> None:
        with self._medium.lock:
            disk = self._holder(key)
            target = disk.now[key, _LIVE]
            end = offset_bytes + len(data)
            if end > len(target):
                self._room(disk, end - len(target))
                target.extend(bytes(end - len(target)))
            target[offset_bytes:end] = data
            if durable:
                self._flush(key)

    def _read(self, key: ShardKey, epoch: int, buffer: memoryview, offset_bytes: int) -> int:
        with self._medium.lock:
            piece = self._holder(key, epoch).now[key, epoch][offset_bytes : offset_bytes + len(buffer)]
            buffer[: len(piece)] = piece
            return len(piece)

    def read_into(self, key: ShardKey, buffer: memoryview, *, offset_bytes: int) -> int:
        return self._read(key, _LIVE, buffer, offset_bytes)

    def try_read_into(self, key: ShardKey, buffer: memoryview, *, offset_bytes: int) -> int | None:
        return self._read(key, _LIVE, buffer, offset_bytes) if self.cached else None

    def remove(self, key: ShardKey) -> None:
        with self._medium.lock:
            del self._holder(key).now[key, _LIVE]

    def exists(self, key: ShardKey) -> bool:
        with self._medium.lock:
            try:
                self._holder(key)
            except ObjectNotFound:
                return False
            return True

    def size(self, key: ShardKey) -> int:
        with self._medium.lock:
            return len(self._holder(key).now[key, _LIVE])

    def _names(self) -> list[_Name]:
        with self._medium.lock:
            return sorted({name for path in self._paths for name in self._touch(path).now})

    def keys(self) -> Iterator[ShardKey]:
        return iter([key for key, epoch in self._names() if epoch == _LIVE])

    def stale_keys(self) -> Iterator[tuple[ShardKey, int]]:
        return iter([name for name in self._names() if name[1] != _LIVE])

    def digest(self, key: ShardKey, *, epoch: int | None = None, cache: bool = False) -> bytes:
        version = _LIVE if epoch is None else epoch
        with self._medium.lock:
            return hashlib.sha1(self._holder(key, version).now[key, version], usedforsecurity=False).digest()

    def retire(self, key: ShardKey, epoch: int) -> None:
        with self._medium.lock:
            disk = self._holder(key)
            for path in self._paths:
                self._medium.disk(path).now.pop((key, epoch), None)
            disk.now[key, epoch] = disk.now.pop((key, _LIVE))

    def revive(self, key: ShardKey, epoch: int) -> None:
        with self._medium.lock:
            disk = self._holder(key, epoch)
            if not self.exists(key):
                self._room(disk, len(disk.now[key, epoch]))
                disk.now[key, _LIVE] = bytearray(disk.now[key, epoch])
                self._flush(key)

    def read_stale_into(self, key: ShardKey, epoch: int, buffer: memoryview, *, offset_bytes: int) -> int:
        return self._read(key, epoch, buffer, offset_bytes)

    def stale_size(self, key: ShardKey, epoch: int) -> int:
        with self._medium.lock:
            return len(self._holder(key, epoch).now[key, epoch])

    def purge_stale(self) -> None:
        with self._medium.lock:
            for path in self._paths:
                disk = self._touch(path)
                for name in [name for name in disk.now if name[1] != _LIVE]:
                    del disk.now[name]

    def wipe(self) -> None:
        with self._medium.lock:
            for path in self._paths:
                disk = self._touch(path)
                disk.now.clear()
                disk.safe.clear()

    def sync(self, keys: Iterable[ShardKey]) -> None:
        with self._medium.lock:
            for key in dict.fromkeys(keys):
                self.exists(key)  # meets a broken disk
                self._flush(key)

    def usage(self) -> Usage:
        used, free, weight = zip(*(disk.usage for disk in self.disks()), strict=True) if self._paths else ((), (), ())
        return Usage(sum(used), sum(free), sum(weight))

    def disks(self) -> tuple[DiskInfo, ...]:
        with self._medium.lock:
            found = []
            for path in self._paths:
                disk = self._medium.disk(path)
                used = disk.used_bytes()
                free = self._medium.capacity_bytes - used
                usage = Usage(0, 0, disk.weight_bytes) if disk.broken else Usage(used, free, disk.weight_bytes)
                found.append(DiskInfo(path, usage))
            return tuple(found)

    def add_disk(self, path: str) -> None:
        path = path.rstrip("/") or "/"
        with self._medium.lock:
            if path in self._paths:
                raise StoreError(f"duplicate path {path}")
            disk = self._medium.disk(path)
            if disk.broken:
                raise StoreError(f"cannot use {path}")
            disk.now.clear()
            disk.safe.clear()
            disk.weight_bytes = disk.weight_bytes or self._medium.capacity_bytes
            self._paths = sorted((*self._paths, path))

    def remove_disk(self, path: str) -> None:
        path = path.rstrip("/") or "/"
        with self._medium.lock:
            if path not in self._paths:
                raise StoreError(f"{path} is not a disk of this store")
            self._paths = [other for other in self._paths if other != path]

    def reweigh(self) -> Usage:
        with self._medium.lock:
            for path in self._paths:
                self._touch(path).weight_bytes = self._medium.capacity_bytes
        return self.usage()
