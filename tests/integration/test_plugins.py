"""Plugins of others, with the real programs: what a third party writes from the guide works, and whatever may be wrong
with a plugin is said in words, with an exit code, before anything is opened.

Distributions are directories on PYTHONPATH: modules and the metadata that pip would have written.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from acme_redundancy import MirrorFactory

from sheepdog.testing.cluster import HOST, reserve_port, run_python, wait_until
from sheepdog.testing.redundancy_kit import RedundancyKit

pytestmark = [pytest.mark.timeout(120)]

THIRD_PARTY = Path(__file__).parent / "third_party"
EMPTY = "SHEEPDOG_API = (1, 0)\n"
BOMB = "raise SystemExit('imported')\n"
FUTURE = "SHEEPDOG_API = (2, 0)\n"
NEEDY = "import no_such_library_of_acme\n"


class TestMirrorConforms(RedundancyKit):
    """The scheme of the guide passes the kit."""

    cases = ((0, 2), (0, 3))

    @pytest.fixture
    def factory(self) -> MirrorFactory:
        return MirrorFactory()


class Site:
    """Where distributions are installed, and the environment of programs that see them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        search = os.pathsep.join(filter(None, (str(path), str(THIRD_PARTY), os.environ.get("PYTHONPATH"))))
        self.environment = {**os.environ, "PYTHONPATH": search, "ACME_DIARY": str(path / "diary")}

    def install(
        self,
        distribution: str,
        *entries: tuple[str, str, str],
        source: str | None = None,
        requires: tuple[str, ...] = (),
    ) -> None:
        """``entries``: kind, name and module of each plugin; ``source``: of modules that do not exist yet."""
        info = self.path / f"{distribution.replace('-', '_')}-0.9.dist-info"
        info.mkdir()
        needs = "".join(f"Requires-Dist: {name}\n" for name in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.9\n{needs}")
        (info / "entry_points.txt").write_text(
            "\n".join(f"[sheepdog.{kind}]\n{name} = {module}\n" for kind, name, module in entries)
        )
        if source is not None:
            for _, _, module in entries:
                (self.path / f"{module}.py").write_text(source)

    def run(self, program: str, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            run_python(f"sheepdog_cli.{program}", *words),
            capture_output=True, text=True, timeout=60, check=False, env=self.environment,
        )  # fmt: skip


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "site")


@pytest.fixture
def broken(site: Site) -> Site:
    """Four distributions with something wrong each."""
    site.install("acme-one", ("store", "twice", "acme_one"), ("cluster", "twice", "acme_one"), source=BOMB)
    site.install("acme-two", ("store", "twice", "acme_two"), ("cluster", "twice", "acme_two"), source=BOMB)
    site.install(
        "acme-needy", ("store", "needy", "acme_needy"), ("frontend", "needy", "acme_needy"),
        source=NEEDY, requires=("no-such-library-of-acme",),
    )  # fmt: skip
    site.install("acme-future", ("transport", "future", "acme_future"), source=FUTURE)
    site.install("acme-empty", ("store", "empty", "acme_empty"), source=EMPTY)
    return site


def test_listing_imports_nothing(broken: Site) -> None:
    """``dog plugin list``: kind, name, distribution, version and state of each plugin, the broken ones included."""
    listed = broken.run("dog", "plugin", "list", "-r")

    assert (listed.returncode, listed.stderr) == (0, "")
    rows = listed.stdout.splitlines()
    for row in (
        "store twice acme-one 0.9 ambiguous",
        "store twice acme-two 0.9 ambiguous",
        "store needy acme-needy 0.9 needs no-such-library-of-acme",
        "transport future acme-future 0.9 ok",
    ):
        assert row in rows
    assert any(row.startswith("store plain sheepdog-store-plain ") and row.endswith(" ok") for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--store", "nosuch"], "no store plugin 'nosuch' (installed: "),
        (["--store", "nosuch"], "pip install sheepdog-store-nosuch"),
        (["--store", "trea"], "did you mean 'tree'? Otherwise: pip install sheepdog-store-trea"),
        (["-c", "nosuch:x"], "Invalid cluster driver 'nosuch:x'"),
        (["-c", "nosuch:x"], "pip install sheepdog-cluster-nosuch"),
        (["-c", "twice:x"], "cluster plugin 'twice' is claimed by acme-one and acme-two; uninstall all but one"),
        (["--store", "twice"], "store plugin 'twice' is claimed by acme-one and acme-two; uninstall all but one"),
        (
            ["--store", "needy"],
            "the library 'no_such_library_of_acme' is missing; try: pip install --force-reinstall acme",
        ),
        (["--frontend", "needy:x"], "frontend plugin 'needy' of acme-needy cannot be imported: the library"),
        (["--frontend", "nosuch"], "try: pip install sheepdog-frontend-nosuch"),
        (["--transport", "future"], "was written for plugin API 2.0, this is 1.0; install the release that fits"),
        (["--store", "empty"], "does not implement sheepdog_object_store; is it marked with sheepdog.api.hookimpl?"),
        (["--nbd", "nonsense"], "nbd: 'nonsense' is no address"),
    ],
)
def test_wrong_plugins(broken: Site, tmp_path: Path, words: list[str], message: str) -> None:
    """sheep ends with 1, says what is wrong and what to do, without a traceback."""
    base = tmp_path / "store"
    driver = [] if "-c" in words else ["-c", f"local:{tmp_path / 'cluster'}"]
    with reserve_port() as holder:
        port = str(holder.getsockname()[1])
        ended = broken.run("sheep", "-f", *driver, "-b", HOST, "-p", port, *words, str(base))

    said = ended.stdout + ended.stderr
    if (base / "sheep.log").exists():
        said += (base / "sheep.log").read_text()
    assert ended.returncode == 1
    assert message in said
    assert "Traceback" not in said
    assert not list(base.rglob("*[0-9a-f]" * 16))


