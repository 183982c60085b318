"""The first part of a connection: options, until an export is chosen.

What can be answered at once is; what must ask the cluster is a task that ``spawn`` starts, while the connection is
held.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

import anyio

from sheepdog.api import (
    InvalidParameters,
    SheepdogError,
    TagNotFound,
    VdiLocked,
    VdiNotFound,
    Volume,
    Volumes,
)
from sheepdog_frontend_nbd import protocol
from sheepdog_frontend_nbd.connection import Connection
from sheepdog_frontend_nbd.exports import decode, describe, encode, export_name, list_exports, open_export
from sheepdog_frontend_nbd.protocol import (
    BASE_ALLOCATION,
    BASE_ALLOCATION_ID,
    BadOption,
    ExportFlag,
    HandshakeFlag,
    Info,
    Option,
    ProtocolViolation,
    Reply,
    option_error,
    option_reply,
)

logger = logging.getLogger(__name__)

OPTIONS_MAX = 1000  # of one connection

Spawn = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]  # Any: the types of a coroutine that nobody uses


def export_flags(*, read_only: bool, structured: bool) -> ExportFlag:
    """What an export of ours can do.

    Several connections see one volume in this sheep, and a flush on one covers the others' answered writes.
    """
    flags = (
        ExportFlag.HAS_FLAGS
        | ExportFlag.SEND_FLUSH
        | ExportFlag.SEND_FUA
        | ExportFlag.CAN_MULTI_CONN
        | ExportFlag.SEND_CACHE
    )
    if structured:
        flags |= ExportFlag.SEND_DF
    if read_only:
        return flags | ExportFlag.READ_ONLY
    return flags | ExportFlag.SEND_TRIM | ExportFlag.SEND_WRITE_ZEROES | ExportFlag.SEND_FAST_ZERO


def error_reply(error: Exception) -> Reply:
    """How the refusal of an export is put to a client."""
    if isinstance(error, VdiNotFound | TagNotFound | InvalidParameters):
        return Reply.ERR_UNKNOWN
    if isinstance(error, VdiLocked):
        return Reply.ERR_POLICY
    return Reply.ERR_PLATFORM


class Negotiation:
    """The negotiation of one connection.

    :param start_tls: upgrades the connection; ``None`` when TLS is not offered or active already.
    :param tls_active: the connection was upgraded.
    :param tls_missing: nothing but STARTTLS is answered.
    """

    def __init__(
        self,
        connection: Connection,
        volumes: Volumes,
        spawn: Spawn,
        *,
        read_only: bool,
        start_tls: Callable[[], None] | None,
        tls_missing: bool,
        tls_active: bool = False,
        zeroes: bool = True,
    ) -> None:
        self._connection = connection
        connection.negotiation = self
        self._volumes = volumes
        self._spawn = spawn
        self._read_only = read_only
        self._start_tls = start_tls
        self._tls_missing = tls_missing
        self._tls_active = tls_active
        self.zeroes = zeroes
        self._structured = False
        self._block_status_of: bytes | None = None  # the export for which base:allocation was agreed on
        self._options = 0

    def client_flags(self, flags: int) -> None:
        """The client's side of the greeting."""
        self.zeroes = not flags & HandshakeFlag.NO_ZEROES

    def option(self, code: int, data: bytes) -> None:
        """Answers one option, perhaps later.

        :raises ProtocolViolation: the connection must be closed.
        """
        self._options += 1
        if self._options > OPTIONS_MAX:
            raise ProtocolViolation("endless negotiation")
        connection = self._connection
        if code == Option.ABORT:
            connection.send(option_reply(code, Reply.ACK))
            connection.finish()
        elif code == Option.STARTTLS:
            self._starttls(data)
        elif self._tls_missing:
            if code == Option.EXPORT_NAME:
                raise ProtocolViolation("an export is asked for without TLS")
            connection.send(option_error(code, Reply.ERR_TLS_REQD, "this server wants TLS"))
        elif code == Option.EXPORT_NAME:
            if len(data) > protocol.NAME_BYTES_MAX:
                raise ProtocolViolation("an export name of more than 4096 bytes")
            self._later(code, lambda: self._export_name(data))
        else:
            try:
                self._dispatch(code, data)
            except BadOption as error:
                connection.send(option_error(code, Reply.ERR_INVALID, str(error)))

    def _dispatch(self, code: int, data: bytes) -> None:
        if code in (Option.INFO, Option.GO):
            name, kinds = protocol.parse_info(data)
            self._later(code, lambda: self._info(code, name, kinds))
        elif code in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
            name, queries = protocol.parse_meta_context(data)
            if code == Option.SET_META_CONTEXT:
                self._block_status_of = None
                if not self._structured:
                    raise BadOption("meta contexts need structured replies")
            self._later(code, lambda: self._meta_context(code, name, queries))
        elif code == Option.LIST:
            if data:
                raise BadOption("LIST has no data")
            self._later(code, self._list)
        elif code == Option.STRUCTURED_REPLY:
            if data:
                raise BadOption("STRUCTURED_REPLY has no data")
            self._structured = True
            self._connection.send(option_reply(code, Reply.ACK))
        else:
            self._connection.send(option_error(code, Reply.ERR_UNSUP, "unknown option"))

    def _starttls(self, data: bytes) -> None:
        connection = self._connection
        if self._tls_active:
            connection.send(option_error(Option.STARTTLS, Reply.ERR_INVALID, "TLS is active already"))
        elif self._start_tls is None:
            connection.send(option_error(Option.STARTTLS, Reply.ERR_POLICY, "this server has no TLS"))
        elif data:
            connection.send(option_error(Option.STARTTLS, Reply.ERR_INVALID, "STARTTLS has no data"))
        else:
            connection.send(option_reply(Option.STARTTLS, Reply.ACK))
            self._start_tls()

    # ---- options that ask the cluster

    def _later(self, code: int, action: Callable[[], Coroutine[Any, Any, None]]) -> None:  # Any: as in Spawn
        connection = self._connection
        connection.hold()

        async def run() -> None:
            try:
                await action()
            except SheepdogError as error:
                if code == Option.EXPORT_NAME:  # it has no error reply
                    logger.info("nbd client %s is disconnected: %s", connection.channel.remote, error)
                    connection.finish()
                else:
                    connection.send(option_error(code, error_reply(error), str(error)))
            except Exception:
                logger.exception("nbd client %s: option %d failed", connection.channel.remote, code)
                connection.finish()
            finally:
                connection.go_on()

        self._spawn(run)

    async def _open(self, name: bytes, *, look_only: bool = False) -> Volume:
        return await open_export(self._volumes, decode(name), read_only=self._read_only or look_only)

    async def _export_name(self, name: bytes) -> None:
        volume = await self._open(name)
        # no await from here on: the connection owns the volume
        read_only = volume.read_only
        flags = export_flags(read_only=read_only, structured=self._structured)
        connection = self._connection
        connection.serve(volume, read_only=read_only, structured=self._structured, block_status=self._has_status(name))
        connection.send(protocol.export_name_reply(volume.info.size_bytes, flags, zeroes=self.zeroes))
        self._log(volume)

    async def _info(self, code: int, name: bytes, kinds: list[int]) -> None:
        volume = await self._open(name, look_only=code == Option.INFO)
        connection = self._connection
        info = volume.info
        read_only = self._read_only or info.snapshot
        if code == Option.GO:
            # no await from here on: the connection owns the volume
            connection.serve(
                volume, read_only=read_only, structured=self._structured, block_status=self._has_status(name)
            )
        else:
            with anyio.CancelScope(shield=True):
                await volume.aclose()
        flags = export_flags(read_only=read_only, structured=self._structured)
        replies = [protocol.export_info(code, info.size_bytes, flags), protocol.block_size_info(code)]
        if Info.NAME in kinds:
            replies.append(protocol.text_info(code, Info.NAME, encode(export_name(info))))
        if Info.DESCRIPTION in kinds:
            replies.append(protocol.text_info(code, Info.DESCRIPTION, encode(describe(info))))
        connection.send(b"".join(replies) + option_reply(code, Reply.ACK))
        if code == Option.GO:
            self._log(volume)

    async def _meta_context(self, code: int, name: bytes, queries: list[bytes]) -> None:
        volume = await self._open(name, look_only=True)
        with anyio.CancelScope(shield=True):
            await volume.aclose()
        wanted = BASE_ALLOCATION.encode() in queries
        if code == Option.LIST_META_CONTEXT:
            wanted = wanted or not queries or b"base:" in queries
        elif wanted:
            self._block_status_of = name
        reply = protocol.meta_context(code, BASE_ALLOCATION_ID, BASE_ALLOCATION) if wanted else b""
        self._connection.send(reply + option_reply(code, Reply.ACK))

    async def _list(self) -> None:
        exports = await list_exports(self._volumes)
        replies = [protocol.server_reply(encode(name), encode(description)) for name, description in exports]
        self._connection.send(b"".join(replies) + option_reply(Option.LIST, Reply.ACK))

    def _has_status(self, name: bytes) -> bool:
        return self._structured and self._block_status_of == name

    def _log(self, volume: Volume) -> None:
        logger.info("nbd client %s opened %s", self._connection.channel.remote, export_name(volume.info))
