"""TLS by STARTTLS, with our client and others."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import struct
import subprocess

import pytest

from sheepdog import api
from sheepdog.builtin.tls import TlsChannel
from sheepdog.client.nbd import NbdClient, NbdError
from sheepdog.errors import TransportError

MiB = 1024 * 1024


@pytest.fixture(autouse=True)
def _tls(monkeypatch):
    monkeypatch.setattr(api, "TlsChannel", TlsChannel, raising=False)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A directory with a CA, a server certificate for 127.0.0.1 and a client certificate, named as QEMU wants them."""
    if shutil.which("openssl") is None:
        if os.environ.get("CI"):
            pytest.fail("openssl is not installed")
        pytest.skip("openssl is not installed")
    path = tmp_path_factory.mktemp("pki")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=path, check=True, capture_output=True, timeout=60)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    openssl(
        "req", "-x509", *key, "-keyout", "ca-key.pem", "-out", "ca-cert.pem", "-subj", "/CN=test ca",
        "-addext", "keyUsage=critical,keyCertSign,cRLSign",
    )  # fmt: skip
    for name in ("server", "client"):
        openssl(
            "req", *key, "-keyout", f"{name}-key.pem", "-out", f"{name}.csr", "-subj", f"/CN={name}",
        )  # fmt: skip
        (path / "extensions").write_text(
            "subjectAltName=IP:127.0.0.1,DNS:localhost\nkeyUsage=critical,digitalSignature,keyEncipherment\n"
            f"extendedKeyUsage={name}Auth\nbasicConstraints=critical,CA:FALSE\n"
        )
        openssl(
            "x509", "-req", "-in", f"{name}.csr", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial",
            "-days", "2", "-out", f"{name}-cert.pem", "-extfile", "extensions",
        )  # fmt: skip
    return path


def options(certificates, *more):
    parts = ["127.0.0.1:0", f"tls-cert={certificates}/server-cert.pem", f"tls-key={certificates}/server-key.pem", *more]
    return ",".join(parts)


def client_context(certificates, *, with_certificate=False):
    context = ssl.create_default_context(cafile=str(certificates / "ca-cert.pem"))
    if with_certificate:
        context.load_cert_chain(certificates / "client-cert.pem", certificates / "client-key.pem")
    return context


def test_data_over_tls(serve, volumes, certificates):
    """Everything works behind STARTTLS; large bodies too."""
    address = serve(volumes, options(certificates))

    with NbdClient.connect(address, tls=client_context(certificates)) as client:
        assert client.list_exports()
        client.go("disk")
        data = bytes(range(256)) * 20_000
        client.write(3, data)
        assert client.read(3, len(data)) == data
        assert client.read(0, 16 * MiB)[3:10] == data[:7]
    assert volumes.content("disk")[3 : 3 + len(data)] == data


def test_required_tls_refuses_plain_clients(serve, volumes, certificates):
    """With a certificate TLS is required unless the operator says that it is only on."""
    required = serve(volumes, options(certificates))
    offered = serve(volumes, options(certificates, "tls=on"))

    with NbdClient.connect(required, structured=False) as client:
        with pytest.raises(NbdError, match="TLS"):
            client.list_exports()
    with NbdClient.connect(offered) as client:
        client.go("disk")
        client.write(0, b"plain")
    with NbdClient.connect(offered, tls=client_context(certificates)) as client:
        client.go("disk")
        assert client.read(0, 5) == b"plain"


def test_client_certificates(serve, volumes, certificates):
    """With tls-ca only clients with a certificate of that authority come in."""
    address = serve(volumes, options(certificates, f"tls-ca={certificates}/ca-cert.pem"))

    with pytest.raises((TransportError, ssl.SSLError)):
        with NbdClient.connect(address, tls=client_context(certificates)) as client:
            client.go("disk")
    with NbdClient.connect(address, tls=client_context(certificates, with_certificate=True)) as client:
        client.go("disk")
        client.write(0, b"known")
    assert volumes.content("disk")[:5] == b"known"


def test_server_without_tls_refuses_starttls(serve, volumes, certificates):
    """A client that wants TLS where there is none is told so."""
    address = serve(volumes)

    with pytest.raises(NbdError, match="policy"):
        NbdClient.connect(address, tls=client_context(certificates))


def test_bytes_slipped_in_before_the_handshake(serve, volumes, certificates):
    """Options sent in one packet with STARTTLS could be anybody's: the connection ends."""
    address = serve(volumes, options(certificates))
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as sock:
        sock.recv(18, socket.MSG_WAITALL)
        option = struct.pack(">QII", 0x49484156454F5054, 5, 0)
        sock.sendall(b"\0\0\0\3" + option + struct.pack(">QII", 0x49484156454F5054, 3, 0))

        received = b""
        try:
            while data := sock.recv(4096):
                received += data
        except ConnectionResetError:
            pass
        assert len(received) <= 20


def test_garbage_instead_of_a_handshake(serve, volumes, certificates):
    """A client that talks nonsense after STARTTLS loses its connection, nobody else does."""
    address = serve(volumes, options(certificates))
    host, _, port = address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as sock:
        sock.recv(18, socket.MSG_WAITALL)
        sock.sendall(b"\0\0\0\3" + struct.pack(">QII", 0x49484156454F5054, 5, 0))
        assert len(sock.recv(20, socket.MSG_WAITALL)) == 20
        sock.sendall(b"nonsense" * 100)
        try:
            while sock.recv(4096):
                pass
        except ConnectionResetError:
            pass

    with NbdClient.connect(address, tls=client_context(certificates)) as client:
        client.go("disk")


def test_qemu_over_tls(serve, volumes, certificates):
    """QEMU verifies the server and shows its own certificate."""
    if shutil.which("qemu-io") is None:
        if os.environ.get("CI"):
            pytest.fail("qemu-io is not installed")
        pytest.skip("qemu-io is not installed")
    address = serve(volumes, options(certificates, f"tls-ca={certificates}/ca-cert.pem"))
    host, _, port = address.rpartition(":")

    result = subprocess.run(
        [
            "qemu-io", "--object", f"tls-creds-x509,id=tls0,endpoint=client,dir={certificates},verify-peer=yes",
            "--image-opts", "-c", "write -P 0x5a 0 3M", "-c", "read -P 0x5a 0 3M",
            f"driver=nbd,host={host},port={port},export=disk,tls-creds=tls0",
        ],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
    assert volumes.content("disk")[: 3 * MiB] == b"\x5a" * 3 * MiB
