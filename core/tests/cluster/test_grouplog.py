"""Membership from a totally ordered log: what the state machine and the mailbox promise to drivers."""

from __future__ import annotations

import threading

import anyio
import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.builtin.grouplog import GroupMember, GroupState, RecordDamaged
from sheepdog.builtin.groupsession import EVENTS_MAX, GroupSession, Mailbox
from sheepdog.contracts.cluster import PAYLOAD_BYTES_MAX, Delivered, Joined, Left, Updated
from sheepdog.errors import SessionLost
from sheepdog.testing.cluster_kit import assert_sound, kit_node


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def session(index: int) -> bytes:
    return bytes([index]) * 16


def join(index: int, identity: int | None = None, greeting: bytes = b"") -> bytes:
    node = kit_node(index if identity is None else identity)
    return GroupState.join_record(GroupMember(session(index), node, (1, 2)), greeting)


def send(index: int, number: int, payload: bytes = b"x") -> bytes:
    return GroupState.send_record(session(index), number, payload)


def test_life():
    """Join, message, update and leave give the events of the contract."""
    state = GroupState()
    events = [
        state.apply(record)
        for record in (
            join(1, greeting=b"hello"),
            join(2),
            send(1, 1, b"a"),
            GroupState.update_record(session(1), 2, kit_node(1, space=9)),
            GroupState.leave_record(session(1)),
        )
    ]

    assert events == [
        Joined(kit_node(1), b"hello", (kit_node(1),)),
        Joined(kit_node(2), b"", (kit_node(1), kit_node(2))),
        Delivered(kit_node(1).id, b"a"),
        Updated(kit_node(1, space=9), (kit_node(1, space=9), kit_node(2))),
        Left(kit_node(1, space=9), (kit_node(2),)),
    ]


@pytest.mark.parametrize(
    "record",
    [
        send(3, 1),
        GroupState.leave_record(session(3)),
        GroupState.update_record(session(3), 1, kit_node(3)),
        join(1),
        join(4, identity=1),
        send(1, 5),
        send(1, 4),
        GroupState.update_record(session(1), 5, kit_node(1)),
    ],
)
def test_meaningless(record):
    """Records of strangers, second joins, taken identities and old numbers change nothing."""
    state = GroupState()
    state.apply(join(1))
    state.apply(send(1, 5))
    before = dict(state.members)

    assert state.apply(record) is None
    assert state.members == before


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"garbage",
        cbor2.dumps([2, 1, b"s"]),
        cbor2.dumps([1, 99, b"s"]),
        cbor2.dumps([1, 1, b"s"]),
        cbor2.dumps([1, 1, b"s", [b"s", b"short", [], 0], b""]),
        cbor2.dumps([1, 1, session(2), [session(2), kit_node(2).pack(), [], 0], "words"]),
        cbor2.dumps([1, 3, session(1), "one", b""]),
        cbor2.dumps([1, 3, session(1), 9, 5]),
        GroupState.send_record(session(1), 9, bytes(PAYLOAD_BYTES_MAX + 1)),
        GroupState.update_record(session(1), 9, kit_node(2)),
        cbor2.dumps([1, 5, b"s"]),
    ],
)
def test_damaged(record):
    """What no member writes is told, not guessed at."""
    state = GroupState()
    state.apply(join(1))

    with pytest.raises(RecordDamaged):
        state.apply(record)


RECORDS = st.one_of(
    st.builds(join, st.integers(0, 5), st.integers(0, 3)),
    st.builds(send, st.integers(0, 5), st.integers(1, 4)),
    st.builds(lambda i: GroupState.leave_record(session(i)), st.integers(0, 5)),
)


@given(st.lists(RECORDS, max_size=60), st.integers(0, 60))
def test_snapshot(records, cut):
    """A state restored from a snapshot goes on exactly as the original; the events of any log are sound."""
    state = GroupState()
    events = [event for event in map(state.apply, records[:cut]) if event is not None]
    twin, position = GroupState.from_snapshot(state.snapshot_record(session(9), 42))
    rest = [state.apply(record) for record in records[cut:]]

    assert [twin.apply(record) for record in records[cut:]] == rest
    assert position == 42 and list(twin.members.items()) == list(state.members.items())
    events += [event for event in rest if event is not None]
    if events:
        assert_sound(events)


def test_not_a_snapshot():
    """Another record is not taken for a snapshot."""
    with pytest.raises(RecordDamaged):
        GroupState.from_snapshot(join(1))


# -- sessions --


class LoopSession(GroupSession):
    """A log that is just this session."""

    async def append(self, record: bytes) -> None:
        await self.take(record)


@pytest.mark.anyio
async def test_backpressure():
    """A caller that reads no events stops the reading of the log instead of filling memory."""
    own = LoopSession(kit_node(0))
    await own.enter(b"")
    own.deadline_s = float("inf")
    async with anyio.create_task_group() as tasks:

        async def talk() -> None:
            for i in range(2 * EVENTS_MAX):
                await own.broadcast(b"%d" % i)

        tasks.start_soon(talk)
        await anyio.wait_all_tasks_blocked()
        waiting = len(own._events)
        events = own.events()
        got = [await anext(events) for _ in range(2 * EVENTS_MAX + 1)]

    assert waiting == EVENTS_MAX
    assert [e.payload for e in got[1:]] == [b"%d" % i for i in range(2 * EVENTS_MAX)]


@pytest.mark.anyio
async def test_lost_wakes_the_reader():
    """Losing the session ends a waiting reader, and no broadcast is taken any more."""
    own = LoopSession(kit_node(0))
    await own.enter(b"")
    events = own.events()
    await anext(events)
    ended: list[str] = []

    async def read() -> None:
        with pytest.raises(SessionLost, match="because"):
            await anext(events)
        ended.append("reader")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        own.lose("because")
    with pytest.raises(SessionLost):
        await own.broadcast(b"x")

    assert ended == ["reader"] and not own.alive()


@pytest.mark.anyio
async def test_mailbox():
    """Calls posted by many threads are all made, on the loop, those of one thread in its order."""
    mailbox = Mailbox()
    made: list[tuple[int, int]] = []
    home = threading.get_ident()
    done = anyio.Event()

    def note(thread: int, i: int) -> None:
        assert threading.get_ident() == home
        made.append((thread, i))
        if len(made) == 2000:
            done.set()

    def post(thread: int) -> None:
        for i in range(500):
            mailbox.post(lambda i=i: note(thread, i))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(mailbox.run)
        threads = [threading.Thread(target=post, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        with anyio.fail_after(20):
            await done.wait()
        for thread in threads:
            thread.join()
        mailbox.close()
    mailbox.post(done.set)  # after the end: ignored

    for n in range(4):
        assert [i for thread, i in made if thread == n] == list(range(500))
