"""What only the local driver can get wrong: its file, and its ways to notice a death."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import zlib

import anyio
import pytest

from sheepdog.api import ClusterUnavailable, ConfigError, Delivered, Joined, Left, SessionLost
from sheepdog.testing.cluster_kit import PATIENCE_S, assert_sound, kit_node, left, payloads, settle, until_left
from sheepdog.testing.cluster_worker import SessionMember
from sheepdog_cluster_local import LocalDriver, LocalOptions
from sheepdog_cluster_local.driver import LocalSession
from sheepdog_cluster_local.rendezvous import FRAME, HEADER, LOG_AT, MAGIC, VERSION, Rendezvous

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def file(tmp_path) -> str:
    return str(tmp_path / "cluster")


@pytest.fixture
async def spawn(file):
    """Makes members of one cluster; they are gone when the test ends."""
    async with anyio.create_task_group() as tasks:

        async def spawn(index: int, greeting: bytes = b"", **options) -> SessionMember:
            member = SessionMember(kit_node(index))
            await member.start(tasks, LocalDriver(LocalOptions(file, **options)), greeting)
            return member

        yield spawn
        tasks.cancel_scope.cancel()


async def refuse(file: str, match: str, error: type[Exception] = ConfigError, **options) -> None:
    with pytest.raises(error, match=match):
        async with LocalDriver(LocalOptions(file, **options)).join(kit_node(0), b""):
            pass


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ("/tmp/sheepdog_shm", 5.0)),
        ("/x/y", ("/x/y", 5.0)),
        ("/x/y,timeout=250", ("/x/y", 0.25)),
        ("timeout=250", ("/tmp/sheepdog_shm", 0.25)),
        (",timeout=250", ("/tmp/sheepdog_shm", 0.25)),
    ],
)
def test_options(text, expected):
    """FILE and timeout are both optional."""
    options = LocalOptions.parse(text)

    assert (options.file, options.timeout_s) == expected


@pytest.mark.parametrize("text", ["/x,timeout=", "/x,timeout=abc", "/x,timeout=1", "/x,speed=3", "/x,,"])
def test_options_refused(text):
    """What cannot be understood is a ConfigError that names it."""
    with pytest.raises(ConfigError):
        LocalOptions.parse(text)


def test_relative_file(tmp_path, monkeypatch):
    """A relative FILE keeps its meaning when the daemon changes its directory later."""
    monkeypatch.chdir(tmp_path)

    assert LocalOptions.parse("here").file == str(tmp_path / "here")


async def test_network_namespaces(spawn, monkeypatch):
    """Members in different network namespaces cannot wake each other, and hear of everything all the same."""
    wake = LocalSession._wake_one
    monkeypatch.setattr(
        LocalSession, "_wake_one", lambda self, session: wake(self, session) if session == self._id else None
    )
    first = await spawn(0)
    second = await spawn(1)

    marks = [b"one", b"two", b"three"]  # it has a wake-up of its own for the first or the second
    for mark in marks:
        await settle([first, second], mark)

    assert payloads(first) == payloads(second) == marks


# -- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"#!/bin/sh\n" * 20, "not made by"),
        (MAGIC[:7], "truncated"),
        (HEADER.pack(MAGIC, VERSION, b"12345678")[:-3], "truncated"),
        (HEADER.pack(MAGIC, VERSION + 1, b"12345678"), "format 2"),
        (bytes(LOG_AT + 1), "not made by"),
    ],
)
async def test_foreign_file(file, content, match):
    """A file that is not ours is refused by name and stays as it is."""
    with open(file, "wb") as stream:
        stream.write(content)

    await refuse(file, match)

    with open(file, "rb") as stream:
        assert stream.read() == content


async def test_no_file(tmp_path):
    """A directory, a FIFO and a missing directory are refused with a sentence."""
    os.mkfifo(tmp_path / "fifo")

    await refuse(str(tmp_path), "cannot open")
    await refuse(str(tmp_path / "fifo"), "not a regular file")
    await refuse(str(tmp_path / "none" / "file"), "No such file")


@pytest.mark.parametrize("size", [0, 10, LOG_AT])
async def test_empty_file(file, spawn, size):
    """An empty file, and what a creator killed in the middle leaves, are used as new ones."""
    with open(file, "wb") as stream:
        stream.truncate(size)

    member = await spawn(0)
    await settle([member], b"mark")

    assert payloads(member) == [b"mark"]


async def test_damage_of_a_dead_cluster(file, spawn):
    """A log that nobody uses is dropped, whatever its bytes are."""
    member = await spawn(0)
    await member.leave()
    with open(file, "r+b") as stream:
        stream.seek(LOG_AT)
        stream.write(b"garbage" * 100)

    fresh = await spawn(1)
    await settle([fresh], b"mark")

    assert fresh.seen[0] == Joined(kit_node(1), b"", (kit_node(1),))


async def test_damage_while_in_use(file, spawn):
    """Bytes that no member wrote end every session that meets them, and refuse those who come."""
    member = await spawn(0)
    await settle([member], b"mark")
    with open(file, "ab") as stream:
        stream.write(b"garbage" * 100)

    await refuse(file, "damaged")
    with pytest.raises(SessionLost):
        await member.broadcast(b"x")


async def test_whole_record_damaged(file, spawn):
    """A record with a flipped bit is damage, not what a killed writer leaves."""
    member = await spawn(0)
    await settle([member], b"mark")
    with open(file, "r+b") as stream:
        stream.seek(LOG_AT + FRAME.size + 3)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 4]))

    await refuse(file, "damaged")


@pytest.mark.parametrize("length", [1, 5, 8, 12, FRAME.size, FRAME.size + 1, FRAME.size + 99])
async def test_killed_writer(file, spawn, length):
    """What a writer leaves that was killed at any byte is skipped by everybody, also twice in a row."""
    members = [await spawn(i) for i in range(2)]
    await settle(members, b"before")
    with open(file, "rb") as stream:
        token = HEADER.unpack(stream.read(HEADER.size))[2]
    body = b"b" * 100
    stump = (FRAME.pack(token, len(body), zlib.crc32(body)) + body)[:length]
    for _ in range(2):
        with open(file, "ab") as stream:
            stream.write(stump)

    await settle(members, b"after")
    late = await spawn(2)
    await settle([*members, late], b"late")

    assert payloads(members[1]) == [b"before", b"after", b"late"]
    assert late.seen[0] == Joined(kit_node(2), b"", (kit_node(0), kit_node(1), kit_node(2)))


async def test_no_space(file, spawn):
    """Without space a broadcast fails cleanly, the others see nothing of it, and with space it works again."""
    members = [await spawn(i) for i in range(2)]
    await settle(members, b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(file) + 500, hard))
    try:
        with pytest.raises(ClusterUnavailable, match="space"):
            await members[0].broadcast(b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    await settle(members, b"after")

    assert payloads(members[1]) == [b"before", b"after"]


@pytest.mark.parametrize("replaced", [False, True])
async def test_file_removed(file, spawn, replaced):
    """Sessions of a removed or replaced file are lost: those who come later would not see them."""
    member = await spawn(0, timeout_s=1.0)
    os.unlink(file)
    if replaced:
        await spawn(1)

    await member.until(lambda: member.lost, PATIENCE_S)

    assert "removed or replaced" in member.lost


async def test_stopped_at_the_door(file, spawn):
    """Somebody stopped while joining keeps others from joining, with an error in bounded time, but not from working."""
    member = await spawn(0)
    stopped = Rendezvous(file)
    assert stopped._try_lock(0, 1)

    await refuse(file, "is it stopped", ClusterUnavailable, enter_timeout_s=0.05)
    await settle([member], b"mark")
    stopped.close()
    late = await spawn(1)
    await settle([member, late], b"late")

    assert payloads(late) == [b"late"]


async def test_compaction(file, spawn):
    """Disk space stays bounded however much is broadcast, and who joins later has the right view."""
    options = {"timeout_s": 0.5, "compact_bytes": 64 * 1024}
    members = [await spawn(i, **options) for i in range(2)]
    await members[1].update(kit_node(1, space=5))
    for member in members:
        await member.until(lambda member=member: len(member.seen) > 1, PATIENCE_S)
    for i in range(24):
        for _ in range(8):
            await members[i % 2].broadcast(bytes(64 * 1024))
        await anyio.sleep(0.05)  # several ticks pass
    with anyio.fail_after(PATIENCE_S):
        while os.stat(file).st_blocks * 512 > 2 * 1024 * 1024:
            await anyio.sleep(0.05)

    late = await spawn(2)
    await settle([*members, late], b"mark")

    assert os.path.getsize(file) > 12 * 1024 * 1024
    assert late.seen[0].view == (kit_node(0), kit_node(1, space=5), kit_node(2))
    for member in members:
        assert len(payloads(member)) == 24 * 8 + 1
        assert_sound(member.seen)


async def test_status(file, spawn):
    """The status names the file and counts the members."""
    member = await spawn(0)
    status = await member.status()

    assert status["file"] == file and status["members"] == 1 and status["state"] == "alive"


# -- deaths ----------------------------------------------------------------------------------------------------------


def worker(file: str, index: int) -> subprocess.Popen[bytes]:
    """A member in a process whose end nobody waits for."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sheepdog.testing.cluster_worker", "sheepdog_cluster_local", file, "uvloop"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    line = {"id": 1, "op": "join", "node": kit_node(index).pack().hex(), "greeting": ""}
    process.stdin.write(json.dumps(line).encode() + b"\n")
    process.stdin.flush()
    process.stdout.readline()
    return process


