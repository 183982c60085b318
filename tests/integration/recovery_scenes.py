"""What the scenarios of membership, recovery, zones, vnodes and disks share: the invariants that hold at their end."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable

from scenes import KiB, MiB, pattern, read_all, wait_stored, write

from sheepdog.client import admin
from sheepdog.client.volume import find_vdi
from sheepdog.errors import SheepdogError
from sheepdog.model.ids import inode_oid, is_data, is_inode, vid_of
from sheepdog.model.inode import HEADER_BYTES, InodeHeader
from sheepdog.model.node import Node
from sheepdog.model.ring import Ring
from sheepdog.testing.cluster import SheepCluster, wait_until

__all__ = ["KiB", "MiB", "wait_stored"]
_SHARD = re.compile(r"([0-9a-f]{16})(_\d+)?")


def fill(cluster: SheepCluster, name: str, seed: int, *, size: int = 12 * MiB, node: int | None = None) -> bytes:
    """A new vdi with content of its own; returns the content."""
    first = cluster.live[0].index if node is None else node
    cluster.dog("vdi", "create", name, str(size), node=first)
    content = pattern(seed, size)
    write(cluster, name, 0, content, node=first)
    return content


def nodes(cluster: SheepCluster, index: int) -> tuple[Node, ...]:
    """The member list of one sheep."""
    with cluster.connect(index) as connection:
        return admin.node_list(connection.request)


def info(cluster: SheepCluster, index: int) -> bytes:
    """What ``dog cluster info -r`` says there."""
    return cluster.dog("cluster", "info", "-r", node=index).stdout


def status(cluster: SheepCluster, index: int) -> str:
    """The status line of one sheep."""
    done = cluster.dog("cluster", "info", node=index, check=False)
    return done.stdout.decode().splitlines()[0] if done.stdout else done.stderr.decode()


def wait_status(cluster: SheepCluster, index: int, words: str) -> None:
    """The status of one sheep contains the words."""

    def says() -> bool:
        try:
            return words in status(cluster, index)
        except (SheepdogError, OSError):
            return False

    wait_until(says, f"sheep {index} to say {words!r}")


def all_agree(cluster: SheepCluster) -> None:
    """Every live sheep tells the same history."""
    live = [sheep.index for sheep in cluster.live]
    wait_until(lambda: len({info(cluster, index) for index in live}) == 1, "all to agree")


def shards(cluster: SheepCluster, index: int) -> dict[tuple[int, int], str]:
    """(oid, strip or -1) -> path, of everything live on the sheep's disks, plugged ones included."""
    found: dict[tuple[int, int], str] = {}
    for base in (cluster.sheep[index].directory, *cluster.base.glob(f"disk{index}*")):
        for path in base.rglob("*"):
            match = _SHARD.fullmatch(path.name)
            if match and ".stale" not in path.parts and path.is_file():
                found[int(match[1], 16), int(match[2][1:]) if match[2] else -1] = str(path)
    return found


def _head(path: str) -> bytes:
    """The header of an inode's file, empty when the file has gone meanwhile."""
    try:
        with open(path, "rb") as file:
            return file.read(HEADER_BYTES)
    except FileNotFoundError:
        return b""


def stale(cluster: SheepCluster, index: int) -> list[str]:
    """Names of everything set aside on one sheep, but for files that wait beside it to become strips."""
    bases = (cluster.sheep[index].directory, *cluster.base.glob(f"disk{index}*"))
    return [path.name for base in bases for path in base.rglob(".stale/*") if not path.name.startswith("spare.")]


def in_place(cluster: SheepCluster, copies: int) -> None:
    """Every object has exactly min(copies, zones) copies, where the ring wants them, or its strips in the order of the
    ring, and nothing set aside is left.

    :param copies: of objects that have no inode.
    """
    cluster.wait_recovered()
    live = [sheep.index for sheep in cluster.live]
    ring = Ring(nodes(cluster, live[0]))
    ports = {cluster.sheep[index].port: index for index in live}

    def wrong() -> list[str]:
        have: dict[int, list[tuple[int, int]]] = {}  # oid -> (strip or -1, sheep)
        inodes: dict[int, InodeHeader] = {}
        for index in live:
            for (oid, strip), path in shards(cluster, index).items():
                if is_data(oid) or is_inode(oid):
                    have.setdefault(oid, []).append((strip, index))
                if is_inode(oid) and (header := _head(path)):
                    inodes[vid_of(oid)] = InodeHeader.unpack(header)
        complaints = []
        for oid in sorted(have):
            inode = inodes.get(vid_of(oid))
            striped = inode is not None and inode.copy_policy != 0 and is_data(oid)
            holders = [ports[node.id.port] for node in ring.holders(oid, inode.nr_copies if inode else copies)]
            wanted = sorted((strip if striped else -1, index) for strip, index in enumerate(holders))
            if sorted(have[oid]) != wanted:
                complaints.append(f"{oid:016x} is on (strip, sheep) {sorted(have[oid])}, not on {wanted}")
        complaints += [f"sheep {index} has set aside {names}" for index in live if (names := stale(cluster, index))]
        return complaints

    try:
        wait_until(lambda: not wrong(), "all copies to be in their places", timeout_s=10)
    except AssertionError as failure:
        failure.add_note("\n".join(wrong()[:10]))
        raise


def same_everywhere(cluster: SheepCluster, contents: dict[str, bytes], through: Iterable[int] | None = None) -> None:
    """Every live sheep returns this content."""
    for index in [sheep.index for sheep in cluster.live] if through is None else through:
        for name, content in contents.items():
            assert read_all(cluster, name, node=index) == content, f"{name} through sheep {index}"


def wipe(cluster: SheepCluster, index: int) -> None:
    """The sheep, which is stopped, has an empty directory."""
    shutil.rmtree(cluster.sheep[index].directory)


def exited(cluster: SheepCluster, index: int) -> int:
    """Exit code of a sheep that ends by itself."""
    process = cluster.sheep[index].process
    assert process is not None
    return process.wait(30)


def inode_of(cluster: SheepCluster, name: str, index: int) -> int:
    """The inode object of a vdi."""
    with cluster.connect(index) as connection:
        return inode_oid(find_vdi(connection.request, name.encode()).vid)
