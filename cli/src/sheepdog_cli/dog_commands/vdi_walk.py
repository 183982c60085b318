"""Visits every vdi and snapshot of the cluster, as listings need it."""

from __future__ import annotations

from collections.abc import Iterator

from sheepdog.client import admin, volume
from sheepdog.errors import ProtocolError, RequestError, TransportError
from sheepdog.model.ids import inode_oid
from sheepdog.model.inode import HEADER_BYTES, INODE_BYTES, MAP_ENTRIES, MAP_OFFSET, InodeHeader, allocated, map_view
from sheepdog_cli.dog_commands.common import complain_object
from sheepdog_cli.session import EXIT_SYSTEM, Quit, Session, complain

FIRST_READ_BYTES = HEADER_BYTES + 8  # the header and, of a hypervolume, the head of its B-tree
_LEAF_ENTRY_BYTES = 8
_INNER_ENTRY_BYTES = 16


class WalkedVdi:
    """A vdi as far as it was read."""

    __slots__ = ("buffer", "header", "session")

    def __init__(self, session: Session, buffer: bytearray) -> None:
        self.session = session
        self.buffer = buffer
        self.header = InodeHeader.unpack(buffer)

    def read_map(self) -> None:
        """The part of the map that the size of the vdi needs is in memory.

        :raises ObjectReadError: refused.
        """
        header = self.header
        if header.is_hypervolume:
            depth = int.from_bytes(self.buffer[MAP_OFFSET + 2 : MAP_OFFSET + 4], "little")
            entries = int.from_bytes(self.buffer[MAP_OFFSET + 4 : MAP_OFFSET + 8], "little")
            length = 8 + entries * (_LEAF_ENTRY_BYTES if depth == 1 else _INNER_ENTRY_BYTES)
            length = min(length, 4 * MAP_ENTRIES)
        else:
            length = 4 * min(header.objects, MAP_ENTRIES)
        self.buffer = self.buffer[:HEADER_BYTES]
        if length:
            oid = inode_oid(header.vdi_id)
            self.buffer += volume.read_object(self.session.call, oid, length, offset=MAP_OFFSET)

    def inode(self) -> volume.Inode:
        """The vdi as an inode to work with, once the map was read."""
        # A flat map may end with the volume; the root of a tree is looked at as a whole.
        rest = INODE_BYTES - len(self.buffer) if self.header.is_hypervolume else 0
        return volume.Inode(self.session.call, self.buffer + bytes(rest))

    def items(self) -> Iterator[tuple[int, int]]:
        """(index, owner) of every allocated object, once the map was read."""
        if self.header.is_hypervolume:
            return self.inode().map.items()
        return allocated(map_view(self.buffer))

    def counts(self) -> tuple[int, int]:
        """How many objects it owns, and how many it shares with its ancestors."""
        vid = self.header.vdi_id
        if self.header.is_hypervolume:
            owners = [owner for _, owner in self.items()]
        else:
            owners = map_view(self.buffer).tolist()
        own = owners.count(vid)
        return own, len(owners) - owners.count(0) - own


def walk(session: Session, *, maps: bool = False) -> Iterator[WalkedVdi]:
    """Every vdi that is not deleted, by VDI id. One that cannot be read is said on stderr and left out.

    :param maps: read the maps, too.
    :raises Quit: the list itself cannot be had; said on stderr.
    """
    try:
        vids = admin.used_vids(session.call)
    except RequestError as error:
        complain(str(error))
        raise Quit(EXIT_SYSTEM) from None
    except TransportError:
        raise Quit(EXIT_SYSTEM) from None
    for vid in vids:
        try:
            walked = WalkedVdi(session, volume.read_object(session.call, inode_oid(vid), FIRST_READ_BYTES))
            if not walked.header.name:
                continue
            if maps:
                walked.read_map()
        except volume.ObjectReadError as error:
            complain_object(error)
            complain("Failed to read inode header")
            continue
        except ProtocolError as error:
            complain(str(error))
            continue
        except TransportError:
            raise Quit(EXIT_SYSTEM) from None
        yield walked
