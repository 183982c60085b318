"""Membership on top of any totally ordered log: what cluster drivers share.

A driver whose service can append records to one log that everybody reads in the same order (a file, a queue of znodes,
keys by revision, a Raft log) needs nothing more. :class:`GroupState` is the state machine that every session runs over
that log. Nothing is decided when a record is written; it is decided when it is read, and everybody reads the same:

* A record of a session that is no member (it left, was declared dead, or its join was refused) means nothing. So any
  number of members may report the same death, and what a slow process appends after its own ``Left`` is not delivered.
* A join under an identity that is a member already means nothing; the joiner sees that and decides what to do.
* Broadcasts and updates of a session are numbered; a number seen before means nothing. So an append whose outcome
  is unknown can be repeated.

Records are CBOR arrays ``[version, kind, session, ...]``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import cbor2

from sheepdog.api import PAYLOAD_BYTES_MAX, Delivered, Event, Joined, Left, Node, SheepdogError, Updated

RECORD_VERSION = 1


class RecordDamaged(Exception):
    """Bytes in a log that no member writes. The driver turns it into ``ConfigError`` or ``SessionLost``."""


class Kind(IntEnum):
    JOIN = 1
    LEAVE = 2
    SEND = 3
    UPDATE = 4
    SNAPSHOT = 5


@dataclass(frozen=True, slots=True)
class GroupMember:
    """A session that joined.

    :param session: chosen at random by the session itself; never used twice.
    :param notes: what the driver of this member tells the drivers of the others.
    :param number: of its last broadcast or update that counted.
    """

    session: bytes
    node: Node
    notes: tuple[int, ...] = ()
    number: int = 0


class GroupState:
    """The members after all records up to some position, oldest first."""

    def __init__(self) -> None:
        self.members: dict[bytes, GroupMember] = {}
        self.snapshot_at = 0
        """The highest position that a snapshot record among those applied states."""
        self.session = b""
        """Whose record was applied last."""

    def copy(self) -> GroupState:
        """The same state, to be carried on separately."""
        twin = GroupState()
        twin.members = dict(self.members)
        twin.snapshot_at = self.snapshot_at
        return twin

    @property
    def view(self) -> tuple[Node, ...]:
        return tuple(member.node for member in self.members.values())

    def named(self, node: Node) -> GroupMember | None:
        """The member that has the identity of ``node``."""
        return next((member for member in self.members.values() if member.node.id == node.id), None)

    @staticmethod
    def join_record(member: GroupMember, greeting: bytes) -> bytes:
        return cbor2.dumps([RECORD_VERSION, Kind.JOIN, member.session, _fields(member), greeting])

    @staticmethod
    def leave_record(session: bytes) -> bytes:
        """A leave, or the report of a death."""
        return cbor2.dumps([RECORD_VERSION, Kind.LEAVE, session])

    @staticmethod
    def send_record(session: bytes, number: int, payload: bytes) -> bytes:
        """:param number: 1 or more, larger than that of any record of this session appended before."""
        return cbor2.dumps([RECORD_VERSION, Kind.SEND, session, number, payload])

    @staticmethod
    def update_record(session: bytes, number: int, node: Node) -> bytes:
        """:param number: as ``send_record``; one sequence for both."""
        return cbor2.dumps([RECORD_VERSION, Kind.UPDATE, session, number, node.pack()])

    def snapshot_record(self, session: bytes, position: int) -> bytes:
        """This state, which holds at ``position``, as a record."""
        fields = [_fields(member) for member in self.members.values()]
        return cbor2.dumps([RECORD_VERSION, Kind.SNAPSHOT, session, position, fields])

    @classmethod
    def from_snapshot(cls, record: bytes) -> tuple[GroupState, int]:
        """The state in a snapshot record, and the position where it holds.

        :raises RecordDamaged: it is none.
        """
        kind, _, rest = _parse(record)
        if kind is not Kind.SNAPSHOT:
            raise RecordDamaged("no snapshot where one was expected")
        state = cls()
        try:
            state.snapshot_at, members = rest
            for member in map(_member, members):
                state.members[member.session] = member
        except (TypeError, ValueError, IndexError, SheepdogError) as error:
            raise RecordDamaged("a snapshot makes no sense") from error
        return state, state.snapshot_at

    def apply(self, record: bytes) -> Event | None:
        """The event that this record is, or None if it means nothing to members.

        :raises RecordDamaged: no member writes such a record.
        """
        kind, session, rest = _parse(record)
        self.session = session
        try:
            match kind:
                case Kind.JOIN:
                    member, greeting = _member(rest[0]), _payload(rest[1])
                    if session in self.members or self.named(member.node) is not None:
                        return None
                    self.members[session] = member
                    return Joined(member.node, greeting, self.view)
                case Kind.SNAPSHOT:
                    self.snapshot_at = max(self.snapshot_at, rest[0])
                    return None
            known = self.members.get(session)
            if known is None:
                return None
            if kind is Kind.LEAVE:
                del self.members[session]
                return Left(known.node, self.view)
            number, content = rest
            if number <= known.number:
                return None
            if kind is Kind.SEND:
                payload = _payload(content)
                self.members[session] = replace(known, number=number)
                return Delivered(known.node.id, payload)
            node = Node.unpack(content)
            if node.id != known.node.id:
                raise RecordDamaged("an update changes an identity")
            self.members[session] = replace(known, number=number, node=node)
            return Updated(node, self.view)
        except (TypeError, ValueError, IndexError, SheepdogError) as error:
            raise RecordDamaged(f"a {kind.name} record makes no sense") from error


def _fields(member: GroupMember) -> list[Any]:  # Any: bytes and integers, as CBOR takes them
    return [member.session, member.node.pack(), list(member.notes), member.number]


def _member(fields: list[Any]) -> GroupMember:  # Any: as above
    session, node, notes, number = fields
    return GroupMember(session, Node.unpack(node), tuple(notes), number)


def _payload(content: Any) -> bytes:  # Any: what CBOR held
    if not isinstance(content, bytes) or len(content) > PAYLOAD_BYTES_MAX:
        raise ValueError("no payload")
    return content


def _parse(record: bytes) -> tuple[Kind, bytes, list[Any]]:  # Any: the fields of the kind
    try:
        version, kind, session, *rest = cbor2.loads(record)
        if version != RECORD_VERSION:
            raise RecordDamaged(f"record version {version} is unknown")
        return Kind(kind), session, rest
    except (cbor2.CBORDecodeError, TypeError, ValueError) as error:
        raise RecordDamaged("a record is not understood") from error
