"""GET_VDI_ATTR: finds, creates, overwrites or deletes one attribute.

Attributes live in objects of their own, found by hash and linear probing. A deleted one leaves a tombstone that
searches pass over and that the next creation may use again. Changes run in an exclusive section, so that of several
sheep creating one key exclusively exactly one succeeds.
"""

from __future__ import annotations

from typing import NamedTuple

from sheepdog.daemon.vdi import Vdis
from sheepdog.errors import InvalidParameters, ObjectNotFound, RequestError
from sheepdog.model.attribute import ATTRIBUTE_BYTES, ATTRIBUTE_HEADER_BYTES, VALUE_OFFSET, Attribute
from sheepdog.model.hashing import vdi_hash
from sheepdog.model.ids import INDEX_MASK
from sheepdog.wire.header import Request, Response
from sheepdog.wire.opcodes import Flag
from sheepdog.wire.payloads import VdiRequest, VdiResponse
from sheepdog.wire.results import Result

PROBES_MAX = 1 << 16


class Slot(NamedTuple):
    """Where a search ended. ``free``: the first slot that a new attribute may take, where one was met."""

    found: int | None
    free: int | None

    @property
    def place(self) -> int:
        """Where the attribute is, or would be made."""
        place = self.found if self.found is not None else self.free
        assert place is not None, "a search without an end"
        return place


class Attributes:
    """The attribute operation."""

    def __init__(self, vdis: Vdis) -> None:
        self._vdis = vdis
        self._objects = vdis.objects
        self._sections = vdis.sections

    async def get_vdi_attr(self, request: Request) -> Response:
        """GET_VDI_ATTR. Without flags only the ids of the attribute are answered; the client reads the object."""
        if len(request.body) != ATTRIBUTE_BYTES:
            raise InvalidParameters(f"an attribute has {ATTRIBUTE_BYTES} bytes, not {len(request.body)}")
        wanted = Attribute.unpack(request.body)
        snap_id = VdiRequest.unpack(request.variant or b"").snapid
        if not wanted.name or not wanted.key:
            raise InvalidParameters("an attribute without name or key")
        if not request.flags & (Flag.CREAT | Flag.DEL):
            await self._vdis.find(wanted.name, wanted.tag, snap_id)
            slot = await self._search(wanted)
            return self._reply(wanted, slot, Result.SUCCESS if slot.found is not None else Result.NO_OBJ)
        async with self._sections.exclusive() as section:
            _, header = (await self._vdis.lookup(section, wanted.name, wanted.tag, snap_id)).found()
            slot = await self._search(wanted)
            if request.flags & Flag.DEL:
                if slot.found is None:
                    return self._reply(wanted, slot, Result.NO_OBJ)
                await self._objects.write(wanted.oid_at(slot.found), 0, b"\0")
                return self._reply(wanted, slot)
            if slot.found is not None and request.flags & Flag.EXCL:
                return self._reply(wanted, slot, Result.VDI_EXIST)
            taken = slot.place
            named = Attribute(wanted.name, wanted.tag, header.create_time, wanted.snap_id, wanted.key, wanted.value)
            # The whole object is replaced at once, so a reader never sees one value's length with another's bytes.
            await self._objects.create(wanted.oid_at(taken), 0, named.pack_header() + named.value)
            return self._reply(wanted, slot)

    async def _search(self, wanted: Attribute) -> Slot:
        free: int | None = None
        for step in range(PROBES_MAX):
            attr_id = wanted.first_id + step & INDEX_MASK
            try:
                data = await self._objects.read(wanted.oid_at(attr_id), 0, ATTRIBUTE_HEADER_BYTES)
            except ObjectNotFound:
                return Slot(None, attr_id if free is None else free)
            there = _header_only(bytes(data))
            if there.is_tombstone:
                if free is None:
                    free = attr_id
            elif there.same_slot(wanted):
                return Slot(attr_id, free)
        raise RequestError("too many attributes share one hash", result=Result.FULL_VDI)

    def _reply(self, wanted: Attribute, slot: Slot, result: Result = Result.SUCCESS) -> Response:
        """The numbers are told with a refusal, too, as by the original."""
        state = self._vdis.state
        number = vdi_hash(wanted.name)
        known = state.vdis.scheme_of(number)
        copies = known[0] if known is not None else state.copies
        return Response(result, variant=VdiResponse(number, slot.place, copies).pack())


def _header_only(data: bytes) -> Attribute:
    """The header of an attribute, without its value."""
    return Attribute.unpack(data[: VALUE_OFFSET - 260] + bytes(4) + data[VALUE_OFFSET - 256 : VALUE_OFFSET])
