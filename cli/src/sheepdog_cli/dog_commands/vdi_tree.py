"""``dog vdi tree`` and ``dog vdi graph``: who was made from whom."""

from __future__ import annotations

import sys
import time

from sheepdog.model.inode import InodeHeader
from sheepdog_cli.dog_commands.vdi_walk import walk
from sheepdog_cli.output import print_json
from sheepdog_cli.session import Session, name_text, pad
from sheepdog_cli.sizes import format_size

HERE = "(you are here)"
BOLD, PLAIN = "\033[1m", "\033[0m"


class Branch:
    """A vdi and those made from it under the same name."""

    __slots__ = ("children", "header")

    def __init__(self, header: InodeHeader) -> None:
        self.header = header
        self.children: list[Branch] = []


def run(session: Session) -> None:
    if session.command.name == "graph":
        _graph(session)
        return
    roots = grow([walked.header for walked in walk(session)])
    if session.options.json:
        print_json([_document(root) for root in roots])
        return
    bold = sys.stdout.isatty()
    for root in roots:
        lines: list[str] = []
        name = name_text(root.header.name)
        _draw(root, " " * (len(name) + 1) + "  ", lines, name + "---", bold)
        sys.stdout.write("".join(line + "\n" for line in lines))


def grow(headers: list[InodeHeader]) -> list[Branch]:
    """The trees, in the order of the headers. A parent counts only if it has the same name."""
    branches = {header.vdi_id: Branch(header) for header in headers}
    roots = []
    for branch in branches.values():
        parent = branches.get(branch.header.parent_vdi_id)
        if parent is None or parent is branch or parent.header.name != branch.header.name:
            roots.append(branch)
        else:
            parent.children.append(branch)
    return roots


def _draw(branch: Branch, indent: str, lines: list[str], line: str, bold: bool) -> None:
    """The lines of the branch; ``line`` is what stands before its label, ``indent`` what stands below that."""
    if branch.header.is_snapshot:
        label = shown = time.strftime("[%Y-%m-%d %H:%M]", time.localtime(branch.header.create_time >> 32))
    else:
        label, shown = HERE, f"{BOLD}{HERE}{PLAIN}" if bold else HERE
    line += shown
    below = indent + " " * (len(label) + 1)
    last = len(branch.children) - 1
    if last < 0:
        lines.append(line)
    for at, child in enumerate(branch.children):
        if at == 0:
            start = line + ("---" if last == 0 else "-+-")
        else:
            start = below + ("`-" if at == last else "|-")
        _draw(child, below + ("  " if at == last else "| "), lines, start, bold)


def _document(branch: Branch) -> dict[str, object]:
    header = branch.header
    return {
        "name": name_text(header.name),
        "vid": f"{header.vdi_id:x}",
        "snapshot": header.is_snapshot,
        "tag": name_text(header.tag),
        "created": header.create_time >> 32,
        "children": [_document(child) for child in branch.children],
    }


def _graph(session: Session) -> None:
    out = sys.stdout.write
    out('digraph G {\n  node [shape = "box", fontname = "Courier"];\n\n')
    out('  "0" [shape = "ellipse", label = "root"];\n\n')
    for walked in walk(session):
        out(_node(walked.header))
    out("}\n")


def _node(header: InodeHeader) -> str:
    created = time.localtime(header.create_time >> 32)
    name = name_text(header.name)
    snap_id = header.snap_id if header.is_snapshot else 0
    label = (
        f"Name: {pad(name, -10)}\\n"
        f"Tag:  {snap_id:10x}\\n"
        f"Size: {format_size(header.vdi_size):>10}\\n"
        f"Date: {time.strftime('%Y-%m-%d', created):>10}\\n"
        f"Time: {time.strftime('%H:%M:%S', created):>10}"
    )
    color = "" if header.is_snapshot else ',\n    color="red"'
    return (
        f'  "{header.parent_vdi_id:x}" -> "{header.vdi_id:x}";\n'
        f'  "{header.vdi_id:x}" [\n'
        f'    group = "{name}",\n'
        f'    label = "{label}"{color}\n'
        "  ];\n\n"
    )
