"""What dog says of nodes and the cluster: every listing, whole, in its three forms; questions, and clusters that do not
serve (CLI-5 to CLI-7, MD-9, MD-10, REC-17, VN-8)."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scenes import MiB, pattern, read, rows, vid_of_name, write

from sheepdog.testing.cluster import SheepCluster, run_python, wait_until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(180)]

SIZE = r"\d+(?:\.\d)? [MGTP]B"


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., SheepCluster]) -> SheepCluster:
    """Three nodes, the last one a gateway, 2 copies, one volume of 3 MiB with a snapshot and a clone."""
    cluster = start_cluster(3, gateways=1, driver="local", store="plain", redundancy="2")
    cluster.format("-z", "20")
    cluster.dog("vdi", "create", "vol", "3M")
    write(cluster, "vol", 0, pattern(1, 2 * MiB))
    cluster.dog("vdi", "snapshot", "-s", "snap", "vol")
    cluster.dog("vdi", "clone", "-s", "snap", "vol", "clone")
    return cluster


def out(cluster: SheepCluster, *words: str, **options: Any) -> str:
    """stdout of a command that succeeds and says nothing on stderr."""
    done = cluster.dog(*words, **options)
    assert done.stderr == b""
    return done.stdout.decode()


def document(cluster: SheepCluster, *words: str) -> Any:
    return json.loads(out(cluster, *words, "--json"))


def in_order(cluster: SheepCluster) -> list[int]:
    """Indexes of the sheep as listings number them: by port."""
    return sorted(range(3), key=lambda index: cluster.sheep[index].port)


def test_node_list(cluster: SheepCluster) -> None:
    """Nodes by address and port, zone unsigned, a gateway without vnodes; the same through every node."""
    order = in_order(cluster)
    raw = [line.split() for line in out(cluster, "node", "list", "-r").splitlines()]
    assert [(row[0], row[1], row[3]) for row in raw] == [
        (str(number), cluster.address(index), str(index)) for number, index in enumerate(order)
    ]
    vnodes = {row[1]: int(row[2]) for row in raw}
    assert {address for address, count in vnodes.items() if not count} == {cluster.address(2)}
    expected = "  Id   Host:Port         V-Nodes       Zone\n" + "".join(
        f"{number:4d}   {cluster.address(index):<20}\t{vnodes[cluster.address(index)]:2d}{index:11d}\n"
        for number, index in enumerate(order)
    )
    for node in range(3):
        assert out(cluster, "node", "list", node=node) == expected
    listed = document(cluster, "node", "list")
    assert [one["port"] for one in listed] == [cluster.sheep[index].port for index in order]


def test_node_info(cluster: SheepCluster) -> None:
    """Space of every node, the sum, and the sum of the sizes of what is no snapshot."""
    lines = out(cluster, "node", "info").splitlines()
    assert lines[0] == "Id\tSize\tUsed\tAvail\tUse%"
    for number, index in enumerate(in_order(cluster)):
        if index == 2:
            assert lines[1 + number] == f"{number:2d}\t0.0 MB\t0.0 MB\t0.0 MB\t  0%"
        else:
            assert re.fullmatch(rf"{number:2d}\t{SIZE}\t{SIZE}\t{SIZE}\t +\d+%", lines[1 + number])
    assert re.fullmatch(rf"Total\t{SIZE}\t{SIZE}\t{SIZE}\t +\d+%", lines[4])
    assert lines[5:] == ["", "Total virtual image size\t6.0 MB"]
    raw = out(cluster, "node", "info", "-r").splitlines()
    assert raw[-1].split()[0] == "Total" and raw[-1].split()[-1] == str(6 * MiB)
    assert isinstance(document(cluster, "node", "info"), (dict, list))


def test_node_recovery(cluster: SheepCluster) -> None:
    """REC-17: a quiet cluster prints two lines, raw none; a throttle is the contacted node's, a bad one is refused."""
    cluster.wait_recovered()
    assert out(cluster, "node", "recovery") == (
        "Nodes In Recovery:\n  Id   Host:Port         V-Nodes       Zone       Progress\n"
    )
    assert out(cluster, "node", "recovery", "-r") == ""

    def throttle(node: int) -> bytes:
        return cluster.dog("node", "recovery", "get-throttle", node=node).stderr

    assert throttle(0) == b"max (0), interval (0)\n"
    cluster.dog("node", "recovery", "set-throttle", "4294967295", "9223372036854775807", node=0)
    kept = b"max (4294967295), interval (9223372036854775807)\n"
    assert (throttle(0), throttle(1)) == (kept, b"max (0), interval (0)\n")
    for words in (("0", "5"), ("5", "0"), ("4294967296", "1"), ("1", "9223372036854775808"), ("x", "1")):
        refused = cluster.dog("node", "recovery", "set-throttle", *words, check=False, node=0)
        assert (refused.returncode, throttle(0)) == (64, kept)
    cluster.dog("node", "recovery", "set-throttle", "0", "0", node=0)
    assert throttle(0) == b"max (0), interval (0)\n"


