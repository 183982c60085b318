"""A small file system of its own for one directory, which can be full, fail with I/O errors, or turn read-only.

An ext4 in a file, mounted through a loop device. Its failures are ext4's own: the ioctl with which file systems are
shut down for crash tests makes every access fail with EIO, and the mount option ``abort`` does what the kernel does
after an error of the device, after which every change fails with EROFS. It needs root.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

FS_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32)
FLUSH_ALL = struct.pack("I", 0)


def why_not() -> str | None:
    """Why there can be no such disk here; ``None`` when there can."""
    if os.geteuid() != 0:
        return "mounting needs root"
    missing = [name for name in ("mkfs.ext4", "mount", "umount") if shutil.which(name) is None]
    if missing:
        return f"no program {missing[0]} here (Debian: apt-get install e2fsprogs mount)"
    if not Path("/dev/loop-control").exists():
        return "no loop devices here"
    return None


class LoopDisk:
    """An ext4 of so many bytes at a directory, which is made. Use it in a ``with`` block."""

    def __init__(self, place: Path, size: int) -> None:
        self.place = place
        self._image = place.with_name(f"{place.name}.ext4")
        with self._image.open("wb") as image:
            image.truncate(size)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", str(self._image))
        place.mkdir(parents=True)

    def __enter__(self) -> LoopDisk:
        self.mount()
        return self

    def __exit__(self, *_: object) -> None:
        self.unmount()

    def mount(self) -> None:
        """The directory is the file system, in order."""
        _run("mount", "-o", "loop", str(self._image), str(self.place))

    def unmount(self) -> None:
        """The directory is an empty one."""
        if os.path.ismount(self.place):
            _run("umount", "-l", str(self.place))

    def fail(self) -> None:
        """Whatever touches the file system from now on gets EIO; what was written before is on the disk."""
        directory = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(directory, FS_IOC_SHUTDOWN, FLUSH_ALL)
        finally:
            os.close(directory)

    def turn_read_only(self) -> None:
        """Changes get EROFS from now on; what is there can be read."""
        _run("mount", "-o", "remount,abort", str(self.place))

    def mend(self) -> None:
        """The file system is mounted anew, with what was on the disk. Nobody may use it meanwhile."""
        self.unmount()
        self.mount()


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.decode(errors='replace').strip()}")
