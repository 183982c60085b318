"""The ``dog`` command: finds the subcommand, parses its options, runs it.

Nothing is imported that the subcommand does not need: a listing is over before a command-line framework would have been
loaded. The Typer application (``sheepdog_cli.app``) is made from the same table and serves shell completion.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING

from sheepdog.client.connection import DEFAULT_HOST, DEFAULT_PORT, open_socket
from sheepdog_cli import values
from sheepdog_cli.getopt import POSITIONAL, GetoptError, getopt
from sheepdog_cli.session import (
    EXIT_FAILURE,
    EXIT_SUCCESS,
    EXIT_SYSTEM,
    EXIT_USAGE,
    Options,
    Quit,
    Session,
    Usage,
    complain,
)
from sheepdog_cli.table import Command, Nested, families, find, options_of
from sheepdog_cli.usage import TRY, family_commands, overview, usage

if TYPE_CHECKING:
    import socket

COMPLETION_VARIABLE = "_DOG_COMPLETE"
_COMPLETION_OPTIONS = ("--install-completion", "--show-completion")


def main() -> None:
    """The console script: ends the process with dog's exit code."""
    if COMPLETION_VARIABLE in os.environ or (len(sys.argv) > 1 and sys.argv[1].startswith(_COMPLETION_OPTIONS)):
        from sheepdog_cli.app import application

        application(prog_name="dog")
        return
    for stream in (sys.stdout, sys.stderr):
        # Names are bytes; those that are no text must come out as they went in.
        stream.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]  # text streams of a process have it
    try:
        code = run(sys.argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output left. Python would complain once more while it shuts down.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_SYSTEM
    except KeyboardInterrupt:
        code = 130
    sys.stderr.flush()
    sys.exit(code)


def run(argv: Sequence[str], connect: Callable[[str], socket.socket] = open_socket) -> int:
    """Runs one command line and returns its exit code.

    :param argv: the program's name and the words.
    :param connect: makes the sockets; tests pass a scripted one.
    """
    if os.environ.get("SHEEPDOG_DOG_LOG") is not None:
        from sheepdog_cli.oplog import log_invocation

        log_invocation(argv)
    words = list(argv[1:])
    if not words or words[0] in ("help", "--help", "-h"):
        sys.stdout.write(overview())
        return EXIT_SUCCESS
    family = words[0]
    if family not in families():
        complain(f"Invalid command '{family}'")
        complain(TRY)
        return EXIT_USAGE
    name = words[1] if len(words) > 1 else "help"
    command = find(family, name)
    if command is None:
        if name != "help":
            complain(f"Invalid command '{family} {name}'")
        for line in family_commands(family):
            complain(line)
        return EXIT_USAGE
    nested: list[Nested] = []
    try:
        return _run_command(_as_typed(argv[0]), command, nested, words[2:], connect)
    except Usage as misused:
        sys.stdout.write(usage(command, nested))
        return misused.code
    except Quit as quit_:
        return quit_.code


def _run_command(
    program: str,
    command: Command,
    nested: list[Nested],
    words: Sequence[str],
    connect: Callable[[str], socket.socket],
) -> int:
    options = Options()
    arguments: list[str] = []
    try:
        for option, text in getopt(program, words, options_of(command)):
            if option is POSITIONAL:
                arguments.append(text)
            elif option.name == "help":
                raise Usage(EXIT_SUCCESS)
            else:
                values.apply(options, command.family, option.letter, option.name, text)
    except GetoptError as error:
        complain(str(error))
        complain(TRY)
        return EXIT_USAGE
    if command.needs_argument and not arguments:
        raise Usage
    nodes = command.nodes
    inner = command.nested
    while inner and arguments:
        chosen = next((word for word in inner if word.name == arguments[0]), None)
        if chosen is None:
            raise Usage(EXIT_FAILURE)
        nested.append(chosen)
        del arguments[0]
        if chosen.needs_argument and not (arguments and arguments[0]):
            raise Usage
        nodes = nodes or chosen.nodes
        inner = chosen.nested
    session = Session(
        command,
        nested,
        options,
        arguments,
        options.get("address") or _default_host(),
        options.get("port") or _default_port(),
        connect,
    )
    try:
        return _timed(session, nodes)
    finally:
        session.close()


def _as_typed(program: str) -> str:
    """The program's name as it was typed: an interpreter is told the path even when the shell looked the name up."""
    directory, name = os.path.split(program)
    return name if directory in os.environ.get("PATH", "").split(os.pathsep) else program


def _timed(session: Session, nodes: bool) -> int:
    started = 0.0
    if session.options.time:
        import time

        started = time.monotonic()
    if nodes:
        session.load_nodes()
    module = import_module(f"sheepdog_cli.dog_commands.{session.command.module}")
    entry: Callable[[Session], int | None] = module.run
    code = entry(session)
    if session.options.time:
        sys.stdout.write(f"\nElapsed time: {time.monotonic() - started:.3f} seconds\n")
    return code or EXIT_SUCCESS


def _default_host() -> str:
    text = os.environ.get("SHEEPDOG_DOG_ADDR")
    return DEFAULT_HOST if text is None else values.resolve(text)


def _default_port() -> int:
    text = os.environ.get("SHEEPDOG_DOG_PORT")
    return DEFAULT_PORT if text is None else values.parse_port(text)


if __name__ == "__main__":
    main()
