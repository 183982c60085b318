"""Files that remember what was flushed: what a power loss would leave of a directory, at any moment.

While ``LossyFiles`` is installed, the calls of ``os`` that the file store and the journal make are noted for everything
below one directory. Two things survive a power loss: the bytes of a file that ``fsync``, ``fdatasync`` or a write with
``O_DSYNC`` put there, and the names of a directory that was flushed. ``image`` copies the directory as it might be
found afterwards: each name as it was flushed or as it is now, each 512 bytes of a file likewise, by chance; of a file
that was never flushed nothing is sure, not even its length.

Names that were exchanged survive together or not at all, and in the order of the exchanges: file systems keep their own
changes in order. The copies are other files and have other numbers; ``file_id`` tells those of what they are copies of.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from sheepdog.builtin import filestore_io as io

SECTOR = 512
CALLS = ("open", "close", "pwrite", "pwritev", "rename", "unlink", "link", "fsync", "fdatasync")


class Content:
    """One file, by whatever names."""

    def __init__(self, number):
        self.number = number
        self.safe = None  # the bytes that were flushed; None: it never was


class LossyFiles:
    """Notes what happens below ``base``, where everything must be made while it is installed."""

    def __init__(self, base, monkeypatch, limit):
        """:param limit: bytes at the beginning of an object file that matter; journals and checksums do as a whole."""
        self.base = str(base)
        self._limit = limit
        self._lock = threading.RLock()
        self._open = {}  # descriptor -> (path, flags, content or None for a directory)
        self._now = {}  # path -> content
        self._safe = {}  # directory -> {name: content} that was flushed
        self._exchanges = []  # pairs of paths, since a directory of theirs was flushed
        self._numbers = {}  # of files in images, by device and real number
        self._real = {name: getattr(os, name) for name in CALLS}
        self._real_exchange = io.exchange
        for name in CALLS:
            monkeypatch.setattr(os, name, getattr(self, f"on_{name}"))
        monkeypatch.setattr(io, "exchange", self.on_exchange)

    # ---- the calls

    def on_open(self, path, flags, *rest, **more):
        if not isinstance(path, str) or not path.startswith(self.base):
            return self._real["open"](path, flags, *rest, **more)
        with self._lock:
            new = not os.path.lexists(path)
            fd = self._real["open"](path, flags & ~os.O_DSYNC, *rest, **more)  # noted, but not done: see ``_flush``
            if os.path.isdir(path):
                self._open[fd] = (path, flags, None)
            else:
                if new:
                    self._now[path] = Content(os.fstat(fd).st_ino)
                self._open[fd] = (path, flags, self._now[path])
            return fd

    def on_close(self, fd):
        with self._lock:
            self._open.pop(fd, None)
            self._real["close"](fd)

    def on_pwrite(self, fd, data, offset):
        with self._lock:
            written = self._real["pwrite"](fd, data, offset)
            self._stable(fd, bytes(memoryview(data)[:written]), offset)
            return written

    def on_pwritev(self, fd, buffers, offset, *flags):
        with self._lock:
            written = self._real["pwritev"](fd, buffers, offset, *flags)
            self._stable(fd, b"".join(buffers)[:written], offset)
            return written

    def _stable(self, fd, data, offset):
        path, flags, content = self._open.get(fd, ("", 0, None))
        if content is None or not flags & os.O_DSYNC:
            return
        if content.safe is None:
            content.safe = bytearray()
        limit = self._length(path)
        if offset < limit:
            data = data[: limit - offset]
            content.safe.extend(bytes(max(0, offset + len(data) - len(content.safe))))
            content.safe[offset : offset + len(data)] = data

    def on_fsync(self, fd):
        self._flush(fd, self._real["fsync"])

    def on_fdatasync(self, fd):
        self._flush(fd, self._real["fdatasync"])

    def _flush(self, fd, real):
        """What counts as flushed is what was there at the call.

        It is looked at and noted in one step: of two flushes at once, the one that looked first must not be noted last.
        """
        with self._lock:
            path, _, content = self._open.get(fd, ("", 0, None))
            if path and content is None:
                self._safe[path] = self._names(path)
                self._exchanges_flushed(path)
            elif path:
                content.safe = bytearray(self._read(f"/proc/self/fd/{fd}", self._length(path)))
        if not path:  # for the others not really: this machine keeps its power
            real(fd)

    def on_rename(self, source, target):
        with self._lock:
            self._real["rename"](source, target)
            if source in self._now:
                self._now[target] = self._now.pop(source)

    def on_unlink(self, path, *rest, **more):
        with self._lock:
            self._real["unlink"](path, *rest, **more)
            self._now.pop(path, None)

    def on_link(self, source, target):
        with self._lock:
            self._real["link"](source, target)
            if source in self._now:
                self._now[target] = self._now[source]

    def on_exchange(self, one, other):
        with self._lock:
            done = self._real_exchange(one, other)
            if done:
                self._now[one], self._now[other] = self._now[other], self._now[one]
                self._exchanges.append((one, other))
            return done

    def _exchanges_flushed(self, directory):
        """All of them, if one is in that directory."""
        paths = {path for pair in self._exchanges for path in pair}
        if directory in map(os.path.dirname, paths):
            for path in paths & self._now.keys():
                self._safe.setdefault(os.path.dirname(path), {})[os.path.basename(path)] = self._now[path]
            self._exchanges.clear()

    # ---- the loss

    def file_id(self, path):
        """As ``filestore_io.file_id``, in images too."""
        status = os.stat(path)
        return self._numbers.get((status.st_dev, status.st_ino), status.st_ino)

    def _length(self, path):
        return 1 << 30 if any(name in path for name in ("/journal_file", "/strip_log", "/sums/")) else self._limit

    def _names(self, directory):
        paths = {name: f"{directory}/{name}" for name in os.listdir(directory)}
        return {name: self._now[path] for name, path in paths.items() if path in self._now}

    def _read(self, path, length):
        with open(path, "rb") as file:
            return file.read(length)

    def image(self, target, dice):
        """``target`` is a new directory with what a power loss at this moment leaves."""
        with self._lock:
            paths = {path for pair in self._exchanges for path in pair}
            exchanged = {path: self._safe.get(os.path.dirname(path), {}).get(os.path.basename(path)) for path in paths}
            for one, other in self._exchanges[: dice.randrange(len(self._exchanges) + 1)]:
                exchanged[one], exchanged[other] = exchanged[other], exchanged[one]
            for directory, _, _ in os.walk(self.base):
                into = Path(str(target) + directory[len(self.base) :])
                into.mkdir(parents=True)
                safe = self._safe.get(directory, {})
                now = self._names(directory)
                for name in sorted(safe.keys() | now.keys()):
                    content = safe.get(name)
                    path = f"{directory}/{name}"
                    if path in exchanged:
                        content = exchanged[path]
                    elif content is not now.get(name) and dice.random() < 0.5:
                        content = now.get(name)
                    if content is not None:
                        here = path if content is now.get(name) else None
                        (into / name).write_bytes(self._left(content, here, dice))
                        status = os.stat(into / name)
                        self._numbers[status.st_dev, status.st_ino] = content.number

    def _left(self, content, path, dice):
        if path is None:
            path = next((path for path, other in self._now.items() if other is content), None)
        safe = content.safe
        now = None if path is None else self._read(path, self._length(path))
        if safe is None:
            now = now or b""
            safe = bytes(len(now)) if dice.random() < 0.7 else b""
        if now is None or safe == now:
            return bytes(safe)
        left = bytearray(dice.choice((safe, now)))
        for at in range(0, min(len(safe), len(now)), SECTOR):
            left[at : at + SECTOR] = dice.choice((safe, now))[at : at + SECTOR]
        return bytes(left)
