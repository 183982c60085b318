"""A store in front of another one: everything is passed on, subclasses change what they are about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sheepdog.contracts.store import Buffer, DiskInfo, ObjectStore, ShardKey, Staged, Usage, Verified


class StoreWrapper(ObjectStore):
    """Does what ``inner`` does."""

    def __init__(self, inner: ObjectStore) -> None:
        self.inner = inner

    @property
    def flushes_apart(self) -> bool:
        return self.inner.flushes_apart

    def create(
        self, key: ShardKey, data: Buffer, *, offset_bytes: int, size_bytes: int, sparse: bool, durable: bool
    ) -> None:
        self.inner.create(key, data, offset_bytes=offset_bytes, size_bytes=size_bytes, sparse=sparse, durable=durable)

    def write(self, key: ShardKey, data: Buffer, *, offset_bytes: int, durable: bool) -> None:
        self.inner.write(key, data, offset_bytes=offset_bytes, durable=durable)

    def read_into(self, key: ShardKey, buffer: memoryview, *, offset_bytes: int) -> int:
        return self.inner.read_into(key, buffer, offset_bytes=offset_bytes)

    def try_read_into(self, key: ShardKey, buffer: memoryview, *, offset_bytes: int) -> int | None:
        return self.inner.try_read_into(key, buffer, offset_bytes=offset_bytes)

    def remove(self, key: ShardKey) -> None:
        self.inner.remove(key)

    def exists(self, key: ShardKey) -> bool:
        return self.inner.exists(key)

    def size(self, key: ShardKey) -> int:
        return self.inner.size(key)

    def keys(self) -> Iterator[ShardKey]:
        return self.inner.keys()

    def stale_keys(self) -> Iterator[tuple[ShardKey, int]]:
        return self.inner.stale_keys()

    def digest(self, key: ShardKey, *, epoch: int | None = None, cache: bool = False) -> bytes:
        return self.inner.digest(key, epoch=epoch, cache=cache)

    def retire(self, key: ShardKey, epoch: int) -> None:
        self.inner.retire(key, epoch)

    def revive(self, key: ShardKey, epoch: int) -> None:
        self.inner.revive(key, epoch)

    def read_stale_into(self, key: ShardKey, epoch: int, buffer: memoryview, *, offset_bytes: int) -> int:
        return self.inner.read_stale_into(key, epoch, buffer, offset_bytes=offset_bytes)

    def stale_size(self, key: ShardKey, epoch: int) -> int:
        return self.inner.stale_size(key, epoch)

    def purge_stale(self) -> None:
        self.inner.purge_stale()

    def wipe(self) -> None:
        self.inner.wipe()

    def sync(self, keys: Iterable[ShardKey]) -> None:
        self.inner.sync(keys)

    def usage(self) -> Usage:
        return self.inner.usage()

    def disks(self) -> tuple[DiskInfo, ...]:
        return self.inner.disks()

    def weights(self) -> dict[str, int]:
        return self.inner.weights()

    def add_disk(self, path: str) -> None:
        self.inner.add_disk(path)

    def remove_disk(self, path: str) -> None:
        self.inner.remove_disk(path)

    def reweigh(self) -> Usage:
        return self.inner.reweigh()

    def stage(self, key: ShardKey, data: Buffer, *, durable: bool) -> Staged | None:
        return self.inner.stage(key, data, durable=durable)

    def unstage(self, staged: Staged) -> None:
        self.inner.unstage(staged)

    def exchange(self, staged: Staged) -> None:
        self.inner.exchange(staged)

    def put_back(self, key: ShardKey, old: int, *, durable: bool) -> bool:
        return self.inner.put_back(key, old, durable=durable)

    def release(self, versions: Iterable[tuple[ShardKey, int]] | None = None) -> None:
        self.inner.release(versions)

    def finish_exchanges(self, exchanges: Sequence[Staged], kept: Iterable[tuple[ShardKey, int]]) -> list[ShardKey]:
        return self.inner.finish_exchanges(exchanges, kept)

    def verify(self, key: ShardKey, *, offset_bytes: int, length_bytes: int) -> Verified:
        return self.inner.verify(key, offset_bytes=offset_bytes, length_bytes=length_bytes)

    def stored_digest(self, key: ShardKey) -> bytes:
        return self.inner.stored_digest(key)

    def accept(self, key: ShardKey, digest: bytes) -> bool:
        return self.inner.accept(key, digest)

    def vouched(self, key: ShardKey, *, offset_bytes: int, length_bytes: int, epoch: int | None = None) -> bool:
        return self.inner.vouched(key, offset_bytes=offset_bytes, length_bytes=length_bytes, epoch=epoch)

    def known(self, key: ShardKey) -> bool:
        return self.inner.known(key)

    def doubt(self, key: ShardKey) -> None:
        self.inner.doubt(key)

    def modified_ns(self, key: ShardKey, *, epoch: int | None = None) -> int | None:
        return self.inner.modified_ns(key, epoch=epoch)

    def ready(self, key: ShardKey) -> bool:
        return self.inner.ready(key)

    def upkeep(self) -> None:
        self.inner.upkeep()

    def close(self) -> None:
        self.inner.close()
