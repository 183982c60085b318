"""The vdi commands, for states and answers that no recording has."""

from __future__ import annotations

import struct

import pytest
from clusters import NODES, Answer, Cluster, MiB

from sheepdog.model.btree import BtreeNode
from sheepdog.model.inode import InodeHeader
from sheepdog.model.vdi_state import LockState, Participant, SharedState, VdiState
from sheepdog_cli.dog_commands.vdi_tree import _draw, grow


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("vdi create a", 64, "Please specify the VDI size"),
        ("vdi create -y -z 22 a 1M", 1, "Don't specify both -y and -z options, please"),
        ("vdi create -y a 17P", 64, "VDI size is too large"),
        ("vdi create -z 31 a 17P", 64, "VDI size is too large"),
        ("vdi create -z 22 a -- -1", 64, "VDI size is too large"),
        ("vdi create -z 22 a 4398046511105", 64,
         ("VDI size is larger than 4.0 TB bytes, please use '-y' to create a hyper volume with size up to 16 PB bytes "
          "or use '-z' to create larger object size volume")),
    ],
)  # fmt: skip
def test_create_limits(cluster: Cluster, words: str, code: int, message: str) -> None:
    """Sizes that dog refuses; usage errors show the usage."""
    outcome = cluster.dog(*words.split())

    assert (outcome.code, outcome.stderr) == (code, message + "\n")
    assert outcome.stdout.startswith(b"Usage:" if code == 64 else b"")
    assert 0x11 not in [opcode for opcode, _, _ in cluster.seen]


def test_create_at_the_limits(cluster: Cluster) -> None:
    """Size 0 and the largest sizes are sent."""
    cluster.table[0x11] = lambda header, data: (0, b"", struct.pack("<4xIIBB", 0x4620A7, 0, 1, 22))
    for words in ("-z 22 a 0", "-z 22 a 4T", "-y a 16P", "-z 31 a 2P"):
        assert cluster.dog("vdi", "create", "-v", *words.split()).stdout == b"VDI ID of newly created VDI: 4620a7\n"
    cluster.table[0x11] = lambda header, data: (0x15, b"", b"")
    outcome = cluster.dog("vdi", "create", "-z", "22", "a", "1M")
    assert (outcome.code, outcome.stderr) == (1, "Failed to create VDI a: Server has no space for new objects\n")


def test_list_escapes_names_and_hides_deleted_ones(cluster: Cluster) -> None:
    """Odd names are escaped in raw form, clones are marked, deleted vdis are left out."""
    cluster.add_vdi(
        InodeHeader(name=b"odd \t\\x", vdi_size=8 * MiB, nr_copies=2, block_size_shift=22, snap_id=1, vdi_id=9,
                    parent_vdi_id=4, create_time=1795333818 << 32), {0: 9, 1: 4},
    )  # fmt: skip
    cluster.add_vdi(InodeHeader(name=b"", vdi_id=10))

    assert cluster.dog("vdi", "list", "-r").stdout == (
        b"c odd\\ \\\t\\\\x 0 8388608 4194304 4194304 1795333818 9 2  22\n"
    )
    row = cluster.dog("vdi", "list").stdout.decode().splitlines()[1]
    assert row.startswith("c odd \t\\x      0  8.0 MB  4.0 MB  4.0 MB ")
    assert row.endswith("       9      2                22")
    assert cluster.dog("vdi", "list", "nosuch").stdout.count(b"\n") == 1
    assert cluster.dog("vdi", "list", "-r", "-o", "0000000400000001").stdout.startswith(b"c odd")
    assert cluster.dog("vdi", "list", "-r", "-o", "0000000900000001").stdout == b""
    assert cluster.dog("vdi", "list", "-o", "8000000900000000").code == 1


def test_list_of_a_hypervolume(cluster: Cluster) -> None:
    """Objects of a hypervolume are counted from its B-tree."""
    cluster.add_vdi(
        InodeHeader(name=b"h", vdi_size=5 << 40, nr_copies=1, block_size_shift=22, store_policy=1, snap_id=1, vdi_id=7)
    )
    packed = BtreeNode().put(0, 3, 7, replace=False).put(1, 1 << 21, 7, replace=False).pack()
    cluster.inodes[7][4664 : 4664 + len(packed)] = packed

    assert cluster.dog("vdi", "list", "-r").stdout == b"= h 0 5497558138880 8388608 0 0 7 1  22\n"
    assert cluster.dog("vdi", "object", "map", "h").stdout == b"Index       VID\n00000003        7\n02097152        7\n"


