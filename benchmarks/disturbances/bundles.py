"""Tiny bundles to disturb, and whether two of them hold the same."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tests.exports import SMALL, Exports

from disturbances.processes import run
from headrace.bundle.folder import check_files, is_bundle
from headrace.exporter.job import export


def made(exports: Exports, **options: Any) -> Path:
    """A tiny bundle, exported in a fork: threads that a library has here would be missing in every later fork."""
    place = exports.root / f"made-{hashlib.sha256(repr(sorted(options.items())).encode()).hexdigest()[:8]}"
    if not place.exists():
        checkpoint = exports.checkpoint()
        if run(lambda: export(checkpoint, place, **{**SMALL, "calibration": [exports.text], **options})):
            raise RuntimeError("a tiny bundle could not be made")
    return place


def content(folder: Path) -> dict[str, str]:
    """sha256 of every file, by path."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def comparable(folder: Path) -> dict[str, str]:
    """The same without what Qualcomm's compiler makes, and without its hashes: it differs from run to run."""
    found = content(folder)
    if any(name.endswith(".serialized.bin") for name in found):
        found = {
            name: value
            for name, value in found.items()
            if not name.endswith((".serialized.bin", "metadata.yaml", "headrace.json"))
        }
    return found


def whole(folder: Path) -> bool:
    """A bundle whose every byte is as its manifest says."""
    return is_bundle(folder) and not check_files(folder)
