"""Node identities and records."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.errors import ConfigError, ProtocolError
from sheepdog.model.node import (
    NODE_BYTES,
    NODE_ID_BYTES,
    Node,
    NodeId,
    default_zone,
    format_address,
    pack_nodes,
    parse_address,
    unpack_nodes,
)
from sheepdog.testing.vectors import vectors

ADDRESSES = st.binary(min_size=16, max_size=16)
PORTS = st.integers(0, 0xFFFF)
NODE_IDS = st.builds(NodeId, ADDRESSES, PORTS, ADDRESSES, PORTS)
NODES = st.builds(Node, NODE_IDS, PORTS, st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1))


def test_recorded():
    """Records and identities have the original's bytes."""
    for ring in vectors()["rings"]:
        for row in ring["nodes"]:
            node = Node(NodeId.of(row["address"], row["port"]), row["vnodes"], row["zone"], row["space"])
            assert node.pack().hex() == row["sd_node_80_bytes"]
            assert node.id.pack().hex() == row["node_id_40_bytes"]
            assert Node.unpack(node.pack()) == node
            assert node.id.host == row["address"]


@given(NODES)
def test_inverse(node):
    """A record survives packing, the second NIC included."""
    read = Node.unpack(node.pack())

    assert read == node
    assert (read.id.io_address, read.id.io_port) == (node.id.io_address, node.id.io_port)
    assert len(node.pack()) == NODE_BYTES
    assert NodeId.unpack(node.id.pack()) == node.id


@given(st.lists(NODES, max_size=4))
def test_list(nodes):
    """A list of records survives packing."""
    assert unpack_nodes(pack_nodes(nodes)) == tuple(nodes)


def test_reserved_ignored():
    """The first 24 bytes of a record say nothing, whatever a peer left there."""
    node = Node(NodeId.of("10.1.2.3", 7000), 5, 6, 7)

    assert Node.unpack(b"\xff" * 24 + node.pack()[24:]) == node


@pytest.mark.parametrize("size", [0, 1, NODE_BYTES - 1])
def test_short(size):
    """Too few bytes are a protocol error, not a node."""
    with pytest.raises(ProtocolError):
        Node.unpack(bytes(size))
    with pytest.raises(ProtocolError):
        NodeId.unpack(bytes(min(size, NODE_ID_BYTES - 1)))
    with pytest.raises(ProtocolError):
        Node.unpack(bytes(NODE_BYTES), 1)


def test_short_list():
    """A list that ends inside a record is a protocol error."""
    with pytest.raises(ProtocolError):
        unpack_nodes(bytes(NODE_BYTES + 1))


@given(ADDRESSES, PORTS, ADDRESSES, PORTS)
def test_identity(address, port, io_address, io_port):
    """The second NIC is no part of who a node is."""
    plain, with_nic = NodeId(address, port), NodeId(address, port, io_address, io_port)

    assert plain == with_nic
    assert hash(plain) == hash(with_nic)


def test_order():
    """Nodes are ordered by address bytes, then by port as a number."""
    ordered = [NodeId.of("10.0.0.1", 9), NodeId.of("10.0.0.1", 10), NodeId.of("10.0.0.2", 1), NodeId.of("2001::", 0)]

    assert sorted([ordered[2], ordered[1], ordered[3], ordered[0]]) == ordered


@given(ADDRESSES)
def test_address_text(address):
    """Any address is the one its text says, apart from the mapped form that means the same host."""
    text = format_address(address)

    if address[:12] != bytes(10) + b"\xff\xff":
        assert parse_address(text) == address


def test_texts():
    """IPv6 hosts stand in brackets before a port; the mapped form is the IPv4 host."""
    assert NodeId.of("127.0.0.1", 7000).text == "127.0.0.1:7000"
    assert NodeId.of("::1", 7000).text == "[::1]:7000"
    assert NodeId.of("[2001:db8::1]", 1).host == "2001:db8::1"
    assert NodeId.of("::ffff:10.0.0.1", 1) == NodeId.of("10.0.0.1", 1)


def test_second_nic():
    """A second NIC shows only where there is one."""
    assert NodeId.of("10.0.0.1", 1).io_host is None
    assert NodeId.of("10.0.0.1", 1, "10.9.0.1", 2).io_host == "10.9.0.1"


def test_default_zone():
    """Without -z the zone is the IPv4 address read as a little-endian number."""
    assert default_zone(parse_address("192.168.1.20")) == 335653056


@pytest.mark.parametrize("host", ["", "localhost", "1.2.3", "1.2.3.4.5"])
def test_not_an_address(host):
    """A name is refused: resolving is not done here."""
    with pytest.raises(ConfigError):
        NodeId.of(host, 7000)


@pytest.mark.parametrize(
    ("vnodes", "zone", "space"), [(-1, 0, 0), (65536, 0, 0), (1, -1, 0), (1, 1 << 32, 0), (1, 0, -1), (1, 0, 1 << 64)]
)
def test_bounds(vnodes, zone, space):
    """A record that the wire cannot carry cannot be made."""
    with pytest.raises(ConfigError):
        Node(NodeId.of("10.0.0.1", 1), vnodes, zone, space)
