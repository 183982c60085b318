"""``dog plugin list``: what is installed here, without importing any of it."""

from __future__ import annotations

import sys

from sheepdog_cli.output import print_json
from sheepdog_cli.session import Session

HEADING = ("Kind", "Name", "Distribution", "Version", "State")


def run(session: Session) -> None:
    from sheepdog.plugins import list_plugins

    found = list_plugins()
    rows = [(row.kind, row.name, row.distribution, row.version, row.state) for row in found]
    if session.options.json:
        print_json([dict(zip((word.lower() for word in HEADING), row, strict=True)) for row in rows])
        return
    if session.options.raw:
        sys.stdout.write("".join(" ".join(map(str, row)) + "\n" for row in rows))
        return
    table = [HEADING, *[tuple(map(str, row)) for row in rows]]
    widths = [max(len(row[at]) for row in table) for at in range(len(HEADING))]
    for row in table:
        line = "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True))
        sys.stdout.write(line.rstrip() + "\n")
