"""Every test of this directory runs on asyncio and on trio, the latter with a clock that jumps over waits."""

import pytest
import trio.testing


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request):
    if request.param == "asyncio":
        return ("asyncio", {})
    return ("trio", {"clock": trio.testing.MockClock(autojump_threshold=0)})
