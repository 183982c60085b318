"""What travels through the cluster driver: round trips, bounds, and bytes that nobody should send."""

import anyio
import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepdog.contracts.cluster import PAYLOAD_BYTES_MAX
from sheepdog.daemon import messages
from sheepdog.daemon.admission import Member, Transfer
from sheepdog.daemon.messages import Greeting
from sheepdog.daemon.sections import Sections
from sheepdog.daemon.vdi_table import VdiTable
from sheepdog.errors import ClusterUnavailable, PayloadTooLarge, ProtocolError, SessionLost
from sheepdog.model.clusterinfo import ClusterFlag, ClusterStatus
from sheepdog.model.node import Node, NodeId
from sheepdog.model.vdi_state import LockType, VdiState

NODES = tuple(Node(NodeId.of("10.0.0.1", 7000 + number), 128, number, 1 << 40) for number in range(3))

states = st.builds(
    VdiState,
    vid=st.integers(1, 0xFFFFFF),
    copies=st.integers(0, 31),
    snapshot=st.booleans(),
    deleted=st.booleans(),
    copy_policy=st.integers(0, 255),
    block_size_shift=st.integers(0, 31),
    parent_vid=st.integers(0, 0xFFFFFF),
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 64), (1 << 64) - 1) | st.binary(max_size=60) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(states, max_size=5), st.integers(0, (1 << 64) - 1), st.text(max_size=15), st.booleans())
def test_greeting_round_trip(inventory, ctime, store, flag):
    """A greeting is understood as it was meant."""
    greeting = Greeting(
        proto=10, nonce=5, ctime=ctime, epoch=3, epoch_time=9, flags=4, copies=2, store=store, auto_vnodes=flag,
        gateway=not flag, members=NODES, inventory=tuple(inventory), complete=flag,
    )  # fmt: skip
    assert Greeting.unpack(greeting.pack()) == greeting


@settings(max_examples=20, deadline=None)  # each table has two bitmaps of 2 MiB
@given(st.lists(states, max_size=5, unique_by=lambda state: state.vid))
def test_transfer_round_trip(known):
    """The state that a joiner reads is the state that was frozen."""
    table = VdiTable()
    for state in known:
        table.put(state.lock(NODES[0].id, LockType.SHARED) if state.vid % 2 else state)
        table.use(state.vid)
        if state.deleted:
            table.mark_deleted(state.vid)
    table.use(0x123456)
    members = (
        Member(NODES[0], Greeting(10, 1), admitted=True, complete=True),
        Member(NODES[1], Greeting(10, 2), inventory=list(known)),
    )
    transfer = Transfer(
        position=7, status=ClusterStatus.OK, ctime=1, epoch=2, flags=ClusterFlag(4), copies=3, copy_policy=0,
        block_size_shift=22, store="plain", recovery_disabled=True, epoch_nodes=NODES, epoch_time=8,
        before_nodes=NODES[:2], lifted=True, members=members, vdis=table, claims=[], extras={"half_done": []},
    )  # fmt: skip
    read = Transfer.unpack(transfer.pack())
    assert read.vdis.states() == table.states()
    assert read.vdis.in_use == table.in_use
    assert read.vdis.deleted == table.deleted
    assert read.members == members
    assert (read.position, read.epoch_nodes, read.before_nodes, read.lifted) == (7, NODES, NODES[:2], True)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | st.builds(cbor2.dumps, values))
def test_garbage(payload):
    """Whatever bytes come, the only complaint is ProtocolError."""
    for unpack in (Greeting.unpack, Transfer.unpack, messages.decode):
        try:
            unpack(payload)
        except ProtocolError:
            pass


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(cbor2.loads(Greeting(10, 1).pack()))), values)
def test_wrong_field(key, value):
    """A greeting with any wrong field is refused in the same way, or read with that field as a value of its type."""
    fields = cbor2.loads(Greeting(10, 1, members=NODES, inventory=(VdiState(vid=1),)).pack())
    fields[key] = value
    try:
        Greeting.unpack(cbor2.dumps(fields))
    except ProtocolError:
        pass


