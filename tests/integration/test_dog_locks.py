"""Locks of vdis in a cluster formatted with ``-l`` (LCK-1 to LCK-8): by the wire protocol, listed and broken by dog."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from scenes import MiB, rows, vid_of_name, wait_serving

from sheepdog.client import admin
from sheepdog.client.volume import name_and_tag, pack_vdi_variant
from sheepdog.model.ids import inode_oid
from sheepdog.model.inode import SHORT_INODE_BYTES, map_offset
from sheepdog.testing.cluster import SheepCluster, wait_until
from sheepdog.wire.opcodes import Op
from sheepdog.wire.results import Result

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

NORMAL, SHARED = 0, 1
TGT = 0x0020
HEADING = "  Name         Id  VDI id  Tag            Owner node(s)\n"


@pytest.fixture(scope="module")
def formatted(start_cluster: Callable[..., SheepCluster]) -> SheepCluster:
    return start_cluster(3, driver="local", store="plain", redundancy="2")


@pytest.fixture
def cluster(formatted: SheepCluster) -> SheepCluster:
    """Three nodes with locks, and nothing stored."""
    for sheep in formatted.sheep:
        if not sheep.running:
            formatted.restart(sheep.index)
            wait_serving(formatted, sheep.index)
    formatted.wait_members()
    formatted.format("-f", "-l", "-z", "20")
    return formatted


def lock(cluster: SheepCluster, node: int, name: str, kind: int = NORMAL, *, tag: str = "") -> int:
    """The result of LOCK_VDI."""
    body = name_and_tag(name.encode(), tag.encode())
    with cluster.connect(node) as connection:
        return connection.request(Op.LOCK_VDI, variant=pack_vdi_variant(lock_type=kind), body=body).result


def release(cluster: SheepCluster, node: int, vid: int, kind: int = NORMAL) -> int:
    """The result of RELEASE_VDI."""
    with cluster.connect(node) as connection:
        return connection.request(Op.RELEASE_VDI, variant=pack_vdi_variant(base_vid=vid, lock_type=kind)).result


def listed(cluster: SheepCluster, node: int = 0) -> str:
    """What ``vdi lock list`` prints behind its heading."""
    text = cluster.dog("vdi", "lock", "list", node=node).stdout.decode()
    assert text.startswith(HEADING)
    return text[len(HEADING) :]


def owner(cluster: SheepCluster, node: int, state: str = "") -> str:
    return f" IPv4 ip:127.0.0.1 port:{cluster.sheep[node].port}" + (f"({state})" if state else "")


def row(flag: str, name: str, snap_id: int, vid: int, tag: str, *owners: str) -> str:
    return f"{flag} {name:<8}  {snap_id:5d}  {vid:6x}  {tag:<13} " + "".join(owners) + "\n"


@contextmanager
def target(cluster: SheepCluster, node: int) -> Iterator[Callable[..., int]]:
    """An iSCSI target on that node: ``do(opcode, ...)`` gives the result of a request with its flag."""
    with cluster.connect(node) as connection:
        yield lambda opcode, **fields: connection.request(opcode, flags=TGT, **fields).result


def test_exclusive(cluster: SheepCluster) -> None:
    """LCK-1: the owner is listed through every node; nobody else gets the vdi, of either kind, through any node, until
    it is released; a second release is harmless."""
    cluster.dog("vdi", "create", "v", "2M")
    vid = vid_of_name(cluster, "v")
    assert lock(cluster, 1, "v") == Result.SUCCESS
    for node in range(3):
        assert listed(cluster, node) == row(" ", "v", 0, vid, "", owner(cluster, 1))
        assert lock(cluster, node, "v") == Result.VDI_LOCKED == 7
        assert lock(cluster, node, "v", SHARED) == Result.VDI_LOCKED
    assert json.loads(cluster.dog("vdi", "lock", "list", "--json").stdout) == [
        {
            "name": "v", "snap_id": 0, "vid": f"{vid:x}", "tag": "", "shared": False,
            "owners": [{"host": "127.0.0.1", "port": cluster.sheep[1].port, "state": ""}],
        }
    ]  # fmt: skip
    assert release(cluster, 1, vid) == Result.SUCCESS
    assert listed(cluster) == ""
    assert release(cluster, 1, vid) == Result.SUCCESS
    assert lock(cluster, 2, "v") == Result.SUCCESS
    assert listed(cluster, 1) == row(" ", "v", 0, vid, "", owner(cluster, 2))


def test_owner_dies(cluster: SheepCluster) -> None:
    """LCK-2, LCK-4: an exclusive lock outlives its node and is broken by ``unlock``; shared participants of a dead node
    are gone, and with the last of them the lock."""
    for name in ("alone", "both", "lonely"):
        cluster.dog("vdi", "create", name, "2M")
    vids = {name: vid_of_name(cluster, name) for name in ("alone", "both", "lonely")}
    assert lock(cluster, 2, "alone") == 0
    for node in (1, 2):
        assert lock(cluster, node, "both", SHARED) == 0
    assert lock(cluster, 2, "lonely", SHARED) == 0
    gone = owner(cluster, 2)
    cluster.kill(2)
    cluster.wait_members()
    expected = {vids["alone"]: row(" ", "alone", 0, vids["alone"], "", gone)}
    expected[vids["both"]] = row(" ", "both", 0, vids["both"], "", owner(cluster, 1, "invalidated"))
    wait_until(lambda: f"port:{cluster.sheep[2].port}(" not in listed(cluster), "the dead participant to go")
    for node in (0, 1):
        assert listed(cluster, node).replace("(shared)", "(invalidated)").replace("(modified)", "(invalidated)") == (
            "".join(text for _, text in sorted(expected.items()))
        )
    assert lock(cluster, 0, "alone") == Result.VDI_LOCKED
    assert lock(cluster, 0, "lonely") == Result.SUCCESS
    done = cluster.dog("vdi", "lock", "unlock", "alone")
    assert (done.stdout, done.stderr) == (b"", b"")
    assert lock(cluster, 0, "alone") == Result.SUCCESS


def test_shared(cluster: SheepCluster) -> None:
    """LCK-3: the first is "modified", the next "invalidated" until it has read the inode again; until then all it asks
    for with the flag of a target fails with 0x1d; then both are "shared", and whoever comes then is "shared", too. A
    map write by one makes it "modified" and the others "invalidated". Twice the same, or exclusively, gets 7."""
    cluster.dog("vdi", "create", "mp", "2M")
    vid = vid_of_name(cluster, "mp")

    def states(*words: str) -> str:
        return row(" ", "mp", 0, vid, "", *(owner(cluster, node, word) for node, word in enumerate(words)))

    assert lock(cluster, 0, "mp", SHARED) == 0
    assert listed(cluster) == states("modified")
    assert lock(cluster, 1, "mp", SHARED) == 0
    assert listed(cluster, 2) == states("modified", "invalidated")
    assert lock(cluster, 1, "mp", SHARED) == lock(cluster, 2, "mp") == Result.VDI_LOCKED

    oid = inode_oid(vid)
    with target(cluster, 1) as second, target(cluster, 0) as first:
        assert second(Op.READ_OBJ, oid=oid, data_length=1) == Result.INODE_INVALIDATED == 0x1D
        assert second(Op.WRITE_OBJ, oid=oid, offset=map_offset(0), body=bytes(4)) == Result.INODE_INVALIDATED
        assert first(Op.READ_OBJ, oid=oid, data_length=1) == 0
        assert second(Op.READ_OBJ, oid=oid, data_length=SHORT_INODE_BYTES) == 0
        assert listed(cluster) == states("shared", "shared")
        assert second(Op.READ_OBJ, oid=oid, data_length=1) == 0
        assert lock(cluster, 2, "mp", SHARED) == 0
        assert listed(cluster) == states("shared", "shared", "shared")

        assert second(Op.CREATE_AND_WRITE_OBJ, oid=vid << 32, copies=2, body=b"x" * MiB) == 0
        assert second(Op.WRITE_OBJ, oid=oid, copies=2, offset=map_offset(0), body=vid.to_bytes(4, "little")) == 0
        assert listed(cluster) == states("invalidated", "modified", "invalidated")
        assert first(Op.READ_OBJ, oid=vid << 32, data_length=512) == Result.INODE_INVALIDATED
        assert first(Op.READ_OBJ, oid=oid, data_length=SHORT_INODE_BYTES) == 0
        assert listed(cluster) == states("shared", "shared", "invalidated")
    assert cluster.dog("vdi", "read", "mp", "0", "512", node=2).stdout == b"x" * 512

    # The part of the contacted node goes, one at a time; one that has none drops nothing.
    cluster.dog("vdi", "lock", "unlock", "mp", node=1)
    assert listed(cluster) == row(" ", "mp", 0, vid, "", owner(cluster, 0, "shared"), owner(cluster, 2, "invalidated"))
    cluster.dog("vdi", "lock", "unlock", "mp", node=1)
    assert listed(cluster).count("port:") == 2
    for node in (0, 2):
        cluster.dog("vdi", "lock", "unlock", "mp", node=node)
    assert listed(cluster) == ""
    assert lock(cluster, 1, "mp") == 0


def test_unlock_messages(cluster: SheepCluster) -> None:
    """LCK-4: what is not locked or does not exist; exit 1, nothing on stdout."""
    cluster.dog("vdi", "create", "v", "2M")
    cluster.dog("vdi", "snapshot", "-s", "tag", "v")
    now, old = vid_of_name(cluster, "v"), vid_of_name(cluster, "v", tag="tag")
    for words, answer in (
        (("v",), f"VDI v (vid={now:x}) is not locked\n"),
        (("-s", "tag", "v"), f"VDI v (tag=tag, vid={old:x}) is not locked\n"),
        (("-s", "1", "v"), f"VDI v (snapid=1, vid={old:x}) is not locked\n"),
        (("nosuch",), "Failed to find VDI nosuch: No VDI found\n"),
        (("-s", "x", "v"), "Failed to find VDI v (tag=x): Failed to find requested tag\n"),
        (("-s", "9", "v"), "Failed to find VDI v (snapid=9): Failed to find requested tag\n"),
    ):
        refused = cluster.dog("vdi", "lock", "unlock", *words, check=False)
        assert (refused.returncode, refused.stdout, refused.stderr.decode()) == (1, b"", answer)
    for words in (("lock",), ("lock", "unlock")):
        usage = cluster.dog("vdi", *words, check=False)
        assert (usage.returncode, usage.stdout[:9]) == (64, b"Usage: do")


def test_snapshot_of_a_locked_vdi(cluster: SheepCluster) -> None:
    """LCK-5: whether the lock stays with the snapshot or goes on with the working vdi, exactly one of them has it; if
    it went along, nobody else gets the vdi, and the client's release of the old id ends it."""
    cluster.dog("vdi", "create", "v", "2M")
    old = vid_of_name(cluster, "v")
    assert lock(cluster, 0, "v") == 0
    cluster.dog("vdi", "snapshot", "-s", "tag", "v", node=1)
    new = vid_of_name(cluster, "v")
    text = listed(cluster, 2)
    assert text in (
        row("s", "v", 1, old, "tag", owner(cluster, 0)),
        row(" ", "v", 0, new, "", owner(cluster, 0)),
    )
    if text.startswith(" "):
        assert lock(cluster, 1, "v") == Result.VDI_LOCKED
    release(cluster, 0, old)
    assert listed(cluster) == ""
    assert lock(cluster, 1, "v") == 0


