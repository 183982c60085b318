"""Where checksums of shards lie on disk: one small file per shard in ``sums/`` of the base directory.

A file exists only while the shard rests. It is removed before the first change of the shard, and written anew when no
change came for a while, so a killed process leaves either the right checksums or none. Each carries a checksum of its
own; one that was cut short, or belongs to another *generation*, counts as none.

The generation is the answer to everything that would make files wrong without our knowledge; a new one is begun, which
drops all checksums at once, when

* the machine went down while the sheep ran with ``-n``: what was written last is lost, and the removal of a file of
  checksums may be lost as well. (Without ``-n`` removals are flushed before the data that they are about.)
* somebody else used the base directory since, an original sheep for example. Every sheep rewrites ``config`` when it
  starts, so it is another file then than the one we noted.

The original ignores the directory, and no name in it is that of an object's file.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
import threading
from array import array
from collections.abc import Callable
from contextlib import suppress
from struct import Struct
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from sheepdog.contracts.store import ShardKey
from sheepdog.daemon.storedir import sync_directory
from sheepdog.errors import ConfigError, StoreBusy, StoreDeviceError, StoreError, StoreFull

logger = logging.getLogger(__name__)

DIRECTORY = "sums"
STATE_FILE = "state"
STALE = "stale"
SUFFIX = ".sums"  # whoever looks for objects by their names finds none here
BOOT_ID = "/proc/sys/kernel/random/boot_id"

# What is left to others on the file system of the base directory, where the log of epochs and maybe the objects lie;
# of a small one a tenth.
ROOM_BYTES = 256 << 20
ROOM_FILES = 10_000

_MAGIC = b"SDSUMS1\n"
# magic, generation, oid, strip (-1: a whole copy), size of the shard, when it was changed last (0: not known)
_HEAD = Struct("<8sQQqQQ")
_CHECK = Struct("<Q")  # of the head and everything behind
_BUSY = frozenset({errno.EMFILE, errno.ENFILE, errno.EINTR, errno.EAGAIN, errno.ENOMEM})
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})  # file systems that copy on write need space for a removal


class Saved(NamedTuple):
    """What is noted of one shard."""

    size_bytes: int
    sums: array[int]
    modified_ns: int = 0  # by the medium, when they were written down; 0: not known


class ChecksumFiles:
    """The files of one sheep. Thread-safe for different shards."""

    def __init__(
        self,
        base: str,
        *,
        durable: bool,
        boot_id: str | None = None,
        started_ns: int = 0,
        used_elsewhere: Callable[[], None] = lambda: None,
    ) -> None:
        """
        :param durable: what is acknowledged survives power loss, so what is noted here must be true after it.
        :param boot_id: differs whenever the machine was down in between; for tests.
        :param started_ns: when this sheep was started: what was changed before without our knowledge was changed on
            purpose. 0: nothing was.
        :param used_elsewhere: called when something else has used the base directory since a sheep of ours did, before
            the directory counts as ours again. A copy of a directory is no use of it.
        :raises ConfigError: the directory cannot be made.
        """
        self._root = os.path.join(base, DIRECTORY)
        self._state_path = os.path.join(self._root, STATE_FILE)
        self._config = os.path.join(base, "config")
        self.durable = durable
        self.started_ns = started_ns
        self._boot_id = boot_id if boot_id is not None else _boot_id()
        self._unflushed: set[str] = set()  # directories with removals that may not survive power loss
        self._noting = threading.Lock()  # of the set; held for moments
        self._flushing = threading.Lock()
        self._failing = False
        try:
            os.makedirs(os.path.join(self._root, STALE), 0o770, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot make {self._root}: {error.strerror}") from error
        self.generation = 0
        self._next: list[int] = []  # identity of a config file that is about to get its name
        self._open(used_elsewhere)

    # ---- the generation

    def _open(self, used_elsewhere: Callable[[], None]) -> None:
        state = self._read_state()
        reason = ""
        if state is not None:
            found, ours = self._config_identity(), (state["config"], state["next"])
            if _age(found) not in map(_age, ours):
                used_elsewhere()
        if state is None:
            reason = "there are none"
        elif not state["durable"] and state["boot"] != self._boot_id:
            reason = "the machine went down while the sheep ran without flushing (-n)"
        elif not state["durable"] and self.durable:
            reason = "the sheep ran without flushing (-n) so far"
        elif found not in ours:
            reason = "the base directory was used by something else since"
        if state is None or reason:
            if state is not None:
                logger.info("checksums are made anew: %s", reason)
            self.generation = secrets.randbits(63)
        else:
            self.generation = state["generation"]
            if self.durable and state["boot"] == self._boot_id:
                # A former process may have died between a removal and its flush.
                self._unflushed.update(entry.path for entry in os.scandir(self._root) if entry.is_dir())
                try:
                    self.flush()
                except StoreError as error:
                    raise ConfigError(str(error)) from error
        self._write_state()

    def _read_state(self) -> dict[str, Any] | None:  # Any: checked here
        try:
            with open(self._state_path, encoding="ascii") as file:
                state = json.load(file)
        except (OSError, ValueError):
            return None
        known = {"generation": int, "durable": bool, "boot": str, "config": list, "next": list}
        if isinstance(state, dict):
            state.setdefault("next", [])
        if not isinstance(state, dict) or any(not isinstance(state.get(name), kind) for name, kind in known.items()):
            return None
        return state

    def _write_state(self) -> None:
        """Without it the next start drops all checksums, nothing else."""
        state = {
            "generation": self.generation, "durable": self.durable, "boot": self._boot_id,
            "config": self._config_identity(), "next": self._next,
        }  # fmt: skip
        temporary = f"{self._state_path}.tmp"
        try:
            with open(temporary, "w", encoding="ascii") as file:
                json.dump(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, self._state_path)
            sync_directory(self._root)
        except OSError as error:
            logger.warning("cannot write %s: %s", self._state_path, error.strerror)

    def _config_identity(self) -> list[int]:
        try:
            return _identity(os.stat(self._config))
        except OSError:
            return []

    def config_follows(self, status: os.stat_result) -> None:
        """This sheep is about to replace its config file; if it dies on the way, either of the two is ours."""
        self._next = _identity(status)
        self._write_state()

    def config_written(self) -> None:
        """This sheep has just replaced its config file."""
        self._next = []
        self._write_state()

    def renew(self) -> None:
        """No checksum is left."""
        self.generation = secrets.randbits(63)
        self._write_state()
        for name in os.listdir(self._root):
            path = os.path.join(self._root, name)
            if os.path.isdir(path):
                shutil.rmtree(path, ignore_errors=True)
        os.makedirs(os.path.join(self._root, STALE), 0o770, exist_ok=True)

    # ---- one shard

    def _path(self, key: ShardKey, epoch: int | None) -> str:
        name = f"{key[0]:016x}" if key[1] < 0 else f"{key[0]:016x}_{key[1]}"
        if epoch is not None:
            return f"{self._root}/{STALE}/{name}.{epoch}{SUFFIX}"
        return f"{self._root}/{key[0] & 0xFF:02x}/{name}{SUFFIX}"

    def load(self, key: ShardKey, epoch: int | None = None) -> Saved | None:
        """What is noted of the shard, if anything is."""
        try:
            with open(self._path(key, epoch), "rb") as file:
                raw = file.read()
        except OSError:
            return None
        if len(raw) < _HEAD.size + _CHECK.size:
            return None
        magic, generation, oid, index, size, modified_ns = _HEAD.unpack_from(raw)
        (check,) = _CHECK.unpack_from(raw, _HEAD.size)
        body = memoryview(raw)[_HEAD.size + _CHECK.size :]
        if (magic, generation, oid, index) != (_MAGIC, self.generation, key[0], key[1]) or len(body) % 4:
            return None
        if check != _check(raw[: _HEAD.size], body):
            return None
        sums = array("I")
        sums.frombytes(body)
        return Saved(size, sums, modified_ns)

    def save(self, key: ShardKey, what: Saved, epoch: int | None = None) -> bool:
        """Says whether it worked: without room for checksums there are none."""
        head = _HEAD.pack(_MAGIC, self.generation, key[0], key[1], what.size_bytes, what.modified_ns)
        body = memoryview(what.sums)
        raw = b"".join((head, _CHECK.pack(_check(head, body)), body))
        path = self._path(key, epoch)
        try:
            if not self._has_room():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            try:
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o660)
            except FileNotFoundError:
                os.makedirs(os.path.dirname(path), 0o770, exist_ok=True)
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o660)
            try:
                whole = os.write(fd, raw) == len(raw)
            finally:
                os.close(fd)
        except OSError as error:
            if not self._failing:
                logger.warning("checksums cannot be written to %s: %s", path, error.strerror)
            self._failing = True
            return False
        self._failing = False
        return whole

    def _has_room(self) -> bool:
        status = os.statvfs(self._root)
        return status.f_bavail * status.f_frsize >= min(ROOM_BYTES, status.f_blocks * status.f_frsize // 10) and (
            not status.f_files or status.f_favail >= min(ROOM_FILES, status.f_files // 10)
        )

    def drop(self, key: ShardKey, epoch: int | None = None) -> None:
        """The shard is about to change.

        :raises StoreError: the file cannot be removed; the shard must not be changed.
        """
        path = self._path(key, epoch)
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):
            return
        except OSError as error:
            raise _trouble(error, f"{path} cannot be removed") from error
        self._note(path)

    def move(self, key: ShardKey, source: int | None, target: int | None) -> None:
        """The shard is set aside, or comes back (``None`` is live); what was noted under the new name goes.

        :raises StoreError: the file cannot be renamed; the shard must stay what it is.
        """
        old, new = self._path(key, source), self._path(key, target)
        try:
            try:
                os.rename(old, new)
            except FileNotFoundError:
                if not os.path.exists(old):
                    self.drop(key, target)
                    return
                os.makedirs(os.path.dirname(new), 0o770, exist_ok=True)
                os.rename(old, new)
        except OSError as error:
            raise _trouble(error, f"{old} cannot be renamed") from error
        self._note(old, new)

    def drop_stale(self) -> None:
        """Nothing that was set aside is left."""
        directory = os.path.join(self._root, STALE)
        with suppress(OSError):
            for name in os.listdir(directory):
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(directory, name))

    def flush(self) -> None:
        """Whatever was dropped so far does not come back after power loss. Cheap if there is nothing to do.

        :raises StoreError: that cannot be promised.
        """
        if not self._unflushed and not self._flushing.locked():
            return
        with self._flushing:  # who comes while another one flushes what concerns both waits for that
            with self._noting:
                directories, self._unflushed = self._unflushed, set()
            for directory in sorted(directories):
                try:
                    sync_directory(directory)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    with self._noting:
                        self._unflushed |= directories
                    raise _trouble(error, f"{directory} cannot be flushed") from error

    def _note(self, *paths: str) -> None:
        if self.durable:
            with self._noting:
                self._unflushed.update(map(os.path.dirname, paths))


def _identity(status: os.stat_result) -> list[int]:
    return [status.st_ino, status.st_mtime_ns, status.st_size]


def _age(identity: list[int]) -> int:
    """When a config file was written, in seconds: what programs that copy files keep."""
    return identity[1] // 1_000_000_000 if len(identity) == 3 else 0


def _trouble(error: OSError, what: str) -> StoreError:
    text = f"{what}: {error.strerror}"
    if error.errno in _BUSY:
        return StoreBusy(text)
    return StoreFull(text) if error.errno in _FULL else StoreDeviceError(text)


def _check(head: bytes, body: memoryview) -> int:
    return xxh3_64_intdigest(body, xxh3_64_intdigest(head))


def _boot_id() -> str:
    try:
        with open(BOOT_ID, encoding="ascii") as file:
            return file.read().strip()
    except OSError:  # every start counts as one after a power loss
        return secrets.token_hex(16)
