"""The object store contract (sync).

Core calls a store from the event loop for what the page cache can answer, and from worker threads for the rest.
The caller runs one mutator per key at a time; different keys run concurrently. Buffers are lent: copy what must outlive
the call. A store keeps no file of an object open between calls.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from sheepdog.contracts.incoming import Gathered, Incoming
from sheepdog.model.node import NodeId

Buffer: TypeAlias = bytes | bytearray | memoryview
REPLICA = -1  # ShardKey.index of a whole copy


class ShardKey(NamedTuple):
    """Names one stored shard: a whole copy (index ``REPLICA``) or erasure-coded strip ``index`` (0-based)."""

    oid: int
    index: int = REPLICA  # type: ignore[assignment]  # hides tuple.index(), which means nothing for a key


class Usage(NamedTuple):
    """Bytes of a store or of one disk. ``weight_bytes`` is the size that was recorded when the disk was first used."""

    used_bytes: int
    free_bytes: int
    weight_bytes: int


@dataclass(frozen=True, slots=True)
class DiskInfo:
    """One disk directory of a store, in path order."""

    path: str
    usage: Usage


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What ``sheep`` tells a store plugin.

    ``disks`` are absolute directories that exist; ``direct_io`` asks for O_DIRECT where offset and length allow.
    ``replacing`` says that everything on the disks will be wiped: otherwise a store that sees objects of another one
    there, which it would never find, refuses them by a ``ConfigError`` before it changes anything.
    ``node`` is given where vnodes belong to disks: an object then has its place on the disk whose vnode of this node
    comes first after it (``DiskRing``), so that a disk that goes takes no more than its own share with it.
    """

    disks: tuple[str, ...]
    direct_io: bool = False
    replacing: bool = False
    node: NodeId | None = None


class Verified(NamedTuple):
    """What ``ObjectStore.verify`` looked at: so many bytes, and whether each of them had a checksum."""

    count: int  # type: ignore[assignment]  # hides tuple.count(), which means nothing here
    complete: bool


class Staged(NamedTuple):
    """A new content of a whole shard that lies ready beside it.

    ``new`` and ``old`` name it and what was live when it was staged; a store that is opened later knows the same names.
    """

    key: ShardKey
    new: int
    old: int


