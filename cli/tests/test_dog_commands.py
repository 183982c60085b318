"""What dog prints and how it ends for answers that no recording has: refusals, prompts, nodes, the cluster."""

from __future__ import annotations

import io
import json
import struct
import sys
import types
from dataclasses import replace

import pytest
from clusters import NODES, Answer, Cluster, MiB
from replay import Answers, Died, run_dog

from sheepdog.model.clusterinfo import ClusterFlag, ClusterInfo
from sheepdog.model.epochs import EpochLogEntry, pack_epoch_log
from sheepdog.model.inode import InodeHeader
from sheepdog.model.node import NodeDisk, VnodeMode, pack_nodes
from sheepdog.model.vid_bitmap import VidBitmap
from sheepdog_cli.output import Progress

WAIT_FOR_FORMAT = 0x16
WAITING = "Waiting for cluster to be formatted"


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


def unformatted() -> Cluster:
    made = Cluster(WAIT_FOR_FORMAT, NODES[:2])
    bitmap = VidBitmap().pack()
    made.table |= {
        0x15: lambda header, data: (0, bitmap, b""),
        0xC9: lambda header, data: (0, bitmap, b""),
        0x87: lambda header, data: (WAIT_FOR_FORMAT, b"", b""),
        0xAB: lambda header, data: (0, b"", b""),
        0xBE: lambda header, data: (0, ClusterInfo().pack(), b""),
    }
    return made


OPEN_A = f"Failed to open VDI a (snapshot id: 0 snapshot tag: ): {WAITING}\n"
OPEN_T = f"Failed to open VDI a (snapshot id: 0 snapshot tag: t): {WAITING}\n"


@pytest.mark.parametrize(
    ("words", "code", "stderr"),
    [
        ("vdi list", 0, ""),
        ("vdi tree", 0, ""),
        ("vdi graph", 0, ""),
        ("vdi lock list", 0, ""),
        ("cluster check", 0, ""),
        ("cluster info", 0, ""),
        ("node list", 0, ""),
        ("node info", 2, f"Response's result: {WAITING}\n" * 2 + "Cannot get information from any nodes\n"),
        ("node recovery", 1, WAITING + "\n"),
        ("node md info", 1, f"failed to get multi-disk information: {WAITING}\n"),
        ("node stat", 1, f"failed to get stat information: {WAITING}\n"),
        ("vdi create a 4M", 1, f"Failed to create VDI a: {WAITING}\n"),
        ("vdi create -z 22 a 4M", 1, f"Failed to create VDI a: {WAITING}\n"),
        ("vdi snapshot a -s t", 1, f"Failed to create snapshot for a: {WAITING}\n"),
        ("vdi read a", 1, OPEN_A),
        ("vdi write a", 1, OPEN_A),
        ("vdi resize a 1M", 1, OPEN_A),
        ("vdi clone -s t a b", 1, OPEN_T),
        ("vdi rollback -s t a", 1, OPEN_T),
        ("vdi setattr a k v", 1, f"Failed to set attribute: {WAITING}\n"),
        ("vdi getattr a k", 5, f"Failed to find attribute oid: {WAITING}\n"),
        ("cluster reweight", 1, f"Response's result: {WAITING}\n"),
        ("cluster recover enable", 1, f"Response's result: {WAITING}\n"),
        ("cluster alter-copy -c 2", 1, f"Response's result: {WAITING}\n"),
    ],
)
def test_unformatted(words: str, code: int, stderr: str) -> None:
    """Every command on a cluster that was never formatted."""
    outcome = unformatted().dog(*words.split())

    assert (outcome.stderr, outcome.code) == (stderr, code)


def test_status_of_an_unformatted_cluster() -> None:
    """The status stands on stdout; with -v also in place of the store."""
    plain, verbose = unformatted().dog("cluster", "info"), unformatted().dog("cluster", "info", "-v")

    assert plain.stdout.decode() == f"Cluster status: {WAITING}\n\n"
    assert verbose.stdout.decode() == (
        f"Cluster status: {WAITING}\nCluster store: {WAITING}\nCluster vnode mode: node\n"
    )


