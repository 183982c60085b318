"""Makes the helpers beside the tests importable, and fixes what the environment must not decide."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dates are UTC, as in the recordings, and no variable of the user changes what dog does."""
    monkeypatch.setenv("TZ", "UTC")
    for name in ("SHEEPDOG_DOG_ADDR", "SHEEPDOG_DOG_PORT", "SHEEPDOG_DOG_LOG", "SHEEPDOG_DOG_LOG_PATH"):
        monkeypatch.delenv(name, raising=False)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()
