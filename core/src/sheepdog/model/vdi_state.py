"""What every node knows of every VDI without reading its inode: redundancy, object size, read-only or not, and the
lock.

Locks belong to the sheep that a client talked to (a node id), and exist only in clusters formatted with ``-l``. A
shared lock lets several gateways serve one VDI: at most one participant is *modified* (its cached inode is newer than
the others'), the *invalidated* ones must read the inode again before they may do I/O. The transitions are those of the
table in docs, data model, section 10; they return a new state, or raise when the request is refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum
from struct import Struct

from sheepdog.errors import InvalidParameters, ProtocolError, VdiLocked, VdiNotFound
from sheepdog.model.limits import PARTICIPANTS_MAX
from sheepdog.model.node import NODE_ID_BYTES, NodeId

Buffer = bytes | bytearray | memoryview

VDI_STATE_BYTES = 1428
# vid, copies, snapshot, deleted, copy_policy, shift, parent, lock_state, owner, nr_participants, states, ids
_STATE = Struct(f"<IBBBBB3xII40sI{4 * PARTICIPANTS_MAX}s{NODE_ID_BYTES * PARTICIPANTS_MAX}s")
_WORDS = Struct(f"<{PARTICIPANTS_MAX}I")
_NOBODY = bytes(NODE_ID_BYTES)
assert _STATE.size == VDI_STATE_BYTES


class LockState(IntEnum):
    """Who may open the VDI."""

    UNLOCKED = 1
    LOCKED = 2
    SHARED = 3


class LockType(IntEnum):
    """What LOCK_VDI and RELEASE_VDI ask for."""

    NORMAL = 0
    SHARED = 1


class SharedState(IntEnum):
    """How fresh a participant's copy of the inode is."""

    MODIFIED = 1
    SHARED = 2
    INVALIDATED = 3


@dataclass(frozen=True, slots=True)
class Participant:
    """One gateway of a shared lock."""

    node: NodeId
    state: SharedState