def test_tree_drawing() -> None:
    """The drawing of the specification, branch by branch."""

    def header(vid: int, parent: int, name: bytes = b"db01", snapshot: bool = True) -> InodeHeader:
        return InodeHeader(name=name, vdi_id=vid, parent_vdi_id=parent, snap_ctime=1 << 32 if snapshot else 0)

    headers = [header(1, 0), header(2, 1), header(3, 2), header(4, 2), header(5, 1), header(6, 1, snapshot=False)]
    roots = grow([*headers, header(7, 3, b"clone", snapshot=False)])
    lines: list[str] = []
    _draw(roots[0], " " * 5 + "  ", lines, "db01---", bold=False)
    label = lines[0][7:25]

    assert len(roots) == 2
    assert lines == [
        f"db01---{label}-+-{label}-+-{label}",
        f"                          |                    `-{label}",
        f"                          |-{label}",
        "                          `-(you are here)",
    ]


def test_locks(cluster: Cluster) -> None:
    """Exclusive and shared locks with their owners; unlocking says what is not locked."""
    cluster.add_vdi(InodeHeader(name=b"lun0", nr_copies=1, block_size_shift=22, vdi_id=0x3F20C1))
    cluster.add_vdi(
        InodeHeader(
            name=b"lun1", tag=b"nightly", snap_ctime=1, snap_id=1, nr_copies=1, block_size_shift=22, vdi_id=0x7711E
        )
    )
    cluster.add_vdi(InodeHeader(name=b"free", nr_copies=1, block_size_shift=22, vdi_id=0x7711F))
    states = [
        VdiState(0x3F20C1, lock_state=LockState.LOCKED, owner=NODES[0].id),
        VdiState(
            0x7711E,
            lock_state=LockState.SHARED,
            participants=(
                Participant(NODES[0].id, SharedState.SHARED),
                Participant(NODES[2].id, SharedState.MODIFIED),
            ),
        ),
    ]
    cluster.table[0xAB] = lambda header, data: (0, b"".join(state.pack() for state in states), b"")
    cluster.table[0x13] = lambda header, data: (0, b"", b"")

    assert cluster.dog("vdi", "lock", "list").stdout.decode() == (
        "  Name         Id  VDI id  Tag            Owner node(s)\n"
        "s lun1          1   7711e  nightly        IPv4 ip:10.0.0.4 port:7000(shared) "
        "IPv6 ip:2001:db8::9 port:7000(modified)\n"
        "  lun0          0  3f20c1                 IPv4 ip:10.0.0.4 port:7000\n"
    )
    assert cluster.dog("vdi", "lock", "unlock", "lun1", "-s", "nightly").code == 0
    release = cluster.seen[-1][1]
    assert (release[1], release[24:28], release[36]) == (0x13, (0x7711E).to_bytes(4, "little"), 1)
    refused = cluster.dog("vdi", "lock", "unlock", "free")
    assert (refused.code, refused.stderr) == (1, "VDI free (vid=7711f) is not locked\n")
    missing = cluster.dog("vdi", "lock", "unlock", "no", "-s", "t")
    assert (missing.code, missing.stderr) == (1, "Failed to find VDI no (tag=t): Failed to find requested tag\n")


