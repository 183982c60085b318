"""Measures the cluster drivers: broadcasts, joining, and how soon a death is noticed.

    python benchmarks/drivers.py [--driver NAME ...] [--large] [--json]

Servers that a driver needs are started on this machine and stopped afterwards. All members but the one that is killed
are sessions of this process, so the figures are those of the driver and its service, without a sheep around them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from sheepdog.contracts.cluster import ClusterSession, Delivered, Joined, Left
from sheepdog.errors import SheepdogError
from sheepdog.model.node import Node, NodeId
from sheepdog.testing import services
from sheepdog.testing.cluster_worker import ProcessMember, make_driver

MODULES = {
    "local": "sheepdog_cluster_local",
    "zookeeper": "sheepdog_cluster_zk",
    "etcd": "sheepdog_cluster_etcd",
    "raft": "sheepdog_cluster_raft",
}
SESSION_S = 2  # the session time of every driver
PATIENCE_S = 120.0
VOTERS = 3
PAYLOAD = bytes(200)  # about what a message between sheep has

Specs = Callable[[int], str]  # options of member number i


def node(index: int) -> Node:
    return Node(NodeId.of("127.0.0.1", 7000 + index), 128, index, 0)


class Member:
    """A session, and what it has seen."""

    def __init__(self, session: ClusterSession) -> None:
        self.session = session
        self.delivered = 0
        self.members = 0
        self.gone: dict[NodeId, float] = {}
        self._changed = anyio.Event()

    async def follow(self) -> None:
        async for event in self.session.events():
            match event:
                case Delivered():
                    self.delivered += 1
                case Joined(view=view):
                    self.members = len(view)
                case Left(node=left, view=view):
                    self.members = len(view)
                    self.gone[left.id] = time.perf_counter()
            self._changed.set()
            self._changed = anyio.Event()

    async def until(self, true: Callable[[], bool]) -> None:
        with anyio.fail_after(PATIENCE_S):
            while not true():
                await self._changed.wait()


@asynccontextmanager
async def members(name: str, specs: Specs, count: int) -> AsyncIterator[tuple[list[Member], float]]:
    """``count`` members that all see each other, and the seconds that this took when all came at once."""
    found: dict[int, Member] = {}
    async with anyio.create_task_group() as tasks:
        stop = anyio.Event()

        async def live(index: int) -> None:
            async with make_driver(MODULES[name], specs(index)).join(node(index), b"") as session:
                member = found[index] = Member(session)
                async with anyio.create_task_group() as following:
                    following.start_soon(member.follow)
                    await stop.wait()
                    following.cancel_scope.cancel()

        started = time.perf_counter()
        for index in range(count):
            tasks.start_soon(live, index)
        with anyio.fail_after(PATIENCE_S):
            while len(found) < count:
                await anyio.sleep(0.001)
        for member in list(found.values()):
            await member.until(lambda member=member: member.members == count)  # type: ignore[misc]
        try:
            yield [found[index] for index in range(count)], time.perf_counter() - started
        finally:
            stop.set()


async def measure_broadcasts(group: list[Member], rounds: int) -> dict[str, float]:
    sender = group[0]
    times = []
    for _ in range(rounds):
        wanted = sender.delivered + 1
        started = time.perf_counter()
        await sender.session.broadcast(PAYLOAD)
        await sender.until(lambda wanted=wanted: sender.delivered >= wanted)  # type: ignore[misc]
        times.append(time.perf_counter() - started)
    before = [member.delivered for member in group]

    async def talk(member: Member) -> None:
        for _ in range(rounds):
            await member.session.broadcast(PAYLOAD)

    started = time.perf_counter()
    async with anyio.create_task_group() as tasks:
        for member in group:
            tasks.start_soon(talk, member)
    total = rounds * len(group)
    for member, seen in zip(group, before, strict=True):
        await member.until(lambda member=member, seen=seen: member.delivered >= seen + total)  # type: ignore[misc]
    return {
        "latency_median_ms": statistics.median(times) * 1000,
        "latency_p95_ms": sorted(times)[int(len(times) * 0.95)] * 1000,
        "broadcasts_per_s": total / (time.perf_counter() - started),
    }


async def measure_detection(name: str, group: list[Member], spec: str, repeats: int) -> list[float]:
    """Seconds from SIGKILL to the first ``Left``, for members in processes of their own."""
    times = []
    async with anyio.create_task_group() as tasks:
        for index in range(repeats):
            victim = ProcessMember(node(50 + index))
            command = [sys.executable, "-m", "sheepdog.testing.cluster_worker", MODULES[name], spec, "uvloop"]
            await victim.start(tasks, command, b"")
            await group[0].until(lambda: group[0].members == len(group) + 1)
            killed = time.perf_counter()
            await victim.kill()
            await group[0].until(lambda victim=victim: victim.node.id in group[0].gone)  # type: ignore[misc]
            times.append(group[0].gone[victim.node.id] - killed)
        tasks.cancel_scope.cancel()
    return times


class Places:
    """Makes the options of ever new clusters of one driver; its server, if any, serves all of them."""

    def __init__(self, name: str, base: Path, stack: ExitStack) -> None:
        self.name = name
        self.base = base
        self.stack = stack
        self.count = 0
        base.mkdir(parents=True, exist_ok=True)
        self.address = ""
        if name == "zookeeper":
            self.address = services.start_zookeeper(base, stack).address
        elif name == "etcd":
            self.address = services.start_etcd(base, stack).address

    def new(self, members: int) -> Specs:
        self.count += 1
        number = self.count
        match self.name:
            case "local":
                return lambda index: f"{self.base}/cluster{number},timeout={SESSION_S * 1000}"
            case "zookeeper":
                return lambda index: f"{self.address}/bench{number},timeout={SESSION_S * 1000}"
            case "etcd":
                return lambda index: f"{self.address}/bench{number},ttl={SESSION_S}"
        voters = [f"127.0.0.1:{port}" for port in services.hold_ports(VOTERS if members >= VOTERS else 1, self.stack)]
        secret = self.base / "secret"
        secret.write_text("for benchmarks")

        def spec(index: int) -> str:
            own = f"{voters[index]},dir={self.base}/{number}-{index}" if index < len(voters) else "none"
            return f"{','.join(voters)},self={own},timeout={SESSION_S * 1000},password-file={secret}"

        return spec


async def measure(name: str, base: Path, sizes: list[int], rounds: int, repeats: int) -> dict[str, Any]:
    """All figures of one driver."""
    with ExitStack() as servers:
        places = Places(name, base, servers)
        result: dict[str, Any] = {"driver": name}
        specs = places.new(3)
        async with AsyncExitStack() as stack:
            group, _ = await stack.enter_async_context(members(name, specs, 3))
            result |= await measure_broadcasts(group, rounds)
            times = await measure_detection(name, group, specs(VOTERS), repeats)
            result |= {"detection_median_s": statistics.median(times), "detection_max_s": max(times)}
            result["detection_stated_s"] = make_driver(MODULES[name], specs(0)).detection_s
        for size in sizes:
            async with members(name, places.new(size), size) as (_, seconds):
                result[f"join_{size}_s"] = seconds
        return result


def table(results: list[dict[str, Any]], sizes: list[int]) -> str:
    """The results for people, as a Markdown table."""
    heads = ["driver", "broadcast median", "95 %", "broadcasts/s, 3 senders"]
    heads += [f"join of {size}" for size in sizes] + ["death noticed, median", "longest", "stated"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in results:
        cells = [f"`{row['driver']}`", f"{row['latency_median_ms']:.2f} ms", f"{row['latency_p95_ms']:.2f} ms"]
        cells += [f"{row['broadcasts_per_s']:.0f}", *(f"{row[f'join_{size}_s'] * 1000:.0f} ms" for size in sizes)]
        cells += [f"{row[f'detection_{key}_s']:.2f} s" for key in ("median", "max", "stated")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--driver", action="append", choices=list(MODULES), help="only this one; may be repeated")
    parser.add_argument("--rounds", type=int, default=100, help="broadcasts per sender (100)")
    parser.add_argument("--repeats", type=int, default=3, help="members that are killed (3)")
    parser.add_argument("--large", action="store_true", help="also a cluster of 32")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    if options.rounds < 1 or options.repeats < 1:
        parser.error("--rounds and --repeats must be at least 1")
    sizes = [1, 8, 32] if options.large else [1, 8]
    results = []
    with tempfile.TemporaryDirectory(prefix="drivers-") as base:
        for name in options.driver or MODULES:
            try:
                results.append(
                    anyio.run(
                        measure,
                        name,
                        Path(base) / name,
                        sizes,
                        options.rounds,
                        options.repeats,
                        backend_options={"use_uvloop": True},
                    )
                )
            except SheepdogError as error:
                print(f"{name}: {error}", file=sys.stderr)
                return 1
    if options.json:
        print(json.dumps({"session_s": SESSION_S, "cores": os.cpu_count(), "results": results}, indent=2))
    else:
        print(table(results, sizes))
    return 0


if __name__ == "__main__":
    sys.exit(main())
