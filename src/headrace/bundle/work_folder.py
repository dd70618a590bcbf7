"""A folder in the making: marked as headrace's own, and locked while one process works in it.

    work_folder      under a name that the next run knows, so that it can go on there
    scratch_folder   under a name of its own, gone at the end; the next one in the same place removes what a killed
                     process could not

What headrace did not make it does not touch: a folder without the mark is refused, and only what was put there under
known names is removed. The mark is a file, and the lock is the operating system's lock on it, so it ends with the
process however that ends.
Knows nothing about what is made.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from headrace.errors import BundleError
from headrace.files import try_lock

__all__ = ["MARK", "SCRATCH", "clear", "remove_leftovers", "scratch_folder", "work_folder"]

MARK = "made-by-headrace"
SCRATCH = ".headrace-"  # how the names of scratch folders begin
_POLL = 0.2  # seconds
_ATTEMPTS = 1000  # to take a folder that somebody else takes away each time
_UNNAMED = 5  # polls for the id of a process that has the lock and has yet to write it


@contextmanager
def work_folder(path: Path, purpose: str, *, waiting: Callable[[int], object] | None = None) -> Iterator[None]:
    """Make a folder, or go on in one that headrace made, and hold its lock.

    At the end the folder goes if it holds nothing but mark and lock.

    Args:
        path: the folder.
        purpose: what is made there, for the mark: a person may read it.
        waiting: called, again and again, with the id of the process that holds the lock; None refuses instead.

    Raises:
        BundleError: something else is there, or another process works in it.
    """
    mark = _take(path, purpose, waiting)
    try:
        yield
    finally:
        if {entry.name for entry in path.iterdir()} == {MARK}:
            _remove(path, mark)
        else:
            with suppress(OSError):  # a full disk, of which something else is told
                _sign(mark, "", purpose)  # whoever comes next is not told of this process
        mark.close()


@contextmanager
def scratch_folder(parent: Path, purpose: str) -> Iterator[Path]:
    """An empty folder in `parent` that is gone at the end; those that killed processes left there go first.

    Args:
        parent: where; it is made when it is not there.
        purpose: what is done in it, for the mark: a person may read it.

    Raises:
        BundleError: it cannot be made.
    """
    remove_leftovers(parent)
    path = _scratch_name(parent)
    with work_folder(path, purpose, waiting=lambda _: None):
        try:
            yield path
        finally:
            _empty(path)


def remove_leftovers(parent: Path) -> None:
    """Remove the scratch folders in a folder whose processes have ended. Where there are no locks they stay."""
    for left in parent.glob(f"{SCRATCH}*"):
        with suppress(OSError):  # no mark: not headrace's, or just being made
            mark = (left / MARK).open("rb+")
            try:
                if not left.is_symlink() and try_lock(mark, without=False):
                    # A child of the process that was killed may still write here: under this name it finds nothing.
                    # (Windows renames no folder with an open file in it.)
                    gone = left if sys.platform == "win32" else left.rename(_scratch_name(parent))
                    _empty(gone)
                    _remove(gone, mark)
            finally:
                mark.close()


def clear(path: Path, names: Iterable[str]) -> None:
    """Remove files and folders of these names from a folder."""
    for name in names:
        entry = path / name
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _scratch_name(parent: Path) -> Path:
    return parent / f"{SCRATCH}{secrets.token_hex(6)}"


def _empty(path: Path) -> None:
    clear(path, [entry.name for entry in path.iterdir() if entry.name != MARK])


def _take(path: Path, purpose: str, waiting: Callable[[int], object] | None) -> IO[bytes]:
    """Make the folder and lock its mark: the mark, open."""
    gone = 0  # how often the folder was not there although it was just made
    unnamed = 0  # how often in a row the mark did not say who has it
    while True:
        try:
            _refuse_foreign(path)
            path.mkdir(parents=True, exist_ok=True)
            mark = (path / MARK).open("a+b")
        except OSError as error:
            # Whoever held it may just have taken the folder away; where none can be made, as in /proc, it never comes.
            gone += 1
            if isinstance(error, FileNotFoundError | FileExistsError) and gone < _ATTEMPTS:
                continue
            raise BundleError(f"{path} cannot be made ({error.strerror}); choose another place") from None
        if not try_lock(mark):
            mark.seek(0)
            holder = int(re.match(rb"\d*", mark.read(20))[0] or 0)  # type: ignore[index]
            mark.close()
            unnamed = 0 if holder else unnamed + 1
            if waiting is None and (holder or unnamed == _UNNAMED):
                who = f"process {holder}" if holder else "another process"
                raise BundleError(f"{path} is in use by {who}; wait until it has ended, or choose another place")
            if waiting is not None and holder:
                waiting(holder)
            time.sleep(_POLL)
        elif _is_there(path / MARK, mark):
            _sign(mark, str(os.getpid()), purpose)
            return mark
        else:
            mark.close()  # whoever held it took the folder away while this process opened the file


def _sign(mark: IO[bytes], holder: str, purpose: str) -> None:
    mark.truncate(0)
    # Past Python's buffer, which would try to write again what a full disk has refused.
    os.write(
        mark.fileno(),
        f"{holder}\nheadrace makes or uses this folder for {purpose}; above, the process at work.\n".encode(),
    )


def _refuse_foreign(path: Path) -> None:
    holds = ""
    if not path.is_symlink():
        try:
            names = [entry.name for entry in path.iterdir()]
        except FileNotFoundError:
            return
        except NotADirectoryError:
            if not path.exists():
                return  # what should hold the folder is a file: making it will say so
        else:
            if not names or MARK in names:
                return
            holds = f" (it holds {min(names)!r})"
    raise BundleError(f"{path} exists and headrace did not make it{holds}; move it away, or choose another place")


def _is_there(path: Path, file: IO[bytes]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _remove(path: Path, mark: IO[bytes]) -> None:
    """The mark, still locked, so that nobody enters in between; then the folder."""
    if sys.platform == "win32":
        mark.close()  # an open file cannot be removed there
    with suppress(OSError):  # somebody has put something there, or is about to take it
        (path / MARK).unlink()
        path.rmdir()
