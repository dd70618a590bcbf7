"""Folders derived from a bundle and kept beside it, BUNDLE.device and BUNDLE.emulation: each is made once.

A file in it says of which bundle it was made, so that another bundle's is never taken for this one's. It grows in
NAME.partial, where a second process waits for the first. Knows nothing about what is in it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

from headrace.bundle.folder import Bundle
from headrace.bundle.work_folder import clear, work_folder
from headrace.errors import BundleError
from headrace.files import full_disk, sync, sync_below, write_file
from headrace.progress import Progress, silent

__all__ = ["derive", "derived_folder"]

STAMP = "complete"  # written last: the hash of the bundle's manifest and of what was made of it
_MADE, _REPLACED = "made", "replaced"


def derived_folder(bundle: Bundle, kind: str) -> Path:
    """Where what is derived from a bundle is kept: BUNDLE.device, BUNDLE.emulation."""
    root = bundle.root.resolve()
    return root.with_name(f"{root.name}.{kind}")


def derive(
    bundle: Bundle, kind: str, folder: Path, make: Callable[[Path], object], progress: Progress = silent
) -> Path:
    """Make a folder of a bundle, unless it is there already; one of another bundle is replaced.

    Args:
        bundle: a published bundle.
        kind: what is derived, with everything that decides it.
        folder: where.
        make: fills an empty folder, which becomes `folder` when it is complete.
        progress: told when another process is at it.

    Returns:
        `folder`.

    Raises:
        BundleError: something that headrace did not make is there, or the disk is full.
    """
    stamp = hashlib.sha256(json.dumps([bundle.files, kind], sort_keys=True).encode()).hexdigest()
    if _stamp(folder) == stamp:
        return folder
    if folder.is_symlink() or (folder.exists() and not re.fullmatch("[0-9a-f]{64}", _stamp(folder))):
        raise BundleError(f"{folder} exists and headrace did not make it; move it away")
    work = folder.with_name(f"{folder.name}.partial")

    def waiting(process: int) -> None:
        progress(f"process {process} makes {folder.name}", 0, 1)

    with work_folder(work, f"{folder.name}, derived from a bundle,", waiting=waiting):
        if _stamp(folder) != stamp:  # whoever was waited for has made it
            clear(work, (_MADE, _REPLACED))
            (work / _MADE).mkdir()
            try:
                with full_disk(BundleError, folder.parent, "run this again"):
                    make(work / _MADE)
                    sync_below(work / _MADE)
                    write_file(work / _MADE / STAMP, stamp.encode())
            except BaseException:  # what is left would fill the disk, and cannot be gone on with
                clear(work, (_MADE,))
                raise
            if folder.exists():
                folder.rename(work / _REPLACED)
            (work / _MADE).rename(folder)
            sync(folder.parent)
        clear(work, (_MADE, _REPLACED))
    return folder


def _stamp(folder: Path) -> str:
    file = folder / STAMP
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
