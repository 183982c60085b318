"""Command lines of sheep: help, version, everything that is wrong, and what the good ones mean."""

from __future__ import annotations

import pytest
from replay import standard_streams

from sheepdog.daemon.config import IoAddress, LogConfig, SheepConfig
from sheepdog.model.node import VnodeMode
from sheepdog_cli import sheep
from sheepdog_cli.sheep_options import OPTIONS, help_text

TRY = "Try 'sheep --help' for more information.\n"
SUFFIXES = (
    "You may use B, K, M, G, T or P suffixes for bytes, kilobytes, megabytes, gigabytes, terabytes and petabytes.\n"
)
U32 = 4294967295
BOTH_VNODES = "Options '--disk-vnodes' and '-V' can not be both specified: the sizes of disks decide\n"


def run(*words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a command line that starts no daemon."""
    with standard_streams(b"") as (out, err):
        try:
            sheep.parse(["sheep", *words])
            code = -1
        except sheep.Done:
            code = 0
        except sheep.BadUsage:
            code = 1
    return code, out.getvalue().decode(), err.getvalue().decode()


def parse(*words: str) -> SheepConfig:
    return sheep.parse(["sheep", *words])[0]


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help(word: str) -> None:
    """Three fixed lines, one per option in order, an empty line, a hint."""
    code, out, err = run(word)

    lines = out.split("\n")
    assert (code, err) == (0, "")
    assert lines[0] == "Sheepdog daemon (version 1.0.1+py)"
    assert lines[1:3] == ["Usage: sheep [OPTION]... [PATH] (default: /tmp)", "Options:"]
    assert [line[:6] for line in lines[3 : 3 + len(OPTIONS)]] == [f"  -{option.letter}, " for option in OPTIONS]
    assert lines[3].startswith("  -b, --bindaddr          ")
    assert out == help_text()


def test_option_order() -> None:
    """Options are in alphabetical order ignoring case, lower case first."""
    letters = [option.letter for option in OPTIONS]

    assert letters == sorted(letters, key=lambda letter: (letter.lower(), letter.isupper()))


def test_version() -> None:
    """The drivers are listed unless one was chosen already."""
    code, out, err = run("-v")
    chosen = run("-c", "local", "-v")[1]

    assert (code, err) == (0, "")
    assert out.startswith("Sheepdog daemon version 1.0.1+py\n\nSupported features:\n\tCluster drivers: ")
    assert " local" in out and out.split("\n")[4].startswith("\tMiscellaneous: ")
    assert "Cluster drivers" not in chosen and "\tMiscellaneous: " in chosen


@pytest.mark.parametrize(
    ("text", "interval", "rate"),
    [
        ("", 604_800, 32_000_000),
        ("interval=0", 0, 32_000_000),
        ("interval=90", 90, 32_000_000),
        ("rate=5,interval=2h", 7200, 5_000_000),
        ("interval=14d,rate=100000", 14 * 86_400, 100_000_000_000),
    ],
)
def test_scrub(text: str, interval: int, rate: int) -> None:
    """``--scrub`` takes a time with a unit and whole MB/s, each with its default."""
    config = parse("--scrub", text, "/x").scrub

    assert (config.interval_s, config.rate_bytes) == (interval, rate)


def test_disk_vnodes() -> None:
    """``--disk-vnodes`` is for storing sheep and gateways, and among the features; -d... still means --directio."""
    assert parse("/x").vnode_mode is VnodeMode.NODE
    assert parse("--disk-vnodes", "/x").vnode_mode is VnodeMode.DISK
    assert parse("--disk-vnodes", "-g", "/x").gateway
    assert parse("--di", "/x").directio
    assert "diskvnodes" in run("--disk-vnodes", "-v")[1].splitlines()[-1].split()
    assert "diskvnodes" not in run("-v")[1]


def test_first_wins() -> None:
    """Options are handled from left to right: help before a bad one wins, and the other way round."""
    assert run("-h", "-Q")[0] == 0
    assert run("-Q", "-h")[0] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-Q"], "sheep: invalid option -- 'Q'\n" + TRY),
        (["--bogus"], "sheep: unrecognized option '--bogus'\n" + TRY),
        (["-p"], "sheep: option requires an argument -- 'p'\n" + TRY),
        (["-P"], "sheep: option requires an argument -- 'P'\n" + TRY),
        (["-w"], "sheep: option requires an argument -- 'w'\n" + TRY),
        (["-x"], "sheep: option requires an argument -- 'x'\n" + TRY),
        (["--store"], "sheep: option '--store' requires an argument\n" + TRY),
        (["-g", "-V", "3"], "Options '-g' and '-V' can not be both specified\n"),
        (["-V", "3", "-g"], "Options '-g' and '-V' can not be both specified\n"),
        (["-V", "3", "--disk-vnodes"], BOTH_VNODES),
        (["--disk-vnodes", "-V", "3"], BOTH_VNODES),
        (["--disk-vnodes=yes"], "sheep: option '--disk-vnodes' doesn't allow an argument\n" + TRY),
        (["-b", "localhost"], "Bad address 'localhost'\n"),
        (["-b", ""], "Bad address ''\n"),
        (["-y", ""], "Invalid address: ''\n"),
        (["-y", "1.2.3.4.5.x"], "Invalid address: '1.2.3.4.5.x'\n"),
        (["-i", "hots=1.2.3.4"], "invalid option hots=1.2.3.4\n"),
        (["-i", "host=x"], "Bad addr: 'x'\n"),
        (["-i", "host=1.2.3.4,port=x"], "Bad port 'x'\n"),
        (["-j", "dir=/x"], "you must specify size for journal\n"),
        (["-j", "size=67108863"], "invalid size 67108863, must be bigger than 64(M)\n"),
        (["-j", "size=12MB"], "Invalid size '12MB'\n" + SUFFIXES),
        (["-j", "size=64M,what"], "invalid option what\n"),
        (["-R", "max=1,foo=2"], "invalid option foo=2\n"),
        (["--scrub", "often"], "invalid option often\n"),
        (["--scrub", "rate=0"], "Invalid rate '0': must be an integer between 1 and 100000 (MB/s)\n"),
        (["--scrub", "interval=1w"], "Invalid interval '1w': must be an integer, with s, m, h or d behind it\n"),
        (["-w", "size=100"], "invalid option size=100\n"),
        (["-l", "color=red"], "invalid option color=red\n"),
        (["-l", "format=xml"], "invalid log format: xml\nvalid options are:\n\tdefault\n\tserver\n\tjson\n"),
        (["-l", "dst=x"], "invalid type of log destination: x\n"),
        (["-l", "dir=/nonexistent/x"], "No such file or directory\n"),
        (["-l", "dir=/dev/null"], "log dir: /dev/null is not a directory\n"),
        (["-l", "dir=/tmp,dst=syslog"], "logdir (/tmp) is specified but logging destination is syslog\n"),
        (["-l", "dst=stdout,dir=/tmp"], "logdir (/tmp) is specified but logging destination is stdout\n"),
    ],
)
def test_wrong(words: list[str], message: str) -> None:
    """Messages on stderr alone, exit 1."""
    assert run(*words) == (1, "", message)


@pytest.mark.parametrize("letter", "bcijlrRVyz")
def test_missing_argument_with_help(letter: str) -> None:
    """The options with a grammar of their own explain it on stdout."""
    code, out, err = run(f"-{letter}")

    assert (code, err) == (1, f"sheep: option requires an argument -- '{letter}'\n")
    assert out.startswith(f"-{letter} ") and "$ sheep " in out


def test_bad_log_level() -> None:
    """Numbers are no levels; the levels are listed on stdout."""
    for text in ("7", "loud", ""):
        code, out, err = run("-l", f"level={text}")
        assert (code, err) == (1, f"Invalid log level '{text}'\n")
        assert out.startswith("Available log levels:\n")


def test_bad_driver() -> None:
    """An unknown cluster driver: the whole argument on stderr, what there is on stdout."""
    code, out, err = run("-c", "carrier-pigeon:coop")

    assert (code, err) == (1, "Invalid cluster driver 'carrier-pigeon:coop'\n")
    assert out.startswith("\nSupported features:\n\tCluster drivers: ")
    assert out.endswith("\nFor another one, try: pip install sheepdog-cluster-carrier-pigeon\n")


@pytest.mark.parametrize("kind", ["store", "redundancy", "transport"])
def test_unknown_plugins(kind: str) -> None:
    """Other unknown plugins say what is installed and what to install."""
    code, out, err = run(f"--{kind}", "nosuch")

    assert (code, out) == (1, "")
    assert err.startswith(f"no {kind} plugin 'nosuch' (installed: ")
    assert err.endswith(f"try: pip install sheepdog-{kind}-nosuch\n")


@pytest.mark.parametrize("port", ["0", "65536", "65537", "4294967297", "-1", "q", "80x", "+", "-", "", " 7"])
def test_bad_ports(port: str) -> None:
    """Only 1 to 65535, strictly decimal."""
    assert run(f"--port={port}") == (1, "", f"Invalid port number '{port}'\n")


@pytest.mark.parametrize("zone", ["4294967296", "9223372036854775808", "-1", "+1", "12x", "x", "", "0x1"])
def test_bad_zones(zone: str) -> None:
    """Only 0 to 4294967295."""
    message = f"Invalid zone id '{zone}': must be an integer between 0 and 4294967295\n"
    assert run(f"--zone={zone}") == (1, "", message)


@pytest.mark.parametrize("count", ["0", "65536", "-1", "x", ""])
def test_bad_vnodes(count: str) -> None:
    """Only 1 to 65535."""
    message = f"Invalid number of vnodes '{count}': must be an integer between 1 and 65535\n"
    assert run(f"--vnodes={count}") == (1, "", message)


@pytest.mark.parametrize("count", ["0", "4294967296", "-1", "x", ""])
def test_bad_threads(count: str) -> None:
    """Only 1 to 4294967295."""
    message = f"Invalid number of threads '{count}': must be an integer between 1 and 4294967295\n"
    assert run(f"--max-dynamic-threads={count}") == (1, "", message)


def test_limits_are_inclusive() -> None:
    """The ends of every range are accepted."""
    low = parse("-p", "1", "-z", "0", "-V", "1", "-x", "1", "-j", "size=64M")
    high = parse("-p", "65535", "-z", str(U32), "-V", "65535", "-x", str(U32))

    assert (low.port, low.zone, low.vnodes, low.threads_max) == (1, 0, 1, 1)
    assert low.journal is not None and low.journal.size_bytes == 64 << 20
    assert (high.port, high.zone, high.vnodes, high.threads_max) == (65535, U32, 65535, U32)


def test_defaults() -> None:
    """Without options: /tmp, port 7000, the local driver, automatic vnodes."""
    config, foreground = sheep.parse(["sheep"])

    assert not foreground
    assert (config.base, config.disks, config.port, config.cluster) == ("/tmp", (), 7000, "local")
    assert config.vnodes is None and config.zone is None and config.store is None and config.transport == "tcp"
    assert config.log == LogConfig("info", "server", "default", None)


def test_everything() -> None:
    """A long command line, options and PATH mixed, ends in the configuration it says."""
    config = parse(
        "-c", "local:/x/shm", "/srv/s,/d1,/d2/", "-b", "127.0.0.1", "-y", "::1", "-p7001", "--zone=7", "-n", "-D", "-W",
        "-u", "-i", "port=7100,host=10.0.0.1", "-j", "skip,size=1G,dir=/j", "-R", "interval=100,max=50x", "ignored",
        "-l", "level=debug,format=json", "-w", "net=2,gway_fwd=3,io=", "-x", "9", "-P", "/run/sheep.pid",
    )  # fmt: skip

    assert (config.base, config.disks) == ("/srv/s", ("/d1", "/d2/"))
    assert (config.cluster, config.bind_address, config.my_address) == ("local:/x/shm", "127.0.0.1", "::1")
    assert (config.port, config.zone, config.threads_max) == (7001, 7, 9)
    assert config.nosync and config.directio and config.wildcard_recovery and config.upgrade
    assert config.io_address == IoAddress("10.0.0.1", 7100)
    assert config.journal is not None
    assert (config.journal.size_bytes, config.journal.directory, config.journal.skip) == (1 << 30, "/j", True)
    assert (config.recovery_throttle.max_exec_count, config.recovery_throttle.interval_ms) == (50, 100)
    assert (config.log.level, config.log.format) == ("debug", "json")
    assert config.thread_counts == (("net", 2), ("gway_fwd", 3), ("io", 0))
    assert config.pid_file == "/run/sheep.pid"


def test_later_words_override() -> None:
    """In a list the last word for a key counts, and so does the last option."""
    assert parse("-l", "level=debug,level=err").log.level == "err"
    assert parse("-p", "1", "-p", "2").port == 2


def test_stdout_implies_foreground(tmp_path) -> None:
    """``dst=stdout`` stays in the foreground; a directory names the log file."""
    assert sheep.parse(["sheep", "-l", "dst=stdout"])[1]
    assert parse("-l", f"dir={tmp_path}").log.path == f"{tmp_path}/sheep.log"


def test_gateway_and_plugins() -> None:
    """Plugins are chosen by name; a front end may be given several times."""
    from sheepdog_cli.sheep_options import installed

    servers = ["--nbd", "10809", "--nbd", "unix:/x,tls"] if "nbd" in installed("frontend") else []
    config = parse("-g", "--transport", "tcp", *servers)
    same = parse("-g", *("--frontend" if word == "--nbd" else f"nbd:{word}" for word in servers))

    assert config.gateway and config.vnodes is None
    assert config.front_ends == same.front_ends
    assert [front.options for front in config.front_ends] in ([], ["10809", "unix:/x,tls"])
