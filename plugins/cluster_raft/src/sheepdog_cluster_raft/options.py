"""The text after ``raft:``: ``HOST:PORT[,HOST:PORT...][,KEY=VALUE...]``."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

from sheepdog.api import ConfigError

DEFAULT_TIMEOUT_MS = 5000
TIMEOUT_MS_MIN = 1000  # an election takes up to 1.4 s
TIMEOUT_MS_MAX = 3_600_000
KEYS = "self, dir, timeout, password-file"


@dataclass(frozen=True, slots=True)
class RaftOptions:
    """Who votes, and whether we do.

    :param voters: addresses of the Raft servers; the same list everywhere.
    :param self_address: ours, if we are one of them; otherwise we follow.
    :param directory: where a voter keeps its vote and its log.
    :param timeout_s: after that long without a sign of life a member has left.
    :param password: of the encrypted connections.
    """

    voters: tuple[str, ...]
    self_address: str | None = None
    directory: str | None = None
    timeout_s: float = DEFAULT_TIMEOUT_MS / 1000
    password: str | None = None
    connect_timeout_s: float = 10.0
    """How long a join waits for a leader."""
    election_s: float = 0.4
    """A voter without a leader stands for election after this time to 3.5 times of it."""

    @property
    def text(self) -> str:
        """The voters, for messages."""
        return ",".join(self.voters)

    @classmethod
    def parse(cls, text: str) -> RaftOptions:
        """The options that ``text`` states.

        :raises ConfigError: no voter, ``self`` is none of them, a voter without ``dir``, a bad timeout, an unknown key,
            or connections that leave this host without a password.
        """
        voters: list[str] = []
        values: dict[str, str] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = part.partition("=")
            if equals:
                values[key] = value
            elif values:
                raise ConfigError(f"raft voter {part!r} must stand before the options")
            else:
                voters.append(_address(part))
        if not voters:
            raise ConfigError(
                "no raft voter given; say -c raft:HOST:PORT,HOST:PORT,HOST:PORT[,self=HOST:PORT,dir=PATH]"
            )
        if len(set(voters)) != len(voters):
            raise ConfigError("a raft voter is given twice")
        timeout_text = values.pop("timeout", str(DEFAULT_TIMEOUT_MS))
        timeout_ms = int(timeout_text) if timeout_text.isascii() and timeout_text.isdigit() else 0
        if not TIMEOUT_MS_MIN <= timeout_ms <= TIMEOUT_MS_MAX:
            raise ConfigError(
                f"invalid raft timeout {timeout_text!r}: milliseconds from {TIMEOUT_MS_MIN} to {TIMEOUT_MS_MAX} "
                "are allowed"
            )
        self_address = values.pop("self", None)
        directory = values.pop("dir", None)
        if self_address is not None and self_address not in voters:
            raise ConfigError(f"raft option self={self_address} is none of the voters {','.join(voters)}")
        if (self_address is None) != (directory is None):
            raise ConfigError("a raft voter wants self= and dir=, a follower neither of them")
        password = None
        if "password-file" in values:
            password = _first_line(values.pop("password-file"))
        if values:
            raise ConfigError(f"unknown raft option {min(values)!r}; known: {KEYS}")
        if password is None and not all(_is_loopback(voter) for voter in voters):
            # The library unpickles what it receives: whoever reaches the port could run code.
            raise ConfigError("raft voters beyond this host want password-file=, the same password everywhere")
        return cls(
            tuple(voters),
            self_address,
            os.path.abspath(directory) if directory is not None else None,
            timeout_ms / 1000,
            password,
        )


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"invalid raft voter {text!r}; HOST:PORT is expected")
    return text


def _is_loopback(voter: str) -> bool:
    host = voter.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            password = file.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read raft password file {path}: {error}") from error
    if not password:
        raise ConfigError(f"raft password file {path} is empty")
    return password
