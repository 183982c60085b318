"""What a change means at the object's primary: picks plain write, map write, create, copy-on-write or striped write."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sheepdog.contracts.store import Buffer
from sheepdog.daemon.placement import Placement
from sheepdog.daemon.primary import Done, Primary
from sheepdog.daemon.references import References, is_map_write
from sheepdog.daemon.striped import Striped
from sheepdog.wire.extensions import FORWARD_CREATE, FORWARD_REMOVE, FORWARD_WRITE
from sheepdog.wire.results import Result

if TYPE_CHECKING:
    from sheepdog.daemon.gateway import Gateway


class Changes:
    """The changes that this sheep makes as a primary."""

    def __init__(self, primary: Primary, gateway: Gateway, references: References, striped: Striped) -> None:
        self._primary = primary
        self._gateway = gateway
        self.references = references
        self._striped = striped

    def apply(
        self, opcode: int, oid: int, offset: int, data: Buffer, cow_oid: int, placement: Placement, done: Done
    ) -> None:
        """The change is made at every holder, then ``done(result)``.

        :param opcode: one of the FORWARD opcodes.
        :param cow_oid: for a create, the object whose bytes surround ``data``; 0 for zeros.
        """
        if opcode == FORWARD_REMOVE:
            self._primary.remove(oid, placement, done)
        elif offset + len(data) > placement.object_bytes:
            done(Result.INVALID_PARMS)
        elif opcode == FORWARD_WRITE:
            if not placement.identical:
                self._striped.write(oid, offset, data, placement, done)
            elif is_map_write(oid, offset, len(data)):
                self.references.write_map(oid, offset, data, placement, done)
            else:
                self._primary.write(oid, offset, data, placement, done)
        else:
            assert opcode == FORWARD_CREATE, f"opcode 0x{opcode:02x} is no change"
            self._create(oid, offset, data, cow_oid, placement, done)

    def _create(self, oid: int, offset: int, data: Buffer, cow_oid: int, placement: Placement, done: Done) -> None:
        create_now = self._primary.create_now if placement.identical else self._striped.create_now
        whole = placement.object_bytes

        def copy_then_create(finish: Done) -> None:
            def source_read(result: int, source: Any) -> None:  # Any: the bytes on success
                if result:
                    finish(result)
                    return
                content = source if isinstance(source, bytearray) else bytearray(source)
                content[offset : offset + len(data)] = data
                create_now(oid, 0, content, placement, finish)

            self._gateway.submit_read(cow_oid, 0, whole, source_read)

        if cow_oid and len(data) < whole:
            self._primary.enter(oid, True, copy_then_create, done)
        else:
            self._primary.enter(oid, True, lambda finish: create_now(oid, offset, data, placement, finish), done)
