"""The text after ``zookeeper:``: ``HOST:PORT[,HOST:PORT...][/CLUSTERID][,KEY=VALUE...]``."""

from __future__ import annotations

from dataclasses import dataclass

from sheepdog.api import ConfigError

DEFAULT_ROOT = "/sheepdog"
DEFAULT_PORT = 2181
DEFAULT_TIMEOUT_MS = 30_000
TIMEOUT_MS_MIN = 100
TIMEOUT_MS_MAX = 3_600_000
NO_SERVERS = "You must specify zookeeper servers."
KEYS = "timeout, auth, auth-file, tls, ca, cert, key, verify"


@dataclass(frozen=True, slots=True)
class ZookeeperOptions:
    """Where the ensemble is, and how we show who we are.

    :param servers: ``host:port`` each.
    :param root: path under which everything of the cluster lives.
    :param timeout_s: session time that we ask for; the ensemble may grant less or more.
    :param auth: ``user:password`` of the digest scheme; then nobody else can touch what we create.
    :param tls: the connection is encrypted.
    """

    servers: tuple[str, ...]
    root: str = DEFAULT_ROOT
    timeout_s: float = DEFAULT_TIMEOUT_MS / 1000
    auth: str | None = None
    tls: bool = False
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    verify: bool = True
    collect_interval: int = 100
    """Entries of the queue between two removals of what everybody has read."""
    connect_timeout_s: float = 10.0
    """How long a join tries to reach the ensemble."""

    @property
    def hosts(self) -> str:
        return ",".join(self.servers)

    @classmethod
    def parse(cls, text: str) -> ZookeeperOptions:
        """The options that ``text`` states.

        :raises ConfigError: no server or a bad one, a path that cannot be, a bad timeout, an unknown key, options that
            need others, or an unreadable auth file.
        """
        servers: list[str] = []
        root = DEFAULT_ROOT
        values: dict[str, str] = {}
        for part in filter(None, (part.strip() for part in text.split(","))):
            key, equals, value = part.partition("=")
            if equals and "/" not in key:
                values[key] = value
            elif values:
                raise ConfigError(f"zookeeper server {part!r} must stand before the options")
            else:
                server, slash, path = part.partition("/")
                if not server:
                    raise ConfigError(NO_SERVERS)
                servers.append(_server(server))
                if slash:
                    root = _root(path)
        if not servers:
            raise ConfigError(NO_SERVERS)
        timeout_ms = DEFAULT_TIMEOUT_MS
        if "timeout" in values:
            text = values.pop("timeout")
            timeout_ms = int(text) if text.isascii() and text.isdigit() else -1
            if not TIMEOUT_MS_MIN <= timeout_ms <= TIMEOUT_MS_MAX:
                raise ConfigError(
                    f"Invalid parameter for timeout: {text!r}; "
                    f"milliseconds from {TIMEOUT_MS_MIN} to {TIMEOUT_MS_MAX} are allowed"
                )
        auth = values.pop("auth", None)
        if "auth-file" in values:
            auth = _first_line(values.pop("auth-file"))
        if auth is not None and ":" not in auth:
            raise ConfigError("zookeeper auth must be user:password")
        options = cls(
            tuple(servers),
            root,
            timeout_ms / 1000,
            auth,
            _flag(values, "tls", False),
            values.pop("ca", None),
            values.pop("cert", None),
            values.pop("key", None),
            _flag(values, "verify", True),
        )
        if not options.tls and (options.ca or options.cert or options.key or not options.verify):
            raise ConfigError("zookeeper options ca=, cert=, key= and verify= are for encrypted connections; say tls=1")
        if (options.cert is None) != (options.key is None):
            raise ConfigError("zookeeper options cert= and key= are given together")
        if values:
            raise ConfigError(f"unknown zookeeper option {min(values)!r}; known: {KEYS}")
        return options


def _server(text: str) -> str:
    """With its port."""
    has_port = ":" in text.rpartition("]")[2]
    host, _, port = (text if has_port else f"{text}:{DEFAULT_PORT}").rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    number = int(port) if port.isascii() and port.isdigit() else 0
    if not host.strip("[]") or (":" in host and not bracketed) or not 0 < number < 65536:
        raise ConfigError(f"invalid zookeeper server {text!r}; HOST[:PORT] is expected")
    return f"{host}:{number}"


def _root(path: str) -> str:
    parts = [part for part in path.split("/") if part]
    if not parts:
        raise ConfigError("the cluster id after the zookeeper servers is empty; give a path such as /sheepdog")
    if parts[0] == "zookeeper" or any(part in (".", "..") or not part.isprintable() for part in parts):
        raise ConfigError(f"the cluster id /{path} cannot be a path of zookeeper; give one such as /sheepdog")
    return "/" + "/".join(parts)


def _flag(values: dict[str, str], key: str, default: bool) -> bool:
    text = values.pop(key, "1" if default else "0")
    if text not in ("0", "1"):
        raise ConfigError(f"zookeeper option {key} is 0 or 1, not {text!r}")
    return text == "1"


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read zookeeper auth file {path}: {error}") from error
