"""``dog vdi check`` and ``dog cluster check`` on copies that were damaged behind their back (CHK-1 to CHK-12, EC-7)."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from scenes import Background, KiB, MiB, pattern, read, read_all, rows, vid_of_name, volume, wait_serving, write

from sheepdog.model.ids import data_oid, inode_oid
from sheepdog.testing.cluster import SheepCluster

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

NODES = 7


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., SheepCluster]) -> SheepCluster:
    """Seven nodes, 3 copies, objects of 1 MiB."""
    cluster = start_cluster(NODES, driver="local", store="plain", redundancy="3")
    cluster.format("-z", "20")
    return cluster


def files_of(cluster: SheepCluster, oid: int, strip: int = -1) -> list[tuple[int, Path]]:
    """(sheep, file) of every copy or of one strip."""
    name = f"{oid:016x}" + (f"_{strip}" if strip >= 0 else "")
    return [(index, cluster.sheep[index].directory / "obj" / name) for index in cluster.census()[oid, strip]]


def rest(cluster: SheepCluster, damage: Callable[[], None]) -> None:
    """The cluster is shut down, damaged and started again."""
    cluster.dog("cluster", "shutdown")
    for sheep in cluster.sheep:
        assert sheep.process is not None
        sheep.process.wait(30)
    damage()
    for sheep in cluster.sheep:
        cluster.restart(sheep.index, wait=False)
    cluster.wait_members()
    for sheep in cluster.sheep:
        wait_serving(cluster, sheep.index)


def overwrite(path: Path, data: bytes, at: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


OTHER = b"\x55" * MiB
THIRD = b"\xaa" * MiB
GOOD = pattern(1, MiB)


@dataclass(frozen=True)
class Case:
    """What the files of the copies have after the damage (None: no file), and what is said then.

    ``lost``: how many copies check -e misses; ``lines``: what check says of the object, on either stream; ``after``:
    what all copies have afterwards, None when nothing changed.
    """

    copies: tuple[bytes | None, ...]
    lost: int
    out: tuple[str, ...] = ()
    err: tuple[str, ...] = ()
    after: bytes | None = GOOD


REPLICA, MISSING = "fixed replica {oid}", "fixed missing {oid}"
NO_MAJORITY, NOBODY = "no majority of {oid}", "no node has {oid}"
CASES = {
    "chk1": Case((GOOD, GOOD, GOOD), 0),
    "chk2": Case((None, GOOD, GOOD), 1, (MISSING,)),
    "chk3": Case((GOOD, OTHER, GOOD), 0, (REPLICA,)),
    "chk4": Case((None, GOOD, None), 2, (MISSING, MISSING)),
    "chk5": Case((None, OTHER, GOOD), 1, (), (NO_MAJORITY,), None),
    "chk6": Case((THIRD, OTHER, GOOD), 0, (), (NO_MAJORITY,), None),
    "chk7a": Case((GOOD, GOOD, OTHER, OTHER, OTHER, OTHER, THIRD), 0, (REPLICA,) * 3, (), OTHER),
    "chk7b": Case((OTHER, THIRD, OTHER, GOOD, OTHER, GOOD, OTHER), 0, (REPLICA,) * 3, (), OTHER),
    "chk7c": Case((GOOD, OTHER, OTHER, THIRD, OTHER, OTHER, GOOD), 0, (REPLICA,) * 3, (), OTHER),
    "chk8": Case((None, None, None), 3, (), (NOBODY,), None),
    "chk9": Case((bytes(MiB), GOOD, GOOD), 0, (REPLICA,)),
}


@pytest.fixture(scope="module")
def damaged(cluster: SheepCluster) -> SheepCluster:
    """One vdi of one object for each case."""
    for name, case in CASES.items():
        cluster.dog("vdi", "create", "-c", str(len(case.copies)), name, "1M")
        write(cluster, name, 0, GOOD)
    oids = {name: data_oid(vid_of_name(cluster, name), 0) for name in CASES}

    def damage() -> None:
        for name, case in CASES.items():
            for (_, path), content in zip(files_of(cluster, oids[name]), case.copies, strict=True):
                if content is None:
                    path.unlink()
                elif content is not GOOD:
                    overwrite(path, content)

    rest(cluster, damage)
    return cluster


@pytest.mark.parametrize("name", CASES)
def test_damage(damaged: SheepCluster, name: str) -> None:
    """CHK-1 to CHK-9: -e names every missing copy and repairs nothing; check repairs what a majority of the copies that
    were found decides, says so, and leaves everything else as it is; a second check finds nothing that it can mend."""
    cluster, case = damaged, CASES[name]
    oid = data_oid(vid_of_name(cluster, name), 0)
    shown = {"oid": f"{oid:016x}"}

    exist = cluster.dog("vdi", "check", "-e", name, check=False, node=2)
    *missing, verdict = exist.stdout.decode().splitlines()
    assert len(missing) == case.lost
    assert all(line.endswith(f"] oid {oid:016x} is missing.") for line in missing)
    assert exist.stderr == b""
    if case.lost:
        assert (exist.returncode, verdict) == (1, f"{name} lost {case.lost} object(s).")
        found = {index for index, _ in files_of(cluster, oid)} if case.lost < len(case.copies) else set()
        assert not {line.split("]")[0][1:] for line in missing} & {cluster.address(index) for index in found}
    else:
        assert (exist.returncode, verdict) == (0, f"{name} is fine, no object is missing.")

    before = sorted(path.read_bytes() for _, path in files_of(cluster, oid)) if case.lost < len(case.copies) else []
    done = cluster.dog("vdi", "check", name, node=3)
    assert done.stdout.decode().splitlines() == [line.format(**shown) for line in case.out] + [
        f"finish check&repair {name}"
    ]
    assert done.stderr.decode().splitlines() == [line.format(**shown) for line in case.err]

    if case.after is None:
        after = sorted(path.read_bytes() for _, path in files_of(cluster, oid)) if before else []
        assert after == before
    else:
        assert [path.read_bytes() for _, path in files_of(cluster, oid)] == [case.after] * len(case.copies)
        for node in range(NODES):
            assert read_all(cluster, name, node=node) == case.after
    again = cluster.dog("vdi", "check", name)
    assert again.stdout.decode() == f"finish check&repair {name}\n"
    assert again.stderr == done.stderr


def test_reading_what_nobody_has(damaged: SheepCluster) -> None:
    """CHK-8: the read fails with the object's name; it does not hang and does not give zeros."""
    oid = data_oid(vid_of_name(damaged, "chk8"), 0)
    for node in (0, 4):
        refused = damaged.dog("vdi", "read", "chk8", check=False, node=node)
        assert (refused.returncode, refused.stdout) == (1, b"")
        assert refused.stderr.decode() == f"Failed to read object {oid:016x} No object found\nFailed to read VDI\n"


