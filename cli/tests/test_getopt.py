"""The rules and messages of GNU getopt_long."""

from __future__ import annotations

import pytest

from sheepdog_cli.getopt import POSITIONAL, GetoptError, Option, getopt

OPTIONS = (
    Option("a", "address", "address"),
    Option("p", "port", "port"),
    Option("P", "prealloc"),
    Option("v", "verbose"),
    Option("", "very-new"),
    Option("", "json"),
)


def parse(*words: str) -> list[tuple[str, str]]:
    return [(option.name or "-", text) for option, text in getopt("dog", words, OPTIONS)]


@pytest.mark.parametrize(
    "words", [("-p", "7001"), ("-p7001",), ("--port", "7001"), ("--port=7001",), ("--po", "7001"), ("--po=7001",)]
)
def test_spellings(words: tuple[str, ...]) -> None:
    """All spellings of an option with its argument are the same."""
    assert parse(*words) == [("port", "7001")]


def test_options_may_follow_arguments() -> None:
    """Options are found anywhere; the other words come last, in order."""
    assert parse("x", "-v", "y", "-a", "h") == [("verbose", ""), ("address", "h"), ("-", "x"), ("-", "y")]


def test_double_dash_ends_options() -> None:
    """Behind ``--`` everything is an argument, and a lone dash always is."""
    assert parse("-v", "--", "-v", "-") == [("verbose", ""), ("-", "-v"), ("-", "-")]
    assert parse("-") == [("-", "-")]


def test_flags_cluster() -> None:
    """Several flags may share a dash, the last one may have its argument attached."""
    assert parse("-vPa1.2.3.4") == [("verbose", ""), ("prealloc", ""), ("address", "1.2.3.4")]


def test_order_until_the_bad_one() -> None:
    """What stands before the first bad word was yielded."""
    found = []
    with pytest.raises(GetoptError):
        for option, _ in getopt("dog", ["-v", "-Q", "-P"], OPTIONS):
            found.append(option.name)

    assert found == ["verbose"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-Q"], "dog: invalid option -- 'Q'"),
        (["-vQ"], "dog: invalid option -- 'Q'"),
        (["--bogus"], "dog: unrecognized option '--bogus'"),
        (["-a"], "dog: option requires an argument -- 'a'"),
        (["--address"], "dog: option '--address' requires an argument"),
        (["--p"], "dog: option '--p' is ambiguous; possibilities: '--port' '--prealloc'"),
        (["--verbose=1"], "dog: option '--verbose' doesn't allow an argument"),
    ],
)
def test_messages(words: list[str], message: str) -> None:
    """Errors read as those of the C library."""
    with pytest.raises(GetoptError) as caught:
        list(getopt("dog", words, OPTIONS))

    assert str(caught.value) == message


def test_new_long_options_break_no_abbreviation() -> None:
    """An option without a letter does not make an old abbreviation ambiguous."""
    assert parse("--ver") == [("verbose", "")]
    assert parse("--very-new") == [("very-new", "")]


def test_missing_argument_names_the_option() -> None:
    """The caller learns which option lacks its argument."""
    with pytest.raises(GetoptError) as caught:
        list(getopt("dog", ["-p"], OPTIONS))

    assert caught.value.option is OPTIONS[1]
    assert POSITIONAL.name == ""
