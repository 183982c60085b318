"""What kazoo does not tell about encrypted connections: files that cannot be used, and why a handshake failed."""

from __future__ import annotations

import socket
import ssl

from sheepdog.api import ConfigError
from sheepdog_cluster_zk.options import ZookeeperOptions

TRY_S = 2.0
REFUSAL_S = 0.5  # with TLS 1.3 a server says only after the handshake that it does not want our certificate


def tls_context(options: ZookeeperOptions) -> ssl.SSLContext | None:
    """As kazoo makes it for every connection; None without ``tls=1``.

    :raises ConfigError: a file cannot be used.
    """
    if not options.tls:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    if not options.verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    try:
        if options.ca:
            context.load_verify_locations(options.ca)
        if options.cert:
            context.load_cert_chain(options.cert, options.key)
    except OSError as error:  # also of a file without a certificate
        files = ", ".join(filter(None, (options.ca, options.cert, options.key)))
        raise ConfigError(f"cannot use the certificate files for zookeeper ({files}): {error}") from error
    return context


def handshake_failure(options: ZookeeperOptions, context: ssl.SSLContext) -> str:
    """Why the first server that can be reached and the two of us do not agree, for the end of a message. Blocks."""
    for server in options.servers:
        host, _, port = server.rpartition(":")
        host = host.strip("[]")
        try:
            with (
                socket.create_connection((host, int(port)), TRY_S) as plain,
                context.wrap_socket(plain, server_hostname=host) as stream,
            ):
                stream.settimeout(REFUSAL_S)
                stream.read(1)
        except ssl.SSLError as error:
            return f": {server} and we do not agree on encryption: {error}"
        except (OSError, ValueError):
            continue
    return ""
