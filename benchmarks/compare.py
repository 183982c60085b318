"""Three real sheep on this machine, loaded over the wire protocol and over NBD, beside local references.

One run measures everything, because wall-clock figures of a shared machine say little across runs: the cluster (three
copies, page-cache writes, ``sheep -n``), then nbdkit in memory, nbdkit on a file and the plain file. The figures of the
original in C were taken with three sheep and three copies as well, on a machine of this size at another time.

    python benchmarks/compare.py --seconds 3

Every step has a time limit; nothing is left behind but the report.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks import nbd_load  # noqa: E402  # found by the line above: this is a script and no package

KiB, MiB = 1024, 1024**2
START_S = 20.0
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")

# (op, block, depth) -> (requests per second, None) or (None, 10^6 bytes per second) of the original in C.
ORIGINAL: dict[tuple[str, int, int], tuple[float | None, float | None]] = {
    ("write", 4 * KiB, 1): (3100, None),
    ("write", 4 * KiB, 16): (3200, None),
    ("read", 4 * KiB, 1): (7300, None),
    ("read", 4 * KiB, 16): (7000, None),
    ("write", 4 * MiB, 4): (None, 98),
    ("read", 4 * MiB, 4): (None, 794),
}


@dataclass
class Row:
    """One measured load."""

    target: str
    tool: str
    op: str
    pattern: str
    block: int
    depth: int
    per_second: float
    mb_per_second: float
    p50_ms: float | None = None
    p99_ms: float | None = None
    server_cpu_us: float | None = None  # of all sheep together, for each request
    original: float | None = None  # in the unit that the comparison uses
    ratio: float | None = None  # to the original in C


@dataclass
class Outcome:
    machine: dict[str, Any] = field(default_factory=dict)  # Any: numbers and texts for the report
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def program(name: str) -> str:
    """The command beside this interpreter, else the one on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else name


