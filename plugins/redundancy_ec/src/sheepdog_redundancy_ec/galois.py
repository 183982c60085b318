"""The field GF(2^8) and the generator matrix.

Field: polynomials over GF(2) modulo x^8+x^4+x^3+x^2+1 (0x11d), generator 2. Addition is XOR; multiplication goes
through logarithms.

Matrix: take the (d+p) x d Vandermonde matrix whose row 0 is (1, 0, ..., 0) and whose row r >= 1 is α^((r-1)·column),
and multiply it by the inverse of its top d x d part. The top becomes the identity, so data strips are stored as is,
and any d rows can still be inverted (L. Rizzo, "Effective Erasure Codes for Reliable Computer Communication
Protocols", 1997).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

POLYNOMIAL = 0x11D
ORDER = 255  # of the multiplicative group

Row = bytes
Matrix = tuple[Row, ...]


def _tables() -> tuple[bytes, bytes]:
    exponentials = bytearray(2 * ORDER)
    logarithms = bytearray(256)
    value = 1
    for power in range(ORDER):
        exponentials[power] = exponentials[power + ORDER] = value
        logarithms[value] = power
        value <<= 1
        if value & 0x100:
            value ^= POLYNOMIAL
    return bytes(exponentials), bytes(logarithms)


EXPONENTIALS, LOGARITHMS = _tables()


def multiply(a: int, b: int) -> int:
    """The product of two field elements."""
    if a == 0 or b == 0:
        return 0
    return EXPONENTIALS[LOGARITHMS[a] + LOGARITHMS[b]]


def inverse(a: int) -> int:
    """The element whose product with ``a`` is 1; ``a`` is not 0."""
    assert a != 0
    return EXPONENTIALS[ORDER - LOGARITHMS[a]]


@lru_cache(maxsize=256)
def product_table(factor: int) -> bytes:
    """``table[x]`` is ``factor * x``: what ``bytes.translate`` needs to multiply a whole strip."""
    return bytes(multiply(factor, x) for x in range(256))


def multiply_matrices(left: Sequence[Row], right: Sequence[Row]) -> Matrix:
    """left x right."""
    rows = []
    for row in left:
        result = bytearray(len(right[0]))
        for factor, other in zip(row, right, strict=True):
            if factor:
                table = product_table(factor)
                for column, value in enumerate(other):
                    result[column] ^= table[value]
        rows.append(bytes(result))
    return tuple(rows)


def invert_matrix(matrix: Sequence[Row]) -> Matrix:
    """The inverse of a square matrix that has one (Gauss-Jordan)."""
    size = len(matrix)
    work = [bytearray(row) + bytearray(size) for row in matrix]
    for index, row in enumerate(work):
        row[size + index] = 1
    for column in range(size):
        pivot = next(index for index in range(column, size) if work[index][column])
        work[column], work[pivot] = work[pivot], work[column]
        work[column] = work[column].translate(product_table(inverse(work[column][column])))
        for index in range(size):
            factor = work[index][column]
            if index != column and factor:
                scaled = work[column].translate(product_table(factor))
                work[index] = bytearray(a ^ b for a, b in zip(work[index], scaled, strict=True))
    return tuple(bytes(row[size:]) for row in work)


@dataclass(frozen=True)
class Code:
    """A d:p code. Strips 0..d-1 are data, d..d+p-1 are parity."""

    data: int
    parity: int
    matrix: Matrix
    """(d+p) x d; strip r is row r times the data strips."""

    @property
    def parity_rows(self) -> Matrix:
        return self.matrix[self.data :]

    def recipe(self, sources: tuple[int, ...], wanted: tuple[int, ...]) -> Matrix:
        """Rows that make the wanted strips out of d source strips, in the order of ``sources``."""
        return _recipe(self.data, self.parity, sources, wanted)


@lru_cache(maxsize=64)
def make_code(data: int, parity: int) -> Code:
    """The code for ``data`` and ``parity`` strips."""
    vandermonde = [bytes([1]) + bytes(data - 1)]
    for row in range(data + parity - 1):
        vandermonde.append(bytes(EXPONENTIALS[row * column % ORDER] for column in range(data)))
    return Code(data, parity, multiply_matrices(vandermonde, invert_matrix(vandermonde[:data])))


@lru_cache(maxsize=1024)
def _recipe(data: int, parity: int, sources: tuple[int, ...], wanted: tuple[int, ...]) -> Matrix:
    matrix = make_code(data, parity).matrix
    back_to_data = invert_matrix([matrix[index] for index in sources])
    return multiply_matrices([matrix[index] for index in wanted], back_to_data)