@pytest.mark.parametrize(
    "words", ["node list", "vdi read a", "vdi list", "cluster shutdown", "node stat", "vdi create a 1M"]
)
def test_sheep_that_dies(words: str) -> None:
    """When the sheep dies while it answers, dog says so and ends with an error; it never hangs."""

    def die(opcode: int, header: bytes, data: bytes) -> Answer:
        raise Died

    outcome = run_dog(words.split(), connect=Answers(die).connect)

    assert outcome.stderr.startswith("failed to read a response\n")
    assert outcome.code != 0


# --- questions ---


@pytest.mark.parametrize("answer", [b"yes\n", b"YES\n", b"yes please\n", b"Yes"])
def test_yes(cluster: Cluster, answer: bytes) -> None:
    """What begins with yes, in any case, goes ahead."""
    cluster.table[0x8A] = lambda header, data: (0, b"", b"")

    assert cluster.dog("cluster", "recover", "force", stdin=answer).code == 0
    assert [opcode for opcode, _, _ in cluster.seen] == [0x8A]


@pytest.mark.parametrize("answer", [b"y\n", b"no\n", b"\n", b"", b" yes\n", b"\xff\xfe\n"])
def test_no(cluster: Cluster, answer: bytes) -> None:
    """Everything else ends with 0, does nothing and says nothing more."""
    outcome = cluster.dog("cluster", "recover", "force", stdin=answer)

    assert (outcome.code, outcome.stderr) == (0, "")
    assert outcome.stdout.endswith(b"Are you sure you want to continue? [yes/no]: ")
    assert cluster.seen == []


@pytest.mark.parametrize(
    ("words", "sentences"),
    [
        ("node md plug /x", ["Caution! The directories to be plugged will be purged."]),
        ("node md unplug /x", ["Caution! Recovery will be triggered after unplugging."]),
    ],
)
def test_banner(cluster: Cluster, words: str, sentences: list[str]) -> None:
    """Five lines: a drawing at the left, the sentence on the fourth, the question on the fifth."""
    outcome = cluster.dog(*words.split(), stdin=b"no\n")

    lines = outcome.stdout.decode().split("\n")
    assert (len(lines), outcome.code, cluster.seen) == (5, 0, [])
    assert lines[3][9:] == sentences[0]
    assert lines[4][9:] == "Are you sure you want to continue? [yes/no]: "


def test_format_asks_about_copies_and_content(cluster: Cluster) -> None:
    """More copies than zones is asked about, also with -f; existing vdis only without."""
    cluster.table[0xBE] = lambda header, data: (0, ClusterInfo(flags=4).pack(), b"")  # type: ignore[arg-type]
    cluster.table[0x15] = lambda header, data: (0, VidBitmap([5]).pack(), b"")
    cluster.table[0x84] = lambda header, data: (0, b"", b"")
    question = b"Number of copies (3) is larger than number of zones (2).\n"
    question += b"Are you sure you want to continue? [yes/no]: "
    words = ["cluster", "format", "-f", "-c", "3"]

    assert cluster.dog(*words, stdin=b"no\n").stdout == question
    assert cluster.dog(*words, stdin=b"yes\n").stdout == question + b"using backend plain store\n"
    declined = cluster.dog("cluster", "format", stdin=b"no\n")
    assert b"Caution! The cluster is not empty." in declined.stdout and declined.code == 0
    assert [opcode for opcode, _, _ in cluster.seen].count(0x84) == 1


