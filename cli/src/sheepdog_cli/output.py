"""Prompts, the progress bar, and JSON documents."""

from __future__ import annotations

import sys
from typing import Any

from sheepdog_cli.session import Quit
from sheepdog_cli.sizes import format_size

QUESTION = "Are you sure you want to continue? [yes/no]: "

# Five lines of nine columns: a dog that looks at you.
_DOG = (
    "   __",
    "o-''|\\_",
    " \\_/|_)",
    "    |",
    " WW |'",
)
_DOG_COLUMNS = 9


def confirm(prompt: str) -> None:
    """The prompt was answered with yes.

    :raises Quit: with code 0, on any other answer and at the end of stdin.
    """
    sys.stdout.write(prompt)
    sys.stdout.flush()
    try:
        answer = sys.stdin.readline()
    except UnicodeDecodeError:
        answer = ""
    if not answer.lower().startswith("yes"):
        raise Quit(0)


def confirm_banner(*sentences: str) -> None:
    """As ``confirm``, below a drawing with the sentences beside it; the last stands on the fourth line.

    :raises Quit: as ``confirm``.
    """
    texts = [""] * (4 - len(sentences)) + list(sentences) + [QUESTION]
    rows = [drawn.ljust(_DOG_COLUMNS) + text for drawn, text in zip(_DOG, texts, strict=True)]
    confirm("\n".join([row.rstrip() for row in rows[:-1]] + rows[-1:]))


def print_json(document: Any) -> None:  # Any: what json can write
    """One JSON document on stdout."""
    import json

    json.dump(document, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def print_bytes(data: bytes | bytearray | memoryview) -> None:
    """Raw bytes on stdout, after all text before."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)


class Progress:
    """A bar on the terminal; nothing at all when nobody looks there."""

    def __init__(self, total: int, *, count: bool = False, data_on_stdout: bool = False) -> None:
        """:param count: the numbers are objects, not bytes.
        :param data_on_stdout: stdout gets the data that is moved, so the bar goes to stderr; and nowhere if the data is
            shown on a terminal.
        """
        self.total = total
        self.done = 0
        self._count = count
        self._stream = sys.stderr if data_on_stdout else sys.stdout
        self._shown = sys.stdout.isatty() != data_on_stdout and self._stream.isatty()
        self._open = False  # the line was begun and not ended

    def advance(self, amount: int) -> None:
        self.set(self.done + amount)

    def set(self, done: int) -> None:
        """``done`` of ``total``; the line ends when both are equal."""
        if self.done == done == self.total:
            return  # shown, and the line ended
        self.done = done
        if not self._shown or not self.total:
            return
        import shutil

        columns = shutil.get_terminal_size((80, 24)).columns
        cells = max(columns - 30, 1)
        filled = min(cells, cells * done // self.total)
        bar = ("=" * filled + ">").ljust(cells)[:cells] if filled < cells else "=" * cells
        text = f"{done * 100 / self.total:5.1f} % [{bar}] {self._text(done)} / {self._text(self.total)}"
        self._open = done != self.total
        self._stream.write("\r" + text.ljust(columns) + ("" if self._open else "\n"))
        self._stream.flush()

    def end(self) -> None:
        """Nothing more comes: the line ends, also where less was moved than had been expected."""
        if self._open:
            self._open = False
            self._stream.write("\n")
            self._stream.flush()

    def _text(self, amount: int) -> str:
        return str(amount) if self._count else format_size(amount)
