"""What the inodes on this sheep's own disks say about volumes; read once at start.

An inode whose name was wiped belongs to a deleted volume: its number stays taken, and the mark is set here so that it
survives a restart of all sheep. One of zeros is none: a file system that crashed can leave a file with its size and
without its bytes, and a volume that is deleted anywhere is deleted.
"""

from __future__ import annotations

import logging

from sheepdog.contracts.store import ObjectStore
from sheepdog.errors import ProtocolError, StoreError
from sheepdog.model.ids import INODE_BIT, VID_MASK, is_inode, vid_of
from sheepdog.model.inode import FIELDS_BYTES, InodeHeader
from sheepdog.model.vdi_state import VdiState

logger = logging.getLogger(__name__)


def state_of(vid: int, header: InodeHeader) -> VdiState:
    """The state that an inode's header implies."""
    return VdiState(
        vid=vid,
        copies=header.nr_copies,
        snapshot=header.is_snapshot,
        deleted=header.is_deleted,
        copy_policy=header.copy_policy,
        block_size_shift=header.block_size_shift,
        parent_vid=header.parent_vdi_id & 0xFFFFFF,
    )


def local_states(store: ObjectStore) -> list[VdiState]:
    """The states of all volumes whose inode is stored here, ordered by vid. Runs on a worker thread.

    An inode that cannot be read, or is not that of its volume, is left out with a warning: other sheep hold copies.
    """
    states = []
    buffer = bytearray(FIELDS_BYTES)
    for key in store.keys():  # noqa: SIM118  a store is no mapping
        if not is_inode(key.oid) or key.oid & ~(INODE_BIT | VID_MASK << 32) or not vid_of(key.oid):
            continue
        try:
            count = store.read_into(key, memoryview(buffer), offset_bytes=0)
            header = InodeHeader.unpack(buffer[:count])
            if header.vdi_id != vid_of(key.oid):
                raise ProtocolError(f"it says that it belongs to vid={header.vdi_id:06x}")
            states.append(state_of(header.vdi_id, header))
        except (StoreError, ProtocolError) as error:
            logger.warning("inode oid=%016x cannot be read at start: %s", key.oid, error)
    return states
