"""Opcodes of our own, spoken only between sheep of this project.

They lie in 0xd0..0xef, which the original never assigned (it answers INVALID_PARMS to them). All are peer operations
with the internal protocol version; those from 0xe0 on use the object variant.
"""

from __future__ import annotations

OWN_OPCODES = 0xD0  # from here on

COMPARE = 0xE0  # the primary of oid compares all shards of it and repairs those that are wrong (daemon/repair.py)
# what the holder knows of shard ec_index of oid; with a body: the shard is right if that is its SHA-1
INSPECT = 0xE2
FORWARD_CREATE = 0xE1  # a gateway asks the object's primary; fields as CREATE_AND_WRITE_OBJ
FORWARD_WRITE = 0xE3  # as WRITE_OBJ
FORWARD_REMOVE = 0xE4  # as REMOVE_OBJ
FORWARD_DECREF = 0xE5  # as DECREF_OBJ (ref variant)
# the primary of oid gives every holder the same version; offset 1: shards may differ, 0: some are missing
SETTLE = 0xE7
LOW_WATER = 0xE8  # tail: every change of the sender with a smaller number is complete
REPAIR = 0xE9  # the primary of oid brings the copy of its holder number ec_index in line with the majority

# see daemon/fencing.py; variant: the node that speaks, and the number of a fence
HELLO = 0xD4  # the first request of a connection between sheep: who made it
FENCE = 0xD5  # a gateway asks a primary: whatever others sent to it before now has arrived, or never will
FENCE_ASK = 0xD6  # a primary asks for a mark over the connection that our requests to it come by
FENCE_MARK = 0xD7  # that mark

SCRUB = 0xD3  # asked by dog; variant: what to do (u32) and a rate (u32, MB/s); answer: a CBOR map (daemon/scrub.py)
DRIVER_STATUS = 0xD2  # asked by dog, of any sheep in any status; answer: a CBOR map, see daemon/session.py

# first byte of the variant of a REPAIR_REPLICA answer: the copy was right by the time it was looked at
REPAIR_NEEDLESS = 1
RECOVERY_POINT = 0xEA  # answer: the last epoch of which everybody has everything (recovery_fetch.VERSION)
STRIP_STATE = 0xEB  # which change of the strip of oid is on record; cow_oid: a change, is it known to be complete?
STRIP_DECIDE = 0xEC  # the change cow_oid of oid stays (tgt_epoch 1) or is taken back (0)
STRIP_WRITE = 0xEE  # as WRITE_PEER, several pieces of one strip at once (daemon/striped.py)
STRIP_HELLO = 0xEF  # changes of strips with the upper half of the number cow_oid will come; tail: as LOW_WATER
FORWARD_READ = 0xED  # a gateway asks the object's primary for bytes that must be computed from strips
