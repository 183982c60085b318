"""Placement: against the original, and the properties that make it worth having."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepdog.model import ring as rings
from sheepdog.model.hashing import hash_oid
from sheepdog.model.node import Node, NodeId
from sheepdog.model.ring import DiskRing, Ring, auto_vnodes
from sheepdog.testing.vectors import vectors

OIDS = st.integers(0, (1 << 64) - 1)
COPIES = st.integers(1, 6)


@st.composite
def members(draw, min_size=1):
    """Nodes of a small cluster, some of them gateways, some sharing a zone."""
    numbers = draw(st.lists(st.integers(1, 250), min_size=min_size, max_size=8, unique=True))
    ids = [NodeId.of(f"10.0.0.{number}", 7000) for number in numbers]
    return [Node(one, draw(st.integers(0, 12)), draw(st.integers(0, 5))) for one in ids]


def nodes_of(row):
    return [
        Node(NodeId.of(node["address"], node["port"]), node["vnodes"], node["zone"], node["space"])
        for node in row["nodes"]
    ]


@pytest.mark.parametrize("number", range(3))
def test_recorded_ring(number):
    """Every position, and the holders of 200 objects, are those of the original."""
    row = vectors()["rings"][number]
    nodes = nodes_of(row)
    ring = Ring(nodes)

    assert ring.zones == row["zones"]
    assert [f"{position:016x}" for position in ring.positions] == [position for position, _ in row["ring"]]
    owners = [ring.walk(position, 1)[0][0] for position in ring.positions]
    assert [nodes.index(owner) for owner in owners] == [owner for _, owner in row["ring"]]
    for text, order, positions in row["targets"]:
        oid = int(text, 16)
        assert [nodes.index(node) for node in ring.holders(oid, row["zones"])] == order
        assert [f"{position:016x}" for _, position in ring.walk(hash_oid(oid), 31)] == positions


def test_auto_vnodes():
    """Vnodes in proportion to space are rounded as the original rounds them."""
    for row in vectors()["vnodes_auto"]:
        nodes = [Node(NodeId.of("10.0.0.1", port), 7, space=space) for port, space in enumerate(row["space"])]
        assert [node.vnodes for node in auto_vnodes(nodes)] == row["vnodes"]


def test_auto_vnodes_of_recorded_rings():
    """The announced vnodes of recorded automatic clusters follow from their spaces."""
    for row in vectors()["rings"]:
        if row["strategy"] == "auto":
            nodes = nodes_of(row)
            assert auto_vnodes([replace(node, vnodes=1) for node in nodes]) == tuple(nodes)


def test_auto_vnodes_without_space():
    """Where nobody has space, vnodes stay as announced."""
    nodes = [Node(NodeId.of("10.0.0.1", port), port) for port in (3, 4)]

    assert auto_vnodes(nodes) == tuple(nodes)


@pytest.mark.parametrize("number", range(3))
def test_recorded_disks(number):
    """Objects go to the disk that the original picked."""
    row = vectors()["disk_rings"][number]
    ring = DiskRing((disk["path"], disk["space"]) for disk in row["disks"])

    assert len(ring.positions) == sum(disk["positions"] for disk in row["disks"])
    for oid, disk, _ in row["picks"]:
        assert ring.disk_of(int(oid, 16)) == row["disks"][disk]["path"]


def test_disk_trailing_slash():
    """A trailing slash in a disk's path moves nothing, and the path is given back as it came."""
    plain, slashed = DiskRing([("/a", 1 << 30), ("/b", 1 << 30)]), DiskRing([("/a/", 1 << 30), ("/b", 1 << 30)])

    assert plain.positions == slashed.positions
    assert {slashed.disk_of(oid) for oid in range(64)} == {"/a/", "/b"}


def test_no_disk():
    """Without space there is nowhere to put an object."""
    with pytest.raises(LookupError):
        DiskRing([("/a", 0)]).disk_of(1)


@given(members(), OIDS, COPIES)
def test_zones_apart(nodes, oid, copies):
    """Holders are in distinct zones, as many as asked for or as there are zones, and all of them store."""
    ring = Ring(nodes)
    holders = ring.holders(oid, copies)

    assert len({node.zone for node in holders}) == len(holders) == min(copies, ring.zones)
    assert all(node.vnodes > 0 for node in holders)


@given(members(), OIDS, COPIES)
def test_prefix(nodes, oid, copies):
    """Fewer copies are the first of more copies."""
    ring = Ring(nodes)

    assert ring.holders(oid, copies + 1)[:copies] == ring.holders(oid, copies)


@given(members(min_size=2), st.lists(OIDS, max_size=20), COPIES)
def test_one_more_node(nodes, oids, copies):
    """A node that joins moves only what it takes itself, and a node that leaves only what it had."""
    without, complete = Ring(nodes[1:]), Ring(nodes)
    newcomer = nodes[0]

    for oid in oids:
        before, after = without.holders(oid, copies), complete.holders(oid, copies)
        if newcomer in after:
            assert set(after) - {newcomer} <= set(before)
        else:
            assert after == before


@given(members(), st.randoms(use_true_random=False), OIDS)
def test_order_of_members(nodes, random, oid):
    """The order in which members are listed does not matter."""
    shuffled = list(nodes)
    random.shuffle(shuffled)

    assert Ring(shuffled).holders(oid, 3) == Ring(nodes).holders(oid, 3)
    assert Ring(shuffled).nodes == tuple(sorted(nodes, key=lambda node: node.id))


def test_gateways_only():
    """Where nobody stores, nobody holds."""
    ring = Ring([Node(NodeId.of("10.0.0.1", 1), 0)])

    assert ring.holders(1, 3) == ()
    assert ring.zones == 0
    assert len(ring.nodes) == 1
    assert Ring([]).holders(1, 1) == ()


def test_zones_counted():
    """Zones beyond 31 are not counted."""
    nodes = [Node(NodeId.of("10.0.0.1", port), 2, zone=port) for port in range(1, 40)]

    assert Ring(nodes).zones == 31
    assert len(Ring(nodes).holders(7, 99)) == 31


def test_cache_bounded(monkeypatch):
    """What is remembered has a bound, and forgetting changes no answer."""
    monkeypatch.setattr(rings, "CACHE_OIDS_MAX", 8)
    nodes = [Node(NodeId.of("10.0.0.1", port), 8, zone=port) for port in range(1, 5)]
    ring, fresh = Ring(nodes), Ring(nodes)

    first = [ring.holders(oid, 2) for oid in range(50)]

    assert [fresh.holders(oid, 2) for oid in range(50)] == first
    assert [ring.holders(oid, 2) for oid in range(50)] == first
    assert len(ring._caches[2]) <= 8


@settings(max_examples=20)
@given(st.integers(0, (1 << 64) - 1))
def test_collision(position):
    """Two vnodes that hash to one position both stay on the ring, the same on every node."""
    calls = iter([(position,), (position,)])
    original = rings._node_positions
    rings._node_positions = lambda identity, count: next(calls)  # type: ignore[assignment]  # restored below
    try:
        ring = Ring([Node(NodeId.of("10.0.0.1", port), 1, zone=port) for port in (1, 2)])
    finally:
        rings._node_positions = original

    assert set(ring.positions) == {position, (position + 1) % (1 << 64)}
    assert len(ring.holders(5, 2)) == 2
