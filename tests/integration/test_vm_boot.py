"""A virtual machine lives on a Sheepdog volume: it boots from it, works on it, and does not notice a dead sheep."""

import os
import secrets
import shutil
import subprocess
import threading
import time

import pytest

from sheepdog.testing.boot_image import IMAGE_BYTES, NoBootImage, build_boot_image

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]

BOOT_S = 120  # five seconds here; an emulated processor on a loaded machine may need a minute
PROGRESS_S = 60


def missing(reason):
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def secret():
    return secrets.token_hex(8)


@pytest.fixture(scope="module")
def boot_image(tmp_path_factory, secret):
    """A bootable raw disk with a secret on it."""
    directory = tmp_path_factory.mktemp("boot")
    image = directory / "disk.img"
    work = directory / "work"
    work.mkdir()
    try:
        build_boot_image(image, work, secret=secret)
    except NoBootImage as error:
        missing(f"no boot image: {error}")
    shutil.rmtree(work)
    return image


class VirtualMachine:
    """qemu with one disk on NBD, no graphics, and a serial console that is read all the time."""

    def __init__(self, disk):
        program = shutil.which("qemu-system-x86_64")
        if program is None:
            missing("no qemu-system-x86_64 here (Debian: apt-get install qemu-system-x86)")
        self.lines = []
        self._changed = threading.Condition()
        self.process = subprocess.Popen(
            [
                *(program, "-accel", "tcg", "-m", "192", "-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio"),
                *("-drive", f"file={disk},format=raw,if=virtio,cache=none,discard=unmap"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            with self._changed:
                self.lines.append(line.decode(errors="replace").strip())
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()

    def console(self):
        lines = list(self.lines)
        return "\n".join(lines if len(lines) <= 60 else [*lines[:20], "...", *lines[-40:]])

    def wait_line(self, wanted, timeout_s):
        """A line that satisfies ``wanted``, old or new."""
        deadline = time.monotonic() + timeout_s
        seen = 0
        with self._changed:
            while True:
                for line in self.lines[seen:]:
                    if wanted(line):
                        return line
                seen = len(self.lines)
                left = deadline - time.monotonic()
                if left <= 0 or (self.process.poll() is not None and seen == len(self.lines)):
                    pytest.fail(f"the console never showed it (qemu: {self.process.poll()}):\n{self.console()}")
                self._changed.wait(min(left, 1))

    def rounds(self):
        """How many write-read-compare rounds the guest has done."""
        numbers = [int(line.split()[1]) for line in list(self.lines) if line.startswith("io ") and line.endswith(" ok")]
        return numbers[-1] if numbers else 0

    def wait_rounds(self, number):
        """The guest has done so many rounds, all of them right."""
        self.wait_line(lambda line: line.startswith("io ") and int(line.split()[1]) >= number, PROGRESS_S)
        wrong = [line for line in list(self.lines) if line.startswith("io ") and not line.endswith(" ok")]
        assert not wrong, f"{wrong}\n{self.console()}"
        assert self.process.poll() is None


def test_image_boots(boot_image, secret, tmp_path):
    """The image itself is good: qemu boots it from a plain NBD server and the guest does its rounds."""
    nbdkit = shutil.which("nbdkit")
    if nbdkit is None:
        missing("no nbdkit here (Debian: apt-get install nbdkit)")
    path = tmp_path / "nbd.sock"
    # nothing that the guest writes reaches the file: the other test uses it as well
    server = subprocess.Popen([nbdkit, "-f", "-U", str(path), "--filter=cow", "file", str(boot_image)])
    try:
        deadline = time.monotonic() + 10
        while not path.exists():
            assert server.poll() is None and time.monotonic() < deadline, "nbdkit does not listen"
            time.sleep(0.02)
        with VirtualMachine(f"nbd+unix:///?socket={path}") as machine:
            machine.wait_line(lambda line: line == f"vm booted, secret {secret}", BOOT_S)
            machine.wait_rounds(3)
    finally:
        server.kill()
        server.wait()


@pytest.mark.processes
def test_vm_survives_a_dead_sheep(boot_image, secret, sheep_cluster):
    """Booted from a volume by NBD, the guest goes on working when one of three sheep is killed, and nothing is lost."""
    qemu_img = shutil.which("qemu-img")
    if qemu_img is None:
        missing("no qemu-img here (Debian: apt-get install qemu-utils)")
    cluster = sheep_cluster(3, nbd=True)
    cluster.format()
    cluster.dog("vdi", "create", "boot", str(IMAGE_BYTES))
    disk = cluster.sheep[0].nbd_uri("boot")
    done = subprocess.run(
        [qemu_img, "convert", "-n", "-f", "raw", "-O", "raw", str(boot_image), disk], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()

    with VirtualMachine(disk) as machine:
        machine.wait_line(lambda line: line == f"vm booted, secret {secret}", BOOT_S)
        machine.wait_rounds(3)

        cluster.kill(1)
        machine.wait_rounds(machine.rounds() + 10)
        cluster.wait_recovered()
        machine.wait_rounds(machine.rounds() + 3)

    cluster.restart(1)
    cluster.wait_recovered()
    report = cluster.dog("vdi", "check", "boot", timeout_s=120)
    assert b"fixed" not in report.stdout and b"fixed" not in report.stderr, report