def test_joiner_and_restart(cluster: SheepCluster) -> None:
    """LCK-6: a node that comes back knows all locks; after a restart of everything there are none."""
    for name in ("one", "two"):
        cluster.dog("vdi", "create", name, "2M")
    cluster.stop(2)
    cluster.wait_members()
    lock(cluster, 0, "one")
    for node in (0, 1):
        lock(cluster, node, "two", SHARED)
    before = listed(cluster)
    assert before.count("\n") == 2
    cluster.restart(2)
    wait_serving(cluster, 2)
    assert listed(cluster, 2) == before
    assert lock(cluster, 2, "one") == Result.VDI_LOCKED
    cluster.wait_recovered()

    cluster.dog("cluster", "shutdown")
    for sheep in cluster.sheep:
        assert sheep.process is not None
        sheep.process.wait(30)
    for sheep in cluster.sheep:
        cluster.restart(sheep.index, wait=False)
    cluster.wait_members()
    for node in range(3):
        wait_serving(cluster, node)
        assert listed(cluster, node) == ""
    assert lock(cluster, 2, "one") == 0
    with cluster.connect(0) as connection:

        def owned() -> int:
            return sum(state.owner is not None for state in admin.vdi_states(connection.request))

        wait_until(lambda: owned() == 1, "the other node to hear of the lock")


