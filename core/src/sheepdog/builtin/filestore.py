"""An object store with one file per object, in the directories of the original (docs/on-disk.md).

A layout says in which directory of a disk an object's file lies; everything else is here: atomic creates, writes in
place, the stale area, several disks with a ring of their own, digests remembered beside objects that are read-only.

Two rules explain most of the code. *No file or directory stays open between calls*: opening and closing costs 3 µs, and
a disk that was pulled, moved or unmounted then shows at the next call. *The common case is open, one transfer, close*:
everything rare (an object on another disk than the ring says, a missing file, a full disk) starts from an ``OSError``.

An object that lies on another disk than the ring says, because the set of disks changed, is moved when it is first
used. While there is more than one disk, everything that makes, moves or removes a name holds one lock, so that a move
started by a reader cannot bring back what a mutator has just replaced.
"""

from __future__ import annotations

import errno
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from sheepdog.api import (
    SPARSE_BITS,
    Buffer,
    ConfigError,
    DiskInfo,
    Incoming,
    ObjectNotFound,
    ObjectStore,
    ShardKey,
    Staged,
    StoreBusy,
    StoreDeviceError,
    StoreError,
    StoreFull,
    StoreOptions,
    Usage,
    is_data,
    is_sparse,
)
from sheepdog.builtin import filestore_io as io
from sheepdog.builtin.filestore_digest import digest_file
from sheepdog.builtin.filestore_disk import (
    STALE,
    TEMPORARY,
    Disk,
    Layout,
    Paths,
    file_name,
    parse_file_name,
    refuse_another_layout,
)
from sheepdog.builtin.filestore_incoming import IncomingFile, new_file
from sheepdog.builtin.filestore_names import Renamed, Unflushed
from sheepdog.builtin.filestore_spares import Spares

__all__ = ["FileStore", "Layout", "parse_file_name"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RING_POSITION_BYTES = 16 << 20  # weight of one position of a disk on the ring, for the log
_VNODE_BYTES = 4 << 30  # the same where vnodes belong to disks
_READ = os.O_RDONLY
_WRITE = os.O_WRONLY
_NO_NOWAIT = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})


