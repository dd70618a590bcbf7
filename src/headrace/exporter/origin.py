"""Where a checkpoint came from and under which licence, as far as its own files say: a pull's record, the model card
beside it, or a GGUF's keys. Bundles carry it, and their model cards tell it. Judges no licence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from headrace.checkpoint import Checkpoint
from headrace.exporter.hub import pulled
from headrace.files import write_file

__all__ = ["LICENCES", "licence_line", "origin_of", "write_terms"]

LICENCES = "licences"  # a bundle's folder

_KEYS = ("license", "license_name", "license_link")
_LANGUAGE = re.compile(r"[A-Za-z]{2,12}(-[A-Za-z0-9]{1,8}){0,3}")  # a code, as in BCP 47, or a word such as "code"
_LONGEST = 200  # characters of a value that is shown
# What anyone who passes a model on must pass on with it, as repositories call it.
_TERMS = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)[^/]*|[^/]*license[^/]*\.(pdf|txt|md)", re.IGNORECASE)
_MOST_TERMS, _LARGEST_TERMS = 16, 4 << 20  # files, and bytes of each: a folder may hold anything


def origin_of(checkpoint: Checkpoint) -> dict[str, str]:
    """repository, revision, license, license_name, license_link, languages ("zh,en"): those that are known.

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
    card = _card(folder / "README.md")
    found |= {key: value for key, value in card.items() if key in _KEYS}
    found["languages"] = _languages(card.get("language")) or _languages(metadata.get("general.languages"))
    return {key: value for key, value in found.items() if isinstance(value, str) and 0 < len(value) <= _LONGEST}


def write_terms(checkpoint: Checkpoint, bundle: Path) -> None:
    """Put the licence files beside a checkpoint into a bundle's folder: they hold for the bundle too.

    Args:
        checkpoint: a folder, or a file that `pull` fetched; beside another file may lie whatever one likes.
        bundle: the folder in the making.
    """
    path = checkpoint.path
    if path.is_dir():
        folder = path
    elif pulled(path) is not None:
        folder = path.parent
    else:
        return
    found = sorted(f for f in folder.iterdir() if _TERMS.fullmatch(f.name) and f.is_file())
    for file in [f for f in found if f.stat().st_size <= _LARGEST_TERMS][:_MOST_TERMS]:
        (bundle / LICENCES).mkdir(exist_ok=True)
        write_file(bundle / LICENCES / file.name, file.read_bytes())


def licence_line(origin: dict[str, str]) -> str:
    """A sentence for people: which licence, and where its text is."""
    name = origin.get("license_name") or origin.get("license")
    if name is None:
        return "licence: not stated by the checkpoint; look where it came from"
    link = f" ({origin['license_link']})" if "license_link" in origin else ""
    return f"licence of the original, which holds for the bundle too: {name}{link}"


def _languages(stated: object) -> str:
    """Codes of languages, separated by commas, of what a card or a GGUF states: one code, or a list of them."""
    codes = stated if isinstance(stated, list) else [stated]
    return ",".join(code for code in codes if isinstance(code, str) and _LANGUAGE.fullmatch(code))


def _card(path: Path) -> dict[str, Any]:
    """The front matter of a model card; nothing where there is none, or where it is no YAML."""
    if not path.is_file():
        return {}
    import huggingface_hub

    try:
        return huggingface_hub.metadata_load(path) or {}
    except Exception:  # a card is prose that anybody writes: what cannot be read says nothing
        return {}
