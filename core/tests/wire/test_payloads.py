"""Header variants and bodies."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.errors import InvalidParameters, ProtocolError, SheepdogError
from sheepdog.model.attribute import Attribute
from sheepdog.model.backup import read_backup
from sheepdog.model.btree import BtreeNode
from sheepdog.model.clusterinfo import ClusterInfo, DiskConfig
from sheepdog.model.epochs import EpochRecord, unpack_epoch_log
from sheepdog.model.farm import SnapshotLog, unpack_trunk
from sheepdog.model.inode import InodeHeader
from sheepdog.model.journal_entry import scan
from sheepdog.model.ledger import decode
from sheepdog.model.node import Node, NodeId, VnodeMode, mode_of_records, unpack_nodes
from sheepdog.model.vdi_state import VdiState
from sheepdog.wire import payloads
from sheepdog.wire.payloads import (
    REQUEST_VARIANTS,
    RESPONSE_VARIANTS,
    ForwRequest,
    MdDisk,
    MdInfo,
    RecoveryState,
    Stat,
    Throttle,
    VdiRequest,
    VdiResponse,
)

STRUCTURES = [*REQUEST_VARIANTS, *RESPONSE_VARIANTS, RecoveryState, Throttle, Stat]
NAMES = st.binary(max_size=255).filter(lambda name: b"\0" not in name)


@pytest.mark.parametrize("structure", STRUCTURES)
@given(data=st.data())
def test_inverse(structure, data):
    """Any content of the fields survives packing, and padding is ignored and sent as zero."""
    raw = data.draw(st.binary(min_size=structure._struct.size, max_size=structure._struct.size))
    value = structure.unpack(raw)
    packed = value.pack()

    assert structure.unpack(packed) == value
    assert len(packed) == len(raw)
    assert all(byte in (0, original) for byte, original in zip(packed, raw, strict=True))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_short(structure):
    """Fewer bytes than the structure has are a protocol error."""
    with pytest.raises(ProtocolError):
        structure.unpack(bytes(structure._struct.size - 1))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_sizes(structure):
    """Variants fill their place in the header exactly; the defaults are all zero."""
    size = {**dict.fromkeys(REQUEST_VARIANTS, 32), **dict.fromkeys(RESPONSE_VARIANTS, 28)}.get(structure)

    assert structure().pack() == bytes(size or structure._struct.size)


def test_overflow():
    """A number that its field cannot hold is refused, not cut."""
    with pytest.raises(InvalidParameters):
        VdiRequest(copies=256).pack()
    with pytest.raises(InvalidParameters):
        VdiRequest(vdi_size=-1).pack()


def test_documented_reply():
    """The documented reply to NEW_VDI."""
    raw = bytes.fromhex("00000000 8cec0100 00000000 02 16".replace(" ", "")).ljust(28, b"\0")

    assert VdiResponse.unpack(raw) == VdiResponse(0x01EC8C, 0, 2, 22)
    assert VdiResponse(0x01EC8C, 0, 2, 22).pack() == raw


def test_repair_source():
    """REPAIR_REPLICA names a node."""
    node = NodeId.of("10.1.2.3", 7000)

    assert ForwRequest.unpack(ForwRequest(1, node.address, node.port).pack()).node_id == node
    assert ForwRequest(1, node.address, node.port).host == "10.1.2.3"


@given(NAMES, st.one_of(st.none(), NAMES))
def test_names_inverse(name, tag):
    """Names and tags survive; without a tag the body is half as long."""
    body = payloads.pack_names(name, tag)

    assert len(body) == (256 if tag is None else 512)
    assert payloads.unpack_names(body) == (name, tag or b"")


@pytest.mark.parametrize(
    "body", [b"", bytes(255), bytes(257), bytes(768), b"x" * 256, b"x\0".ljust(256, b"\0") + b"y" * 256]
)
def test_bad_names(body):
    """Other lengths, and fields that never end, are refused with a result, not with the connection."""
    with pytest.raises(InvalidParameters):
        payloads.unpack_names(body)


@pytest.mark.parametrize("body", [bytes(256), bytes(512), b"x" * 256])
def test_bad_new_names(body):
    """NEW_VDI takes exactly a name, and an empty one is none."""
    with pytest.raises(InvalidParameters):
        payloads.unpack_new_vdi_name(body)


def test_new_name():
    """NEW_VDI's body is the name alone."""
    assert payloads.unpack_new_vdi_name(payloads.pack_names(b"test")) == b"test"


