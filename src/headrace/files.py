"""Files as headrace reads and writes them: JSON with a size limit, whole files or none, hashes.

A file is written to a temporary name beside it, synced and renamed, so that a reader never meets half of one. Knows
no format but JSON.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from headrace.errors import BundleError, UserError, reason

__all__ = [
    "JSON_LIMIT",
    "allocate",
    "exchange",
    "full_disk",
    "read_bytes",
    "read_json",
    "read_text",
    "sha256_file",
    "stands_for",
    "sync",
    "sync_below",
    "temporary_name",
    "try_lock",
    "whole_file",
    "write_file",
]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
_ZEROS = 1 << 20  # bytes written at once
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # of file systems that have none
_FAR = 1 << 30  # Windows locks bytes against reading too, and what is read is at the beginning
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
        data = read_bytes(path, error=error, limit=JSON_LIMIT)
        if instead := stands_for(data[:512]):
            raise error(f"{path} is {instead}")
        value = json.loads(data.removeprefix(BOM_UTF8).decode())  # some editors put a byte order mark in front
        # Halves of characters can be spelled, and be no text.
        if b"\\u" in data and (b"\\ud" in data or b"\\uD" in data):
            json.dumps(value, ensure_ascii=False).encode()
    except OSError as cause:
        raise error(f"{path} cannot be read ({reason(cause)}): {advice}") from None
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
        return read_bytes(path, error=error, limit=limit).decode("utf-8")
    except OSError as cause:
        raise error(f"{path} cannot be read ({reason(cause)})") from None
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not UTF-8 text ({cause.reason} at byte {cause.start}); save it as UTF-8") from None


def read_bytes(path: Path, *, error: type[UserError] = UserError, limit: int = JSON_LIMIT) -> bytes:
    """A whole file of at most `limit` bytes.

    Raises:
        UserError: it is larger; of the class `error`.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        # Python makes room for as much as is asked for, so no more is asked for than is there.
        data = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    if len(data) > limit:
        raise error(f"{path} has {path.stat().st_size} bytes; expected at most {limit}")
    return data


def temporary_name(path: Path) -> Path:
    """Where a file is written before it is whole."""
    return path.with_name(f".{path.name}.part")


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A file open for writing; it appears under its name, synced, when the block ends well; otherwise not at all.

    Once the block has ended, neither a killed process nor a power cut takes it away again. Whoever writes the same file
    meanwhile comes after this one.
    """
    temporary = temporary_name(path)
    try:
        with _alone(temporary) as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
            if os.name != "nt":  # an open file cannot be renamed there
                temporary.replace(path)
        if os.name == "nt":
            temporary.replace(path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _alone(path: Path) -> Iterator[IO[bytes]]:
    """An empty file open for writing, locked: a second writer waits here, and then finds the file gone."""
    while True:
        with path.open("wb" if os.name == "nt" else "ab") as out:
            if os.name != "nt":
                import fcntl

                with suppress(OSError):  # of file systems that have no locks
                    fcntl.flock(out.fileno(), fcntl.LOCK_EX)
                try:
                    same = os.path.samestat(path.stat(), os.fstat(out.fileno()))
                except FileNotFoundError:
                    same = False
                if not same:
                    continue
                out.truncate(0)
            yield out
            return


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
    if os.name == "nt" and path.is_dir():
        return  # it has no way to ask for this
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_below(folder: Path) -> None:
    """Everything in a folder, and the names of it all, is on disk when this returns."""
    entries = [entry for entry in folder.rglob("*") if not entry.is_symlink()]
    for entry in sorted(entries, key=lambda entry: entry.is_dir()):  # what is in the files, then their names
        sync(entry)
    sync(folder)


def exchange(a: Path, b: Path) -> bool:
    """Let two files or folders that are there swap their names in one step; False where the system cannot.

    Nobody then meets a moment in which one of the names is missing. Source: Linux, renameat2(2), RENAME_EXCHANGE.
    """
    if sys.platform != "linux":
        return False
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc has it since 2.28
    if rename is None:
        return False
    return bool(rename(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0)


@contextmanager
def full_disk(told_as: type[UserError], folder: Path, advice: str) -> Iterator[None]:
    """A disk that fills up inside becomes one line.

    Args:
        told_as: the class of the error.
        folder: where there is no room.
        advice: what to do about it.

    Raises:
        UserError: of that class.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise told_as(f"{folder} has no room left ({error.strerror}); free some and {advice}") from error


def sha256_file(path: Path) -> str:
    """sha256 of a file's content, hexadecimal."""
    import hashlib  # some milliseconds, which whoever reads a vocabulary can do without

    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if sys.platform == "win32":
    import msvcrt

    def try_lock(file: IO[bytes], without: bool = True) -> bool:
        """See below; one byte far behind the end is locked."""
        file.seek(_FAR)
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
else:
    import fcntl

    def try_lock(file: IO[bytes], without: bool = True) -> bool:
        """Take the lock of an open file, which ends with the process however that ends.

        Returns:
            Whether it is this process's now; `without` where the file system has no locks.
        """
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return without
        return True
