"""The text after ``raft:``: ``HOST:PORT[,HOST:PORT...][,KEY=VALUE...]``."""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from dataclasses import dataclass, field, replace

from sheepdog.api import ConfigError

DEFAULT_TIMEOUT_MS = 5000
TIMEOUT_MS_MIN = 1000  # an election takes up to 1.4 s
TIMEOUT_MS_MAX = 3_600_000
DEFAULT_VOTERS = 5
VOTERS_MAX = 15
AUTOMATIC = "auto"
NONE = "none"
KEYS = "voters, self, listen, dir, timeout, password-file"


@dataclass(frozen=True, slots=True)
class RaftOptions:
    """Who votes, and whether we do.

    :param peers: addresses of Raft servers. Those of a new cluster list the same ones everywhere; who joins a running
        one may name any of its members.
    :param password: of the encrypted connections.
    :param self_address: ours, ``none`` if it is not in the list, ``auto`` if it is the one that has our host.
    :param directory: where a voter keeps its vote and its log.
    :param timeout_s: after that long without a sign of life a member has left.
    :param voters_max: so many of the peers vote, the first ones; the others follow.
    :param listen: where a sheep that is not in the list answers those who want to join by it.
    :param unlisted_host: ours, if that is why we hold ourselves for none of the list.
    """

    peers: tuple[str, ...]
    password: str = field(repr=False)
    self_address: str = AUTOMATIC
    directory: str | None = None
    timeout_s: float = DEFAULT_TIMEOUT_MS / 1000
    voters_max: int = DEFAULT_VOTERS
    listen: str | None = None
    unlisted_host: str | None = None
    connect_timeout_s: float = 10.0
    """How long a join waits for a leader."""
    election_s: float = 0.4
    """A voter without a leader stands for election after this time to 3.5 times of it."""

    @property
    def voters(self) -> tuple[str, ...]:
        return self.peers[: self.voters_max]

    @property
    def text(self) -> str:
        """The voters, for messages."""
        return ",".join(self.voters)

    @property
    def votes(self) -> bool:
        """Whether we are one of the voters; to be asked of ``placed`` options only."""
        assert self.self_address != AUTOMATIC, "not placed yet"
        return self.self_address in self.voters

    @property
    def answers_at(self) -> str | None:
        """Where we listen, for other voters or for those who want to join by us; to be asked of ``placed`` options."""
        return self.listen if self.self_address == NONE else self.self_address

    def placed(self, host: str) -> RaftOptions:
        """The same for a sheep that announces ``host``: ``self_address`` is an address or ``none``. May ask the DNS.

        One that is not in the list has the port of the first that is: where all sheep have the same command line, all
        of them answer at the same port.

        :raises ConfigError: several peers have that host, we vote and have no directory, or we are in the list and were
            told to listen elsewhere.
        """
        options = self
        if self.self_address == AUTOMATIC:
            mine = [peer for peer in self.peers if is_at(peer, host)]
            if len(mine) > 1:
                raise ConfigError(
                    f"several raft voters are at our address {host}; say which one is this sheep: self={mine[0]}, "
                    "or self=none if it is another"
                )
            if mine:
                options = replace(self, self_address=mine[0])
            else:
                port = self.peers[0].rpartition(":")[2]
                listen = self.listen or f"{host}:{port}"
                options = replace(self, self_address=NONE, listen=listen, unlisted_host=host)
        if options.listen is not None and options.self_address != NONE:
            raise ConfigError(
                f"raft option listen= is for sheep that are not in the list; this one is {options.self_address} and "
                "listens there"
            )
        if options.votes and options.directory is None:
            raise ConfigError("a raft voter needs a directory for its vote and its log; say dir=PATH")
        return options

    @classmethod
    def parse(cls, text: str, directory: str | None = None) -> RaftOptions:
        """The options that ``text`` states.

        :param directory: for ``dir=``, if it is not given.
        :raises ConfigError: no voter, ``self`` is none of them, a bad number, an unknown key, or no password.
        """
        peers: list[str] = []
        values: dict[str, str] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = part.partition("=")
            if equals:
                values[key] = value
            elif values:
                raise ConfigError(f"raft voter {part!r} must stand before the options")
            else:
                peers.append(_address(part))
        if not peers:
            raise ConfigError("no raft voter given; say -c raft:HOST:PORT,HOST:PORT,HOST:PORT,password-file=PATH")
        if len(set(peers)) != len(peers):
            raise ConfigError("a raft voter is given twice")
        timeout_ms = _number(values, "timeout", DEFAULT_TIMEOUT_MS, TIMEOUT_MS_MIN, TIMEOUT_MS_MAX, " milliseconds")
        voters_max = _number(values, "voters", DEFAULT_VOTERS, 1, VOTERS_MAX, "")
        self_address = values.pop("self", AUTOMATIC)
        if self_address not in (AUTOMATIC, NONE):
            self_address = _address(self_address)
        if self_address not in (*peers, AUTOMATIC, NONE):
            raise ConfigError(f"raft option self={self_address} is none of the voters {','.join(peers)}")
        listen = _address(values.pop("listen")) if "listen" in values else None
        directory = values.pop("dir", directory)
        secret = values.pop("password-file", None)
        if values:
            raise ConfigError(f"unknown raft option {min(values)!r}; known: {KEYS}")
        if secret is None:
            # The library unpickles what it receives: without a secret, whoever reaches the port could run code here.
            raise ConfigError(
                "raft wants password-file=PATH, a file with the same secret on every sheep; one is made with: "
                "head -c 32 /dev/urandom | base64 >PATH; chmod 600 PATH"
            )
        return cls(
            tuple(peers),
            _first_line(secret),
            self_address,
            os.path.abspath(directory) if directory is not None else None,
            timeout_ms / 1000,
            voters_max,
            listen,
        )


def _number(values: dict[str, str], key: str, default: int, least: int, most: int, unit: str) -> int:
    text = values.pop(key, str(default))
    number = int(text) if text.isascii() and text.isdigit() else -1
    if not least <= number <= most:
        raise ConfigError(f"invalid raft {key} {text!r}:{unit} from {least} to {most} are allowed")
    return number


def _address(text: str) -> str:
    """As the library takes it: without the brackets of an IPv6 address."""
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise ConfigError(f"invalid raft address {text!r}; HOST:PORT is expected")
    return f"{host}:{port}"


def is_at(voter: str, host: str) -> bool:
    """Whether the voter has that host. May ask the DNS."""
    name = voter.rpartition(":")[0]
    with suppress(ValueError):
        return ipaddress.ip_address(name) == ipaddress.ip_address(host)
    with suppress(OSError, UnicodeError):
        return host in {found[4][0] for found in socket.getaddrinfo(name, None)}
    return False


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            password = file.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read raft password file {path}: {error}") from error
    if not password:
        raise ConfigError(f"raft password file {path} is empty")
    return password
