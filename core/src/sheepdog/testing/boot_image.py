"""A small disk that really boots: GRUB, a Debian kernel, and a program that does disk I/O for ever.

Everything comes from Debian packages that are downloaded and unpacked into a directory of ours, so neither root nor an
installation is needed. The disk has GRUB in its first megabyte and one ext4 partition with the kernel, an initial RAM
disk and a secret that only somebody who reads this disk can know. The guest's program prints the secret on the serial
console, and then again and again writes a mebibyte, syncs, drops its caches, reads it back, compares, and prints
``io N ok`` (or ``io N BAD``). These lines are its own: the kernel, which would write its warnings into the middle of
them, is silent until it panics, and what the boot loader left unfinished ends before the first one.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

MiB = 1 << 20
SECTOR_BYTES = 512
PARTITION_OFFSET = MiB  # GRUB lives before it
IMAGE_BYTES = 64 * MiB

_MODULES = ("virtio_blk", "virtio_pci")
_TOOLS = ["sh", "mount", "dd", "sha256sum", "mv", "sync", "echo", "usleep", "cat", "insmod", "mkdir", "poweroff"]

_INIT = """#!/bin/sh
mount -t proc proc /proc
mount -t devtmpfs dev /dev
for module in {modules}; do insmod /modules/$module; done
while ! [ -b /dev/vda1 ]; do usleep 100000; done
mount -t ext4 /dev/vda1 /mnt
echo
echo "vm booted, secret $(cat /mnt/secret)"
n=0
while :; do
  n=$((n + 1))
  dd if=/dev/urandom of=/mnt/new bs=65536 count=16 2>/dev/null || echo "io $n WRITE FAILED"
  wrote=$(sha256sum < /mnt/new)
  mv /mnt/new /mnt/data
  sync
  echo 3 > /proc/sys/vm/drop_caches
  read=$(sha256sum < /mnt/data)
  if [ "$wrote" = "$read" ]; then echo "io $n ok"; else echo "io $n BAD"; fi
  usleep 100000
done
"""

_GRUB = """serial --unit=0 --speed=115200
terminal_output serial
set root=(hd0,msdos1)
linux /vmlinuz console=ttyS0 loglevel=0 panic=-1
initrd /initrd
boot
"""


class NoBootImage(Exception):
    """The image cannot be made here; the message says what is missing."""


def fetch_packages(names: Sequence[str], directory: Path) -> Path:
    """The contents of Debian packages, unpacked below the directory that is returned. Nothing is installed.

    :raises NoBootImage: no apt or dpkg here, or nothing can be downloaded.
    """
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        raise NoBootImage("no apt-get and dpkg-deb here")
    downloads = directory / "packages"
    root = directory / "root"
    downloads.mkdir(parents=True, exist_ok=True)
    root.mkdir(exist_ok=True)
    _run(["apt-get", "download", "-q", *names], cwd=downloads)
    for package in sorted(downloads.glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(root)])
    return root


def _run(command: Sequence[str], cwd: Path | None = None) -> bytes:
    try:
        return subprocess.run(command, cwd=cwd, check=True, capture_output=True, timeout=300).stdout
    except subprocess.CalledProcessError as error:
        raise NoBootImage(f"{' '.join(command)}: {error.stderr.decode(errors='replace').strip()[-500:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoBootImage(f"{' '.join(command)}: {error}") from error


def _kernel_package() -> str:
    """The kernel that Debian's cloud meta-package stands for; small, and with drivers for virtual hardware only."""
    lines = _run(["apt-cache", "depends", "linux-image-cloud-amd64"]).decode().splitlines()
    for line in lines:
        if line.strip().startswith("Depends: linux-image-"):
            return line.split()[-1]
    raise NoBootImage("apt knows no linux-image-cloud-amd64 (try: apt-get update)")


def build_boot_image(target: Path, work: Path, *, secret: str) -> None:
    """``target`` is a raw disk of ``IMAGE_BYTES`` that boots under ``qemu-system-x86_64`` with a virtio disk.

    :param work: an empty directory for intermediate files (about 250 MB); the caller removes it.
    :param secret: printed by the guest, which can only know it from the disk.
    :raises NoBootImage: a package or a tool is missing.
    """
    mke2fs = shutil.which("mkfs.ext4", path=os.environ.get("PATH", "") + ":/sbin:/usr/sbin")
    if mke2fs is None:
        raise NoBootImage("no mkfs.ext4 here (Debian: apt-get install e2fsprogs)")
    packages = [_kernel_package(), "busybox-static", "grub-pc-bin", "grub-common"]
    if not any(Path("/lib").glob("*/libdevmapper.so*")):
        packages.append("libdevmapper1.02.1")  # grub-mkimage is linked with it
    root = fetch_packages(packages, work)
    kernel = next((root / "boot").glob("vmlinuz-*"))

    partition_files = work / "partition"
    partition_files.mkdir()
    shutil.copy(kernel, partition_files / "vmlinuz")
    (partition_files / "initrd").write_bytes(_make_initrd(root))
    (partition_files / "secret").write_text(secret)

    with target.open("wb") as image:
        image.truncate(IMAGE_BYTES)
    _run(
        [
            *(mke2fs, "-q", "-F", "-t", "ext4", "-O", "^64bit,^metadata_csum"),  # what GRUB can read
            *("-E", f"offset={PARTITION_OFFSET}", "-d", str(partition_files), str(target)),
            f"{(IMAGE_BYTES - PARTITION_OFFSET) // 1024}k",
        ]
    )
    with target.open("r+b") as image:
        image.write(_make_boot_code(root, work))
        image.seek(446)
        image.write(_partition_table())


