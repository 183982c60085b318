"""A simulated network in memory, with faults, repeatable from one seed.

``MemoryNetwork`` is the wire; ``network.transport(host)`` is what one simulated machine uses. Bytes arrive after
``latency_s``, as many at once as the receiver's buffer takes (or torn into small pieces when ``tear`` says so), always
in order. The buffers of a write are kept, not copied, until they are delivered, so a caller that changes a buffer which
the channel owns is found out. Under trio with a mock clock the whole network runs in virtual time.

Faults: ``partition`` and ``isolate`` hold back everything between hosts until ``heal`` (nothing is lost, as with TCP);
``break_connections`` resets connections; ``kill`` makes a host vanish, with a reset for those who talked to it.
"""

from __future__ import annotations

import heapq
import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import anyio
import anyio.lowlevel

from sheepdog.builtin.streams import TaskHome, join_address, split_address
from sheepdog.contracts.transport import Accept, Address, Buffer, Channel, Listener, Receiver, Transport
from sheepdog.errors import TransportError

logger = logging.getLogger(__name__)

KiB = 1024
HIGH_WATER_BYTES = 1024 * KiB
LOW_WATER_BYTES = 256 * KiB
WINDOW_BYTES = 64 * KiB  # what the network itself takes of a peer that does not read
FIRST_PORT = 49152
TURN_ACTIONS_MAX = 64  # then other tasks get their turn

_END: Final = b"end"  # entries of a channel's queue, compared by identity
_RESET: Final = b"reset"


class Timers:
    """Calls functions after a delay, in the order of their times and then of their submission, from one task."""

    def __init__(self) -> None:
        self._home = TaskHome()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0
        self._kick: anyio.Event | None = None
        self._started = False
        self.failures: list[Exception] = []

    async def start(self) -> None:
        """Actions are called from now on."""
        if not self._started:
            self._started = True
            self._kick = anyio.Event()
            (await self._home.group()).start_soon(self._run)

    async def aclose(self) -> None:
        """Nothing is called any more."""
        self._heap.clear()
        await self._home.aclose()

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """``action()`` is called ``delay_s`` seconds from now, never from inside this call."""
        self._sequence += 1
        heapq.heappush(self._heap, (anyio.current_time() + delay_s, self._sequence, action))
        if self._kick is not None:
            self._kick.set()

    async def _run(self) -> None:
        while True:
            self._kick = anyio.Event()
            now = anyio.current_time()
            for _ in range(TURN_ACTIONS_MAX):
                if not self._heap or self._heap[0][0] > now:
                    break
                action = heapq.heappop(self._heap)[2]
                try:
                    action()
                except Exception as error:
                    logger.exception("a receiver failed")
                    self.failures.append(error)
            if not self._heap:
                await self._kick.wait()
            elif self._heap[0][0] > now:
                with anyio.move_on_after(self._heap[0][0] - now):
                    await self._kick.wait()
            else:
                await anyio.lowlevel.checkpoint()


class MemoryNetwork:
    """Hosts, listeners and connections. ``failures`` holds what receivers raised: a test should find it empty.

    :param latency_s: (least, most) delay of each write; drawn from ``rng``.
    :param tear: probability that a delivery stops at a random place, 0 to 1.
    """

    def __init__(
        self, rng: random.Random | None = None, *, latency_s: tuple[float, float] = (0.0, 0.0), tear: float = 0.0
    ) -> None:
        self.random = rng or random.Random(0)
        self.latency_s = latency_s
        self.tear = tear
        self.timers = Timers()
        self.listeners: dict[tuple[str, int, str | None], MemoryListener] = {}
        self.channels: dict[MemoryChannel, None] = {}
        self._cut: set[tuple[str, str]] = set()
        self._healed: anyio.Event | None = None
        self._next_port = FIRST_PORT

    @property
    def failures(self) -> list[Exception]:
        return self.timers.failures

    def transport(self, host: str) -> MemoryTransport:
        """The network as ``host`` sees it."""
        return MemoryTransport(self, host)

    async def aclose(self) -> None:
        """The network stands still for ever."""
        await self.timers.aclose()

    def delay(self) -> float:
        least, most = self.latency_s
        return self.random.uniform(least, most) if most > least else least

    def port(self) -> int:
        self._next_port += 1
        return self._next_port

    # faults

    def is_cut(self, one: str, other: str) -> bool:
        """Whether nothing passes between the two hosts now."""
        return (min(one, other), max(one, other)) in self._cut

    def cut(self, one: str, other: str) -> None:
        """Nothing passes between the two hosts until ``heal``. A host always reaches itself."""
        if one != other:
            self._cut.add((min(one, other), max(one, other)))

    def partition(self, *groups: Sequence[str]) -> None:
        """Hosts of different groups do not reach each other until ``heal``."""
        for index, group in enumerate(groups):
            for other in groups[index + 1 :]:
                for one_host in group:
                    for other_host in other:
                        self.cut(one_host, other_host)

    def isolate(self, host: str, others: Sequence[str]) -> None:
        """``host`` reaches none of ``others`` until ``heal``."""
        self.partition([host], others)

    def heal(self, *hosts: str) -> None:
        """Everything passes again and what was held back arrives; with arguments, only what these hosts lacked."""
        self._cut = {pair for pair in self._cut if hosts and pair[0] not in hosts and pair[1] not in hosts}
        if self._healed is not None:
            self._healed.set()
            self._healed = None
        for channel in tuple(self.channels):
            channel.kick()

    async def passage(self, one: str, other: str) -> None:
        """The two hosts reach each other."""
        while self.is_cut(one, other):
            if self._healed is None:
                self._healed = anyio.Event()
            await self._healed.wait()

    def break_connections(self, one: str, other: str | None = None) -> None:
        """Every connection of ``one`` (only those with ``other``) is reset, at both ends."""
        for channel in tuple(self.channels):
            if channel.host == one and (other is None or channel.peer.host == other):
                channel.reset()
                channel.peer.reset()

    def kill(self, host: str) -> None:
        """``host`` hears nothing more and listens no more; whoever talked to it sees a reset. It may start again."""
        for key in [key for key, listener in self.listeners.items() if listener.host == host]:
            del self.listeners[key]
        for channel in tuple(self.channels):
            if channel.host == host:
                channel.vanish()


