"""Raft servers on free loopback ports."""

from __future__ import annotations

import socket
import time

import pytest

from sheepdog_cluster_raft.options import RaftOptions
from sheepdog_cluster_raft.server import Server


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


class Voters:
    """Three servers without members."""

    def __init__(self, directory, password: str | None = None) -> None:
        self.password = password
        self.addresses = tuple(f"127.0.0.1:{port}" for port in free_ports(3))
        self.directory = directory
        self.servers: dict[int, Server] = {}

    @property
    def text(self) -> str:
        return ",".join(self.addresses)

    def start(self, *indexes: int) -> None:
        for index in indexes:
            directory = str(self.directory / str(index))
            options = RaftOptions(self.addresses, self.addresses[index], directory, password=self.password)
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

    def make(directory, password: str | None = None) -> Voters:
        voters = Voters(directory, password)
        made.append(voters)
        voters.start(0, 1, 2)
        voters.wait()
        return voters

    yield make
    for voters in made:
        voters.stop(*list(voters.servers))


@pytest.fixture
def voters(tmp_path, make_voters):
    return make_voters(tmp_path / "voters")