def test_node_stat(cluster: SheepCluster) -> None:
    """Counters grow by what is done through the node, under their own headings."""

    def client() -> list[str]:
        lines = out(cluster, "node", "stat", node=1).splitlines()
        assert lines[0] == "Request\tActive\tTotal\tWrite\tRead\tRemove\tFlush\tAll WR\tAll RD"
        assert lines[2].startswith("Peer\t")
        return lines[1].split("\t")

    before = client()
    write(cluster, "vol", 2 * MiB, pattern(2, MiB), node=1)
    for _ in range(3):
        assert read(cluster, "vol", 2 * MiB, 4096, node=1) == pattern(2, MiB)[:4096]
    after = client()
    assert after[0] == "Client"
    assert int(after[3]) - int(before[3]) == 2, "the object and its map entry"
    assert int(after[4]) - int(before[4]) >= 3
    raw = out(cluster, "node", "stat", "-r", node=1).splitlines()
    assert [len(line.split("\t")) for line in raw] == [8, 8]
    assert document(cluster, "node", "stat")


def test_node_log(cluster: SheepCluster) -> None:
    """The level of the contacted node is changed and told; a bad one changes nothing."""
    levels = cluster.dog("node", "log", "level", "list").stderr.decode()
    names = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
    assert levels == "".join(f"{name}\t({number})\n" for number, name in enumerate(names))

    def level(node: int) -> bytes:
        return cluster.dog("node", "log", "level", "get", node=node).stderr

    before = level(1)
    assert out(cluster, "node", "log", "level", "set", "warning", node=0) == ""
    assert (level(0), level(1)) == (b"warning (4)\n", before)
    bad = cluster.dog("node", "log", "level", "set", "loud", check=False)
    assert (bad.returncode, bad.stderr.decode()) == (255, f"invalid loglevel: loud\navailable loglevels:\n{levels}")
    assert level(0) == b"warning (4)\n"
    cluster.dog("node", "log", "level", "set", "debug", node=0)


