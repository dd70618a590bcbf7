"""A measurement as a file: which bundle, who computed, on what, when, and the numbers. See docs/bench-format.md.

Measurements of a bundle are kept in its folder `measurements`, beside what the manifest lists; a file is one JSON
object. Does not know what is measured.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headrace.bundle.folder import MANIFEST, MEASUREMENTS, Bundle
from headrace.errors import UserError, reason
from headrace.files import read_json, write_file
from headrace.measure.machine import describe_machine, package_versions

__all__ = ["KINDS", "VERSION", "kept_records", "make_record", "read_record", "records_folder", "save_record"]

VERSION = 1
KINDS = ("bench", "text", "choices")


def make_record(kind: str, bundle: Bundle, runner: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """A measurement's JSON object: {format, version, created, bundle, runner, machine, versions, …body}.

    Args:
        kind: one of `KINDS`.
        bundle: that was measured.
        runner: who computed.
        body: the numbers.
    """
    return {
        "format": f"headrace-{kind}",
        "version": VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "bundle": {
            "name": bundle.root.resolve().name,
            "digest": bundle_digest(bundle.root),
            "architecture": bundle.config.architecture,
            "recipe": bundle.recipe.name,
            "kv": bundle.kv_dtype,
            "context": bundle.context,
            "prompt_length": bundle.prompt_length,
            "weight_bytes": bundle.weight_bytes,
        },
        "runner": runner,
        "machine": describe_machine(),
        "versions": package_versions(),
        **body,
    }


def bundle_digest(root: Path) -> str:
    """The manifest's own digest: what a bundle is known by."""
    return str(read_json(root / MANIFEST)["digest"])


def records_folder(root: Path) -> Path:
    """Where measurements are kept with a bundle, made where it is missing: before a measurement that takes hours.

    Raises:
        UserError: nothing can be written there.
    """
    folder = root / MEASUREMENTS
    try:
        folder.mkdir(exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({reason(error)}); measure without --save") from None
    return folder


def save_record(root: Path, name: str, record: Mapping[str, Any]) -> Path:
    """Keep a measurement with its bundle, as `measurements/NAME.json`; one of the same name is replaced."""
    path = records_folder(root) / f"{name}.json"
    write_file(path, (json.dumps(record, ensure_ascii=False, indent=1) + "\n").encode())
    return path


def read_record(path: Path) -> dict[str, Any]:
    """A measurement from a file.

    Raises:
        UserError: it is missing, no measurement, or of a newer version.
    """
    record = read_json(path, error=UserError, advice="make it with: headrace bench BUNDLE --save")
    kind = str(record.get("format", "")).removeprefix("headrace-")
    if kind not in KINDS or not isinstance(record.get("version"), int):
        raise UserError(f"{path} is no measurement of headrace; expected a file that bench or evaluate --save wrote")
    if record["version"] > VERSION:
        raise UserError(f"{path} has version {record['version']}; this headrace reads up to {VERSION}: update headrace")
    return record


def kept_records(root: Path) -> dict[str, dict[str, Any]]:
    """All measurements in a bundle's folder, by file name.

    Raises:
        UserError: one of them is of another bundle, or cannot be read.
    """
    digest, found = bundle_digest(root), {}
    for path in sorted((root / MEASUREMENTS).glob("*.json")):
        record = read_record(path)
        measured = record.get("bundle")
        other = measured.get("digest") if isinstance(measured, dict) else None
        if other != digest:
            raise UserError(
                f"{path} measured another bundle ({str(other)[:12]}…, this one is {digest[:12]}…); "
                "measure again or remove it"
            )
        found[path.name] = record
    return found
