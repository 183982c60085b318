"""A store that keeps the objects of each volume in a directory of their own."""

from __future__ import annotations

from sheepdog.api import FileStore, Layout, ObjectStore, StoreOptions, hookimpl, vid_of

SHEEPDOG_API = (1, 0)


class ByVolume(Layout):
    def directory(self, oid: int) -> str:
        return f"v{vid_of(oid) % 16:x}"

    def directories(self) -> tuple[str, ...]:
        return tuple(f"v{number:x}" for number in range(16))


@hookimpl
def sheepdog_object_store(options: StoreOptions) -> ObjectStore:
    return FileStore(options, ByVolume())
