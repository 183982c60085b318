"""``dog node list``: the members of the cluster."""

from __future__ import annotations

import sys

from sheepdog.model.node import VnodeMode
from sheepdog_cli.output import print_json
from sheepdog_cli.session import Session


def run(session: Session) -> None:
    if session.options.json:
        print_json(
            [
                {
                    "id": index,
                    "host": node.id.host,
                    "port": node.id.port,
                    "vnodes": node.vnodes,
                    "zone": node.zone,
                    "space": node.space,
                }
                | ({"disks": len(node.disks)} if session.mode is VnodeMode.DISK else {})
                for index, node in enumerate(session.nodes)
            ]
        )
        return
    lines = []
    if not session.options.raw:
        lines.append("  Id   Host:Port         V-Nodes       Zone")
    for index, node in enumerate(session.nodes):
        if session.options.raw:
            lines.append(f"{index} {node.id.text} {node.vnodes} {node.zone}")
        else:
            lines.append(f"{index:4d}   {node.id.text:<20}\t{node.vnodes:2d}{node.zone:11d}")
    sys.stdout.write("".join(line + "\n" for line in lines))
