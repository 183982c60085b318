"""All shards of a sheep in one SQLite database, one row per shard and version.

Bytes change in place through incremental blobs. The write-ahead log is flushed only for what must be durable.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from sheepdog import api
from sheepdog.api import Buffer, DiskInfo, ObjectNotFound, ObjectStore, ShardKey, StoreOptions, Usage, hookimpl

SHEEPDOG_API = (1, 0)
LIVE = -1  # in place of an epoch
ERRORS = {sqlite3.SQLITE_FULL: api.StoreFull, sqlite3.SQLITE_BUSY: api.StoreBusy, sqlite3.SQLITE_LOCKED: api.StoreBusy}
SCHEMA = """PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS shard (oid BLOB, strip INTEGER, epoch INTEGER, data BLOB, UNIQUE (oid, strip, epoch));"""


class SqliteStore(ObjectStore):
    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = threading.RLock()  # one connection, used by one thread at a time
        self._db = sqlite3.connect(os.path.join(path, "shards.sqlite"), isolation_level=None, check_same_thread=False)
        self._db.executescript(SCHEMA)

    @contextmanager
    def _transaction(self, durable: bool = False) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                with self._db:  # commits, or rolls back after an exception
                    self._db.execute("BEGIN IMMEDIATE")
                    yield self._db
            except sqlite3.Error as error:
                code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_IOERR) & 0xFF
                if code in ERRORS:
                    raise ERRORS[code](str(error)) from error
                raise api.StoreDeviceError(f"{self._path}: {error}", path=self._path) from error

    def _row(self, key: ShardKey, epoch: int = LIVE) -> int:
        name = (key.oid.to_bytes(8, "big"), key.index, epoch)
        found = self._db.execute("SELECT rowid FROM shard WHERE oid=? AND strip=? AND epoch=?", name).fetchone()
        if found is None:
            raise ObjectNotFound(f"no shard {key.oid:016x} index {key.index} epoch {epoch}")
        return int(found[0])

    def _fill(self, key: ShardKey, data: Buffer, offset: int) -> None:
        with self._db.blobopen("shard", "data", self._row(key)) as blob:
            blob.seek(offset)
            blob.write(data)

    def _names(self, where: str) -> Iterator[tuple[ShardKey, int]]:
        with self._transaction() as db:
            rows = db.execute(f"SELECT oid, strip, epoch FROM shard WHERE {where} ORDER BY 1, 2, 3").fetchall()
        return ((ShardKey(int.from_bytes(oid, "big"), strip), epoch) for oid, strip, epoch in rows)

    def create(
        self, key: ShardKey, data: Buffer, *, offset_bytes: int, size_bytes: int, sparse: bool, durable: bool
    ) -> None:
        with self._transaction(durable) as db:
            name = (key.oid.to_bytes(8, "big"), key.index, LIVE, size_bytes)
            db.execute("INSERT OR REPLACE INTO shard VALUES (?, ?, ?, zeroblob(?))", name)
            self._fill(key, data, offset_bytes)

    def write(self, key: ShardKey, data: Buffer, *, offset_bytes: int, durable: bool) -> None:
        with self._transaction(durable):
            self._fill(key, data, offset_bytes)

    def read_into(self, key: ShardKey, buffer: memoryview, *, offset_bytes: int) -> int:
        return self.read_stale_into(key, LIVE, buffer, offset_bytes=offset_bytes)

    def read_stale_into(self, key: ShardKey, epoch: int, buffer: memoryview, *, offset_bytes: int) -> int:
        with self._transaction() as db, db.blobopen("shard", "data", self._row(key, epoch), readonly=True) as blob:
            blob.seek(min(offset_bytes, len(blob)))
            piece = blob.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def remove(self, key: ShardKey) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM shard WHERE rowid=?", (self._row(key),))

    def exists(self, key: ShardKey) -> bool:
        return any(self._names(f"oid = x'{key.oid:016x}' AND strip = {key.index} AND epoch = {LIVE}"))

    def size(self, key: ShardKey) -> int:
        return self.stale_size(key, LIVE)

    def stale_size(self, key: ShardKey, epoch: int) -> int:
        with self._transaction() as db, db.blobopen("shard", "data", self._row(key, epoch), readonly=True) as blob:
            return len(blob)

    def keys(self) -> Iterator[ShardKey]:
        return (key for key, _ in self._names(f"epoch = {LIVE}"))

    def stale_keys(self) -> Iterator[tuple[ShardKey, int]]:
        return self._names(f"epoch <> {LIVE}")

    def digest(self, key: ShardKey, *, epoch: int | None = None, cache: bool = False) -> bytes:
        epoch = LIVE if epoch is None else epoch
        buffer = bytearray(self.stale_size(key, epoch))
        self.read_stale_into(key, epoch, memoryview(buffer), offset_bytes=0)
        return hashlib.sha1(buffer, usedforsecurity=False).digest()

    def retire(self, key: ShardKey, epoch: int) -> None:
        with self._transaction() as db:
            db.execute("UPDATE OR REPLACE shard SET epoch=? WHERE rowid=?", (epoch, self._row(key)))

    def revive(self, key: ShardKey, epoch: int) -> None:
        with self._transaction(durable=True) as db:
            row = self._row(key, epoch)
            db.execute(f"INSERT OR IGNORE INTO shard SELECT oid, strip, {LIVE}, data FROM shard WHERE rowid={row}")

    def purge_stale(self) -> None:
        with self._transaction() as db:
            db.execute(f"DELETE FROM shard WHERE epoch <> {LIVE}")

    def wipe(self) -> None:
        with self._transaction(durable=True) as db:
            db.execute("DELETE FROM shard")

    def sync(self, keys: Iterable[ShardKey]) -> None:
        with self._transaction(durable=True) as db:  # flushing the log for any change flushes all commits before it
            db.execute("PRAGMA user_version = 1")

    def usage(self) -> Usage:
        disk = os.statvfs(self._path)
        with self._transaction() as db:
            used = db.execute("SELECT coalesce(sum(length(data)), 0) FROM shard").fetchone()[0]
        return Usage(used, disk.f_frsize * disk.f_bavail, disk.f_frsize * disk.f_blocks)

    def disks(self) -> tuple[DiskInfo, ...]:
        return (DiskInfo(self._path, self.usage()),)

    def close(self) -> None:
        self._db.close()


@hookimpl
def sheepdog_object_store(options: StoreOptions) -> ObjectStore:
    if len(options.disks) != 1:
        raise api.ConfigError(f"the sqlite store takes one disk directory, not {len(options.disks)}")
    return SqliteStore(options.disks[0])
