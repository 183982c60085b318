"""Wrong use of the programs and of the port: a clear message and an exit code, a result, or a closed connection; never
a traceback, a dead sheep or lost data (behaviours CLI-1 to CLI-7, wire protocol section 13)."""

from __future__ import annotations

import os
import random
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scenes import KiB, MiB, pattern, read, read_all, rows, vid_of_name, write

from sheepdog.client import admin
from sheepdog.client.volume import name_and_tag, pack_vdi_variant
from sheepdog.model.ids import data_oid, inode_oid
from sheepdog.testing.cluster import HOST, SheepCluster, reserve_port, run_python, wait_until
from sheepdog.wire.opcodes import OP_TABLE, Op
from sheepdog.wire.results import Result

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]

CONTENT = pattern(1, MiB)
WRITE = 0x01


# ---- starting a sheep


def run_sheep(*arguments: str) -> tuple[int, str]:
    """Exit code and everything it said, its log included: the directory is the last argument."""
    done = subprocess.run(
        run_python("sheepdog_cli.sheep", "-f", *arguments), capture_output=True, timeout=60, check=False
    )
    text = (done.stdout + done.stderr).decode(errors="replace")
    log = Path(arguments[-1]) / "sheep.log"
    if log.is_file():
        text += log.read_text(errors="replace")
    assert "Traceback" not in text
    return done.returncode, text


@pytest.fixture
def port() -> Iterator[str]:
    """A port that nobody else is given."""
    with reserve_port() as holder:
        yield str(holder.getsockname()[1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-c", "nosuch"], "Invalid cluster driver 'nosuch'"),
        (["-c", "nosuch:with,options"], "Invalid cluster driver 'nosuch:with,options'"),
        (["-Q"], "invalid option -- 'Q'"),
        (["--bogus"], "unrecognized option '--bogus'"),
        (["-z", "12x"], "Invalid zone id '12x': must be an integer between 0 and 4294967295"),
        (["-z", "4294967296"], "Invalid zone id '4294967296'"),
        (["-V", "0"], "Invalid number of vnodes '0': must be an integer between 1 and 65535"),
        (["-g", "-V", "3"], "Options '-g' and '-V' can not be both specified"),
        (["-b", "localhost"], "Bad address 'localhost'"),
        (["-j", "size=1M"], "invalid size 1M, must be bigger than 64(M)"),
    ],
)
def test_wrong_options(tmp_path: Path, port: str, words: list[str], message: str) -> None:
    """CLI-1: wrong options end with 1 and name what is wrong; the directory is not touched."""
    base = tmp_path / "store"
    code, text = run_sheep("-p", port, *words, str(base))
    assert code == 1
    assert message in text
    assert not base.exists()