def test_node_md(cluster: SheepCluster, tmp_path: Path) -> None:
    """MD-9, MD-10: the disks in path order; plugging asks, empties the directory and needs a path that works; declined
    and refused commands change nothing; what is unplugged is empty and its objects are elsewhere."""
    home = cluster.sheep[0].directory / "obj"

    def paths() -> list[str]:
        return [one["path"] for one in document(cluster, "node", "md", "info")]

    lines = out(cluster, "node", "md", "info", node=0).splitlines()
    assert lines[0] == "Id\tSize\tUsed\tAvail\tUse%\tPath"
    assert re.fullmatch(rf" 0\t{SIZE}\t{SIZE}\t{SIZE}\t +\d+%\t{home}", lines[1])
    every = out(cluster, "node", "md", "info", "-A").splitlines()
    assert [line for line in every if line.startswith("Node")] == ["Node 0:", "Node 1:", "Node 2:"]
    raw = out(cluster, "node", "md", "info", "-r", node=0)
    assert re.fullmatch(rf"{cluster.address(0)} 0 \d+ \d+ \d+ \d+% {home}\n", raw)

    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "litter").write_text("goes")
    for answer in (b"", b"no\n"):
        declined = cluster.dog("node", "md", "plug", str(extra), input=answer)
        assert b"Caution! The directories to be plugged will be purged." in declined.stdout
    assert (paths(), (extra / "litter").exists()) == ([str(home)], True)
    assert out(cluster, "node", "md", "plug", "-f", str(extra)) == ""
    assert (paths(), (extra / "litter").exists()) == (sorted([str(home), str(extra)]), False)
    for words in (("plug", str(extra)), ("plug", "/proc/none/x"), ("unplug", "/nosuch")):
        refused = cluster.dog("node", "md", words[0], "-f", words[1], check=False)
        assert (refused.returncode, refused.stderr) == (
            1, b"Failed to execute request, look for sheep.log for more information\n",
        )  # fmt: skip
    assert len(paths()) == 2
    cluster.wait_recovered()
    assert out(cluster, "vdi", "check", "vol") == "finish check&repair vol\n"
    assert out(cluster, "node", "md", "unplug", "-f", str(extra)) == ""
    cluster.wait_recovered()
    assert paths() == [str(home)]
    assert out(cluster, "vdi", "check", "vol") == "finish check&repair vol\n"


def test_node_vnodes(cluster: SheepCluster, start_cluster: Callable[..., SheepCluster]) -> None:
    """VN-8: refused in an automatic cluster; in a fixed one the number changes with a new epoch."""
    refused = cluster.dog("node", "vnodes", "set", "10", check=False)
    assert (refused.returncode, refused.stderr.splitlines()[-1]) == (255, b"Failed to execute request")
    fixed = start_cluster(2, driver="local", store="plain", redundancy="1", options=("-V", "60"))
    without = fixed.dog("cluster", "format", "-c", "1", check=False)
    assert (without.returncode, without.stderr) == (
        1, b"Need to specify the option of '-V', because there are vnode strategy of sheep is fixed in the cluster\n",
    )  # fmt: skip
    fixed.format("-V")
    assert b"Cluster vnodes strategy: fixed\n" in fixed.dog("cluster", "info", "-v").stdout
    assert out(fixed, "node", "vnodes", "set", "90", node=1) == ""
    wait_until(lambda: fixed.epoch(0) == 2, "the epoch of the change")
    assert sorted(row.split()[2] for row in out(fixed, "node", "list", "-r").splitlines()) == ["60", "90"]
    for wrong in ("0", "65536", "4294967297", "x", "7x", "+"):
        bad = fixed.dog("node", "vnodes", "set", wrong, check=False)
        message = f"Invalid number of vnodes '{wrong}': must be an integer between 1 and 65535\n"
        assert (bad.returncode, bad.stderr.decode()) == (64, message)
    assert fixed.epoch(0) == 2


def test_cluster_info(cluster: SheepCluster) -> None:
    """Plain, -v, -r, -d and JSON tell the same of the same cluster, through every node."""
    info = document(cluster, "cluster", "info")
    nodes = ", ".join(f"{one['host']}:{one['port']}:{one['vnodes']}" for one in info["epochs"][-1]["nodes"])
    created = time.ctime(info["created"])
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(info["epochs"][-1]["time"]))
    assert (info["store"], info["redundancy"], info["vnodes"], info["epoch"]) == ("plain", "2", "auto", 1)
    table = f"Cluster created at {created}\n\nEpoch Time           Version [Host:Port:V-Nodes,,,]\n"
    for node in range(3):
        assert out(cluster, "cluster", "info", node=node) == (
            f"Cluster status: running, auto-recovery enabled\n\n{table}{when}      1 [{nodes}]\n"
        )
    assert out(cluster, "cluster", "info", "-v") == (
        "Cluster status: running, auto-recovery enabled\nCluster store: plain with 2 redundancy policy\n"
        f"Cluster vnodes strategy: auto\nCluster vnode mode: node\n{table}{when}      1 [{nodes}]\n"
    )
    assert out(cluster, "cluster", "info", "-r") == (
        f"running, auto-recovery enabled\n\n{info['epochs'][-1]['time']} 1 [{nodes}]\n"
    )
    assert out(cluster, "cluster", "info", "-r", "-v") == (
        f"running, auto-recovery enabled\nplain with 2 redundancy policy\nauto\nnode\n"
        f"{info['epochs'][-1]['time']} 1 [{nodes}]\n"
    )
    assert out(cluster, "cluster", "info", "-d").splitlines()[-1] == f"{when}      1 [formated]"
    assert out(cluster, "cluster", "recover", "disable") == "Cluster recovery: disable\n"
    assert out(cluster, "cluster", "info", node=1).startswith("Cluster status: running, auto-recovery disabled\n")
    assert out(cluster, "cluster", "recover", "enable") == "Cluster recovery: enable\n"
    running = cluster.dog("cluster", "recover", "force", "-f", check=False)
    assert (running.returncode, running.stderr) == (
        1, b"failed to execute request, Cluster is running/halted and cannot be force recovered\n",
    )  # fmt: skip