@dataclass(frozen=True, slots=True)
class VdiState:
    """The state of one VDI.

    :param vid: 0 < vid < 2^24.
    :param copies: shards of a data object; wins over the inode's number.
    :param snapshot: data objects are read-only.
    :param owner: holder of a normal lock, ``None`` otherwise.
    :param participants: of a shared lock, in order of joining; at most 31.
    """

    vid: int
    copies: int = 0
    snapshot: bool = False
    deleted: bool = False
    copy_policy: int = 0
    block_size_shift: int = 0
    parent_vid: int = 0
    lock_state: LockState = LockState.UNLOCKED
    owner: NodeId | None = None
    participants: tuple[Participant, ...] = ()

    def __post_init__(self) -> None:
        if len(self.participants) > PARTICIPANTS_MAX:
            raise InvalidParameters(f"{len(self.participants)} participants, at most {PARTICIPANTS_MAX}")

    # --- bytes ---

    def pack(self) -> bytes:
        """1428 bytes."""
        states = [int(participant.state) for participant in self.participants]
        states += [0] * (PARTICIPANTS_MAX - len(states))
        return _STATE.pack(
            self.vid,
            self.copies,
            self.snapshot,
            self.deleted,
            self.copy_policy,
            self.block_size_shift,
            self.parent_vid,
            self.lock_state,
            _NOBODY if self.owner is None else self.owner.pack(),
            len(self.participants),
            _WORDS.pack(*states),
            b"".join(participant.node.pack() for participant in self.participants),
        )

    @classmethod
    def unpack(cls, buffer: Buffer, offset: int = 0) -> VdiState:
        """The state at ``offset``. What is left in the owner field of an unlocked VDI is ignored.

        :raises ProtocolError: too short, or a lock state, participant state or count that does not exist.
        """
        if offset < 0 or len(buffer) - offset < VDI_STATE_BYTES:
            raise ProtocolError(f"a vdi state has {VDI_STATE_BYTES} bytes, {len(buffer) - offset} are left")
        (
            vid, copies, snapshot, deleted, copy_policy, shift, parent, lock_state, owner, count, words, ids,
        ) = _STATE.unpack_from(buffer, offset)  # fmt: skip
        if count > PARTICIPANTS_MAX:
            raise ProtocolError(f"vdi state of {vid:x} announces {count} participants")
        try:
            lock = LockState(lock_state or LockState.UNLOCKED)
            participants = tuple(
                Participant(NodeId.unpack(ids, index * NODE_ID_BYTES), SharedState(word))
                for index, word in enumerate(_WORDS.unpack(words)[:count])
            )
        except ValueError as error:
            raise ProtocolError(f"vdi state of {vid:x}: {error}") from None
        return cls(
            vid=vid,
            copies=copies,
            snapshot=bool(snapshot),
            deleted=bool(deleted),
            copy_policy=copy_policy,
            block_size_shift=shift,
            parent_vid=parent,
            lock_state=lock,
            owner=NodeId.unpack(owner) if lock is LockState.LOCKED else None,
            participants=participants,
        )

    # --- locks ---

    def lock(self, node: NodeId, kind: LockType) -> VdiState:
        """The state after ``node`` was granted the lock.

        :raises VdiLocked: somebody holds it in a way that excludes this request.
        """
        if self.lock_state is LockState.LOCKED:
            raise VdiLocked(f"vdi {self.vid:x} is locked by {self.owner}")
        if kind is LockType.NORMAL:
            if self.lock_state is LockState.SHARED:
                raise VdiLocked(f"vdi {self.vid:x} is shared by {len(self.participants)} nodes")
            return replace(self, lock_state=LockState.LOCKED, owner=node)
        if self.lock_state is LockState.UNLOCKED:
            return replace(self, lock_state=LockState.SHARED, participants=(Participant(node, SharedState.MODIFIED),))
        if self.participant(node) is not None:
            raise VdiLocked(f"vdi {self.vid:x} is shared by {node} already")
        if len(self.participants) >= PARTICIPANTS_MAX:
            raise VdiLocked(f"vdi {self.vid:x} is shared by {PARTICIPANTS_MAX} nodes, the most there can be")
        modified = any(one.state is SharedState.MODIFIED for one in self.participants)
        fresh = SharedState.INVALIDATED if modified else SharedState.SHARED
        return replace(self, participants=(*self.participants, Participant(node, fresh)))

    def release(self, node: NodeId, kind: LockType) -> VdiState:
        """The state after a release; unchanged when there was nothing of that kind to release.

        As in the original, a normal lock may be released from any node.
        """
        if kind is LockType.NORMAL:
            if self.lock_state is not LockState.LOCKED:
                return self
            return replace(self, lock_state=LockState.UNLOCKED, owner=None)
        if self.lock_state is not LockState.SHARED:
            return self
        return self._with_participants(one for one in self.participants if one.node != node)

    def without_node(self, node: NodeId) -> VdiState:
        """The state after ``node`` left the cluster: no participant any more; a normal lock of its stays."""
        if self.participant(node) is None:
            return self
        return self._with_participants(one for one in self.participants if one.node != node)

    def invalidate_others(self, node: NodeId) -> VdiState:
        """``node`` is about to write map entries: it is modified, everybody else must read the inode again.

        :raises VdiNotFound: ``node`` is no participant.
        """
        self._require(node)
        return self._with_participants(
            Participant(one.node, SharedState.MODIFIED if one.node == node else SharedState.INVALIDATED)
            for one in self.participants
        )

    def validate(self, node: NodeId) -> VdiState:
        """``node`` has read the inode again: it and everybody who was not invalidated are shared.

        :raises VdiNotFound: ``node`` is no participant.
        """
        self._require(node)
        return self._with_participants(
            one
            if one.state is SharedState.INVALIDATED and one.node != node
            else Participant(one.node, SharedState.SHARED)
            for one in self.participants
        )

    def participant(self, node: NodeId) -> SharedState | None:
        """How fresh the copy of ``node`` is; ``None`` if it does not share the VDI."""
        for one in self.participants:
            if one.node == node:
                return one.state
        return None

    def _require(self, node: NodeId) -> None:
        if self.participant(node) is None:
            raise VdiNotFound(f"{node} does not share vdi {self.vid:x}")

    def _with_participants(self, participants: Iterable[Participant]) -> VdiState:
        left = tuple(participants)
        if not left:
            return replace(self, lock_state=LockState.UNLOCKED, participants=())
        return replace(self, participants=left)


def unpack_vdi_states(buffer: Buffer) -> tuple[VdiState, ...]:
    """All states of a GET_VDI_COPIES reply.

    :raises ProtocolError: the length is no multiple of a state's.
    """
    if len(buffer) % VDI_STATE_BYTES:
        raise ProtocolError(f"a list of vdi states of {len(buffer)} bytes is no multiple of {VDI_STATE_BYTES}")
    return tuple(VdiState.unpack(buffer, at) for at in range(0, len(buffer), VDI_STATE_BYTES))


def pack_vdi_states(states: Iterable[VdiState]) -> bytes:
    """The states one after the other."""
    return b"".join(state.pack() for state in states)
