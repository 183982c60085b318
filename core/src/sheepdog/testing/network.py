"""Each sheep of a ``SheepCluster`` on a network of its own, so that a test can cut the wires between them.

Every sheep gets a network namespace with one interface, plugged into a bridge in one more namespace. To cut the cluster
into groups, each group is plugged into a bridge of its own: packets to the others vanish, no interface goes down, and
no process is told, as when a switch dies. Nothing of the host's own network is touched. Clients enter the namespace of
the sheep that they talk to, so they reach it whatever is cut.

Sheep may have a second interface each, as with ``sheep -i``, on a network of its own.

It needs root and the program ``ip``. The local driver meets in a file and does not notice the cut, only the data
traffic does; drivers that meet over the network lose both.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

CLONE_NEWNET = 0x40000000
NAMESPACES = Path("/run/netns")
PREFIX = "10.199.7."
SECOND_PREFIX = "10.199.8."

_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str | None:
    """Why namespaces cannot be made here; ``None`` when they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "no program 'ip' here (Debian: apt-get install iproute2)"
    probe = f"sheep{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False)
    if made.returncode:
        return f"network namespaces are refused here: {made.stderr.decode(errors='replace').strip()}"
    bridge = _ip("-n", probe, "link", "add", "bridge0", "type", "bridge", check=False)
    _ip("netns", "del", probe, check=False)
    return None if bridge.returncode == 0 else "this kernel has no bridges"


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(["ip", *words], capture_output=True, check=False)
    if check and done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.decode(errors='replace').strip()}")
    return done


class Network:
    """The wires of ``count`` sheep. Use it in a ``with`` block, around that of the cluster."""

    def __init__(self, count: int, *, second: bool = False) -> None:
        """:param second: of sheep with two interfaces."""
        self.count = count
        self.second = second
        self._name = f"sheep{os.getpid()}-{next(_numbers)}"
        self._hub = f"{self._name}-hub"
        self._bridges: list[str] = []

    def __enter__(self) -> Network:
        try:
            _ip("netns", "add", self._hub)
            for index in range(self.count):
                inside = self.namespace(index)
                _ip("netns", "add", inside)
                _ip("link", "add", "wire", "netns", inside, "type", "veth",
                    "peer", "name", f"port{index}", "netns", self._hub)  # fmt: skip
                _ip("-n", inside, "address", "add", f"{self.host(index)}/24", "dev", "wire")
                _ip("-n", inside, "link", "set", "lo", "up")
                _ip("-n", inside, "link", "set", "wire", "up")
                _ip("-n", self._hub, "link", "set", f"port{index}", "up")
                if self.second:
                    _ip("link", "add", "second", "netns", inside, "type", "veth",
                        "peer", "name", f"second{index}", "netns", self._hub)  # fmt: skip
                    _ip("-n", inside, "address", "add", f"{self.second_host(index)}/24", "dev", "second")
                    _ip("-n", inside, "link", "set", "second", "up")
                    _ip("-n", self._hub, "link", "set", f"second{index}", "up")
                    _ip("-n", self._hub, "link", "set", f"second{index}", "master", self._bridge("second"))
            self.heal()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """No namespace is left. What still runs inside keeps its own until it ends."""
        for name in (*(self.namespace(index) for index in range(self.count)), self._hub):
            if (NAMESPACES / name).exists():
                _ip("netns", "del", name, check=False)

    def namespace(self, index: int) -> str:
        """Of one sheep."""
        return f"{self._name}-{index}"

    def host(self, index: int) -> str:
        """The address of one sheep."""
        return f"{PREFIX}{index + 1}"

    def second_host(self, index: int) -> str:
        """The address of one sheep's second interface."""
        return f"{SECOND_PREFIX}{index + 1}"

    def cut_second(self, index: int) -> None:
        """No packet passes to or from the second interface of that sheep."""
        _ip("-n", self._hub, "link", "set", f"second{index}", "nomaster")

    def command(self, index: int) -> list[str]:
        """What stands in front of a command that is to run beside the sheep; the process is the command itself."""
        return ["ip", "netns", "exec", self.namespace(index)]

    @contextmanager
    def beside(self, index: int) -> Iterator[None]:
        """Sockets that this thread makes in the block are on the network of that sheep, and stay there."""
        with open("/proc/thread-self/ns/net", "rb") as home, open(NAMESPACES / self.namespace(index), "rb") as place:
            _enter(place.fileno())
            try:
                yield
            finally:
                _enter(home.fileno())

    def split(self, *groups: Sequence[int]) -> None:
        """Only sheep of one group reach each other; who is in none of them reaches nobody."""
        alone = set(range(self.count)).difference(*groups)
        for number, group in enumerate((*groups, *((index,) for index in sorted(alone)))):
            bridge = self._bridge(str(number))
            for index in group:
                _ip("-n", self._hub, "link", "set", f"port{index}", "master", bridge)

    def heal(self) -> None:
        """Everybody reaches everybody."""
        self.split(range(self.count))

    def _bridge(self, label: str) -> str:
        name = f"bridge-{label}"
        if name not in self._bridges:
            _ip("-n", self._hub, "link", "add", name, "type", "bridge", "forward_delay", "0")
            _ip("-n", self._hub, "link", "set", name, "up")
            self._bridges.append(name)
        return name


def _enter(namespace: int) -> None:
    if _libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter a network namespace")
