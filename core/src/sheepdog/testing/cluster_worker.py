"""Members of a cluster under test: sessions in this process, and sessions in processes that can be killed or stopped.

The conformance kit (``cluster_kit``) talks to both through :class:`KitMember`. A member in a process of its own is
``python -m sheepdog.testing.cluster_worker MODULE OPTIONS BACKEND`` and is driven by JSON lines over its standard
input and output, so that SIGKILL and SIGSTOP hit a real driver at a real moment.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import anyio
import anyio.abc

import sheepdog.errors
from sheepdog.contracts.cluster import ClusterDriver, ClusterSession, Delivered, Event, Joined, Left, Updated
from sheepdog.errors import SessionLost, SheepdogError
from sheepdog.model.node import Node, NodeId

START_TIMEOUT_S = 30.0
ANSWER_TIMEOUT_S = 30.0
END_TIMEOUT_S = 10.0  # of a killed process


def make_driver(module: str, options: str) -> ClusterDriver:
    """What the hook of the plugin ``module`` returns; without a base directory, since there is no sheep."""
    hook = importlib.import_module(module).sheepdog_cluster_driver
    arguments = {"options": options, "directory": None}
    driver: ClusterDriver = hook(**{name: arguments[name] for name in inspect.signature(hook).parameters})
    return driver


class KitMember(ABC):
    """A member as a check sees it. Its events are gathered in ``seen`` as they come."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.seen: list[Event] = []
        self.lost: str | None = None
        """Why ``events`` ended with ``SessionLost``; None while it goes on."""
        self._changed = anyio.Event()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    def _push(self, event: Event) -> None:
        self.seen.append(event)
        self._notify()

    async def until(self, holds: Callable[[], object], within_s: float) -> None:
        """``holds()`` is true; looked at whenever an event came.

        :raises AssertionError: it is still false after ``within_s`` seconds; the message has the events.
        """
        with anyio.move_on_after(within_s):
            while not holds():
                await self._changed.wait()
        assert holds(), f"{self.node.id.text} did not see it within {within_s} s; lost: {self.lost}; saw {self.seen}"

    @abstractmethod
    async def broadcast(self, payload: bytes) -> None: ...

    @abstractmethod
    async def update(self, node: Node) -> None: ...

    @abstractmethod
    async def alive(self) -> bool: ...

    @abstractmethod
    async def status(self) -> dict[str, Any]: ...  # Any: as the contract

    @abstractmethod
    async def leave(self) -> None:
        """The context of ``join`` was left in order."""

    async def kill(self) -> None:
        """It died without a word; nothing of it runs any more."""
        raise AssertionError("this member cannot be killed")

    async def pause(self) -> None:
        """Nothing of it runs until ``resume``."""
        raise AssertionError("this member cannot be paused")

    async def resume(self) -> None:
        raise AssertionError("this member cannot be paused")


