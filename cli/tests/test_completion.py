"""Shell completion: what can follow, and the application that shells talk to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from clusters import Cluster

from sheepdog.model.inode import InodeHeader
from sheepdog_cli import complete
from sheepdog_cli.table import COMMANDS, find


def values(family: str, name: str, *words: str, incomplete: str = "") -> list[str]:
    command = find(family, name)
    assert command is not None
    return [choice.value for choice in complete.choices(command, words, incomplete)]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster with two vdis; one has two snapshots."""
    found = [("alpha", "s1"), ("alpha", "s2"), ("alpha", ""), ("beta", "")]
    monkeypatch.setattr(complete, "_vdis", lambda given: found)


def test_options() -> None:
    """Long and short options of this subcommand, and no others."""
    assert values("node", "list", incomplete="--") == ["--address", "--port", "--raw", "--help", "--time", "--json"]
    assert values("node", "vnodes", incomplete="-") == ["--address", "--port", "--help", "-a", "-p", "-h"]
    assert values("vdi", "list", incomplete="--ra") == ["--raw"]


def test_nested_words() -> None:
    """Nested subcommands, down to the last level."""
    assert values("vdi", "object") == ["location", "map", "dump-inode"]
    assert values("node", "log") == ["level"]
    assert values("node", "log", "level") == ["set", "get", "list"]
    assert values("node", "log", "level", "set", incomplete="de") == ["debug"]
    assert values("vdi", "object", "bogus") == []


@pytest.mark.usefixtures("names")
def test_names_and_tags() -> None:
    """Names where a vdi is expected, tags of that vdi behind -s and -F; files elsewhere."""
    assert values("vdi", "read") == ["alpha", "beta"]
    assert values("vdi", "object", "map", incomplete="b") == ["beta"]
    assert values("vdi", "read", "alpha", "-s") == ["s1", "s2"]
    assert values("vdi", "object", "map", "-s") == ["s1", "s2"]
    assert values("vdi", "backup", "beta", "-F") == []
    assert values("vdi", "read", "alpha") == []
    assert values("vdi", "object", "dump-inode") == []
    assert values("cluster", "snapshot", "save", "tag", "/path", incomplete="a") == ["alpha"]
    assert values("cluster", "snapshot", "load", "tag", "/path", "alpha") == ["alpha", "beta"]
    assert values("cluster", "snapshot", "load", "tag") == []
    assert values("vdi", "check", incomplete="--d") == ["--dry-run"]
    assert values("cluster", "format", "-z", incomplete="3") == ["30", "31"]


def test_asking_the_cluster(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The names come from the sheep that the words and the environment say; without one there are none, silently."""
    from sheepdog.client import connection

    cluster = Cluster()
    cluster.add_vdi(InodeHeader(name=b"alpha", tag=b"t", vdi_id=5))
    asked: list[str] = []

    def connect(address: str):
        asked.append(address)
        return cluster.sheep.connect(address)

    monkeypatch.setattr(connection, "open_socket", connect)
    monkeypatch.setenv("SHEEPDOG_DOG_PORT", "7777")
    given = complete.understand(["-a", "10.0.0.1"], ())

    assert complete._vdis(given) == [("alpha", "t")]
    assert complete._vdis(complete.Given([], None, {"address": "10.0.0.1", "port": "7"})) == [("alpha", "t")]
    assert asked == ["127.0.0.1:7777", "10.0.0.1:7"]
    monkeypatch.setattr(connection, "open_socket", lambda address: (_ for _ in ()).throw(OSError("nothing")))
    assert complete._vdis(given) == []
    assert capsys.readouterr().err == ""


def test_application() -> None:
    """The shell gets its words from the same table."""
    script = "import sys; sys.argv = ['dog']; from sheepdog_cli.dog import main; main()"
    environment = {**os.environ, "_DOG_COMPLETE": "complete_bash", "COMP_WORDS": "dog vdi ", "COMP_CWORD": "2"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)

    assert done.stdout.split() == [row.name for row in COMMANDS if row.family == "vdi"]


def test_embedded_application(capfd: pytest.CaptureFixture[str]) -> None:
    """The Typer application runs the same commands, with dog's own parsing and exit codes."""
    from sheepdog_cli.app import application

    with pytest.raises(SystemExit) as caught:
        application(["node", "vnodes", "-Q"])

    assert caught.value.code == 64
    assert capfd.readouterr().err.startswith("dog: invalid option -- 'Q'\n")
