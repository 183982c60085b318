"""What ``ServiceDriver`` and ``ServiceSession`` promise to drivers: joining and leaving, whatever the service does."""

from __future__ import annotations

import time

import anyio
import pytest

from sheepdog.builtin import groupsession
from sheepdog.builtin.groupsession import ServiceDriver, ServiceSession
from sheepdog.contracts.cluster import PAYLOAD_BYTES_MAX, Joined
from sheepdog.errors import ClusterUnavailable, ConfigError, PayloadTooLarge, SessionLost
from sheepdog.testing.cluster_kit import kit_node


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class FakeSession(ServiceSession):
    """A service with this one client, that fails as it is told."""

    disconnect_limit_s = 0.05

    def __init__(self, driver: FakeDriver, me) -> None:
        super().__init__(me, "the service", 10.0, driver.ended)
        self.driver = driver

    @property
    def detection_s(self) -> float:
        return self.session_s + 1

    async def append(self, record: bytes) -> None:
        if self.joined and self.driver.hangs:
            await anyio.sleep_forever()
        await self.take(record)

    async def begin(self, tasks, greeting: bytes) -> None:
        self.driver.open += 1
        if self.driver.failure is not None:
            raise self.driver.failure
        self.session_s = 7.0
        await self.enter(greeting)
        self.contact(time.monotonic())
        tasks.start_soon(anyio.sleep_forever)

    async def disconnect(self) -> None:
        self.driver.open -= 1
        if self.driver.hangs:
            await anyio.sleep_forever()


class FakeDriver(ServiceDriver):
    def __init__(self, failure: Exception | None = None, *, hangs: bool = False) -> None:
        super().__init__()
        self.failure = failure
        self.hangs = hangs
        self.open = 0

    def session(self, me) -> FakeSession:
        return FakeSession(self, me)


@pytest.mark.anyio
async def test_life():
    """A session begins with its own join, ends in order, and the driver states the time that was granted."""
    driver = FakeDriver()
    async with driver.join(kit_node(0), b"hello") as session:
        first = await anext(session.events())
        alive = session.alive()

    assert first == Joined(kit_node(0), b"hello", (kit_node(0),))
    assert alive and not session.alive()
    assert driver.detection_s == 8.0
    assert driver.open == 0 and driver.ended == {session.id}
    with pytest.raises(SessionLost):
        await session.broadcast(b"x")


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (ConfigError("no"), ConfigError),
        (ClusterUnavailable("no"), ClusterUnavailable),
        (SessionLost("no"), ClusterUnavailable),
        (ZeroDivisionError("no"), ZeroDivisionError),
    ],
)
async def test_join_fails(failure, expected):
    """A join that fails leaves nothing open, and raises one exception of the contract, in no group."""
    driver = FakeDriver(failure)
    with pytest.raises(expected, match="no"):
        async with driver.join(kit_node(0), b""):
            pass

    assert driver.open == 0


@pytest.mark.anyio
async def test_large_greeting():
    """A greeting above the limit is refused before anything is opened."""
    driver = FakeDriver(AssertionError("opened"))
    with pytest.raises(PayloadTooLarge):
        async with driver.join(kit_node(0), bytes(PAYLOAD_BYTES_MAX + 1)):
            pass

    assert driver.ended == set()


@pytest.mark.anyio
async def test_leaving_hangs(monkeypatch):
    """A service that does not answer any more keeps nobody from leaving."""
    monkeypatch.setattr(groupsession, "GOODBYE_S", 0.05)
    driver = FakeDriver(hangs=True)
    with anyio.fail_after(10):
        async with driver.join(kit_node(0), b"") as session:
            pass

    assert driver.ended == {session.id}


@pytest.mark.anyio
async def test_silence():
    """Alive for most of a session time after a question that was answered; lost when two have passed."""
    driver = FakeDriver()
    async with driver.join(kit_node(0), b"") as session:
        now_s = time.monotonic()
        session.session_s = 100.0
        for age_s, alive, lost in (
            (10.0, True, False),
            (75.0, True, False),
            (85.0, False, False),
            (205.0, False, True),
        ):
            session._contact_s = 0.0
            session.contact(now_s - age_s)
            session.give_up()

            assert (session.alive(), session.lost is not None) == (alive, lost), f"after {age_s} s"
        assert "no answer from the service for 200.0 s" in session.lost


@pytest.mark.anyio
async def test_late_answers():
    """An answer that comes after a later one does not take time away."""
    driver = FakeDriver()
    async with driver.join(kit_node(0), b"") as session:
        deadline_s = session.deadline_s
        session.contact(time.monotonic() - 5)

        assert session.deadline_s == deadline_s