class ObjectStore(ABC):
    """Holds the shards of one sheep.

    Errors common to all methods: ``StoreDeviceError`` (a disk is failing; some bytes may have been written),
    ``StoreBusy`` (transient). Whatever reads contents may raise ``ShardCorrupt``, if the store can tell.

    A store need not know about checksums: core keeps them for every store (``daemon/checksums.py``). One that has its
    own overrides the methods of the section on checksums.
    """

    @property
    def flushes_apart(self) -> bool:
        """Whether several threads with a part of the shards each make them durable sooner than one ``sync`` of all."""
        return True

    @abstractmethod
    def create(
        self, key: ShardKey, data: Buffer, *, offset_bytes: int, size_bytes: int, sparse: bool, durable: bool
    ) -> None:
        """The shard exists with ``size_bytes`` bytes: ``data`` at ``offset_bytes``, else zeros. Replaces an old one.

        Atomic: a crash leaves the old shard (or none) or the new one, never a part.

        :param data: 0 bytes or more; offset + len(data) <= size_bytes.
        :param sparse: zeros need not take space (inodes, ledgers); otherwise space is reserved where the disk can.
        :param durable: on return the shard survives power loss.
        :raises StoreFull: nothing changed.
        """

    def receive(self, key: ShardKey, size_bytes: int, *, sparse: bool) -> Incoming:
        """A shard that comes in pieces; nothing of it is there before it is finished. Quick: waits for no disk.

        A store overrides it to write pieces down as they come. :param sparse: as for ``create``.
        """
        return Gathered(self, key, size_bytes, sparse=sparse)

    @abstractmethod
    def write(self, key: ShardKey, data: Buffer, *, offset_bytes: int, durable: bool) -> None:
        """Replaces bytes of an existing shard in place.

        :raises ObjectNotFound: no live shard under this key.
        :raises StoreFull: nothing was written.
        """

    @abstractmethod
    def read_into(self, key: ShardKey, buffer: memoryview, *, offset_bytes: int) -> int:
        """Fills ``buffer`` from the live shard; returns the count read, short only at the end of the shard.

        :raises ObjectNotFound: no live shard under this key.
        """

    def try_read_into(self, key: ShardKey, buffer: memoryview, *, offset_bytes: int) -> int | None:
        """As ``read_into`` if that needs no disk access, else ``None``. Called on the event loop: must never block."""
        return None

    @abstractmethod
    def remove(self, key: ShardKey) -> None:
        """The live shard is gone. That this survives power loss is for ``sync``.

        :raises ObjectNotFound: there was none.
        """

    @abstractmethod
    def exists(self, key: ShardKey) -> bool:
        """Whether a live shard is there. Looks at the medium, not at a cache of names."""

    @abstractmethod
    def size(self, key: ShardKey) -> int:
        """Bytes of the live shard.

        :raises ObjectNotFound: there is none.
        """

    @abstractmethod
    def keys(self) -> Iterator[ShardKey]:
        """Every live shard, in ascending order of (oid, index)."""

    @abstractmethod
    def stale_keys(self) -> Iterator[tuple[ShardKey, int]]:
        """Every (shard, epoch) in the stale area, in ascending order."""

    @abstractmethod
    def digest(self, key: ShardKey, *, epoch: int | None = None, cache: bool = False) -> bytes:
        """SHA-1 (20 bytes) of the live shard, or of the stale version of ``epoch``.

        :param cache: the object is read-only now, so the digest may be remembered beside it.
        :raises ObjectNotFound: there is none.
        """

    @abstractmethod
    def retire(self, key: ShardKey, epoch: int) -> None:
        """The live shard is moved to the stale area under ``epoch``, replacing an older one of the same name.

        :raises ObjectNotFound: no live shard.
        """

    @abstractmethod
    def revive(self, key: ShardKey, epoch: int) -> None:
        """The stale version of ``epoch`` is live again (and still in the stale area). A live shard wins.

        :raises ObjectNotFound: no such stale version.
        """

    @abstractmethod
    def read_stale_into(self, key: ShardKey, epoch: int, buffer: memoryview, *, offset_bytes: int) -> int:
        """As ``read_into`` for the stale version of ``epoch``."""

    @abstractmethod
    def stale_size(self, key: ShardKey, epoch: int) -> int:
        """Bytes of the stale version of ``epoch``."""

    @abstractmethod
    def purge_stale(self) -> None:
        """The stale area is empty."""

    @abstractmethod
    def wipe(self) -> None:
        """No shard is left, live or stale (format)."""

    @abstractmethod
    def sync(self, keys: Iterable[ShardKey]) -> None:
        """Everything written to these keys so far survives power loss, with one flush each at most (group commit).

        Of keys that were removed the absence survives.
        """

    @abstractmethod
    def usage(self) -> Usage:
        """Sums over all disks. Measures, which can take a while: not for the event loop."""

    @abstractmethod
    def disks(self) -> tuple[DiskInfo, ...]:
        """The disks in use, in path order. A store without disks of its own reports one with its path.

        Never fails for a failing disk: that one is listed with nothing used and nothing free.
        """

    def weights(self) -> dict[str, int]:
        """The recorded size in bytes of each disk in use, in path order.

        Asked on the event loop when a disk came or went; a store whose ``disks`` measures overrides it.
        """
        return {disk.path: disk.usage.weight_bytes for disk in self.disks()}

    def add_disk(self, path: str) -> None:
        """A new, emptied directory takes its share of the objects from now on.

        :raises StoreError: unusable, or in use already; nothing changed.
        """
        from sheepdog.errors import StoreError

        raise StoreError(f"this store cannot take another disk: {path}")

    def remove_disk(self, path: str) -> None:
        """The disk is not used any more. Its objects are not moved; recovery brings them back from other nodes.

        :raises StoreError: not one of ours; nothing changed.
        """
        from sheepdog.errors import StoreError

        raise StoreError(f"this store has no disk {path}")

    def reweigh(self) -> Usage:
        """The recorded weights are measured again; returns the new usage."""
        return self.usage()

    # ---- whole contents that take each other's place

    def stage(self, key: ShardKey, data: Buffer, *, durable: bool) -> Staged | None:
        """``data`` lies ready to be the whole content of the live shard, which is as it was.

        ``None``: it has to be written in place here, because the store cannot do this, has no space for it, or the live
        shard has another size or is missing.

        :param durable: on return it survives power loss, also its name.
        """
        return None

    def unstage(self, staged: Staged) -> None:
        """Nobody wants it any more. Also where it was used or given up already."""

    def exchange(self, staged: Staged) -> None:
        """What was staged is live, and what was live is kept until it is released. A mutator, quick; not durable.

        Atomic, also when the power fails: the one or the other, until ``sync`` of the shard makes it sure.

        :raises ObjectNotFound: no live shard under this key.
        :raises StoreBusy: the shard was replaced since; what was staged is given up.
        """
        raise AssertionError(f"{staged} was not staged here")

    def put_back(self, key: ShardKey, old: int, *, durable: bool) -> bool:
        """What an exchange replaced is live again, if it is not already; False when it is not kept here. A mutator.

        :raises ObjectNotFound: no live shard under this key.
        """
        return False

    def release(self, versions: Iterable[tuple[ShardKey, int]] | None = None) -> None:
        """Contents that exchanges replaced (``old``) are not asked for any more: these, or all."""

    def finish_exchanges(self, exchanges: Sequence[Staged], kept: Iterable[tuple[ShardKey, int]]) -> list[ShardKey]:
        """The exchanges are made, after a crash that may have come before or after; which shards were touched.

        Before the store is used for anything else. Those whose new content is not found were made, and the shard has
        become another one since.

        :param exchanges: the last one of each shard, in their order.
        :param kept: what may be put back later.
        """
        return []

    # ---- checksums

    def verify(self, key: ShardKey, *, offset_bytes: int, length_bytes: int) -> Verified:
        """The bytes of the live shard are those that were stored, as far as the store has checksums of them.

        The count is short only at the end of the shard. Reads from the medium only what it has checksums of.

        :raises ShardCorrupt: they are not.
        :raises ObjectNotFound: no live shard under this key.
        """
        return Verified(max(0, min(length_bytes, self.size(key) - offset_bytes)), False)

    def stored_digest(self, key: ShardKey) -> bytes:
        """SHA-1 (20 bytes) of what lies on the medium now, be it right or not; nothing remembered is believed."""
        return self.digest(key)

    def accept(self, key: ShardKey, digest: bytes) -> bool:
        """If the live shard has this SHA-1 it is right, and checksums are made of it; says whether it has.

        A mutator. The caller has compared the shard with other holders'.

        :raises ObjectNotFound: no live shard under this key.
        """
        return self.stored_digest(key) == digest

    def vouched(self, key: ShardKey, *, offset_bytes: int, length_bytes: int, epoch: int | None = None) -> bool:
        """Whether checksums tell what was stored in this range of the live shard, or of the stale version of ``epoch``.

        It was read just now; the question itself reads nothing.
        """
        return False

    def known(self, key: ShardKey) -> bool:
        """Whether the store has checksums of the live shard; a store that never has any says yes. May block."""
        return True

    def doubt(self, key: ShardKey) -> None:
        """What was just stored came from where nobody vouches for it: no checksums are made of it. A mutator."""

    def modified_ns(self, key: ShardKey, *, epoch: int | None = None) -> int | None:
        """When the bytes of the live shard, or of the stale version of ``epoch``, were changed last, by whomever.

        In nanoseconds since 1970, on the clock of the medium; ``None`` if the store cannot tell. It stays the same when
        the shard is set aside, comes back or is moved, and when the store is opened again.

        :raises ObjectNotFound: there is none.
        """
        return None

    def ready(self, key: ShardKey) -> bool:
        """Whether a small change of the live shard that need not be durable yet would wait for no disk.

        Asked on the event loop, which makes such changes itself; others go to a worker thread. The answer counts for
        this moment only and promises nothing.
        """
        return True

    def try_write(self, key: ShardKey, data: Buffer, *, offset_bytes: int) -> bool:
        """As ``write``, not durable, if that waits for no disk; else nothing has happened, and the answer is false.

        Called on the event loop for every small write. A store overrides it to save the two calls.
        """
        if not self.ready(key):
            return False
        self.write(key, data, offset_bytes=offset_bytes, durable=False)
        return True

    def upkeep(self) -> None:
        """Called every half minute from a worker thread: time to write down what was only in memory."""

    def close(self) -> None:
        """Nothing is used after this; whatever was written is handed to the operating system."""
