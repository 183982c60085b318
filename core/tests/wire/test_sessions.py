"""Every recorded frame of the original: variants and bodies are read and written back to the same bytes.

Not compared is what the original leaves unfilled: the 24 bytes before each node's identity, node slots behind the last
one, the padding of DECREF_PEER's variant (the gateway sets a field of another variant there) and of two bodies.
"""

from collections import Counter
from collections.abc import Callable

import pytest

from sheepdog.model import ids, inode
from sheepdog.model.attribute import Attribute
from sheepdog.model.clusterinfo import ClusterInfo
from sheepdog.model.epochs import pack_epoch_log, unpack_epoch_log
from sheepdog.model.inode import InodeHeader
from sheepdog.model.node import pack_nodes, unpack_nodes
from sheepdog.model.vdi_state import pack_vdi_states, unpack_vdi_states
from sheepdog.model.vid_bitmap import VidBitmap
from sheepdog.testing.vectors import exchanges, session_names
from sheepdog.wire import payloads as p
from sheepdog.wire.opcodes import OP_TABLE, Op

VARIANTS = {
    p.ObjRequest: [
        Op.CREATE_AND_WRITE_OBJ, Op.READ_OBJ, Op.WRITE_OBJ, Op.FLUSH_VDI, Op.CREATE_AND_WRITE_PEER, Op.READ_PEER,
        Op.WRITE_PEER, Op.REMOVE_PEER, Op.GET_HASH, Op.EXIST,
    ],
    p.VdiRequest: [Op.NEW_VDI, Op.LOCK_VDI, Op.RELEASE_VDI, Op.GET_VDI_INFO, Op.DEL_VDI, Op.GET_VDI_ATTR],
    p.ClusterRequest: [Op.MAKE_FS, Op.STAT_CLUSTER, Op.ALTER_CLUSTER_COPY],
    p.VdiStateRequest: [Op.NOTIFY_VDI_ADD, Op.ALTER_VDI_COPY],
    p.RefRequest: [Op.DECREF_PEER],
}  # fmt: skip
REQUEST_VARIANT = {op: variant for variant, ops in VARIANTS.items() for op in ops}
REPLIES = {
    p.VdiResponse: [Op.NEW_VDI, Op.LOCK_VDI, Op.GET_VDI_INFO, Op.DEL_VDI, Op.GET_VDI_ATTR],
    p.ObjResponse: [Op.CREATE_AND_WRITE_OBJ, Op.READ_OBJ, Op.WRITE_OBJ],
    p.NodeResponse: [Op.GET_NODE_LIST, Op.STAT_SHEEP],
    p.HashResponse: [Op.GET_HASH],
    p.ClusterDefaultResponse: [Op.GET_CLUSTER_DEFAULT],
}
RESPONSE_VARIANT = {op: variant for variant, ops in REPLIES.items() for op in ops}

Again = Callable[[bytes], bytes]


def structure(kind) -> Again:
    return lambda raw: kind.unpack(raw).pack()


def clear_node_heads(raw: bytes, first: int = 0) -> bytes:
    """The 24 reserved bytes of each node record from ``first`` on are zero."""
    cleared = bytearray(raw)
    for at in range(first, len(cleared) - 79, 80):
        cleared[at : at + 24] = bytes(24)
    return bytes(cleared)


def names_again(raw: bytes) -> bytes:
    name, tag = p.unpack_names(raw)
    return p.pack_names(name, tag if len(raw) == 512 else None)


REQUEST_BODY: dict[int, Again] = {
    Op.NEW_VDI: lambda raw: p.pack_names(p.unpack_new_vdi_name(raw)),
    Op.LOCK_VDI: names_again,
    Op.GET_VDI_INFO: names_again,
    Op.DEL_VDI: names_again,
    Op.RELEASE_VDI: lambda raw: p.pack_text(p.unpack_text(raw)),
    Op.GET_VDI_ATTR: structure(Attribute),
    Op.MAKE_FS: lambda raw: p.pack_text(p.unpack_text(raw)),
    Op.OIDS_EXIST: lambda raw: p.pack_oids(p.unpack_oids(raw)),
    Op.MD_PLUG: lambda raw: p.pack_paths(p.unpack_paths(raw)),
    Op.MD_UNPLUG: lambda raw: p.pack_paths(p.unpack_paths(raw)),
    Op.SET_RECOVERY: structure(p.Throttle),
    Op.SET_VNODES: lambda raw: p.pack_i32(p.unpack_i32(raw)),
}
RESPONSE_BODY: dict[int, Again] = {
    Op.GET_NODE_LIST: lambda raw: pack_nodes(unpack_nodes(raw)),
    Op.FORCE_RECOVER: lambda raw: pack_nodes(unpack_nodes(raw)),
    Op.CLUSTER_INFO: structure(ClusterInfo),
    Op.GET_VDI_COPIES: lambda raw: pack_vdi_states(unpack_vdi_states(raw)),
    Op.MD_INFO: structure(p.MdInfo),
    Op.STAT: structure(p.Stat),
    Op.STAT_RECOVERY: structure(p.RecoveryState),
    Op.GET_RECOVERY: structure(p.Throttle),
    Op.READ_VDIS: structure(VidBitmap),
    Op.READ_DEL_VDIS: structure(VidBitmap),
    Op.GET_OBJ_LIST: lambda raw: p.pack_oids(p.unpack_oids(raw)),
    Op.GET_LOGLEVEL: lambda raw: p.pack_i32(p.unpack_i32(raw)),
}
IGNORED: dict[int, Again] = {
    Op.GET_NODE_LIST: clear_node_heads,
    Op.FORCE_RECOVER: clear_node_heads,
    Op.CLUSTER_INFO: lambda raw: clear_node_heads(raw, 48),
    Op.SET_RECOVERY: lambda raw: raw[:4] + bytes(4) + raw[8:17] + bytes(7),
    Op.SET_VNODES: lambda raw: raw[:4],
}


