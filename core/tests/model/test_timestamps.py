"""The 64-bit form of times."""

from hypothesis import given
from hypothesis import strategies as st

from sheepdog.model.timestamps import pack_time, split_time, unix_time


@given(st.integers(0, (1 << 32) - 1), st.integers(0, 999_999))
def test_inverse(seconds, microseconds):
    """Times survive to the microsecond."""
    ctime = pack_time(seconds + microseconds / 1e6)

    assert abs(unix_time(ctime) - (seconds + microseconds / 1e6)) < 2e-6
    assert split_time(ctime).nanoseconds < 1_000_000_000


def test_form():
    """Seconds above, microseconds times 1000 below."""
    assert pack_time(5.25) == 5 << 32 | 250_000_000
    assert split_time(5 << 32 | 7) == (5, 7)