class Cluster:
    """Real sheep in a temporary directory."""

    def __init__(self, directory: Path, count: int, extra: list[str], nbd: bool) -> None:
        self.directory = directory
        self.ports = [free_port() for _ in range(count)]
        self.nbd_socket = directory / "nbd.sock" if nbd else None
        self.extra = extra
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, copies: int) -> None:
        """The cluster is formatted and serves.

        :raises RuntimeError: a sheep did not start; the message has the end of its log.
        """
        for zone, port in enumerate(self.ports):
            base = self.directory / f"sheep{zone}"
            base.mkdir()
            command = [
                program("sheep"), "-f", "-n", "-c", f"local:{self.directory}/cluster", "-b", "127.0.0.1",
                "-y", "127.0.0.1", "-p", str(port), "-z", str(zone), *self.extra,
            ]  # fmt: skip
            if zone == 0 and self.nbd_socket is not None:
                command += ["--nbd", f"unix:{self.nbd_socket}"]
            output = open(base / "output", "wb")  # noqa: SIM115  # the process owns it from now on
            with output:
                self.processes.append(
                    subprocess.Popen([*command, str(base)], stdout=output, stderr=output, start_new_session=True)
                )
            self._wait(lambda port=port: self._answers(port), f"sheep on port {port}")
        self._wait(lambda: self._node_count() == len(self.ports), "all sheep to join")
        self.dog("cluster", "format", "-c", str(copies))

    def dog(self, *words: str) -> str:
        command = [program("dog"), *words, "-a", "127.0.0.1", "-p", str(self.ports[0])]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}{self._logs()}")
        return done.stdout

    def cpu_s(self) -> float:
        """Processor time of all sheep so far."""
        total = 0
        for process in self.processes:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            total += int(fields[11]) + int(fields[12])
        return total / CLOCK_TICKS

    def stop(self) -> None:
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        for process in self.processes:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _answers(self, port: int) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", port), 1):
                return True
        except OSError:
            return False

    def _node_count(self) -> int:
        try:
            return len(self.dog("node", "list", "-r").splitlines())
        except RuntimeError:
            return 0

    def _wait(self, condition: Any, what: str) -> None:  # Any: a function without arguments
        deadline = time.monotonic() + START_S
        while not condition():
            dead = [process for process in self.processes if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise RuntimeError(f"{'a sheep ended' if dead else 'timeout'} waiting for {what}{self._logs()}")
            time.sleep(0.05)

    def _logs(self) -> str:
        text = ""
        for path in sorted(self.directory.glob("sheep*/*")):
            if path.name in ("output", "sheep.log") and path.stat().st_size:
                text += f"\n--- {path}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-15:])
        return text


class Bench:
    def __init__(self, seconds: float, size: int, copies: int) -> None:
        self.seconds = seconds
        self.size = size
        self.copies = copies
        self.outcome = Outcome(
            machine={"cpus": os.cpu_count(), "python": sys.version.split()[0], "load_before": os.getloadavg()[0]}
        )

    def problem(self, text: str) -> None:
        self.outcome.problems.append(text)
        print(f"compare: {text}", file=sys.stderr)

    def wire(self, cluster: Cluster, op: str, block: int, depth: int) -> None:
        """One load over the wire protocol, from a process of its own."""
        command = [
            sys.executable, str(HERE / "wire_load.py"), "--address", f"127.0.0.1:{cluster.ports[0]}",
            "--vdi", f"wire{block}", "--op", op, "--block", str(block), "--depth", str(depth),
            "--size", str(self.size), "--seconds", str(self.seconds), "--json",
        ]  # fmt: skip
        # Creating the objects must not count: a first request makes them.
        try:
            subprocess.run([*command, "--count", "1"], capture_output=True, timeout=120, check=False)
            cpu_before = cluster.cpu_s()
            done = subprocess.run(command, capture_output=True, text=True, timeout=self.seconds + 90, check=False)
        except subprocess.TimeoutExpired:
            self.problem(f"wire {op} {block} depth {depth}: no end")
            return
        if done.returncode:
            self.problem(f"wire {op} {block} depth {depth}: {done.stderr.strip()}")
            return
        report = json.loads(done.stdout)
        cpu = (cluster.cpu_s() - cpu_before) / report["requests"] * 1e6
        row = Row(
            "sheep (wire)", "wire_load", op, "random", block, depth, report["per_second"], report["mb_per_second"],
            report["p50_ms"], report["p99_ms"], round(cpu, 1),
        )  # fmt: skip
        per_second, mb_per_second = ORIGINAL.get((op, block, depth), (None, None))
        if per_second is not None:
            row.original, row.ratio = per_second, round(row.per_second / per_second, 2)
        elif mb_per_second is not None:
            row.original, row.ratio = mb_per_second, round(row.mb_per_second / mb_per_second, 2)
        self.outcome.rows.append(row)

    def block_device(self, name: str, target: str, cluster: Cluster | None = None) -> None:
        """The loads of qemu-img and fio on one NBD export or file."""
        for tool, op, block, depth in (
            ("qemu-img", "write", 4 * KiB, 16), ("qemu-img", "read", 4 * KiB, 16),
            ("fio", "write", 4 * KiB, 1), ("fio", "write", 4 * KiB, 16),
            ("fio", "read", 4 * KiB, 1), ("fio", "read", 4 * KiB, 16),
            ("fio", "write", 1 * MiB, 4), ("fio", "read", 1 * MiB, 4),
        ):  # fmt: skip
            cpu_before = cluster.cpu_s() if cluster else 0.0
            pattern = "random" if block < MiB else "sequential"
            try:
                if tool == "fio":
                    report = nbd_load.fio(target, op, pattern, block, depth, self.seconds, self.size)
                else:
                    report = nbd_load.qemu_bench(target, op, block, depth, self.seconds)
            except nbd_load.LoadError as error:
                self.problem(f"{name}: {tool} {op} {block} depth {depth}: {error}")
                continue
            # qemu-img runs a trial first, so its share of the processor time would be too large.
            cpu = (cluster.cpu_s() - cpu_before) / report.requests * 1e6 if cluster and tool == "fio" else None
            self.outcome.rows.append(
                Row(
                    name, tool, op, report.pattern, block, depth, report.per_second, report.mb_per_second,
                    report.p50_ms, report.p99_ms, None if cpu is None else round(cpu, 1),
                )
            )  # fmt: skip

    def cluster(self, directory: Path, extra: list[str], nbd: bool) -> None:
        cluster = Cluster(directory, 3, extra, nbd)
        try:
            cluster.start(self.copies)
            for op in ("write", "read"):
                for depth in (1, 16):
                    self.wire(cluster, op, 4 * KiB, depth)
            for op in ("write", "read"):
                self.wire(cluster, op, 4 * MiB, 4)
            if cluster.nbd_socket is not None:
                cluster.dog("vdi", "create", "-P", "nbd", str(self.size))
                uri = f"nbd+unix:///nbd?socket={cluster.nbd_socket}"
                self.block_device("sheep (NBD)", uri, cluster)
        except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
            self.problem(str(error))
        finally:
            cluster.stop()

    def references(self, directory: Path) -> None:
        plain = directory / "plain.img"
        plain.write_bytes(b"")
        os.truncate(plain, self.size)
        for name, plugin in (("nbdkit memory", ["memory", str(self.size)]), ("nbdkit file", ["file", str(plain)])):
            if shutil.which("nbdkit") is None:
                self.problem("nbdkit is not installed")
                break
            with nbdkit(directory / "nbdkit.sock", plugin) as uri:
                self.block_device(name, uri)
        self.block_device("plain file", str(plain))


@contextmanager
def nbdkit(socket_path: Path, plugin: list[str]) -> Iterator[str]:
    process = subprocess.Popen(["nbdkit", "-f", "-U", str(socket_path), *plugin], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_S
        while not socket_path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        yield f"nbd+unix:///?socket={socket_path}"
    finally:
        process.terminate()
        process.wait()
        socket_path.unlink(missing_ok=True)


def size_text(count: int) -> str:
    return f"{count // MiB}M" if count >= MiB else f"{count // KiB}k"


def table(outcome: Outcome) -> str:
    """What people read. Ratios of NBD loads are to nbdkit's memory export in this very run."""
    local = {
        (row.tool, row.op, row.block, row.depth): row.per_second
        for row in outcome.rows
        if row.target == "nbdkit memory"
    }
    heads = ("target", "tool", "op", "block", "depth", "per s", "MB/s", "p50 ms", "p99 ms", "sheep CPU us")
    lines: list[tuple[str, ...]] = [(*heads, "original C", "x original", "x nbdkit mem")]
    for row in outcome.rows:
        reference = local.get((row.tool, row.op, row.block, row.depth))
        unit = "" if row.original is None else "/s" if ORIGINAL[row.op, row.block, row.depth][0] else " MB/s"
        lines.append(
            (
                row.target, row.tool, f"{row.op} {row.pattern[:4]}", size_text(row.block), str(row.depth),
                f"{row.per_second:.0f}", f"{row.mb_per_second:.1f}",
                *("-" if value is None else f"{value:.3f}" for value in (row.p50_ms, row.p99_ms)),
                "-" if row.server_cpu_us is None else f"{row.server_cpu_us:.0f}",
                "-" if row.original is None else f"{row.original:.0f}{unit}",
                "-" if row.ratio is None else f"{row.ratio:.2f}",
                "-" if reference is None else f"{row.per_second / reference:.2f}",
            )
        )  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compare a cluster of three sheep with the original and local storage")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each load")
    parser.add_argument("--size", type=nbd_load.parse_size, default=128 * MiB, help="of each volume")
    parser.add_argument("--copies", type=int, default=3)
    parser.add_argument("--no-nbd", action="store_true", help="leave the NBD front end out")
    parser.add_argument("--no-references", action="store_true", help="leave nbdkit and the plain file out")
    parser.add_argument("--sheep-option", action="append", default=[], help="one more argument for every sheep")
    parser.add_argument("--directory", help="where the temporary directory is made (a disk, not a tmpfs)")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    bench = Bench(chosen.seconds, chosen.size, chosen.copies)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sheep-bench-", dir=chosen.directory)))
        bench.cluster(directory, chosen.sheep_option, not chosen.no_nbd)
        if not chosen.no_references:
            bench.references(directory)
    outcome = bench.outcome
    if chosen.json:
        print(json.dumps(asdict(outcome), indent=1))
    else:
        print(table(outcome))
        print(f"\nmachine: {outcome.machine}")
    return 1 if outcome.problems or not outcome.rows else 0


if __name__ == "__main__":
    sys.exit(main())
