"""Opcodes of our own, spoken only between sheep of this project.

They lie in 0xd0..0xef, which the original never assigned (it answers INVALID_PARMS to them). All are peer operations with
the internal protocol version; those from 0xe0 on use the object variant.
"""

from __future__ import annotations

FORWARD_CREATE = 0xE1  # a gateway asks the object's primary; fields as CREATE_AND_WRITE_OBJ
FORWARD_WRITE = 0xE3  # as WRITE_OBJ
FORWARD_REMOVE = 0xE4  # as REMOVE_OBJ
FORWARD_DECREF = 0xE5  # as DECREF_OBJ (ref variant)
SETTLE = 0xE7  # the primary of oid copies its content over the other holders'
LOW_WATER = 0xE8  # tail: every change of the sender with a smaller number is complete
