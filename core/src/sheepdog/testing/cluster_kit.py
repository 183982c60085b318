"""The conformance kit of the cluster driver contract: one check per guarantee.

A driver's test file subclasses :class:`ClusterKit` and supplies ``cluster_factory``::

    class TestMyDriver(ClusterKit):
        @pytest.fixture
        def cluster_factory(self, tmp_path, anyio_backend_name):
            names = (str(tmp_path / str(i)) for i in itertools.count())
            return lambda: driver_cluster("my_module", next(names), backend=anyio_backend_name, pause_s=1)

Every call of the factory gives an asynchronous context with a :class:`KitCluster` of its own. Checks with processes are
few, because each of them costs an interpreter; everything else runs on sessions in the test process.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
import pytest

from sheepdog.contracts.cluster import PAYLOAD_BYTES_MAX, ClusterDriver, Delivered, Event, Joined, Left, Updated
from sheepdog.errors import ClusterError, ConfigError, PayloadTooLarge, SessionLost
from sheepdog.model.node import Node, NodeDisk, NodeId
from sheepdog.testing.cluster_worker import KitCluster, KitMember, ProcessMember, SessionMember

ClusterFactory: TypeAlias = Callable[[], AbstractAsyncContextManager[KitCluster]]

PATIENCE_S = 45.0  # for what must happen at once; long only because test machines are busy


_Check = TypeVar("_Check", bound=Callable[..., object])


def timing_bound(check: _Check) -> _Check:
    """Says that the check spends its time waiting for the driver's session time."""
    check.timing_bound = True  # type: ignore[attr-defined]  # read by ``once_is_enough``
    return check


def once_is_enough(items: list[pytest.Item], directory: Path) -> None:
    """For a ``conftest.py``: checks below ``directory`` that mostly wait are kept for one event loop only.

    What they defend is decided by the service and its clock; the other loop meets the same code in all other checks.
    """
    items[:] = [
        item
        for item in items
        if directory not in item.path.parents
        or not getattr(getattr(item, "function", None), "timing_bound", False)
        or getattr(getattr(item, "callspec", None), "params", {}).get("anyio_backend") != "trio"
    ]


def kit_node(index: int, *, space: int = 0) -> Node:
    """A node record; different for different indices."""
    return Node(NodeId.of("127.0.0.1", 7000 + index), 128, index, space)


def left(member: KitMember, node: Node) -> int:
    """How often ``member`` saw ``node`` leave."""
    return sum(isinstance(event, Left) and event.node.id == node.id for event in member.seen)


def joined(member: KitMember, node: Node) -> int:
    """How often ``member`` saw ``node`` join."""
    return sum(isinstance(event, Joined) and event.node.id == node.id for event in member.seen)


def payloads(member: KitMember) -> list[bytes]:
    """What was delivered to ``member``, in order."""
    return [event.payload for event in member.seen if isinstance(event, Delivered)]


async def until_delivered(member: KitMember, payload: bytes) -> None:
    """``member`` saw ``payload``."""
    await member.until(lambda: payload in payloads(member), PATIENCE_S)


async def until_seen(member: KitMember) -> None:
    """``member`` saw its first event."""
    await member.until(lambda: member.seen, PATIENCE_S)


async def until_joined(member: KitMember, node: Node, times: int = 1) -> None:
    """``member`` saw ``node`` join that often."""
    await member.until(lambda: joined(member, node) >= times, PATIENCE_S)


async def until_left(member: KitMember, node: Node, extra_s: float = 0.0) -> None:
    """``member`` saw ``node`` leave."""
    await member.until(lambda: left(member, node), PATIENCE_S + extra_s)


async def start_members(
    tasks: anyio.abc.TaskGroup, count: int, driver: Callable[[], ClusterDriver]
) -> list[SessionMember]:
    """Members ``kit_node(0)`` and so on, in this process, which joined one after the other; ``driver()`` for each."""
    members = [SessionMember(kit_node(number)) for number in range(count)]
    for member in members:
        await member.start(tasks, driver(), b"")
    return members


