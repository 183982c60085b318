"""``dog node info``: the space of every node."""

from __future__ import annotations

import sys

from sheepdog.client import admin
from sheepdog.errors import RequestError, TransportError
from sheepdog_cli.dog_commands.vdi_walk import walk
from sheepdog_cli.output import print_json
from sheepdog_cli.session import EXIT_SYSTEM, Session, fail
from sheepdog_cli.sizes import format_size


def percent(used: int, size: int) -> int:
    """Truncated; 0 of nothing."""
    return used * 100 // size if size else 0


def run(session: Session) -> None:
    raw = session.options.raw
    as_json = session.options.json
    out = sys.stdout.write
    if not (raw or as_json):
        out("Id\tSize\tUsed\tAvail\tUse%\n")
    documents = []
    total_size = total_free = shown = 0
    for node in session.nodes:
        try:
            space = admin.node_space(session.simple(admin.OP_STAT_SHEEP, node=node))
        except (RequestError, TransportError):
            continue
        if as_json:
            documents.append(
                {"id": shown, "host": node.id.host, "port": node.id.port, "size": space.size, "free": space.free}
            )
        else:
            out(f"{shown if raw else f'{shown:2d}'}" + _columns(space.size, space.free, raw) + "\n")
        sys.stdout.flush()
        shown += 1
        total_size += space.size
        total_free += space.free
    if not shown:
        fail("Cannot get information from any nodes", EXIT_SYSTEM)
    virtual = sum(walked.header.vdi_size for walked in walk(session) if not walked.header.is_snapshot)
    if as_json:
        print_json({"nodes": documents, "total": {"size": total_size, "free": total_free}, "virtual_size": virtual})
    elif raw:
        out(f"Total{_columns(total_size, total_free, True)} {virtual}\n")
    else:
        out(f"Total{_columns(total_size, total_free, False)}\n\n")
        out(f"Total virtual image size\t{format_size(virtual)}\n")


def _columns(size: int, free: int, raw: bool) -> str:
    used = size - free
    if raw:
        return f" {size} {used} {free} {percent(used, size)}%"
    sizes = "".join(f"\t{format_size(number)}" for number in (size, used, free))
    return f"{sizes}\t{percent(used, size):3d}%"
