"""Clients of other projects, as processes, over real sockets."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import threading

import pytest

from sheepdog.client.nbd import NbdClient, NbdError
from sheepdog.errors import TransportError
from sheepdog.testing.memory_volumes import MemoryVolumes

MiB = 1024 * 1024
KiB = 1024


def run(program, *arguments, ok=True):
    """The program ran and (if ``ok``) succeeded; returns what it printed."""
    if shutil.which(program) is None:
        if os.environ.get("CI"):
            pytest.fail(f"{program} is not installed")
        pytest.skip(f"{program} is not installed")
    result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=90, check=False)
    if ok:
        assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout + result.stderr


@pytest.fixture
def volumes():
    volumes = MemoryVolumes()
    volumes.create("disk", 64 * MiB)
    return volumes


@pytest.fixture(params=["tcp", "unix"])
def address(request, serve, volumes, tmp_path):
    return serve(volumes, "127.0.0.1:0" if request.param == "tcp" else f"unix:{tmp_path}/nbd.sock")


def uri(address, name="disk"):
    if address.startswith("unix:"):
        return f"nbd+unix:///{name}?socket={address.removeprefix('unix:')}"
    return f"nbd://{address}/{name}"


@pytest.fixture
def image(tmp_path):
    """A raw image with data, zeros and a hole."""
    path = tmp_path / "image.raw"
    generator = random.Random(5)
    with path.open("wb") as file:
        file.write(generator.randbytes(3 * MiB + 777))
        file.seek(20 * MiB)
        file.write(generator.randbytes(5 * MiB))
        file.truncate(64 * MiB)
    return path


def test_qemu_img_converts_in_and_out(address, volumes, image, tmp_path):
    """qemu-img writes an image into a volume and reads the same image back; holes stay holes."""
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(image), uri(address))
    assert volumes.content("disk") == image.read_bytes()

    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(image), uri(address))
    back = tmp_path / "back.raw"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", uri(address), str(back))
    assert back.read_bytes() == image.read_bytes()
    pieces = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri(address)))
    assert [(piece["start"], piece["length"], piece["data"]) for piece in pieces] == [
        (0, 4 * MiB, True), (4 * MiB, 16 * MiB, False), (20 * MiB, 8 * MiB, True), (28 * MiB, 36 * MiB, False),
    ]  # fmt: skip


def test_qemu_io_commands(address, volumes):
    """Writes with FUA, zeroes with and without unmapping, discards and reads by pattern."""
    run(
        "qemu-io", "-f", "raw", "-d", "unmap",
        "-c", "write -P 0xab 0 12M", "-c", "write -f -P 0x11 100 1000", "-c", "write -z 4M 64k",
        "-c", "write -z -u 8M 4M", "-c", "flush", "-c", "read -P 0xab 0 100", "-c", "read -P 0x11 100 1000",
        "-c", "read -P 0 4M 64k", "-c", "read -P 0xab 4259840 4128768", "-c", "read -P 0 8M 4M",
        "-c", "discard 0 4M", "-c", "read -P 0 0 4M",
        uri(address),
    )  # fmt: skip
    assert volumes.unflushed("disk") == 0
    assert volumes.content("disk")[4259840 : 8 * MiB] == b"\xab" * 4128768
    output = run("qemu-io", "-f", "raw", "-c", "read -P 1 0 512", uri(address), ok=False)
    assert "Pattern verification failed" in output


def test_qemu_img_bench(address):
    """Many requests in flight: reads and writes with flushes."""
    run("qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "32", "-s", "4096", uri(address))
    run("qemu-img", "bench", "-f", "raw", "-w", "-c", "2000", "-d", "32", "--flush-interval", "200", uri(address))
    run("qemu-img", "bench", "-f", "raw", "-w", "-c", "60", "-d", "8", "-s", "1M", "-S", "1M", uri(address))


def test_nbdinfo_sees_everything(address, volumes):
    """libnbd lists the exports with their sizes, abilities, contexts and block sizes."""
    volumes.snapshot("disk", "monday")

    listed = json.loads(run("nbdinfo", "--json", "--list", uri(address, "")))
    exports = {export["export-name"]: export for export in listed["exports"]}

    assert set(exports) == {"disk", "disk@monday"}
    disk, frozen = exports["disk"], exports["disk@monday"]
    assert (disk["export-size"], disk["is_read_only"], frozen["is_read_only"]) == (64 * MiB, False, True)
    assert disk["contexts"] == ["base:allocation"]
    for what in ("can_fua", "can_flush", "can_trim", "can_zero", "can_cache", "can_multi_conn", "can_df"):
        assert disk[what], what
    assert [disk[f"block_size_{what}"] for what in ("minimum", "preferred", "maximum")] == [1, 4096, 32 * MiB]


def test_nbdinfo_map(address, volumes):
    """libnbd's map of an export shows what is allocated."""
    with NbdClient.connect(address) as client:
        client.go("disk")
        client.write(9 * MiB, b"x")

    pieces = json.loads(run("nbdinfo", "--map", "--json", uri(address)))
    assert [(piece["offset"], piece["length"], piece["type"]) for piece in pieces] == [
        (0, 8 * MiB, 3), (8 * MiB, 4 * MiB, 0), (12 * MiB, 52 * MiB, 3),
    ]  # fmt: skip