@pytest.fixture
def acme(site: Site) -> Site:
    """One plugin of each kind, from five files written from the guide."""
    site.install(
        "acme-all",
        ("cluster", "alone", "acme_cluster"), ("store", "byvolume", "acme_store"),
        ("transport", "streams", "acme_transport"), ("frontend", "heads", "acme_frontend"),
        ("observer", "diary", "acme_observer"), ("redundancy", "mirror", "acme_redundancy"),
    )  # fmt: skip
    return site


@pytest.fixture
def start(acme: Site, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Starts a sheep in the foreground; it ends with the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def run(*words: str) -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(
                run_python("sheepdog_cli.sheep", "-f", "-n", "-l", "dst=stdout", *words),
                env=acme.environment, stdout=log, stderr=log,
            )  # fmt: skip
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.processes
def test_plugins_of_each_kind(acme: Site, tmp_path: Path, start: Callable[..., subprocess.Popen[bytes]]) -> None:
    """A sheep made of plugins of others alone: driver, store, transport, redundancy and front end do what they are for,
    the observer hears of it, and what it raises harms nobody."""
    base = tmp_path / "store"
    head = f"unix:{tmp_path}/heads"
    with reserve_port() as holder:
        port = str(holder.getsockname()[1])
        process = start(
            "-c", "alone", "--store", "byvolume", "--transport", "streams", "--redundancy", "mirror",
            "--frontend", f"heads:{head},4", "-b", HOST, "-p", port, "-P", str(tmp_path / "pid"), str(base),
        )  # fmt: skip
        wait_until(lambda: (tmp_path / "pid").exists(), "the sheep")
        assert acme.run("dog", "cluster", "format", "-c", "1", "-b", "byvolume", "-p", port).returncode == 0
        assert acme.run("dog", "vdi", "create", "one", "8M", "-p", port).returncode == 0
        written = subprocess.run(
            run_python("sheepdog_cli.dog", "vdi", "write", "one", "0", "4", "-p", port),
            input=b"acme", env=acme.environment, timeout=60, check=False,
        )  # fmt: skip
        assert written.returncode == 0
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(head.removeprefix("unix:"))
            told = b""
            while more := client.recv(100):
                told += more
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0

    assert told == f"one {b'acme'.hex()}\n".encode()
    stored = sorted(path.name for path in base.joinpath("obj").rglob("v?/*"))
    assert len(stored) == 2
    assert stored[1] == f"8{stored[0][1:8]}00000000"
    diary = (acme.path / "diary").read_text().splitlines()
    assert diary == ["started 0", "epoch 1 of 1", "stopped"]
    assert "an observer of sheepdog_started failed" in (tmp_path / "log").read_text()


def test_wrong_options_of_plugins(acme: Site, tmp_path: Path) -> None:
    """A plugin's own complaint about its options ends the sheep with 1 and stands in the log."""
    for words, message in (
        (["-c", "alone:together"], "alone: 'together': this driver has no options"),
        (["-c", "alone", "--frontend", "heads"], "heads: '': write ADDRESS,LENGTH"),
    ):
        base = tmp_path / "store"
        assert acme.run("sheep", "-f", *words, str(base)).returncode == 1
        assert message in (base / "sheep.log").read_text()
