"""``dog node format``: the preferred store driver of a node, written while it is down."""

from __future__ import annotations

import os

from sheepdog_cli.session import EXIT_SYSTEM, Session, fail, misuse

STORES = ("plain", "tree")
CONFIG_NAME = "node_config"
CONFIG_BYTES = 16


def run(session: Session) -> None:
    store = session.argument(1)
    if not store:
        misuse("specify store format")
    if store not in STORES:
        fail("expected store format: " + ", ".join(STORES), EXIT_SYSTEM)
    path = os.path.join(session.arguments[0], CONFIG_NAME)
    try:
        os.stat(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        fail(f"failed to check existence of config ({path}): {os.strerror(error.errno or 0)}", EXIT_SYSTEM)
    else:
        fail(f"config file already exists: {path}", EXIT_SYSTEM)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o660)
        try:
            os.write(handle, store.encode().ljust(CONFIG_BYTES, b"\0"))
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        fail(f"failed to create a config file ({path}): {os.strerror(error.errno or 0)}", EXIT_SYSTEM)
