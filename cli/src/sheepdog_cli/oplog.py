"""The operation log: who did what with dog."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from sheepdog_cli.session import complain


def log_invocation(argv: Sequence[str]) -> None:
    """The command line was recorded in the file that ``SHEEPDOG_DOG_LOG_PATH`` names, else in the system log."""
    words = "".join(" " + word for word in argv)
    path = os.environ.get("SHEEPDOG_DOG_LOG_PATH")
    if path is None:
        import syslog

        syslog.openlog("sheepdog admin operation", syslog.LOG_PID, syslog.LOG_USER)
        syslog.syslog(syslog.LOG_INFO, words.strip())
        syslog.closelog()
        return
    line = time.strftime("%Y %b %e %H:%M:%S : ") + words + "\n"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(handle, os.fsencode(line))
        finally:
            os.close(handle)
    except OSError as error:
        complain(f"error at opening log file of dog({path}): {os.strerror(error.errno or 0)}")
