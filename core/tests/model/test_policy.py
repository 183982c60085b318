"""Numbers of copies and erasure codes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheepdog.errors import ConfigError, InvalidParameters
from sheepdog.model.policy import CopyPolicy, policy_byte


@pytest.mark.parametrize(
    ("text", "copies", "policy", "data", "parity"),
    [
        ("1", 1, 0, 1, 0),
        ("3", 3, 0, 1, 2),
        ("31", 31, 0, 1, 30),
        ("2:1", 3, 0x11, 2, 1),
        ("4:2", 6, 0x22, 4, 2),
        ("8:3", 11, 0x43, 8, 3),
        ("16:15", 31, 0x8F, 16, 15),
    ],
)
def test_parse(text, copies, policy, data, parity):
    """What an operator writes is what is stored, and is written back the same."""
    parsed = CopyPolicy.parse(text)

    assert (parsed.copies, parsed.policy, parsed.data, parsed.parity) == (copies, policy, data, parity)
    assert str(parsed) == text
    assert parsed.erasure is (policy != 0)


@pytest.mark.parametrize(
    "text", ["", "0", "32", "257", "3:3", "4:0", "4:16", "32:1", "2:1:1", "x", "-1", "4:", ":2", " 3", "3\n"]
)
def test_refused(text):
    """Nothing else is understood; in particular 257 is not 1."""
    with pytest.raises(ConfigError):
        CopyPolicy.parse(text)


@given(st.integers(0, 40), st.integers(0, 255))
def test_numbers(copies, policy):
    """A pair of numbers is accepted exactly if the text of the result gives the same pair."""
    try:
        made = CopyPolicy(copies, policy)
    except InvalidParameters:
        return
    if copies:
        assert CopyPolicy.parse(str(made)) == made


@pytest.mark.parametrize(("copies", "policy"), [(32, 0), (-1, 0), (2, 0x11), (3, 0x10), (3, 0x01), (7, 0x34)])
def test_impossible(copies, policy):
    """Numbers that fit no code are refused."""
    with pytest.raises(InvalidParameters):
        CopyPolicy(copies, policy)


def test_byte():
    """High nibble d/2, low nibble p."""
    assert policy_byte(8, 3) == 0x43
    with pytest.raises(InvalidParameters):
        policy_byte(6, 2)
