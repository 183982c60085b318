"""What an acknowledgement that survives power loss costs: real sheep without ``-n``, beside a local file.

One run measures everything, because a shared disk's flush takes another time at another hour: a local file under the
same rule (each 4 KiB write flushed, and ``depth`` writes sharing one flush), then clusters on this machine with three
copies and with 4:2, each with and without the write journal, and for large writes without flushes (``-n``). All sheep
share one disk here, so a write flushes three (or six) times on it; on machines of their own these flushes run side by
side. Last, encoding and decoding on one core.

What sharing flushes gains is said against *one flush for each write*, measured twice: with the same sheep and the same
depth, but every write opened with ``O_DSYNC`` as the original does (``SINGLY`` below), and without any sheep, a loop
that writes each block to three files and flushes them one after the other.

    python benchmarks/durable.py --seconds 3
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import wire_load  # noqa: E402  # found by the line above: this is a script and no package

from sheepdog.testing.cluster import SheepCluster  # noqa: E402  # as above

KiB, MiB = 1024, 1024**2
DEPTHS = (1, 16, 64)
VOLUME_BYTES = 64 * MiB
LARGE = 4 * MiB
LARGE_DEPTH = 4
LOCAL = "local file"
JOURNAL = ("-j", "size=256M")
FRESH_OBJECTS = 48
COPIES = 3
COPIES_NAME = f"{COPIES} copies"
COPIES_SINGLY = f"{COPIES_NAME}, one flush each"
ONE_EACH = f"{COPIES} files, a flush each"
# Read by the interpreters of the sheep: no write is small enough for the group commit, nor for the log.
SINGLY = """
import sheepdog.daemon.shards as shards, sheepdog.daemon.strip_store as log
shards.INLINE_BYTES_MAX = 0
log.REDO_BYTES_MAX = log.COPY_BYTES_MAX = -1
"""


@dataclass
class Row:
    """One measured load."""

    target: str
    what: str
    depth: int
    per_second: float
    mb_per_second: float
    p50_ms: float | None = None
    p99_ms: float | None = None
    of_local: float | None = None  # ratio to the local file under the same load in this run
    of_singly: float | None = None  # ratio to the same sheep with one flush for each write
    of_one_each: float | None = None  # ratio to the loop that flushes three files for each write


def size_name(block: int) -> str:
    """What a load is called."""
    return f"write {block // KiB} KiB" if block < MiB else f"write {block // MiB} MiB"


def local_rows(directory: Path, block: int, depth: int, seconds: float) -> list[Row]:
    """Random writes to a file that exists, one flush for every ``depth`` of them: group commit at its best."""
    path = directory / "local"
    dice = random.Random(1)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        for at in range(0, VOLUME_BYTES, MiB):
            os.pwrite(descriptor, bytes(MiB), at)
        os.fsync(descriptor)
        data = dice.randbytes(block)
        times: list[float] = []
        count = 0
        started = now = time.perf_counter()
        while now - started < seconds:
            for _ in range(depth):
                os.pwrite(descriptor, data, dice.randrange(VOLUME_BYTES // block) * block)
            os.fdatasync(descriptor)
            count += depth
            before, now = now, time.perf_counter()
            times.append((now - before) * 1000)
    finally:
        os.close(descriptor)
        path.unlink()
    times.sort()
    rate = count / (now - started)
    row = Row(
        LOCAL, size_name(block), depth, round(rate), round(rate * block / 1e6, 1),
        round(times[len(times) // 2], 2), round(times[int(len(times) * 0.99)], 2),
    )  # fmt: skip
    return [row]


def one_each_row(directory: Path, seconds: float) -> list[Row]:
    """Each block goes to three files, and each of them is flushed before the next block: what a write costs alone."""
    paths = [directory / f"copy{number}" for number in range(COPIES)]
    dice = random.Random(1)
    files = [os.open(path, os.O_RDWR | os.O_CREAT) for path in paths]
    try:
        for file in files:
            for at in range(0, VOLUME_BYTES, MiB):
                os.pwrite(file, bytes(MiB), at)
            os.fsync(file)
        data = dice.randbytes(4 * KiB)
        count = 0
        started = time.perf_counter()
        while (spent := time.perf_counter() - started) < seconds:
            place = dice.randrange(VOLUME_BYTES // len(data)) * len(data)
            for file in files:
                os.pwrite(file, data, place)
                os.fdatasync(file)
            count += 1
    finally:
        for file, path in zip(files, paths, strict=True):
            os.close(file)
            path.unlink()
    rate = count / spent
    return [Row(ONE_EACH, size_name(4 * KiB), 1, round(rate), round(rate * 4 * KiB / 1e6, 1))]


async def write_fresh(address: str) -> float:
    """New objects of a new volume, one after the other as a guest does; their rate, map entries included."""
    connection = await wire_load.connect(address)
    try:
        target = await wire_load.open_volume(connection, "fresh", FRESH_OBJECTS * LARGE)
        data = random.Random(3).randbytes(LARGE)
        left = iter(range(FRESH_OBJECTS))

        async def write() -> None:
            for index in left:
                oid, number = target.vid << 32 | index, 10 + index
                create = wire_load.object_request(
                    wire_load.CREATE_AND_WRITE_OBJ, wire_load.WRITE, number, LARGE, oid, 0, target.copies
                )
                entry = wire_load.object_request(
                    wire_load.WRITE_OBJ, wire_load.WRITE, number, 4, wire_load.INODE_BIT | target.vid << 32,
                    wire_load.MAP_OFFSET + 4 * index, target.copies,
                )  # fmt: skip
                for request, body in ((create, data), (entry, struct.pack("<I", target.vid))):
                    result, _, _ = await connection.call(number, request, body)
                    if result:
                        raise wire_load.LoadError(f"object {index}: result {result:#x}")

        started = time.perf_counter()
        await asyncio.gather(*(write() for _ in range(LARGE_DEPTH)))
        return FRESH_OBJECTS / (time.perf_counter() - started)
    finally:
        connection.transport.abort()


def cluster_rows(
    name: str,
    redundancy: str,
    seconds: float,
    *,
    options: tuple[str, ...] = (),
    sync: bool = True,
    singly: bool = False,
) -> list[Row]:
    """The loads against one cluster.

    :param sync: its sheep flush; otherwise there are only large writes.
    :param singly: each write is flushed for itself.
    """
    rows = []
    count = COPIES if redundancy == str(COPIES) else sum(map(int, redundancy.split(":")))
    small = [("random", 4 * KiB, depth) for depth in DEPTHS] if sync else []
    loads = small if singly else [*small, ("sequential", LARGE, LARGE_DEPTH)]
    with (
        flushing_singly() if singly else nullcontext(),
        SheepCluster(
            count, driver="local", store="plain", redundancy=redundancy, sync=sync, options=options
        ) as cluster,
    ):
        cluster.format()
        if not singly:
            rate = asyncio.run(write_fresh(cluster.address()))
            rows.append(Row(name, f"new {LARGE // MiB} MiB", LARGE_DEPTH, round(rate), round(rate * LARGE / 1e6, 1)))
        for pattern, block, depth in loads:
            report = wire_load.run_on_loop(
                wire_load.Options(
                    cluster.address(),
                    vdi="bench",
                    pattern=pattern,
                    block=block,
                    depth=depth,
                    size=VOLUME_BYTES,
                    seconds=seconds,
                )
            )
            rows.append(
                Row(
                    name,
                    size_name(block),
                    depth,
                    round(report.per_second),
                    report.mb_per_second,
                    report.p50_ms,
                    report.p99_ms,
                )
            )
    return rows


@contextmanager
def flushing_singly() -> Iterator[None]:
    """Sheep that are started meanwhile flush each write for itself."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "sitecustomize.py").write_text(SINGLY)
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = directory if before is None else f"{directory}{os.pathsep}{before}"
        try:
            yield
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before


