"""The text after ``etcd:``: ``HOST:PORT[,HOST:PORT...][/PREFIX][,KEY=VALUE...]``."""

from __future__ import annotations

from dataclasses import dataclass

from sheepdog.api import ConfigError

DEFAULT_PREFIX = "/sheepdog"
DEFAULT_PORT = 2379
DEFAULT_TTL_S = 10
TTL_S_MAX = 3600
KEYS = "ttl, user, password-file, ca, cert, key"


@dataclass(frozen=True, slots=True)
class EtcdOptions:
    """Where etcd is, and how we show who we are.

    :param endpoints: (host, port) each.
    :param prefix: of all keys of the cluster.
    :param ttl_s: whole seconds after which a silent member has left; etcd may grant more.
    :param ca: file with the certificates that we trust; makes the connection encrypted.
    """

    endpoints: tuple[tuple[str, int], ...]
    prefix: str = DEFAULT_PREFIX
    ttl_s: int = DEFAULT_TTL_S
    user: str | None = None
    password: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    connect_timeout_s: float = 10.0
    """How long a join tries to reach etcd."""

    @property
    def text(self) -> str:
        """The endpoints, for messages."""
        return ",".join(f"{host}:{port}" for host, port in self.endpoints)

    @classmethod
    def parse(cls, text: str) -> EtcdOptions:
        """The options that ``text`` states.

        :raises ConfigError: no endpoint, a bad port or ttl, an unknown key, an unreadable password file.
        """
        endpoints: list[tuple[str, int]] = []
        prefix = DEFAULT_PREFIX
        values: dict[str, str] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = part.partition("=")
            if equals and "/" not in key:
                values[key] = value
            elif values:
                raise ConfigError(f"etcd endpoint {part!r} must stand before the options")
            else:
                address, slash, path = part.partition("/")
                endpoints.append(_endpoint(address))
                if slash:
                    prefix = "/" + path.strip("/")
        if not endpoints:
            raise ConfigError("no etcd endpoint given; say -c etcd:HOST:PORT[,HOST:PORT...][/PREFIX]")
        if prefix == "/":
            raise ConfigError("the prefix after the etcd endpoints is empty; give one such as /sheepdog")
        ttl_text = values.pop("ttl", str(DEFAULT_TTL_S))
        ttl_s = int(ttl_text) if ttl_text.isascii() and ttl_text.isdigit() else 0
        if not 1 <= ttl_s <= TTL_S_MAX:
            raise ConfigError(f"invalid etcd ttl {ttl_text!r}: whole seconds from 1 to {TTL_S_MAX} are allowed")
        user = values.pop("user", None)
        password = None
        if "password-file" in values:
            password = _first_line(values.pop("password-file"))
        if (user is None) != (password is None):
            raise ConfigError("etcd wants both user= and password-file=, or neither")
        if user is not None and "ca" not in values:
            raise ConfigError("etcd options user= and password-file= want an encrypted connection: give ca= as well")
        options = cls(
            tuple(endpoints),
            prefix,
            ttl_s,
            user,
            password,
            values.pop("ca", None),
            values.pop("cert", None),
            values.pop("key", None),
        )
        if values:
            raise ConfigError(f"unknown etcd option {min(values)!r}; known: {KEYS}")
        if (options.cert or options.key) and not (options.ca and options.cert and options.key):
            raise ConfigError("etcd options cert= and key= are given together, and with ca=")
        return options


def _endpoint(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):  # no port; perhaps [v6]
        host, port = text, str(DEFAULT_PORT)
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"invalid etcd endpoint {text!r}; HOST:PORT is expected")
    return host, int(port)


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read etcd password file {path}: {error}") from error