async def settle(members: Sequence[KitMember], mark: bytes) -> None:
    """Everything broadcast before was seen by all ``members``; the first of them broadcasts ``mark``."""
    with anyio.fail_after(PATIENCE_S):  # a driver that hangs is a failed check, not a hung test run
        await members[0].broadcast(mark)
    for member in members:
        await until_delivered(member, mark)


def assert_one_order(members: Sequence[KitMember], mark: bytes) -> None:
    """Up to ``mark`` every member saw a suffix of what the one with the longest history saw."""
    histories = []
    for member in members:
        end = next(i for i, e in enumerate(member.seen) if isinstance(e, Delivered) and e.payload == mark)
        histories.append(member.seen[: end + 1])
    longest = max(histories, key=len)
    for member, history in zip(members, histories, strict=True):
        assert history == longest[len(longest) - len(history) :], f"{member.node.id.text} saw another order"


def assert_sound(events: Sequence[Event]) -> None:
    """The views follow from the events, and no event comes from somebody who is no member."""
    first = events[0]
    assert isinstance(first, Joined)
    view = list(first.view)
    for event in events[1:]:
        ids = [node.id for node in view]
        match event:
            case Joined(node=node):
                assert node.id not in ids, f"{node.id.text} joined twice"
                view.append(node)
            case Left(node=node):
                assert node.id in ids, f"{node.id.text} left but was not there"
                view = [other for other in view if other.id != node.id]
            case Updated(node=node):
                assert node.id in ids, f"{node.id.text} was updated but is not there"
                view = [node if other.id == node.id else other for other in view]
            case Delivered(sender=sender):
                assert sender in ids, f"a message from {sender.text}, who is not there"
        if not isinstance(event, Delivered):
            assert event.view == tuple(view), f"the view of {event} is not {view}"


