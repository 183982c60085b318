"""Object store with objects in sub-directories by volume: ``sheep --store tree``.

Directories stay small, and listing the metadata of all volumes touches ``meta`` alone.
"""

from __future__ import annotations

from sheepdog.api import (
    FileStore,
    Layout,
    ObjectStore,
    StoreOptions,
    hookimpl,
    is_attribute,
    is_inode,
    is_vmstate,
    vid_of,
)

SHEEPDOG_API = (1, 0)

_META = "meta"
_BY_VID = tuple(f"{low:02x}" for low in range(256))


class TreeLayout(Layout):
    """``meta`` for inodes, attributes and VM state; ``00`` to ``ff``, the low byte of the vid, for everything else."""

    def directory(self, oid: int) -> str:
        if is_inode(oid) or is_attribute(oid) or is_vmstate(oid):
            return _META
        return _BY_VID[vid_of(oid) & 0xFF]

    def directories(self) -> tuple[str, ...]:
        return (_META, *_BY_VID)


@hookimpl
def sheepdog_object_store(options: StoreOptions) -> ObjectStore:
    """The store on ``options.disks``.

    :raises ConfigError: none of the disks is usable.
    """
    return FileStore(options, TreeLayout())