class SessionMember(KitMember):
    """A session in this process, served by a task of the group given to ``start``."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.session: ClusterSession | None = None
        self._leave = anyio.Event()
        self._gone = anyio.Event()

    async def start(self, tasks: anyio.abc.TaskGroup, driver: ClusterDriver, greeting: bytes) -> None:
        """It joined. Errors of ``join`` are raised here."""
        failure = await tasks.start(self._live, driver, greeting)
        if failure is not None:
            raise failure

    async def _live(
        self, driver: ClusterDriver, greeting: bytes, *, task_status: anyio.abc.TaskStatus[Exception | None]
    ) -> None:
        try:
            async with driver.join(self.node, greeting) as session:
                self.session = session
                task_status.started(None)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._follow, session)
                    await self._leave.wait()
                    tasks.cancel_scope.cancel()
        except SheepdogError as error:
            if self.session is not None:
                raise
            task_status.started(error)
        finally:
            self._gone.set()

    async def _follow(self, session: ClusterSession) -> None:
        try:
            async for event in session.events():
                self._push(event)
        except SessionLost as error:
            self.lost = str(error) or "lost"
            self._notify()

    def _session(self) -> ClusterSession:
        assert self.session is not None, "the member did not join"
        return self.session

    async def broadcast(self, payload: bytes) -> None:
        await self._session().broadcast(payload)

    async def update(self, node: Node) -> None:
        await self._session().update(node)

    async def alive(self) -> bool:
        return self._session().alive()

    async def status(self) -> dict[str, Any]:
        return await self._session().status()

    async def leave(self) -> None:
        self._leave.set()
        await self._gone.wait()


class ProcessMember(KitMember):
    """A session in a process of its own."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._answers: dict[int, dict[str, Any]] = {}
        self._count = 0
        self._process: anyio.abc.Process | None = None
        self._ended = anyio.Event()

    async def start(
        self, tasks: anyio.abc.TaskGroup, command: Sequence[str], greeting: bytes, env: dict[str, str] | None = None
    ) -> None:
        """It joined. Errors of ``join`` are raised here."""
        await tasks.start(self._live, command, env)
        with anyio.fail_after(START_TIMEOUT_S):
            try:
                await self._call("join", node=self.node.pack().hex(), greeting=greeting.hex())
            except SheepdogError:
                await self.kill()
                raise

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def _live(
        self, command: Sequence[str], env: dict[str, str] | None, *, task_status: anyio.abc.TaskStatus[None]
    ) -> None:
        process = await anyio.open_process(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=None, env=env)
        self._process = process
        task_status.started()
        assert process.stdout is not None
        pending = b""
        try:
            while True:
                try:
                    pending += await process.stdout.receive()
                except (anyio.EndOfStream, anyio.ClosedResourceError, anyio.BrokenResourceError):
                    break
                *lines, pending = pending.split(b"\n")
                for line in lines:
                    self._line(json.loads(line))
        finally:
            self._ended.set()
            self._notify()
            with suppress(ProcessLookupError):
                process.kill()
            # bounded: a test run must not hang because of a process that cannot be reaped
            with anyio.move_on_after(END_TIMEOUT_S, shield=True):
                await process.wait()
                await process.aclose()

    def _line(self, line: dict[str, Any]) -> None:
        if "event" in line:
            self._push(_event_from(line["event"]))
        elif "lost" in line:
            self.lost = line["lost"]
            self._notify()
        else:
            self._answers[line["id"]] = line
            self._notify()

    async def send(self, op: str, **fields: Any) -> int:  # Any: what JSON takes
        """The command is on its way; also to a stopped process. Its number, for ``answer``."""
        assert self._process is not None and self._process.stdin is not None
        self._count += 1
        number = self._count
        try:
            await self._process.stdin.send(json.dumps({"id": number, "op": op, **fields}).encode() + b"\n")
        except (BrokenPipeError, ConnectionResetError, anyio.BrokenResourceError, anyio.ClosedResourceError) as error:
            raise SessionLost("the process ended") from error
        return number

    async def answer(self, number: int) -> Any:
        """What the command returned. Raises what it raised; ``SessionLost`` if the process ended."""
        with anyio.fail_after(ANSWER_TIMEOUT_S):
            while number not in self._answers:
                if self._ended.is_set():
                    raise SessionLost("the process ended")
                await self._changed.wait()
        line = self._answers.pop(number)
        if "error" in line:
            raise getattr(sheepdog.errors, line["error"])(line["message"])
        return line["value"]

    async def _call(self, op: str, **fields: Any) -> Any:
        return await self.answer(await self.send(op, **fields))

    async def broadcast(self, payload: bytes) -> None:
        await self._call("broadcast", payload=payload.hex())

    async def flood(self) -> None:
        """It broadcasts numbered payloads without end, as fast as it can."""
        await self._call("flood")

    async def update(self, node: Node) -> None:
        await self._call("update", node=node.pack().hex())

    async def alive(self) -> bool:
        return bool(await self._call("alive"))

    async def status(self) -> dict[str, Any]:
        return dict(await self._call("status"))

    async def leave(self) -> None:
        await self._call("leave")
        await self._ended.wait()

    async def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        await self._ended.wait()

    async def pause(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    async def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


class KitCluster(ABC):
    """One cluster under test. Every instance is separate from every other one."""

    detection_s: float
    """As the driver states it."""
    pause_s: float
    """A pause that long is certainly noticed: the others see a ``Left``."""
    blip_s: float = 0.0
    """A pause that short is certainly harmless."""

    @abstractmethod
    async def spawn(self, node: Node, greeting: bytes = b"") -> KitMember:
        """A new member."""

    async def spawn_killable(self, node: Node, greeting: bytes = b"") -> KitMember:
        """A new member that supports ``kill``, ``pause`` and ``resume``."""
        return await self.spawn(node, greeting)

    @abstractmethod
    def driver(self) -> ClusterDriver:
        """A driver for this cluster, for checks that call ``join`` themselves."""


class DriverCluster(KitCluster):
    """Sessions of a real driver. ``spawn`` makes them here, ``spawn_killable`` in processes."""

    def __init__(self, module: str, options: str, backend: str, tasks: anyio.abc.TaskGroup) -> None:
        self.module = module
        self.options = options
        self.backend = backend
        self.tasks = tasks
        self.detection_s = self.driver().detection_s

    def driver(self) -> ClusterDriver:
        return make_driver(self.module, self.options)

    async def spawn(self, node: Node, greeting: bytes = b"") -> SessionMember:
        member = SessionMember(node)
        await member.start(self.tasks, self.driver(), greeting)
        return member

    async def spawn_killable(self, node: Node, greeting: bytes = b"") -> ProcessMember:
        member = ProcessMember(node)
        command = [sys.executable, "-m", "sheepdog.testing.cluster_worker", self.module, self.options, self.backend]
        await member.start(self.tasks, command, greeting)
        return member


@asynccontextmanager
async def driver_cluster(
    module: str, options: str, *, backend: str, pause_s: float, blip_s: float = 0.0, detection_s: float | None = None
) -> AsyncIterator[DriverCluster]:
    """A :class:`DriverCluster`; all its members are gone at the end.

    :param module: with the hook ``sheepdog_cluster_driver``.
    :param backend: event loop of the processes: ``asyncio``, ``uvloop`` or ``trio``.
    """
    failure: Exception | None = None
    async with anyio.create_task_group() as tasks:
        cluster = DriverCluster(module, options, backend, tasks)
        cluster.pause_s = pause_s
        cluster.blip_s = blip_s
        if detection_s is not None:
            cluster.detection_s = detection_s
        try:
            yield cluster
        except Exception as error:
            failure = error
        finally:
            tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure


# -- the process ----------------------------------------------------------------------------------------------------


def _event_to(event: Event) -> dict[str, Any]:
    fields: dict[str, Any] = {"kind": type(event).__name__}
    if isinstance(event, Delivered):
        return {**fields, "sender": event.sender.pack().hex(), "payload": event.payload.hex()}
    fields |= {"node": event.node.pack().hex(), "view": [node.pack().hex() for node in event.view]}
    if isinstance(event, Joined):
        fields["greeting"] = event.greeting.hex()
    return fields


def _event_from(fields: dict[str, Any]) -> Event:
    if fields["kind"] == "Delivered":
        return Delivered(NodeId.unpack(bytes.fromhex(fields["sender"])), bytes.fromhex(fields["payload"]))
    node = _node(fields["node"])
    view = tuple(map(_node, fields["view"]))
    if fields["kind"] == "Joined":
        return Joined(node, bytes.fromhex(fields["greeting"]), view)
    return Left(node, view) if fields["kind"] == "Left" else Updated(node, view)


def _node(text: str) -> Node:
    return Node.unpack(bytes.fromhex(text))


def _emit(line: dict[str, Any]) -> None:
    data = memoryview(json.dumps(line).encode() + b"\n")
    while data:
        data = data[os.write(1, data) :]


async def _commands() -> AsyncIterator[dict[str, Any]]:
    pending = b""
    while True:
        await anyio.wait_readable(0)
        chunk = os.read(0, 1 << 20)
        if not chunk:
            return
        *lines, pending = (pending + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


async def _answer(number: int, work: Callable[[], Awaitable[Any]]) -> None:
    try:
        value = await work()
    except SheepdogError as error:
        _emit({"id": number, "error": type(error).__name__, "message": str(error)})
    else:
        _emit({"id": number, "value": value})


async def _follow(session: ClusterSession) -> None:
    try:
        async for event in session.events():
            _emit({"event": _event_to(event)})
    except SessionLost as error:
        _emit({"lost": str(error) or "lost"})


async def _flood(session: ClusterSession) -> None:
    index = 0
    with suppress(SheepdogError):
        while True:
            await session.broadcast(b"flood %d" % index)
            index += 1


async def _serve(driver: ClusterDriver) -> None:
    commands = _commands()
    first = await anext(commands)
    try:
        async with driver.join(_node(first["node"]), bytes.fromhex(first["greeting"])) as session:
            _emit({"id": first["id"], "value": None})
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_follow, session)
                number = math.nan
                async for command in commands:
                    number = command["id"]
                    match command["op"]:
                        case "alive":  # answered in place: before anything else runs after a pause
                            _emit({"id": number, "value": session.alive()})
                        case "broadcast":
                            payload = bytes.fromhex(command["payload"])
                            tasks.start_soon(_answer, number, lambda payload=payload: session.broadcast(payload))
                        case "flood":
                            tasks.start_soon(_flood, session)
                            _emit({"id": number, "value": None})
                        case "update":
                            node = _node(command["node"])
                            tasks.start_soon(_answer, number, lambda node=node: session.update(node))
                        case "status":
                            tasks.start_soon(_answer, number, session.status)
                        case "leave":
                            break
                tasks.cancel_scope.cancel()
        _emit({"id": number, "value": None})
    except SheepdogError as error:
        _emit({"id": first["id"], "error": type(error).__name__, "message": str(error)})


def main(module: str, options: str, backend: str) -> None:
    driver = make_driver(module, options)
    if backend == "uvloop":
        anyio.run(_serve, driver, backend="asyncio", backend_options={"use_uvloop": True})
    else:
        anyio.run(_serve, driver, backend=backend)


if __name__ == "__main__":
    main(*sys.argv[1:])