def test_newer_sheep_may_say_more():
    """Unknown keys are skipped; another version is not guessed at."""
    fields = cbor2.loads(Greeting(10, 1).pack())
    assert Greeting.unpack(cbor2.dumps({**fields, "new": [1, 2]})) == Greeting(10, 1)
    with pytest.raises(ProtocolError, match="version"):
        messages.decode(cbor2.dumps({**fields, "v": 2}))


def test_limit():
    """A payload at the limit is sent, one byte more is refused before it is sent."""
    overhead = len(messages.encode({"v": 1, "x": bytes(1 << 16)})) - (1 << 16)
    assert len(messages.encode({"v": 1, "x": bytes(PAYLOAD_BYTES_MAX - overhead)})) == PAYLOAD_BYTES_MAX
    with pytest.raises(PayloadTooLarge):
        messages.encode({"v": 1, "x": bytes(PAYLOAD_BYTES_MAX - overhead + 1)})
    with pytest.raises(ProtocolError):
        messages.decode(bytes(PAYLOAD_BYTES_MAX + 1))


@pytest.mark.parametrize("count", [0, 1, 3000])
@pytest.mark.parametrize("locked", [False, True])
def test_inventory_fits(count, locked):
    """However many volumes a sheep knows, each payload fits, and together they are complete and in order."""
    known = [VdiState(vid=vid, copies=31, parent_vid=0xFFFFFF) for vid in range(1, count + 1)]
    if locked:
        known = [state.lock(NODES[0].id, LockType.NORMAL) for state in known]
    chunks = messages.inventory_chunks(known)
    greeting = Greeting(10, 1, members=NODES * 200, inventory=chunks[0], complete=len(chunks) == 1).pack()
    payloads = messages.inventory_messages(chunks[1:])
    assert max(map(len, [greeting, *payloads])) <= PAYLOAD_BYTES_MAX
    told = list(Greeting.unpack(greeting).inventory)
    for payload in payloads:
        told += messages.unpack_states(messages.decode(payload)["vdis"])
    assert told == known
    assert [messages.decode(payload)["last"] for payload in payloads] == [False] * (len(payloads) - 1) + [True] * bool(
        payloads
    )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(states, max_size=4), min_size=2, max_size=4), st.randoms())
def test_merge_is_a_union(tables, random):
    """The order in which sheep bring their volumes decides nothing about which are used, deleted or snapshots."""

    def merged(order):
        table = VdiTable()
        for part in order:
            table.merge(part)
        return (
            list(table.in_use), list(table.deleted),
            [(state.vid, state.snapshot, state.deleted) for state in table.states()],
        )  # fmt: skip

    other = list(tables)
    random.shuffle(other)
    assert merged(tables) == merged(other)


def test_table_lookups():
    """The data path's two questions, before and after changes."""
    table = VdiTable()
    assert table.scheme_of(5) is None
    table.put(VdiState(vid=5, copies=2, block_size_shift=22))
    table.use(5)
    assert (table.scheme_of(5), table.readonly(5)) == ((2, 0, 22), False)
    table.merge([VdiState(vid=5, copies=9, snapshot=True)])
    assert (table.scheme_of(5), table.readonly(5)) == ((2, 0, 22), True)
    table.forget(5)
    assert (table.scheme_of(5), table.readonly(5), 5 in table.in_use) == (None, False, False)


def test_dead_families():
    """A family counts as dead when its root and all descendants are deleted, and not before."""
    table = VdiTable()
    for vid, parent in ((1, 0), (2, 1), (3, 2), (9, 0)):
        table.put(VdiState(vid=vid, parent_vid=parent))
        table.use(vid)
    for vid in (1, 3):
        table.mark_deleted(vid)
    assert table.dead_families() == []
    table.mark_deleted(2)
    assert table.dead_families() == [1, 2, 3]


# ---- sections


