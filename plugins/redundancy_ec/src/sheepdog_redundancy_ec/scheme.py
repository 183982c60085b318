"""The d:p scheme: where each byte of an object lies in the shards.

A stripe is 512 bytes of the object. It is cut into d strips of w = 512/d bytes; p parity strips of w bytes are computed
from them. Shard k holds strip k of stripe 0, 1, 2, ... in a row. So byte b of the object is byte
``(b // 512) * w + b % w`` of shard ``(b % 512) // w``, and parity at one place of a shard depends on the same place of
the others only: any range of shards can be decoded by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sheepdog.api import Buffer, ConfigError, RedundancyFactory, RedundancyScheme, ShardRange, ShardWrite
from sheepdog_redundancy_ec.coders import Coder, fastest_coder
from sheepdog_redundancy_ec.galois import make_code
from sheepdog_redundancy_ec.memory import gather_strips, scatter_strip

STRIPE_BYTES = 512
DATA_STRIPS = (2, 4, 8, 16)
PARITY_MAX = 15


def unpack_policy(policy: int) -> tuple[int, int]:
    """(data, parity) of a policy byte.

    :raises ConfigError: it is no erasure code.
    """
    data, parity = (policy >> 4) * 2, policy & 15
    if not 0 <= policy <= 0xFF or data not in DATA_STRIPS or not 1 <= parity <= PARITY_MAX:
        raise ConfigError(
            f"policy {policy:#04x} is no erasure code; data strips are 2, 4, 8 or 16, parity strips 1 to 15"
        )
    return data, parity


class ErasureScheme(RedundancyScheme):
    """``data`` + ``parity`` strips."""

    __slots__ = ("_code", "_coder", "_data", "_shards", "_strip_bytes")

    def __init__(self, data: int, parity: int, coder: Coder) -> None:
        self._code = make_code(data, parity)
        self._coder = coder
        self._data = data
        self._shards = data + parity
        self._strip_bytes = STRIPE_BYTES // data

    def __repr__(self) -> str:
        return f"ErasureScheme({self._data}:{self._code.parity})"

    @property
    def policy(self) -> int:
        return self._data // 2 << 4 | self._code.parity

    @property
    def shards(self) -> int:
        return self._shards

    @property
    def shards_to_read(self) -> int:
        return self._data

    @property
    def identical(self) -> bool:
        return False

    def shard_bytes(self, object_bytes: int) -> int:
        return -(-object_bytes // STRIPE_BYTES) * self._strip_bytes

    def widen(self, offset_bytes: int, length_bytes: int) -> tuple[int, int]:
        start = offset_bytes // STRIPE_BYTES * STRIPE_BYTES
        end = -(-(offset_bytes + length_bytes) // STRIPE_BYTES) * STRIPE_BYTES
        return start, end - start

    def split(self, data: Buffer, *, offset_bytes: int) -> Sequence[ShardWrite]:
        assert offset_bytes % STRIPE_BYTES == 0 and len(data) % STRIPE_BYTES == 0 and len(data), (
            offset_bytes,
            len(data),
        )
        if len(data) == STRIPE_BYTES:
            source = memoryview(data)  # one stripe: its strips are where they must be
        else:
            source = memoryview(gather_strips(data, self._data, self._strip_bytes))
        length = len(data) // self._data
        strips: list[Buffer] = [source[start : start + length] for start in range(0, len(data), length)]
        strips += self._coder.encode(self._code, strips)
        offset = offset_bytes // self._data
        return [ShardWrite(index, offset, strip) for index, strip in enumerate(strips)]

    def _needed(self, offset: int, length: int) -> dict[int, tuple[int, int]]:
        """Data shard -> (first byte, byte after the last) of its file that the range covers."""
        width = self._strip_bytes
        first_stripe, first_byte = divmod(offset, STRIPE_BYTES)
        last_stripe, last_byte = divmod(offset + length - 1, STRIPE_BYTES)
        first_strip, first_inside = divmod(first_byte, width)
        last_strip, last_inside = divmod(last_byte, width)
        needed = {}
        for index in range(self._data):
            start = first_stripe * width
            if index == first_strip:
                start += first_inside
            elif index < first_strip:
                start += width
            end = last_stripe * width
            if index == last_strip:
                end += last_inside + 1
            elif index < last_strip:
                end += width
            if start < end:
                needed[index] = (start, end)
        return needed

    def plan_read(self, offset_bytes: int, length_bytes: int, available: Sequence[int]) -> Sequence[ShardRange] | None:
        if length_bytes <= 0:
            return []
        needed = self._needed(offset_bytes, length_bytes)
        if all(index in available for index in needed):
            return [ShardRange(index, start, end - start) for index, (start, end) in needed.items()]
        # Something is missing. The same places of any d shards give it back; data shards come first because
        # what is read of them need not be computed.
        usable = sorted(index for index in set(available) if 0 <= index < self._shards)
        if len(usable) < self._data:
            return None
        start = min(start for start, _ in needed.values())
        end = max(end for _, end in needed.values())
        return [ShardRange(index, start, end - start) for index in usable[: self._data]]

    def join(self, parts: Mapping[ShardRange, Buffer], *, offset_bytes: int, length_bytes: int) -> Buffer:
        if length_bytes <= 0:
            return b""
        needed = self._needed(offset_bytes, length_bytes)
        got = {source.index: (source.offset_bytes, data) for source, data in parts.items()}
        missing = [index for index in needed if index not in got]
        if missing:
            ((start, length),) = {(start, len(data)) for start, data in got.values()}  # plan_read asked for one range
            decoded = self._coder.reconstruct(self._code, {index: data for index, (_, data) in got.items()}, missing)
            got.update({index: (start, data) for index, data in zip(missing, decoded, strict=True)})
            assert all(start <= low and high <= start + length for low, high in needed.values()), (
                needed,
                start,
                length,
            )
        if len(needed) == 1:
            ((index, (low, high)),) = needed.items()
            if high - low == length_bytes:  # inside one strip
                start, data = got[index]
                return memoryview(data)[low - start : high - start]
        first_stripe = offset_bytes // STRIPE_BYTES
        last_stripe = (offset_bytes + length_bytes - 1) // STRIPE_BYTES
        result = memoryview(bytearray((last_stripe - first_stripe + 1) * STRIPE_BYTES))
        for index, (low, high) in needed.items():
            start, data = got[index]
            self._place(
                result, memoryview(data)[low - start : high - start], index, low - first_stripe * self._strip_bytes
            )
        skip = offset_bytes - first_stripe * STRIPE_BYTES
        return result[skip : skip + length_bytes]

    def _place(self, result: memoryview, data: memoryview, index: int, position: int) -> None:
        """``data``, which starts at ``position`` of shard ``index``, is at its places in whole stripes ``result``."""
        width = self._strip_bytes
        head = min(-position % width, len(data))
        tail = (len(data) - head) % width
        if head:
            stripe, inside = divmod(position, width)
            target = stripe * STRIPE_BYTES + index * width + inside
            result[target : target + head] = data[:head]
        whole = len(data) - head - tail
        if whole:
            first = (position + head) // width
            stripes = result[first * STRIPE_BYTES : (first + whole // width) * STRIPE_BYTES]
            scatter_strip(stripes, data[head : head + whole], index, self._data, width)
        if tail:
            target = (position + head + whole) // width * STRIPE_BYTES + index * width
            result[target : target + tail] = data[head + whole :]

    def rebuild(self, index: int, parts: Mapping[int, Buffer]) -> Buffer:
        others = {source: data for source, data in parts.items() if source != index}
        assert len(others) >= self._data and 0 <= index < self._shards, (index, sorted(parts))
        (rebuilt,) = self._coder.reconstruct(self._code, others, [index])
        return rebuilt

    def verify(self, parts: Mapping[int, Buffer]) -> bool:
        parity = self._coder.encode(self._code, [parts[index] for index in range(self._data)])
        return all(bytes(strip) == bytes(parts[self._data + number]) for number, strip in enumerate(parity))


class ErasureFactory(RedundancyFactory):
    """Makes d:p schemes.

    :param coder: who does the arithmetic; the fastest that works here when ``None``.
    """

    def __init__(self, coder: Coder | None = None) -> None:
        self._coder = coder

    def accepts(self, policy: int) -> bool:
        try:
            unpack_policy(policy)
        except ConfigError:
            return False
        return True

    def scheme(self, policy: int, shards: int) -> RedundancyScheme:
        data, parity = unpack_policy(policy)
        if shards != data + parity:
            raise ConfigError(f"policy {data}:{parity} has {data + parity} shards, not {shards}")
        return ErasureScheme(data, parity, self._coder or fastest_coder())