async def test_zombie(file, spawn):
    """A killed process that its parent has not waited for is dead."""
    member = await spawn(0)
    process = worker(file, 1)
    try:
        process.kill()
        await until_left(member, kit_node(1))
        with open(f"/proc/{process.pid}/stat") as stream:
            state = stream.read().rpartition(")")[2].split()[0]
    finally:
        process.wait()
        process.stdin.close()
        process.stdout.close()

    assert state == "Z"
    assert left(member, kit_node(1)) == 1


FORKING = """
import os, sys, time, anyio
from sheepdog.testing.cluster_kit import kit_node
from sheepdog_cluster_local import sheepdog_cluster_driver
async def main():
    async with sheepdog_cluster_driver(sys.argv[1]).join(kit_node(1), b""):
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        os.write(1, b"%d\\n" % child)
        await anyio.sleep(60)
anyio.run(main)
"""


async def test_child_keeps_the_lock(file, spawn):
    """A child process that inherited the lock does not hide the death of its parent."""
    member = await spawn(0)
    process = subprocess.Popen([sys.executable, "-c", FORKING, file], stdout=subprocess.PIPE)
    child = int(process.stdout.readline())
    try:
        process.kill()
        await until_left(member, kit_node(1))
    finally:
        os.kill(child, 9)
        process.wait()
        process.stdout.close()

    assert left(member, kit_node(1)) == 1


async def test_closed_without_leave(file, spawn):
    """A session whose descriptors are gone is dead although its process lives."""
    member = await spawn(0)
    async with LocalDriver(LocalOptions(file)).join(kit_node(1), b"") as session:
        session._file.close()
        await until_left(member, kit_node(1))
        session._closed = True
        session._socket.close()

    assert isinstance(member.seen[-1], Left)


async def test_lagging_reader(file, spawn):
    """A member that reads no events for a while is no obstacle and misses nothing."""
    async with LocalDriver(LocalOptions(file)).join(kit_node(0), b"") as session:
        other = await spawn(1)
        for i in range(2000):
            await other.broadcast(b"%d" % i)
        events = session.events()
        seen = [await anext(events) for _ in range(2002)]

    assert [event.payload for event in seen if isinstance(event, Delivered)] == [b"%d" % i for i in range(2000)]
