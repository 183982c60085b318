"""TLS between a channel and its receiver: the transport's promises hold, and strangers are refused."""

import datetime
import ipaddress
import ssl

import anyio
import pytest

from sheepdog.builtin.tcp import TcpTransport
from sheepdog.builtin.tls import Switch, TlsChannel, TlsTransport
from sheepdog.errors import TransportError
from sheepdog.testing.transport_kit import RecordingReceiver, TransportKit, noise, until


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A certificate for 127.0.0.1 that is its own authority: (certificate file, key file)."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "127.0.0.1")])
    start = datetime.datetime(2020, 1, 1)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(start)
        .not_valid_after(datetime.datetime(2120, 1, 1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    directory = tmp_path_factory.mktemp("tls")
    (directory / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (directory / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(directory / "cert.pem"), str(directory / "key.pem")


@pytest.fixture
def server_context(certificates):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates)
    return context


@pytest.fixture
def client_context(certificates):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certificates[0])
    return context


class TestTls(TransportKit):
    large_bytes = 1024 * 1024
    flood_bytes_max = 32 * 1024 * 1024

    @pytest.fixture
    async def transport(self, anyio_backend, client_context, server_context):
        transport = TlsTransport(TcpTransport(), client_context, server_context)
        yield transport
        await transport.aclose()

    async def test_stranger_is_refused(self, transport, listen_address, server_context):
        """A client that does not trust the certificate gets a TransportError; the server makes no receiver for it."""
        server = await self.serve(transport, listen_address)
        stranger = TlsTransport(TcpTransport(), ssl.create_default_context(), None)

        with anyio.fail_after(10), pytest.raises(TransportError, match="certificate"):
            await stranger.connect(server.address, RecordingReceiver)

        await stranger.aclose()
        await self.connect(transport, server)
        await until(lambda: server.receivers, "the good connection")
        assert len(server.receivers) == 1

    async def test_plain_client_is_refused(self, transport, listen_address):
        """Somebody who does not speak TLS is disconnected and reaches no receiver."""
        server = await self.serve(transport, listen_address)
        plain = TcpTransport()
        client = await self.connect(plain, server)

        client.channel.write([b"GET / HTTP/1.0\r\n\r\n"])

        await until(lambda: client.ended, "the end")
        assert server.receivers == []
        await plain.aclose()

    async def test_cut_off(self, transport, listen_address, client_context):
        """An end without TLS's farewell (somebody cut the stream) is told as an error."""
        server = await self.serve(transport, listen_address)
        tcp = TcpTransport()
        receivers = []

        def accept(channel):
            receivers.append(RecordingReceiver(channel))
            return receivers[0]

        plain = await tcp.connect(
            server.address,
            lambda plain: TlsChannel(plain, client_context, accept, server_side=False, server_hostname="127.0.0.1"),
        )
        await until(lambda: receivers and server.receivers, "the handshake")
        plain.close()

        await until(lambda: server.receivers[0].ended, "the end")
        (error,) = server.receivers[0].errors
        assert isinstance(error, TransportError)
        await tcp.aclose()

    async def test_upgrade_in_mid_stream(self, anyio_backend, listen_address, client_context, server_context):
        """After some plain talk both sides switch to TLS on the same connection."""
        tcp = TcpTransport()
        upgraded = []

        def upgrade(switch, channel, context, **how):
            def accept(tls):
                upgraded.append(RecordingReceiver(tls))
                return upgraded[-1]

            switch.receiver = TlsChannel(channel, context, accept, **how)

        def accept_plain(channel):
            receiver = RecordingReceiver(channel)
            switch = Switch(receiver)

            def starttls(piece):
                channel.write([b"go ahead"])
                upgrade(switch, channel, server_context, server_side=True)

            receiver.on_data = starttls
            return switch

        def make_plain(channel):
            receiver = RecordingReceiver(channel)
            switch = Switch(receiver)

            def go(piece):
                assert piece == b"go ahead"
                upgrade(switch, channel, client_context, server_side=False, server_hostname="127.0.0.1")

            receiver.on_data = go
            return switch

        listener = await tcp.listen(listen_address, accept_plain)
        channel = await tcp.connect(listener.addresses[0], make_plain)
        channel.write([b"starttls?"])
        await until(lambda: len(upgraded) == 2, "both handshakes")

        for receiver in upgraded:
            receiver.channel.write([noise(100_000)])

        await until(lambda: all(len(receiver.data) == 100_000 for receiver in upgraded), "the data")
        assert all(receiver.data == noise(100_000) for receiver in upgraded)
        upgraded[0].channel.close()
        await until(lambda: all(receiver.ended for receiver in upgraded), "the ends")
        assert [receiver.errors for receiver in upgraded] == [[None], [None]]
        await tcp.aclose()
