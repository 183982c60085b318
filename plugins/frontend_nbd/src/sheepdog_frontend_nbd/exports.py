"""Export names: every volume by its name, every snapshot as ``name@tag`` or ``name@id``.

A name that is a volume's is that volume, whatever at signs it has; otherwise what follows the last one names a
snapshot. A decimal number is a snapshot id first and a tag second, as QEMU reads it.
"""

from __future__ import annotations

from collections.abc import Sequence

from sheepdog.api import TagNotFound, VdiNotFound, Volume, VolumeInfo, Volumes


def decode(name: bytes) -> str:
    """An export name as text; bytes that are no UTF-8 survive the way back."""
    return name.decode("utf-8", "surrogateescape")


def encode(name: str) -> bytes:
    """An export name as bytes."""
    return name.encode("utf-8", "surrogateescape")


def export_name(info: VolumeInfo) -> str:
    """The name under which a volume or snapshot is offered: one by which ``open_export`` finds it again."""
    if not info.snapshot:
        return info.name
    clear = info.tag and "@" not in info.tag and not info.tag.isdecimal()  # else it reads as an id, or is cut elsewhere
    return f"{info.name}@{info.tag if clear else info.snap_id}"


def describe(info: VolumeInfo) -> str:
    """A line for people."""
    size = f"{info.size_bytes} bytes in objects of {info.object_bytes}"
    return f"snapshot {info.snap_id} of {info.name}, {size}" if info.snapshot else f"volume {info.vid:x}, {size}"


async def list_exports(volumes: Volumes) -> Sequence[tuple[str, str]]:
    """(name, description) of everything that can be opened."""
    return [(export_name(info), describe(info)) for info in await volumes.list()]


async def open_export(volumes: Volumes, name: str, *, read_only: bool) -> Volume:
    """The volume or snapshot of that export name.

    :raises VdiNotFound: no such volume.
    :raises TagNotFound: no such snapshot.
    :raises SheepdogError: it cannot be opened.
    """
    try:
        return await volumes.open(name, read_only=read_only)
    except VdiNotFound:
        base, at, snapshot = name.rpartition("@")
        if not at or not base or not snapshot:
            raise
    if snapshot.isascii() and snapshot.isdecimal() and 0 < int(snapshot) < 1 << 32:
        try:
            return await volumes.open(base, snapshot=int(snapshot))
        except (TagNotFound, VdiNotFound):
            pass  # then it may be a tag
    return await volumes.open(base, snapshot=snapshot)
