"""Shared by the tests of the file store."""

import os
import time

from sheepdog.contracts.store import ShardKey
from sheepdog.model.ids import data_oid

KEYS = [ShardKey(data_oid(vid, index)) for vid in (1, 2) for index in range(16)]


def files(path):
    """Relative paths of all files below, stale area included."""
    return sorted(os.path.relpath(os.path.join(base, name), path) for base, _, names in os.walk(path) for name in names)


def place(path, key):
    """The path of the live file below one disk, wherever the layout has put it."""
    name = f"{key.oid:016x}"
    found = [file for file in files(path) if os.path.basename(file) == name]
    assert len(found) <= 1
    return path / found[0] if found else None


def run_in_child(work):
    """``work()`` in a forked process; its exit status. A crash there is ``os._exit``, so nothing is cleaned up."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def age(path):
    """The file was last changed a while ago."""
    then = time.time_ns() - 3_600_000_000_000
    os.utime(path, ns=(then, then))
