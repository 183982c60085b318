"""From a request to its handler: version, opcode and status gate, then one table lookup.

Three kinds of handlers. A *path* handler is the data path: it gets the connection and answers by callback, making no
task. A *fast* handler answers from memory at once. A *task* handler is ordinary async code of the control plane and
runs in its own task; at most ``TASKS_MAX`` of them are alive, more wait.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

from sheepdog.daemon.outbox import Outbox
from sheepdog.daemon.state import SheepState
from sheepdog.errors import SheepdogError
from sheepdog.model.clusterinfo import ClusterStatus
from sheepdog.wire.header import Request, Response
from sheepdog.wire.opcodes import OP_TABLE, PROTO_VER, SHEEP_PROTO_VER, Op, op_name
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.server import ClientConnection
    from sheepdog.daemon.tracing import Tracers

logger = logging.getLogger(__name__)

TASKS_MAX = 256
_OBJECT_IO = frozenset({Op.CREATE_AND_WRITE_OBJ, Op.READ_OBJ, Op.WRITE_OBJ, Op.DISCARD_OBJ})
OBJECT_OPERATIONS = frozenset({Op.CREATE_AND_WRITE_OBJ, Op.READ_OBJ, Op.WRITE_OBJ, Op.REMOVE_OBJ})

PathHandler: TypeAlias = "Callable[[ClientConnection, Request], None]"
FastHandler: TypeAlias = Callable[[Request], Response]
TaskHandler: TypeAlias = Callable[[Request], Awaitable[Response]]
Spawn: TypeAlias = Callable[..., None]


class Dispatcher:
    """The opcode table of one sheep."""

    def __init__(self, state: SheepState, outbox: Outbox, spawn: Spawn) -> None:
        """:param spawn: ``spawn(async_function, *args)`` starts a task in a group that outlives the connections."""
        self.state = state
        self._outbox = outbox
        self._spawn = spawn
        self._handlers: list[PathHandler | None] = [None] * 256
        self._force = [False] * 256
        self._admin: dict[int, str] = {}
        self.tracer: Tracers | None = None  # while one is switched on
        self._tasks = 0
        self._waiting: deque[tuple[ClientConnection, Request, TaskHandler]] = deque()
        for op, spec in OP_TABLE.items():
            self._force[op] = spec.force
            if spec.admin:
                self._admin[int(op)] = op_name(op)

    @property
    def tasks_active(self) -> int:
        """Control requests that are being carried out."""
        return self._tasks

    def path(self, opcode: int, handler: PathHandler, *, force: bool | None = None) -> None:
        """``handler(connection, request)`` answers ``opcode`` through ``connection.reply``."""
        assert self._handlers[opcode] is None, f"opcode 0x{opcode:02x} has two handlers"
        self._handlers[opcode] = handler
        if force is not None:
            self._force[opcode] = force

    def fast(self, opcode: int, handler: FastHandler, *, force: bool | None = None) -> None:
        """``handler(request)`` answers ``opcode`` at once; a SheepdogError it raises is answered with its result."""

        def run(connection: ClientConnection, request: Request) -> None:
            try:
                response = handler(request)
            except Exception as error:
                response = self._failed(request, error)
            connection.reply(request, response.result, response.variant, response.body)

        self.path(opcode, run, force=force)

    def task(self, opcode: int, handler: TaskHandler, *, force: bool | None = None, unlimited: bool = False) -> None:
        """``await handler(request)`` answers ``opcode`` from a task of its own.

        :param unlimited: never waits for others to end: what other sheep ask while our tasks wait for them.
        """

        def run(connection: ClientConnection, request: Request) -> None:
            if unlimited or self._tasks < TASKS_MAX:
                self._tasks += 1
                self._spawn(self._run_task, connection, request, handler)
            else:
                self._waiting.append((connection, request, handler))

        self.path(opcode, run, force=force)

    async def _run_task(self, connection: ClientConnection, request: Request, handler: TaskHandler) -> None:
        response = Response(Result.SYSTEM_ERROR)
        try:
            response = await handler(request)
        except Exception as error:
            response = self._failed(request, error)
        finally:
            self._tasks -= 1
            if request.opcode in self._admin:
                self._log_admin(connection, request, response.result)
            with self._outbox:
                connection.reply(request, response.result, response.variant, response.body)
            if self._waiting and self._tasks < TASKS_MAX:
                self._tasks += 1
                self._spawn(self._run_task, *self._waiting.popleft())

    @staticmethod
    def _failed(request: Request, error: Exception) -> Response:
        if isinstance(error, SheepdogError):
            return Response(error.result)
        logger.error("opcode=0x%02x failed unexpectedly", request.opcode, exc_info=error)
        return Response(Result.SYSTEM_ERROR)

    def handle(self, connection: ClientConnection, request: Request) -> None:
        """The request is answered, now or later. Never raises."""
        opcode = request.opcode
        if opcode >= 0x80:
            if request.proto != SHEEP_PROTO_VER:
                connection.reply(request, Result.VER_MISMATCH)
                return
        elif request.proto > PROTO_VER:
            connection.reply(request, Result.VER_MISMATCH)
            return
        handler = self._handlers[opcode]
        if handler is None:
            connection.reply(request, Result.INVALID_PARMS)
            return
        status = self.state.status
        if status is not ClusterStatus.OK:
            if status is ClusterStatus.KILLED and opcode in _OBJECT_IO:
                return  # this sheep ends in a moment: a client resends elsewhere what its connection took along
            refused = self._gate(opcode, status)
            if refused:
                connection.reply(request, refused)
                return
        if opcode in self._admin:
            self._log_admin(connection, request, None)
        try:
            if self.tracer is None:
                handler(connection, request)
            else:
                self.tracer.run(handler, connection, request)
        except Exception as error:
            connection.reply(request, self._failed(request, error).result)

    def _gate(self, opcode: int, status: ClusterStatus) -> int:
        if status is ClusterStatus.SHUTDOWN:
            return Result.SHUTDOWN
        if status is ClusterStatus.KILLED:
            return Result.KILLED
        if self._force[opcode]:
            return 0
        if opcode in OBJECT_OPERATIONS and (self.state.has_served or self.state.joining):
            # Our session was lost, or we have only just started and a client sends again what it had sent before: the
            # gateway keeps the request until we are a member.
            return 0
        return Result.WAIT_FOR_JOIN if self.state.formatted else Result.WAIT_FOR_FORMAT

    def _log_admin(self, connection: ClientConnection, request: Request, result: int | None) -> None:
        remote = connection.channel.remote
        data = "(null)"
        if len(request.body):
            head, nul, _ = bytes(request.body[:256]).partition(b"\0")
            data = head.decode("utf-8", "backslashreplace") if nul or len(request.body) < 256 else "(not string)"
        tail = "" if result is None else f", result={result:02X}"
        logger.info(
            "req=0x%x, fd=%d, client=%s, op=%s, data=%s%s",
            id(request), connection.number, remote, self._admin[request.opcode], data, tail,
        )  # fmt: skip
