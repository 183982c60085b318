"""Command-line parsing with the rules and the messages of GNU ``getopt_long``.

Scripts rely on them: options may follow arguments, ``-p7001`` and ``-p 7001`` and ``--port=7001`` are the same, long
options may be shortened to a unique prefix, ``--`` ends options, and what is wrong is reported in the words that every
GNU tool uses. Options come out one by one, in order, so the caller can stop at the first that it dislikes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """One option. ``argument`` is the word that stands for its argument in usage texts, empty for a flag.

    ``letter`` is empty for an option that has only a long name.
    """

    letter: str
    name: str
    argument: str = ""
    help: str = ""


class GetoptError(Exception):
    """A wrong command line. ``option`` is set when the option is known but lacks its argument."""

    def __init__(self, message: str, option: Option | None = None) -> None:
        super().__init__(message)
        self.option = option


POSITIONAL = Option("", "")


def getopt(program: str, words: Sequence[str], options: Sequence[Option]) -> Iterator[tuple[Option, str]]:
    """Yields ``(option, argument)`` in order, then ``(POSITIONAL, word)`` for every other word.

    :param program: what messages begin with.
    :raises GetoptError: while iterating, at the first word that is wrong; earlier options were yielded.
    """
    letters = {option.letter: option for option in options if option.letter}
    others: list[str] = []
    queue = list(words)
    queue.reverse()
    while queue:
        word = queue.pop()
        if word == "--":
            others.extend(reversed(queue))
            break
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            option = _long(program, name, options)
            if equals and not option.argument:
                raise GetoptError(f"{program}: option '--{option.name}' doesn't allow an argument")
            if option.argument and not equals:
                if not queue:
                    raise GetoptError(f"{program}: option '--{option.name}' requires an argument", option)
                value = queue.pop()
            yield option, value
        elif word.startswith("-") and word != "-":
            rest = word[1:]
            while rest:
                letter, rest = rest[0], rest[1:]
                known = letters.get(letter)
                if known is None:
                    raise GetoptError(f"{program}: invalid option -- '{letter}'")
                if not known.argument:
                    yield known, ""
                    continue
                if not rest and not queue:
                    raise GetoptError(f"{program}: option requires an argument -- '{letter}'", known)
                yield known, rest or queue.pop()
                rest = ""
        else:
            others.append(word)
    for word in others:
        yield POSITIONAL, word


def _long(program: str, name: str, options: Sequence[Option]) -> Option:
    matches = [option for option in options if option.name.startswith(name)]
    for option in matches:
        if option.name == name:
            return option
    if not matches:
        raise GetoptError(f"{program}: unrecognized option '--{name}'")
    if len(matches) > 1:
        # Options without a letter came later; they must not make an abbreviation ambiguous that scripts use.
        matches = [option for option in matches if option.letter] or matches
    if len(matches) > 1:
        possible = " ".join(f"'--{option.name}'" for option in matches)
        raise GetoptError(f"{program}: option '--{name}' is ambiguous; possibilities: {possible}")
    return matches[0]
