"""``dog vdi check`` against scripted sheep: what real ones are hard to bring to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from clusters import Answer, Cluster, MiB

from sheepdog.model.inode import InodeHeader
from sheepdog.model.node import Node, NodeId

VID, OID = 9, 9 << 32
ADDRESSES = [f"10.0.0.{number}:7000" for number in range(1, 4)]
NODES = tuple(Node(NodeId.of(f"10.0.0.{number}", 7000), 128, number) for number in range(1, 4))
GET_HASH, READ_PEER, WRITE_STRIP, SETTLE, REPAIR, COMPARE = 0xB4, 0xA4, 0xA3, 0xE7, 0xC5, 0xE0
NO_OBJ, INVALID_PARMS = 0x02, 0x05


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """Three nodes with a vdi of one object in 2:1 strips; all copies of its inode are equal, and strip 1 is missing."""
    monkeypatch.setattr("sheepdog_cli.dog_commands.checker.PAUSE_S", 0.0)
    cluster = Cluster(nodes=NODES)
    add_vdi(cluster, policy=0x11)
    cluster.table[GET_HASH] = lambda header, data: (0, b"", b"\0\0\0\0" + b"d" * 20)
    cluster.table[READ_PEER] = strips(missing={1})
    return cluster


def add_vdi(cluster: Cluster, *, policy: int) -> None:
    cluster.add_vdi(
        InodeHeader(name=b"a", vdi_size=MiB, nr_copies=3, copy_policy=policy, block_size_shift=20, vdi_id=VID), {0: VID}
    )


def strips(missing: set[int]) -> Callable[[bytes, bytes], Answer]:
    """Answers READ_PEER with strips of zeros, which fit together."""

    def read(header: bytes, data: bytes) -> Answer:
        length = int.from_bytes(header[12:16], "little")
        return (NO_OBJ, b"", b"") if header[34] in missing else (0, bytes(length), b"")

    return read


def count(cluster: Cluster, opcode: int) -> int:
    return [seen for seen, _, _ in cluster.seen].count(opcode)


def test_strip_is_mended_by_the_primary(cluster: Cluster) -> None:
    """A sheep of ours makes a missing strip itself; dog writes nothing."""
    missing = {1}
    cluster.table[READ_PEER] = strips(missing)

    def settle(header: bytes, data: bytes) -> Answer:
        missing.clear()
        return 0, b"", b""

    cluster.table[SETTLE] = settle
    outcome = cluster.dog("vdi", "check", "a")

    assert outcome.stdout.decode() == f"fixed missing {OID:016x}, copy index 1\nfinish check&repair a\n"
    assert (outcome.code, outcome.stderr, count(cluster, WRITE_STRIP)) == (0, "", 0)


@pytest.mark.parametrize("mended", [True, False])
def test_corrupt_strip(cluster: Cluster, mended: bool) -> None:
    """A strip of which its holder knows that it is wrong is put right by the primary, who compares all; or it is said
    that it is not. --dry-run only names it."""
    corrupt = {1}

    def read(header: bytes, data: bytes) -> Answer:
        length = int.from_bytes(header[12:16], "little")
        return (0x03, b"", b"") if header[34] in corrupt else (0, bytes(length), b"")

    def compare(header: bytes, data: bytes) -> Answer:
        if mended:
            corrupt.clear()
        return 0, b"", b""

    cluster.table[READ_PEER] = read
    cluster.table[COMPARE] = compare
    dry = cluster.dog("vdi", "check", "--dry-run", "a")
    assert dry.stdout.decode().startswith(f"corrupt {OID:016x}, copy index 1 on 10.0.0.")
    outcome = cluster.dog("vdi", "check", "a")

    fixed = f"fixed corrupt {OID:016x}, copy index 1\n" if mended else ""
    assert outcome.stdout.decode() == f"{fixed}finish check&repair a\n"
    assert outcome.stderr.startswith("" if mended else f"failed to repair object {OID:016x} from 10.0.0.")
    assert count(cluster, WRITE_STRIP) + count(cluster, SETTLE) == 0


def test_strip_is_written_to_original_sheep(cluster: Cluster) -> None:
    """A sheep that does not know the request gets the strip from dog, as from the original dog."""
    cluster.table[WRITE_STRIP] = lambda header, data: (0, b"", b"")
    outcome = cluster.dog("vdi", "check", "a")

    assert outcome.stdout.decode() == f"fixed missing {OID:016x}, copy index 1\nfinish check&repair a\n"
    [(header, data)] = [(header, data) for opcode, header, data in cluster.seen if opcode == WRITE_STRIP]
    assert (header[32], header[33], header[34], data) == (3, 0x11, 1, bytes(MiB // 2))


def test_strip_that_cannot_be_mended(cluster: Cluster) -> None:
    """When the primary could not make the strip either, that is said, and the exit code stays 0."""
    cluster.table[SETTLE] = lambda header, data: (0x03, b"", b"")
    outcome = cluster.dog("vdi", "check", "a")

    assert (outcome.code, outcome.stdout) == (0, b"finish check&repair a\n")
    assert outcome.stderr.startswith(f"failed to repair object {OID:016x} from 10.0.0.")


def test_dry_run_of_strips(cluster: Cluster) -> None:
    """--dry-run names what is missing and where it belongs, repairs nothing and ends with 1; with all there, with 0."""
    outcome = cluster.dog("vdi", "check", "--dry-run", "a")

    line, end = outcome.stdout.decode().splitlines()
    assert line in {f"missing {OID:016x}, copy index 1 on {address}" for address in ADDRESSES}
    assert (end, outcome.code, outcome.stderr) == ("finish check a", 1, "")
    assert not count(cluster, SETTLE) + count(cluster, WRITE_STRIP) + count(cluster, REPAIR)
    cluster.table[READ_PEER] = strips(missing=set())
    clean = cluster.dog("vdi", "check", "--dry-run", "a")
    assert (clean.code, clean.stdout, clean.stderr) == (0, b"finish check a\n", "")


def digests(*answers: str) -> Callable[[bytes, bytes], Answer]:
    """Answers GET_HASH of the data object with one letter after the other, ``-`` for none; equal ones of the inode."""
    left: Iterator[str] = iter("".join(answers))

    def answer(header: bytes, data: bytes) -> Answer:
        oid = int.from_bytes(header[16:24], "little")
        letter = next(left) if oid == OID else "i"
        return (NO_OBJ, b"", b"") if letter == "-" else (0, b"", bytes(4) + letter.encode() * 20)

    return answer


@pytest.mark.parametrize(
    ("looks", "code", "words", "stderr"),
    [
        (["aaa"], 0, [], ""),
        (["-aa"], 1, ["missing"], ""),
        (["baa", "baa", "baa"], 1, ["differing"], ""),
        (["b-a", "b-b"], 1, ["missing"], ""),
        (["baa", "aaa"], 0, [], ""),
        (["abc", "abb", "bbb"], 0, [], ""),
        (["abc", "abc", "abc"], 1, [], f"no majority of {OID:016x}\n"),
        (["---"], 1, [], f"no node has {OID:016x}\n"),
    ],
)
def test_dry_run_of_copies(cluster: Cluster, looks: list[str], code: int, words: list[str], stderr: str) -> None:
    """A difference counts only if it stays: copies that a write is on its way to become equal. Nothing is repaired."""
    add_vdi(cluster, policy=0)
    cluster.table[GET_HASH] = digests(*looks)
    outcome = cluster.dog("vdi", "check", "--dry-run", "a")

    *lines, end = outcome.stdout.decode().splitlines()
    assert (outcome.code, outcome.stderr, end) == (code, stderr, "finish check a")
    assert [line.split()[:3] for line in lines] == [[word, f"{OID:016x}", "on"] for word in words]
    assert count(cluster, REPAIR) == 0


def test_dry_run_of_the_cluster(cluster: Cluster) -> None:
    """``cluster check --dry-run`` announces every vdi and ends with 1 if anything is wrong."""
    outcome = cluster.dog("cluster", "check", "--dry-run")

    lines = outcome.stdout.decode().splitlines()
    assert (lines[0], lines[-1], len(lines), outcome.code) == ("fix vdi a", "finish check a", 3, 1)
    cluster.table[READ_PEER] = strips(missing=set())
    assert cluster.dog("cluster", "check", "--dry-run").code == 0
    cluster.table[READ_PEER] = strips(missing={1})
    cluster.table[WRITE_STRIP] = lambda header, data: (0, b"", b"")
    assert cluster.dog("cluster", "check").code == 0
