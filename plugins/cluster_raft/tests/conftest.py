"""Raft servers on free loopback ports."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sheepdog.testing.cluster_kit import once_is_enough
from sheepdog.testing.services import hang_guard
from sheepdog_cluster_raft.options import RaftOptions
from sheepdog_cluster_raft.server import Server


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    once_is_enough(items, Path(__file__).parent)


@pytest.fixture(autouse=True)
def no_hang(request):
    with hang_guard(request.config):
        yield


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


class Voters:
    """Servers without members."""

    def __init__(self, directory, password: str | None = None, count: int = 3) -> None:
        self.password = password
        self.addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(count))
        self.directory = directory
        self.servers: dict[int, Server] = {}

    @property
    def text(self) -> str:
        return ",".join(self.addresses)

    def start(self, *indexes: int) -> None:
        for index in indexes:
            directory = str(self.directory / str(index))
            options = RaftOptions(self.addresses, self.addresses[index], directory, password=self.password)
            if len(self.addresses) == 1:  # nobody else can stand for election
                options = replace(options, election_s=0.05)
            self.servers[index] = Server(options)
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
def make_voters():
    """Makes groups of voters below a directory; they have stopped when the test ends."""
    made: list[Voters] = []

    def make(directory, password: str | None = None, count: int = 3) -> Voters:
        voters = Voters(directory, password, count)
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