class FileStore(ObjectStore):
    """One file per shard below one or several disk directories.

    Construction takes every usable disk into use, removes what was never finished and logs the disks it had to drop.

    :raises ConfigError: no disk is usable, or one has objects in the places of another layout.
    """

    def __init__(self, options: StoreOptions, layout: Layout) -> None:
        self._layout = layout
        self._direct = options.direct_io
        self._node = options.node
        self._nowait = True  # until a file system says that it cannot
        self._punch = True
        self._serial = itertools.count(1)
        self._names = threading.RLock()
        self._renamed = Unflushed(self._flush_directory)
        self._spares = Spares()
        disks: list[Disk] = []
        given = [_without_slashes(path) for path in options.disks]
        if not options.replacing:
            for path in given:
                refuse_another_layout(path, layout)
        for path in given:
            if any(disk.path == path for disk in disks):
                continue
            try:
                disks.append(Disk(path, layout))
            except StoreError as error:
                logger.error("%s", error)
        if not disks:
            raise ConfigError("There isn't any available disk!")
        self._paths = self._use(disks)
        for disk in disks:
            # A former process may have died between a rename and its flush.
            self._renamed.note(os.path.join(disk.path, name) for name in (*layout.directories(), STALE))
            self._say_whether_direct(disk)
            self._spares.take_up(disk)
        if len(disks) > 1:
            try:
                self._drop_doubles()
            except (OSError, StoreError) as error:  # the first request that meets the failing disk reports it
                logger.error("looking for doubles: %s", error)

    def _say_whether_direct(self, disk: Disk) -> None:
        if self._direct and not io.direct_supported(os.path.join(disk.path, f"direct{TEMPORARY}")):
            logger.warning("direct I/O is not possible on %s: its file system does not offer it", disk.path)

    def _use(self, disks: Iterable[Disk]) -> Paths:
        ordered = tuple(sorted(disks, key=lambda disk: disk.path))
        for disk in ordered:
            positions = -(-disk.weight_bytes // (_RING_POSITION_BYTES if self._node is None else _VNODE_BYTES))
            logger.info("%s, vdisk nr %d, total disk %d", disk.path, positions, len(ordered))
        return Paths(ordered, self._layout, self._node)

    def _drop_doubles(self) -> None:
        """Of a shard that lies on several disks only the file that changed last is left; the right place wins a tie.

        Doubles come from a crash in the middle of a move, and from a disk that returns after the sheep ran without it.
        """
        paths = self._paths
        seen: set[ShardKey] = set()
        doubles: set[ShardKey] = set()
        for disk in paths.disks:
            for key in disk.live():
                (doubles if key in seen else seen).add(key)
        for key in sorted(doubles):
            places = [path for path in (paths.on(disk, key) for disk in paths.disks_for(key)) if os.path.exists(path)]
            newest = max(places, key=lambda path: os.stat(path).st_mtime_ns)  # the first one of equals
            for path in places:
                if path != newest:
                    logger.warning("removing %s, which %s replaced", path, newest)
                    os.unlink(path)

    # ---- create and write

    def create(
        self, key: ShardKey, data: Buffer, *, offset_bytes: int, size_bytes: int, sparse: bool, durable: bool
    ) -> None:
        view = memoryview(data)
        assert 0 <= offset_bytes <= offset_bytes + len(view) <= size_bytes, (key, offset_bytes, len(view), size_bytes)
        paths = self._paths
        disk = paths.disk_of(key)
        # An unmounted disk leaves an empty directory behind that would take the file without complaint.
        disk.check()
        path = paths[key]
        self._place(
            disk,
            path,
            lambda fd: io.fill_new(fd, view, offset_bytes, size_bytes, sparse=sparse),
            durable=durable,
            finish=lambda temporary: self._become(paths, key, temporary, path),
        )

    def _place(
        self, disk: Disk, path: str, fill: Callable[[int], None], *, durable: bool, finish: Callable[[str], None]
    ) -> None:
        """A temporary file beside ``path`` was filled and given to ``finish``; after an error nothing of it is left."""
        temporary = self._temporary(path)
        try:
            fd = new_file(disk, temporary)
            try:
                try:
                    fill(fd)
                    if durable:
                        os.fdatasync(fd)
                finally:
                    os.close(fd)
                finish(temporary)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise
            self._named(path, durable)
        except OSError as error:
            raise disk.trouble(error, f"creating {os.path.basename(path)}") from error

    def _named(self, path: str, durable: bool) -> None:
        """A file has got its name."""
        directory = os.path.dirname(path)
        if durable:
            io.sync_directory(directory)
        else:
            self._renamed.note((directory,))

    def _temporary(self, path: str) -> str:
        return f"{path}.{next(self._serial):x}{TEMPORARY}"

    def receive(self, key: ShardKey, size_bytes: int, *, sparse: bool) -> Incoming:
        paths = self._paths
        disk, path = paths.disk_of(key), paths[key]
        temporary = self._temporary(path)

        def become(durable: bool) -> None:
            with self._names:
                if self._paths is not paths:
                    raise StoreBusy(f"{file_name(key)}: the disks have changed")
                self._become(paths, key, temporary, path)
            self._named(path, durable)

        return IncomingFile(disk, temporary, size_bytes, sparse=sparse, become=become)

    def _become(self, paths: Paths, key: ShardKey, temporary: str, path: str) -> None:
        """The temporary file is the one live version."""
        if len(paths.disks) == 1:
            os.rename(temporary, path)
            return
        with self._names:
            os.rename(temporary, path)
            for disk in paths.disks_for(key)[1:]:
                with suppress(FileNotFoundError):
                    os.unlink(paths.on(disk, key))

    def write(self, key: ShardKey, data: Buffer, *, offset_bytes: int, durable: bool) -> None:
        if durable or self._direct or (key[0] & SPARSE_BITS and len(data) >= io.BLOCK_BYTES):
            self._anywhere(key, lambda path: self._write_slowly(path, key, memoryview(data), offset_bytes, durable))
        else:
            self.try_write(key, data, offset_bytes=offset_bytes)

    def try_write(self, key: ShardKey, data: Buffer, *, offset_bytes: int) -> bool:
        if self._direct or (key[0] & SPARSE_BITS and len(data) >= io.BLOCK_BYTES):
            self.write(key, data, offset_bytes=offset_bytes, durable=False)
            return True
        try:
            fd = os.open(self._paths[key], _WRITE)
        except OSError:
            self._anywhere(key, lambda path: io.write_file(path, memoryview(data), offset_bytes))
            return True
        try:
            written = os.pwrite(fd, data, offset_bytes)
            if written != len(data):
                io.write_all(fd, memoryview(data)[written:], offset_bytes + written)
        except OSError as error:
            raise self._trouble(error, key) from error
        finally:
            os.close(fd)
        return True

    def _write_slowly(self, path: str, key: ShardKey, data: memoryview, offset: int, durable: bool) -> None:
        if len(data) >= io.BLOCK_BYTES and is_sparse(key.oid):
            self._punch = io.write_sparse(path, data, offset, durable=durable, punch=self._punch)
        elif not (
            self._direct
            and is_data(key.oid)
            and io.direct_possible(offset, len(data))
            and io.write_direct(path, data, offset, durable=durable)
        ):
            io.write_file(path, data, offset, os.O_DSYNC if durable else 0)
        if durable:
            self._sync_names(os.path.dirname(path))

    # ---- whole contents

    def stage(self, key: ShardKey, data: Buffer, *, durable: bool) -> Staged | None:
        disk = self._paths.disk_of(key)
        path = self._paths[key]

        def write(spare: str, view: memoryview) -> None:
            direct = self._direct and is_data(key.oid) and io.direct_possible(0, len(view))
            if not (direct and io.write_direct(spare, view, 0, durable=durable)):
                io.write_file(spare, view, 0, os.O_DSYNC if durable else 0)

        try:
            return self._spares.stage(disk, key, path, data, write, durable)
        except OSError as error:
            raise disk.trouble(error, f"writing {file_name(key)}") from error

    def unstage(self, staged: Staged) -> None:
        self._spares.unstage(staged)

    def exchange(self, staged: Staged) -> None:
        self._exchange(staged.key, lambda path: self._spares.exchange(staged, path))

    def _exchange(self, key: ShardKey, exchange: Callable[[str], T]) -> T:
        with self._names:
            path = self._paths[key]
            try:
                result = exchange(path)
            except FileNotFoundError:
                if os.path.exists(path):
                    raise StoreBusy(f"{file_name(key)}: its other content was removed") from None
                self._check_all(self._paths)
                raise self._missing(key) from None
            except OSError as error:
                raise self._trouble(error, key) from error
            self._renamed.note((key,))
            return result

    def put_back(self, key: ShardKey, old: int, *, durable: bool) -> bool:
        def settle() -> None:
            self._renamed.note((key,))
            if durable:
                self._renamed.flush({key: self._exchanged_in(key)})

        return self._exchange(key, lambda path: self._spares.put_back(key, old, path, settle))

    def release(self, versions: Iterable[tuple[ShardKey, int]] | None = None) -> None:
        self._spares.release(versions)

    def finish_exchanges(self, exchanges: Sequence[Staged], kept: Iterable[tuple[ShardKey, int]]) -> list[ShardKey]:
        def live(key: ShardKey) -> str | None:
            places = (self._paths.on(disk, key) for disk in self._paths.disks_for(key))
            return next(filter(os.path.exists, places), None)

        try:
            touched = self._spares.finish(exchanges, kept, live)
        except OSError as error:
            raise StoreDeviceError(f"bringing files to their places: {error.strerror}") from error
        self._renamed.note(touched)
        return touched

    def upkeep(self) -> None:
        self._spares.upkeep()

    def close(self) -> None:
        self._spares.close()

    # ---- read

    def read_into(self, key: ShardKey, buffer: memoryview, *, offset_bytes: int) -> int:
        if self._direct and is_data(key.oid) and io.direct_possible(offset_bytes, len(buffer)):
            count = self._anywhere(key, lambda path: io.read_direct(path, buffer, offset_bytes))
            if count is not None:
                return count
        return self._anywhere(key, lambda path: io.read_file(path, buffer, offset_bytes))

    def try_read_into(self, key: ShardKey, buffer: memoryview, *, offset_bytes: int) -> int | None:
        if not self._nowait or (self._direct and is_data(key[0])):
            return None
        try:
            fd = os.open(self._paths[key], _READ)
        except FileNotFoundError:
            if len(self._paths.disks) > 1:
                return None  # it may lie on another disk, and moving it takes time
            self._paths.disk_of(key).check()
            raise self._missing(key) from None
        except OSError as error:
            raise self._trouble(error, key) from error
        try:
            count = os.preadv(fd, (buffer,), offset_bytes, os.RWF_NOWAIT)
            if count == len(buffer) or offset_bytes + count >= os.fstat(fd).st_size:
                return count
            return None  # only the first part was cached
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in _NO_NOWAIT:
                self._nowait = False
                return None
            raise self._trouble(error, key) from error
        finally:
            os.close(fd)

    def remove(self, key: ShardKey) -> None:
        paths = self._paths
        found = False
        with self._names:
            for disk in paths.disks_for(key):
                path = paths.on(disk, key)
                try:
                    os.unlink(path)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise disk.trouble(error, f"removing {file_name(key)}") from error
                found = True
                self._renamed.note((os.path.dirname(path),))
        if not found:
            self._check_all(paths)
            raise self._missing(key)

    def exists(self, key: ShardKey) -> bool:
        try:
            self._anywhere(key, os.stat)
        except ObjectNotFound:
            return False
        return True

    def size(self, key: ShardKey) -> int:
        return self._anywhere(key, os.stat).st_size

    def modified_ns(self, key: ShardKey, *, epoch: int | None = None) -> int | None:
        found = self._anywhere(key, os.stat) if epoch is None else self._stale(key, epoch, os.stat)
        return found.st_mtime_ns

    # ---- lists

    def keys(self) -> Iterator[ShardKey]:
        found: set[ShardKey] = set()
        for disk in self._paths.disks:
            found.update(disk.live())
        return iter(sorted(found))

    def stale_keys(self) -> Iterator[tuple[ShardKey, int]]:
        found: set[tuple[ShardKey, int]] = set()
        for disk in self._paths.disks:
            found.update(disk.stale())
        return iter(sorted(found))

    # ---- digest

    def digest(self, key: ShardKey, *, epoch: int | None = None, cache: bool = False) -> bytes:
        def of(path: str) -> bytes:
            return digest_file(path, cache=cache)

        return self._anywhere(key, of) if epoch is None else self._stale(key, epoch, of)

    # ---- the stale area

    def retire(self, key: ShardKey, epoch: int) -> None:
        paths = self._paths
        home: Disk | None = None
        with self._names:
            for disk in paths.disks_for(key):
                live, stale = paths.on(disk, key), _stale_path(disk, key, epoch)
                try:
                    if home is None:
                        try:
                            os.rename(live, stale)
                        except FileNotFoundError:
                            if not os.path.exists(live):
                                continue
                            disk.make_directories()  # the stale area was missing
                            os.rename(live, stale)
                        home = disk
                        self._renamed.note((os.path.dirname(live), os.path.dirname(stale)))
                        # Renaming between two links of one file (revived, then retired again) does nothing at all.
                        _unlink_if_there(live)
                    else:
                        _unlink_if_there(live)
                        _unlink_if_there(stale)
                except OSError as error:
                    raise disk.trouble(error, f"retiring {file_name(key)}") from error
            if home is not None:
                # An older version of the same name on a disk that was looked at before the live one was found.
                for disk in paths.disks:
                    if disk is not home:
                        _unlink_if_there(_stale_path(disk, key, epoch))
        if home is None:
            self._check_all(paths)
            raise self._missing(key)

    def revive(self, key: ShardKey, epoch: int) -> None:
        with self._names:
            source, disk = self._stale_place(key, epoch)
            paths = self._paths
            if any(os.path.exists(paths.on(place, key)) for place in paths.disks):
                return
            live = paths.on(disk, key)
            try:
                if not os.path.isdir(os.path.dirname(live)):
                    disk.make_directories()
                with suppress(FileExistsError):
                    os.link(source, live)
                io.sync_directory(os.path.dirname(live))
            except OSError as error:
                raise disk.trouble(error, f"reviving {file_name(key)}") from error

    def read_stale_into(self, key: ShardKey, epoch: int, buffer: memoryview, *, offset_bytes: int) -> int:
        return self._stale(key, epoch, lambda path: io.read_file(path, buffer, offset_bytes))

    def stale_size(self, key: ShardKey, epoch: int) -> int:
        return self._stale(key, epoch, os.stat).st_size

    def purge_stale(self) -> None:
        for disk in self._paths.disks:
            disk.purge_stale()

    def wipe(self) -> None:
        with self._names:
            self._spares.forget()
            for disk in self._paths.disks:
                disk.wipe()

    def _stale_place(self, key: ShardKey, epoch: int) -> tuple[str, Disk]:
        paths = self._paths
        for disk in paths.disks_for(key):
            path = _stale_path(disk, key, epoch)
            if os.path.exists(path):
                return path, disk
        self._check_all(paths)
        raise ObjectNotFound(f"no version of {file_name(key)} was set aside at epoch {epoch}")

    def _stale(self, key: ShardKey, epoch: int, use: Callable[[str], T]) -> T:
        path, disk = self._stale_place(key, epoch)
        try:
            return use(path)
        except FileNotFoundError:
            raise ObjectNotFound(f"{file_name(key)} of epoch {epoch} was purged") from None
        except OSError as error:
            raise disk.trouble(error, f"{file_name(key)} of epoch {epoch}") from error

    # ---- flush

    def sync(self, keys: Iterable[ShardKey]) -> None:
        paths = self._paths
        renamed: dict[Renamed, tuple[str, ...]] = {}
        for key in dict.fromkeys(keys):
            path = paths[key]
            try:
                fd = os.open(path, _READ)
            except FileNotFoundError:
                self._check_all(paths)
                places = [paths.on(disk, key) for disk in paths.disks]
                path = next(filter(os.path.exists, places), "")
                if not path:
                    renamed.update((place, (place,)) for place in map(os.path.dirname, places))  # it stays gone
                    continue
                fd = os.open(path, _READ)
            except OSError as error:
                raise self._trouble(error, key) from error
            try:
                os.fdatasync(fd)
            except OSError as error:
                raise self._trouble(error, key) from error
            finally:
                os.close(fd)
            if self._renamed:
                directory = os.path.dirname(path)
                renamed[directory] = (directory,)
                if key in self._renamed:
                    renamed[key] = self._exchanged_in(key)
        if renamed:
            self._renamed.flush(renamed)

    def _exchanged_in(self, key: ShardKey) -> tuple[str, ...]:
        """The directories with the two names that were exchanged."""
        return os.path.dirname(self._paths[key]), f"{self._paths.disk_of(key).path}/{STALE}"

    def _sync_names(self, directory: str) -> None:
        """Names made in the directory so far survive power loss; costs nothing if none was made."""
        self._renamed.flush({directory: (directory,)})

    def _flush_directory(self, directory: str) -> None:
        try:
            io.sync_directory(directory)
        except OSError as error:
            for disk in self._paths.disks:
                if directory == disk.path or directory.startswith(disk.path + "/"):
                    raise disk.trouble(error, "flushing") from error
            raise StoreDeviceError(f"flushing {directory}: {error.strerror}") from error

    # ---- disks

    def usage(self) -> Usage:
        return Usage(*map(sum, zip(Usage(0, 0, 0), *(disk.usage for disk in self.disks()), strict=True)))

    def disks(self) -> tuple[DiskInfo, ...]:
        return tuple(disk.info() for disk in self._paths.disks)

    def weights(self) -> dict[str, int]:
        return {disk.path: disk.weight_bytes for disk in self._paths.disks}

    def add_disk(self, path: str) -> None:
        path = _without_slashes(path)
        with self._names:
            real = os.path.realpath(path)
            if any(os.path.realpath(disk.path) == real for disk in self._paths.disks):
                raise StoreError(f"duplicate path {path}")
            if any(_inside(real, os.path.realpath(disk.path)) for disk in self._paths.disks):
                raise StoreError(f"{path} contains, or lies in, another disk")
            if os.path.exists(f"{path}/config") and os.path.exists(f"{path}/epoch"):
                raise StoreError(f"{path} is meta-store, abort")
            disk = Disk(path, self._layout, empty=True)
            self._say_whether_direct(disk)
            self._paths = self._use((*self._paths.disks, disk))

    def remove_disk(self, path: str) -> None:
        path = _without_slashes(path)
        with self._names:
            rest = tuple(disk for disk in self._paths.disks if disk.path != path)
            if len(rest) == len(self._paths.disks):
                raise StoreError(f"{path} is not a disk of this store")
            self._paths = self._use(rest)
            self._spares.leave(path)

    def reweigh(self) -> Usage:
        with self._names:
            for disk in self._paths.disks:
                disk.reweigh()
            self._paths = Paths(self._paths.disks, self._layout, self._node)
        return self.usage()

    # ---- where a shard is

    def _anywhere(self, key: ShardKey, use: Callable[[str], T]) -> T:
        """``use(path)`` of the live file, which is moved to where it belongs if it lay on another disk."""
        paths = self._paths
        try:
            return use(paths[key])
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._trouble(error, key) from error
        if len(paths.disks) == 1:
            self._check_all(paths)
            raise self._missing(key)
        # The lock is held until the use is over: if the file could not be moved (its place is full), it is used where
        # it lies, and nobody may move it away under a writer.
        with self._names:
            path, disk = self._settle(key)
            try:
                return use(path)
            except FileNotFoundError:
                raise self._missing(key) from None
            except OSError as error:
                raise disk.trouble(error, file_name(key)) from error

    def _settle(self, key: ShardKey) -> tuple[str, Disk]:
        """Path and disk of the live file after an attempt to bring it home."""
        paths = self._paths
        home, *others = paths.disks_for(key)
        target = paths[key]
        home.check()
        if os.path.exists(target):  # another reader has moved it meanwhile
            return target, home
        for disk in others:
            source = paths.on(disk, key)
            if not os.path.exists(source):
                disk.check()
                continue
            try:
                self._move(source, disk, target, home)
            except StoreFull:
                logger.warning("no space to move %s to %s", source, home.path)
                return source, disk
            return target, home
        raise self._missing(key)

    def _move(self, source: str, disk: Disk, target: str, home: Disk) -> None:
        logger.debug("moving %s to %s", source, home.path)
        try:
            fd = os.open(source, _READ)
        except OSError as error:
            raise disk.trouble(error, f"moving {source}") from error
        try:
            before = os.fstat(fd)

            def fill(target_fd: int) -> None:
                io.copy_contents(fd, target_fd)
                os.utime(target_fd, ns=(before.st_atime_ns, before.st_mtime_ns))

            # Durable, since the only other copy goes right after.
            self._place(
                home,
                target,
                fill,
                durable=True,
                finish=lambda temporary: os.rename(temporary, target),
            )
            os.unlink(source)
        except io.SourceFailed as failure:
            raise disk.trouble(failure.error, f"moving {source}") from failure
        except OSError as error:
            raise disk.trouble(error, f"moving {source}") from error
        finally:
            os.close(fd)

    def _check_all(self, paths: Paths) -> None:
        for disk in paths.disks:
            disk.check()

    def _missing(self, key: ShardKey) -> ObjectNotFound:
        return ObjectNotFound(f"no object {file_name(key)}")

    def _trouble(self, error: OSError, key: ShardKey) -> StoreError:
        return self._paths.disk_of(key).trouble(error, file_name(key))


def _without_slashes(path: str) -> str:
    return path.rstrip("/") or "/"


def _inside(one: str, other: str) -> bool:
    """One of the two directories lies in the other."""
    return (one + "/").startswith(other + "/") or (other + "/").startswith(one + "/")


def _stale_path(disk: Disk, key: ShardKey, epoch: int) -> str:
    return f"{disk.path}/{STALE}/{file_name(key)}.{epoch}"


def _unlink_if_there(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
