"""Object store with all objects of a disk in one flat directory: ``sheep --store plain``, the original's default."""

from __future__ import annotations

from sheepdog.api import FileStore, Layout, ObjectStore, StoreOptions, hookimpl

SHEEPDOG_API = (1, 0)


class PlainLayout(Layout):
    """Every file lies in the disk directory itself."""

    def directory(self, oid: int) -> str:
        return ""

    def directories(self) -> tuple[str, ...]:
        return ("",)


@hookimpl
def sheepdog_object_store(options: StoreOptions) -> ObjectStore:
    """The store on ``options.disks``.

    :raises ConfigError: none of the disks is usable.
    """
    return FileStore(options, PlainLayout())
