"""The SQLite store passes the conformance kit, and turns away what it cannot do."""

import pytest

from sheepdog.api import ConfigError, StoreOptions
from sheepdog.testing.store_kit import StoreKit
from sheepdog_store_sqlite import sheepdog_object_store


class TestSqliteStore(StoreKit):
    @pytest.fixture
    def store_factory(self):
        return sheepdog_object_store


def test_one_disk_only(tmp_path):
    """Several disks are refused when the store is made, not later."""
    with pytest.raises(ConfigError, match="one disk"):
        sheepdog_object_store(StoreOptions((str(tmp_path / "a"), str(tmp_path / "b"))))