@pytest.mark.parametrize(
    ("result", "words", "code", "message"),
    [
        (0x04, ["setattr", "-x", "a", "k", "v"], 3, "The attribute 'k' already exists"),
        (0x02, ["setattr", "-d", "a", "k"], 5, "Attribute 'k' not found"),
        (0x08, ["setattr", "a", "k", "v"], 5, "VDI not found"),
        (0x19, ["setattr", "a", "k", "v"], 1,
         "Failed to set attribute: IO has halted as there are not enough living nodes"),
        (0x02, ["getattr", "a", "k"], 5, "Attribute 'k' not found"),
        (0x08, ["getattr", "a", "k"], 5, "VDI not found"),
    ],
)  # fmt: skip
def test_attribute_refusals(cluster: Cluster, result: int, words: list[str], code: int, message: str) -> None:
    """Each refusal of an attribute request has its words and exit code."""
    cluster.table[0x89] = lambda header, data: (result, b"", b"")
    outcome = cluster.dog("vdi", *words)

    assert (outcome.code, outcome.stderr) == (code, message + "\n")


def test_attribute_from_stdin(cluster: Cluster) -> None:
    """Without a value it is read from stdin, NULs included."""
    cluster.table[0x89] = lambda header, data: (0, b"", b"")
    assert cluster.dog("vdi", "setattr", "a", "k", stdin=b"x\0y").code == 0

    body = cluster.seen[-1][2]
    assert len(body) == 66320
    assert int.from_bytes(body[524:528], "little") == 3 and body[784:787] == b"x\0y"


def volume(cluster: Cluster, **fields: object) -> None:
    cluster.add_vdi(
        InodeHeader(name=b"a", vdi_size=6 * MiB, nr_copies=1, block_size_shift=22, snap_id=2, vdi_id=9, **fields)  # type: ignore[arg-type]
    )


def test_read_and_write_at_the_end(cluster: Cluster) -> None:
    """An offset equal to the size is nothing; one behind it is an error; lengths are cut."""
    volume(cluster)

    assert cluster.dog("vdi", "read", "a", "6M").stdout == b""
    assert len(cluster.dog("vdi", "read", "a", "6291400", "1M").stdout) == 56
    beyond = cluster.dog("vdi", "read", "a", "6291457")
    assert (beyond.code, beyond.stderr) == (1, "Read offset is beyond the end of the VDI\n")
    written = cluster.dog("vdi", "write", "a", "6291457", stdin=b"x")
    assert (written.code, written.stderr) == (1, "Write offset is beyond the end of the VDI\n")


def test_short_write_is_padded(cluster: Cluster) -> None:
    """The piece in which stdin ends is filled with zeros to the end of its object, or to the length."""
    volume(cluster)
    cluster.table[0x01] = cluster.table[0x03] = lambda header, data: (0, b"", b"")
    cluster.dog("vdi", "write", "a", "4M", stdin=b"abc")
    cluster.dog("vdi", "write", "a", "0", "10", stdin=b"abc")
    cluster.dog("vdi", "write", "a", "0", "4M", stdin=b"")

    bodies = [data for opcode, _, data in cluster.seen if opcode == 0x01]
    assert bodies == [b"abc" + bytes(2 * MiB - 3), b"abc" + bytes(7)]


@pytest.mark.parametrize(("owner", "padding"), [(0, 0), (9, 2), (4, 2)])
def test_write_to_large_objects(cluster: Cluster, owner: int, padding: int) -> None:
    """Objects above 4 MiB are written in parts; behind the end of stdin only what was there before is overwritten."""
    header = InodeHeader(name=b"big", vdi_size=64 * MiB, nr_copies=1, block_size_shift=24, snap_id=1, vdi_id=9)
    cluster.add_vdi(header, {0: owner})
    cluster.table[0x01] = cluster.table[0x03] = lambda header, data: (0, b"", b"")
    outcome = cluster.dog("vdi", "write", "big", stdin=b"x" * (5 * MiB))

    written = [(int.from_bytes(head[40:44], "little"), data) for _, head, data in cluster.seen if len(data) > 512]
    assert outcome.code == 0
    assert written[:2] == [(0, b"x" * (4 * MiB)), (4 * MiB, b"x" * MiB + bytes(3 * MiB))]
    assert written[2:] == [(at * 4 * MiB, bytes(4 * MiB)) for at in (2, 3)][:padding]


