"""Erasure coding: the kit, and the bytes of the original."""

import json
import os

import pytest

from sheepdog.api import ConfigError
from sheepdog.testing.redundancy_kit import RedundancyKit, StoredObject
from sheepdog.testing.vectors import vectors_path
from sheepdog_redundancy_ec.coders import CODERS, CoderUnavailable, make_coder
from sheepdog_redundancy_ec.galois import invert_matrix, make_code, multiply, multiply_matrices
from sheepdog_redundancy_ec.scheme import ErasureFactory, unpack_policy


@pytest.fixture(scope="module", params=list(CODERS))
def coder(request):
    try:
        return make_coder(request.param)
    except CoderUnavailable as error:
        if os.environ.get("CI") and request.param != "zfec":
            pytest.fail(f"{request.param} must work in CI: {error}")
        pytest.skip(f"{request.param}: {error}")


class TestErasureConforms(RedundancyKit):
    cases = ((0x11, 3), (0x12, 4), (0x22, 6), (0x43, 11), (0x8F, 31))
    forbidden = ((0x22, 5), (0x22, 7), (0x11, 31), (0x30, 6), (0x31, 7), (0, 3))

    @pytest.fixture
    def factory(self, coder):
        return ErasureFactory(coder)


def policy_of(data, parity):
    return data // 2 << 4 | parity


def test_matrix_rows():
    """The generator matrices are those of the placement specification, section 4."""
    rows = {
        (2, 1): ["0302"],
        (2, 2): ["0302", "0504"],
        (4, 1): ["7740380e"],
        (4, 2): ["7740380e", "c7a70d6c"],
        (8, 3): ["8918d07d92a4f5fe", "36f8d0ce2519fb16", "5fcda3405048f69e"],
    }
    for (data, parity), expected in rows.items():
        assert [row.hex() for row in make_code(data, parity).parity_rows] == expected


def test_known_stripe(coder):
    """The 4:2 parity of a counting stripe is the one that the original computes."""
    stripe = bytes(i % 256 for i in range(512))

    writes = ErasureFactory(coder).scheme(0x22, 6).split(stripe, offset_bytes=0)

    assert bytes(writes[4].data[:8]).hex() == "d4d5d6d7d0d1d2d3"
    assert bytes(writes[5].data[:8]).hex() == "7d7c7f7e79787b7a"


def test_vectors(coder):
    """Every recorded code gives the original's parity, strip for strip."""
    recorded = json.loads((vectors_path() / "vectors.json").read_text())["erasure"]
    assert recorded["stripe_bytes"] == 512
    for code in recorded["codes"]:
        data, parity = code["data"], code["parity"]
        scheme = ErasureFactory(coder).scheme(int(code["policy_byte"], 16), data + parity)
        for name, expected in code["parity_strips"].items():
            stripe = bytes.fromhex(recorded["inputs"][name])
            writes = scheme.split(stripe, offset_bytes=0)

            assert len(writes[0].data) == code["strip_bytes"]
            assert b"".join(bytes(write.data) for write in writes[:data]) == stripe
            assert [bytes(write.data).hex() for write in writes[data:]] == expected, (data, parity, name)


@pytest.mark.parametrize("data", [2, 4, 8, 16])
@pytest.mark.parametrize("parity", [1, 2, 15])
def test_coders_agree(coder, data, parity):
    """What one coder writes is to the byte what plain Python writes, also over many stripes."""
    content = bytes(i * 31 % 253 for i in range(512 * 40))
    policy = policy_of(data, parity)

    ours = ErasureFactory(coder).scheme(policy, data + parity).split(content, offset_bytes=0)
    plain = ErasureFactory(make_coder("python")).scheme(policy, data + parity).split(content, offset_bytes=0)

    assert [bytes(write.data) for write in ours] == [bytes(write.data) for write in plain]


def test_every_loss_of_two_of_six(coder):
    """4:2 survives the loss of any two shards, whole and in part."""
    scheme = ErasureFactory(coder).scheme(0x22, 6)
    stored = StoredObject(scheme)
    stored.fill(seed=11)
    for first in range(6):
        for second in range(first):
            left = [index for index in range(6) if index not in (first, second)]

            assert stored.read(0, 8192, left) == stored.plain
            assert stored.read(700, 1111, left) == stored.plain[700:1811]


def test_degraded_read_is_narrow(coder):
    """A lost strip costs d short reads, not whole stripes of everything."""
    scheme = ErasureFactory(coder).scheme(0x22, 6)

    plan = scheme.plan_read(10, 20, [1, 2, 3, 4])

    assert plan == [(1, 10, 20), (2, 10, 20), (3, 10, 20), (4, 10, 20)]


def test_policy_bytes():
    """(d/2)<<4|p, and nothing else is a policy."""
    assert [unpack_policy(byte) for byte in (0x11, 0x22, 0x43, 0x8F)] == [(2, 1), (4, 2), (8, 3), (16, 15)]
    for byte in (0, 0x10, 0x01, 0x31, 0x51, 0x92, 0x122, -1):
        with pytest.raises(ConfigError):
            unpack_policy(byte)


def test_inverse_of_matrix():
    """A matrix times its inverse is the identity, so any d rows can be decoded."""
    matrix = make_code(8, 7).matrix[5:13]

    product = multiply_matrices(matrix, invert_matrix(matrix))

    assert product == tuple(bytes(int(row == column) for column in range(8)) for row in range(8))


def test_field():
    """Multiplication distributes over addition, which is XOR."""
    for a in range(0, 256, 7):
        for b in range(0, 256, 11):
            assert multiply(a, b) == multiply(b, a)
            assert multiply(a, b ^ 0x53) == multiply(a, b) ^ multiply(a, 0x53)
