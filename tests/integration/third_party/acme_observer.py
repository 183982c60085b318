"""An observer that keeps a diary, in the file that the environment names."""

from __future__ import annotations

import os
from pathlib import Path

from sheepdog.api import Node, hookimpl

SHEEPDOG_API = (1, 0)


def _note(text: str) -> None:
    with Path(os.environ["ACME_DIARY"]).open("a") as diary:
        diary.write(text + "\n")


@hookimpl
def sheepdog_started(node: Node, epoch: int) -> None:
    _note(f"started {epoch}")
    raise RuntimeError("an observer that fails harms nobody")


@hookimpl
def sheepdog_epoch_changed(epoch: int, nodes: tuple[Node, ...]) -> None:
    _note(f"epoch {epoch} of {len(nodes)}")


@hookimpl
def sheepdog_stopped() -> None:
    _note("stopped")
