"""The example that ``./demo`` runs is the main job of the whole system: it must work, and clean up, always."""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.matrix, pytest.mark.timeout(180)]

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "main_job.py"
CELL = [
    *("--driver", os.environ.get("SHEEPDOG_TEST_CLUSTER", "local")),
    *("--store", os.environ.get("SHEEPDOG_TEST_STORE", "plain")),
    *("--redundancy", os.environ.get("SHEEPDOG_TEST_REDUNDANCY", "copies")),
]


@pytest.fixture
def image(tmp_path):
    """A disk image of our own: nothing is downloaded."""
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(3).randbytes(5 << 20) + bytes(3 << 20))
    return path


@pytest.fixture
def place():
    """The program's directory for temporary files; short, because the path of a Unix socket has a limit."""
    with tempfile.TemporaryDirectory(prefix="demo-") as directory:
        yield Path(directory)


def processes_below(directory):
    """Command lines of all processes that name the directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended meanwhile
        if str(directory) in command:
            found.append(command)
    return found


@pytest.mark.parametrize(
    "with_qemu",
    [pytest.param(True, id="qemu-img", marks=pytest.mark.covering), pytest.param(False, id="own-client")],
)
def test_main_job(place, image, tmp_path, with_qemu):
    """Import, snapshot, clone, change, kill -9: everything reads back identical, and nothing is left behind."""
    env = {**os.environ, "TMPDIR": str(place)}
    if not with_qemu:
        env["PATH"] = str(tmp_path)  # the program finds no qemu-img, but servers of the driver
        for server in ("java", "etcd"):
            if (found := shutil.which(server)) is not None:
                (tmp_path / server).symlink_to(found)

    done = subprocess.run(
        [sys.executable, str(PROGRAM), "--image", str(image), *CELL], env=env, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("identical") == 6 and "Nothing was lost." in done.stdout
    assert ("our own NBD client" in done.stdout) or with_qemu
    assert list(place.iterdir()) == []
    assert processes_below(place) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_interrupted(place, image, number):
    """Stopped in the middle, the program ends with 130 and takes its sheep and files with it."""
    env = {**os.environ, "TMPDIR": str(place)}
    program = subprocess.Popen(
        [sys.executable, "-u", str(PROGRAM), "--image", str(image), *CELL],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        # as from a terminal: a job in the background of a shell hands on that Ctrl-C is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in program.stdout:
        if "cluster format" in line:
            break
    deadline = time.monotonic() + 10
    while len(processes_below(place)) < 3:
        assert time.monotonic() < deadline, "no sheep to be seen"

    program.send_signal(number)
    rest = program.stdout.read()
    program.stdout.close()

    assert program.wait(30) == 130, rest
    assert list(place.iterdir()) == []
    assert processes_below(place) == []
