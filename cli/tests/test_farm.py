"""The directory of cluster snapshots, against one that the original wrote."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import replay
from clusters import Cluster

from sheepdog.model.clusterinfo import ClusterInfo
from sheepdog.model.farm import SnapshotLog, TrunkEntry
from sheepdog.model.inode import INODE_BYTES, InodeHeader
from sheepdog.model.vid_bitmap import VidBitmap
from sheepdog.testing.vectors import load_json, pattern, unpack_archive, vectors_path
from sheepdog_cli.dog_commands.farm import Farm, FarmError


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """The recorded directory, unpacked."""
    unpack_archive(vectors_path() / "snapshots" / "cluster-snapshot.tar.gz", tmp_path)
    return tmp_path / "cs"


def show(directory: Path, tag: str, *names: str) -> replay.Outcome:
    session = "dog-cluster-snapshot-show-1n.jsonl"
    return replay.replay(session, ["cluster", "snapshot", "show", tag, str(directory), *names])


def test_list(recorded: Path) -> None:
    """Index, tag and time of every state that the original saved."""
    outcome = replay.run_dog(["cluster", "snapshot", "list", str(recorded)])
    rows = load_json("snapshots/cluster-snapshot.json")["list"]

    assert outcome.stdout.decode() == "Index\t\tTag\t\tSnapshot Time\n" + "".join(
        f"{row['index']}\t\t{row['tag']}\t\t{row['time']}\n" for row in rows
    )


@pytest.mark.parametrize("tag", ["cs1", "cs2", "onlybeta"])
def test_show(recorded: Path, tag: str) -> None:
    """The vdis of a saved state, by tag and by index, on stderr."""
    rows = load_json("snapshots/cluster-snapshot.json")["show"][tag]["rows"]
    index = {"cs1": "1", "cs2": "2", "onlybeta": "3"}[tag]

    for text in (tag, index):
        outcome = show(recorded, text)
        assert outcome.stderr == "".join(
            f"{row['number']}. VDI id: {row['vdi_id']}, name: {row['name']}, tag: {row['tag']}\n" for row in rows
        )
        assert (outcome.code, outcome.stdout) == (0, b"")


def test_show_refusals(recorded: Path) -> None:
    """Names select; unknown tags and indexes, a path that is a file, and a missing path are refused."""
    assert show(recorded, "cs1", "beta").stderr == "1. VDI id: 4620a7, name: beta, tag: b1\n"
    for text in ("nosuch", "4"):
        outcome = show(recorded, text)
        assert outcome.code == 2
        assert outcome.stderr == "Snapshot index or tag does not exist.\nFail to show snapshot\n"
    outcome = show(recorded / "user_snap", "cs1")
    assert outcome.stderr == (
        f"Path is not a directory: {recorded}/user_snap\nFail to create directory: Not a directory\n"
        "Fail to init farm.\nFail to show snapshot\n"
    )
    session = "dog-cluster-snapshot-show-1n.jsonl"
    missing = replay.replay(session, ["cluster", "snapshot", "show", "cs1"])
    assert (missing.code, missing.stderr) == (64, "Please specify the path to show snapshot.\n")
    number = replay.replay(session, ["cluster", "snapshot", "save", "1a", str(recorded)])
    assert (number.code, number.stderr) == (64, "Tag should not start with number.\n")


def test_every_object_can_be_loaded(recorded: Path) -> None:
    """All objects of all states are complete, as their digests say, and have the size of their kind."""
    farm = Farm(str(recorded))
    for record in farm.log.records:
        entries = farm.trunk(record)
        assert entries
        for entry in entries:
            assert len(farm.load_object(entry.digest)) == (INODE_BYTES if entry.oid >> 63 else 4 << 20)


def test_content_addresses(recorded: Path, tmp_path: Path) -> None:
    """What we store has the names that the original gave: nothing new is written for the same content."""
    source = Farm(str(recorded))
    files = {path.name for path in (recorded / "objects").rglob("*") if path.is_file()}
    for record in source.log.records:
        for entry in source.trunk(record):
            assert source.store_object(source.load_object(entry.digest)) == entry.digest

    assert {path.name for path in (recorded / "objects").rglob("*") if path.is_file()} == files


def test_new_directory(tmp_path: Path) -> None:
    """A state that was added is there after opening again; the defaults stay those of the first."""
    farm = Farm(str(tmp_path / "new"))
    data = pattern(3, 0, 300000)
    digest = farm.store_object(data)
    entry = TrunkEntry(0x100000000, 2, 0, 22, digest)
    farm.add(SnapshotLog(2, 0, 22), b"one", 1000, [entry])
    farm.add(SnapshotLog(3, 0, 22), b"two", 2000, [entry])

    again = Farm(str(tmp_path / "new"))
    assert (again.log.copies, [record.index for record in again.log.records]) == (2, [1, 2])
    found = again.find(b"two")
    assert found is not None and found.time == 2000 and again.at(2) == found
    assert again.load_object(again.trunk(found)[0].digest) == data
    assert len(list((tmp_path / "new" / "objects").iterdir())) == 256
    assert hashlib.sha1(data[:131072]).hexdigest()[2:] in {
        path.name for path in (tmp_path / "new" / "objects").rglob("*") if path.is_file()
    }


def test_damage_is_found(tmp_path: Path) -> None:
    """A changed or missing content file is an error, not other data."""
    farm = Farm(str(tmp_path / "new"))
    digest = farm.store_object(b"x" * 1000)
    files = [path for path in (tmp_path / "new" / "objects").rglob("*") if path.is_file()]
    slice_path = next(path for path in files if path.stat().st_size == 1000)
    slice_path.write_bytes(b"y" * 1000)
    with pytest.raises(FarmError, match="is damaged"):
        farm.load_object(digest)
    slice_path.unlink()
    with pytest.raises(FarmError, match="cannot read"):
        farm.load_object(digest)


@pytest.mark.parametrize(
    ("words", "reasons"),
    [
        ((), "1. The cluster is empty.\n2. All VDIs of the cluster don't have snapshots.\n"),
        (("a",), "1. The specified VDIs are not found.\n2. The specified VDIs don't have snapshots.\n"),
    ],
)
def test_nothing_to_save(tmp_path: Path, words: tuple[str, ...], reasons: str) -> None:
    """Without snapshots there is nothing to save, and no state is begun."""
    cluster = Cluster()
    cluster.add_vdi(InodeHeader(name=b"a", vdi_id=5, nr_copies=1, block_size_shift=22))
    path = tmp_path / "cs"
    outcome = cluster.dog("cluster", "snapshot", "save", "t", str(path), *words)

    assert outcome.code == 2
    assert outcome.stderr == (
        f"Cannot execute. It may be caused by:\n{reasons}Fail to save snapshot to path: {path}.\n"
    )
    assert Farm(str(path)).log.records == ()


def test_used_tag_and_unknown_names(recorded: Path) -> None:
    """A tag is used once; loading names that are not inside changes nothing."""
    cluster = Cluster()
    used = cluster.dog("cluster", "snapshot", "save", "cs1", str(recorded))
    unknown = cluster.dog("cluster", "snapshot", "load", "cs1", str(recorded), "nosuch")

    assert (used.code, unknown.code) == (2, 2)
    assert used.stderr == (
        "Snapshot tag has already been used for another snapshot, please, use another one.\n"
        f"Fail to save snapshot to path: {recorded}.\n"
    )
    assert unknown.stderr == (
        "Objects of specified VDIs are not found in local cluster snapshot storage.\nFail to load snapshot\n"
    )
    assert 0x84 not in [opcode for opcode, _, _ in cluster.seen]


def test_load_some(recorded: Path) -> None:
    """Named vdis come with their inodes and all objects that they refer to, and get a working vdi."""
    cluster = Cluster()
    cluster.table[0xBE] = lambda header, data: (0, ClusterInfo(flags=4).pack(), b"")
    cluster.table[0x15] = lambda header, data: (0, VidBitmap().pack(), b"")
    for opcode in (0x01, 0x84, 0xAF, 0x11):
        cluster.table[opcode] = lambda header, data: (0, b"", b"")
    outcome = cluster.dog("cluster", "snapshot", "load", "cs2", str(recorded), "beta", "-m")

    created = {int.from_bytes(header[16:24], "little") for opcode, header, _ in cluster.seen if opcode == 0x01}
    assert (outcome.code, outcome.stderr) == (0, "")
    assert {oid >> 32 & 0xFFFFFF for oid in created} == {0x4620A7, 0x4620A8}
    assert {0x804620A7 << 32, 0x804620A8 << 32} <= created
    working = [(header[24:28], data.rstrip(b"\0")) for opcode, header, data in cluster.seen if opcode == 0x11]
    assert working == [((0x4620A8).to_bytes(4, "little"), b"beta")]
