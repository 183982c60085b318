"""Command lines of dog that are wrong, and its help: words, streams and exit codes."""

from __future__ import annotations

import socket

import pytest
from replay import Outcome, run_dog

from sheepdog.client.connection import ConnectError
from sheepdog_cli.table import COMMANDS, families, options_of

TRY = "Try 'dog --help' for more information.\n"
NUMBERS = ["0", "65536", "65537", "4294967297", "-1", "q", "80x", "+", "-"]
REDUNDANCY_HELP = """\
Invalid parameter {0}
To create replicated vdi, set -c x
  x(1 to 31)   - number of replicated copies
To create erasure coded vdi, set -c x:y
  x(2,4,8,16)  - number of data strips
  y(1 to 15)   - number of parity strips
"""


def no_sheep(address: str) -> socket.socket:
    raise ConnectError(f"failed to connect to {address}: Connection refused")


def dog(*words: str, stdin: bytes = b"") -> Outcome:
    return run_dog(words, stdin=stdin, connect=no_sheep)


@pytest.mark.parametrize("words", [(), ("help",), ("--help",), ("-h",)])
def test_help(words: tuple[str, ...]) -> None:
    """The overview lists every subcommand in order, on stdout."""
    outcome = dog(*words)

    lines = outcome.stdout.decode().split("\n")
    assert outcome.code == 0
    assert lines[:4] == [
        "Sheepdog administrator utility (version 1.0.1+py)",
        "Usage: dog <command> <subcommand> [options]",
        "",
        "Available commands:",
    ]
    assert lines[4] == "  vdi check               compare the copies of a vdi and repair them"
    assert [line.split()[:2] for line in lines[4 : 4 + len(COMMANDS)]] == [[row.family, row.name] for row in COMMANDS]
    assert lines[4 + len(COMMANDS)] == "" and lines[-1] == "" and len(lines) == len(COMMANDS) + 7
    assert outcome.stderr == ""


def test_unknown_command() -> None:
    """An unknown command points to the help."""
    outcome = dog("bogus")

    assert (outcome.code, outcome.stdout) == (64, b"")
    assert outcome.stderr == "Invalid command 'bogus'\n" + TRY


@pytest.mark.parametrize("family", families())
def test_family(family: str) -> None:
    """A command alone, or with ``help``, lists its subcommands on stderr; an unknown one is named before."""
    listing = f"Available {family} commands:\n" + "".join(
        f"  {family} {row.name}\n" for row in COMMANDS if row.family == family
    )

    for words in ((family,), (family, "help")):
        outcome = dog(*words)
        assert (outcome.code, outcome.stdout, outcome.stderr) == (64, b"", listing)
    outcome = dog(family, "bogus")
    assert (outcome.code, outcome.stderr) == (64, f"Invalid command '{family} bogus'\n" + listing)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-Q"], "dog: invalid option -- 'Q'"),
        (["--bogus"], "dog: unrecognized option '--bogus'"),
        (["-a"], "dog: option requires an argument -- 'a'"),
        (["-z", "22"], "dog: invalid option -- 'z'"),
    ],
)
def test_bad_options(words: list[str], message: str) -> None:
    """What getopt dislikes, and options of other subcommands."""
    outcome = dog("node", "list", *words)

    assert (outcome.code, outcome.stdout) == (64, b"")
    assert outcome.stderr == f"{message}\n{TRY}"


