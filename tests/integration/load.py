"""Guests that write, remember every acknowledged byte, and check all of it through every gateway.

Each guest has a volume of its own, as a virtual machine has, and talks to one gateway until that one breaks or falls
silent; then it closes the connection, goes to another gateway and sends again what was not acknowledged. What it reads
while it works must be what was acknowledged last, from its own gateway and from any other.

A write that ended without an acknowledgement leaves its sectors *uncertain*: each holds the old or the new bytes, the
same ones for whoever asks, until a later write to it is acknowledged.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Sequence

from scenes import KiB, LiveClient, MiB, volume

from sheepdog.client.volume import ObjectWriteError
from sheepdog.errors import SheepdogError, TransportError
from sheepdog.testing.cluster import SheepCluster, wait_until
from sheepdog.wire.results import Result

SECTOR = 512
ANSWER_S = 60.0  # a gateway that is silent for so long is given up
HANG_S = 120.0


class Content:
    """What a volume holds by what was acknowledged."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self._uncertain: dict[int, set[bytes]] = {}  # sector -> what it may hold as well

    def __len__(self) -> int:
        return len(self.data)

    def acknowledged(self, offset: int, data: bytes) -> None:
        """The range, of whole sectors, holds ``data``."""
        self.data[offset : offset + len(data)] = data
        for sector in range(offset // SECTOR, (offset + len(data)) // SECTOR):
            self._uncertain.pop(sector, None)

    def doubtful(self, offset: int, data: bytes) -> None:
        """The range may hold ``data``, or what it held, sector by sector."""
        for at in range(0, len(data), SECTOR):
            self._uncertain.setdefault((offset + at) // SECTOR, set()).add(data[at : at + SECTOR])

    def wrong(self, offset: int, found: bytes) -> list[int]:
        """The sectors that hold what they cannot hold."""
        if found == self.data[offset : offset + len(found)]:
            return []
        return [
            sector
            for sector in range(offset // SECTOR, (offset + len(found)) // SECTOR)
            if (part := found[sector * SECTOR - offset :][:SECTOR]) != self.data[sector * SECTOR :][:SECTOR]
            and part not in self._uncertain.get(sector, ())
        ]


class Guest:
    """One volume and the one who writes to it. ``step`` is called by one thread.

    :param node: the gateway that it begins with.
    :param answer_s: a gateway that is silent for so long is given up.
    """

    def __init__(
        self, cluster: SheepCluster, name: str, size: int, *, node: int, answer_s: float = ANSWER_S, seed: object = 0
    ) -> None:
        self.name = name
        self.answer_s = answer_s
        self._cluster = cluster
        self._random = random.Random(f"{seed}/{name}")
        with_node = cluster.live[node % len(cluster.live)].index
        cluster.dog("vdi", "create", name, str(size), node=with_node)
        self.content = Content(bytes(size))
        self._client = LiveClient(cluster, name, node=with_node, answer_s=answer_s)
        self.node = with_node
        self.writes = 0
        self.moves = 0
        self.refused: list[int] = []  # results of writes that failed for good
        self.slowest_s = 0.0
        self.stopping = threading.Event()
        self._write(0, self._random.randbytes(size))

    def step(self) -> None:
        """A write, and now and then a read of something written before."""
        length = SECTOR * self._random.choice((1, 1, 8, 8, 8, 16, 128))
        offset = SECTOR * self._random.randrange((len(self.content) - length) // SECTOR + 1)
        self._write(offset, self._random.randbytes(length))
        chance = self._random.random()
        if chance < 0.2:
            self._look(offset, length)
        elif chance < 0.4:
            length = 64 * KiB
            offset = SECTOR * self._random.randrange((len(self.content) - length) // SECTOR + 1)
            self._look(offset, length)

    def _write(self, offset: int, data: bytes) -> None:
        begun = time.monotonic()
        while True:
            try:
                self._client.write(offset, data)
            except ObjectWriteError as error:
                self.refused.append(error.result)
                self.content.doubtful(offset, data)
                return
            except (TransportError, SheepdogError, OSError):
                if not self._move():
                    self.content.doubtful(offset, data)
                    return
            else:
                break
        self.content.acknowledged(offset, data)
        self.writes += 1
        self.slowest_s = max(self.slowest_s, time.monotonic() - begun)

    def _move(self) -> bool:
        """Talks to another gateway, or gives up because it is told to stop."""
        self.moves += 1
        self._client.close()
        deadline = time.monotonic() + HANG_S
        while not self.stopping.is_set():
            others = [sheep.index for sheep in self._cluster.live if sheep.index != self.node]
            for node in self._random.sample(others, len(others)) or [self.node]:
                try:
                    self._client = LiveClient(self._cluster, self.name, node=node, answer_s=self.answer_s)
                except (SheepdogError, OSError):
                    self.node = node
                    continue
                self.node = node
                return True
            assert time.monotonic() < deadline, f"{self.name} found no gateway for {HANG_S:.0f} s"
            time.sleep(0.05)
        return False

    def _look(self, offset: int, length: int) -> None:
        """The range reads right through a gateway; one that does not answer is no liar."""
        others = [sheep.index for sheep in self._cluster.live]
        node = self._random.choice(others) if others else self.node
        try:
            with volume(self._cluster, self.name, node=node, answer_s=min(5.0, self.answer_s)) as opened:
                found = opened.read(offset, length)
        except (SheepdogError, OSError):
            return
        self.judge(offset, found, f"sheep {node}")

    def judge(self, offset: int, found: bytes, reader: str) -> None:
        """:raises AssertionError: that cannot be what is stored."""
        wrong = self.content.wrong(offset, found)
        assert not wrong, (
            f"{self.name} through {reader}: {len(wrong)} wrong sectors, first at {wrong[0] * SECTOR}: "
            f"{found[wrong[0] * SECTOR - offset :][:16].hex()} instead of "
            f"{self.content.data[wrong[0] * SECTOR :][:16].hex()}"
        )

    def close(self) -> None:
        self._client.close()


class Load:
    """Some guests, each working in a thread of its own between ``with`` and its end.

    Leaving the block stops them; ``abandon`` does so as well, without waiting for what is not acknowledged.

    :param guests: how many; the gateways are taken in turn.
    :param size: of each volume, in bytes.
    """

    def __init__(
        self,
        cluster: SheepCluster,
        prefix: str,
        *,
        guests: int = 4,
        size: int = 4 * MiB,
        answer_s: float = ANSWER_S,
        seed: object = 0,
    ) -> None:
        self.cluster = cluster
        self.guests = [
            Guest(cluster, f"{prefix}{number}", size, node=number, answer_s=answer_s, seed=seed)
            for number in range(guests)
        ]
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []

    def __enter__(self) -> Load:
        self.go_on()
        return self

    def go_on(self) -> None:
        """The guests work; also after ``abandon``."""
        for guest in self.guests:
            guest.stopping.clear()
        self._threads = [threading.Thread(target=self._run, args=(guest,)) for guest in self.guests]
        for thread in self._threads:
            thread.start()

    def _run(self, guest: Guest) -> None:
        try:
            while not guest.stopping.is_set():
                guest.step()
        except BaseException as error:
            self._errors.append(error)

    def abandon(self) -> None:
        """The guests have stopped. What they had sent and got no answer to is uncertain."""
        for guest in self.guests:
            guest.stopping.set()
        for thread in self._threads:
            thread.join(HANG_S)
        hanging = [guest.name for guest, thread in zip(self.guests, self._threads, strict=False) if thread.is_alive()]
        self._threads = []
        if self._errors:
            raise self._errors[0]
        assert not hanging, f"{hanging} hang"

    def __exit__(self, *_: object) -> None:
        self.abandon()

    def progress(self, writes: int = 5, *, but_of: Sequence[int] = (), timeout_s: float = 90.0) -> None:
        """Each guest has so many more acknowledged writes, but for those whose gateway is one of ``but_of``."""
        chosen = [guest for guest in self.guests if guest.node not in but_of]
        wanted = [guest.writes + writes for guest in chosen]
        wait_until(
            lambda: (
                bool(self._errors) or all(guest.writes >= count for guest, count in zip(chosen, wanted, strict=True))
            ),
            f"{writes} more writes of {[guest.name for guest in chosen]}",
            timeout_s=timeout_s,
        )

    @property
    def writes(self) -> int:
        """Acknowledged so far."""
        return sum(guest.writes for guest in self.guests)

    def refusals(self) -> list[Result]:
        """Why writes failed for good, each reason once."""
        return sorted({Result(code) for guest in self.guests for code in guest.refused})

    def verify(self) -> None:
        """Everything acknowledged is read back through every live sheep, and all of them say the same (INV-1)."""
        for guest in self.guests:
            found: dict[int, bytes] = {}
            for sheep in self.cluster.live:
                with volume(self.cluster, guest.name, node=sheep.index) as opened:
                    found[sheep.index] = opened.read(0, opened.size)
                guest.judge(0, found[sheep.index], f"sheep {sheep.index}")
            assert len(set(found.values())) == 1, f"sheep differ on {guest.name}"

    def names(self) -> Iterator[str]:
        return (guest.name for guest in self.guests)

    def close(self) -> None:
        """The volumes are gone."""
        for guest in self.guests:
            guest.close()
            self.cluster.dog("vdi", "delete", guest.name)
