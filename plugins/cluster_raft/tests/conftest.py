"""Raft servers on free loopback ports."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from sheepdog.testing.cluster_kit import once_is_enough
from sheepdog.testing.services import (
    hold_ports,
    no_hang,  # noqa: F401  a fixture for all tests here
)
from sheepdog_cluster_raft.options import RaftOptions
from sheepdog_cluster_raft.server import Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    once_is_enough(items, Path(__file__).parent)


SECRET = "for tests"


class Voters:
    """Servers without members."""

    secret = SECRET

    def __init__(self, directory: Path, stack: ExitStack, count: int = 3) -> None:
        self.addresses = tuple(f"127.0.0.1:{port}" for port in hold_ports(count, stack))
        self.directory = directory
        self.servers: dict[int, Server] = {}
        directory.mkdir(parents=True)
        self.secret_file = directory / "secret"
        self.secret_file.write_text(f"{SECRET}\n")

    @property
    def text(self) -> str:
        """Options of a member that follows."""
        return f"{','.join(self.addresses)},self=none,password-file={self.secret_file}"

    def options(self, index: int) -> RaftOptions:
        options = RaftOptions(self.addresses, SECRET, self.addresses[index], str(self.directory / str(index)))
        if len(self.addresses) == 1:  # nobody else can stand for election
            options = replace(options, election_s=0.05)
        return options

    def start(self, *indexes: int) -> None:
        for index in indexes:
            self.servers[index] = Server(self.options(index))
            self.servers[index].start()

    def wait(self) -> None:
        """There is a leader."""
        deadline_s = time.monotonic() + 30
        while not any(server.status()["leader"] for server in self.servers.values()):
            assert time.monotonic() < deadline_s, "no leader was elected"
            time.sleep(0.02)

    def stop(self, *indexes: int) -> None:
        for index in indexes:
            self.servers.pop(index).stop()


@pytest.fixture
def ports() -> Iterator[ExitStack]:
    """What is put on it lasts as long as the test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def make_voters():
    """Makes groups of voters below a directory; they have stopped when the test ends."""
    made: list[Voters] = []
    with ExitStack() as stack:

        def make(directory: Path, count: int = 3) -> Voters:
            voters = Voters(directory, stack, count)
            made.append(voters)
            voters.start(*range(count))
            voters.wait()
            return voters

        yield make
        for voters in made:
            for index in list(voters.servers):
                voters.stop(index)


@pytest.fixture
def voters(tmp_path, make_voters):
    return make_voters(tmp_path / "voters")