def test_vnodes_of_disks() -> None:
    """Against sheep whose vnodes belong to disks dog formats with that flag, and tells the disks of each node."""
    disks = (NodeDisk(1, 1 << 40), NodeDisk(2, 1 << 40))
    nodes = tuple(replace(node, disks=disks[: 2 - at]) for at, node in enumerate(NODES))
    cluster = Cluster()
    body = pack_nodes(nodes, VnodeMode.DISK)
    cluster.table[0x82] = lambda header, data: (0, body, len(nodes).to_bytes(4, "little"))
    info = ClusterInfo(flags=ClusterFlag.AUTO_VNODES | ClusterFlag.DISK_MODE, nodes=nodes)
    cluster.table[0xBE] = lambda header, data: (0, info.pack(), b"")  # type: ignore[arg-type]
    cluster.table[0x15] = lambda header, data: (0, VidBitmap().pack(), b"")
    cluster.table[0x84] = lambda header, data: (0, b"", b"")
    assert cluster.dog("cluster", "format", "-c", "1").code == 0
    request = next(header for opcode, header, _ in cluster.seen if opcode == 0x84)
    assert int.from_bytes(request[34:36], "little") == 0x04 | 0x02

    entries = [
        EpochLogEntry(200, 2, nodes, ctime=5 << 32, copies=1, flags=info.flags, store="plain"),
        EpochLogEntry(100, 1, nodes[1:]),
    ]

    def log(header: bytes, data: bytes) -> tuple[int, bytes, bytes]:
        slots, room = int.from_bytes(header[40:44], "little"), int.from_bytes(header[12:16], "little")
        return 0, pack_epoch_log(entries, slots or 3, VnodeMode.DISK)[:room], b""

    cluster.table[0x87] = log
    cluster.sheep.epoch = 2
    assert cluster.dog("cluster", "info", "-r").stdout.decode().splitlines()[2:] == [
        "200 2 [10.0.0.4:7000:128(2), 10.0.0.5:7000:131(1), [2001:db8::9]:7000:0(0)]",
        "100 1 [10.0.0.5:7000:131(1), [2001:db8::9]:7000:0(0)]",
    ]
    assert cluster.dog("cluster", "info", "-v").stdout.decode().splitlines()[3] == "Cluster vnode mode: disk"
    assert cluster.dog("cluster", "info", "-r", "-d").stdout.decode().splitlines()[2:] == [
        "200 2 [+10.0.0.4:7000]",
        "100 1 [formated]",
    ]
    told = json.loads(cluster.dog("cluster", "info", "--json").stdout)
    assert (told["vnode_mode"], [node["disks"] for node in told["epochs"][0]["nodes"]]) == ("disk", [2, 1, 0])
    assert [node["disks"] for node in json.loads(cluster.dog("node", "list", "--json").stdout)] == [2, 1, 0]


def test_format_with_unknown_store(cluster: Cluster) -> None:
    """An unknown store lists those that the sheep has."""
    cluster.table[0xBE] = lambda header, data: (0, ClusterInfo(flags=4).pack(), b"")  # type: ignore[arg-type]
    cluster.table[0x15] = lambda header, data: (0, VidBitmap().pack(), b"")
    cluster.table[0x84] = lambda header, data: (0x8A, b"", b"")
    cluster.table[0x90] = lambda header, data: (0, b"tree plain \0", b"")
    outcome = cluster.dog("cluster", "format", "-b", "nosuch", "-t", "-l", "-R", "-F")

    assert outcome.code == 2
    assert outcome.stderr == "Format failed: Targeted backend store is not found\n"
    assert outcome.stdout.decode() == f"using backend nosuch store\nAvailable stores:\n{'-' * 39}\ntree plain \n"
    request = next(header for opcode, header, _ in cluster.seen if opcode == 0x84)
    assert int.from_bytes(request[34:36], "little") == 0x01 | 0x04 | 0x08 | 0x10 | 0x20


def test_format_with_other_vnodes(cluster: Cluster) -> None:
    """-V and the sheep must agree; gateways do not count."""
    cluster.table[0xBE] = lambda header, data: (0, ClusterInfo(flags=4).pack(), b"")  # type: ignore[arg-type]
    outcome = cluster.dog("cluster", "format", "-V")

    assert outcome.code == 1
    assert outcome.stderr == (
        "Can not apply the option of '-V', because there are vnode strategy of sheep is auto in the cluster\n"
    )


# --- nodes ---


def test_node_list(cluster: Cluster) -> None:
    """The table of the specification, with an IPv6 node; raw form and JSON."""
    assert cluster.dog("node", "list").stdout.decode() == (
        "  Id   Host:Port         V-Nodes       Zone\n"
        "   0   10.0.0.4:7000       \t128   67108874\n"
        "   1   10.0.0.5:7000       \t131   83886090\n"
        "   2   [2001:db8::9]:7000  \t 0  150994954\n"
    )
    assert cluster.dog("node", "list", "-r").stdout.decode().splitlines()[2] == "2 [2001:db8::9]:7000 0 150994954"
    assert b'"host": "2001:db8::9"' in cluster.dog("node", "list", "--json").stdout