@pytest.mark.parametrize("wrong", ["0", "65536", "65537", "4294967297", "-1", "q", "80x", "+", "-"])
def test_wrong_ports(tmp_path: Path, wrong: str) -> None:
    """CLI-2: sheep ends with 1 and dog with 64 at a port that is none."""
    code, text = run_sheep("-p", wrong, str(tmp_path / "store"))
    assert (code, text) == (1, f"Invalid port number '{wrong}'\n")
    done = subprocess.run(
        run_python("sheepdog_cli.dog", "node", "list", "-p", wrong), capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 64
    assert f"Invalid port number '{wrong}'" in done.stderr.decode()


def test_busy_port(tmp_path: Path) -> None:
    """A port in use: exit 1, the log says so, and the directory is a usable store afterwards."""
    with socket.create_server((HOST, 0)) as other:
        busy = str(other.getsockname()[1])
        code, text = run_sheep("-c", f"local:{tmp_path / 'c'}", "-b", HOST, "-p", busy, str(tmp_path / "store"))
    assert code == 1
    assert "failed to bind server socket: Address already in use" in text
    assert "failed to create a listening port" in text


def test_unusable_directories(tmp_path: Path, port: str) -> None:
    """A file, and paths that cannot be made: exit 1 with the path in the message."""
    (tmp_path / "file").write_text("a file")
    for path in (str(tmp_path / "file"), "/proc/nothing", str(tmp_path / "none" / "deeper")):
        code, text = run_sheep("-c", f"local:{tmp_path / 'c'}", "-p", port, path)
        assert code == 1
        assert path in text
    assert (tmp_path / "file").read_text() == "a file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_directory_without_permission(tmp_path: Path, port: str) -> None:
    """A directory that may not be written: exit 1 with the path in the message."""
    base = tmp_path / "readonly"
    base.mkdir(mode=0o500)
    code, text = run_sheep("-c", f"local:{tmp_path / 'c'}", "-p", port, str(base))
    assert code == 1
    assert str(base) in text


def test_foreign_directory(tmp_path: Path, port: str) -> None:
    """A config file that is none of ours: exit 1, and the file is as it was."""
    base = tmp_path / "foreign"
    base.mkdir()
    (base / "config").write_bytes(b"[section]\nthis = belongs to another program\n")
    code, text = run_sheep("-c", f"local:{tmp_path / 'c'}", "-p", port, str(base))
    assert code == 1
    assert "config" in text
    assert (base / "config").read_bytes() == b"[section]\nthis = belongs to another program\n"


# ---- a running cluster


@pytest.fixture(scope="module")
def cluster(start_cluster: Callable[..., SheepCluster]) -> SheepCluster:
    """Two nodes with a volume and a tagged snapshot of it."""
    cluster = start_cluster(2, driver="local", store="plain", redundancy="2")
    cluster.format()
    cluster.dog("vdi", "create", "kept", "8M")
    write(cluster, "kept", 0, CONTENT)
    cluster.dog("vdi", "snapshot", "-s", "tag", "kept")
    return cluster


@pytest.fixture(autouse=True)
def unharmed(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test with the running cluster, every sheep is the process it was, and the data is what it was."""
    yield
    if "cluster" in request.fixturenames:
        cluster: SheepCluster = request.getfixturevalue("cluster")
        for node in range(2):
            assert cluster.sheep[node].running, cluster.sheep[node].log_tail()
            assert read(cluster, "kept", 0, MiB, node=node) == CONTENT
            assert read(cluster, "kept", 0, MiB, node=node, tag="tag") == CONTENT
        assert cluster.epoch(0) == 1


def test_second_sheep_on_a_directory(cluster: SheepCluster, port: str) -> None:
    """The second of two sheep on one directory ends with 1 and says why; the first does not notice."""
    base = cluster.sheep[0].directory
    code, text = run_sheep("-c", f"local:{cluster.base / 'other'}", "-p", port, str(base))
    assert code == 1
    assert f"another sheep daemon is using {base}" in text
    assert f"locking directory: {base} failed" in text


def test_store_of_another_cluster(cluster: SheepCluster, fresh_cluster: Callable[..., SheepCluster]) -> None:
    """MEM-9: a store of one cluster is refused by another: it ends with 1, members and epoch stay."""
    other = fresh_cluster(1, driver="local", store="plain", redundancy="1")
    other.format()
    other.dog("vdi", "create", "foreign", "4M")
    store = other.sheep[0].directory
    other.stop(0)
    code, text = run_sheep(
        "-c", f"local:{cluster.base / 'cluster'}", "-b", HOST, "-y", HOST, "-p", str(other.sheep[0].port), str(store)
    )
    assert code == 1
    assert "joining node ctime doesn't match" in text
    assert "failed to join Sheepdog" in text
    cluster.wait_members()
    other.restart(0)
    assert [row[1] for row in rows(other)] == ["foreign"]


def raw(cluster: SheepCluster) -> socket.socket:
    stream = socket.create_connection((HOST, cluster.sheep[0].port), timeout=20)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return stream


def closed(stream: socket.socket) -> bool:
    """The sheep closes the connection, after whatever it still has to say."""
    try:
        while stream.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def header(opcode: int, *, proto: int = 2, flags: int = 0, length: int = 0, variant: bytes = b"") -> bytes:
    return struct.pack("<BBHIII", proto, opcode, flags, 0, 7, length) + variant.ljust(32, b"\0")


def result_of(stream: socket.socket) -> int:
    """Of the next answer, which has no body."""
    answer = b""
    while len(answer) < 48:
        more = stream.recv(48 - len(answer))
        assert more, "closed instead of an answer"
        answer += more
    assert struct.unpack_from("<I", answer, 12) == (0,)
    result: int = struct.unpack_from("<I", answer, 16)[0]
    return result


def test_noise_on_the_port(cluster: SheepCluster) -> None:
    """Random bytes, a web browser, half a header and silence: the connection ends or is ended, nothing else happens."""
    noise = random.Random(5)
    for data in (
        b"GET / HTTP/1.1\r\nHost: sheep\r\n\r\n" + b"x" * 100,
        *(noise.randbytes(size) for size in (48, 480, 70000)),
    ):
        with raw(cluster) as stream:
            try:
                stream.sendall(data)
                stream.shutdown(socket.SHUT_WR)
            except OSError:
                continue  # closed already
            assert closed(stream)
    for size in (0, 1, 47):
        with raw(cluster) as stream:
            stream.sendall(header(Op.READ_VDIS)[:size])
            stream.shutdown(socket.SHUT_WR)
            assert closed(stream)


def test_every_opcode_without_its_fields(cluster: SheepCluster) -> None:
    """Each of the 256 opcodes, known or not, with a header of zeros and with a body of one byte: an answer each time,
    or a closed connection, and nothing goes on behind it; unknown ones, 0xff among them, give INVALID_PARMS."""
    ending = {Op.SHUTDOWN, Op.KILL_NODE, Op.MAKE_FS}  # they do what they say
    changing = {Op.DISABLE_RECOVER, Op.ALTER_CLUSTER_COPY, Op.SET_LOGLEVEL, Op.FORCE_RECOVER}
    for opcode in range(256):
        if opcode in ending | changing:
            continue
        proto = 0x0A if opcode >= 0x80 else 2
        for data in (header(opcode, proto=proto), header(opcode, proto=proto, flags=WRITE, length=1) + b"x"):
            with raw(cluster) as stream:
                stream.sendall(data)
                stream.shutdown(socket.SHUT_WR)
                if opcode not in OP_TABLE and not 0xD0 <= opcode <= 0xEF:
                    assert result_of(stream) == Result.INVALID_PARMS, f"opcode 0x{opcode:02x}"
                assert closed(stream), f"opcode 0x{opcode:02x}"
    with cluster.connect(0) as connection:

        def active() -> int:
            return admin.unpack_counters(connection.request(Op.STAT, data_length=120).body).gateway_active

        wait_until(lambda: not active(), "the end of all requests", timeout_s=5)
    for wrong in (3, 0xFF):
        with raw(cluster) as stream:
            stream.sendall(header(Op.READ_VDIS, proto=wrong))
            assert result_of(stream) == Result.VER_MISMATCH


def test_versions_and_ids(cluster: SheepCluster) -> None:
    """Clients say version 0, 1 or 2, sheep and dog 0x0a, and nothing else is served; whatever was sent, the answer has
    its opcode and id, version and flags 0, and pipelined requests are all answered."""
    for opcode, served in ((Op.READ_VDIS, {0, 1, 2}), (Op.GET_STORE_LIST, {0x0A}), (0xFE, {0x0A})):
        with raw(cluster) as stream:
            requests = [struct.pack("<BBHIII32x", proto, opcode, 0, 9, proto ^ 0xDEADBEEF, 0) for proto in range(256)]
            stream.sendall(b"".join(requests))
            stream.shutdown(socket.SHUT_WR)
            answers = bytearray()
            while more := stream.recv(65536):
                answers += more
        assert len(answers) == 256 * 48
        found = {}
        for at in range(0, len(answers), 48):
            version, echoed, flags, epoch, number, length, result = struct.unpack_from("<BBHIIII", answers, at)
            assert (version, echoed, flags, epoch, length) == (0, opcode, 0, 1, 0)
            found[number ^ 0xDEADBEEF] = result
        assert {proto for proto, result in found.items() if result != Result.VER_MISMATCH} == served


def test_peer_operations_without_an_object(cluster: SheepCluster) -> None:
    """The epoch of a peer operation counts only for an object: without one the answer is NO_OBJ, whatever the epoch; an
    older one is refused otherwise. No file is made of an object id that a start would overlook."""
    with cluster.connect(0) as connection:
        for opcode in (Op.READ_PEER, Op.WRITE_PEER, Op.CREATE_AND_WRITE_PEER):
            for epoch in (0, 1, 7):
                answer = connection.request(opcode, epoch=epoch, body=b"x", data_length=1)
                assert answer.result == Result.NO_OBJ
            assert connection.request(opcode, oid=5 << 32, body=b"x", data_length=1).result == Result.OLD_NODE_VER
        for oid in (0, (1 << 64) - 1):
            answer = connection.request(Op.CREATE_AND_WRITE_OBJ, oid=oid, body=b"x")
            assert answer.result == Result.INVALID_PARMS
    assert not [path for name in ("0" * 16, "f" * 16) for path in cluster.base.rglob(name)]


def test_writes_without_their_flag(cluster: SheepCluster) -> None:
    """A write whose flag is missing has no body, whatever length it names: it is refused instead of acknowledged."""
    vid = vid_of_name(cluster, "kept")
    with raw(cluster) as stream:
        for opcode in (Op.WRITE_OBJ, Op.CREATE_AND_WRITE_OBJ):
            for oid in (data_oid(vid, 0), inode_oid(vid)):
                stream.sendall(header(opcode, length=512, variant=struct.pack("<QQ", oid, 0)))
                assert result_of(stream) == Result.INVALID_PARMS


def test_truncated_requests(cluster: SheepCluster) -> None:
    """A request whose body never comes completely changes nothing and ends with its connection."""
    vid = vid_of_name(cluster, "kept")
    variant = struct.pack("<QQ", data_oid(vid, 0), 0)
    with raw(cluster) as stream:
        stream.sendall(header(Op.CREATE_AND_WRITE_OBJ, flags=WRITE, length=MiB, variant=variant) + bytes(100 * KiB))
        stream.shutdown(socket.SHUT_WR)
        assert closed(stream)


def test_oversized_frames(cluster: SheepCluster) -> None:
    """A body of 4 GiB is announced: the connection is closed, and no memory is taken. An answer of 4 GiB is refused."""
    process = cluster.sheep[0].process
    assert process is not None
    status = Path(f"/proc/{process.pid}/status")

    def memory_kib() -> int:
        return int(status.read_text().partition("VmRSS:")[2].split()[0])

    before = memory_kib()
    with raw(cluster) as stream:  # one epoch with 50 million node slots
        stream.sendall(header(Op.STAT_CLUSTER, proto=0x0A, length=0xFFFFFFFF, variant=bytes(24) + b"\x80\xf0\xfa\x02"))
        assert result_of(stream) == Result.SUCCESS
    with raw(cluster) as stream:
        stream.sendall(header(Op.WRITE_OBJ, flags=WRITE, length=0xFFFFFFFF))
        assert closed(stream)
    with raw(cluster) as stream:
        stream.sendall(
            header(Op.READ_OBJ, length=0xFFFFFFFF, variant=struct.pack("<Q", inode_oid(vid_of_name(cluster, "kept"))))
        )
        assert result_of(stream) == Result.INVALID_PARMS
    assert memory_kib() - before < 100 * 1024


def test_offsets_outside_the_object(cluster: SheepCluster) -> None:
    """A write past the end of its object is refused; a read there gives zeros or is refused."""
    cluster.dog("vdi", "create", "bounds", "8M")
    write(cluster, "bounds", 0, b"x")
    oid = data_oid(vid_of_name(cluster, "bounds"), 0)
    with cluster.connect(0) as connection:
        for offset in (4 * MiB - 1, 4 * MiB, 0xFFFFFFF0):
            assert connection.request(Op.WRITE_OBJ, oid=oid, offset=offset, body=b"ab").result != Result.SUCCESS
            answer = connection.request(Op.READ_OBJ, oid=oid, offset=offset, data_length=2)
            assert answer.result != Result.SUCCESS or answer.body == bytes(2)
    assert sorted({path.stat().st_size for path in cluster.base.rglob(f"{oid:016x}")}) == [4 * MiB]


@pytest.mark.parametrize("opcode", [Op.GET_VDI_INFO, Op.LOCK_VDI, Op.DEL_VDI])
def test_names_of_wrong_length(cluster: SheepCluster, opcode: Op) -> None:
    """Bodies that are neither a name nor a name and a tag are refused. A name alone with a snapshot id is a lookup by
    id, although a snapshot with a tag is met (this killed the original)."""
    with cluster.connect(0) as connection:
        for length in (0, 1, 255, 257, 511, 513, 66320):
            assert connection.request(opcode, body=b"k" * length).result == Result.INVALID_PARMS, length
        unknown = connection.request(opcode, body=b"kept".ljust(256, b"\0"), variant=pack_vdi_variant(snap_id=9))
        assert unknown.result == Result.NO_TAG
        if opcode != Op.DEL_VDI:
            found = connection.request(opcode, body=b"kept".ljust(256, b"\0"), variant=pack_vdi_variant(snap_id=1))
            assert found.result == Result.SUCCESS
            assert found.u32(24) == vid_of_name(cluster, "kept", tag="tag")


def test_names_without_an_end(cluster: SheepCluster) -> None:
    """256 bytes without NUL are no name: nothing is created; names of 255 bytes, and such that are not UTF-8, work and
    are listed."""
    variant = pack_vdi_variant(size=MiB)
    with cluster.connect(0) as connection:
        assert connection.request(Op.NEW_VDI, variant=variant, body=b"n" * 256).result == Result.INVALID_PARMS
        assert connection.request(Op.NEW_VDI, variant=variant, body=bytes(256)).result == Result.INVALID_PARMS
        assert connection.request(Op.NEW_VDI, variant=variant, body=b"n" * 512).result == Result.INVALID_PARMS
        for name in (b"n" * 255, b"\xff\xfe latin \xe4"):
            assert connection.request(Op.NEW_VDI, variant=variant, body=name.ljust(256, b"\0")).result == Result.SUCCESS
            answer = connection.request(Op.GET_VDI_INFO, body=name_and_tag(name))
            assert answer.result == Result.SUCCESS
    listed = cluster.dog("vdi", "list", node=1).stdout
    assert b"n" * 255 in listed
    assert b"\xff\xfe latin \xe4" in listed
    cluster.dog("vdi", "delete", os.fsdecode(b"\xff\xfe latin \xe4"))


def test_sizes_and_policies_out_of_range(cluster: SheepCluster) -> None:
    """What the original stores unseen is refused: sizes above the map, shifts, copies and policies that do not exist, a
    parent that does not exist."""
    body = b"wrong".ljust(256, b"\0")
    with cluster.connect(0) as connection:
        for fields in (
            {"size": (4 << 40) + 1},
            {"size": (1 << 64) - 1},
            {"size": MiB, "shift": 19},
            {"size": MiB, "shift": 32},
            {"size": MiB, "copies": 32},
            {"size": MiB, "copies": 3, "policy": 0xFF},
            {"size": MiB, "store_policy": 7},
            {"size": MiB, "base_vid": 0x123456},
            {"size": MiB, "base_vid": 0x123456, "snap_id": 1},
        ):
            answer = connection.request(Op.NEW_VDI, variant=pack_vdi_variant(**fields), body=body)
            assert answer.result != Result.SUCCESS, fields
            assert answer.u32(24) == 0
    assert rows(cluster, "wrong") == []


def test_attributes_of_wrong_length(cluster: SheepCluster) -> None:
    """GET_VDI_ATTR with any other body than an attribute, or a value longer than its room, is refused."""
    with cluster.connect(0) as connection:
        for length in (0, 1, 784, 66319, 66321):
            assert connection.request(Op.GET_VDI_ATTR, body=b"k" * length).result == Result.INVALID_PARMS
        attribute = bytearray(66320)
        attribute[:4] = b"kept"
        attribute[524:528] = (70000).to_bytes(4, "little")
        attribute[528:531] = b"key"
        answer = connection.request(Op.GET_VDI_ATTR, flags=0x0100, body=attribute)
        assert answer.result == Result.INVALID_PARMS


def test_room_that_is_too_small(cluster: SheepCluster) -> None:
    """An answer never exceeds the room that was announced: what does not fit is BUFFER_SMALL or INVALID_PARMS."""
    for opcode in (
        Op.READ_VDIS, Op.READ_DEL_VDIS, Op.GET_NODE_LIST, Op.GET_VDI_COPIES, Op.CLUSTER_INFO, Op.STAT, Op.MD_INFO,
        Op.GET_OBJ_LIST, Op.STAT_RECOVERY, Op.GET_LOGLEVEL, Op.GET_RECOVERY, Op.GET_STORE_LIST, Op.STAT_CLUSTER,
    ):  # fmt: skip
        with cluster.connect(0) as connection:
            answer = connection.request(opcode, data_length=3)  # a longer answer raises ProtocolError
            assert len(answer.body) <= 3, opcode


def test_many_idle_and_broken_connections(cluster: SheepCluster) -> None:
    """200 connections that say nothing, or break in the middle of a body, keep nobody from being served."""
    streams = [raw(cluster) for _ in range(200)]
    for stream in streams[::2]:
        stream.sendall(header(Op.WRITE_OBJ, flags=WRITE, length=4096) + bytes(100))
    assert read_all(cluster, "kept")[:MiB] == CONTENT
    for stream in streams[::4]:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    for stream in streams:
        stream.close()


def test_dog_without_a_sheep(port: str) -> None:
    """CLI-5: nobody listens: the address is named, and the exit code is that of the command."""
    for words, code in ((("node", "list"), 2), (("vdi", "read", "x"), 1), (("cluster", "shutdown"), 1)):
        done = subprocess.run(
            run_python("sheepdog_cli.dog", *words, "-p", port), capture_output=True, timeout=60, check=False
        )
        assert done.returncode == code, words
        assert f"failed to connect to 127.0.0.1:{port}: Connection refused" in done.stderr.decode()


def test_dog_while_its_sheep_dies(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """CLI-7: dog ends, and not with 0, when its sheep dies in the middle of a command."""
    cluster = fresh_cluster(2, driver="local", store="plain", redundancy="1")
    cluster.format()
    cluster.dog("vdi", "create", "endless", "1T")
    process = subprocess.Popen(
        run_python("sheepdog_cli.dog", "vdi", "write", "endless", "-p", str(cluster.sheep[0].port)),
        stdin=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    try:
        for _ in range(8):
            process.stdin.write(bytes([1]) * MiB)
        cluster.kill(0)
        with pytest.raises(BrokenPipeError):
            while True:
                process.stdin.write(bytes([1]) * MiB)
        process.stdin = None
        _, text = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode not in (0, -9)
    assert b"Traceback" not in text
    assert b"Failed to write" in text


def test_unformatted_and_gateway_only(fresh_cluster: Callable[..., SheepCluster]) -> None:
    """CLI-5, GW-2: what a cluster that is not formatted, or has no storage, says."""
    cluster = fresh_cluster(1, gateways=1, driver="local", store="plain", redundancy="1")
    refused = cluster.dog("vdi", "create", "x", "4M", check=False)
    assert (refused.returncode, refused.stderr) == (
        1, b"Failed to create VDI x: Waiting for cluster to be formatted\n"
    )  # fmt: skip
    assert cluster.dog("vdi", "list").returncode == 0
    wrong = cluster.dog("cluster", "format", "-b", "nosuch", check=False)
    assert wrong.returncode != 0
    assert b"Targeted backend store is not found" in wrong.stderr or b"nosuch" in wrong.stderr
    cluster.dog("cluster", "format", "-c", "1", "-f", input=b"yes\n")
    refused = cluster.dog("vdi", "create", "x", "4M", check=False)
    assert (refused.returncode, refused.stderr) == (
        1, b"Failed to create VDI x: Failed to write to requested VDI\n"
    )  # fmt: skip
    with cluster.connect(0) as connection:
        wait_until(lambda: admin.current_epoch(connection.request) == 1, "epoch 1")
