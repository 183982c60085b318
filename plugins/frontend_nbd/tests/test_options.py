"""What the operator may write."""

from __future__ import annotations

import pytest

from sheepdog.api import ConfigError
from sheepdog_frontend_nbd.options import parse


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10809", ":10809"),
        (":10809", ":10809"),
        ("127.0.0.1:0", "127.0.0.1:0"),
        ("[::1]:10809", "[::1]:10809"),
        ("host.example:1", "host.example:1"),
        ("unix:/run/nbd.sock", "unix:/run/nbd.sock"),
    ],
)
def test_addresses(text, address):
    """An address comes out as transports write it."""
    assert parse(text).address == address


def test_settings():
    """Settings follow the address after commas; what is not set has a default."""
    options = parse("1,read-only,max-connections=3")
    assert (options.read_only, options.connections_max, options.tls, options.tls_required) == (True, 3, None, False)
    assert parse("1").connections_max == 256


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no address"),
        ("host", "no address"),
        ("1,colour=blue", "unknown setting 'colour=blue'"),
        ("1,max-connections=", "makes no sense"),
        ("1,tls=perhaps", "require or on"),
        ("1,tls=on", "tls-cert=FILE and tls-key=FILE"),
        ("1,tls-key=x", "needs tls-cert"),
        ("1,tls-cert=/no,tls-key=/no", "cannot be used"),
        ("1,read-only,read-only", "twice"),
    ],
)
def test_complaints_say_what_to_change(text, complaint):
    """What cannot be understood is a ConfigError that names it."""
    with pytest.raises(ConfigError, match=complaint):
        parse(text)
