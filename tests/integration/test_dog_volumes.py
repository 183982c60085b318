"""Volumes through dog: numbers used again, other copies, object sizes, hyper volumes, tracking (VDI-14 to VDI-21, HV,
SNAP-9 to SNAP-11)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from scenes import (
    MiB,
    only,
    pattern,
    read,
    read_all,
    rows,
    stored,
    vid_of_name,
    volume,
    wait_serving,
    wait_stored,
    write,
)

from sheepdog.client import admin
from sheepdog.model.hashing import vdi_hash
from sheepdog.model.ids import data_oid, inode_oid, is_btree, is_inode, is_ledger
from sheepdog.testing.cluster import SheepCluster, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

PiB = 1 << 50


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., SheepCluster]) -> SheepCluster:
    """Five nodes, 2 copies, objects of 1 MiB; each test has names of its own."""
    cluster = start_cluster(5, driver="local", store="plain", redundancy="2")
    cluster.format("-z", "20")
    return cluster


def refused(cluster: SheepCluster, code: int, stderr: str, *words: str, stdout: bytes | None = b"") -> None:
    """The command fails with these words and this code; a usage error prints the usage."""
    done = cluster.dog(*words, check=False)
    assert (done.returncode, done.stderr.decode()) == (code, stderr)
    if code == 64:
        assert done.stdout.startswith(b"Usage: dog ")
    elif stdout is not None:
        assert done.stdout == stdout


# ---- numbers


def test_recycling_after_a_restart(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """VDI-15: what was deleted before a restart of everybody still counts as deleted: the rest of the family takes its
    inodes along, the numbers come back, and all sheep agree on what is used and deleted."""
    cluster = fresh_cluster(2, driver="local", store="plain", redundancy="1")
    cluster.format("-R", "-z", "20")
    cluster.dog("vdi", "create", "v", "2M")
    for tag in ("a", "b"):
        write(cluster, "v", 0, tag.encode())
        cluster.dog("vdi", "snapshot", "-s", tag, "v")
    cluster.dog("vdi", "delete", "-s", "a", "v")
    cluster.dog("vdi", "delete", "v")
    restart_all(cluster)
    with cluster.connect(0) as first, cluster.connect(1) as second:
        for opcode in (admin.OP_READ_VDIS, admin.OP_READ_DEL_VDIS):
            answers = [one.request(opcode, data_length=1 << 21).body for one in (first, second)]
            assert answers[0] == answers[1]
    assert [row[9] for row in rows(cluster)] == ["b"]
    assert read(cluster, "v", 0, 1, tag="b") == b"b"
    cluster.dog("vdi", "delete", "-s", "b", "v", node=1)
    wait_until(lambda: not cluster.census(), "everything of the family to go")
    cluster.dog("vdi", "create", "w", "1M", node=1)
    assert vid_of_name(cluster, "w") == 1


def restart_all(cluster: SheepCluster) -> None:
    """The cluster was shut down and runs again."""
    cluster.dog("cluster", "shutdown")
    for sheep in cluster.sheep:
        assert sheep.process is not None
        sheep.process.wait(30)
    for sheep in cluster.sheep:
        cluster.restart(sheep.index, wait=False)
    cluster.wait_members()
    for sheep in cluster.sheep:
        wait_serving(cluster, sheep.index)


def test_recycling(start_cluster: Callable[..., SheepCluster]) -> None:
    """VDI-14, VDI-15: without -R deleted vids stay used and their inodes stay; with it ids start from the lowest free
    one, a name with snapshots cannot be made again, and a family that is deleted as a whole leaves no inode."""
    cluster = start_cluster(1, driver="local", store="plain", redundancy="1")
    cluster.format("-z", "20")
    cluster.dog("vdi", "create", "v", "1M")
    cluster.dog("vdi", "delete", "v")
    assert (len(stored(cluster, is_inode)), rows(cluster)) == (1, [])
    cluster.dog("vdi", "create", "v", "1M")
    assert vid_of_name(cluster, "v") == vdi_hash(b"v") + 1

    cluster.format("-f", "-R", "-z", "20")
    for _ in range(3):
        cluster.dog("vdi", "create", "v", "2M")
        assert vid_of_name(cluster, "v") == 1
        write(cluster, "v", 0, b"x")
        cluster.dog("vdi", "snapshot", "-s", "s", "v")
        write(cluster, "v", MiB, b"y")
        cluster.dog("vdi", "delete", "v")
        refused(cluster, 1, "Failed to create VDI v: VDI exists already\n", "vdi", "create", "v", "1M")
        assert [row[9] for row in rows(cluster)] == ["s"]
        assert read(cluster, "v", 0, 1, tag="s") == b"x"
        cluster.dog("vdi", "delete", "-s", "s", "v")
        wait_until(lambda: not cluster.census(), "everything of the family to go")


# ---- copies


def test_alter_copies_of_a_vdi(cluster: SheepCluster) -> None:
    """VDI-16: 2, 3, 5 and back to 1: the copies follow and the content stays."""
    cluster.dog("vdi", "create", "more", "3M")
    content = pattern(1, 3 * MiB)
    write(cluster, "more", 0, content)
    vid = vid_of_name(cluster, "more")
    before = 2
    for copies in (3, 5, 1, 2):
        done = cluster.dog("vdi", "alter-copy", "-c", str(copies), "-f", "more", node=copies % 5)
        message = f"more's redundancy level is set to {copies}, the old one was {before}.\n"
        assert (done.stdout, done.stderr.decode()) == (b"", message)
        before = copies
        wait_stored(cluster, {data_oid(vid, index): copies for index in range(3)}, only([vid]))
        wait_until(lambda: stored(cluster, is_inode)[inode_oid(vid)] == copies, f"{copies} inodes")  # noqa: B023
        assert [row[8] for row in rows(cluster, "more")] == [str(copies)]
        assert read_all(cluster, "more", node=4) == content
        assert cluster.dog("vdi", "check", "more").stdout == b"finish check&repair more\n"


def test_alter_copies_refused(cluster: SheepCluster) -> None:
    """VDI-16, CLI-6: what cannot be altered has its words; declining and refusing change nothing."""
    cluster.dog("vdi", "create", "same", "1M")
    cluster.dog("vdi", "create", "-c", "2:1", "coded", "1M")
    cluster.dog("vdi", "create", "parent", "1M")
    cluster.dog("vdi", "snapshot", "-s", "s", "parent")
    cluster.dog("vdi", "clone", "-s", "s", "parent", "child")
    cluster.dog("vdi", "clone", "-n", "-s", "s", "parent", "free")
    before = rows(cluster)
    refused(cluster, 1, "same's redundancy level is already set to 2, nothing changed.\n",
            "vdi", "alter-copy", "-c", "2", "same")  # fmt: skip
    refused(cluster, 1, "coded's copy policy is erasure code, changing it is not supported yet.\n",
            "vdi", "alter-copy", "-c", "3", "coded")  # fmt: skip
    refused(cluster, 64, "Changing redundancy level of erasure coded vdi is not supported yet.\n",
            "vdi", "alter-copy", "-c", "4:2", "same")  # fmt: skip
    refused(cluster, 1, "Failed to open VDI nosuch (snapshot id: 0 snapshot tag: ): No VDI found\n"
            "Reading nosuch's vdi object failure.\n", "vdi", "alter-copy", "-c", "3", "nosuch")  # fmt: skip
    for name in ("parent", "child"):
        refused(cluster, 1, "Only standalone vdi supports changing redundancy level.\n"
                f"Please clone {name} with -n (--no-share) option first.\n",
                "vdi", "alter-copy", "-c", "3", name)  # fmt: skip
    for answer in (b"", b"no\n", b"y\n"):
        declined = cluster.dog("vdi", "alter-copy", "-c", "3", "same", input=answer)
        assert b"Caution! Changing VDI's redundancy level will affect" in declined.stdout
        many = cluster.dog("vdi", "alter-copy", "-c", "6", "same", input=answer)
        assert many.stdout.startswith(b"Number of copies (6) is larger than number of nodes (5).\nAre you sure")
    assert rows(cluster) == before
    done = cluster.dog("vdi", "alter-copy", "free", input=b"yes\n")
    assert done.stdout.startswith(b"The vdi's redundancy level is not specified, use 3 as default.\n")
    assert done.stderr == b"free's redundancy level is set to 3, the old one was 2.\n"
    assert [row[8] for row in rows(cluster, "free")] == ["3"]


def test_alter_copies_of_the_cluster(start_cluster: Callable[..., SheepCluster]) -> None:
    """VDI-16: the default changes for later vdis only; the same value, an erasure code and a declined question change
    nothing."""
    cluster = start_cluster(2, driver="local", store="plain", redundancy="1")
    cluster.format("-z", "20")
    cluster.dog("vdi", "create", "before", "1M")
    refused(cluster, 1, "The cluster's redundancy level is already set to 1, nothing changed.\n",
            "cluster", "alter-copy", "-c", "1")  # fmt: skip
    refused(cluster, 64, "Changing redundancy level of erasure coded vdi is not supported yet.\n",
            "cluster", "alter-copy", "-c", "2:1")  # fmt: skip
    assert b"Changing cluster's redundancy" in cluster.dog("cluster", "alter-copy", "-c", "2", input=b"no\n").stdout
    assert b"plain with 1 redundancy" in cluster.dog("cluster", "info", "-v").stdout
    done = cluster.dog("cluster", "alter-copy", "-c", "2", input=b"yes\n")
    assert done.stderr == b"The cluster's redundancy level is set to 2, the old one was 1.\n"
    for node in (0, 1):
        assert b"plain with 2 redundancy" in cluster.dog("cluster", "info", "-v", node=node).stdout
        cluster.dog("vdi", "create", f"after{node}", "1M", node=node)
    assert {row[1]: row[8] for row in rows(cluster)} == {"before": "1", "after0": "2", "after1": "2"}
    three = cluster.dog("cluster", "alter-copy", "-f")
    assert three.stdout == b"The cluster's redundancy level is not specified, use 3 as default.\n"
    cluster.dog("cluster", "format", "-f", "-c", "2:1", input=b"yes\n")
    refused(cluster, 1, "The cluster's copy policy is erasure code, changing it is not supported yet.\n",
            "cluster", "alter-copy", "-c", "1")  # fmt: skip


# ---- sizes


def test_object_sizes(cluster: SheepCluster) -> None:
    """VDI-17: vdis with objects of 16, 4 and 1 MB side by side: listing, index arithmetic and map follow."""
    for shift in (24, 22, 20):
        name, size = f"shift{shift}", 1 << shift
        words = () if shift == 20 else ("-z", str(shift))
        cluster.dog("vdi", "create", *words, name, "40M")
        for index in (0, 1):
            write(cluster, name, index * size + size - 3, b"border", node=shift % 5)
        vid = vid_of_name(cluster, name)
        assert [row[10] for row in rows(cluster, name)] == [str(shift)]
        assert cluster.dog("vdi", "object", "map", name).stdout.decode() == "Index       VID\n" + "".join(
            f"{index:08d} {vid:8x}\n" for index in range(3)
        )
        assert read(cluster, name, size - 4, 8) == b"\0border\0"
        wait_stored(cluster, {data_oid(vid, index): 2 for index in range(3)}, only([vid]))
        assert [int(row[4]) for row in rows(cluster, name)] == [3 * size]


def test_tracking(start_cluster: Callable[..., SheepCluster]) -> None:
    """VDI-21, CLI-4: location, track, listings and the disks agree after the oldest node left and three others came."""
    cluster = start_cluster(5, driver="local", store="plain", redundancy="2")
    for index in (3, 4):
        cluster.stop(index)
    cluster.wait_members()
    cluster.format("-z", "20")
    cluster.dog("vdi", "create", "v", "2M")
    write(cluster, "v", MiB, b"x")
    vid = vid_of_name(cluster, "v")
    oid = data_oid(vid, 1)

    def holders() -> set[str]:
        return {cluster.address(index) for index in cluster.census()[oid, -1] if cluster.sheep[index].running}

    listing = rows(cluster)
    expected = {1: holders()}
    oldest = cluster.sheep[0]
    numbers = [line.split() for line in cluster.dog("node", "list", "-r", node=1).stdout.decode().splitlines()]
    [number] = [words[0] for words in numbers if words[1] == oldest.address]
    assert cluster.dog("node", "kill", number, node=1).stdout == b""
    assert oldest.process is not None and oldest.process.wait(30) == 0
    cluster.wait_members()
    cluster.wait_recovered()
    expected[2] = holders()
    for epoch, index in ((3, 3), (4, 4), (5, 0)):
        cluster.restart(index)
        cluster.wait_recovered()
        wait_until(lambda: len(holders()) == 2, "two copies")
        expected[epoch] = holders()
    for sheep in cluster.sheep:
        assert rows(cluster, node=sheep.index) == listing

    text = cluster.dog("vdi", "track", "-i", "1", "v", node=4).stdout.decode()
    blocks = text.split("\n\n")
    assert blocks[0] == f"Tracking the object {oid:016x} (the inode vid 0x{vid:x} idx 1) with 5 nodes"
    for block, epoch in zip(blocks[1:], (5, 4, 3, 2, 1), strict=True):
        heading, line, *nodes = block.splitlines()
        assert heading == f"obj {oid:016x} locations at epoch {epoch}, copies = 2"
        assert line == "-" * 51
        assert set(nodes) == expected[epoch]
    document = json.loads(cluster.dog("vdi", "track", "--json", "-o", f"{oid:x}", "v").stdout)
    assert {one["epoch"]: set(one["nodes"]) for one in document["epochs"]} == expected
    inode = cluster.dog("vdi", "track", "v").stdout.decode()
    assert inode.startswith(f"Tracking the inode object 0x{vid:x} with 5 nodes\n\nobj {inode_oid(vid):016x} locations")
    location = cluster.dog("vdi", "object", "location", "-i", "1", "v").stdout.decode()
    assert set(location.splitlines()[-1].split()) == expected[5]
    assert {line.split()[0] for line in location.splitlines() if line.endswith(" has the object")} == expected[5]
    hole = cluster.dog("vdi", "object", "location", "-i", "0", "v")
    assert (hole.returncode, hole.stdout.decode()) == (0, f"The inode object 0x{vid:x} idx 0 is not allocated\n")
    refused(cluster, 1, "", "vdi", "track", "-i", "0x100000000", "v", stdout=b"The offset is too large!\n")
    refused(cluster, 1, "", "vdi", "object", "location", "-i", "4294967296", "v", stdout=b"The offset is too large!\n")


# ---- hyper volumes


def test_hyper_volume(start_cluster: Callable[..., SheepCluster]) -> None:
    """HV-1, HV-2, HV-5, SNAP-12: 16 PB are listed, ten places up to the end read what was written, holes are zeros; the
    same with a node gone, after its return and after a restart of everybody, and so for snapshots, a clone and strips;
    deleting frees the objects and the nodes of the tree."""
    cluster = start_cluster(3, driver="local", store="plain", redundancy="2")
    cluster.format()
    snapshots: dict[tuple[str, str], bytes] = {}
    for name, words in (("chain", ("-z", "20")), ("strips", ("-z", "20", "-c", "2:1"))):
        cluster.dog("vdi", "create", *words, name, "3M")
        for number in range(3):
            write(cluster, name, number * MiB // 2, pattern(number, MiB))
            cluster.dog("vdi", "snapshot", "-s", f"s{number}", name)
            snapshots[name, f"s{number}"] = read_all(cluster, name)
    cluster.dog("vdi", "clone", "-s", "s1", "chain", "clone")
    write(cluster, "clone", 5, b"clone")
    cluster.dog("vdi", "snapshot", "-s", "mine", "clone")
    snapshots["clone", "mine"] = read_all(cluster, "clone")
    cluster.dog("vdi", "create", "-y", "huge", "16P")
    assert b"  16 PB " in cluster.dog("vdi", "list").stdout
    [row] = rows(cluster, "huge")
    assert row[3] == str(16 * PiB)
    places = [number * (16 * PiB // 10) // 4096 * 4096 for number in range(1, 10)] + [16 * PiB - MiB]
    for number, place in enumerate(places):
        with volume(cluster, "huge", node=number % 3) as opened:
            opened.write(place, pattern(number, MiB))

    def check() -> None:
        for number, ((name, tag), content) in enumerate(snapshots.items()):
            assert read_all(cluster, name, tag=tag, node=cluster.live[number % len(cluster.live)].index) == content
        for number, place in enumerate(places):
            node = cluster.live[number % len(cluster.live)].index
            assert read(cluster, "huge", place, MiB, node=node) == pattern(number, MiB)
        assert read(cluster, "huge", 5 * MiB, MiB) == bytes(MiB)
        assert read(cluster, "huge", places[3] + 64 * MiB, MiB) == bytes(MiB)

    check()
    map_rows = cluster.dog("vdi", "object", "map", "huge").stdout.decode().splitlines()[1:]
    indexes = sorted({at >> 22 for place in places for at in (place, place + MiB - 1)})
    assert [int(line.split()[0]) for line in map_rows] == indexes
    cluster.kill(2)
    cluster.wait_recovered()
    check()
    cluster.restart(2)
    cluster.wait_recovered()
    check()
    restart_all(cluster)
    check()
    checked = cluster.dog("cluster", "check")
    assert checked.stderr == b"" and b"fixed" not in checked.stdout
    for row in rows(cluster):
        cluster.dog("vdi", "delete", *(("-s", row[2]) if row[0] == "s" else ()), row[1])
    wait_stored(cluster, {})
    wait_stored(cluster, {}, is_btree)
    wait_stored(cluster, {}, is_ledger)
    assert rows(cluster) == []


def test_hyper_volume_index(cluster: SheepCluster) -> None:
    """HV-3: many objects in a row, backwards and at random places keep the index in order; all of it can be deleted."""
    from sheepdog.client.volume import Volume, open_vdi

    cluster.dog("vdi", "create", "-y", "index", "1P")
    vid = vid_of_name(cluster, "index")
    wanted: dict[int, int] = {}
    with cluster.connect(0, timeout_s=60.0) as connection:
        opened = Volume(open_vdi(connection.request, b"index"))
        indexes = [*range(40), *range(5000, 4960, -1), *(number * 6_700_417 % (1 << 28) for number in range(40))]
        for number, index in enumerate(indexes):
            opened.write(index << 22, number.to_bytes(4, "little"))
            wanted[index] = number
    with volume(cluster, "index", node=3) as again:
        assert [index for index, _ in again.inode.map.items()] == sorted(wanted)
        for index, number in wanted.items():
            assert again.read(index << 22, 4) == number.to_bytes(4, "little")
    cluster.dog("vdi", "delete", "index", node=2)
    wait_stored(cluster, {}, only([vid]))
    wait_until(lambda: not stored(cluster, is_btree), "the nodes of the tree to go")


def test_hyper_volume_limits(cluster: SheepCluster) -> None:
    """HV-4, SNAP-11: what is refused, with its words; growing up to the limit works."""
    refused(cluster, 1, "Don't specify both -y and -z options, please\n",
            "vdi", "create", "-y", "-z", "22", "limit", "1G")  # fmt: skip
    refused(cluster, 64, "VDI size is too large\n", "vdi", "create", "-y", "limit", str(16 * PiB + 1))
    refused(cluster, 64, "VDI size is larger than 4.0 TB bytes, please use '-y' to create a hyper volume with size up "
            "to 16 PB bytes or use '-z' to create larger object size volume\n",
            "vdi", "create", "-z", "22", "limit", "5T")  # fmt: skip
    assert rows(cluster, "limit") == []
    cluster.dog("vdi", "create", "-y", "limit", "5T")
    refused(cluster, 1, "creating a snapshot of hypervolume is not supported\n", "vdi", "snapshot", "-s", "s", "limit")
    cluster.dog("vdi", "resize", "limit", "16P")
    refused(cluster, 64, f"New VDI size is too large This volume's max size is {16 * PiB}\n",
            "vdi", "resize", "limit", str(16 * PiB + 1))  # fmt: skip
    refused(cluster, 64, "Shrinking VDIs is not implemented\n", "vdi", "resize", "limit", "1P")
    write(cluster, "limit", 16 * PiB - 5, b"end", node=2)
    assert read(cluster, "limit", 16 * PiB - 6, 6) == b"\0end\0\0"
    cluster.dog("vdi", "delete", "limit")


# ---- snapshots


def test_vm_state(cluster: SheepCluster) -> None:
    """SNAP-10: what a client saves as vm state with a snapshot is there under that snapshot's id, also after the vdi
    went on; it is checked with the snapshot, and goes with it."""
    from sheepdog.client.volume import read_object, write_object
    from sheepdog.model.ids import vmstate_oid

    cluster.dog("vdi", "create", "vm", "2M")
    vid = vid_of_name(cluster, "vm")
    state = pattern(5, 3 * 4096)
    with cluster.connect(1) as connection:
        write_object(connection.request, vmstate_oid(vid, 0), state, copies=2, create=True)
        # QEMU says in the inode how much there is, before it makes the snapshot.
        write_object(connection.request, inode_oid(vid), len(state).to_bytes(8, "little"), offset=544, copies=2)
    cluster.dog("vdi", "snapshot", "-s", "saved", "vm")
    write(cluster, "vm", 0, b"after")
    with cluster.connect(2) as connection:
        old = vid_of_name(cluster, "vm", tag="saved")
        assert old == vid
        assert read_object(connection.request, vmstate_oid(old, 0), len(state)) == state
    holder = cluster.sheep[cluster.census()[vmstate_oid(old, 0), -1][0]]
    (holder.directory / "obj" / f"{vmstate_oid(old, 0):016x}").unlink()
    assert f"missing {vmstate_oid(old, 0):016x} on {holder.address}\n" in (
        cluster.dog("vdi", "check", "--dry-run", "-s", "saved", "vm", check=False).stdout.decode()
    )
    assert cluster.dog("vdi", "check", "-s", "saved", "vm").stdout.decode() == (
        f"fixed missing {vmstate_oid(old, 0):016x}\nfinish check&repair vm\n"
    )
    cluster.dog("vdi", "delete", "-s", "saved", "vm")
    wait_until(lambda: not stored(cluster, lambda oid: oid == vmstate_oid(old, 0)), "the vm state to go")


def test_snapshot_output(cluster: SheepCluster) -> None:
    """SNAP-9: -v prints both ids, in words or raw; so do create, clone and rollback. -R without changes makes none."""
    made = cluster.dog("vdi", "create", "-v", "ids", "2M").stdout.decode()
    vid = vid_of_name(cluster, "ids")
    assert made == f"VDI ID of newly created VDI: {vid:x}\n"
    write(cluster, "ids", 0, b"1")
    text = cluster.dog("vdi", "snapshot", "-v", "-s", "a", "ids").stdout.decode()
    new = vid_of_name(cluster, "ids")
    assert text == f"new VID of original VDI: {new:x}, VDI ID of newly created snapshot: {vid:x}\n"
    skipped = cluster.dog("vdi", "snapshot", "-R", "-v", "-s", "b", "ids")
    assert skipped.stderr == b"VDI ids doesn't have its own objects, skipping creation of snapshot\n"
    write(cluster, "ids", 0, b"2")
    raw = cluster.dog("vdi", "snapshot", "-R", "-v", "-r", "-s", "b", "ids").stdout.decode()
    assert re.fullmatch(rf"[0-9a-f]+ {new:x}\n", raw)
    clone = cluster.dog("vdi", "clone", "-v", "-r", "-s", "a", "ids", "ids2").stdout.decode()
    assert clone == f"{vid_of_name(cluster, 'ids2'):x}\n"
    back = cluster.dog("vdi", "rollback", "-f", "-v", "-s", "a", "ids").stdout.decode()
    assert back == f"New VDI ID of rollbacked VDI: {vid_of_name(cluster, 'ids'):x}\n"
    assert read(cluster, "ids", 0, 1) == b"1"
    for name in ("ids", "ids2"):
        cluster.dog("vdi", "delete", name)
    for tag in ("a", "b"):
        cluster.dog("vdi", "delete", "-s", tag, "ids")
    wait_stored(cluster, {}, only([vid, new]))
    wait_until(lambda: not stored(cluster, is_ledger), "the ledgers to go")