class MemoryChannel(Channel):
    """One end of a simulated connection."""

    def __init__(self, network: MemoryNetwork, host: str, local: Address, remote: Address) -> None:
        self.network = network
        self.host = host
        self.peer: MemoryChannel = self  # until it is joined to the other end
        self.receiver: Receiver | None = None
        self._local = local
        self._remote = remote
        self._queue: deque[tuple[float, Buffer]] = deque()  # (when it may arrive, what)
        self._queued_bytes = 0
        self._congested = False
        self._paused = False
        self._scheduled = False
        self._ended = False  # close or abort was called, or the other side ended
        self._aborted = False
        self._told = False
        network.channels[self] = None

    def write(self, buffers: Sequence[Buffer]) -> None:
        if self._ended:
            return
        when = anyio.current_time() + self.network.delay()
        for buffer in buffers:
            if len(buffer):
                self._enqueue(when, memoryview(buffer).cast("B"))
        if self._queued_bytes > HIGH_WATER_BYTES:
            self._congested = True

    @property
    def congested(self) -> bool:
        return self._congested

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        if self._paused:
            self._paused = False
            self.peer.kick()

    def close(self) -> None:
        if not self._ended:
            self._ended = True
            self._enqueue(anyio.current_time() + self.network.delay(), _END)
            self._tell_if_sent()

    def abort(self) -> None:
        if not self._aborted:
            self._ended = self._aborted = True
            self._drop()
            self._enqueue(anyio.current_time() + self.network.delay(), _RESET)
            self.network.timers.after(0, lambda: self._tell(None))

    @property
    def remote(self) -> Address:
        return self._remote

    @property
    def local(self) -> Address:
        return self._local

    # what the network does

    def kick(self) -> None:
        """What is queued is looked at soon: something that held it back may be gone."""
        self._schedule(0)

    def reset(self) -> None:
        """The connection breaks at this end."""
        self._ended = self._aborted = True
        self._drop()
        self.network.timers.after(
            self.network.delay(), lambda: self._tell(TransportError(f"the connection to {self._remote} was reset"))
        )

    def vanish(self) -> None:
        """This end is gone without a word; the other end sees a reset."""
        self._told = self._ended = self._aborted = True
        self._drop()
        self.receiver = None
        self.network.channels.pop(self, None)
        self._enqueue(anyio.current_time() + self.network.delay(), _RESET)

    def _enqueue(self, when: float, what: Buffer) -> None:
        if self._queue:
            when = max(when, self._queue[-1][0])  # in order, however the delays fall
        self._queue.append((when, what))
        if what is not _END and what is not _RESET:
            self._queued_bytes += len(what)
        self._schedule(when - anyio.current_time())

    def _drop(self) -> None:
        self._queue.clear()
        self._queued_bytes = 0
        self._congested = False

    def _schedule(self, delay_s: float) -> None:
        if not self._scheduled:
            self._scheduled = True
            self.network.timers.after(max(delay_s, 0), self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False
        peer = self.peer
        while self._queue and not self.network.is_cut(self.host, peer.host):
            when, what = self._queue[0]
            if when > anyio.current_time():
                self._schedule(when - anyio.current_time())
                return
            if what is _RESET:
                self._queue.clear()
                peer.reset_arrived()
                return
            if peer._ended:
                self._discard()
                return
            if peer._paused:
                return
            if what is _END:
                self._queue.clear()
                peer.end_arrived()
                return
            if self._deliver_some(peer):
                self._schedule(0)
                return

    def _deliver_some(self, peer: MemoryChannel) -> bool:
        """Fills one buffer of the peer. True when this was torn off and the rest waits for another turn."""
        rng = self.network.random
        torn = self.network.tear > 0 and rng.random() < self.network.tear
        assert peer.receiver is not None, "bytes arrive before the receiver was made"
        target = peer.receiver.get_buffer(self._queued_bytes)
        room = rng.randint(1, min(len(target), rng.choice((1, 16, 100, 5000)))) if torn else len(target)
        count = 0
        now = anyio.current_time()
        while count < room and self._queue:
            when, what = self._queue[0]
            if when > now or what is _END or what is _RESET:
                break
            view = memoryview(what)
            taken = min(len(view), room - count)
            target[count : count + taken] = view[:taken]
            count += taken
            if taken == len(view):
                self._queue.popleft()
            else:
                self._queue[0] = (when, view[taken:])
        self._queued_bytes -= count
        try:
            peer.receiver.buffer_updated(count)
        except Exception:
            peer.abort()
            raise
        finally:
            self._drained()
        return torn

    def _drained(self) -> None:
        if self._congested and self._queued_bytes < LOW_WATER_BYTES:
            self._congested = False
            if not self._told and self.receiver is not None:
                self.receiver.writable()
        self._tell_if_sent()

    def _discard(self) -> None:
        """The other side reads no more: what is left goes nowhere."""
        self._drop()
        self._tell_if_sent()

    def _tell_if_sent(self) -> None:
        if self._ended and not self._aborted and self._queued_bytes <= WINDOW_BYTES:
            self.network.timers.after(0, lambda: self._tell(None))

    def end_arrived(self) -> None:
        """The other side closed after everything that it sent."""
        if not self._ended:
            self._ended = self._aborted = True
            self._drop()
            self._tell(None)

    def reset_arrived(self) -> None:
        """The other side broke the connection."""
        if not self._told:
            error = None if self._ended else TransportError(f"the connection to {self._remote} was reset")
            self._ended = self._aborted = True
            self._drop()
            self._tell(error)

    def _tell(self, error: Exception | None) -> None:
        if not self._told:
            self._told = self._ended = True
            self._congested = False
            self.network.channels.pop(self, None)
            if self.receiver is not None:
                self.receiver.closed(error)


class MemoryListener(Listener):
    def __init__(self, network: MemoryNetwork, host: str, address: Address, accept: Accept) -> None:
        self._network = network
        self._address = address
        self.host = host
        self.accept = accept

    @property
    def addresses(self) -> tuple[Address, ...]:
        return (self._address,)

    async def aclose(self) -> None:
        listeners = self._network.listeners
        for key in [key for key, listener in listeners.items() if listener is self]:
            del listeners[key]


class MemoryTransport(Transport):
    """What the machine ``host`` of a ``MemoryNetwork`` uses. It may listen on any host name."""

    def __init__(self, network: MemoryNetwork, host: str) -> None:
        self.network = network
        self.host = host
        self._opened: dict[MemoryChannel, None] = {}
        self._listeners: list[MemoryListener] = []

    async def connect(self, address: Address, make_receiver: Accept) -> Channel:
        network = self.network
        await network.timers.start()
        host, port, path = split_address(address)
        key = (self.host if path is not None else host, port, path)
        await anyio.sleep(network.delay())
        if key in network.listeners:
            await network.passage(self.host, network.listeners[key].host)
        listener = network.listeners.get(key)
        if listener is None:
            raise TransportError(f"no connection to {address}: refused")
        # No await from here on: a cancelled call leaves nothing open.
        local = join_address(self.host, network.port()) if path is None else address
        ours = MemoryChannel(network, self.host, local, address)
        theirs = MemoryChannel(network, listener.host, address, local)
        ours.peer, theirs.peer = theirs, ours
        try:
            theirs.receiver = listener.accept(theirs)
        except Exception as error:
            network.failures.append(error)
            theirs.abort()
        ours.receiver = make_receiver(ours)
        self._remember(ours)
        return ours

    async def listen(self, address: Address, accept: Accept) -> Listener:
        await self.network.timers.start()
        host, port, path = split_address(address)
        if path is None:
            host, port = host or self.host, port or self.network.port()
            address = join_address(host, port)
        key = (self.host if path is not None else host, port, path)
        if key in self.network.listeners:
            raise TransportError(f"cannot listen on {address}: in use")

        def remembering(channel: Channel) -> Receiver:
            assert isinstance(channel, MemoryChannel), channel
            self._remember(channel)
            return accept(channel)

        listener = MemoryListener(self.network, self.host, address, remembering)
        self.network.listeners[key] = listener
        self._listeners.append(listener)
        return listener

    async def aclose(self) -> None:
        for listener in self._listeners:
            await listener.aclose()
        for channel in tuple(self._opened):
            channel.abort()

    def _remember(self, channel: MemoryChannel) -> None:
        if len(self._opened) > 256:
            self._opened = {old: None for old in self._opened if old in self.network.channels}
        self._opened[channel] = None