def test_inode_and_snapshot(cluster: SheepCluster) -> None:
    """CHK-10: an inode's copies are compared, too; and a snapshot's object whose digest was kept from an earlier check
    is read again when the file has changed since, if only by a bit."""
    cluster.dog("vdi", "create", "kept", "2M")
    write(cluster, "kept", 0, pattern(7, 2 * MiB))
    cluster.dog("vdi", "snapshot", "-s", "old", "kept")
    vid = vid_of_name(cluster, "kept", tag="old")
    assert cluster.dog("vdi", "check", "-s", "old", "kept").stdout == b"finish check&repair kept\n"
    first, second = data_oid(vid, 0), data_oid(vid, 1)

    def damage() -> None:
        overwrite(files_of(cluster, first)[1][1], b"\0" * 4096, 8192)
        path = files_of(cluster, second)[2][1]
        byte = path.read_bytes()[500_000]
        overwrite(path, bytes([byte ^ 1]), 500_000)
        overwrite(files_of(cluster, inode_oid(vid))[0][1], b"broken", 600)

    rest(cluster, damage)
    done = cluster.dog("vdi", "check", "-s", "old", "kept")

    lines = done.stdout.decode().splitlines()
    assert sorted(lines[:-1]) == sorted(f"fixed replica {oid:016x}" for oid in (first, second, inode_oid(vid)))
    assert lines[-1] == "finish check&repair kept"
    for oid in (first, second):
        want = pattern(7, 2 * MiB)[(oid & 1) * MiB :][:MiB]
        assert [path.read_bytes() for _, path in files_of(cluster, oid)] == [want] * 3
    assert read_all(cluster, "kept", tag="old") == pattern(7, 2 * MiB)
    assert cluster.dog("vdi", "check", "-s", "old", "kept").stdout == b"finish check&repair kept\n"


def test_missing_and_unknown(cluster: SheepCluster) -> None:
    """A vdi or tag that does not exist."""
    for words, answer in (
        (("nosuch",), "nosuch (snapshot id: 0 snapshot tag: ): No VDI found\n"),
        (("-e", "nosuch"), "nosuch (snapshot id: 0 snapshot tag: ): No VDI found\n"),
        (("-s", "t", "kept"), "kept (snapshot id: 0 snapshot tag: t): Failed to find requested tag\n"),
        (("-s", "7", "kept"), "kept (snapshot id: 7 snapshot tag: ): Failed to find requested tag\n"),
    ):
        refused = cluster.dog("vdi", "check", *words, check=False)
        assert refused.returncode == 1
        assert refused.stderr.decode() == f"Failed to open VDI {answer}FATAL: no inode objects\n"
        assert refused.stdout == b""


