"""The text after ``raft:``, and what a sheep makes of it."""

from __future__ import annotations

import pytest

from sheepdog.api import ConfigError
from sheepdog_cluster_raft import sheepdog_cluster_driver
from sheepdog_cluster_raft.options import RaftOptions

THREE = "10.0.0.1:4,10.0.0.2:4,10.0.0.3:4"


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "secret").write_text("abc\n")
    return f"password-file={tmp_path}/secret"


def test_options(secret):
    """Voters, our own part, the directory, the time and the password."""
    options = RaftOptions.parse(f"{THREE},self=10.0.0.2:4,dir=/var/r,timeout=3000,{secret}")

    assert options.voters == ("10.0.0.1:4", "10.0.0.2:4", "10.0.0.3:4")
    assert (options.self_address, options.directory, options.votes) == ("10.0.0.2:4", "/var/r", True)
    assert (options.timeout_s, options.password) == (3.0, "abc")


def test_store_directory(secret):
    """Vote and log are kept in the store directory unless something else is said."""
    driver = sheepdog_cluster_driver(options=f"{THREE},{secret}", directory="/store")
    elsewhere = sheepdog_cluster_driver(options=f"{THREE},{secret},dir=/other", directory="/store")

    assert (driver.options.directory, elsewhere.options.directory) == ("/store/raft", "/other")


@pytest.mark.parametrize(
    ("host", "voter"), [("10.0.0.2", "10.0.0.2:4"), ("10.0.0.9", "none"), ("::1", "0:0::1:4"), ("127.0.0.1", "none")]
)
def test_same_options_everywhere(secret, host, voter):
    """A sheep is the voter that has the address that it announces, and follows if there is none."""
    options = RaftOptions.parse(f"{THREE},[0:0::1]:4,{secret}", "/store").placed(host)

    assert options.self_address == voter
    assert options.votes == (voter != "none")


@pytest.mark.parametrize(
    ("text", "host", "expected"),
    [
        (THREE, "10.0.0.2", "10.0.0.2:4"),
        (THREE, "10.0.0.9", "10.0.0.9:4"),
        (f"{THREE},voters=1", "10.0.0.3", "10.0.0.3:4"),
        (f"{THREE},listen=10.0.0.9:8", "10.0.0.9", "10.0.0.9:8"),
        (f"{THREE},self=none", "10.0.0.2", None),
        (f"{THREE},self=none,listen=10.0.0.2:8", "10.0.0.2", "10.0.0.2:8"),
    ],
)
def test_where_it_listens(secret, text, host, expected):
    """Everybody can be asked: where the list says, or where it is told to listen, or where it announces itself, at the
    port of the first peer."""
    assert RaftOptions.parse(f"{text},{secret}", "/store").placed(host).answers_at == expected


def test_names(secret):
    """Voters may be given by name."""
    options = RaftOptions.parse(f"localhost:4,{secret}", "/store").placed("127.0.0.1")

    assert options.self_address == "localhost:4"


def test_first_few_vote(secret):
    """Of a long list the first five vote, or as many as said; the others follow."""
    nine = ",".join(f"10.0.0.{i}:4" for i in range(1, 10))
    five, three = (RaftOptions.parse(f"{nine},{more}{secret}", "/store") for more in ("", "voters=3,"))

    assert [options.placed("10.0.0.4").votes for options in (five, three)] == [True, False]
    assert (len(five.voters), len(three.voters)) == (5, 3)
    assert not five.placed("10.0.0.6").votes


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no raft voter"),
        ("a", "HOST:PORT"),
        ("a:1,a:1", "twice"),
        (f"{THREE},timeout=10", "timeout"),
        (f"{THREE},voters=0", "invalid raft voters"),
        (f"{THREE},self=10.0.0.9:4", "none of the voters"),
        (f"{THREE},listen=here", "HOST:PORT"),
        (f"{THREE},speed=1", "unknown raft option"),
        (f"timeout=3000,{THREE}", "before the options"),
    ],
)
def test_refused(secret, text, match):
    """What cannot be understood is a ConfigError that says so."""
    with pytest.raises(ConfigError, match=match):
        RaftOptions.parse(f"{text},{secret}" if text else text)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ("", "password-file=PATH"),
        (",password-file=/none", "cannot read"),
        (",password-file=/dev/null", "is empty"),
    ],
)
@pytest.mark.parametrize("voters", [THREE, "127.0.0.1:4"])
def test_no_secret(voters, more, match):
    """Without a secret there is no cluster, on one host neither: other users of it could run code."""
    with pytest.raises(ConfigError, match=match):
        RaftOptions.parse(f"{voters}{more}")


@pytest.mark.parametrize(
    ("text", "directory", "match"),
    [
        ("127.0.0.1:1,127.0.0.1:2", "/store", "self="),
        ("127.0.0.1:1", None, "dir=PATH"),
        ("127.0.0.1:1,listen=127.0.0.1:2", "/store", "not in the list"),
    ],
)
def test_not_placed(secret, text, directory, match):
    """Where it cannot be known which voter we are, or where it keeps its vote, we are told what to say."""
    options = RaftOptions.parse(f"{text},{secret}", directory)
    with pytest.raises(ConfigError, match=match):
        options.placed("127.0.0.1")
