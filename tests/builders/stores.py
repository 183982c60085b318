"""Store directories as the original writes them, made byte by byte from the format's description.

Nothing here uses Sheepdog's own code, on purpose: a mistake in ``sheepdog.model`` or in a store must not repeat itself
here and so stay unseen. All integers are little-endian; offsets are those of the on-disk format and the data model.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

INODE_BYTES = 12_587_576
LEDGER_BYTES = 4_194_304
ATTRIBUTE_BYTES = 66_320

INODE, VMSTATE, ATTRIBUTE, BTREE, LEDGER = (1 << bit for bit in (63, 62, 61, 60, 59))


def node(port: int, *, address: str = "127.0.0.1", vnodes: int = 128, zone: int = 0, space: int = 0) -> bytes:
    """80 bytes: 24 of zeros, IPv4-mapped address, port, no second address, vnodes, zone, space."""
    record = bytearray(80)
    record[36:40] = bytes(int(part) for part in address.split("."))
    record[40:42] = port.to_bytes(2, "little")
    record[64:66] = vnodes.to_bytes(2, "little")
    record[68:72] = zone.to_bytes(4, "little")
    record[72:80] = space.to_bytes(8, "little")
    return bytes(record)


def node_with_disks(record: bytes, disks: list[tuple[int, int]]) -> bytes:
    """592 bytes, where vnodes belong to disks: the record, then (id, size) of each of at most 32 disks, then zeros."""
    return (record + b"".join(struct.pack("<QQ", *disk) for disk in disks)).ljust(592, b"\0")


def fnv(data: bytes, value: int = 0xCBF29CE484222325) -> int:
    """FNV-1a in 64 bits."""
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % (1 << 64)
    return value


def next_position(value: int) -> int:
    """The fnv of the eight bytes of a hash, begun with itself; also what makes a position of a first hash."""
    return fnv(value.to_bytes(8, "little"), value)


def disk_id(path: str) -> int:
    """What a disk is called in node records."""
    return next_position(fnv(path.encode()))


def disk_positions(port: int, path: str, size: int) -> list[int]:
    """The vnodes of a disk of a node at 127.0.0.1: from the fnv of its id, begun with the hash of the node, one for
    each 4 GiB."""
    at = next_position(fnv(bytes(12) + bytes([127, 0, 0, 1]) + port.to_bytes(2, "little")))
    at = fnv(disk_id(path).to_bytes(8, "little"), at)
    found = []
    for _ in range(-(-size // (4 << 30))):
        at = next_position(at)
        found.append(at)
    return found


def epoch_file(nodes: list[bytes], time: int) -> bytes:
    """The node records, then the time."""
    return b"".join(nodes) + time.to_bytes(8, "little", signed=True)


def config_file(
    *,
    ctime: int,
    flags: int = 0x04,
    copies: int = 1,
    store: str = "plain",
    clean: bool = False,
    policy: int = 0,
    shift: int = 22,
    version: int = 6,
    space: int = 0,
) -> bytes:
    """40 bytes."""
    raw = bytearray(40)
    raw[0:8] = ctime.to_bytes(8, "little")
    raw[8:10] = flags.to_bytes(2, "little")
    raw[10] = copies
    raw[11 : 11 + len(store)] = store.encode("ascii")
    raw[27] = clean
    raw[28] = policy
    raw[29] = shift
    raw[30:32] = version.to_bytes(2, "little")
    raw[32:40] = space.to_bytes(8, "little")
    return bytes(raw)


def inode(
    name: bytes,
    *,
    vid: int,
    size: int,
    tag: bytes = b"",
    create_time: int = 0,
    snap_ctime: int = 0,
    policy: int = 0,
    copies: int = 1,
    shift: int = 22,
    snap_id: int = 1,
    parent: int = 0,
    owners: dict[int, int] | None = None,
    references: dict[int, tuple[int, int]] | None = None,
) -> bytes:
    """12587576 bytes; ``owners`` maps data index to vid, ``references`` data index to (generation, count)."""
    raw = bytearray(INODE_BYTES)
    raw[0 : len(name)] = name
    raw[256 : 256 + len(tag)] = tag
    struct.pack_into("<Q", raw, 512, create_time)
    struct.pack_into("<Q", raw, 520, snap_ctime)
    struct.pack_into("<Q", raw, 536, size)
    raw[552] = policy
    raw[554] = copies
    raw[555] = shift
    struct.pack_into("<III", raw, 556, snap_id, vid, parent)
    for index, owner in (owners or {}).items():
        struct.pack_into("<I", raw, 4664 + 4 * index, owner)
    for index, (generation, count) in (references or {}).items():
        struct.pack_into("<ii", raw, 4_198_968 + 8 * index, generation, count)
    return bytes(raw)


def leaf(entries: dict[int, int]) -> bytes:
    """A B-tree leaf, 4194304 bytes; ``entries`` maps data index to vid."""
    return _btree(1, entries, struct.Struct("<II"))


def inner_root(leaves: dict[int, int]) -> bytes:
    """A B-tree root above leaves; ``leaves`` maps the highest index of each leaf to its oid."""
    return _btree(2, leaves, struct.Struct("<I4xQ"))


def _btree(depth: int, entries: dict[int, int], entry: struct.Struct) -> bytes:
    raw = struct.pack("<HHI", 0x6274, depth, len(entries))
    raw += b"".join(entry.pack(index, value) for index, value in sorted(entries.items()))
    return raw.ljust(1 << 22, b"\0")


def hyper_inode(name: bytes, root: bytes, *, vid: int, size: int, copies: int = 1, counter: int = 0) -> bytes:
    """The inode of a hypervolume; ``counter`` is the number of the next B-tree node."""
    raw = bytearray(inode(name, vid=vid, size=size, copies=copies))
    raw[553] = 1
    struct.pack_into("<I", raw, 568, counter)
    raw[4664 : 4664 + len(root)] = root
    return bytes(raw)


def ledger(*counters: int) -> bytes:
    """The reference ledger of a data object: how many references of each generation there are."""
    return struct.pack(f"<{len(counters)}i", *counters).ljust(LEDGER_BYTES, b"\0")


class StoreBuilder:
    """One sheep's directories.

    :param base: META; made with its sub-directories.
    :param disks: object directories and their recorded weights; META/obj when empty.
    :param tree: files go into ``meta`` and ``00`` to ``ff``.
    """

    def __init__(self, base: Path, disks: dict[Path, int] | None = None, *, tree: bool = False) -> None:
        self.base = base
        self.tree = tree
        for path in (base, base / "epoch", base / "obj"):
            path.mkdir(parents=True, exist_ok=True)
        self.disks = list(disks or {base / "obj": 64 << 30})
        for path, weight in (disks or {base / "obj": 64 << 30}).items():
            path.mkdir(exist_ok=True)
            os.setxattr(path, "user.md.size", weight.to_bytes(8, "little"))
            (path / ".stale").mkdir()
            if tree:
                for name in ["meta", *(f"{number:02x}" for number in range(256))]:
                    (path / name).mkdir()

    def config(self, raw: bytes) -> None:
        """META/config."""
        (self.base / "config").write_bytes(raw)

    def epoch(self, number: int, raw: bytes) -> None:
        """META/epoch/NNNNNNNN."""
        (self.base / "epoch" / f"{number:08d}").write_bytes(raw)

    def place(self, oid: int, *, strip: int | None = None, disk: int = 0) -> Path:
        """Where the live file of an object belongs on a disk."""
        name = f"{oid:016x}" + ("" if strip is None else f"_{strip}")
        if not self.tree:
            return self.disks[disk] / name
        directory = "meta" if oid & (INODE | VMSTATE | ATTRIBUTE) else f"{oid >> 32 & 0xFF:02x}"
        return self.disks[disk] / directory / name

    def put(self, oid: int, data: bytes, *, strip: int | None = None, disk: int = 0) -> None:
        """A live object; zeros at the end of an inode or ledger take no space."""
        with open(self.place(oid, strip=strip, disk=disk), "xb") as file:
            file.write(data.rstrip(b"\0") if oid & (INODE | LEDGER) else data)
            file.truncate(len(data))

    def put_stale(self, oid: int, epoch: int, data: bytes, *, strip: int | None = None, disk: int = 0) -> None:
        """A version set aside at ``epoch``; the area is flat in both layouts."""
        name = f"{oid:016x}" + ("" if strip is None else f"_{strip}") + f".{epoch}"
        (self.disks[disk] / ".stale" / name).write_bytes(data)
