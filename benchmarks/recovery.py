"""How fast copies come back, and what clients notice of it: real sheep, beside a plain copy of files in the same run.

Four sheep on one disk, three copies of everything, a volume filled with random data. Measured are

* a plain copy of as many bytes in files of the same size, one after the other, which is the best that the disk and the
  kernel give here (flushed file by file with ``--sync``, as the sheep then do),
* *death*: one sheep is gone, the three others make its copies again among themselves,
* *join*: it comes back with an empty directory, the three others fill it,
* the latency of 4 KiB writes and reads, one at a time, through a sheep that lives on: idle, and during both, from the
  beginning of the recovery to its end.

Bytes are those of the objects that appeared on the disks. Recovery is switched off while the membership changes; the
time runs from switching it on until every sheep says that nothing is left to recover.

Before each measurement of a rate as much memory is touched and given back as it will fill. The host of a virtual
machine may have taken free memory back, and provides it again page by page when it is next used: new pages of the page
cache then cost eight times as much as otherwise on the machine of the CI, whoever fills them. ::

    python benchmarks/recovery.py --size 1024
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import wire_load  # noqa: E402  # found by the line above: this is a script and no package

from sheepdog.client import admin  # noqa: E402  # as above
from sheepdog.client.connection import Connection  # noqa: E402  # as above
from sheepdog.testing.cluster import SheepCluster  # noqa: E402  # as above
from sheepdog.wire.opcodes import Op  # noqa: E402  # as above

KiB, MiB = 1024, 1024**2
NODES, COPIES = 4, 3
VICTIM = NODES - 1
OBJECT_BYTES = 4 * MiB
LOAD_OBJECTS = 8
POLL_S = 0.02
SETTLE_S = 0.5  # between two measurements, for what the one before left to do


@dataclass
class Row:
    """One measurement."""

    what: str
    seconds: float
    mb: float | None = None
    mb_per_second: float | None = None
    mb_per_second_each: float | None = None  # of each sheep that receives
    of_copy: float | None = None  # the rate, as a part of the plain copy's
    per_second: float | None = None
    p50_ms: float | None = None
    p99_ms: float | None = None
    max_ms: float | None = None
    requests: int | None = None
    of_idle: float | None = None  # the p99, as a multiple of the idle one


def copy_row(directory: Path, count: int, *, sync: bool) -> Row:
    """A plain copy of ``count`` files of one object each."""
    source, target = directory / "source", directory / "target"
    source.mkdir()
    target.mkdir()
    for number in range(count):
        (source / str(number)).write_bytes(os.urandom(OBJECT_BYTES))
    warm(directory, count * OBJECT_BYTES)
    begun = time.perf_counter()
    for number in range(count):
        path = shutil.copyfile(source / str(number), target / str(number))
        if sync:
            with path.open("rb") as file:
                os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    shutil.rmtree(source)
    shutil.rmtree(target)
    return _moved("plain copy", count * OBJECT_BYTES, seconds, 1)


def warm(directory: Path, size: int) -> None:
    """So much memory has been part of the page cache and is free."""
    paths = [directory / f"warm{number}" for number in range(-(-size // OBJECT_BYTES))]
    for path in paths:
        path.write_bytes(bytes(OBJECT_BYTES))
    for path in paths:
        path.unlink()


def _moved(what: str, amount: int, seconds: float, receivers: int) -> Row:
    rate = amount / seconds / 1e6
    return Row(what, round(seconds, 3), round(amount / 1e6, 1), round(rate, 1), round(rate / receivers, 1))


def stored_bytes(cluster: SheepCluster, index: int) -> int:
    """Of all live data objects of one sheep."""
    objects = cluster.sheep[index].directory / "obj"
    return sum(path.stat().st_size for path in objects.glob("00*") if path.is_file())


class Bench:
    """A cluster with data in it, and what is done to it."""

    def __init__(self, cluster: SheepCluster, size: int, seconds: float) -> None:
        self.cluster = cluster
        self.size = size
        cluster.format()
        cluster.dog("vdi", "create", "data", str(size))
        slice_bytes = 64 * MiB
        for at in range(0, size, slice_bytes):
            amount = min(slice_bytes, size - at)
            cluster.dog("vdi", "write", "data", str(at), str(amount), input=os.urandom(amount), node=0)
        self.load("write", 0.2)  # makes the volume of the load
        self.idle = {op: self.load(op, seconds) for op in ("write", "read")}

    def load(self, op: str, seconds: float, until: Callable[[], bool] | None = None) -> wire_load.Report:
        """4 KiB requests, one at a time, through the first sheep."""
        return wire_load.run_on_loop(
            wire_load.Options(
                self.cluster.address(0), op=op, depth=1, size=LOAD_OBJECTS * OBJECT_BYTES, seconds=seconds, until=until
            )
        )

    def recover(self, what: str, change: Callable[[], None], op: str = "", seconds: float = 0.0) -> list[Row]:
        """The membership has changed, and everything has its copies again.

        :param op: a load of this kind runs meanwhile, at most for so many seconds.
        """
        cluster = self.cluster
        self._switch(False)
        change()
        cluster.wait_members()
        time.sleep(SETTLE_S)
        live = [sheep.index for sheep in cluster.live]
        before = {index: stored_bytes(cluster, index) for index in live}
        reports: list[wire_load.Report] = []
        links = [cluster.connect(index, timeout_s=60.0) for index in live]
        warm(cluster.base, self.size)
        begin = time.perf_counter()
        self._switch(True)
        over = threading.Event()
        thread = threading.Thread(target=lambda: reports.append(self.load(op, seconds, over.is_set)))
        if op:
            thread.start()
        while any(self._recovers(link) for link in links):
            time.sleep(POLL_S)
        took = time.perf_counter() - begin
        over.set()
        for link in links:
            link.close()
        if op:
            thread.join()
        gained = [stored_bytes(cluster, index) - before[index] for index in live]
        time.sleep(SETTLE_S)
        moved = _moved(what, sum(gained), took, max(1, sum(1 for amount in gained if amount > 0)))
        return [moved, *(latency(f"{what} of 4 KiB", report, self.idle[op]) for report in reports)]

    def _switch(self, on: bool) -> None:
        with self.cluster.connect(0) as connection:
            admin.expect(connection.request(Op.ENABLE_RECOVER if on else Op.DISABLE_RECOVER))

    def _recovers(self, link: Connection) -> bool:
        response = admin.expect(link.request(admin.OP_STAT_RECOVERY, data_length=24))
        return admin.unpack_recovery_state(response.body).in_recovery

    def die(self) -> None:
        """One sheep is gone."""
        self.cluster.kill(VICTIM)

    def join(self) -> None:
        """It is back, empty."""
        shutil.rmtree(self.cluster.sheep[VICTIM].directory)
        self.cluster.restart(VICTIM)


def latency(what: str, report: wire_load.Report, idle: wire_load.Report | None = None) -> Row:
    """As a row."""
    ratio = None if idle is None else round(report.p99_ms / idle.p99_ms, 2)
    return Row(
        what,
        report.seconds,
        per_second=report.per_second,
        p50_ms=report.p50_ms,
        p99_ms=report.p99_ms,
        max_ms=report.max_ms,
        requests=report.requests,
        of_idle=ratio,
    )


def measure(size: int, *, sync: bool, seconds: float, ops: Sequence[str]) -> Iterator[Row]:
    """All rows, in the order in which they were measured."""
    with tempfile.TemporaryDirectory() as directory:
        plain = copy_row(Path(directory), size * COPIES // NODES // OBJECT_BYTES, sync=sync)
    with SheepCluster(NODES, driver="local", store="plain", redundancy=str(COPIES), sync=sync) as cluster:
        bench = Bench(cluster, size, seconds)

        def changes(during: str, op: str = "") -> Iterator[Row]:
            for what, change in (("death", bench.die), ("join", bench.join)):
                rows = bench.recover(f"{what}{during}", change, op, seconds)
                assert rows[0].mb_per_second is not None and plain.mb_per_second is not None, "rates were measured"
                rows[0].of_copy = round(rows[0].mb_per_second / plain.mb_per_second, 2)
                yield from rows

        plain.of_copy = 1.0
        yield plain
        yield from (latency(f"idle: {op}s of 4 KiB", report) for op, report in bench.idle.items())
        yield from changes("")
        for op in ops:
            yield from changes(f", {op}s", op)


def show(row: Row) -> None:
    """One line."""
    if row.mb is not None:
        print(
            f"{row.what:28} {row.mb:8.0f} MB in {row.seconds:6.2f} s: {row.mb_per_second:7.0f} MB/s, "
            f"{row.mb_per_second_each:7.0f} MB/s each, {row.of_copy:.2f} of the copy",
            flush=True,
        )
    else:
        compared = "" if row.of_idle is None else f", {row.of_idle:.1f} times the idle one"
        print(
            f"{row.what:28} {row.per_second:8.0f}/s  p50 {row.p50_ms:7.2f} ms  p99 {row.p99_ms:7.2f} ms{compared}"
            f"; of {row.requests} the longest {row.max_ms:.1f} ms",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="the rate of recovery, and latencies meanwhile")
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the volume (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each load, at most (default: %(default)s)")
    parser.add_argument("--sync", action="store_true", help="everything is flushed, as without sheep -n")
    parser.add_argument("--op", choices=("write", "read"), action="append", help="of clients (default: both)")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    rows = measure(chosen.size * MiB, sync=chosen.sync, seconds=chosen.seconds, ops=chosen.op or ("write", "read"))
    if chosen.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        for row in rows:
            show(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