@given(st.lists(st.integers(0, (1 << 64) - 1), max_size=10))
def test_oids_inverse(oids):
    """Lists of oids survive."""
    assert payloads.unpack_oids(payloads.pack_oids(oids)) == oids


def test_bad_oids():
    """A list that ends inside an oid is a protocol error."""
    with pytest.raises(ProtocolError):
        payloads.unpack_oids(bytes(9))


@given(st.integers(-(1 << 31), (1 << 31) - 1), st.binary(max_size=4))
def test_i32_inverse(number, more):
    """A number is read from the first four bytes, whatever follows."""
    assert payloads.unpack_i32(payloads.pack_i32(number) + more) == number


@given(st.integers(0, (1 << 32) - 1))
def test_u32_inverse(number):
    """Vids survive."""
    assert payloads.unpack_u32(payloads.pack_u32(number)) == number


@pytest.mark.parametrize("read", [payloads.unpack_i32, payloads.unpack_u32])
def test_short_numbers(read):
    """Fewer than four bytes are no number."""
    with pytest.raises(InvalidParameters):
        read(bytes(3))


def test_texts():
    """Store lists, paths and names in the form of the original."""
    assert payloads.pack_store_list(["tree", "plain"]) == b"tree plain \0"
    assert payloads.unpack_store_list(b"tree plain \0\0\0") == ("tree", "plain")
    assert payloads.pack_paths(["/srv/a", "/srv/b"]) == b"/srv/a,/srv/b\0"
    assert payloads.unpack_paths(b"/srv/a,,/srv/b\0") == ("/srv/a", "/srv/b")
    assert payloads.unpack_text(b"plain\0junk") == "plain"
    assert payloads.unpack_text(payloads.pack_text("ä\udcff")) == "ä\udcff"


@given(
    st.lists(
        st.builds(
            MdDisk,
            st.integers(-(1 << 31), (1 << 31) - 1),
            st.integers(0, (1 << 64) - 1),
            st.integers(0, (1 << 64) - 1),
            st.text("abc/ä", max_size=20),
        ),
        max_size=3,
    )
)
def test_md_info_inverse(disks):
    """Disk tables survive and have their fixed size."""
    info = MdInfo(tuple(disks))

    assert MdInfo.unpack(info.pack()) == info
    assert len(info.pack()) == 263688


def test_md_info_bounds():
    """Tables that are too long, or announce what they do not hold, are refused."""
    with pytest.raises(InvalidParameters):
        MdInfo((MdDisk(0, 0, 0, "/a"),) * 65).pack()
    with pytest.raises(InvalidParameters):
        MdInfo((MdDisk(0, 0, 0, "x" * 4096),)).pack()
    with pytest.raises(ProtocolError):
        MdInfo.unpack(bytes(263687))
    with pytest.raises(ProtocolError):
        MdInfo.unpack(bytes(263680) + (65).to_bytes(8, "little"))


def test_fields_of():
    """Tools can list what a structure holds."""
    assert payloads.fields_of(Throttle(1, 2, 3)) == {"max_exec_count": 1, "interval_ms": 2, "on": 3}


READERS = [
    Attribute.unpack,
    BtreeNode.unpack,
    BtreeNode.unpack_leaf,
    ClusterInfo.unpack,
    DiskConfig.unpack,
    EpochRecord.unpack,
    InodeHeader.unpack,
    SnapshotLog.unpack,
    VdiState.unpack,
    NodeId.unpack,
    decode,
    unpack_nodes,
    Node.unpack,
    lambda raw: EpochRecord.unpack(raw, VnodeMode.DISK),
    lambda raw: unpack_nodes(raw[: len(raw) // 592 * 592], mode_of_records(raw)),
    unpack_trunk,
    lambda raw: unpack_epoch_log(raw, 1),
    lambda raw: list(scan(raw)),
    lambda raw: list(read_backup(io.BytesIO(raw).read)),
    payloads.unpack_names,
    payloads.unpack_oids,
]


@pytest.mark.parametrize("read", READERS)
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=2000), st.binary(min_size=1428, max_size=1428)))
def test_hostile_bytes(read, raw):
    """Whatever arrives, reading it ends with a value or with an error of ours."""
    try:
        read(raw)
    except SheepdogError:
        pass