class Order:
    """A total order of messages between two members in one process."""

    def __init__(self):
        self.members = {node.id: Sections(node.id) for node in NODES[:2]}
        self.applied = {node: [] for node in self.members}
        self.queue = []
        for node, sections in self.members.items():
            sections.register("note", self._applier(node))
            sections.attach(self._sender(node))

    def _applier(self, node):
        async def apply(fields, sender):
            if fields.get("fail"):
                raise ValueError("no")
            self.applied[node].append(fields["x"])
            return fields["x"] * 2

        return apply

    def _sender(self, node):
        async def send(payload):
            self.queue.append((node, messages.decode(payload)))
            await anyio.lowlevel.checkpoint()

        return send

    async def deliver(self):
        """Delivers for ever."""
        while True:
            if not self.queue:
                await anyio.sleep(0.001)
                continue
            sender, fields = self.queue.pop(0)
            for sections in self.members.values():
                kind = fields["k"]
                if kind == messages.CHANGE:
                    await sections.delivered_change(sender, fields["t"], fields)
                elif kind == messages.CLAIM:
                    sections.delivered_claim(sender, fields["t"])
                else:
                    sections.delivered_release(sender, fields["t"])


@pytest.mark.anyio
async def test_sections_exclude_each_other():
    """Between two sheep only one is inside; everybody applies the same changes in the same order."""
    order = Order()
    inside = []

    async def work(sections, number):
        async with sections.exclusive() as section:
            inside.append(number)
            assert await section.change("note", x=number) == 2 * number
            await anyio.sleep(0.002)
            assert inside[-1] == number
            await section.finish("note", x=number + 100)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(order.deliver)
        async with anyio.create_task_group() as workers:
            for number in range(6):
                workers.start_soon(work, order.members[NODES[number % 2].id], number)
        tasks.cancel_scope.cancel()

    first, second = order.applied.values()
    assert first == second
    assert first == [entry for number in inside for entry in (number, number + 100)]
    assert all(not sections.claims for sections in order.members.values())


@pytest.mark.anyio
async def test_abandoned_section_is_released():
    """A holder that fails or is cancelled does not keep the others out."""
    order = Order()
    one, two = order.members.values()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(order.deliver)
        with pytest.raises(ValueError, match="mine"):
            async with one.exclusive():
                raise ValueError("mine")
        with anyio.move_on_after(0.01):
            async with one.exclusive():
                await anyio.sleep_forever()
        async with one.exclusive():
            with anyio.move_on_after(0.01):
                async with two.exclusive():
                    raise AssertionError("two are inside")
        with anyio.fail_after(5):
            async with two.exclusive() as section:
                await section.finish("note", x=1)
        tasks.cancel_scope.cancel()
    assert order.applied[NODES[0].id] == [1]


@pytest.mark.anyio
async def test_left_passes_the_turn_on():
    """When a holder's Left is delivered the next one's turn comes; what the dead one still sent counts for nothing."""
    order = Order()
    one, two = order.members.values()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(order.deliver)
        async with one.exclusive() as section:
            async with anyio.create_task_group() as waiting:

                async def second():
                    async with two.exclusive() as turn:
                        with pytest.raises(SessionLost):
                            await section.change("note", x=7)
                        await turn.finish("note", x=8)

                waiting.start_soon(second)
                await anyio.sleep(0.01)
                for sections in order.members.values():
                    sections.node_left(NODES[0].id)
        tasks.cancel_scope.cancel()
    assert list(order.applied.values()) == [[8], [8]]


@pytest.mark.anyio
async def test_errors_reach_the_sender():
    """What an applier raises is raised where the change was submitted, and nowhere else."""
    order = Order()
    one, two = order.members.values()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(order.deliver)
        with pytest.raises(ValueError, match="no"):
            await one.submit("note", x=1, fail=True)
        assert await two.submit("note", x=2) == 4
        tasks.cancel_scope.cancel()


@pytest.mark.anyio
async def test_lost_session_wakes_everybody():
    """Who waits for a turn or a delivery when the session ends gets an error; later ones are refused at once."""
    order = Order()
    one, _ = order.members.values()  # nothing is ever delivered
    caught = []

    async def wait(operation):
        try:
            await operation()
        except SessionLost as error:
            caught.append(error)

    async def turn():
        async with one.exclusive():
            pass

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait, turn)
        tasks.start_soon(wait, lambda: one.submit("note", x=1))
        await anyio.sleep(0.01)
        one.detach()
    assert len(caught) == 2
    with pytest.raises(ClusterUnavailable):
        await one.submit("note", x=1)
