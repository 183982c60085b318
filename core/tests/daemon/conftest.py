"""Where core is installed alone, tests of it with the plugins' stores and codes are left out."""

from importlib.util import find_spec

import pytest

from sheepdog.contracts.store import StoreOptions

PLUGINS = ("sheepdog_store_plain", "sheepdog_store_tree", "sheepdog_redundancy_ec")

collect_ignore = (
    [
        "test_data_path.py",
        "test_data_path_faults.py",
        "test_held_writes.py",
        "test_journal.py",
        "test_power_loss.py",
        "test_power_loss_files.py",
        "test_recovery.py",
        "test_recovery_purge.py",
        "test_recovery_settle.py",
        "test_strip_exchange.py",
        "test_strip_store.py",
        "test_striped.py",
        "test_sweep.py",
    ]
    if any(find_spec(name) is None for name in PLUGINS)
    else []
)


@pytest.fixture
def make_store(tmp_path):
    """``make_store(number)``: the plain store of that sheep, on a directory of its own."""
    from sheepdog_store_plain import sheepdog_object_store

    def make(number):
        path = tmp_path / f"disk{number}"
        path.mkdir()
        return sheepdog_object_store(StoreOptions((str(path),)))

    return make
