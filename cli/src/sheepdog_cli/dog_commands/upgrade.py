"""``dog upgrade``: single files of old releases in today's form. Needs no daemon.

Layouts of releases 0.7 and 0.8 (docs, on-disk layout, section 5, and data model, section 4): inodes had no reference
array, a table of child ids where ``btree_counter`` and unused bytes are now, and in 0.8 the counter at the end; node
records of epoch files are as today, except that some builds left out the 24 reserved bytes in front.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from sheepdog.errors import SheepdogError
from sheepdog_cli.dog_commands import upgrade_store
from sheepdog_cli.session import EXIT_FAILURE, EXIT_SYSTEM, EXIT_USAGE, Session, complain, fail
from sheepdog_cli.values import parse_oid

NODE_BYTES = 80
SHORT_NODE_BYTES = 56  # without the reserved bytes
TIME_BYTES = 8
CONFIG_BYTES = 40
CONFIG_VERSION = 6
OLD_CONFIG_VERSIONS = (2, 4)
DEFAULT_SHIFT = 22


def run(session: Session) -> None:
    tasks: dict[str, Callable[[Session], None]] = {
        "inode-convert": _inode,
        "epoch-convert": _epoch,
        "config-convert": _config,
        "object-location": _location,
        "store-convert": upgrade_store.convert,
    }
    tasks[session.command.name](session)


def _target(session: Session) -> str:
    path = session.argument(1)
    if not path:
        fail("please specify destination file path", EXIT_USAGE)
    return path


def _version(session: Session, what: str, code: int) -> str:
    version: str | None = session.options.get("orig-version")
    if version is None:
        fail(f"please specify original version of {what} file", code)
    return version


def _read(path: str, message: str) -> bytes:
    try:
        with open(path, "rb") as source:
            return source.read()
    except OSError as error:
        fail(f"{message}: {os.strerror(error.errno or 0)}", EXIT_SYSTEM)


def _write(path: str, data: bytes) -> None:
    try:
        with open(path, "wb") as target:
            target.write(data)
    except OSError as error:
        fail(f"failed to create {path}: {os.strerror(error.errno or 0)}", EXIT_SYSTEM)


def _inode(session: Session) -> None:
    from sheepdog.model.inode import (
        BTREE_COUNTER_OFFSET,
        HEADER_BYTES,
        INODE_BYTES,
        MAP_OFFSET,
        SHORT_INODE_BYTES,
        InodeHeader,
    )

    target = _target(session)
    version = _version(session, "inode", EXIT_FAILURE)
    old = _read(session.arguments[0], "failed to open original inode file")
    if len(old) < HEADER_BYTES:
        fail(f"failed to read original inode file: {os.strerror(0)}", EXIT_SYSTEM)
    if InodeHeader.unpack(old).is_snapshot:
        fail("snapshot cannot be converted", EXIT_USAGE)
    new = bytearray(INODE_BYTES)
    new[:BTREE_COUNTER_OFFSET] = old[:BTREE_COUNTER_OFFSET]
    if version == "v0.8":
        counter = old[SHORT_INODE_BYTES : SHORT_INODE_BYTES + 4].ljust(4, b"\0")
        new[BTREE_COUNTER_OFFSET : BTREE_COUNTER_OFFSET + 4] = counter
    entries = old[MAP_OFFSET:SHORT_INODE_BYTES]
    new[MAP_OFFSET : MAP_OFFSET + len(entries)] = entries
    _write(target, bytes(new))


def _epoch(session: Session) -> None:
    from sheepdog.model.node import unpack_nodes
    from sheepdog_cli.dog_commands.vdi_lock import node_text

    target = _target(session)
    _version(session, "epoch", EXIT_USAGE)
    old = _read(session.arguments[0], "failed to open epoch log file")
    records, time = old[:-TIME_BYTES], old[-TIME_BYTES:]
    if len(time) < TIME_BYTES or not records:
        fail("invalid epoch log file size", EXIT_SYSTEM)
    if len(records) % NODE_BYTES == 0:
        rows = [records[at + 24 : at + NODE_BYTES] for at in range(0, len(records), NODE_BYTES)]
    elif len(records) % SHORT_NODE_BYTES == 0:
        rows = [records[at : at + SHORT_NODE_BYTES] for at in range(0, len(records), SHORT_NODE_BYTES)]
    else:
        fail("invalid epoch log file size", EXIT_SYSTEM)
    new = b"".join(bytes(24) + row for row in rows)
    _write(target, new + time)
    complain("number of vnodes of each nodes:")
    for node in unpack_nodes(new):
        complain(f"\t{node_text(node.id)} == {node.vnodes}")
    complain("please supply the above numbers to sheeps with -V option")


def _config(session: Session) -> None:
    target = _target(session)
    old = _read(session.arguments[0], "failed to open config file")
    if len(old) != CONFIG_BYTES:
        fail(f"original config file has invalid size: {len(old)}", EXIT_USAGE)
    version = int.from_bytes(old[30:32], "little")
    if version not in OLD_CONFIG_VERSIONS:
        fail(f"unknown version config file: {version:x}", EXIT_USAGE)
    new = bytearray(old)
    if version == OLD_CONFIG_VERSIONS[0]:
        new[28] = 0  # erasure codes came later
    new[29] = DEFAULT_SHIFT
    new[30:32] = CONFIG_VERSION.to_bytes(2, "little")
    _write(target, bytes(new))


def _location(session: Session) -> None:
    from sheepdog.model.epochs import EpochRecord
    from sheepdog.model.node import mode_of_records
    from sheepdog.model.ring import Ring
    from sheepdog_cli.dog_commands.vdi_lock import node_text

    text = session.argument(1)
    oid = parse_oid(text) if text else None
    if oid is None:
        fail("please specify object id in hex format", EXIT_USAGE)
    path = session.arguments[0]
    try:
        with open(path, "rb") as source:
            raw = source.read()
        record = EpochRecord.unpack(raw, mode_of_records(raw[:-TIME_BYTES]))
        holders = Ring(record.nodes).holders(oid, 1)
    except (OSError, SheepdogError):
        holders = ()
    if not holders:
        fail(f"failed to construct vnode info from epoch file {path}", EXIT_SYSTEM)
    complain(node_text(holders[0].id))
