"""What a node knows of its cluster, on the wire and on disk."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.errors import ConfigError, InvalidParameters, ProtocolError
from sheepdog.model.clusterinfo import CLUSTER_INFO_BYTES, ClusterFlag, ClusterInfo, ClusterStatus, DiskConfig
from sheepdog.model.node import Node, NodeId

U8 = st.integers(0, 255)
U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
FLAGS = st.integers(0, 63).map(ClusterFlag)
STORES = st.text("abcdefghijklmnopqrstuvwxyz-_0123456789", max_size=15)
NODES = st.builds(
    Node,
    st.builds(NodeId, st.binary(min_size=16, max_size=16), st.integers(0, 0xFFFF)),
    st.integers(0, 0xFFFF),
    U32,
    U64,
)
INFOS = st.builds(
    ClusterInfo,
    proto_ver=U8,
    disable_recovery=st.booleans(),
    epoch=U32,
    ctime=U64,
    flags=FLAGS,
    copies=U8,
    copy_policy=U8,
    status=st.sampled_from(ClusterStatus),
    block_size_shift=U8,
    default_store=STORES,
    nodes=st.lists(NODES, max_size=4).map(tuple),
)
CONFIGS = st.builds(
    DiskConfig,
    ctime=U64,
    flags=FLAGS,
    copies=U8,
    default_store=STORES,
    shutdown=st.booleans(),
    copy_policy=U8,
    block_size_shift=U8,
    space=U64,
)


@given(INFOS)
def test_info_inverse(info):
    """Cluster info survives packing, whole or shortened."""
    assert ClusterInfo.unpack(info.pack_used()) == info


def test_info_whole():
    """The whole structure has its fixed size, unused records zero."""
    info = ClusterInfo(epoch=3, default_store="plain", nodes=(Node(NodeId.of("10.0.0.1", 7000)),))
    whole = info.pack()

    assert len(whole) == CLUSTER_INFO_BYTES == 491568
    assert ClusterInfo.unpack(whole) == info
    assert not any(whole[128:])


@pytest.mark.parametrize("count", [1, 6145, -1 & 0xFFFF])
def test_info_impossible(count):
    """A count that does not fit the bytes, or any cluster, is a protocol error."""
    raw = bytearray(ClusterInfo().pack_used())
    raw[2:4] = count.to_bytes(2, "little")

    with pytest.raises(ProtocolError):
        ClusterInfo.unpack(raw)
    with pytest.raises(ProtocolError):
        ClusterInfo.unpack(raw[:47])


def test_config_documented():
    """The documented config file is read, and written back to the same bytes."""
    raw = bytes.fromhex("98df640a259b026b 0400 03".replace(" ", "")) + b"plain".ljust(16, b"\0")
    raw += bytes.fromhex("01 00 16 0600 00f047ba12000000".replace(" ", ""))
    config = DiskConfig.unpack(raw)

    assert config == DiskConfig(
        ctime=0x6B029B250A64DF98,
        flags=ClusterFlag.AUTO_VNODES,
        copies=3,
        default_store="plain",
        shutdown=True,
        block_size_shift=22,
        space=0x12BA47F000,
    )
    assert config.pack() == raw


@given(CONFIGS)
def test_config_inverse(config):
    """A config survives packing."""
    assert DiskConfig.unpack(config.pack()) == config
    assert len(config.pack()) == 40


def test_config_other_version():
    """Another format version is refused with the text that operators know."""
    raw = DiskConfig(version=5).pack()

    with pytest.raises(ConfigError, match="This sheep version is not compatible with the existing data layout, 5"):
        DiskConfig.unpack(raw)


@pytest.mark.parametrize("size", [0, 39, 41])
def test_config_size(size):
    """A file of another size is no config."""
    with pytest.raises(ConfigError):
        DiskConfig.unpack(bytes(size))


@pytest.mark.parametrize("name", ["x" * 16, "pläin", "a\0b"])
def test_store_names(name):
    """A store name that its field cannot hold is refused."""
    with pytest.raises(InvalidParameters):
        DiskConfig(default_store=name).pack()
