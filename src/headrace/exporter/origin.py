"""Where a checkpoint came from and under which licence, as far as its own files say: a pull's record, the model card
beside it, or a GGUF's keys. Bundles carry it, and their model cards tell it. Judges no licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headrace.checkpoint import Checkpoint
from headrace.exporter.hub import pulled

__all__ = ["licence_line", "origin_of"]

_KEYS = ("license", "license_name", "license_link")
_LONGEST = 200  # characters of a value that is shown


def origin_of(checkpoint: Checkpoint) -> dict[str, str]:
    """repository, revision, license, license_name, license_link: those that are known.

    Args:
        checkpoint: an opened one.
    """
    found: dict[str, Any] = {}
    record = pulled(checkpoint.path)
    if record is not None:
        found |= {"repository": record.repository, "revision": record.revision, "license": record.license}
    metadata = checkpoint.metadata or {}
    for key in _KEYS:
        if (name := f"general.{key.replace('_', '.')}") in metadata:
            found[key] = metadata[name]
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    found |= {key: value for key, value in _card(folder / "README.md").items() if key in _KEYS}
    return {key: value for key, value in found.items() if isinstance(value, str) and 0 < len(value) <= _LONGEST}


def licence_line(origin: dict[str, str]) -> str:
    """A sentence for people: which licence, and where its text is."""
    name = origin.get("license_name") or origin.get("license")
    if name is None:
        return "licence: not stated by the checkpoint; look where it came from"
    link = f" ({origin['license_link']})" if "license_link" in origin else ""
    return f"licence of the original, which holds for the bundle too: {name}{link}"


def _card(path: Path) -> dict[str, Any]:
    """The front matter of a model card; nothing where there is none, or where it is no YAML."""
    if not path.is_file():
        return {}
    import huggingface_hub

    try:
        return huggingface_hub.metadata_load(path) or {}
    except Exception:  # a card is prose that anybody writes: what cannot be read says nothing
        return {}
