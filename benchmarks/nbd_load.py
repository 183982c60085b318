"""Loads an NBD export (or a plain file) with the clients that people use: qemu-img bench and fio.

python benchmarks/nbd_load.py nbd://127.0.0.1:10809/disk --op write --block 4k --depth 16 --seconds 3
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass

KiB, MiB, GiB = 1024, 1024**2, 1024**3
PATIENCE_S = 30.0  # beyond the time that a load was asked to take


class LoadError(Exception):
    """The client is missing, failed, or did not end in time."""


@dataclass
class Report:
    tool: str
    op: str
    pattern: str
    block: int
    depth: int
    requests: int
    seconds: float
    per_second: float
    mb_per_second: float  # 10^6 bytes
    p50_ms: float | None = None
    p99_ms: float | None = None


def _run(command: list[str], timeout_s: float) -> str:
    if shutil.which(command[0]) is None:
        raise LoadError(f"{command[0]} is not installed")
    try:
        with tempfile.TemporaryDirectory() as scratch:  # fio leaves files where it runs
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=scratch, check=False)
    except subprocess.TimeoutExpired:
        raise LoadError(f"{command[0]} did not end within {timeout_s:.0f} s") from None
    if done.returncode:
        raise LoadError(f"{command[0]}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def qemu_bench(target: str, op: str, block: int, depth: int, seconds: float) -> Report:
    """Sequential requests by ``qemu-img bench``. It counts requests, so a short run finds out how many fit."""

    def bench(count: int) -> float:
        command = ["qemu-img", "bench", "-f", "raw", "-c", str(count), "-d", str(depth), "-s", str(block)]
        command += (["-w"] if op == "write" else []) + ["-t", "writeback", target]
        output = _run(command, seconds * 4 + PATIENCE_S)
        match = re.search(r"Run completed in ([\d.]+) seconds", output)
        if match is None:
            raise LoadError(f"qemu-img bench said: {output.strip()}")
        return max(float(match[1]), 0.001)

    trial = max(depth * 4, 64 if block < MiB else 8)
    count = trial
    taken = bench(count)
    while taken < seconds / 4 and count < 50_000_000:
        count = min(int(count * min(seconds / taken, 50)), 50_000_000)
        taken = bench(count)
    return Report(
        "qemu-img", op, "sequential", block, depth, count, round(taken, 3), round(count / taken, 1),
        round(count * block / taken / 1e6, 2),
    )  # fmt: skip


def fio(target: str, op: str, pattern: str, block: int, depth: int, seconds: float, size: int) -> Report:
    """``fio`` with its nbd engine, or its psync/io_uring engines on a file."""
    if "://" in target:
        engine = ["--ioengine=nbd", f"--uri={target}"]
    else:
        engine = ["--ioengine=psync" if depth == 1 else "--ioengine=io_uring", f"--filename={target}"]
    kind = ("rand" if pattern == "random" else "") + op
    command = [
        "fio", "--name=load", *engine, f"--rw={kind}", f"--bs={block}", f"--iodepth={depth}", f"--size={size}",
        f"--runtime={seconds}s", "--time_based", "--output-format=json", "--randrepeat=1", "--norandommap",
    ]  # fmt: skip
    output = _run(command, seconds * 2 + PATIENCE_S)
    job = json.loads(output[output.index("{") :])["jobs"][0]
    if job["error"]:
        raise LoadError(f"fio ended with error {job['error']}")
    side = job[op]
    latency = side["clat_ns"].get("percentile", {})
    return Report(
        "fio", op, pattern, block, depth, side["total_ios"], round(side["runtime"] / 1000, 3), round(side["iops"], 1),
        round(side["bw_bytes"] / 1e6, 2), _milliseconds(latency, "50.000000"), _milliseconds(latency, "99.000000"),
    )  # fmt: skip


def _milliseconds(latency: dict[str, int], key: str) -> float | None:
    return round(latency[key] / 1e6, 3) if key in latency else None


def parse_size(text: str) -> int:
    """'4k', '256M', '1G' or plain bytes."""
    factor = {"k": KiB, "m": MiB, "g": GiB}.get(text[-1:].lower(), 1)
    return int(text if factor == 1 else text[:-1]) * factor


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="load an NBD export with qemu-img bench and fio")
    parser.add_argument("target", help="nbd://host:port/export, nbd+unix:///export?socket=path, or a file")
    parser.add_argument("--tool", choices=("qemu-img", "fio", "both"), default="both")
    parser.add_argument("--op", choices=("read", "write"), default="write")
    parser.add_argument("--pattern", choices=("random", "sequential"), default="random", help="for fio")
    parser.add_argument("--block", type=parse_size, default=4 * KiB)
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--size", type=parse_size, default=256 * MiB, help="for fio: how much of the target is used")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    reports = []
    try:
        if chosen.tool != "fio":
            reports.append(qemu_bench(chosen.target, chosen.op, chosen.block, chosen.depth, chosen.seconds))
        if chosen.tool != "qemu-img":
            reports.append(
                fio(
                    chosen.target, chosen.op, chosen.pattern, chosen.block, chosen.depth, chosen.seconds, chosen.size
                )
            )  # fmt: skip
    except LoadError as error:
        print(f"nbd_load: {error}", file=sys.stderr)
        return 1
    if chosen.json:
        print(json.dumps([asdict(report) for report in reports]))
        return 0
    for report in reports:
        latency = "" if report.p50_ms is None else f", p50 {report.p50_ms} p99 {report.p99_ms} ms"
        print(
            f"{report.tool} {report.op} {report.pattern} block {report.block} depth {report.depth}: "
            f"{report.per_second:.0f}/s {report.mb_per_second:.1f} MB/s{latency}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
