"""Golden vectors: facts recorded from the original Sheepdog, for tests.

They are not part of the package. ``vectors_path`` finds them through the environment variable SHEEPDOG_VECTORS, or in
``../shared/vectors`` beside the checkout; without them a test is skipped, in CI it fails. The README files there say
what every key means.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "SHEEPDOG_VECTORS"


def find_vectors() -> Path | None:
    """The directory of the vectors, or ``None``."""
    named = os.environ.get(VARIABLE)
    if named:
        candidates = [Path(named)]
    else:
        # core/src/sheepdog/testing/vectors.py: the checkout is four levels above the directory of this file.
        checkout = Path(__file__).resolve().parents[4]
        candidates = [checkout.parent / "shared" / "vectors"]
    return next((path for path in candidates if (path / "vectors.json").is_file()), None)


def vectors_path() -> Path:
    """The directory of the vectors; without one the calling test is skipped, or fails where CI is set."""
    path = find_vectors()
    if path is None:
        reason = f"no golden vectors (set {VARIABLE} to their directory)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def load_json(name: str) -> Any:  # Any: whatever the file holds
    """A JSON file under the vectors' directory, read once."""
    return _load_json(vectors_path() / name)


@lru_cache(maxsize=32)
def _load_json(path: Path) -> Any:  # Any: whatever the file holds
    return json.loads(path.read_text("utf-8"))


def vectors() -> dict[str, Any]:  # Any: each key has a form of its own
    """``vectors.json``."""
    loaded: dict[str, Any] = load_json("vectors.json")
    return loaded


def pattern(seed: int, offset: int, length: int) -> bytes:
    """Volume content: the byte at volume offset x is (seed + x // 65536) % 255 + 1."""
    block = 65536
    parts = []
    end = offset + length
    while offset < end:
        step = min(end, (offset // block + 1) * block) - offset
        parts.append(bytes([(seed + offset // block) % 255 + 1]) * step)
        offset += step
    return b"".join(parts)


def expand(nonzero: Sequence[Sequence[Any]], size: int) -> bytes | None:  # Any: numbers and text mixed
    """The bytes of a sparse form; ``None`` where it holds only the beginning of a long run."""
    content = bytearray(size)
    for run in nonzero:
        offset, length, text = run[0], run[1], bytes.fromhex(run[2])
        if length > len(text):
            if len(run) < 4:
                return None
            unit = text[: run[3]]
            text = (unit * (length // len(unit) + 1))[:length]
        content[offset : offset + length] = text[:length]
    return bytes(content)


# --- recorded sessions ---


@dataclass(frozen=True, slots=True)
class Frame:
    """One recorded request or response. ``data`` is ``None`` where the recording holds only its digest."""

    session: str
    conn: int
    number: int
    request: bool
    port: int
    header: bytes
    data: bytes | None
    data_bytes: int

    @property
    def opcode(self) -> int:
        return self.header[1]

    @property
    def flags(self) -> int:
        return int.from_bytes(self.header[2:4], "little")

    @property
    def id(self) -> int:
        return int.from_bytes(self.header[8:12], "little")

    @property
    def result(self) -> int:
        """Of a response."""
        return int.from_bytes(self.header[16:20], "little")


def session_names() -> list[str]:
    """Every recorded session, in alphabetical order."""
    return sorted(path.name for path in (vectors_path() / "wire").glob("*.jsonl"))


def session_index() -> list[dict[str, Any]]:  # Any: see the README of the sessions
    """``index.json``: the sessions in the order they were run."""
    loaded: list[dict[str, Any]] = load_json("wire/index.json")
    return loaded


def frames(session: str) -> Iterator[Frame]:
    """The frames of one session, in recorded order. Bodies are checked against their digest."""
    with (vectors_path() / "wire" / session).open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            size = row["data_len"]
            data: bytes | None
            if size == 0:
                data = b""
            elif row.get("data") is not None:
                data = bytes.fromhex(row["data"])
            else:
                data = expand(row.get("data_nonzero") or [], size)
                if data is not None:
                    digest = row.get("data_sha256")
                    assert digest is None or hashlib.sha256(data).hexdigest() == digest, f"{session}: frame {row['t']}"
            header = bytes.fromhex(row["header"])
            yield Frame(session, row["conn"], row["t"], row["dir"] == "c2s", row["port"], header, data, size)


def exchanges(session: str) -> Iterator[tuple[Frame, Frame]]:
    """(request, response) pairs of one session, matched by connection and request id, in order of responses."""
    waiting: dict[tuple[int, int], list[Frame]] = {}
    for frame in frames(session):
        key = (frame.conn, frame.id)
        if frame.request:
            waiting.setdefault(key, []).append(frame)
        else:
            yield waiting[key].pop(0), frame
    assert not any(waiting.values()), f"{session}: requests without a response"


# --- archives ---


def store_names() -> list[str]:
    """The store directories that were kept."""
    return sorted(path.name.removesuffix(".json") for path in (vectors_path() / "stores").glob("*.json"))


def store_facts(name: str) -> dict[str, Any]:  # Any: see the README of the stores
    """What is known of a store directory."""
    loaded: dict[str, Any] = load_json(f"stores/{name}.json")
    return loaded


def archive_members(path: Path, wanted: Callable[[str], bool] = bool) -> Iterator[tuple[str, bytes]]:
    """(name, content) of every file in a tar archive whose name is wanted; holes read as zeros."""
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isfile() and wanted(member.name):
                opened = archive.extractfile(member)
                assert opened is not None, member.name
                yield member.name, opened.read()


def store_files(name: str, wanted: Callable[[str], bool] = bool) -> Iterator[tuple[str, bytes]]:
    """(path, content) of every file of a store directory whose path is wanted."""
    return archive_members(vectors_path() / "stores" / f"{name}.tar.gz", wanted)


def unpack_store(name: str, target: Path) -> None:
    """The store directory is under ``target``, holes and extended attributes included."""
    unpack_archive(vectors_path() / "stores" / f"{name}.tar.gz", target)


def unpack_archive(path: Path, target: Path) -> None:
    """The archive is unpacked under ``target``: sparse files stay sparse, ``user.*`` extended attributes are set.

    :raises OSError: the file system takes no extended attributes.
    """
    prefix = "SCHILY.xattr."
    with tarfile.open(path) as archive:
        if hasattr(tarfile, "data_filter"):  # since 3.11.4; Debian 12 has 3.11.2
            archive.extraction_filter = tarfile.data_filter
        for member in archive:
            archive.extract(member, target)
            for key, value in member.pax_headers.items():
                if key.startswith(prefix + "user."):
                    raw = value.encode("utf-8", "surrogateescape")
                    os.setxattr(target / member.name, key.removeprefix(prefix), raw)


def backup_stream(name: str) -> bytes:
    """The bytes of a recorded ``vdi backup``."""
    return gzip.decompress((vectors_path() / "backup" / f"{name}.backup.gz").read_bytes())
