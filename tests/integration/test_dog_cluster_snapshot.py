"""``dog cluster snapshot``: everything saved in a directory, and loaded into other clusters (CS-1 to CS-6, EC-8)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from scenes import (
    MiB,
    kinds,
    live_inodes,
    pattern,
    read_all,
    referenced,
    rows,
    stored,
    vid_of_name,
    wait_stored,
    write,
)

from sheepdog.model.ids import is_ledger
from sheepdog.testing.cluster import SheepCluster, run_python, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

COLUMNS = (0, 1, 2, 3, 7, 8, 9, 10)  # all but the space and the time


@pytest.fixture(scope="module")
def source(start_cluster: Callable[..., SheepCluster]) -> SheepCluster:
    """Where states are saved: three nodes, 2 copies, objects of 1 MiB."""
    return start_cluster(3, driver="local", store="plain", redundancy="2")


@pytest.fixture(scope="module")
def target(start_cluster: Callable[..., SheepCluster]) -> SheepCluster:
    """Where states are loaded: four nodes, not formatted at first."""
    return start_cluster(4, driver="local", store="plain", redundancy="1")


def clean(cluster: SheepCluster) -> None:
    cluster.format("-f", "-z", "20")


def snapshot_rows(cluster: SheepCluster) -> list[list[str]]:
    return [[row[at] for at in COLUMNS] for row in rows(cluster) if row[0] == "s"]


def contents(cluster: SheepCluster) -> dict[tuple[str, int], bytes]:
    """Of every snapshot, by name and snapshot id."""
    return {
        (row[1], int(row[2])): read_all(cluster, row[1], snap_id=int(row[2])) for row in rows(cluster) if row[0] == "s"
    }


def file_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def check_loaded(cluster: SheepCluster, names: set[str]) -> None:
    """Each name has a working vdi equal to its newest snapshot, and exactly what the inodes name is stored."""
    listed = rows(cluster)
    assert {row[1] for row in listed if row[0] != "s"} == names
    for name in names:
        newest = max(int(row[2]) for row in listed if row[0] == "s" and row[1] == name)
        assert read_all(cluster, name) == read_all(cluster, name, snap_id=newest, node=1)
    assert set(stored(cluster)) == referenced(live_inodes(cluster))


def delete_all(cluster: SheepCluster) -> None:
    """All vdis and snapshots, then nothing is stored."""
    for row in rows(cluster):
        cluster.dog("vdi", "delete", *(("-s", row[2]) if row[0] == "s" else ()), row[1])
    wait_stored(cluster, {})
    wait_until(lambda: not stored(cluster, is_ledger), "the ledgers to go")


def test_save_and_load(source: SheepCluster, target: SheepCluster, tmp_path: Path) -> None:
    """CS-1, CS-2, EC-8: two vdis with different copies and one with strips; two states, each loaded by tag or by index
    into a cluster of another size: the same listing, the same bytes, a working vdi for each name, and the default
    redundancy that was saved. A target that is not formatted is formatted, an empty one as well, without a question;
    one with vdis asks. What was loaded can be written, and deleted without a rest."""
    clean(source)
    words = {"two": (), "three": ("-c", "3"), "strips": ("-c", "2:1")}
    for number, (name, options) in enumerate(words.items()):
        source.dog("vdi", "create", *options, name, "3M")
        write(source, name, 0, pattern(number, 2 * MiB + 77))
        source.dog("vdi", "snapshot", "-s", f"{name}-a", name)
    path = str(tmp_path / "saved")
    saved = source.dog("cluster", "snapshot", "save", "a", path)
    assert (saved.stdout, saved.stderr) == (b"", b"")
    first, first_rows = contents(source), snapshot_rows(source)
    for number, name in enumerate(words):
        write(source, name, MiB + 5, pattern(10 + number, 4096))
        source.dog("vdi", "snapshot", "-s", f"{name}-b", name)
        write(source, name, 0, b"after everything")
    source.dog("cluster", "snapshot", "save", "-m", "b", path)
    second, second_rows = contents(source), snapshot_rows(source)

    assert target.dog("cluster", "info").stdout.startswith(b"Cluster status: Waiting for cluster to be formatted")
    for what, wanted, wanted_rows in (("a", first, first_rows), ("2", second, second_rows), ("1", first, first_rows)):
        answer = {"a": b"", "2": b"yes\n", "1": b"YES\n"}[what]
        done = target.dog("cluster", "snapshot", "load", what, path, input=answer)
        assert done.stderr == b""
        assert done.stdout.endswith(b"using backend plain store\n")
        assert (b"Caution! The cluster is not empty." in done.stdout) == (what != "a")
        assert snapshot_rows(target) == wanted_rows
        assert contents(target) == wanted
        check_loaded(target, set(words))
        assert target.dog("cluster", "check").stderr == b""
    assert b"plain with 2 redundancy policy" in target.dog("cluster", "info", "-v").stdout
    target.dog("vdi", "create", "fresh", "1M")
    assert [row[8] + row[10] for row in rows(target, "fresh")] == ["220"], "2 copies, objects of 2^20 bytes"

    write(target, "two", MiB, pattern(99, MiB), node=2)
    target.dog("vdi", "snapshot", "-s", "later", "two")
    assert [row[2] for row in rows(target, "two")] == ["1", "2", "0"]
    assert contents(target)["two", 1] == first["two", 1]
    delete_all(target)


def test_a_declined_load_changes_nothing(source: SheepCluster, target: SheepCluster, tmp_path: Path) -> None:
    """CS-2, CLI-6: declined, or with no answer, the cluster stays as it is; an empty one is not asked about."""
    clean(source)
    clean(target)
    source.dog("vdi", "create", "v", "1M")
    write(source, "v", 0, b"saved")
    source.dog("vdi", "snapshot", "-s", "s", "v")
    source.dog("cluster", "snapshot", "save", "x", str(tmp_path))
    target.dog("vdi", "create", "kept", "1M")
    before = rows(target)
    for answer in (b"", b"y\n", b"no\n", b"\n"):
        declined = target.dog("cluster", "snapshot", "load", "x", str(tmp_path), input=answer)
        assert declined.stdout.endswith(b"Are you sure you want to continue? [yes/no]: ")
        assert rows(target) == before
    clean(target)
    assert target.dog("cluster", "snapshot", "load", "x", str(tmp_path)).stdout == b"using backend plain store\n"
    assert read_all(target, "v")[:5] == b"saved"


def test_some_of_eight(source: SheepCluster, target: SheepCluster, tmp_path: Path) -> None:
    """CS-3: a state of some vdis holds exactly these, show and list say so, and a part of them can be loaded."""
    clean(source)
    names = [f"v{number}" for number in range(8)]
    for number, name in enumerate(names):
        source.dog("vdi", "create", name, "1M")
        write(source, name, 0, pattern(number, 1000))
        source.dog("vdi", "snapshot", "-s", f"s{number}", name)
    chosen = ["v1", "v4", "v5", "v7"]
    path = str(tmp_path)
    source.dog("cluster", "snapshot", "save", "some", path, *chosen)

    vids = {name: vid_of_name(source, name, snap_id=1) for name in chosen}
    expected = [
        f"{number}. VDI id: {vid:x}, name: {name}, tag: s{name[1]}"
        for number, (name, vid) in enumerate(sorted(vids.items(), key=lambda item: item[1]), 1)
    ]
    for what in ("some", "1"):
        shown = source.dog("cluster", "snapshot", "show", what, path)
        assert (shown.stdout, shown.stderr.decode().splitlines()) == (b"", expected)
    one = source.dog("cluster", "snapshot", "show", "some", path, "v5")
    assert one.stderr.decode() == f"1. VDI id: {vids['v5']:x}, name: v5, tag: s5\n"
    document = json.loads(source.dog("cluster", "snapshot", "show", "--json", "some", path, "v4").stdout)
    assert document == [{"vid": f"{vids['v4']:x}", "name": "v4", "tag": "s4"}]

    listed = source.dog("cluster", "snapshot", "list", path).stdout.decode()
    match = re.fullmatch(r"Index\t\tTag\t\tSnapshot Time\n1\t\tsome\t\t(.{24})\n", listed)
    assert match and abs(time.mktime(time.strptime(match[1])) - time.time()) < 120
    [entry] = json.loads(source.dog("cluster", "snapshot", "list", "--json", path).stdout)
    assert (entry["index"], entry["tag"], time.ctime(entry["time"])) == (1, "some", match[1])

    clean(target)
    target.dog("cluster", "snapshot", "load", "some", path, "v4", "v7")
    check_loaded(target, {"v4", "v7"})
    assert contents(target) == {(name, 1): pattern(int(name[1]), 1000) + bytes(MiB - 1000) for name in ("v4", "v7")}
    delete_all(target)


def test_deleted_between_two_saves(source: SheepCluster, target: SheepCluster, tmp_path: Path) -> None:
    """CS-4: a snapshot that is deleted between two saves is not in the later one, but what others need of its objects
    is; both states load, also twice in a row, and nothing is left when all is deleted."""
    clean(source)
    source.dog("vdi", "create", "chain", "4M")
    for number in range(4):
        write(source, "chain", number * MiB, pattern(number, MiB))
        source.dog("vdi", "snapshot", "-s", f"s{number}", "chain")
    path = str(tmp_path)
    source.dog("cluster", "snapshot", "save", "before", path)
    before, before_rows = contents(source), snapshot_rows(source)
    for tag in ("s0", "s2"):
        source.dog("vdi", "delete", "-s", tag, "chain")
    source.dog("cluster", "snapshot", "save", "after", path)
    after, after_rows = contents(source), snapshot_rows(source)
    assert [key[1] for key in sorted(after)] == [2, 4]

    for what, wanted, wanted_rows in (
        ("after", after, after_rows), ("after", after, after_rows),
        ("before", before, before_rows), ("after", after, after_rows),
    ):  # fmt: skip
        done = target.dog("cluster", "snapshot", "load", what, path, input=b"yes\n")
        assert done.stderr == b""
        assert snapshot_rows(target) == wanted_rows
        assert contents(target) == wanted
        check_loaded(target, {"chain"})
        listing = target.dog("vdi", "list")
        assert listing.stderr == b""
        shown = source.dog("cluster", "snapshot", "show", what, path).stderr.decode()
        assert shown.count("VDI id") == len(wanted)
    target.dog("vdi", "snapshot", "-s", "more", "chain")
    assert [row[2] for row in rows(target, "chain") if row[9] == "more"] == ["5"], "ids go on counting"
    target.dog("vdi", "clone", "-s", "s1", "chain", "clone")
    write(target, "clone", 0, b"z")
    assert read_all(target, "chain", tag="s3") == after["chain", 4]
    delete_all(target)


def test_loaded_references(source: SheepCluster, target: SheepCluster, tmp_path: Path) -> None:
    """CS-1, GC-8: after a load each deletion frees exactly what nobody else sees, in either order, also where the saved
    cluster had dropped references before, had clones, and where only some of the relatives were loaded."""
    clean(source)
    source.dog("vdi", "create", "-P", "base", "4M")
    for number in range(3):
        source.dog("vdi", "snapshot", "-s", f"s{number}", "base")
        write(source, "base", number * MiB, pattern(number, 100))
    source.dog("vdi", "clone", "-s", "s1", "base", "copy")
    write(source, "copy", 3 * MiB, b"copy")
    source.dog("vdi", "snapshot", "-s", "c", "copy")
    source.dog("vdi", "delete", "-s", "s0", "base")
    source.dog("vdi", "delete", "base")
    path = str(tmp_path)
    source.dog("cluster", "snapshot", "save", "x", path)
    wanted = contents(source)

    for names, order in (((), 1), ((), -1), (("copy",), 1), (("base",), -1)):
        target.dog("cluster", "snapshot", "load", "x", path, *names, input=b"yes\n")
        expected = {key: value for key, value in wanted.items() if not names or key[0] in names}
        assert contents(target) == expected
        for row in rows(target)[::order]:
            target.dog("vdi", "delete", *(("-s", row[2]) if row[0] == "s" else ()), row[1])
            expected.pop((row[1], int(row[2])), None)
            wait_until(
                lambda: set(stored(target)) == referenced(live_inodes(target)), f"what only {row[1:3]} had to go"
            )
            assert contents(target) == expected
        wait_stored(target, {})
        wait_stored(target, {}, is_ledger)


def test_errors(source: SheepCluster, target: SheepCluster, tmp_path: Path) -> None:
    """CS-5: every refusal has its words and exit code, adds no entry and changes no cluster."""
    clean(source)
    path = str(tmp_path / "cs")
    empty = (
        "Cannot execute. It may be caused by:\n1. The cluster is empty.\n"
        f"2. All VDIs of the cluster don't have snapshots.\nFail to save snapshot to path: {path}.\n"
    )

    def refused(code: int, stderr: str, *words: str) -> None:
        done = source.dog("cluster", "snapshot", *words, check=False)
        assert (done.returncode, done.stderr.decode()) == (code, stderr)
        assert (done.stdout[:6] == b"Usage:") == (code == 64)

    refused(2, empty, "save", "a", path)
    source.dog("vdi", "create", "v", "1M")
    write(source, "v", 0, b"1")
    refused(2, empty, "save", "a", path)
    source.dog("vdi", "snapshot", "-s", "s", "v")
    names = (
        "Cannot execute. It may be caused by:\n1. The specified VDIs are not found.\n"
        f"2. The specified VDIs don't have snapshots.\nFail to save snapshot to path: {path}.\n"
    )
    refused(2, names, "save", "a", path, "nosuch", "other")
    refused(64, "Tag should not start with number.\n", "save", "1a", path)
    refused(64, "Please specify the path to save snapshot.\n", "save", "a")
    refused(64, "Please specify the path to save snapshot.\n", "load", "a")
    refused(64, "Please specify the path to show snapshot.\n", "show", "a")
    source.dog("cluster", "snapshot", "save", "a", path)
    used = "Snapshot tag has already been used for another snapshot, please, use another one.\n"
    refused(2, f"{used}Fail to save snapshot to path: {path}.\n", "save", "a", path)
    before = rows(source)
    for what in ("nosuch", "2", "0"):
        refused(2, "Snapshot index or tag does not exist.\nFail to load snapshot\n", "load", what, path)
        refused(2, "Snapshot index or tag does not exist.\nFail to show snapshot\n", "show", what, path)
    missing = "Objects of specified VDIs are not found in local cluster snapshot storage.\nFail to load snapshot\n"
    refused(2, missing, "load", "a", path, "nosuch")
    (tmp_path / "file").write_bytes(b"")
    file = str(tmp_path / "file")
    unusable = f"Path is not a directory: {file}\nFail to create directory: Not a directory\nFail to init farm.\n"
    refused(2, unusable + f"Fail to save snapshot to path: {file}.\n", "save", "b", file)
    refused(2, unusable + "Fail to load snapshot\n", "load", "a", file)
    refused(2, unusable + "Fail to show snapshot\n", "show", "a", file)
    refused(2, unusable, "list", file)
    assert rows(source) == before
    assert source.dog("cluster", "snapshot", "list", path).stdout.count(b"\n") == 2


def test_a_damaged_directory(source: SheepCluster, target: SheepCluster, tmp_path: Path) -> None:
    """CS-5: a content file that is not what its name says is found out; the load fails and says so."""
    clean(source)
    source.dog("vdi", "create", "v", "2M")
    write(source, "v", 0, pattern(1, 2 * MiB))
    source.dog("vdi", "snapshot", "-s", "s", "v")
    source.dog("cluster", "snapshot", "save", "a", str(tmp_path))
    slices = [file for file in (tmp_path / "objects").rglob("*") if file.is_file() and file.stat().st_size == 128 << 10]
    with sorted(slices)[3].open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    failed = target.dog("cluster", "snapshot", "load", "a", str(tmp_path), check=False, input=b"yes\n")
    assert failed.returncode == 2
    assert failed.stderr.endswith(b"Fail to load snapshot\n")


def running_dog(cluster: SheepCluster, *words: str) -> subprocess.Popen[bytes]:
    """dog as a process of its own, which the caller ends."""
    return subprocess.Popen(
        run_python("sheepdog_cli.dog", *words),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "SHEEPDOG_DOG_ADDR": "127.0.0.1", "SHEEPDOG_DOG_PORT": str(cluster.live[0].port)},
    )


def kill_when(process: subprocess.Popen[bytes], begun: Callable[[], bool]) -> None:
    """The process is killed once it has begun; if it was quicker than that, it ended well."""
    wait_until(lambda: begun() or process.poll() is not None, "dog to begin")
    process.kill()
    assert process.wait() in (0, -signal.SIGKILL)


def test_interrupted(source: SheepCluster, target: SheepCluster, tmp_path: Path) -> None:
    """A save that is killed leaves no entry, and what it stored is used by the next one; a load that is killed can be
    done again."""
    clean(source)
    clean(target)
    source.dog("vdi", "create", "v", "16M")
    write(source, "v", 0, pattern(4, 16 * MiB))
    source.dog("vdi", "snapshot", "-s", "s", "v")
    path = tmp_path / "cs"

    def files() -> set[str]:
        return {file.name for file in path.glob("objects/*/*") if not file.name.endswith(".tmp")}

    kill_when(running_dog(source, "cluster", "snapshot", "save", "-m", "cut", str(path)), lambda: len(files()) > 20)
    stored_before = files()
    # Killed, that is: it may have come to its end just before.
    known = source.dog("cluster", "snapshot", "list", str(path)).stdout.count(b"\n") - 1
    assert known == (source.dog("cluster", "snapshot", "show", "cut", str(path), check=False).returncode == 0)
    source.dog("cluster", "snapshot", "save", "whole", str(path))
    assert stored_before <= files()

    kill_when(running_dog(target, "cluster", "snapshot", "load", "whole", str(path)), lambda: len(stored(target)) > 3)
    done = target.dog("cluster", "snapshot", "load", "whole", str(path), input=b"yes\n")
    assert done.stderr == b""
    assert contents(target) == {("v", 1): pattern(4, 16 * MiB)}
    check_loaded(target, {"v"})
    delete_all(target)


def test_fixed_vnodes(source: SheepCluster, fresh_cluster: Callable[..., SheepCluster], tmp_path: Path) -> None:
    """CS-1: a state loads into a cluster of sheep with fixed numbers of virtual nodes as well; with fewer zones than
    copies that is asked about, as when such a cluster is formatted."""
    clean(source)
    source.dog("vdi", "create", "v", "2M")
    write(source, "v", 0, pattern(5, 2 * MiB))
    source.dog("vdi", "snapshot", "-s", "s", "v")
    source.dog("cluster", "snapshot", "save", "x", str(tmp_path))
    fixed = fresh_cluster(1, driver="local", store="plain", redundancy="1", options=("-V", "50"))
    question = "Number of copies (2) is larger than number of zones (1).\nAre you sure you want to continue? [yes/no]: "
    declined = fixed.dog("cluster", "snapshot", "load", "x", str(tmp_path), input=b"no\n")
    assert (declined.stdout.decode(), declined.stderr) == (question, b"")
    assert b"Waiting for cluster to be formatted" in fixed.dog("cluster", "info").stdout
    done = fixed.dog("cluster", "snapshot", "load", "x", str(tmp_path), input=b"yes\n")
    assert (done.stdout.decode(), done.stderr) == (question + "using backend plain store\n", b"")
    assert b"Cluster vnodes strategy: fixed\n" in fixed.dog("cluster", "info", "-v").stdout
    assert read_all(fixed, "v") == pattern(5, 2 * MiB)


def test_content_is_stored_once(source: SheepCluster, tmp_path: Path) -> None:
    """CS-6: a second save of the same data, or of another vdi with the same bytes, hardly needs space."""
    clean(source)
    source.dog("vdi", "create", "one", "8M")
    write(source, "one", 0, pattern(1, 8 * MiB))
    source.dog("vdi", "snapshot", "-s", "s", "one")
    source.dog("cluster", "snapshot", "save", "first", str(tmp_path))
    size = file_bytes(tmp_path)
    assert 8 * MiB < size < 9 * MiB
    source.dog("cluster", "snapshot", "save", "second", str(tmp_path))
    source.dog("vdi", "create", "two", "8M")
    write(source, "two", 0, pattern(1, 8 * MiB))
    source.dog("vdi", "snapshot", "-s", "s", "two")
    source.dog("cluster", "snapshot", "save", "third", str(tmp_path))
    assert file_bytes(tmp_path) - size < MiB
    assert kinds(source)["data"] == 16
    assert os.listdir(tmp_path)