def _make_boot_code(root: Path, work: Path) -> bytes:
    """Boot sector and GRUB, which finds itself in the sectors behind it."""
    modules = root / "usr/lib/grub/i386-pc"
    config = work / "grub.cfg"
    config.write_text(_GRUB)
    core = work / "core.img"
    libraries = ":".join(str(path) for path in (root / "lib/x86_64-linux-gnu", root / "usr/lib/x86_64-linux-gnu"))
    command = [
        *("env", f"LD_LIBRARY_PATH={libraries}", str(root / "usr/bin/grub-mkimage")),
        *("-d", str(modules), "-O", "i386-pc", "-o", str(core), "-p", "/", "-c", str(config)),
        *("biosdisk", "part_msdos", "ext2", "linux", "serial", "terminal", "boot", "normal", "minicmd"),
    ]
    _run(command)
    sector = (modules / "boot.img").read_bytes()
    code = sector[:440].ljust(446, b"\0") + bytes(64) + b"\x55\xaa" + core.read_bytes()
    assert len(sector) == SECTOR_BYTES and len(code) <= PARTITION_OFFSET, (len(sector), len(code))
    return code


def _partition_table() -> bytes:
    """One active Linux partition up to the end of the disk."""
    start, count = PARTITION_OFFSET // SECTOR_BYTES, (IMAGE_BYTES - PARTITION_OFFSET) // SECTOR_BYTES
    beyond_chs = b"\xfe\xff\xff"  # "use the sector numbers instead"
    entry = b"\x80" + beyond_chs + b"\x83" + beyond_chs + start.to_bytes(4, "little") + count.to_bytes(4, "little")
    return entry.ljust(64, b"\0") + b"\x55\xaa"


def _make_initrd(root: Path) -> bytes:
    """A RAM disk with busybox, the drivers of the disk, and the program."""
    (tree,) = (root / "lib/modules").iterdir()
    modules = _module_order(tree)
    busybox = next(path for path in (root / "bin/busybox", root / "usr/bin/busybox") if path.exists())
    files: list[tuple[str, int, bytes]] = [(name, 0o040755, b"") for name in ("bin", "dev", "proc", "mnt", "modules")]
    files.append(("bin/busybox", 0o100755, busybox.read_bytes()))
    files += [(f"bin/{tool}", 0o120777, b"busybox") for tool in _TOOLS]
    files += [(f"modules/{path.name}", 0o100644, path.read_bytes()) for path in modules]
    init = _INIT.format(modules=" ".join(path.name for path in modules))
    files.append(("init", 0o100755, init.encode()))
    return gzip.compress(_cpio(files), mtime=0)


def _module_order(tree: Path) -> list[Path]:
    """The drivers of the virtual disk and what they need, needed ones first.

    The dependencies are read from the modules themselves ("depends=" in their information section), because
    ``modules.dep`` is written only when a kernel is installed.
    """
    by_name = {path.name.partition(".")[0].replace("-", "_"): path for path in sorted(tree.rglob("*.ko*"))}
    ordered: list[Path] = []

    def add(name: str) -> None:
        path = by_name.get(name)
        if path is None:  # built into the kernel
            return
        if path.suffix != ".ko":
            raise NoBootImage(f"kernel module {path.name} is compressed, which busybox may not understand")
        if path in ordered:
            return
        _, _, rest = path.read_bytes().partition(b"\0depends=")
        for needed in rest.partition(b"\0")[0].decode().split(","):
            if needed:
                add(needed)
        ordered.append(path)

    for name in _MODULES:
        add(name)
    return ordered


def _cpio(files: Iterable[tuple[str, int, bytes]]) -> bytes:
    """An archive in the "newc" format that the kernel unpacks (Documentation/driver-api/early-userspace)."""
    archive = bytearray()

    def add(number: int, name: str, mode: int, data: bytes) -> None:
        encoded = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        archive.extend(b"070701" + b"".join(b"%08x" % field for field in fields) + encoded)
        archive.extend(bytes(-len(archive) % 4))
        archive.extend(data)
        archive.extend(bytes(-len(archive) % 4))

    for number, (name, mode, data) in enumerate(files, start=1):
        add(number, name, mode, data)
    add(0, "TRAILER!!!", 0, b"")
    return bytes(archive)