def test_vdi_listings(cluster: SheepCluster) -> None:
    """list, tree, graph, map and location in JSON and as text name the same volumes."""
    snap, head, clone = (
        vid_of_name(cluster, "vol", tag="snap"), vid_of_name(cluster, "vol"), vid_of_name(cluster, "clone"),
    )  # fmt: skip
    listed = {one["vid"]: one for one in document(cluster, "vdi", "list")}
    assert set(listed) == {f"{vid:x}" for vid in (snap, head, clone)}
    assert (listed[f"{snap:x}"]["tag"], listed[f"{snap:x}"]["snap_id"]) == ("snap", 1)
    assert listed[f"{clone:x}"]["clone"] and listed[f"{clone:x}"]["parent_vid"] == f"{snap:x}"
    assert [list(one) for one in document(cluster, "vdi", "list", "clone")] == [list(listed[f"{clone:x}"])]
    for row in rows(cluster):
        assert (str(listed[row[7]]["used"]), str(listed[row[7]]["shared"])) == (row[4], row[5])
    stamp = time.strftime("%Y-%m-%d %H:%M", time.localtime(listed[f"{snap:x}"]["created"]))
    lines = {f"vol---[{stamp}]---(you are here)", "clone---(you are here)"}
    assert set(out(cluster, "vdi", "tree").splitlines()) == lines
    trees = {one["name"]: one for one in document(cluster, "vdi", "tree")}
    assert [child["vid"] for child in trees["vol"]["children"]] == [f"{head:x}"]
    graph = out(cluster, "vdi", "graph")
    for parent, child in ((0, snap), (snap, head), (snap, clone)):
        assert f'  "{parent:x}" -> "{child:x}";\n' in graph
    assert graph.count('color="red"') == 2
    entries = document(cluster, "vdi", "object", "map", "clone")
    assert entries == [{"index": 0, "vid": f"{snap:x}"}, {"index": 1, "vid": f"{snap:x}"}]
    place = document(cluster, "vdi", "object", "location", "-i", "1", "vol")
    assert sorted(place["placement"]) == sorted(address for address, has in place["nodes"].items() if has)
    only = out(cluster, "vdi", "list", "-r", "-o", f"{snap << 32 | 1:x}").splitlines()
    assert {line.split()[7] for line in only} == {f"{vid:x}" for vid in (snap, head, clone)}
    inode = cluster.dog("vdi", "list", "-r", "-o", f"{1 << 63 | snap << 32:x}", check=False)
    assert (inode.returncode, inode.stdout) == (1, b"")
    unknown = cluster.dog("vdi", "list", "-r", "nosuch")
    assert (unknown.returncode, unknown.stdout, unknown.stderr) == (0, b"", b"")


def test_plugins(cluster: SheepCluster) -> None:
    """The installed plugins, in three forms."""
    listed = document(cluster, "plugin", "list")
    assert {"cluster", "store", "redundancy", "transport", "frontend"} >= {one["kind"] for one in listed}
    assert ("store", "plain") in {(one["kind"], one["name"]) for one in listed}
    assert len(out(cluster, "plugin", "list", "-r").splitlines()) == len(listed)
    assert out(cluster, "plugin", "list").splitlines()[0].split() == [
        "Kind", "Name", "Distribution", "Version", "State",
    ]  # fmt: skip


