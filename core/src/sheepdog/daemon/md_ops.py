"""Disks of this sheep: what they are, and adding and removing them."""

from __future__ import annotations

import logging

from sheepdog.daemon.interfaces import Backend
from sheepdog.errors import SheepdogError
from sheepdog.wire.header import Request, Response
from sheepdog.wire.payloads import MD_INFO_BYTES, MdDisk, MdInfo, unpack_paths
from sheepdog.wire.results import Result

logger = logging.getLogger(__name__)


class DiskOperations:
    """MD_INFO, MD_PLUG, MD_UNPLUG."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def md_info(self, request: Request) -> Response:
        """MD_INFO; a gateway has no disks."""
        if request.data_length < MD_INFO_BYTES:
            return Response(Result.BUFFER_SMALL)
        store = self._backend.store
        disks = await self._backend.executor.run(store.disks) if store is not None else ()
        return Response(
            body=MdInfo(
                tuple(
                    MdDisk(index, disk.usage.free_bytes, disk.usage.used_bytes, disk.path)
                    for index, disk in enumerate(disks)
                )
            ).pack()
        )

    async def md_plug(self, request: Request) -> Response:
        """MD_PLUG: SUCCESS when at least one of the directories was added."""
        return await self._each(request, plug=True)

    async def md_unplug(self, request: Request) -> Response:
        """MD_UNPLUG: SUCCESS when at least one of the directories was removed."""
        return await self._each(request, plug=False)

    async def _each(self, request: Request, *, plug: bool) -> Response:
        changed = False
        for path in unpack_paths(request.body):
            try:
                await (self._backend.plug(path) if plug else self._backend.unplug(path))
                changed = True
            except SheepdogError as error:
                logger.warning("disk %s: %s", path, error)
        return Response(Result.SUCCESS if changed else Result.UNKNOWN)