def test_unreadable_object(cluster: Cluster) -> None:
    """The object is named, then the command's own line."""
    volume(cluster)
    cluster.inodes[9][4664] = 9
    outcome = cluster.dog("vdi", "read", "a")

    assert outcome.code == 1
    assert outcome.stderr == "Failed to read object 0000000900000000 No object found\nFailed to read VDI\n"


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("1M", "Shrinking VDIs is not implemented"),
        ("5T", "New VDI size is too large. This volume's max size is 4398046511104"),
    ],
)
def test_resize_limits(cluster: Cluster, size: str, message: str) -> None:
    """A vdi only grows, up to its limit."""
    volume(cluster)
    outcome = cluster.dog("vdi", "resize", "a", size)

    assert (outcome.code, outcome.stderr) == (64, message + "\n")
    assert outcome.stdout.startswith(b"Usage: dog vdi resize")


def test_snapshot_of_hypervolume(cluster: Cluster) -> None:
    """Snapshots of hypervolumes are refused."""
    volume(cluster, store_policy=1)
    outcome = cluster.dog("vdi", "snapshot", "a", "-s", "t")

    assert (outcome.code, outcome.stderr) == (1, "creating a snapshot of hypervolume is not supported\n")


def test_reduced_snapshot(cluster: Cluster) -> None:
    """-R makes no snapshot of a vdi without objects of its own."""
    volume(cluster, parent_vdi_id=4)
    cluster.inodes[9][4664] = 4
    outcome = cluster.dog("vdi", "snapshot", "a", "-s", "t", "-R", "-v")

    assert (outcome.code, outcome.stdout) == (0, b"")
    assert outcome.stderr == "VDI a doesn't have its own objects, skipping creation of snapshot\n"
    assert 0x11 not in [opcode for opcode, _, _ in cluster.seen]


def test_alter_copy_steps(cluster: Cluster) -> None:
    """Each reason against another number of copies has its words; nothing is changed then."""
    volume(cluster)
    same = cluster.dog("vdi", "alter-copy", "-c", "1", "a")
    erasure = cluster.dog("vdi", "alter-copy", "-c", "2:1", "a")
    many = cluster.dog("vdi", "alter-copy", "-c", "4", "a", stdin=b"no\n")
    missing = cluster.dog("vdi", "alter-copy", "nosuch")
    cluster.add_vdi(InodeHeader(name=b"b", vdi_id=11, parent_vdi_id=9, nr_copies=1, block_size_shift=22))
    clones = cluster.dog("vdi", "alter-copy", "-c", "2", "a")

    assert same.stderr == "a's redundancy level is already set to 1, nothing changed.\n" and same.code == 1
    assert erasure.code == 64
    assert many.stdout.startswith(b"Number of copies (4) is larger than number of nodes (3).\nAre you sure")
    assert missing.stdout == b"The vdi's redundancy level is not specified, use 3 as default.\n"
    assert missing.stderr.endswith("No VDI found\nReading nosuch's vdi object failure.\n")
    assert clones.stderr == (
        "Only standalone vdi supports changing redundancy level.\nPlease clone a with -n (--no-share) option first.\n"
    )
    assert not {0x03, 0xC0} & {opcode for opcode, _, _ in cluster.seen}


@pytest.mark.parametrize(
    ("stream", "code", "message"),
    [
        (b"", 2, "The backup file is corrupted"),
        (b"\1\0\0\0\x92\x11\x92\x12", 2, "The backup file is corrupted"),
        (b"\2\0\0\0\x92\x11\x92\x11", 2, "The backup file is corrupted"),
    ],
)
def test_restore_looks_at_the_stream_first(cluster: Cluster, stream: bytes, code: int, message: str) -> None:
    """A bad stream changes nothing."""
    volume(cluster)
    cluster.add_vdi(InodeHeader(name=b"a", tag=b"t", snap_ctime=1, nr_copies=1, block_size_shift=22, vdi_id=8))
    outcome = cluster.dog("vdi", "restore", "a", "-s", "t", stdin=stream)

    assert (outcome.code, outcome.stderr) == (code, message + "\n")
    assert not {0x03, 0x11, 0x17} & {opcode for opcode, _, _ in cluster.seen}