def test_node_info_skips_silent_nodes() -> None:
    """A node that does not answer is skipped and later ids move up; an empty one shows 0 %."""
    cluster = Cluster(nodes=NODES)
    answers = iter([(0x8D, b"", b""), (0, b"", struct.pack("<12xQQ", 100 * MiB, 40 * MiB)), (0, b"", bytes(28))])
    cluster.table[0x86] = lambda header, data: next(answers)
    cluster.add_vdi(InodeHeader(name=b"a", vdi_size=3 * MiB, nr_copies=1, block_size_shift=22, vdi_id=5))
    outcome = cluster.dog("node", "info")

    assert outcome.stderr == "Response's result: Node is killed\n"
    assert outcome.stdout.decode() == (
        "Id\tSize\tUsed\tAvail\tUse%\n"
        " 0\t100 MB\t60 MB\t40 MB\t 60%\n"
        " 1\t0.0 MB\t0.0 MB\t0.0 MB\t  0%\n"
        "Total\t100 MB\t60 MB\t40 MB\t 60%\n\nTotal virtual image size\t3.0 MB\n"
    )


def test_node_recovery(cluster: Cluster) -> None:
    """Only nodes in recovery are listed, with their place in the whole list."""
    answers = iter([struct.pack("<B3xIQQ", 0, 0, 0, 0), struct.pack("<B3xIQQ", 1, 1, 417, 1000), bytes(24)] * 2)
    cluster.table[0x97] = lambda header, data: (0, next(answers), b"")

    assert cluster.dog("node", "recovery").stdout.decode() == (
        "Nodes In Recovery:\n"
        "  Id   Host:Port         V-Nodes       Zone       Progress\n"
        "   1   10.0.0.5:7000         131   83886090       41.7%\n"
    )
    assert cluster.dog("node", "recovery", "info", "-r").stdout == b"1 10.0.0.5:7000 131 83886090 417 1000\n"


def test_node_stat(cluster: Cluster) -> None:
    """Writes stand under Write and reads under Read, unlike in the original."""
    numbers = [0, 0, 192, 39, 142 * MiB, 204 * MiB, 54 * MiB, 0, 3, 133, 56, 1, 2, 0, 37]
    cluster.table[0xB8] = lambda header, data: (0, struct.pack("<15Q", *numbers), b"")

    assert cluster.dog("node", "stat").stdout.decode() == (
        "Request\tActive\tTotal\tWrite\tRead\tRemove\tFlush\tAll WR\tAll RD\n"
        "Client\t0\t192\t56\t133\t3\t1\t142 MB\t204 MB\n"
        "Peer\t0\t39\t37\t0\t2\t0\t54 MB\t0.0 MB\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "please specify -l option or node id"),
        (["x"], "Invalid node id 'x', please specify a numeric value"),
        (["3"], "Invalid node id '3'"),
        (["-l", "1"], "don't use -l option and specify node id at the same time"),
    ],
)
def test_node_kill_usage(cluster: Cluster, words: list[str], message: str) -> None:
    """Wrong ids, without usage block, and nobody is killed."""
    outcome = cluster.dog("node", "kill", *words)

    assert (outcome.code, outcome.stderr, outcome.stdout) == (64, message + "\n", b"")
    assert 0x9A not in [opcode for opcode, _, _ in cluster.seen]


def test_node_format(tmp_path) -> None:
    """The file has 16 bytes; it is never overwritten."""
    made = run_dog(["node", "format", str(tmp_path), "tree"])
    again = run_dog(["node", "format", str(tmp_path), "plain"])
    unknown = run_dog(["node", "format", str(tmp_path), "tar"])

    assert (made.code, (tmp_path / "node_config").read_bytes()) == (0, b"tree".ljust(16, b"\0"))
    assert (again.code, again.stderr) == (2, f"config file already exists: {tmp_path}/node_config\n")
    assert (unknown.code, unknown.stderr) == (2, "expected store format: plain, tree\n")


