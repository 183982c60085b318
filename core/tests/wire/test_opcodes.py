"""The opcode table."""

import pytest

from sheepdog.wire import opcodes
from sheepdog.wire.opcodes import OP_TABLE, PEER_OP, Flag, Op, OpClass, op_name

UNIMPLEMENTED = {
    Op.SNAPSHOT,
    Op.RESTORE,
    Op.GET_SNAP_FILE,
    Op.FLUSH_NODES,
    Op.FLUSH_PEER,
    Op.GET_CACHE_INFO,
    Op.CACHE_PURGE,
    Op.NFS_CREATE,
    Op.NFS_DELETE,
    Op.PREVENT_INODE_UPDATE,
    Op.ALLOW_INODE_UPDATE,
}


def test_complete():
    """Every named operation is in the table, except those that were never implemented or left the program."""
    assert set(Op) - set(OP_TABLE) == UNIMPLEMENTED


@pytest.mark.parametrize(
    ("op", "op_class", "force", "admin"),
    [
        (Op.READ_OBJ, OpClass.GATEWAY, False, False),
        (Op.DECREF_PEER, OpClass.PEER, False, False),
        (Op.NEW_VDI, OpClass.BLOCK, False, True),
        (Op.GET_VDI_INFO, OpClass.BLOCK, False, False),
        (Op.MAKE_FS, OpClass.NOTIFY, True, True),
        (Op.ENABLE_RECOVER, OpClass.NOTIFY, False, True),
        (Op.FORCE_RECOVER, OpClass.BLOCK, True, True),
        (Op.READ_VDIS, OpClass.LOCAL, True, False),
        (Op.STAT, OpClass.LOCAL, False, False),
        (Op.KILL_NODE, OpClass.LOCAL, True, True),
    ],
)
def test_rows(op, op_class, force, admin):
    """Class, gating and logging are those of the protocol."""
    info = OP_TABLE[op]

    assert (info.op_class, info.force, info.admin) == (op_class, force, admin)
    assert info.clustered is (op_class in (OpClass.BLOCK, OpClass.NOTIFY))


def test_peer_ops():
    """Every gateway operation has a peer operation, and nothing else has."""
    assert set(PEER_OP) == {op for op, info in OP_TABLE.items() if info.op_class is OpClass.GATEWAY}
    assert {OP_TABLE[op].op_class for op in PEER_OP.values()} == {OpClass.PEER}


def test_flags():
    """The flags under both names are the same numbers."""
    named = {name: value for name, value in vars(Flag).items() if name.isupper()}

    assert named == {name: getattr(opcodes, name) for name in named}
    assert named["WRITE"] == 1 and named["DEL"] == 0x400 and len(named) == 12


def test_names():
    """Logs show a name, or the number of what has none."""
    assert op_name(0x02) == "READ_OBJ"
    assert op_name(0xFF) == "0xff"
