"""What the scenarios share: clients, patterns, and looking at what is stored where."""

from __future__ import annotations

import os
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sheepdog.client import admin
from sheepdog.client.volume import Inode, ObjectWriteError, Piece, Volume, find_vdi, open_vdi, read_object, split
from sheepdog.errors import SheepdogError
from sheepdog.model.ids import data_oid, inode_oid, is_attribute, is_data, is_inode, is_ledger
from sheepdog.model.inode import HEADER_BYTES, InodeHeader
from sheepdog.testing.cluster import SheepCluster, wait_until
from sheepdog.wire.results import Result

KiB = 1024
MiB = 1024 * KiB


def most_may_die(start: Callable[..., SheepCluster]) -> Callable[..., SheepCluster]:
    """``start`` for scenes in which most of the sheep die: in cells of the matrix with Raft these run on the local
    driver, because the few that are left serve nobody under Raft."""

    def started(*arguments: Any, **options: Any) -> SheepCluster:  # Any: handed on to SheepCluster
        if os.environ.get("SHEEPDOG_TEST_CLUSTER") == "raft":
            options.setdefault("driver", "local")
        return start(*arguments, **options)

    return started


def pattern(seed: int, length: int) -> bytes:
    """Bytes that no other seed gives, without a period that a misplaced block could hide behind."""
    return random.Random(seed).randbytes(length)


@contextmanager
def volume(
    cluster: SheepCluster, name: str, *, node: int = 0, tag: str = "", snap_id: int = 0, answer_s: float = 60.0
) -> Iterator[Volume]:
    """The vdi or snapshot, opened through one gateway, which may be silent for ``answer_s``."""
    with cluster.connect(node, timeout_s=answer_s) as connection:
        yield Volume.open(connection.request, name.encode(), tag=tag.encode(), snap_id=snap_id)


def read(
    cluster: SheepCluster, name: str, offset: int, length: int, *, node: int = 0, tag: str = "", snap_id: int = 0
) -> bytes:
    """A range of a vdi or snapshot."""
    with volume(cluster, name, node=node, tag=tag, snap_id=snap_id) as opened:
        return opened.read(offset, length)


def read_all(cluster: SheepCluster, name: str, *, node: int = 0, tag: str = "", snap_id: int = 0) -> bytes:
    """The whole content."""
    with volume(cluster, name, node=node, tag=tag, snap_id=snap_id) as opened:
        return opened.read(0, opened.size)


def write(cluster: SheepCluster, name: str, offset: int, data: bytes, *, node: int = 0) -> None:
    """The range of the working vdi has the data."""
    with volume(cluster, name, node=node) as opened:
        opened.write(offset, data)


def vid_of_name(cluster: SheepCluster, name: str, *, tag: str = "", snap_id: int = 0) -> int:
    """The vid behind a name."""
    with cluster.connect(cluster.live[0].index) as connection:
        return find_vdi(connection.request, name.encode(), tag=tag.encode(), snap_id=snap_id).vid


class LiveClient:
    """A client that keeps its vdi open as QEMU does.

    Told that its vid became a snapshot, it looks the name up again and goes on with the map it has.
    """

    def __init__(self, cluster: SheepCluster, name: str, *, node: int = 0, answer_s: float = 60.0) -> None:
        self._name = name.encode()
        self._connection = cluster.connect(node, timeout_s=answer_s)
        try:
            self._volume = Volume(open_vdi(self._connection.request, self._name))
        except BaseException:
            self._connection.close()
            raise
        self.reloads = 0

    def write(self, offset: int, data: bytes) -> None:
        done = 0
        for piece in split(offset, len(data), self._volume.inode.object_bytes):
            self._write_piece(piece, data[done : done + piece.length])
            done += piece.length

    def _write_piece(self, piece: Piece, data: bytes) -> None:
        while True:
            try:
                self._volume.write_piece(piece, data)
                return
            except ObjectWriteError as error:
                if error.result != Result.READONLY:
                    raise
            self._reload()

    def _reload(self) -> None:
        self.reloads += 1
        call = self._connection.request
        vid = find_vdi(call, self._name).vid
        header = read_object(call, inode_oid(vid), HEADER_BYTES)
        buffer = self._volume.inode.buffer
        buffer[:HEADER_BYTES] = header
        self._volume = Volume(Inode(call, buffer))

    def read(self, offset: int, length: int) -> bytes:
        return self._volume.read(offset, length)

    def close(self) -> None:
        self._connection.close()

    def __enter__(self) -> LiveClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Background:
    """A function that runs in a thread until it is told to stop; what it raised is raised again at the end."""

    def __init__(self, step: Callable[[int], None]) -> None:
        self.steps = 0
        self._step = step
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._step(self.steps)
                self.steps += 1
        except BaseException as error:
            self._error = error

    def __enter__(self) -> Background:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(90)
        assert not self._thread.is_alive(), f"step {self.steps} hangs"
        if self._error is not None:
            raise self._error

    def wait(self, steps: int, *, timeout_s: float = 60.0) -> None:
        """So many more steps are done."""
        target = self.steps + steps
        wait_until(lambda: self.steps >= target or self._error is not None, f"{steps} more steps", timeout_s=timeout_s)