def test_strips(cluster: SheepCluster) -> None:
    """EC-7: a deleted strip is rebuilt, two as well; more than the parity are a failure; a changed byte is reported."""
    cluster.dog("vdi", "create", "-c", "4:2", "strips", "4M")
    content = pattern(8, 4 * MiB)
    write(cluster, "strips", 0, content)
    oids = [data_oid(vid_of_name(cluster, "strips"), index) for index in range(4)]
    before = {(oid, strip): files_of(cluster, oid, strip)[0][1].read_bytes() for oid in oids for strip in range(6)}

    def damage() -> None:
        gone = [(0, 1), (1, 0), (1, 5), (2, 0), (2, 2), (2, 4)]
        for index, strip in gone:
            files_of(cluster, oids[index], strip)[0][1].unlink()
        overwrite(files_of(cluster, oids[3], 3)[0][1], b"\x01\x02\x03", 77)

    rest(cluster, damage)
    exist = cluster.dog("vdi", "check", "-e", "strips", check=False)
    done = cluster.dog("vdi", "check", "strips", check=False)

    assert (exist.returncode, exist.stdout.decode().splitlines()[-1]) == (1, "strips lost 6 object(s).")
    lines = done.stdout.decode().splitlines()
    assert sorted(lines[:-1]) == [
        f"fixed missing {oids[0]:016x}, copy index 1",
        f"fixed missing {oids[1]:016x}, copy index 0",
        f"fixed missing {oids[1]:016x}, copy index 5",
    ]
    assert lines[-1] == "finish check&repair strips"
    assert sorted(done.stderr.decode().splitlines()) == [
        f"failed to rebuild object {oids[2]:016x}. 3 copies get lost, more than 2",
        f"object {oids[3]:016x} is inconsistent",
    ]
    assert done.returncode == 0
    for index, strip in ((0, 1), (1, 0), (1, 5)):
        assert files_of(cluster, oids[index], strip)[0][1].read_bytes() == before[oids[index], strip]
    assert read(cluster, "strips", 0, 2 * MiB) == content[: 2 * MiB]


