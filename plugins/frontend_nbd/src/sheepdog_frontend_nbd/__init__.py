"""Serves volumes over the Network Block Device protocol: ``sheep --nbd [host:]port`` or ``--nbd unix:PATH``."""

from __future__ import annotations

from sheepdog.api import FrontEnd, hookimpl

SHEEPDOG_API = (1, 0)


@hookimpl
def sheepdog_frontend(options: str) -> FrontEnd:
    """An NBD server; ``options`` as docs/nbd.md tells.

    :raises ConfigError: the options make no sense.
    """
    # Imported late: listing plugins must not pay for a server.
    from sheepdog_frontend_nbd.options import parse
    from sheepdog_frontend_nbd.server import NbdFrontEnd

    return NbdFrontEnd(parse(options))
