"""Replication, the built-in scheme."""

import pytest

from sheepdog import plugins
from sheepdog.builtin.copies import Copies, CopiesFactory
from sheepdog.errors import ConfigError
from sheepdog.testing.redundancy_kit import RedundancyKit


class TestCopiesConform(RedundancyKit):
    cases = ((0, 1), (0, 2), (0, 3), (0, 31))
    forbidden = ((0, 0), (0, 32), (0, -1), (0x22, 6))

    @pytest.fixture
    def factory(self):
        return CopiesFactory()


def test_split_copies_nothing():
    """Every copy is handed the very same buffer."""
    data = memoryview(bytearray(4096))

    assert all(write.data is data for write in Copies(3).split(data, offset_bytes=512))


def test_reads_the_copy_named_first():
    """The caller's preference decides which copy is read."""
    plan = Copies(3).plan_read(100, 50, [2, 0, 1])

    assert plan == [(2, 100, 50)]


def test_bounds():
    """1 to 31 copies, nothing else."""
    assert Copies(1).shards == 1 and Copies(31).shards == 31
    for copies in (0, 32):
        with pytest.raises(ConfigError, match="1 to 31"):
            Copies(copies)


def test_comes_by_entry_point():
    """``copies`` is found like any other plugin."""
    assert isinstance(plugins.make_redundancy("copies"), CopiesFactory)