def check_request(frame) -> int:
    op, variant = frame.opcode, frame.header[16:48]
    kind = REQUEST_VARIANT.get(op)
    if kind is None:
        assert not any(variant), f"{frame.session}:{frame.number}: a variant that nobody reads"
    else:
        if op == Op.DECREF_PEER:
            variant = variant[:16] + bytes(16)
        assert kind.unpack(variant).pack() == variant, f"{frame.session}:{frame.number}"
    again = REQUEST_BODY.get(op)
    if not frame.data or again is None:
        return kind is not None
    assert again(frame.data) == IGNORED.get(op, bytes)(frame.data), f"{frame.session}:{frame.number}"
    return 1


def check_log(request, response) -> None:
    """A STAT_CLUSTER reply, whose unused slots hold leftovers."""
    slots = p.ClusterRequest.unpack(request.header[16:48]).nodes_nr
    stride = 48 + 80 * slots
    entries = unpack_epoch_log(response.data, slots)
    expected = b""
    for number, entry in enumerate(entries):
        used = 48 + 80 * len(entry.nodes)
        raw = response.data[number * stride : number * stride + used]
        expected += clear_node_heads(raw, 48).ljust(stride, b"\0")
    assert pack_epoch_log(entries, slots) == expected, f"{response.session}:{response.number}"


def check_inode(request, response) -> None:
    """The beginning of an inode, as far as it was asked for."""
    oid = p.ObjRequest.unpack(request.header[16:48])
    if ids.is_inode(oid.oid) and oid.offset == 0 and len(response.data) >= inode.FIELDS_BYTES:
        header = InodeHeader.unpack(response.data)
        assert header.pack()[: len(response.data)] == response.data[: inode.HEADER_BYTES]
        assert header.vdi_id == ids.vid_of(oid.oid)


def check_response(request, response) -> int:
    op, variant = response.opcode, response.header[20:48]
    kind = RESPONSE_VARIANT.get(op)
    if kind is None:
        assert not any(variant), f"{response.session}:{response.number}: a variant that nobody reads"
    else:
        assert kind.unpack(variant).pack() == variant, f"{response.session}:{response.number}"
    if not response.data:
        return kind is not None
    again = RESPONSE_BODY.get(op)
    if op == Op.STAT_CLUSTER:
        check_log(request, response)
    elif op in (Op.READ_OBJ, Op.READ_PEER):
        check_inode(request, response)
    elif again is not None:
        assert again(response.data) == IGNORED.get(op, bytes)(response.data), f"{response.session}:{response.number}"
    else:
        raise AssertionError(f"{response.session}:{response.number}: a body that nobody reads")
    return 1


def test_every_frame():
    """All recorded variants and bodies are understood completely; every operation sent is in the opcode table."""
    checked = Counter()
    for session in session_names():
        for request, response in exchanges(session):
            assert request.opcode == response.opcode
            assert request.opcode in OP_TABLE
            checked["requests"] += check_request(request)
            checked["responses"] += check_response(request, response)

    assert checked["requests"] > 1000
    assert checked["responses"] > 1000


def test_short_bodies():
    """Every recorded body with a structure is refused when its last bytes are missing."""
    refused = 0
    for session in session_names()[::10]:
        for _, response in exchanges(session):
            if response.data and response.opcode in (Op.CLUSTER_INFO, Op.GET_VDI_COPIES, Op.STAT, Op.MD_INFO):
                cut = response.data[:47] if response.opcode == Op.CLUSTER_INFO else response.data[:-1]
                with pytest.raises(p.ProtocolError):
                    RESPONSE_BODY[response.opcode](cut)
                refused += 1

    assert refused > 0