def test_restore_onto_an_unknown_snapshot(cluster: Cluster) -> None:
    """The snapshot is looked for before the stream is read, as the original does."""
    volume(cluster)
    outcome = cluster.dog("vdi", "restore", "a", "-s", "t")

    assert (outcome.code, outcome.stdout) == (1, b"")
    assert outcome.stderr == (
        "Failed to open VDI a (snapshot id: 0 snapshot tag: t): Failed to find requested tag\n"
        "Snapshot ID 0 or tag t doesn't exist\n"
    )


def test_columns_are_counted_in_bytes(cluster: Cluster) -> None:
    """printf pads bytes, not letters, and scripts cut columns where it puts them."""
    cluster.add_vdi(
        InodeHeader(name="bär".encode(), tag="über".encode(), snap_ctime=1, snap_id=1, nr_copies=1,
                    block_size_shift=22, vdi_id=9)
    )  # fmt: skip
    cluster.table[0xAB] = lambda header, data: (
        0, VdiState(9, lock_state=LockState.LOCKED, owner=NODES[0].id).pack(), b"",
    )  # fmt: skip

    row = cluster.dog("vdi", "list").stdout.splitlines()[1]
    assert row.startswith("s bär         1".encode()) and row.endswith("      1         über  22".encode())
    assert 'label = "Name:       bär\\nTag: '.encode() in cluster.dog("vdi", "graph").stdout
    assert cluster.dog("vdi", "lock", "list").stdout.splitlines()[1] == (
        "s bär          1       9  über          IPv4 ip:10.0.0.4 port:7000".encode()
    )


def test_rollback_without_a_working_vdi(cluster: Cluster) -> None:
    """A rollback that was interrupted between its two steps can be repeated, without a word on the missing state."""
    cluster.add_vdi(
        InodeHeader(name=b"a", tag=b"t", snap_ctime=1, snap_id=1, nr_copies=1, block_size_shift=22, vdi_id=8)
    )
    cluster.table[0x11] = lambda header, data: (0, b"", struct.pack("<4xIIBB", 10, 0, 1, 22))
    outcome = cluster.dog("vdi", "rollback", "-f", "-v", "-r", "-s", "t", "a")

    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, b"a\n", "")


def test_refused_alter_copy_changes_nothing(cluster: Cluster) -> None:
    """When the sheep refuse another number of copies the inode says the old one again."""
    volume(cluster)
    written: list[int] = []

    def write(header: bytes, data: bytes) -> Answer:
        written.append(data[554])
        return 0, b"", b""

    cluster.table |= {0x03: write, 0xC0: lambda header, data: (0x19, b"", b"")}
    outcome = cluster.dog("vdi", "alter-copy", "-f", "-c", "2", "a")

    assert (outcome.code, written) == (1, [2, 1])
    assert outcome.stderr == (
        "IO has halted as there are not enough living nodes\nChanging a's redundancy level failure.\n"
    )


def test_restore_of_a_cut_stream(cluster: Cluster) -> None:
    """When the stream ends early the working vdi is put back, and dog says what was wrong."""
    volume(cluster)
    cluster.inodes[9][4664] = 9
    cluster.add_vdi(
        InodeHeader(
            name=b"a", tag=b"t", snap_ctime=1, vdi_size=6 * MiB, nr_copies=1, block_size_shift=22, snap_id=1, vdi_id=8
        )
    )
    made: list[bytes] = []

    def new_vdi(header: bytes, data: bytes) -> Answer:
        made.append(header[24:28] + header[32:33])
        return 0, b"", struct.pack("<4xIIBB", 20 + len(made), 0, 1, 22)

    cluster.table |= {
        0x11: new_vdi,
        0x03: lambda header, data: (0, b"", b""),
        0x17: lambda header, data: (0, b"", b""),
    }
    stream = b"\1\0\0\0\x92\x11\x92\x11" + struct.pack("<IIII", 0, 0, 512, 0) + b"short"
    outcome = cluster.dog("vdi", "restore", "a", "-s", "t", stdin=stream)

    assert (outcome.code, outcome.stderr) == (2, "failed to read backup data\n")
    # On top of the snapshot beside the changed working vdi, then the name goes on from that one.
    assert made == [b"\x08\0\0\0\x01", b"\x09\0\0\0\0"]
    assert 0x17 in [opcode for opcode, _, _ in cluster.seen]