# ---- what is stored


def live_inodes(cluster: SheepCluster) -> list[Inode]:
    """All vdis and snapshots that are not deleted."""
    with cluster.connect(cluster.live[0].index) as connection:
        call = connection.request
        inodes = [Inode.read(call, vid) for vid in admin.used_vids(call)]
    return [inode for inode in inodes if inode.header.name]


def referenced(inodes: Iterable[Inode]) -> set[int]:
    """The data objects that these inodes name."""
    return {data_oid(vid, index) for inode in inodes for index, vid in inode.map.items() if vid}


def stored(cluster: SheepCluster, kind: Callable[[int], bool] = is_data) -> Counter[int]:
    """Objects of a kind -> number of copies or strips on disk."""
    found: Counter[int] = Counter()
    for (oid, _), holders in cluster.census().items():
        if kind(oid):
            found[oid] += len(holders)
    return found


def kinds(cluster: SheepCluster) -> dict[str, int]:
    """How many different objects of each kind are on disk."""
    return {
        "data": len(stored(cluster)),
        "inode": len(stored(cluster, is_inode)),
        "ledger": len(stored(cluster, is_ledger)),
        "attribute": len(stored(cluster, is_attribute)),
    }


def only(vids: Iterable[int]) -> Callable[[int], bool]:
    """Data objects of these vids, for clusters with volumes of other tests."""
    known = set(vids)
    return lambda oid: is_data(oid) and (oid >> 32 & 0xFFFFFF) in known


def wait_stored(cluster: SheepCluster, wanted: Mapping[int, int], kind: Callable[[int], bool] = is_data) -> None:
    """The objects of that kind on disk are exactly these, with so many copies. Dropping references is asynchronous."""
    try:
        wait_until(lambda: stored(cluster, kind) == Counter(wanted), "the objects on disk")
    except AssertionError as error:
        have = stored(cluster, kind)
        lacking = {f"{oid:016x}": count for oid, count in wanted.items() if have[oid] != count}
        surplus = {f"{oid:016x}": count for oid, count in have.items() if oid not in wanted}
        error.add_note(f"lacking (or wrong number of copies): {lacking}, surplus: {surplus}")
        raise


# ---- what dog prints


def rows(cluster: SheepCluster, *words: str, node: int | None = None) -> list[list[str]]:
    """The rows of ``dog vdi list -r``: flag, name, id, size, used, shared, ctime, vid, copies, tag, shift.

    Backslashes stay; blanks inside names do not separate.
    """
    text = cluster.dog("vdi", "list", "-r", *words, node=node).stdout.decode("utf-8", "surrogateescape")
    return [re.split(r"(?<!\\) ", line) for line in text.splitlines()]


def wait_serving(cluster: SheepCluster, node: int) -> None:
    """The sheep answers lookups."""

    def serves() -> bool:
        try:
            with cluster.connect(node) as connection:
                admin.used_vids(connection.request)
        except (SheepdogError, OSError):
            return False
        return True

    wait_until(serves, f"sheep {node} to serve")


def header_of(cluster: SheepCluster, name: str, **which: str) -> InodeHeader:
    """The inode header of a vdi or snapshot."""
    with volume(cluster, name, **which) as opened:
        return opened.inode.header