def test_questions(cluster: SheepCluster) -> None:
    """CLI-6: only a line that begins with yes goes ahead; everything else ends with 0 and changes nothing."""
    before = (out(cluster, "vdi", "list", "-r"), out(cluster, "cluster", "info", "-r"))
    commands = (
        ("cluster", "format", "-c", "2"),
        ("cluster", "format", "-f", "-c", "3"),
        ("vdi", "rollback", "-s", "snap", "vol"),
        ("cluster", "recover", "force"),
        ("node", "md", "unplug", "/nosuch"),
    )
    for words in commands:
        for answer in (b"", b"\n", b"y\n", b"no\n", b" yes\n"):
            done = cluster.dog(*words, input=answer)
            assert done.stderr == b""
            assert done.stdout.rstrip().endswith(b"[yes/no]:"), words
    assert (out(cluster, "vdi", "list", "-r"), out(cluster, "cluster", "info", "-r")) == before
    write(cluster, "vol", 0, b"changed")
    assert cluster.dog("vdi", "rollback", "-s", "snap", "vol", input=b"YES please\n").returncode == 0
    assert read(cluster, "vol", 0, 7) == pattern(1, 2 * MiB)[:7]


def test_unknown_store(cluster: SheepCluster) -> None:
    """ST-3: a store that nobody has: the list of those that there are, exit 2, the cluster as before."""
    before = out(cluster, "vdi", "list", "-r")
    done = cluster.dog("cluster", "format", "-f", "-b", "nosuch", "-c", "1", check=False)
    assert (done.returncode, done.stderr) == (2, b"Format failed: Targeted backend store is not found\n")
    lines = done.stdout.decode().splitlines()
    assert lines[:3] == ["using backend nosuch store", "Available stores:", "-" * 39]
    assert {"plain", "tree"} <= set(lines[3].split())
    assert out(cluster, "vdi", "list", "-r") == before


