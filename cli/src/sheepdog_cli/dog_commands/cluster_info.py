"""``dog cluster info``: status, defaults, and the members of every epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from sheepdog.client import admin
from sheepdog.errors import RequestError, TransportError
from sheepdog.model.epochs import EpochLogEntry
from sheepdog.model.node import Node, VnodeMode
from sheepdog_cli.output import print_json
from sheepdog_cli.session import EXIT_SYSTEM, RESULT_SUCCESS, Quit, Session, describe
from sheepdog_cli.values import format_redundancy


def run(session: Session) -> None:
    try:
        slots = len(session.nodes)
        stat = admin.epoch_log(session.call, epoch=session.epoch, node_slots=slots, mode=session.mode)
    except (TransportError, RequestError):
        raise Quit(EXIT_SYSTEM) from None
    newest = stat.entries[0] if stat.entries else None
    if stat.result == RESULT_SUCCESS:
        disabled = newest is not None and newest.disable_recovery
        status = "running, auto-recovery " + ("disabled" if disabled else "enabled")
    else:
        status = describe(stat.result)
    if session.options.json:
        _print_json(stat, status, session.mode is VnodeMode.DISK)
        return
    raw = session.options.raw
    out = sys.stdout.write
    label = (lambda text: "") if raw else (lambda text: text)
    out(label("Cluster status: ") + status + "\n")
    if session.options.verbose:
        _verbose(stat.result, newest, status, raw)
    else:
        out("\n")
    if newest is None:
        return
    if not raw:
        out(f"Cluster created at {time.asctime(time.localtime(newest.ctime >> 32))}\n\n")
        out("Epoch Time           Version [Host:Port:V-Nodes,,,]\n")
    by_disk = session.mode is VnodeMode.DISK
    for at, entry in enumerate(stat.entries):
        if "diff" in session.options:
            older = stat.entries[at + 1] if at + 1 < len(stat.entries) else None
            content = _difference(entry, older)
        else:
            content = ", ".join(f"{node.id.text}:{node.vnodes}{_disks(node, by_disk)}" for node in entry.nodes)
        if raw:
            out(f"{entry.time} {entry.epoch} [{content}]\n")
        else:
            when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.time))
            out(f"{when} {entry.epoch:6d} [{content}]\n")


def _verbose(result: int, newest: EpochLogEntry | None, status: str, raw: bool) -> None:
    out = sys.stdout.write
    label = (lambda text: "") if raw else (lambda text: text)
    if result != RESULT_SUCCESS or newest is None:
        out(label("Cluster store: ") + status + "\n")
    else:
        copies = format_redundancy(newest.copies, newest.copy_policy)
        out(label("Cluster store: ") + f"{newest.store} with {copies} redundancy policy\n")
        strategy = "auto" if newest.flags & admin.FLAG_AUTO_VNODES else "fixed"
        out(label("Cluster vnodes strategy: ") + strategy + "\n")
    mode = "disk" if newest is not None and newest.flags & admin.FLAG_DISK_MODE else "node"
    out(label("Cluster vnode mode: ") + mode + "\n")


def _disks(node: Node, by_disk: bool) -> str:
    """The number of disks, where vnodes belong to them."""
    return f"({len(node.disks)})" if by_disk else ""


def _difference(entry: EpochLogEntry, older: EpochLogEntry | None) -> str:
    if older is None:
        return "formated" if entry.epoch == 1 else ""
    before = {node.id for node in older.nodes}
    after = {node.id for node in entry.nodes}
    changes = [f"+{node.id.text}" for node in entry.nodes if node.id not in before]
    changes += [f"-{node.id.text}" for node in older.nodes if node.id not in after]
    return ", ".join(changes)


def _print_json(stat: admin.ClusterStat, status: str, by_disk: bool) -> None:
    entries: Sequence[EpochLogEntry] = stat.entries
    document: dict[str, object] = {"status": status, "result": stat.result, "epoch": stat.epoch}
    if entries:
        newest = entries[0]
        document |= {
            "created": newest.ctime >> 32,
            "auto_recovery": not newest.disable_recovery,
            "store": newest.store,
            "redundancy": format_redundancy(newest.copies, newest.copy_policy),
            "vnodes": "auto" if newest.flags & admin.FLAG_AUTO_VNODES else "fixed",
            "vnode_mode": "disk" if newest.flags & admin.FLAG_DISK_MODE else "node",
            "strict": bool(newest.flags & admin.FLAG_STRICT),
            "locking": bool(newest.flags & admin.FLAG_USE_LOCK),
        }
    document["epochs"] = [
        {
            "epoch": entry.epoch,
            "time": entry.time,
            "nodes": [
                {"host": node.id.host, "port": node.id.port, "vnodes": node.vnodes, "zone": node.zone}
                | ({"disks": len(node.disks)} if by_disk else {})
                for node in entry.nodes
            ],
        }
        for entry in entries
    ]
    print_json(document)
