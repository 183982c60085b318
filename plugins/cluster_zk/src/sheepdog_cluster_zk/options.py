"""The text after ``zookeeper:``: ``HOST:PORT[,HOST:PORT...][/CLUSTERID][,KEY=VALUE...]``."""

from __future__ import annotations

from dataclasses import dataclass

from sheepdog.api import ConfigError

DEFAULT_ROOT = "/sheepdog"
DEFAULT_TIMEOUT_MS = 30_000
TIMEOUT_MS_MIN = 100
TIMEOUT_MS_MAX = 3_600_000
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

        :raises ConfigError: no server, a bad timeout, an unknown key, options that need others, or an
            unreadable auth file.
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
                servers.append(server)
                if slash:
                    root = "/" + path.strip("/")
        if not servers or not all(servers):
            raise ConfigError("You must specify zookeeper servers.")
        if root == "/":
            raise ConfigError("the cluster id after the zookeeper servers is empty; give a path such as /sheepdog")
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
            tuple(server if _has_port(server) else f"{server}:2181" for server in servers),
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


def _has_port(server: str) -> bool:
    return ":" in server.rpartition("]")[2]


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
