"""VDI states and locks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.errors import InvalidParameters, ProtocolError, VdiLocked, VdiNotFound
from sheepdog.model.node import NodeId
from sheepdog.model.vdi_state import (
    VDI_STATE_BYTES,
    LockState,
    LockType,
    Participant,
    SharedState,
    VdiState,
    pack_vdi_states,
    unpack_vdi_states,
)

A, B, C = (NodeId.of("127.0.0.1", port) for port in (7000, 7001, 7002))
FREE = VdiState(0x7C2B25, copies=3, block_size_shift=22)
NORMAL, SHARED = LockType.NORMAL, LockType.SHARED

IDS = st.builds(NodeId, st.binary(min_size=16, max_size=16), st.integers(0, 0xFFFF))
U8 = st.integers(0, 255)
U32 = st.integers(0, (1 << 32) - 1)
FLAGS = st.booleans()
STATES = st.one_of(
    st.builds(VdiState, U32, U8, FLAGS, FLAGS, U8, U8, U32),
    st.builds(VdiState, U32, U8, FLAGS, FLAGS, U8, U8, U32, st.just(LockState.LOCKED), IDS),
    st.builds(
        VdiState,
        U32,
        lock_state=st.just(LockState.SHARED),
        participants=st.lists(st.builds(Participant, IDS, st.sampled_from(SharedState)), max_size=31).map(tuple),
    ),
)


@given(st.lists(STATES, max_size=3))
def test_inverse(states):
    """States survive packing, alone and in a list."""
    packed = pack_vdi_states(states)

    assert len(packed) == VDI_STATE_BYTES * len(states)
    assert unpack_vdi_states(packed) == tuple(states)


def test_normal():
    """A normal lock excludes everybody, its owner too, and may be released from anywhere."""
    held = FREE.lock(A, NORMAL)

    assert (held.lock_state, held.owner) == (LockState.LOCKED, A)
    for node in (A, B):
        for kind in LockType:
            with pytest.raises(VdiLocked):
                held.lock(node, kind)
    assert held.release(B, NORMAL) == FREE
    assert held.release(A, SHARED) is held


def test_release_of_nothing():
    """Releasing what is not held changes nothing."""
    assert FREE.release(A, NORMAL) is FREE
    assert FREE.release(A, SHARED) is FREE
    shared = FREE.lock(A, SHARED)
    assert shared.release(A, NORMAL) is shared
    assert shared.release(B, SHARED) == shared


def test_shared():
    """The first participant is modified, later ones must read the inode first; the last one out unlocks."""
    both = FREE.lock(A, SHARED).lock(B, SHARED)

    assert (both.participant(A), both.participant(B)) == (SharedState.MODIFIED, SharedState.INVALIDATED)
    with pytest.raises(VdiLocked):
        both.lock(A, SHARED)
    with pytest.raises(VdiLocked):
        both.lock(C, NORMAL)
    assert both.release(A, SHARED).release(B, SHARED) == FREE


def test_shared_after_refresh():
    """Who joins while nobody is modified is as fresh as the others."""
    calm = FREE.lock(A, SHARED).validate(A)

    assert calm.lock(B, SHARED).participant(B) is SharedState.SHARED


def test_coherence():
    """One writer makes all others stale; each becomes fresh by itself, and with it whoever was not stale."""
    three = FREE.lock(A, SHARED).lock(B, SHARED).lock(C, SHARED)

    stale = three.invalidate_others(B)
    fresh = stale.validate(A)

    states = [stale.participant(node) for node in (A, B, C)]
    assert states == [SharedState.INVALIDATED, SharedState.MODIFIED, SharedState.INVALIDATED]
    assert [fresh.participant(node) for node in (A, B, C)] == [
        SharedState.SHARED,
        SharedState.SHARED,
        SharedState.INVALIDATED,
    ]


def test_coherence_of_strangers():
    """Only a participant can say anything about coherence."""
    with pytest.raises(VdiNotFound):
        FREE.lock(A, SHARED).invalidate_others(B)
    with pytest.raises(VdiNotFound):
        FREE.validate(A)


def test_too_many():
    """A shared lock has room for 31 nodes."""
    state = FREE
    for port in range(31):
        state = state.lock(NodeId.of("10.0.0.1", port), SHARED)

    with pytest.raises(VdiLocked):
        state.lock(A, SHARED)
    assert VdiState.unpack(state.pack()) == state
    with pytest.raises(InvalidParameters):
        VdiState(1, participants=(Participant(A, SharedState.SHARED),) * 32)


def test_node_left():
    """A node that leaves the cluster participates no more, but a normal lock of its stays."""
    assert FREE.lock(A, SHARED).lock(B, SHARED).without_node(A).participant(A) is None
    assert FREE.lock(A, SHARED).without_node(A) == FREE
    held = FREE.lock(A, NORMAL)
    assert held.without_node(A) is held


@given(st.lists(st.tuples(st.sampled_from([A, B, C]), st.sampled_from(["lock", "release", "invalidate", "validate"]))))
def test_one_modifier(steps):
    """Whatever happens, at most one participant is modified."""
    state = FREE
    for node, action in steps:
        try:
            if action == "lock":
                state = state.lock(node, SHARED)
            elif action == "release":
                state = state.release(node, SHARED)
            elif action == "invalidate":
                state = state.invalidate_others(node)
            else:
                state = state.validate(node)
        except (VdiLocked, VdiNotFound):
            pass
        assert [one.state for one in state.participants].count(SharedState.MODIFIED) <= 1
        assert (state.lock_state is LockState.SHARED) == bool(state.participants)


def test_zero_lock_state():
    """A state that was never filled counts as unlocked."""
    assert VdiState.unpack(bytes(VDI_STATE_BYTES)).lock_state is LockState.UNLOCKED


@pytest.mark.parametrize(("offset", "value"), [(16, 4), (60, 32), (64, 9)])
def test_impossible(offset, value):
    """Numbers that no state has are protocol errors."""
    raw = bytearray(FREE.lock(A, SHARED).pack())
    raw[offset] = value

    with pytest.raises(ProtocolError):
        VdiState.unpack(raw)


def test_short():
    """Too few bytes are a protocol error, and so is a list that ends inside a state."""
    with pytest.raises(ProtocolError):
        VdiState.unpack(bytes(VDI_STATE_BYTES - 1))
    with pytest.raises(ProtocolError):
        unpack_vdi_states(bytes(VDI_STATE_BYTES + 1))