# --- output ---


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar as wide as the screen minus thirty, percentage before, sizes behind; newline at the end."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", Terminal())
    progress = Progress(40 * MiB)
    progress.advance(10 * MiB)
    progress.advance(30 * MiB)

    shown = sys.stdout.getvalue().split("\r")
    assert shown[1] == (" 25.0 % [" + "=" * 12 + ">" + " " * 37 + "] 10 MB / 40 MB").ljust(80)
    assert shown[2] == ("100.0 % [" + "=" * 50 + "] 40 MB / 40 MB").ljust(80) + "\n"


def test_no_progress_bar_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written where nobody looks."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    Progress(10).advance(10)

    assert sys.stdout.getvalue() == ""


def test_progress_of_data_on_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar stands on stderr then; nowhere when the data itself is on the terminal. A line that was begun ends."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = Progress(10 * MiB, data_on_stdout=True)
    progress.advance(5 * MiB)
    progress.end()
    progress.end()

    assert (
        sys.stderr.getvalue() == "\r" + (" 50.0 % [" + "=" * 25 + ">" + " " * 24 + "] 5.0 MB / 10 MB").ljust(80) + "\n"
    )
    assert sys.stdout.getvalue() == ""
    monkeypatch.setattr(sys, "stdout", Terminal())
    Progress(10, data_on_stdout=True).advance(10)
    assert sys.stdout.getvalue() == "" and sys.stderr.getvalue().count("\r") == 1


def test_recovery_is_followed_silently_in_a_pipe(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """-P waits for the end of the recovery; a pipe gets nothing, a terminal the phases and the bar."""
    monkeypatch.setattr("sheepdog_cli.dog_commands.node_recovery.POLL_S", 0.0)
    monkeypatch.setenv("COLUMNS", "60")
    states = [(1, 0, 0, 0), (1, 1, 1, 4), (1, 1, 4, 4), (1, 2, 4, 4), (0, 0, 0, 0)]

    def answers() -> None:
        left = iter(states)
        cluster.table[0x97] = lambda header, data: (0, struct.pack("<B3xIQQ", *next(left)), b"")

    answers()
    outcome = cluster.dog("node", "recovery", "-P")
    assert (outcome.code, outcome.stdout, outcome.stderr) == (0, b"", "")

    answers()
    terminal = type("Wrapper", (io.TextIOWrapper,), {"isatty": lambda self: True})
    monkeypatch.setattr("replay.io", types.SimpleNamespace(BytesIO=io.BytesIO, TextIOWrapper=terminal))
    shown = cluster.dog("node", "recovery", "-P").stdout.decode().split("\r")
    assert [part.rstrip(" ") for part in shown[1:]] == [
        "preparing a checked object list...",
        " 25.0 % [=======>" + " " * 22 + "] 1 / 4",
        "100.0 % [" + "=" * 30 + "] 4 / 4" + " " * 14 + "\n",
        "notifying a completion of recovery...\n",
    ]


def test_elapsed_time(cluster: Cluster) -> None:
    """-T adds an empty line and the time, but not when the command ends early."""
    timed = cluster.dog("node", "list", "-r", "-T").stdout.decode().splitlines()
    failed = cluster.dog("node", "stat", "-T")

    assert timed[-2] == "" and timed[-1].startswith("Elapsed time: 0.") and timed[-1].endswith(" seconds")
    assert b"Elapsed" not in failed.stdout
    assert cluster.dog("node", "list", "--ti", "x", "y").stdout.count(b"Elapsed") == 1


def test_plugin_list() -> None:
    """The installed plugins, without importing them."""
    outcome = run_dog(["plugin", "list"])
    raw = run_dog(["plugin", "list", "-r"]).stdout.decode().splitlines()

    assert outcome.code == 0
    assert outcome.stdout.decode().split()[:5] == ["Kind", "Name", "Distribution", "Version", "State"]
    assert any(row.split()[:3] == ["transport", "tcp", "sheepdog-core"] for row in raw)
