"""Many exports: of many checkpoints, or of one under many recipes; over a cluster where there is one.

    export_many([Export(checkpoint, out, {"recipe": "w4b32"}), …], address="10.0.0.1:6379")

What is finished is not done again, and what was interrupted goes on, wherever it is tried next. Knows no quantization.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.bundle.folder import open_bundle
from headrace.cluster import map_over
from headrace.errors import HeadraceError
from headrace.exporter.job import export
from headrace.exporter.options import ExportOptions
from headrace.exporter.settings import settle
from headrace.progress import Progress, silent

__all__ = ["Export", "Exported", "export_many"]


@dataclass(frozen=True)
class Export:
    """A bundle to be made.

    Attributes:
        checkpoint: a Hugging Face folder or a GGUF file.
        out: the bundle's folder.
        options: fields of `ExportOptions`.
    """

    checkpoint: Path
    out: Path
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """A bundle that was asked for.

    Attributes:
        out: its folder.
        error: why there is none, or None.
        weight_bytes: of its weights.
        quantization_kl: what quantization cost on the sample text, where that was measured.
    """

    out: Path
    error: str | None = None
    weight_bytes: int = 0
    quantization_kl: float | None = None


def export_many(
    exports: Sequence[Export], *, address: str | None = None, cpus: int = 1, progress: Progress = silent
) -> list[Exported]:
    """Make every bundle; one that cannot be made does not stop the others.

    Args:
        exports: their folders differ.
        address: of a Ray cluster that sees the same files, or None: here, one after the other.
        cpus: of a node, for each export; give the option `jobs` the same number.
        progress: told how many are done.
    """
    made = []
    for number, one in enumerate(map_over(address, _exporting, exports, cpus=cpus)):
        made.append(one)
        progress("bundles", number + 1, len(exports))
    return made


@contextmanager
def _exporting() -> Iterator[Callable[[Export], Exported]]:
    yield _made


def _made(asked: Export) -> Exported:
    try:
        if not _is_there(asked):
            export(asked.checkpoint, asked.out, resume=True, restart=True, **asked.options)
        bundle = open_bundle(asked.out)
    except HeadraceError as error:
        return Exported(asked.out, str(error))
    return Exported(asked.out, None, bundle.weight_bytes, bundle.provenance.get("quantization_kl"))


def _is_there(asked: Export) -> bool:
    """Whether the bundle at its place is of this checkpoint and these options."""
    try:
        origin = open_bundle(asked.out).provenance
    except HeadraceError:
        return False
    settings = settle(asked.checkpoint, ExportOptions.of(dict(asked.options)))
    files = {file.name: file.stat().st_size for file in settings.checkpoint.files}
    return origin.get("checkpoint_files") == files and origin.get("options") == settings.asked()
