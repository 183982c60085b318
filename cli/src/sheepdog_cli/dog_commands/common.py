"""What several subcommands do alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sheepdog.client import volume
from sheepdog.errors import RequestError, TransportError
from sheepdog_cli.session import EXIT_FAILURE, RESULT_EIO, Quit, Session, complain, describe, fail, misuse, name_bytes
from sheepdog_cli.sizes import SUFFIX_HINT, parse_size
from sheepdog_cli.values import NO_SELECTOR, Selector

if TYPE_CHECKING:
    from sheepdog.model.inode import InodeHeader


def volume_size(text: str) -> int:
    """Bytes.

    :raises Usage: no size; said on stderr.
    """
    size = parse_size(text)
    if size is None:
        misuse(f"Invalid size '{text}'", SUFFIX_HINT)
    return size


def open_failure(name: str, selector: Selector, text: str) -> str:
    """The line that says that a vdi could not be opened."""
    import os

    tag = os.fsdecode(selector.tag)
    return f"Failed to open VDI {name} (snapshot id: {selector.snap_id} snapshot tag: {tag}): {text}"


def open_inode(
    session: Session,
    name: str,
    selector: Selector = NO_SELECTOR,
    *,
    header_only: bool = False,
    direct: bool = True,
    then: str | None = None,
    code: int = EXIT_FAILURE,
) -> volume.Inode:
    """The inode of a vdi or snapshot.

    :param then: the command's own line, printed behind the reason when it fails.
    :raises Quit: it cannot be opened; said on stderr.
    """
    try:
        return volume.open_vdi(
            session.call,
            name_bytes(name),
            snap_id=selector.snap_id,
            tag=selector.tag,
            header_only=header_only,
            direct=direct,
        )
    except volume.OpenError as error:
        complain_object(error)
        complain(open_failure(name_text_cut(name), selector, describe(error.result)))
    except TransportError:
        complain(open_failure(name_text_cut(name), selector, describe(RESULT_EIO)))
    if then is not None:
        complain(then)
    raise Quit(code)


def name_text_cut(name: str) -> str:
    """A name as it is stored, as text."""
    import os

    return os.fsdecode(name_bytes(name))


def complain_object(error: BaseException) -> None:
    """If an object could not be read or written, that is said on stderr."""
    cause = error if isinstance(error, (volume.ObjectReadError, volume.ObjectWriteError)) else error.__cause__
    if isinstance(cause, (volume.ObjectReadError, volume.ObjectWriteError)):
        complain(str(cause))


@contextmanager
def failing_with(line: str | None, code: int = EXIT_FAILURE) -> Iterator[None]:
    """Refused and unanswered requests inside end the command: the reason on stderr, then ``line``."""
    try:
        yield
    except RequestError as error:
        complain_object(error)
        if line is None:
            raise Quit(code) from None
        fail(line, code)
    except TransportError:
        if line is None:
            raise Quit(code) from None
        fail(line, code)


def flag_of(header: InodeHeader) -> str:
    """``s`` snapshot, ``c`` working clone, blank otherwise."""
    if header.is_snapshot:
        return "s"
    return "c" if header.is_clone else " "
