"""What an acknowledgement that survives power loss costs: real sheep without ``-n``, beside a local file.

One run measures everything, because a shared disk's flush takes another time at another hour: a local file under the
same rule (each 4 KiB write flushed, and ``depth`` writes sharing one flush), then clusters on this machine with three
copies and with 4:2, each with and without the write journal. All sheep share one disk here, so a write flushes three
(or six) times on it; on machines of their own these flushes run side by side. Last, encoding and decoding on one
core.

    python benchmarks/durable.py --seconds 3
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
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


def cluster_rows(name: str, count: int, redundancy: str, options: tuple[str, ...], seconds: float) -> list[Row]:
    """The loads against one cluster whose sheep flush."""
    rows = []
    with SheepCluster(
        count, driver="local", store="plain", redundancy=redundancy, sync=True, options=options
    ) as cluster:
        cluster.format()
        loads = [("random", 4 * KiB, depth) for depth in DEPTHS] + [("sequential", LARGE, LARGE_DEPTH)]
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


def compare(made: list[Row], before: list[Row]) -> None:
    """The new rows know what the local file did under the same load: of large writes, which it makes one at a time."""
    local = {(row.what, row.depth): row for row in before if row.target == LOCAL}
    for row in made:
        same = local.get((row.what, row.depth)) or local.get((row.what, 1))
        if row.target != LOCAL and same is not None:
            row.of_local = round(row.per_second / same.per_second, 3)


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
            lambda: cluster_rows("3 copies", 3, "3", (), chosen.seconds),
            lambda: cluster_rows("3 copies, journal", 3, "3", JOURNAL, chosen.seconds),
        ],
        "strips": [
            lambda: cluster_rows("4:2", 6, "4:2", (), chosen.seconds),
            lambda: cluster_rows("4:2, journal", 6, "4:2", JOURNAL, chosen.seconds),
        ],
        "coding": [partial(coding, policy, chosen.seconds) for policy in ("2:1", "4:2", "8:3")],
    }
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as directory:
        for depth in DEPTHS:
            parts["local"].append(partial(local_rows, Path(directory), 4 * KiB, depth, chosen.seconds))
        parts["local"].append(partial(local_rows, Path(directory), LARGE, 1, chosen.seconds))
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
    print(
        f"{row.target:20} {row.what:22} depth {row.depth:3} {row.per_second:8.0f}/s {row.mb_per_second:9.1f} MB/s  "
        f"{latency}{ratio}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
