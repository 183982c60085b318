"""64-bit FNV-1a and what Sheepdog builds on it.

FNV-1a: for each byte, xor it into the hash, then multiply by the prime modulo 2^64. A second pass over the hash's own
eight bytes (``next_hash``) spreads what one pass over a short key does not. Vectors: docs, data model, section 2.

Placement hashes one oid per uncached object and ring building some hundred positions per node, so the eight-byte form
is unrolled. The low 64 bits of a product depend on the low 64 bits of its factors alone, so the number is cut back to
64 bits only every fourth step.
"""

from __future__ import annotations

from struct import Struct

FNV_BASIS = 0xCBF29CE484222325
FNV_PRIME = 0x100000001B3
_MASK = (1 << 64) - 1
_U32 = Struct("<I")


def fnv1a(data: bytes | bytearray | memoryview, basis: int = FNV_BASIS) -> int:
    """The 64-bit FNV-1a hash of ``data``, continued from ``basis``."""
    value = basis
    prime = FNV_PRIME
    mask = _MASK
    for byte in bytes(data):
        value = (value ^ byte) * prime & mask
    return value


def _fnv8(key: int, value: int) -> int:
    """FNV-1a over the eight little-endian bytes of ``key``, starting from ``value``."""
    a, b, c, d, e, f, g, h = key.to_bytes(8, "little")
    prime = FNV_PRIME
    value = ((((value ^ a) * prime ^ b) * prime ^ c) * prime ^ d) * prime & _MASK
    return ((((value ^ e) * prime ^ f) * prime ^ g) * prime ^ h) * prime & _MASK


def next_hash(value: int) -> int:
    """The hash of the eight bytes of ``value``, starting from ``value`` itself."""
    return _fnv8(value, value)


def hash_chain(start: int, count: int) -> tuple[int, ...]:
    """``count`` successive ``next_hash`` values, ``start`` itself excluded."""
    step = _fnv8
    value = start
    chain = []
    for _ in range(count):
        value = step(value, value)
        chain.append(value)
    return tuple(chain)


def sd_hash(data: bytes | bytearray | memoryview) -> int:
    """Two passes: ``next_hash(fnv1a(data))``. Positions on rings."""
    return next_hash(fnv1a(data))


def hash_oid(oid: int) -> int:
    """The position of an object on a ring: ``sd_hash`` of its eight bytes."""
    value = _fnv8(oid, FNV_BASIS)
    return _fnv8(value, value)


def vdi_hash(name: bytes) -> int:
    """The 24-bit number where the search for a VDI name begins; a caller takes 0 as 1.

    :param name: the name without its NUL padding.
    """
    return fnv1a(name) & 0xFFFFFF


def attribute_id(name: bytes, tag: bytes, snap_id: int, key: bytes) -> int:
    """The 32-bit id where the search for an attribute begins.

    One FNV pass over the full-width, NUL-padded fields: name[256], tag[256], le32(snap_id), key[256].
    """
    padded = name.ljust(256, b"\0") + tag.ljust(256, b"\0") + _U32.pack(snap_id) + key.ljust(256, b"\0")
    return fnv1a(padded) & 0xFFFFFFFF
