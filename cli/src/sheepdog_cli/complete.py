"""What can follow on a command line: options, nested words, and names of volumes and tags asked from the cluster."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from typing import NamedTuple

from sheepdog_cli.getopt import Option
from sheepdog_cli.table import Command, Nested, options_of

VDIS_MAX = 1000  # a shell does not show more, and nobody waits for more
TIMEOUT_S = 2.0
_NAMES_FIRST = ("<vdiname>", "[vdiname]", "<src vdi>")


class Choice(NamedTuple):
    """One word that fits."""

    value: str
    help: str = ""


class Given(NamedTuple):
    """What the complete words say."""

    positionals: list[str]
    pending: Option | None  # the last word was an option that wants an argument
    options: dict[str, str]


def understand(words: Sequence[str], options: Sequence[Option]) -> Given:
    """The words by the rules of getopt, forgiving what is wrong."""
    letters = {option.letter: option for option in options if option.letter}
    names = {option.name: option for option in options}
    given: dict[str, str] = {}
    positionals: list[str] = []
    pending: Option | None = None
    for word in words:
        if pending is not None:
            given[pending.name] = word
            pending = None
        elif word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            option = names.get(name)
            if option is not None and option.argument and not equals:
                pending = option
            elif option is not None:
                given[option.name] = value
        elif word.startswith("-") and len(word) > 1:
            option = letters.get(word[1])
            if option is not None and option.argument and len(word) > 2:
                given[option.name] = word[2:]
            else:
                last = letters.get(word[-1])
                pending = last if last is not None and last.argument else None
        else:
            positionals.append(word)
    return Given(positionals, pending, given)


def choices(command: Command, words: Sequence[str], incomplete: str) -> list[Choice]:
    """Words that can stand where ``incomplete`` does. Empty when the shell should offer files."""
    options = options_of(command)
    given = understand(words, options)
    if given.pending is not None:
        return _argument_choices(command, given.pending, given, incomplete)
    if incomplete.startswith("-"):
        found = [Choice(f"--{option.name}", option.help.split("\n")[0]) for option in options]
        if not incomplete.startswith("--"):
            found += [Choice(f"-{option.letter}", option.help.split("\n")[0]) for option in options if option.letter]
        return _fitting(found, incomplete)
    inner: tuple[Nested, ...] = command.nested
    positionals = list(given.positionals)
    while inner and positionals:
        chosen = next((word for word in inner if word.name == positionals[0]), None)
        if chosen is None:
            return []
        del positionals[0]
        inner = chosen.nested
    if inner:
        return _fitting([Choice(word.name, word.help) for word in inner], incomplete)
    if command.family == "node" and command.name == "log":
        from sheepdog_cli.dog_commands.node_log import LEVELS

        return _fitting([Choice(name) for name in LEVELS], incomplete)
    saved = command.family == "cluster" and command.name == "snapshot" and len(positionals) >= 2
    if saved or (not positionals and command.synopsis.startswith(_NAMES_FIRST) and given.positionals != ["dump-inode"]):
        names = dict.fromkeys(name for name, _ in _vdis(given))
        return _fitting([Choice(name) for name in names], incomplete)
    return []


def _argument_choices(command: Command, option: Option, given: Given, incomplete: str) -> list[Choice]:
    if option.name in ("snapshot", "from"):
        words = [word for word in given.positionals if word not in {nested.name for nested in command.nested}]
        tags = [tag for name, tag in _vdis(given) if tag and (not words or name == words[0])]
        return _fitting([Choice(tag) for tag in dict.fromkeys(tags)], incomplete)
    if option.name == "store":
        from sheepdog_cli.sheep_options import installed

        return _fitting([Choice(name) for name in installed("store")], incomplete)
    if option.name == "block_size_shift":
        return _fitting([Choice(str(shift)) for shift in range(20, 32)], incomplete)
    return []


def _fitting(found: list[Choice], incomplete: str) -> list[Choice]:
    return [choice for choice in found if choice.value.startswith(incomplete)]


def _vdis(given: Given) -> list[tuple[str, str]]:
    """(name, tag) of the cluster's vdis; nothing when it cannot be asked. A completion never complains."""
    from sheepdog.client import admin, volume
    from sheepdog.client.connection import Connection, format_address, open_socket
    from sheepdog.errors import SheepdogError
    from sheepdog.model.ids import inode_oid
    from sheepdog.model.inode import FIELDS_BYTES, InodeHeader

    host = given.options.get("address") or os.environ.get("SHEEPDOG_DOG_ADDR") or "127.0.0.1"
    port = given.options.get("port") or os.environ.get("SHEEPDOG_DOG_PORT") or "7000"
    found: list[tuple[str, str]] = []
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            stream = open_socket(format_address(host, int(port)))
            stream.settimeout(TIMEOUT_S)
            with Connection("", connect=lambda _: stream) as connection:
                for vid in admin.used_vids(connection.request)[:VDIS_MAX]:
                    header = InodeHeader.unpack(volume.read_object(connection.request, inode_oid(vid), FIELDS_BYTES))
                    if header.name:
                        found.append((os.fsdecode(header.name), os.fsdecode(header.tag)))
        except (SheepdogError, OSError, ValueError):
            pass  # what was found so far is still right
    return found