def test_without_locking(cluster: SheepCluster) -> None:
    """LCK-7: in a cluster without -l several clients open one vdi, and the list stays empty."""
    cluster.format("-f", "-z", "20")
    cluster.dog("vdi", "create", "v", "2M")
    vid = vid_of_name(cluster, "v")
    assert [lock(cluster, node, "v", kind) for node in range(3) for kind in (NORMAL, SHARED)] == [0] * 6
    assert listed(cluster) == ""
    assert release(cluster, 0, vid) == 0
    refused = cluster.dog("vdi", "lock", "unlock", "v", check=False)
    assert (refused.returncode, refused.stderr.decode()) == (1, f"VDI v (vid={vid:x}) is not locked\n")


def test_deletion(cluster: SheepCluster) -> None:
    """LCK-8: a locked vdi is deleted together with its lock, or its deletion is refused; never the one without the
    other."""
    cluster.dog("vdi", "create", "v", "2M")
    lock(cluster, 0, "v")
    cluster.dog("vdi", "delete", "v", check=False, node=1)
    assert bool(rows(cluster)) == bool(listed(cluster))
    assert "port" not in cluster.dog("vdi", "lock", "list").stdout.decode() or rows(cluster)


def test_many_locks(cluster: SheepCluster) -> None:
    """VDI-20: a list of more vdis and locks than one answer's first room has (512 states) is complete."""
    count = 610
    with cluster.connect(0) as connection:
        for number in range(count):
            name = f"n{number:03d}".encode()
            made = connection.request(Op.NEW_VDI, variant=pack_vdi_variant(size=MiB), body=name.ljust(256, b"\0"))
            assert made.result == 0
            assert connection.request(Op.LOCK_VDI, variant=pack_vdi_variant(), body=name_and_tag(name)).result == 0
    lines = listed(cluster, 1).splitlines()
    assert sorted(line.split()[0] for line in lines) == [f"n{number:03d}" for number in range(count)]
    assert len(rows(cluster, node=2)) == count
    document = json.loads(cluster.dog("vdi", "list", "--json").stdout)
    assert {one["name"] for one in document} == {f"n{number:03d}" for number in range(count)}
