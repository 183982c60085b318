"""What erasure coding costs: encoding and decoding on one core, and reads with and without all strips.

Coding is measured for every coder that works here (ISA-L, zfec, plain Python), as CPU time, on objects of 4 MiB: a
whole ``split`` of an object into strips and a whole ``join`` of it with as many strips lost as there is parity. The
reference of the same run is a copy of the object in memory. Reads are those of a real cluster of six sheep with 4:2,
first with everything there, then with two sheep killed and recovery switched off, so that a third of what is read is
computed; the reference is a file of this machine.

    python benchmarks/erasure.py --seconds 2
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import wire_load  # noqa: E402  # found by the line above: this is a script and no package

from sheepdog.model.policy import CopyPolicy  # noqa: E402  # as above
from sheepdog.testing.cluster import SheepCluster  # noqa: E402  # as above
from sheepdog_redundancy_ec.coders import CODERS, CoderUnavailable, make_coder  # noqa: E402  # as above
from sheepdog_redundancy_ec.scheme import ErasureFactory  # noqa: E402  # as above

KiB, MiB = 1024, 1024**2
OBJECT = 4 * MiB
POLICIES = ("2:1", "4:2", "8:3", "16:4")
VOLUME_BYTES = 64 * MiB
READS = ((4 * KiB, 16), (4 * MiB, 4))


@dataclass
class Row:
    """One measured load."""

    target: str
    what: str
    mb_per_second: float
    ratio: float  # to the reference of the same kind in the same run


def rate(work: Callable[[], object], size: int, seconds: float, clock: Callable[[], float]) -> float:
    """MB (10^6 bytes) per second of ``clock``."""
    count = 0
    started = clock()
    while (spent := clock() - started) < seconds or not count:
        work()
        count += 1
    return count * size / spent / 1e6


def coding_rows(seconds: float) -> Iterator[Row]:
    """Every coder and policy, beside a copy in memory."""
    data = random.Random(2).randbytes(OBJECT)
    target = bytearray(OBJECT)

    def copy() -> None:
        target[:] = data

    reference = rate(copy, OBJECT, seconds, time.process_time)
    yield Row("memory", "copy 4 MiB", round(reference), 1.0)
    for name in CODERS:
        try:
            coder = make_coder(name)
        except CoderUnavailable as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        for policy in POLICIES:
            parsed = CopyPolicy.parse(policy)
            scheme = ErasureFactory(coder).scheme(parsed.policy, parsed.copies)
            strips = {write.index: write.data for write in scheme.split(data, offset_bytes=0)}
            lost = scheme.shards - scheme.shards_to_read
            plan = scheme.plan_read(0, OBJECT, list(range(lost, scheme.shards)))
            assert plan is not None, "as many strips are left as are needed"
            parts = {part: strips[part.index] for part in plan}
            join = partial(scheme.join, parts, offset_bytes=0, length_bytes=OBJECT)
            assert bytes(join()) == data
            for what, work in (
                ("encode", partial(scheme.split, data, offset_bytes=0)),
                (f"decode, {lost} lost", join),
            ):
                found = rate(work, OBJECT, seconds, time.process_time)
                yield Row(f"{name} {policy}", what, round(found), round(found / reference, 3))


def read_rows(seconds: float) -> Iterator[Row]:
    """Reads of a file, of a whole cluster, and of one that lacks two sheep of six."""
    references = {}
    with tempfile.NamedTemporaryFile() as file:
        file.write(random.Random(3).randbytes(VOLUME_BYTES))
        file.flush()
        dice = random.Random(4)
        for block, _ in READS:
            work = partial(_read_somewhere, file.fileno(), dice, block)
            references[block] = rate(work, block, seconds, time.perf_counter)
            yield Row("local file", f"read {_text(block)}", round(references[block], 1), 1.0)
    with SheepCluster(6, driver="local", store="plain", redundancy="4:2") as cluster:
        cluster.format()
        load = partial(wire_load.Options, cluster.address(), vdi="bench", size=VOLUME_BYTES)
        wire_load.run_on_loop(load(op="write", pattern="sequential", block=4 * MiB, depth=4, count=16))
        for state in ("all strips", "two sheep gone"):
            if state != "all strips":
                cluster.dog("cluster", "recover", "disable")
                for index in (4, 5):
                    cluster.sheep[index].end(signal.SIGKILL)
                    cluster.wait_members()
            for block, depth in READS:
                report = wire_load.run_on_loop(
                    load(op="read", pattern="random", block=block, depth=depth, seconds=seconds)
                )
                ratio = report.mb_per_second / references[block]
                yield Row(f"4:2, {state}", f"read {_text(block)}", report.mb_per_second, round(ratio, 3))


def _read_somewhere(descriptor: int, dice: random.Random, block: int) -> None:
    os.pread(descriptor, block, dice.randrange(VOLUME_BYTES // block) * block)


def _text(block: int) -> str:
    return f"{block // KiB} KiB" if block < MiB else f"{block // MiB} MiB"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="what erasure coding costs")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load")
    parser.add_argument("--only", choices=("coding", "reads"), help="one part of it")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    rows = []
    for name, part in (("coding", coding_rows), ("reads", read_rows)):
        if chosen.only in (None, name):
            for row in part(chosen.seconds):
                rows.append(row)
                if not chosen.json:
                    line = (
                        f"{row.target:22} {row.what:18} {row.mb_per_second:10.1f} MB/s   {row.ratio:6.3f} of reference"
                    )
                    print(line, flush=True)
    if chosen.json:
        print(json.dumps([asdict(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
