"""What holds at the end of every scenario (INV-1 to INV-6): looked up on disk and in the logs, not asked for."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from recovery_scenes import in_place, shards
from scenes import live_inodes

from sheepdog.client import admin
from sheepdog.model.ids import is_data
from sheepdog.testing.cluster import SheepCluster

_SEVERE = re.compile(r" (?:ERROR|CRIT|ALERT|EMERG) \[.*")


def identical(cluster: SheepCluster) -> None:
    """All copies of each object, of whatever kind, are the same to the byte. Nobody is asked, so nothing is mended.

    Of strips only those of one index are copies of each other.
    """
    versions: dict[tuple[int, int], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for sheep in cluster.live:
        for key, path in shards(cluster, sheep.index).items():
            versions[key][hashlib.blake2b(Path(path).read_bytes()).hexdigest()].append(path)
    different = {f"{oid:016x}": sorted(found.values()) for (oid, _), found in versions.items() if len(found) > 1}
    assert versions, "nothing is stored"
    assert not different, f"copies differ: {different}"


def clean_checks(cluster: SheepCluster) -> None:
    """`dog vdi check` has nothing to say about any volume or snapshot (INV-4)."""
    for inode in live_inodes(cluster):
        name = inode.header.name.decode()
        which = ["-s", str(inode.header.snap_id)] if inode.header.is_snapshot else []
        done = cluster.dog("vdi", "check", *which, name, check=False)
        assert done.stdout == f"finish check&repair {name}\n".encode(), (done.stdout, done.stderr)


class Watch:
    """What the logs and the epochs say between its making and ``check``."""

    def __init__(self, cluster: SheepCluster) -> None:
        self._cluster = cluster
        self._read = {sheep.index: _size(sheep.log_path) for sheep in cluster.sheep}
        self._epochs = _epochs(cluster)

    def check(self, *, explained: Iterable[str] = (), changes: int | None = None) -> None:
        """INV-5, INV-6: epochs have grown as membership changed, all sheep run, and no log has an error that is not
        explained.

        :param explained: regular expressions for errors that the scenario causes.
        :param changes: how many epochs more there are; ``None`` where that depends on who noticed what first.
        """
        down = [sheep.index for sheep in self._cluster.sheep if not sheep.running]
        assert not down, f"sheep {down} ended unexpectedly"
        epochs = _epochs(self._cluster)
        assert all(epochs[index] >= before for index, before in self._epochs.items() if index in epochs)
        assert len(set(epochs.values())) == 1, f"epochs differ: {epochs}"
        if changes is not None:
            assert max(epochs.values()) == max(self._epochs.values()) + changes
        accepted = re.compile("|".join(explained) or r"(?!)")
        for sheep in self._cluster.sheep:
            with sheep.log_path.open("rb") as log:
                log.seek(self._read[sheep.index])
                text = log.read().decode(errors="replace")
            severe = [line for line in _SEVERE.findall(text) if not accepted.search(line)]
            assert not severe, f"sheep {sheep.index} logged {severe[:5]}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _epochs(cluster: SheepCluster) -> dict[int, int]:
    return {sheep.index: cluster.epoch(sheep.index) for sheep in cluster.live}


def strips_complete(cluster: SheepCluster) -> None:
    """No strip of an erasure-coded object is missing: each index that some object has exists once."""
    found: dict[int, list[int]] = defaultdict(list)
    for sheep in cluster.live:
        for oid, index in shards(cluster, sheep.index):
            if is_data(oid) and index >= 0:
                found[oid].append(index)
    wrong = {f"{oid:016x}": sorted(have) for oid, have in found.items() if sorted(have) != list(range(len(have)))}
    assert not wrong, f"strips: {wrong}"


def everything(cluster: SheepCluster, *, timeout_s: float = 60.0) -> None:
    """INV-2, INV-3, INV-4, and all copies identical before anybody looks at them."""
    cluster.wait_recovered(timeout_s=timeout_s)
    identical(cluster)
    in_place(cluster, default_copies(cluster))
    strips_complete(cluster)
    clean_checks(cluster)


def default_copies(cluster: SheepCluster) -> int:
    """Copies of a volume whose inode does not say otherwise."""
    with cluster.connect(cluster.live[0].index) as connection:
        return admin.cluster_info(connection.request).copies