class ClusterKit:
    """All guarantees of ``sheepdog.contracts.cluster``."""

    @pytest.fixture
    def cluster_factory(self) -> ClusterFactory:
        """Makes clusters that share nothing with each other. Supplied by the subclass."""
        raise AssertionError("a subclass of ClusterKit supplies the fixture cluster_factory")

    # -- joining ------------------------------------------------------------------------------------------------

    @pytest.mark.anyio
    async def test_first_event(self, cluster_factory: ClusterFactory) -> None:
        """A member's first event is its own ``Joined``, with its greeting and a view that ends with it."""
        async with cluster_factory() as cluster:
            members = [await cluster.spawn(kit_node(i), b"hello %d" % i) for i in range(3)]
            for member in members:
                await until_seen(member)

            for i, member in enumerate(members):
                view = tuple(kit_node(j) for j in range(i + 1))
                assert member.seen[0] == Joined(kit_node(i), b"hello %d" % i, view)

    @pytest.mark.anyio
    async def test_view_oldest_first(self, cluster_factory: ClusterFactory) -> None:
        """Views list members by age, whatever their identities, also after some have left and come again."""
        async with cluster_factory() as cluster:
            a, b, c = [await cluster.spawn(kit_node(i)) for i in (5, 3, 9)]
            await b.leave()
            await until_left(c, b.node)
            again = await cluster.spawn(kit_node(3))
            for member in (a, c, again):
                await until_joined(member, again.node)
            await settle([a, c, again], b"mark")

            for member in (a, c, again):
                newest = [event for event in member.seen if isinstance(event, Joined)][-1]
                assert newest.view == (kit_node(5), kit_node(9), kit_node(3))
            assert_one_order([a, c, again], b"mark")

    @pytest.mark.anyio
    async def test_late_joiner(self, cluster_factory: ClusterFactory) -> None:
        """A member that joins later sees nothing from before its own ``Joined`` and everything after."""
        async with cluster_factory() as cluster:
            first = await cluster.spawn(kit_node(0))
            for i in range(5):
                await first.broadcast(b"before %d" % i)
            late = await cluster.spawn(kit_node(1))
            await until_joined(first, late.node)
            for i in range(5):
                await first.broadcast(b"after %d" % i)
            await settle([first, late], b"mark")

            assert payloads(late) == [*(b"after %d" % i for i in range(5)), b"mark"]
            assert payloads(first)[:5] == [b"before %d" % i for i in range(5)]

    @pytest.mark.anyio
    async def test_same_identity_twice(self, cluster_factory: ClusterFactory) -> None:
        """``join`` under the identity of a live member is a ``ConfigError``, and nobody notices the attempt."""
        async with cluster_factory() as cluster:
            first = await cluster.spawn(kit_node(0))
            with pytest.raises(ConfigError):
                await cluster.spawn(kit_node(0), b"impostor")
            await settle([first], b"mark")

            assert len(first.seen) == 2 and first.lost is None and await first.alive()

    @pytest.mark.anyio
    async def test_join_cancelled(self, cluster_factory: ClusterFactory) -> None:
        """A join cancelled at any point leaves no member behind, and its identity can join later."""
        async with cluster_factory() as cluster:
            first = await cluster.spawn(kit_node(0))
            for steps in (0, 1, 2, 4, 7):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._join_and_stay, cluster, kit_node(1))
                    for _ in range(steps):
                        await anyio.lowlevel.checkpoint()
                    tasks.cancel_scope.cancel()
            for delay_s in (0.002, 0.005, 0.01, 0.02):
                with anyio.move_on_after(delay_s):
                    await self._join_and_stay(cluster, kit_node(1))
            again = await self._patiently(cluster, kit_node(1))
            await settle([again], b"mark")
            await until_delivered(first, b"mark")

            assert joined(first, again.node) == left(first, again.node) + 1
            assert_sound(first.seen)

    @staticmethod
    async def _join_and_stay(cluster: KitCluster, node: Node) -> None:
        async with cluster.driver().join(node, b""):
            await anyio.sleep_forever()

    async def _patiently(self, cluster: KitCluster, node: Node, *, killable: bool = False) -> KitMember:
        """A member under an identity whose last session may not have expired yet."""
        spawn = cluster.spawn_killable if killable else cluster.spawn
        with anyio.fail_after(PATIENCE_S + 2 * cluster.pause_s):
            while True:
                try:
                    return await spawn(node)
                except ConfigError:
                    await anyio.sleep(0.05)

    @pytest.mark.anyio
    async def test_body_raises(self, cluster_factory: ClusterFactory) -> None:
        """An exception in the body of ``join`` comes out as itself, and the others see the member leave."""
        async with cluster_factory() as cluster:
            first = await cluster.spawn(kit_node(0))
            with pytest.raises(ZeroDivisionError):
                async with cluster.driver().join(kit_node(1), b""):
                    raise ZeroDivisionError
            await until_left(first, kit_node(1))

            assert_sound(first.seen)

    # -- order --------------------------------------------------------------------------------------------------

    @pytest.mark.anyio
    async def test_one_order(self, cluster_factory: ClusterFactory) -> None:
        """Concurrent broadcasts, joins, leaves and updates are seen in one order by everybody, each of them once."""
        async with cluster_factory() as cluster:
            members: list[KitMember] = [await cluster.spawn(kit_node(i)) for i in range(3)]
            leaver = await cluster.spawn(kit_node(8))
            late: list[KitMember] = []

            async def talk(member: KitMember, index: int) -> None:
                for i in range(20):
                    await member.broadcast(b"%d %d" % (index, i))

            async def join() -> None:
                late.append(await cluster.spawn(kit_node(9)))
                await late[0].broadcast(b"late")

            async with anyio.create_task_group() as tasks:
                for index, member in enumerate(members):
                    tasks.start_soon(talk, member, index)
                tasks.start_soon(join)
                tasks.start_soon(leaver.leave)
                tasks.start_soon(members[1].update, kit_node(1, space=77))
            everybody = [*members, *late]
            await settle(everybody, b"mark")

            assert_one_order(everybody, b"mark")
            for member in everybody:
                assert_sound(member.seen)
            for index in range(3):
                mine = [p for p in payloads(members[0]) if p.startswith(b"%d " % index)]
                assert mine == [b"%d %d" % (index, i) for i in range(20)]

    @pytest.mark.anyio
    async def test_own_broadcasts(self, cluster_factory: ClusterFactory) -> None:
        """A sender receives its own broadcasts, once each, also when it is alone."""
        async with cluster_factory() as cluster:
            alone = await cluster.spawn(kit_node(0))
            sent = [b"", b"\0", bytes(range(256)), b"x" * 5000]
            for payload in sent:
                await alone.broadcast(payload)
            await settle([alone], b"mark")

            assert alone.seen[1:] == [Delivered(alone.node.id, payload) for payload in [*sent, b"mark"]]

    @pytest.mark.anyio
    async def test_place_in_the_order(self, cluster_factory: ClusterFactory) -> None:
        """When ``broadcast`` has returned, whatever anybody sends afterwards comes later."""
        async with cluster_factory() as cluster:
            members = [await cluster.spawn(kit_node(i)) for i in range(3)]
            sent = []
            for i, member in enumerate(itertools.islice(itertools.cycle(members), 30)):
                sent.append(b"%d" % i)
                await member.broadcast(sent[-1])
            await settle(members, b"mark")

            for member in members:
                assert [p for p in payloads(member) if p != b"mark"] == sent

    @pytest.mark.anyio
    async def test_broadcast_cancelled(self, cluster_factory: ClusterFactory) -> None:
        """A cancelled broadcast reached everybody or nobody, and the session works on."""
        async with cluster_factory() as cluster:
            members = [await cluster.spawn(kit_node(i)) for i in range(2)]
            for steps in range(8):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(members[0].broadcast, b"maybe %d" % steps)
                    for _ in range(steps):
                        await anyio.lowlevel.checkpoint()
                    tasks.cancel_scope.cancel()
            for delay_s in (0.0001, 0.0005, 0.002):
                with anyio.move_on_after(delay_s):
                    await members[0].broadcast(b"timed %g" % delay_s)
            await settle(members, b"mark")

            assert_one_order(members, b"mark")
            assert len(set(payloads(members[1]))) == len(payloads(members[1]))

    @pytest.mark.anyio
    async def test_payload_limit(self, cluster_factory: ClusterFactory) -> None:
        """``PAYLOAD_BYTES_MAX`` bytes are delivered whole, as payload and as greeting."""
        async with cluster_factory() as cluster:
            big = bytes(range(256)) * (PAYLOAD_BYTES_MAX // 256)
            members = [await cluster.spawn(kit_node(i), big) for i in range(2)]
            await members[1].broadcast(big)
            await settle(members, b"mark")

            for member in members:
                assert [e.greeting == big for e in member.seen if isinstance(e, Joined)][-1]
                assert payloads(member) == [big, b"mark"]

    @pytest.mark.anyio
    async def test_payload_above_limit(self, cluster_factory: ClusterFactory) -> None:
        """One byte more is ``PayloadTooLarge``; nothing was sent and the session works on."""
        async with cluster_factory() as cluster:
            members = [await cluster.spawn(kit_node(i)) for i in range(2)]
            with pytest.raises(PayloadTooLarge):
                await members[0].broadcast(bytes(PAYLOAD_BYTES_MAX + 1))
            await settle(members, b"mark")

            assert payloads(members[0]) == payloads(members[1]) == [b"mark"]

    @pytest.mark.anyio
    async def test_update(self, cluster_factory: ClusterFactory) -> None:
        """Everybody sees ``Updated`` with the new record, at its place in the order; views have it from then on.

        Nothing of a record is lost on the way, the disks that some nodes announce included.
        """
        async with cluster_factory() as cluster:
            members = [await cluster.spawn(kit_node(i)) for i in range(2)]
            record = replace(kit_node(0), vnodes=7, space=1 << 40, disks=(NodeDisk(5, 1 << 40), NodeDisk(6, 1)))
            last = replace(kit_node(2), disks=tuple(NodeDisk(1 << 63 | number, number) for number in range(32)))
            await members[0].update(record)
            late = await cluster.spawn(last)
            everybody = [*members, late]
            await settle(everybody, b"mark")

            assert Updated(record, (record, kit_node(1))) in members[1].seen
            assert late.seen[0] == Joined(last, b"", (record, kit_node(1), last))
            assert_one_order(everybody, b"mark")

    @pytest.mark.anyio
    async def test_separate_clusters(self, cluster_factory: ClusterFactory) -> None:
        """Two clusters never see each other, even with members of the same identity."""
        async with cluster_factory() as one, cluster_factory() as other:
            mine = await one.spawn(kit_node(0))
            theirs = await other.spawn(kit_node(0))
            await mine.broadcast(b"mine")
            await settle([theirs], b"theirs")
            await settle([mine], b"mark")

            assert payloads(mine) == [b"mine", b"mark"] and joined(mine, kit_node(0)) == 1
            assert payloads(theirs) == [b"theirs"] and joined(theirs, kit_node(0)) == 1

    # -- leaving ------------------------------------------------------------------------------------------------

    @pytest.mark.anyio
    async def test_clean_leave(self, cluster_factory: ClusterFactory) -> None:
        """A member that leaves is seen to leave once, soon, after all it sent; its identity can join at once."""
        async with cluster_factory() as cluster:
            first = await cluster.spawn(kit_node(0))
            second = await cluster.spawn(kit_node(1))
            await second.broadcast(b"last words")
            await second.leave()
            await until_left(first, second.node)
            again = await cluster.spawn(kit_node(1))
            await settle([first, again], b"mark")

            words = first.seen.index(Delivered(second.node.id, b"last words"))
            assert words < first.seen.index(Left(second.node, (first.node,)))
            assert left(first, second.node) == 1 and joined(first, second.node) == 2
            assert_sound(first.seen)

    @pytest.mark.anyio
    async def test_session_after_leave(self, cluster_factory: ClusterFactory) -> None:
        """After the context ended the session is not alive, and refuses with ``SessionLost``."""
        async with cluster_factory() as cluster:
            async with cluster.driver().join(kit_node(0), b"") as session:
                events = session.events()
                await anext(events)

            assert not session.alive()
            with pytest.raises(SessionLost):
                await session.broadcast(b"ghost")
            with pytest.raises(SessionLost):
                await anext(events)

    @pytest.mark.anyio
    async def test_events_survive_cancellation(self, cluster_factory: ClusterFactory) -> None:
        """Cancelling the wait for an event loses no event."""
        async with cluster_factory() as cluster:
            other = await cluster.spawn(kit_node(1))
            async with cluster.driver().join(kit_node(0), b"") as session:
                events = session.events()
                await anext(events)
                got: list[Event] = []
                with anyio.fail_after(PATIENCE_S):
                    for i in range(5):
                        with anyio.move_on_after(0.001):
                            got.append(await anext(events))
                        await other.broadcast(b"%d" % i)
                    while len(got) < 5:
                        got.append(await anext(events))

            assert got == [Delivered(other.node.id, b"%d" % i) for i in range(5)]

    # -- deaths -------------------------------------------------------------------------------------------------

    @timing_bound
    @pytest.mark.anyio
    async def test_kill(self, cluster_factory: ClusterFactory) -> None:
        """A member killed while it talks is seen to leave once, in time, and nothing from it follows."""
        async with cluster_factory() as cluster:
            members = [await cluster.spawn(kit_node(i)) for i in range(2)]
            victim = await cluster.spawn_killable(kit_node(2))
            if isinstance(victim, ProcessMember):
                await victim.flood()
            await victim.broadcast(b"loud")
            await until_delivered(members[0], b"loud")
            await victim.kill()
            killed_s = anyio.current_time()
            for member in members:
                await until_left(member, victim.node, cluster.detection_s)
            took_s = anyio.current_time() - killed_s
            await settle(members, b"mark")

            assert took_s < cluster.detection_s + 1.0, f"the death was seen after {took_s:.2f} s"
            for member in members:
                assert left(member, victim.node) == 1
                assert_sound(member.seen)
            assert_one_order(members, b"mark")

    @timing_bound
    @pytest.mark.anyio
    async def test_two_die(self, cluster_factory: ClusterFactory) -> None:
        """The oldest and another member die at once: each is seen to leave once, and the rest goes on."""
        async with cluster_factory() as cluster:
            oldest = await cluster.spawn_killable(kit_node(0))
            survivor = await cluster.spawn(kit_node(1))
            other = await cluster.spawn_killable(kit_node(2))
            last = await cluster.spawn(kit_node(3))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(oldest.kill)
                tasks.start_soon(other.kill)
            for member in (survivor, last):
                for dead in (oldest, other):
                    await until_left(member, dead.node, cluster.detection_s)
            await settle([survivor, last], b"mark")

            for member in (survivor, last):
                assert left(member, oldest.node) == left(member, other.node) == 1
                assert [e for e in member.seen if isinstance(e, Left)][-1].view == (survivor.node, last.node)
            assert_one_order([survivor, last], b"mark")

    @timing_bound
    @pytest.mark.anyio
    async def test_return_after_death(self, cluster_factory: ClusterFactory) -> None:
        """Who comes back under the identity of a dead member is seen to join only after that one was seen to leave."""
        async with cluster_factory() as cluster:
            first = await cluster.spawn(kit_node(0))
            victim = await cluster.spawn_killable(kit_node(1))
            await until_joined(first, victim.node)
            await victim.kill()
            again = await self._patiently(cluster, kit_node(1))
            await until_joined(first, victim.node, 2)
            await settle([first, again], b"mark")

            assert left(first, victim.node) == 1
            assert again.seen[0] == Joined(again.node, b"", (first.node, again.node))
            assert_sound(first.seen)

    @timing_bound
    @pytest.mark.anyio
    async def test_dead_cluster(self, cluster_factory: ClusterFactory) -> None:
        """What a cluster leaves behind whose last member was killed does not hinder the next one."""
        async with cluster_factory() as cluster:
            victim = await cluster.spawn_killable(kit_node(0))
            await victim.broadcast(b"old")
            await victim.kill()
            fresh = await cluster.spawn(kit_node(1))
            await settle([fresh], b"mark")
            if not isinstance(fresh.seen[0], Joined) or len(fresh.seen[0].view) > 1:
                await until_left(fresh, victim.node, cluster.detection_s)

            assert payloads(fresh) == [b"mark"]
            assert_sound(fresh.seen)

    # -- pauses -------------------------------------------------------------------------------------------------

    @timing_bound
    @pytest.mark.anyio
    async def test_long_pause(self, cluster_factory: ClusterFactory) -> None:
        """A member paused too long is seen to leave; when it goes on it knows before it does anything else.

        ``alive`` is False at once, ``events`` ends with ``SessionLost``, ``broadcast`` fails and delivers nothing, and
        its identity can join again.
        """
        async with cluster_factory() as cluster:
            first = await cluster.spawn(kit_node(0))
            victim = await cluster.spawn_killable(kit_node(1))
            await settle([first, victim], b"before")
            await victim.pause()
            await until_left(first, victim.node, cluster.pause_s)
            await first.broadcast(b"behind its back")
            if isinstance(victim, ProcessMember):
                early = await victim.send("alive")
                await victim.resume()
                alive = await victim.answer(early)
            else:
                await victim.resume()
                alive = await victim.alive()
            with pytest.raises(ClusterError):
                await victim.broadcast(b"ghost")
            await victim.until(lambda: victim.lost is not None, PATIENCE_S)
            still_alive = await victim.alive()
            await victim.kill()
            again = await self._patiently(cluster, victim.node)
            await settle([first, again], b"mark")

            assert not alive and not still_alive
            assert b"ghost" not in payloads(first)
            assert left(first, victim.node) == 1
            assert_sound(first.seen)

    @timing_bound
    @pytest.mark.anyio
    async def test_short_pause(self, cluster_factory: ClusterFactory) -> None:
        """A short pause costs nothing but time: no ``Left``, and what was sent meanwhile is delivered."""
        async with cluster_factory() as cluster:
            first = await cluster.spawn(kit_node(0))
            victim = await cluster.spawn_killable(kit_node(1))
            await until_seen(victim)
            await victim.pause()
            await first.broadcast(b"meanwhile")
            await anyio.sleep(cluster.blip_s)
            await victim.resume()
            await settle([first, victim], b"mark")

            assert payloads(victim) == [b"meanwhile", b"mark"]
            assert left(first, victim.node) == 0 and victim.lost is None and await victim.alive()