def compare(made: list[Row], before: list[Row]) -> None:
    """The new rows know what the local file did under the same load: of large writes, which it makes one at a time.

    Rows of small writes to three copies also know what one flush for each write gave.
    """
    known = {(row.target, row.what, row.depth): row for row in before}
    for row in made:
        if row.target in (LOCAL, ONE_EACH):
            continue
        same = known.get((LOCAL, row.what, row.depth)) or known.get((LOCAL, row.what, 1))
        if same is not None:
            row.of_local = round(row.per_second / same.per_second, 3)
        singly = known.get((COPIES_SINGLY, row.what, row.depth))
        if singly is not None and row.target.startswith(COPIES_NAME):
            row.of_singly = round(row.per_second / singly.per_second, 2)
        one_each = known.get((ONE_EACH, row.what, 1))  # not with --only
        if one_each is not None and row.target.startswith(COPIES_NAME):
            row.of_one_each = round(row.per_second / one_each.per_second, 2)


def coding(policy: str, seconds: float) -> list[Row]:
    """Encoding, and decoding with all parity in use, of 4 MiB objects on one core."""
    from sheepdog.model.policy import CopyPolicy
    from sheepdog_redundancy_ec import sheepdog_redundancy

    parsed = CopyPolicy.parse(policy)
    scheme = sheepdog_redundancy().scheme(parsed.policy, parsed.copies)
    data = random.Random(2).randbytes(LARGE)
    strips = {write.index: write.data for write in scheme.split(data, offset_bytes=0)}
    lost = scheme.shards - scheme.shards_to_read
    left = list(range(lost, scheme.shards))
    plan = scheme.plan_read(0, LARGE, left)
    assert plan is not None, "as many strips are left as are needed"
    parts = {part: strips[part.index] for part in plan}
    assert bytes(scheme.join(parts, offset_bytes=0, length_bytes=LARGE)) == data

    def measure(what: str, work: Callable[[], object]) -> Row:
        count = 0
        started = time.process_time()
        while (spent := time.process_time() - started) < seconds:
            work()
            count += 1
        return Row(f"{policy} on one core", what, 1, round(count / spent), round(count * LARGE / spent / 1e6))

    return [
        measure("encode 4 MiB", lambda: scheme.split(data, offset_bytes=0)),
        measure(f"decode 4 MiB, {lost} lost", lambda: scheme.join(parts, offset_bytes=0, length_bytes=LARGE)),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="what durable writes cost")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load")
    parser.add_argument("--only", choices=("local", "copies", "strips", "coding"), help="one part of it")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    parts: dict[str, list[Callable[[], list[Row]]]] = {
        "local": [],
        "copies": [
            lambda: cluster_rows(COPIES_SINGLY, str(COPIES), chosen.seconds, singly=True),
            lambda: cluster_rows(COPIES_NAME, str(COPIES), chosen.seconds),
            lambda: cluster_rows(f"{COPIES_NAME}, journal", str(COPIES), chosen.seconds, options=JOURNAL),
            lambda: cluster_rows(f"{COPIES_NAME}, -n", str(COPIES), chosen.seconds, sync=False),
        ],
        "strips": [
            lambda: cluster_rows("4:2", "4:2", chosen.seconds),
            lambda: cluster_rows("4:2, journal", "4:2", chosen.seconds, options=JOURNAL),
            lambda: cluster_rows("4:2, -n", "4:2", chosen.seconds, sync=False),
        ],
        "coding": [partial(coding, policy, chosen.seconds) for policy in ("2:1", "4:2", "8:3")],
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        for depth in DEPTHS:
            parts["local"].append(partial(local_rows, Path(directory), 4 * KiB, depth, chosen.seconds))
        parts["local"].append(partial(local_rows, Path(directory), LARGE, 1, chosen.seconds))
        parts["local"].append(partial(one_each_row, Path(directory), chosen.seconds))
        for name, loads in parts.items():
            if chosen.only in (None, name):
                for load in loads:
                    made = load()
                    compare(made, rows)
                    rows += made
                    if not chosen.json:
                        for row in made:
                            _print(row)
    if chosen.json:
        print(json.dumps([asdict(row) for row in rows]))
    return 0


def _print(row: Row) -> None:
    latency = "" if row.p50_ms is None else f"p50 {row.p50_ms:8.2f} ms  p99 {row.p99_ms:8.2f} ms"
    ratio = "" if row.of_local is None else f"  of local {row.of_local:.2f}"
    if row.of_singly is not None:
        ratio += f"  of one flush each {row.of_singly:.2f}"
    if row.of_one_each is not None:
        ratio += f", of three files {row.of_one_each:.2f}"
    print(
        f"{row.target:24} {row.what:22} depth {row.depth:3} {row.per_second:8.0f}/s {row.mb_per_second:9.1f} MB/s  "
        f"{latency}{ratio}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