def test_a_waiting_cluster(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """CLI-5: while nodes are missing after a shutdown every command says so, with its own words and code, and force
    recovery makes the cluster run."""
    cluster = fresh_cluster(2, driver="local", store="plain", redundancy="2")
    cluster.format("-z", "20")
    cluster.dog("vdi", "create", "v", "1M")
    vid = vid_of_name(cluster, "v")
    write(cluster, "v", 0, b"kept")
    cluster.dog("cluster", "shutdown")
    for sheep in cluster.sheep:
        assert sheep.process is not None
        sheep.process.wait(30)
    cluster.restart(0, wait=False)
    wait_until(lambda: cluster.dog("node", "list", check=False).returncode == 0, "the sheep to answer")

    waiting = "Waiting for other nodes to join cluster"
    opened = f"Failed to open VDI v (snapshot id: 0 snapshot tag: ): {waiting}\n"
    tagged = f"Failed to open VDI v (snapshot id: 0 snapshot tag: t): {waiting}\n"
    for words, code, stderr in (
        ("vdi create w 1M", 1, f"Failed to create VDI w: {waiting}\n"),
        ("vdi snapshot -s t v", 1, f"Failed to create snapshot for v: {waiting}\n"),
        ("vdi read v", 1, opened),
        ("vdi write v", 1, opened),
        ("vdi resize v 2M", 1, opened),
        ("vdi clone -s t v w", 1, tagged),
        ("vdi rollback -f -s t v", 1, tagged),
        ("vdi setattr v k x", 1, f"Failed to set attribute: {waiting}\n"),
        ("vdi getattr v k", 5, f"Failed to find attribute oid: {waiting}\n"),
        ("cluster reweight", 1, f"Response's result: {waiting}\n"),
        ("cluster alter-copy -f -c 1", 1, f"Response's result: {waiting}\n"),
        ("node stat", 1, f"failed to get stat information: {waiting}\n"),
        ("node md info", 1, f"failed to get multi-disk information: {waiting}\n"),
    ):
        done = cluster.dog(*words.split(), check=False)
        assert (words, done.returncode, done.stderr.decode()) == (words, code, stderr)
    listed = cluster.dog("vdi", "list", "-r")
    unreadable = f"Failed to read object {1 << 63 | vid << 32:016x} {waiting}\nFailed to read inode header\n"
    assert (listed.returncode, listed.stdout, listed.stderr.decode()) == (0, b"", unreadable)
    status = out(cluster, "cluster", "info")
    assert status.startswith(f"Cluster status: {waiting}\n\nCluster created at ")
    assert status.splitlines()[-1].count("127.0.0.1") == 2
    asked = cluster.dog("cluster", "recover", "force", input=b"yes\n")
    assert asked.stdout.endswith(b"Are you sure you want to continue? [yes/no]: ")
    wait_until(lambda: b"running" in cluster.dog("cluster", "info").stdout, "the cluster to run")
    assert read(cluster, "v", 0, 4) == b"kept"


def test_a_halted_cluster(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """CLI-5: in strict mode with a zone too few, what writes is refused, each command in its own words, and changes
    nothing; what reads works. When the node is back all of it works again."""
    cluster = fresh_cluster(2, driver="local", store="plain", redundancy="2")
    cluster.format("-t", "-z", "20")
    cluster.dog("vdi", "create", "v", "3M")
    write(cluster, "v", 0, pattern(1, MiB))
    cluster.dog("vdi", "snapshot", "-s", "s", "v")
    cluster.dog("vdi", "setattr", "v", "key", "value")
    old, new = vid_of_name(cluster, "v", tag="s"), vid_of_name(cluster, "v")
    listing, checked = rows(cluster), out(cluster, "vdi", "list")
    cluster.stop(1)
    cluster.wait_members()

    halted = "IO has halted as there are not enough living nodes"
    refused = "Failed to write to requested VDI"
    inode = f"Failed to write object {1 << 63 | new << 32:016x}: {halted}\n"
    for words, code, stderr in (
        ("vdi create w 1M", 1, f"Failed to create VDI w: {refused}\n"),
        ("vdi clone -s s v w", 1, f"Failed to create VDI w: {refused}\n"),
        ("vdi snapshot -s t v", 1, inode),
        ("vdi resize v 4M", 1, f"{inode}Failed to update an inode header\n"),
        ("vdi write v 0 512", 1, f"Failed to write object {new << 32:016x}: {halted}\nFailed to write VDI\n"),
        ("vdi delete v", 1, f"{inode}Failed to delete v: {halted}\n"),
        ("vdi rollback -f -s s v", 1, f"{inode}Failed to delete v: {halted}\nFailed to delete the current state\n"),
        ("vdi setattr v other x", 1, f"Failed to set attribute: {halted}\n"),
        ("vdi setattr -d v key", 1, f"Failed to set attribute: {halted}\n"),
    ):
        done = cluster.dog(*words.split(), check=False, input=b"x" * 512)
        assert (done.returncode, done.stdout, done.stderr.decode()) == (code, b"", stderr), words
    assert (rows(cluster), out(cluster, "vdi", "list")) == (listing, checked)
    assert out(cluster, "vdi", "getattr", "v", "key") == "value"
    assert read(cluster, "v", 0, MiB) == read(cluster, "v", 0, MiB, tag="s") == pattern(1, MiB)
    assert out(cluster, "vdi", "object", "map", "v") == f"Index       VID\n00000000 {old:8x}\n"
    status = out(cluster, "cluster", "info").splitlines()[0]
    assert status == f"Cluster status: {halted}" or status.startswith("Cluster status: running")
    cluster.restart(1)
    cluster.wait_recovered()
    cluster.dog("vdi", "write", "v", "0", "512", input=b"x" * 512)
    assert read(cluster, "v", 0, 512) == b"x" * 512


def test_progress_on_a_terminal(cluster: SheepCluster) -> None:
    """What moves much data shows a bar that ends at 100 %: on the terminal that stdout is, and on that of stderr where
    stdout takes the data. A pipe gets nothing but the data."""
    cluster.dog("vdi", "create", "bars", "3M")
    content = pattern(6, 3 * MiB)

    def run(*words: str, stdin: bytes = b"", data: bool = False) -> tuple[bytes, str]:
        """What came on a pipe, and what on the terminal."""
        terminal, side = pty.openpty()
        environment = {"SHEEPDOG_DOG_ADDR": "127.0.0.1", "SHEEPDOG_DOG_PORT": str(cluster.sheep[0].port)}
        process = subprocess.Popen(
            run_python("sheepdog_cli.dog", *words), stdin=subprocess.PIPE,
            stdout=subprocess.PIPE if data else side, stderr=side if data else subprocess.PIPE,
            env={**os.environ, **environment},
        )  # fmt: skip
        os.close(side)
        piped = b"".join(part for part in process.communicate(stdin, 60) if part)
        shown = b""
        with contextlib.suppress(OSError):  # the other side is closed
            while part := os.read(terminal, 1 << 16):
                shown += part
        os.close(terminal)
        assert process.returncode == 0, shown
        return piped, shown.decode()

    done = re.compile(r"100\.0 % \[=+\] 3\.0 MB / 3\.0 MB *\r\n")
    for words, stdin, data in (
        (("vdi", "write", "bars", "0", "3M"), content, False),
        (("vdi", "read", "bars"), b"", True),
        (("vdi", "snapshot", "-s", "a", "bars"), b"", False),
        (("vdi", "create", "-P", "full", "3M"), b"", False),
        (("vdi", "clone", "-n", "-s", "a", "bars", "apart"), b"", False),
    ):
        piped, shown = run(*words, stdin=stdin, data=data)
        assert piped == (content if data else b"")
        assert bool(done.search(shown)) == (words[1] != "snapshot"), shown
    write(cluster, "bars", 0, b"new")
    cluster.dog("vdi", "snapshot", "-s", "b", "bars")
    stream, shown = run("vdi", "backup", "-F", "a", "-s", "b", "bars", data=True)
    assert "] 1.0 MB / 1.0 MB" in shown and stream == cluster.dog("vdi", "backup", "-F", "a", "-s", "b", "bars").stdout
    assert done.search(run("vdi", "restore", "-s", "a", "bars", stdin=stream)[1])
    _, shown = run("vdi", "check", "bars")
    assert "100.0 % [" in shown and shown.endswith("finish check&repair bars\r\n")
    for words in (("vdi", "read", "bars"), ("vdi", "check", "bars")):
        quiet = cluster.dog(*words)
        assert b"%" not in quiet.stderr and b"100.0 %" not in quiet.stdout


def test_node_kill_and_death(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """CLI-7, MEM-25: kill by id and -l end the right node; dog says that its sheep is dead."""
    cluster = fresh_cluster(3, driver="local", store="plain", redundancy="1")
    cluster.format("-z", "20")
    order = in_order(cluster)
    for words in ((), ("x",), ("3",), ("-l", "1")):
        bad = cluster.dog("node", "kill", *words, check=False)
        assert bad.returncode == 64 and bad.stderr and not bad.stdout
    assert len(out(cluster, "node", "list", "-r").splitlines()) == 3
    victim = cluster.sheep[order[2]]
    assert out(cluster, "node", "kill", "2", node=order[0]) == ""
    assert victim.process is not None and victim.process.wait(30) == 0
    cluster.wait_members()
    assert out(cluster, "node", "kill", "-l", node=order[1]) == ""
    second = cluster.sheep[order[1]]
    assert second.process is not None and second.process.wait(30) == 0
    cluster.wait_members()
    assert cluster.epoch(order[0]) == 3
    last = cluster.sheep[order[0]]
    last.end(9)
    dead = cluster.dog("vdi", "list", node=order[0], check=False)
    assert dead.returncode == 2
    assert dead.stderr.decode() == f"failed to connect to {last.address}: Connection refused\n" * 2