def test_strips_while_clients_write(cluster: SheepCluster) -> None:
    """CHK-12, EC-7: strips that go missing while clients write are made anew without mixing old and new: whatever
    was answered is read back at once and afterwards."""
    cluster.dog("vdi", "create", "-c", "2:1", "busy strips", "1M")
    write(cluster, "busy strips", 0, bytes(MiB))
    oid = data_oid(vid_of_name(cluster, "busy strips"), 0)
    with volume(cluster, "busy strips", node=1) as opened:

        def step(number: int) -> None:
            data = (number + 1).to_bytes(8, "little") * (64 * KiB // 8)
            opened.write(number % 16 * 64 * KiB, data)
            assert opened.read(number % 16 * 64 * KiB, 64 * KiB) == data, f"write {number} is gone"

        with Background(step) as writer:
            for number in range(9):
                files_of(cluster, oid, number % 3)[0][1].unlink()
                done = cluster.dog("vdi", "check", "busy strips", node=5)
                assert done.stderr == b""
                writer.wait(2)
    content = read_all(cluster, "busy strips", node=3)
    for number in range(16):
        last = max(step for step in range(writer.steps) if step % 16 == number) if writer.steps > number else -1
        assert content[number * 64 * KiB :][: 64 * KiB] == (last + 1).to_bytes(8, "little") * (64 * KiB // 8)
    assert cluster.dog("vdi", "check", "busy strips").stdout == b"finish check&repair busy strips\n"


def test_dry_run(cluster: SheepCluster) -> None:
    """--dry-run says which copy on which node is missing or differs, ends with 1 and changes nothing; so does ``cluster
    check``. A repair then leaves nothing to say. The index of a hyper volume is looked at, too."""
    cluster.dog("vdi", "create", "dry", "2M")
    write(cluster, "dry", 0, pattern(3, 2 * MiB))
    cluster.dog("vdi", "create", "-y", "tree", "1P")
    write(cluster, "tree", 0, b"x")
    first, second = (data_oid(vid_of_name(cluster, "dry"), index) for index in (0, 1))
    tree = inode_oid(vid_of_name(cluster, "tree"))
    (gone, missing), (changed, differing) = files_of(cluster, first)[1], files_of(cluster, second)[2]
    broken, node = files_of(cluster, tree)[0]

    def damage() -> None:
        missing.unlink()
        overwrite(differing, b"rot", 4096)
        overwrite(node, b"rot", 600)

    rest(cluster, damage)
    expected = {
        "dry": [f"differing {second:016x} on {cluster.address(changed)}",
                f"missing {first:016x} on {cluster.address(gone)}"],
        "tree": [f"differing {tree:016x} on {cluster.address(broken)}"],
    }  # fmt: skip
    for _ in range(2):
        for name, lines in expected.items():
            done = cluster.dog("vdi", "check", "--dry-run", name, check=False, node=4)
            *found, end = done.stdout.decode().splitlines()
            assert (sorted(found), end, done.stderr, done.returncode) == (lines, f"finish check {name}", b"", 1)
    every = cluster.dog("cluster", "check", "--dry-run", check=False)
    assert every.returncode == 1 and set(expected["dry"] + expected["tree"]) <= set(every.stdout.decode().splitlines())
    assert not missing.exists()
    for name in expected:
        assert b"fixed" in cluster.dog("vdi", "check", name).stdout
        clean = cluster.dog("vdi", "check", "--dry-run", name)
        assert clean.stdout.decode() == f"finish check {name}\n"


def test_whole_cluster(cluster: SheepCluster) -> None:
    """CHK-11: ``cluster check`` announces every vdi and snapshot in the order of their ids, and repairs all of them."""
    cluster.format("-f", "-z", "20")
    for name in ("first", "second"):
        cluster.dog("vdi", "create", name, "1M")
        write(cluster, name, 0, pattern(len(name), MiB))
    cluster.dog("vdi", "snapshot", "-s", "a tag", "first")
    write(cluster, "first", 0, b"changed")
    old, new, other = (
        vid_of_name(cluster, "first", tag="a tag"), vid_of_name(cluster, "first"), vid_of_name(cluster, "second"),
    )  # fmt: skip
    blocks = {
        old: f'fix snapshot first (id: 1, tag: "a tag")\nfixed missing {data_oid(old, 0):016x}\n'
        "finish check&repair first\n",
        new: f"fix vdi first\nfixed replica {data_oid(new, 0):016x}\nfinish check&repair first\n",
        other: f"fix vdi second\nfixed replica {data_oid(other, 0):016x}\nfinish check&repair second\n",
    }

    def damage() -> None:
        files_of(cluster, data_oid(old, 0))[0][1].unlink()
        overwrite(files_of(cluster, data_oid(new, 0))[1][1], b"x")
        os.truncate(files_of(cluster, data_oid(other, 0))[2][1], MiB // 2)

    rest(cluster, damage)
    done = cluster.dog("cluster", "check")
    again = cluster.dog("cluster", "check")

    assert done.stdout.decode() == "".join(block for _, block in sorted(blocks.items()))
    assert again.stdout.decode() == "".join(
        "".join(line + "\n" for line in block.splitlines() if not line.startswith("fixed"))
        for _, block in sorted(blocks.items())
    )
    assert (done.stderr, again.stderr) == (b"", b"")
    assert [row[1] for row in rows(cluster)] == [name for _, name in sorted(((old, "first"), (new, "first"),
                                                                               (other, "second")))]  # fmt: skip


def test_while_clients_write(cluster: SheepCluster) -> None:
    """CHK-12: copies that differ because a write is on its way are not mended with old data: whatever was written and
    answered is read back at once and afterwards, and all copies are equal in the end."""
    cluster.dog("vdi", "create", "busy", "2M")
    write(cluster, "busy", 0, bytes(2 * MiB))
    done = 0
    with volume(cluster, "busy", node=1) as opened:

        def step(number: int) -> None:
            nonlocal done
            data = (number + 1).to_bytes(8, "little") * (64 * KiB // 8)
            opened.write(MiB - 32 * KiB, data)
            assert opened.read(MiB - 32 * KiB, 64 * KiB) == data, f"write {number} is gone"
            done = number + 1

        with Background(step) as writer:
            for _ in range(12):
                cluster.dog("vdi", "check", "busy", node=5)
                writer.wait(3)
    content = read_all(cluster, "busy", node=3)
    assert content[MiB - 32 * KiB : MiB + 32 * KiB] == done.to_bytes(8, "little") * (64 * KiB // 8)
    vid = vid_of_name(cluster, "busy")
    for index in range(2):
        copies = [path.read_bytes() for _, path in files_of(cluster, data_oid(vid, index))]
        assert copies == [content[index * MiB : (index + 1) * MiB]] * 3
    assert cluster.dog("vdi", "check", "busy").stdout == b"finish check&repair busy\n"
