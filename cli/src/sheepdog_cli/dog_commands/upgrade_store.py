"""``dog upgrade store-convert``: the objects of a stopped sheep, moved to where the other store looks for them.

Files are renamed inside their disk, so nothing is copied, and what was interrupted is finished by running it again. The
sheep then always opens the new store, whatever the cluster is formatted with (``node_config``); the other sheep of the
cluster need not be converted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from sheepdog.errors import ConfigError
from sheepdog_cli.session import EXIT_FAILURE, EXIT_SYSTEM, EXIT_USAGE, Session, complain, fail

STORES = ("plain", "tree")
META = "meta"


def place(store: str, oid: int) -> str:
    """The sub-directory in which that store keeps the object; empty for the disk directory itself."""
    from sheepdog.model.ids import is_attribute, is_inode, is_vmstate, vid_of

    if store == "plain":
        return ""
    return META if is_inode(oid) or is_attribute(oid) or is_vmstate(oid) else f"{vid_of(oid) & 0xFF:02x}"


def places(store: str) -> tuple[str, ...]:
    """All sub-directories of that store."""
    return (META, *(f"{low:02x}" for low in range(256))) if store == "tree" else ()


def convert(session: Session) -> None:
    """The arguments are PATH as given to ``sheep`` (BASE or BASE,DISK,...) and the name of the store."""
    from sheepdog.daemon.storedir import StoreDirectory, is_base, parse_path

    target = session.argument(1)
    if target not in STORES:
        fail(f"please specify the store to convert to: {' or '.join(STORES)}", EXIT_USAGE)
    path = parse_path(session.arguments[0])
    if not is_base(path.base):
        fail(f"{path.base} is not the directory of a sheep", EXIT_USAGE)
    for disk in path.disks:
        if not os.path.isdir(disk):
            fail(f"{disk} is not a directory", EXIT_USAGE)
    directory = StoreDirectory(path.base)
    try:
        directory.lock()
    except ConfigError as error:
        fail(str(error), EXIT_FAILURE)
    try:
        moved = 0
        for disk in path.disks:
            try:
                moved += convert_disk(disk, target)
            except OSError as error:
                fail(f"{disk}: {error.strerror}; run it again to go on", EXIT_SYSTEM)
        try:
            directory.write_node_config(target)
        except ConfigError as error:
            fail(str(error), EXIT_SYSTEM)
    finally:
        directory.unlock()
    complain(f"moved {moved} objects; the sheep uses the {target} store from its next start on")


def _objects(disk: str) -> Iterator[tuple[str, str, int]]:
    """(directory, file name, oid) of every live object, in either layout."""
    from sheepdog.builtin.filestore_disk import parse_file_name

    for directory in (disk, *(os.path.join(disk, name) for name in places("tree"))):
        try:
            names = sorted(os.listdir(directory))
        except FileNotFoundError:
            continue
        for name in names:
            parsed = parse_file_name(name)
            if parsed is not None and parsed[1] is None and os.path.isfile(os.path.join(directory, name)):
                yield directory, name, parsed[0].oid


def convert_disk(disk: str, target: str) -> int:
    """Every live object of the disk is where ``target`` looks for it; returns how many were moved. Survives power loss.

    :raises OSError: some were moved.
    """
    for name in places(target):
        os.makedirs(os.path.join(disk, name), 0o770, exist_ok=True)
    moved = 0
    for directory, name, oid in list(_objects(disk)):
        wanted = os.path.join(disk, place(target, oid)) if place(target, oid) else disk
        if directory != wanted:
            os.rename(os.path.join(directory, name), os.path.join(wanted, name))
            moved += 1
    for directory in (disk, *(os.path.join(disk, name) for name in places("tree"))):
        if not os.path.isdir(directory):
            continue
        if target == "plain" and directory != disk and not os.listdir(directory):
            os.rmdir(directory)
            continue
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    return moved
