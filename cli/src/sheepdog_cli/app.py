"""dog as a Typer application, made from the command table: shell completion, and the same commands for embedding.

``sheepdog_cli.dog`` runs without it, because importing Typer takes longer than most commands. Parsing is left to the
getopt rules of ``sheepdog_cli.getopt``, which scripts rely on; Typer provides the groups, the help of the whole, and
the protocol between shells and completion.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import typer
from typer.core import TyperCommand

from sheepdog_cli import complete, dog
from sheepdog_cli.table import COMMANDS, Command, families


class Item(NamedTuple):
    """A completion as Typer hands it to the shells. Typer carries its own click, so there is no class to import."""

    value: str
    help: str | None
    type: str = "plain"


class DogCommand(TyperCommand):
    """One subcommand. Its words go to dog's own parser as they are."""

    row: ClassVar[Command]

    # Any: the contexts and items of these three are of Typer's private click.

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.args = list(args)
        return []

    def invoke(self, ctx: Any) -> Any:
        sys.exit(dog.run(["dog", self.row.family, self.row.name, *ctx.args]))

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        return [Item(choice.value, choice.help or None) for choice in complete.choices(self.row, ctx.args, incomplete)]


def _no_action() -> None:
    """Never called: ``DogCommand.invoke`` takes its place."""


def build() -> typer.Typer:
    """The application, with one group per family of commands."""
    application = typer.Typer(name="dog", help="Sheepdog administrator utility", add_completion=True)
    for family in families():
        group = typer.Typer(name=family, help=f"{family} commands")
        for row in (one for one in COMMANDS if one.family == family):
            kind = type(f"{family.title()}{row.name.title().replace('-', '')}Command", (DogCommand,), {"row": row})
            group.command(row.name, cls=kind, help=row.help, add_help_option=False)(_no_action)
        application.add_typer(group)
    return application


def application(argv: Sequence[str] | None = None, prog_name: str = "dog") -> None:
    """Runs the application; ends the process.

    :param argv: the words without the program's name, those of the process by default.
    """
    build()(args=None if argv is None else list(argv), prog_name=prog_name)
