"""The store of the plugin guide, installed as its author would, carries a real cluster."""

import importlib.metadata

import pytest

from sheepdog.testing.services import missing_service

pytestmark = pytest.mark.processes


def test_sheep_on_the_sqlite_store(sheep_cluster):
    """``sheep --store sqlite`` stores, snapshots and serves a volume, and has it again after a restart."""
    if not any(entry.name == "sqlite" for entry in importlib.metadata.entry_points(group="sheepdog.store")):
        missing_service("the example store is not installed (pip install examples/store_sqlite)")
    cluster = sheep_cluster(2, options=("--store", "sqlite"))
    cluster.dog("cluster", "format", "--copies=2")
    content = bytes(range(256)) * 4096
    cluster.dog("vdi", "create", "disk", "8M")
    cluster.dog("vdi", "write", "disk", input=content)
    cluster.dog("vdi", "snapshot", "-s", "first", "disk")
    cluster.dog("vdi", "write", "disk", "0", "4096", input=b"x" * 4096)
    cluster.kill(1)
    cluster.restart(1)
    cluster.wait_recovered()

    now = cluster.dog("vdi", "read", "disk", "0", str(len(content)), node=1).stdout
    then = cluster.dog("vdi", "read", "-s", "first", "disk", "0", str(len(content)), node=1).stdout
    assert now == b"x" * 4096 + content[4096:]
    assert then == content
    assert list(cluster.sheep[0].directory.rglob("*.sqlite*")) or list(cluster.sheep[0].directory.rglob("*.db*"))
