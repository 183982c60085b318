"""Commands that work on files: inode dumps, upgrades."""

from __future__ import annotations

import struct

from clusters import NODES, MiB
from replay import run_dog

from sheepdog.model.inode import INODE_BYTES, InodeHeader
from sheepdog.model.node import pack_nodes


def test_dump_inode(tmp_path) -> None:
    """An inode file in words, allocated entries with their references."""
    content = bytearray(INODE_BYTES)
    content[:4664] = InodeHeader(
        name=b"a",
        tag=b"t",
        create_time=0x10,
        vdi_size=8 * MiB,
        nr_copies=3,
        block_size_shift=22,
        snap_id=1,
        vdi_id=0xAB,
    ).pack()
    content[4664 + 4 : 4668 + 4] = (0xAB).to_bytes(4, "little")
    content[4198968 + 8 : 4198976 + 8] = struct.pack("<ii", 1, -2)
    path = tmp_path / "inode"
    path.write_bytes(content)
    outcome = run_dog(["vdi", "object", "dump-inode", str(path)])

    assert outcome.stdout.decode() == (
        "name: a\ntag: t\ncreate_time: 10\nsnap_ctime: 0\nvm_clock_nsec: 0\nvdi_size: 8388608\nvm_state_size: 0\n"
        "copy_policy: 0\nstore_policy: 0\nnr_copies: 3\nblock_size_shift: 22\nsnap_id: 1\nvdi_id: ab\n"
        "parent_vdi_id: 0\nbtree_counter: 0\ndata_vdi_id:\n1: ab\ngref:\n1: ab, 1, -2\n"
    )
    missing = run_dog(["vdi", "object", "dump-inode", str(tmp_path / "none")])
    assert (missing.code, missing.stderr) == (1, "failed to open inode object file: No such file or directory\n")
    path.write_bytes(content[:100])
    short = run_dog(["vdi", "object", "dump-inode", str(path)])
    assert short.code == 1 and short.stderr.startswith("failed to read inode object file: ")


def test_upgrade_config(tmp_path) -> None:
    """Configurations of layout 2 and 4 become layout 6."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(bytes(28) + b"\x11\0" + b"\4\0" + bytes(8))
    assert run_dog(["upgrade", "config-convert", str(old), str(new)]).code == 0
    assert new.read_bytes()[28:32] == b"\x11\x16\6\0"

    old.write_bytes(bytes(30) + b"\5\0" + bytes(8))
    refused = run_dog(["upgrade", "config-convert", str(old), str(new)])
    assert (refused.code, refused.stderr) == (64, "unknown version config file: 5\n")
    old.write_bytes(bytes(39))
    assert run_dog(["upgrade", "config-convert", str(old), str(new)]).stderr == (
        "original config file has invalid size: 39\n"
    )


def test_upgrade_epoch_and_location(tmp_path) -> None:
    """An epoch file in either record size; the first holder of an object."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_bytes(b"".join(node.pack()[24:] for node in NODES[:2]) + bytes(8))
    missing = run_dog(["upgrade", "epoch-convert", str(old), str(new)])
    assert (missing.code, missing.stderr) == (64, "please specify original version of epoch file\n")
    outcome = run_dog(["upgrade", "epoch-convert", "-o", "v0.7", str(old), str(new)])

    assert outcome.stderr == (
        "number of vnodes of each nodes:\n\tIPv4 ip:10.0.0.4 port:7000 == 128\n\tIPv4 ip:10.0.0.5 port:7000 == 131\n"
        "please supply the above numbers to sheeps with -V option\n"
    )
    assert new.read_bytes() == pack_nodes(NODES[:2]) + bytes(8)
    located = run_dog(["upgrade", "object-location", str(new), "80abcdef00000000"])
    assert located.code == 0 and located.stderr.startswith("IPv4 ip:10.0.0.")
    assert run_dog(["upgrade", "object-location", str(new), "xyz"]).code == 64
    assert run_dog(["upgrade", "object-location", str(old), "1"]).code == 2


def test_upgrade_inode(tmp_path) -> None:
    """An inode of 0.8: map kept, counter moved, references empty; snapshots are refused."""
    old, new = tmp_path / "old", tmp_path / "new"
    content = bytearray(4198972)
    content[:4664] = InodeHeader(name=b"a", vdi_id=7, nr_copies=2, block_size_shift=22).pack()
    content[572:576] = b"kids"
    content[4664:4668] = b"\7\0\0\0"
    content[4198968:4198972] = b"\5\0\0\0"
    old.write_bytes(content)
    assert run_dog(["upgrade", "inode-convert", "-o", "v0.8", str(old), str(new)]).code == 0

    made = new.read_bytes()
    assert len(made) == INODE_BYTES
    assert InodeHeader.unpack(made).btree_counter == 5
    assert made[572:576] == bytes(4) and made[4664:4668] == b"\7\0\0\0" and not any(made[4198968:])
    content[520] = 1
    old.write_bytes(content)
    refused = run_dog(["upgrade", "inode-convert", "-o", "v0.8", str(old), str(new)])
    assert (refused.code, refused.stderr) == (64, "snapshot cannot be converted\n")
