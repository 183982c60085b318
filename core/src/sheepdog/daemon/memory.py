"""What the C library does with memory that was freed.

Each request for a large object takes a buffer of megabytes for a moment. By default the C library gets such a buffer
from the kernel and gives it back at once, so every 4 KiB of it cost a page fault and a page that the kernel has to
clear: measured, as much as all else that a read of 4 MiB costs. Told to keep what was freed, it hands out the same
memory again. A sheep that rests gives it back.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Final

logger = logging.getLogger(__name__)

_TRIM_THRESHOLD: Final = -1  # numbers of parameters, from glibc's <malloc.h>
_MMAP_THRESHOLD: Final = -3
LARGE_BYTES: Final = 32 << 20  # the largest that every glibc takes: larger buffers come from the kernel, and go there
KEPT_BYTES: Final = 128 << 20  # free memory at the end of the heap beyond this goes back at once


def keep_freed() -> None:
    """Memory that is freed from now on is kept for what comes next. Of no effect with another C library than glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        logger.debug("this C library keeps no memory on request")
        return
    mallopt(_MMAP_THRESHOLD, LARGE_BYTES)
    mallopt(_TRIM_THRESHOLD, KEPT_BYTES)


def give_back() -> None:
    """What was kept, and is not in use, goes back to the kernel."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)
