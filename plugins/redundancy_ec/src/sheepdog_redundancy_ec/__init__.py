"""Erasure coding: an object becomes d data strips and p parity strips, and any d of them are the object again.

The code is systematic Reed-Solomon over GF(2^8), byte for byte the one of the original (``galois`` builds its matrix).
Objects are cut into stripes of 512 bytes and every stripe into d strips, so a small write reads and writes little, and
a read of one sector touches one shard (``scheme``). The arithmetic is done by the fastest thing installed (``coders``):
ISA-L from the pyeclib wheel or from Debian, else zfec, else plain Python; all give the same bytes.
"""

from __future__ import annotations

from sheepdog.api import RedundancyFactory, hookimpl
from sheepdog_redundancy_ec.scheme import ErasureFactory

SHEEPDOG_API = (1, 0)


@hookimpl
def sheepdog_redundancy() -> RedundancyFactory:
    """Erasure coding with the fastest coder that is installed."""
    return ErasureFactory()
