"""Real object stores on disks that forget, with the power, what was not flushed.

A ``ForgetfulStore`` stands in front of a store and keeps, of every shard that has changes which were not flushed, what
was flushed last. An image of the disk after a power loss is a copy of its directory in which each sector that is not
safe has the old or the new content, by chance.
"""

from __future__ import annotations

import shutil
import threading
from contextlib import ExitStack

from sheepdog.contracts.incoming import Gathered
from sheepdog.contracts.store import StoreOptions
from sheepdog.daemon.journal import Journal
from sheepdog.daemon.journal_files import JOURNAL, STRIPS, Left, file_paths, replay
from sheepdog.daemon.journaled_store import JournaledStore
from sheepdog.daemon.strip_store import StripLog, StripStore
from sheepdog.errors import ObjectNotFound
from sheepdog_store_plain import sheepdog_object_store as plain_store
from sheepdog_store_tree import sheepdog_object_store as tree_store

SECTOR = 512
LOOKED_AT = 16 * 1024  # of each shard; the tests change nothing behind
STORES = {"plain": plain_store, "tree": tree_store}
JOURNAL_BYTES = 4 << 20


def content(store, key):
    """The begin of a shard; ``None`` if there is none."""
    buffer = bytearray(LOOKED_AT)
    try:
        count = store.read_into(key, memoryview(buffer), offset_bytes=0)
    except ObjectNotFound:
        return None
    return bytes(buffer[:count])


class ForgetfulStore:
    """A store, and what of it is safe. Everything that is not here goes to the store itself."""

    def __init__(self, inner):
        self.inner = inner
        self.lock = threading.RLock()
        self.safe = {}  # of shards with changes that are not flushed

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def _changed(self, key, durable):
        if not durable:
            self.safe.setdefault(key, content(self.inner, key))

    def create(self, key, data, *, durable, **how):
        with self.lock:
            self._changed(key, durable)
            self.inner.create(key, data, durable=durable, **how)
            if durable:
                self.safe.pop(key, None)

    def receive(self, key, size_bytes, *, sparse):
        return Gathered(self, key, size_bytes, sparse=sparse)

    def write(self, key, data, *, offset_bytes, durable):
        with self.lock:
            self._changed(key, durable)
            self.inner.write(key, data, offset_bytes=offset_bytes, durable=durable)
            if durable:
                self.safe.pop(key, None)

    def remove(self, key):
        with self.lock:
            self._changed(key, False)
            self.inner.remove(key)

    def sync(self, keys):
        with self.lock:
            keys = list(keys)
            self.inner.sync(keys)
            for key in keys:
                self.safe.pop(key, None)

    def forget(self, image, dice):
        """``image``, a store on a copy of the disk, has lost what a power loss may lose."""
        for key, safe in sorted(self.safe.items()):
            now = content(self.inner, key)
            if safe is None or now is None:
                kept = dice.choice((safe, now))
                if kept is not None and safe is None and dice.random() < 0.5:
                    kept = bytes(len(kept))  # a name that came through by luck says nothing about the bytes
                if kept is None and now is not None:
                    image.remove(key)
                elif kept is not None:
                    image.create(
                        key, kept, offset_bytes=0, size_bytes=max(len(kept), 2 << 20), sparse=False, durable=True
                    )
                continue
            for at in range(0, len(now), SECTOR):
                if dice.random() < 0.5:
                    image.write(key, safe[at : at + SECTOR], offset_bytes=at, durable=True)


class Machines:
    """Disks, journals and logs of all sheep."""

    def __init__(self, base, count, *, kind="plain", journal=False, logged=True):
        """
        :param kind: of the stores.
        :param journal: as with ``-j``.
        :param logged: without a journal, changes of strips are logged.
        """
        self.base = base
        self.count = count
        self.kind = kind
        self.journal = journal
        self.logged = logged
        self.stores = {}
        self.ends = []
        self.images = 0

    def directory(self, number):
        return self.base / f"node{number}"

    def make_store(self, number):
        """The store of one machine as its sheep opens it; what a former run left is in it."""
        directory = self.directory(number)
        disk = directory / "obj"
        disk.mkdir(parents=True, exist_ok=True)
        store = ForgetfulStore(STORES[self.kind](StoreOptions((str(disk),))))
        self.stores[number] = store
        if self.journal:
            left = Left()
            replay(str(directory), store, block_size_shift=22, left=left)
            made = Journal(str(directory), JOURNAL_BYTES, left=left)
            self.ends.append(lambda: made.close(remove=True))
            return JournaledStore(store, made)
        if not self.logged:
            return store
        log = StripLog(str(directory), synced=True, size_bytes=JOURNAL_BYTES)
        log.replay(store, block_size_shift=22)
        log.begin()
        self.ends.append(lambda: log.made is None or log.made.close(remove=True))
        return StripStore(store, log)

    def image(self, dice):
        """All machines as they are after a power loss at this moment."""
        self.images += 1
        base = self.base / f"image{self.images}"
        made = Machines(base, self.count, kind=self.kind, journal=self.journal, logged=self.logged)
        with ExitStack() as held:
            for store in self.stores.values():
                held.enter_context(store.lock)
            for number, store in self.stores.items():
                # What leaves a journal has been flushed before; the lock keeps everything else away.
                made.directory(number).mkdir(parents=True)
                for name in (JOURNAL, STRIPS):
                    for path in map(type(base), file_paths(str(self.directory(number)), name)):
                        if path.exists():
                            shutil.copyfile(path, made.directory(number) / path.name)
                disk = made.directory(number) / "obj"
                shutil.copytree(self.directory(number) / "obj", disk, ignore=shutil.ignore_patterns("*.tmp"))
                store.forget(STORES[self.kind](StoreOptions((str(disk),))), dice)
        return made

    def lose(self, number):
        """The disk of one machine is gone with all that was on it; there is an empty one in its place."""
        shutil.rmtree(self.directory(number))

    def close(self):
        for end in self.ends:
            end()
        self.ends = []