def test_nbdcopy_over_several_connections(address, volumes, image, tmp_path):
    """nbdcopy uses several connections to one export, in both directions."""
    run("nbdcopy", "--connections=4", "--flush", str(image), uri(address))
    assert volumes.content("disk") == image.read_bytes()

    back = tmp_path / "back.raw"
    run("nbdcopy", "--connections=4", uri(address), str(back))
    assert back.read_bytes() == image.read_bytes()


def test_snapshot_cannot_be_written_by_qemu(address, volumes):
    """QEMU reads a snapshot and is refused when it wants to write."""
    volumes.snapshot("disk", "monday")

    run("qemu-io", "-r", "-f", "raw", "-c", "read -P 0 0 1M", uri(address, "disk@monday"))
    output = run("qemu-io", "-f", "raw", "-c", "write 0 512", uri(address, "disk@monday"), ok=False)
    assert "read-only" in output or "not permitted" in output or "Permission" in output, output


def test_unknown_export_is_refused(address):
    """A client is told that there is no such export."""
    output = run("qemu-img", "info", uri(address, "no-such"), ok=False)
    assert "no VDI" in output or "not available" in output, output


def test_fio_verifies_what_it_wrote(address, tmp_path):
    """Random writes of mixed sizes at depth 16, verified by checksum."""
    job = tmp_path / "job.fio"
    job.write_text(
        "[nbd]\nioengine=nbd\nuri=" + uri(address) + "\nrw=randwrite\nbsrange=512-128k\nio_size=16m\n"
        "size=32m\niodepth=16\nverify=crc32c\ndo_verify=1\nverify_fatal=1\nverify_state_save=0\nrandseed=1\n"
    )
    output = run("fio", "--enghelp")
    if "nbd" not in output.split():
        pytest.skip("this fio has no nbd engine")
    run("fio", str(job))


# ---- our own client


def test_own_client_does_it_all(address, volumes):
    """Every call of our client, on one connection."""
    with NbdClient.connect(address) as client:
        assert [name for name, _ in client.list_exports()] == ["disk"]
        assert client.query("disk").size_bytes == 64 * MiB
        with pytest.raises(NbdError, match="no such export"):
            client.go("nothing")
        info = client.go("disk")
        assert (info.block_bytes, info.read_only) == ((1, 4096, 32 * MiB), False)
        data = random.Random(1).randbytes(40 * MiB)
        client.write(5, data, fua=True)
        assert client.read(5, len(data)) == data
        assert client.read(63 * MiB, MiB) == bytes(MiB)
        client.flush()
        client.write_zeroes(4 * MiB, 4 * MiB)
        client.trim(8 * MiB, 4 * MiB, fua=True)
        client.cache(0, MiB)
        with pytest.raises(NbdError) as refused:
            client.write_zeroes(1, 10, fast=True)
        assert refused.value.errno == 95
        assert client.read(4 * MiB, 8 * MiB) == bytes(8 * MiB)
        assert client.block_status(0, 64 * MiB, one=True) == [(4 * MiB, 0)]
        assert client.map() == [
            (0, 4 * MiB, 0), (4 * MiB, 8 * MiB, 3), (12 * MiB, 32 * MiB, 0), (44 * MiB, 20 * MiB, 3),
        ]  # fmt: skip
        assert client.read(0, 0) == b""
        with pytest.raises(NbdError) as refused:
            client.read(64 * MiB, 1)
        assert refused.value.errno == 22


def test_own_client_without_structured_replies(address):
    """Simple replies carry data too; block status is not there."""
    with NbdClient.connect(address, structured=False) as client:
        client.go("disk")
        client.write(0, b"abc")
        assert client.read(0, 5) == b"abc\0\0"
        with pytest.raises(NbdError):
            client.block_status(0, 512)
        with pytest.raises(NbdError) as refused:
            client.write(64 * MiB, b"x")
        assert refused.value.errno == 28


def test_connections_are_bounded(serve, volumes):
    """One client too many is disconnected; when another leaves there is room again."""
    address = serve(volumes, "127.0.0.1:0,max-connections=2")
    first = NbdClient.connect(address)
    second = NbdClient.connect(address)

    with pytest.raises(TransportError):
        NbdClient.connect(address)
    first.disconnect()
    deadline = threading.Event()
    for _ in range(500):
        try:
            third = NbdClient.connect(address)
            break
        except TransportError:
            deadline.wait(0.01)
    else:
        pytest.fail("no room again")
    third.disconnect()
    second.disconnect()


def test_no_server_is_a_transport_error(tmp_path):
    """Nobody there is a TransportError; a server of something else a ProtocolError is not waited for."""
    with pytest.raises(TransportError):
        NbdClient.connect(f"unix:{tmp_path}/nobody")
    with pytest.raises(TransportError):
        NbdClient.connect("not an address")
