"""Files as headrace reads and writes them: JSON with a size limit, whole files or none, hashes.

A file is written to a temporary name beside it, synced and renamed, so that a reader never meets half of one. Knows
no format but JSON.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from headrace.errors import BundleError, UserError

__all__ = [
    "JSON_LIMIT",
    "allocate",
    "read_json",
    "read_text",
    "sha256_file",
    "stands_for",
    "sync",
    "temporary_name",
    "whole_file",
    "write_file",
]

_ZEROS = 1 << 20  # bytes written at once
JSON_LIMIT = 64 << 20  # bytes; the shard index of the largest models is a few MB


def read_json(path: Path, *, error: type[UserError] = BundleError, advice: str = "export again") -> dict[str, Any]:
    """A JSON object from a file of at most `JSON_LIMIT` bytes.

    Args:
        path: the file.
        error: what is raised.
        advice: what the user can do, for the message.

    Raises:
        UserError: the file is missing, too large, or anything else than a JSON object; of the given class.
    """
    if not path.is_file():
        raise error(f"{path} is missing; expected a JSON object: {advice}")
    try:
        with path.open("rb") as file:
            data = file.read(JSON_LIMIT + 1)
        if len(data) > JSON_LIMIT:
            raise error(f"{path} has {path.stat().st_size} bytes; expected at most {JSON_LIMIT}")
        if instead := stands_for(data[:512]):
            raise error(f"{path} is {instead}")
        value = json.loads(data.decode("utf-8-sig"))  # some editors put a byte order mark in front
    except OSError as cause:
        raise error(f"{path} cannot be read ({cause}): {advice}") from None
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not JSON ({cause}); expected a JSON object: {advice}") from None
    if not isinstance(value, dict):
        raise error(f"{path} holds a {type(value).__name__}; expected a JSON object: {advice}")
    return value


def stands_for(beginning: bytes) -> str | None:
    """What a download left instead of the file it was asked for, and what to do; None for anything else.

    A repository cloned without git-lfs holds three lines of text in place of each large file, a broken link gives a
    page of HTML, and a hub answers a wrong address with a sentence.
    """
    if beginning.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a git-lfs pointer, not the file itself; expected its content; run: git lfs pull"
    start = beginning.lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return "a page of HTML, not the file itself; expected its content; fetch it again"
    if start.startswith((b"entry not found", b"repository not found", b"access to model", b"invalid username or")):
        return f"a hub's answer ({start[:15].decode('ascii', 'replace')!r} …), not the file; fetch it again"
    return None


def read_text(path: Path, *, error: type[UserError] = UserError, limit: int = JSON_LIMIT) -> str:
    """A text file in UTF-8, of at most `limit` bytes.

    Raises:
        UserError: the file cannot be read, is too large or is not UTF-8; of the class `error`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise error(f"{path} has {path.stat().st_size} bytes; expected at most {limit}")
        return data.decode("utf-8")
    except OSError as cause:
        raise error(f"{path} cannot be read ({cause})") from None
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not UTF-8 text ({cause.reason} at byte {cause.start}); save it as UTF-8") from None


def temporary_name(path: Path) -> Path:
    """Where a file is written before it is whole."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file open for writing; it appears under its name, synced, when the block ends well; otherwise not at all."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def allocate(file: IO[bytes], size: int) -> None:
    """Make an open file `size` bytes long, zeros, with room on the disk for all of them.

    A file that is only long has no such room, and a disk that fills up later would kill whoever maps it.

    Raises:
        OSError: there is no room.
    """
    if hasattr(os, "posix_fallocate"):
        file.flush()
        try:
            os.posix_fallocate(file.fileno(), 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # of file systems that cannot do it
                raise
    zeros = bytes(_ZEROS)
    file.seek(0, os.SEEK_END)
    for at in range(file.tell(), size, _ZEROS):
        file.write(zeros[: size - at])
    file.flush()


def write_file(path: Path, data: bytes) -> None:
    """Write a whole file or none of it."""
    with whole_file(path) as out:
        out.write(data)


def sync(path: Path) -> None:
    """What was written to a file, or the names in a folder, is on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """sha256 of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