@pytest.mark.parametrize(
    ("typed", "shown"),
    [("/usr/bin/dog", "dog"), ("/opt/x/dog", "/opt/x/dog"), ("./dog", "./dog"), ("dog", "dog")],
)
def test_program_name(typed: str, shown: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Messages about options begin with the program's name as it was typed: the bare one if it is on the PATH."""
    from sheepdog_cli import dog as program

    monkeypatch.setenv("PATH", "/bin:/usr/bin")

    assert program.run([typed, "node", "list", "-Q"]) == 64
    assert capsys.readouterr().err == f"{shown}: invalid option -- 'Q'\n{TRY}"


@pytest.mark.parametrize("row", COMMANDS, ids=lambda row: f"{row.family}-{row.name}")
def test_usage_of_each(row) -> None:
    """``-h`` shows the usage on stdout, exit 0, whatever else stands there."""
    outcome = dog(row.family, row.name, "x", "-h", "-Q")

    text = outcome.stdout.decode()
    assert (outcome.code, outcome.stderr) == (0, "")
    assert text.startswith(f"Usage: dog {row.family} {row.name}")
    for option in options_of(row):
        if option.letter:
            assert f"  -{option.letter}, --{option.name}" in text
            assert (f"[-{option.letter} {option.name}]" if option.argument else f"[-{option.letter}]") in text


def test_usage_block() -> None:
    """The block in the specification, to the byte."""
    outcome = dog("node", "vnodes")

    assert outcome.code == 64
    assert outcome.stdout.decode() == (
        "Usage: dog node vnodes set [-a address] [-p port] [-h] <num of vnodes>\n"
        "Available subcommands:\n"
        "  set                     change the number of virtual nodes\n"
        "Options:\n"
        "  -a, --address           sheep to contact\n"
        "  -p, --port              its TCP port\n"
        "  -h, --help              this text\n"
    )


def test_usage_with_nested_words_and_long_names() -> None:
    """Alternatives stand in braces, long names run into the description, the text of -r has two lines."""
    object_usage = dog("vdi", "object").stdout.decode()
    snapshot_usage = dog("vdi", "snapshot").stdout.decode()

    assert object_usage.startswith("Usage: dog vdi object {location|map|dump-inode} [-i index] [-s snapshot] [-a ")
    assert "\n  -R, --reduce-identical-snapshotsno snapshot" in snapshot_usage
    raw_at = next(at for at, line in enumerate(snapshot_usage.split("\n")) if line.startswith("  -r, --raw"))
    assert snapshot_usage.split("\n")[raw_at + 1].startswith(" " * 26)


@pytest.mark.parametrize(
    "words", [("vdi", "create"), ("vdi", "read"), ("cluster", "recover"), ("node", "md"), ("node", "md", "plug"),
              ("node", "log"), ("node", "log", "level"), ("node", "log", "level", "set"), ("node", "vnodes", "set"),
              ("vdi", "object"), ("vdi", "object", "map"), ("vdi", "lock", "unlock"), ("vdi", "lock", "unlock", ""),
              ("cluster", "snapshot"), ("cluster", "snapshot", "list"), ("benchmark", "io")],
)  # fmt: skip
def test_missing_argument(words: tuple[str, ...]) -> None:
    """A required argument that is missing, or empty below a nested word: usage on stdout, 64."""
    outcome = dog(*words)

    assert outcome.code == 64
    assert outcome.stdout.startswith(b"Usage: dog " + " ".join(words[:2]).encode())
    assert outcome.stderr == ""


@pytest.mark.parametrize(
    "words", [("vdi", "object", "foo"), ("vdi", "lock", "foo"), ("node", "md", "foo"), ("cluster", "recover", "foo"),
              ("node", "log", "foo"), ("node", "log", "level", "foo"), ("cluster", "snapshot", "foo"),
              ("node", "recovery", "foo")],
)  # fmt: skip
def test_unknown_nested_word(words: tuple[str, ...]) -> None:
    """An unknown nested subcommand: usage on stdout, 1."""
    outcome = dog(*words)

    assert outcome.code == 1
    assert outcome.stdout.startswith(b"Usage: dog ")


@pytest.mark.parametrize("port", NUMBERS)
def test_bad_ports(port: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ports outside 1 to 65535, as option and from the environment."""
    outcome = dog("node", "list", f"--port={port}")
    monkeypatch.setenv("SHEEPDOG_DOG_PORT", port)
    from_environment = dog("node", "list")

    for found in (outcome, from_environment):
        assert (found.code, found.stderr) == (64, f"Invalid port number '{port}'\n")


@pytest.mark.parametrize("port", ["1", "65535"])
def test_good_ports(port: str) -> None:
    """The ends of the range are ports; options win over the environment."""
    assert f"127.0.0.1:{port}" in dog("node", "list", "-p", port).stderr


def test_bad_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """An address that cannot be resolved, as option and from the environment."""
    assert dog("node", "list", "-a", "300.1.1.1.x").stderr == "Invalid ip address 300.1.1.1.x\n"
    monkeypatch.setenv("SHEEPDOG_DOG_ADDR", "")
    outcome = dog("node", "list")
    assert (outcome.code, outcome.stderr) == (1, "Invalid ip address \n")
    assert "[::1]:7000" in dog("node", "list", "-a", "::1").stderr


@pytest.mark.parametrize("text", ["3:3", "0", "32", "257", "2:0", "2:16", "x", "", "-1", "4:2:1"])
def test_bad_redundancy(text: str) -> None:
    """What -c does not take, with six lines of help."""
    outcome = dog("cluster", "format", "-c", text)

    assert (outcome.code, outcome.stderr) == (1, REDUNDANCY_HELP.format(text))


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["vdi", "create", "-z", "32", "a"], 1, "Object Size is limited to 2^31. Please set shift bit lower than 31"),
        (["vdi", "create", "-z", "19", "a"], 1, "Object Size is larger than 2^20. Please set shift bit larger than 20"),
        (["vdi", "create", "-z", "x", "a"], 1, "Object Size is larger than 2^20. Please set shift bit larger than 20"),
        (["vdi", "read", "-s", "0", "a"], 1, "The snapshot id must be larger than zero"),
        (["vdi", "object", "map", "-i", "1x", "a"], 1,
         "The index must be a decimal integer or a hexadecimal integer started with 0x"),
        (["vdi", "list", "-o", "xyz"], 1, "object id must be a hex integer"),
        (["vdi", "delete", "-B", "x", "a"], 1, "The number of batched reclamation is invalid: x"),
        (["vdi", "delete", "-B", "0", "a"], 1, "The number of batched reclamation must bepositive integer"),
        (["vdi", "delete", "-I", "x", "a"], 1, "The interval of batched reclamation is invalid: x"),
        (["vdi", "delete", "-I", "-1", "a"], 1, "The interval of batched reclamation must bepositive integer"),
        (["vdi", "delete", "-m", "x", "a"], 1, "The maximum number of reclamation is invalid: x"),
        (["vdi", "delete", "-m", "-3", "a"], 1, "The maximum number of reclamation must bepositive integer"),
        (["upgrade", "inode-convert", "-o", "v0.6", "a", "b"], 1,
         "unknown original version: v0.6\nvalid versions are v0.7 or v0.8"),
        (["benchmark", "io", "-w", "x", "a"], 2,
         "unknown workqueue type: x\nassumed workqueue types: ordered, dynamic"),
    ],
)  # fmt: skip
def test_bad_values(words: list[str], code: int, message: str) -> None:
    """Option arguments that a command refuses, without usage."""
    outcome = dog(*words)

    assert (outcome.code, outcome.stderr, outcome.stdout) == (code, message + "\n", b"")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["vdi", "resize", "a"], "Please specify the new size for the VDI"),
        (["vdi", "snapshot", "a", "-s", "12"], "Please specify a non-integer value for a snapshot tag name"),
        (["vdi", "clone", "a"], "Destination VDI name must be specified"),
        (["vdi", "clone", "a", "b"], "Only snapshot VDIs can be cloned\nPlease specify the '-s' option"),
        (["vdi", "clone", "-s", "", "a", "b"], "Only snapshot VDIs can be cloned\nPlease specify the '-s' option"),
        (["vdi", "rollback", "a"], "Please specify the '-s' option"),
        (["vdi", "rollback", "-f", "-s", "", "a"], "Please specify the '-s' option"),
        (["vdi", "setattr", "a"], "Please specify the attribute key"),
        (["vdi", "getattr", "a"], "Please specify the attribute key"),
        (["node", "format", "/x"], "specify store format"),
    ],
)
def test_own_usage_errors(words: list[str], message: str) -> None:
    """A command's own usage error: its message on stderr, the usage on stdout, 64."""
    outcome = dog(*words)

    assert (outcome.code, outcome.stderr) == (64, message + "\n")
    assert outcome.stdout.startswith(b"Usage: dog ")


@pytest.mark.parametrize("size", ["12MB", "ten", "3X", ""])
def test_bad_size(size: str) -> None:
    """A size that is none: two lines and the usage."""
    outcome = dog("vdi", "resize", "a", size)

    assert outcome.code == 64
    assert outcome.stderr == (
        f"Invalid size '{size}'\nYou may use B, K, M, G, T or P suffixes for bytes, kilobytes, megabytes, gigabytes, "
        "terabytes and petabytes.\n"
    )


LOST = "failed to connect to 127.0.0.1:7000: Connection refused\n" * 2


@pytest.mark.parametrize(
    ("words", "code", "last"),
    [
        *[(words.split(), 2, "Failed to get node list\n") for words in (
            "node list", "node info", "node kill 0", "node recovery", "node md info", "cluster info", "cluster format",
            "cluster check", "cluster alter-copy", "cluster snapshot save a /x", "cluster snapshot load a /x",
            "cluster snapshot show a /x", "vdi check a", "vdi create a 1M", "vdi track a", "vdi backup a",
            "vdi restore a", "vdi alter-copy a", "vdi object location a", "benchmark io a")],
        *[(words.split(), 2, "") for words in ("vdi list", "vdi tree", "vdi graph")],
        *[(words.split(), 1, "Failed to open VDI a (snapshot id: 0 snapshot tag: ): I/O error\n") for words in (
            "vdi read a", "vdi write a", "vdi resize a 1M", "vdi delete a")],
        (["vdi", "clone", "-s", "t", "a", "b"], 1,
         "Failed to open VDI a (snapshot id: 0 snapshot tag: t): I/O error\n"),
        (["vdi", "clone", "-s", "3", "a", "b"], 1,
         "Failed to open VDI a (snapshot id: 3 snapshot tag: ): I/O error\n"),
        (["vdi", "rollback", "-s", "t", "a"], 1, "Failed to open VDI a (snapshot id: 0 snapshot tag: t): I/O error\n"),
        (["vdi", "object", "map", "a"], 1,
         "Failed to open VDI a (snapshot id: 0 snapshot tag: ): I/O error\nFATAL: a not found\n"),
        (["vdi", "snapshot", "-s", "t", "a"], 1, "Failed to create snapshot for a: I/O error\n"),
        (["vdi", "setattr", "a", "k", "v"], 1, "Failed to set attribute: I/O error\n"),
        (["vdi", "setattr", "-d", "a", "k"], 1, "Failed to set attribute: I/O error\n"),
        (["vdi", "getattr", "a", "k"], 5, "Failed to find attribute oid: I/O error\n"),
        (["node", "stat"], 1, "failed to get stat information: I/O error\n"),
        (["node", "md", "plug", "-f", "/x"], 1,
         "Failed to execute request, look for sheep.log for more information\n"),
        (["cluster", "reweight"], 1, ""),
        (["cluster", "recover", "enable"], 1, ""),
        (["cluster", "recover", "force", "-f"], 1, "failed to execute request\n"),
        (["cluster", "driver"], 2, ""),
        (["cluster", "shutdown"], 1, "failed to execute request\n"),
        (["vdi", "lock", "list"], 2, "Failed to get VDI state\n"),
        (["vdi", "lock", "unlock", "a"], 1, "Failed to find VDI a: I/O error\n"),
        (["node", "log", "level", "get"], 255, "Failed to execute request\n"),
        (["node", "log", "level", "set", "debug"], 255, "Failed to execute request\n"),
        (["node", "vnodes", "set", "3"], 255, "Failed to execute request\n"),
    ],
)  # fmt: skip
def test_dead_port(words: list[str], code: int, last: str) -> None:
    """Nothing listens: two lines about that, then the command's own."""
    outcome = dog(*words)

    assert outcome.stderr == LOST + last
    assert outcome.code == code


def test_headings_before_the_dead_port_is_noticed() -> None:
    """``vdi list`` prints its heading first, ``vdi graph`` its opening lines."""
    assert dog("vdi", "list").stdout.startswith(b"  Name        Id    Size    Used")
    assert dog("vdi", "list", "-r").stdout == b""
    assert dog("vdi", "graph").stdout.startswith(b"digraph G {\n")


def test_operation_log(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every invocation is recorded when the environment asks for it."""
    log = tmp_path / "log"
    monkeypatch.setenv("SHEEPDOG_DOG_LOG", "1")
    monkeypatch.setenv("SHEEPDOG_DOG_LOG_PATH", str(log))
    dog("vdi", "help")
    dog("bogus", "x y")

    first, second = log.read_text().splitlines()
    assert first.endswith(" :  dog vdi help") and second.endswith(" :  dog bogus x y")
    assert log.stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("SHEEPDOG_DOG_LOG_PATH", str(tmp_path / "none" / "log"))
    outcome = dog("bogus")
    assert outcome.stderr.startswith(f"error at opening log file of dog({tmp_path}/none/log): No such file")
    assert outcome.code == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-P", "x"], "Invalid interval max (x), interval ((null))"),
        (["5", "0"], "Invalid interval max (5), interval (0)"),
        (["0", "5"], "Invalid interval max (0), interval (5)"),
        (["4294967296", "1"], "Invalid max (4294967296)"),
        (["x", "1"], "Invalid max (x)"),
        (["1", "9223372036854775808"], "Invalid interval (9223372036854775808)"),
        ([], "Invalid interval max ((null)), interval ((null))"),
    ],
)
def test_throttle_numbers(words: list[str], message: str) -> None:
    """Bad throttles, without usage block; the node list is asked for first, so a sheep must answer."""
    from replay import Answers

    sheep = Answers(lambda opcode, header, data: (0, b"", b""))
    outcome = run_dog(["node", "recovery", "set-throttle", *words], connect=sheep.connect)

    assert (outcome.code, outcome.stderr, outcome.stdout) == (64, message + "\n", b"")


@pytest.mark.parametrize("count", ["0", "65536", "-1", "x", "1.5"])
def test_vnodes_numbers(count: str) -> None:
    """Bad numbers of vnodes."""
    outcome = dog("node", "vnodes", "set", "--", count)

    assert outcome.code == 64
    assert outcome.stderr == f"Invalid number of vnodes '{count}': must be an integer between 1 and 65535\n"


def test_log_levels() -> None:
    """The levels are listed on stderr; a bad one lists them, too, and exits 255."""
    levels = "".join(
        f"{name}\t({at})\n"
        for at, name in enumerate(["emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"])
    )

    listed = dog("node", "log", "level", "list")
    refused = dog("node", "log", "level", "set", "loud")
    assert (listed.code, listed.stderr, listed.stdout) == (0, levels, b"")
    assert (refused.code, refused.stderr) == (255, f"invalid loglevel: loud\navailable loglevels:\n{levels}")
