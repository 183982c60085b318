"""What the operator writes: ``[host:]port`` or ``unix:PATH``, then settings after commas."""

from __future__ import annotations

import ssl
from dataclasses import dataclass

from sheepdog.api import ConfigError

CONNECTIONS_MAX = 256
_USAGE = (
    "write [host:]port or unix:PATH, then any of tls-cert=FILE, tls-key=FILE, tls-ca=FILE, tls=require|on, "
    "max-connections=N, read-only"
)


@dataclass(frozen=True, slots=True)
class Options:
    """Settings of one server.

    :param address: as transports write it; an empty host is every interface.
    :param tls: certificates, ``None`` without TLS.
    :param tls_required: clients without TLS are refused.
    :param connections_max: at once; more are closed as soon as they come.
    """

    address: str
    tls: ssl.SSLContext | None = None
    tls_required: bool = False
    connections_max: int = CONNECTIONS_MAX
    read_only: bool = False


def parse(text: str) -> Options:
    """The settings, certificates loaded.

    :raises ConfigError: not understood, or a file cannot be used.
    """
    address, *settings = text.split(",")
    given: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if key not in ("tls-cert", "tls-key", "tls-ca", "tls", "max-connections", "read-only"):
            raise ConfigError(f"nbd: unknown setting {setting!r}; {_USAGE}")
        if key in given:
            raise ConfigError(f"nbd: {key} is set twice")
        if bool(equals) == (key == "read-only") or (equals and not value):
            raise ConfigError(f"nbd: {setting!r} makes no sense; {_USAGE}")
        given[key] = value
    mode = given.get("tls", "require" if "tls-cert" in given else "off")
    if mode not in ("require", "on") and "tls" in given:
        raise ConfigError(f"nbd: tls={mode}: require or on")
    context = _tls_context(given) if mode != "off" else None
    if context is None and (unused := given.keys() & {"tls-key", "tls-ca"}):
        raise ConfigError(f"nbd: {min(unused)} needs tls-cert")
    return Options(
        address=_address(address),
        tls=context,
        tls_required=mode == "require",
        connections_max=_connections(given.get("max-connections", str(CONNECTIONS_MAX))),
        read_only="read-only" in given,
    )


def _address(text: str) -> str:
    if text.startswith("unix:"):
        if text == "unix:":
            raise ConfigError(f"nbd: unix: without a path; {_USAGE}")
        return text
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) <= 0xFFFF):
        raise ConfigError(f"nbd: {text!r} is no address; {_USAGE}")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ConfigError(f"nbd: {text!r}: an IPv6 address is written [address]:port")
    return f"{host}:{port}"


def _connections(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 100_000):
        raise ConfigError(f"nbd: max-connections={text}: a number from 1 to 100000")
    return int(text)


def _tls_context(given: dict[str, str]) -> ssl.SSLContext:
    if "tls-cert" not in given or "tls-key" not in given:
        raise ConfigError("nbd: TLS needs tls-cert=FILE and tls-key=FILE")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(given["tls-cert"], given["tls-key"])
        if "tls-ca" in given:
            context.load_verify_locations(given["tls-ca"])
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"nbd: the certificate files cannot be used: {error}") from error
    return context
