"""Help texts of dog."""

from __future__ import annotations

from collections.abc import Sequence

from sheepdog_cli.getopt import Option
from sheepdog_cli.table import COMMANDS, Command, Nested, options_of

VERSION = "1.0.1+py"
COLUMN = 24
TRY = "Try 'dog --help' for more information."


def overview() -> str:
    """What ``dog --help`` prints."""
    lines = [
        f"Sheepdog administrator utility (version {VERSION})",
        "Usage: dog <command> <subcommand> [options]",
        "",
        "Available commands:",
    ]
    lines += [_row(f"{command.family} {command.name}", command.help) for command in COMMANDS]
    lines += ["", "For the options of a subcommand, try 'dog <command> <subcommand> --help'."]
    return "\n".join(lines) + "\n"


def family_commands(family: str) -> list[str]:
    return [f"Available {family} commands:"] + [f"  {family} {row.name}" for row in COMMANDS if row.family == family]


def usage(command: Command, nested: Sequence[Nested] = ()) -> str:
    """The usage block of a subcommand, ``nested`` being the nested words that were recognized."""
    options = options_of(command)
    inner = nested[-1].nested if nested else command.nested
    words = ["Usage: dog", command.family, command.name, *(word.name for word in nested)]
    if len(inner) == 1:
        words.append(inner[0].name)
    elif inner:
        words.append("{" + "|".join(word.name for word in inner) + "}")
    words += [_bracket(option) for option in options]
    if command.synopsis:
        words.append(command.synopsis)
    lines = [" ".join(words)]
    if inner:
        lines.append("Available subcommands:")
        lines += [_row(word.name, word.help) for word in inner]
    lines.append("Options:")
    lines += [_row(_names(option), option.help) for option in options]
    return "\n".join(lines) + "\n"


def _row(left: str, right: str) -> str:
    return f"  {left:<{COLUMN}}{right}"


def _names(option: Option) -> str:
    return f"-{option.letter}, --{option.name}" if option.letter else f"    --{option.name}"


def _bracket(option: Option) -> str:
    if not option.letter:
        return f"[--{option.name}]"
    return f"[-{option.letter} {option.name}]" if option.argument else f"[-{option.letter}]"
