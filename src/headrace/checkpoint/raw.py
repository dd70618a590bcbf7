"""RawModel: what a file format gives before an architecture has looked at it. Knows neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.checkpoint.tensor import LazyTensor

__all__ = ["RawModel"]


@dataclass(frozen=True)
class RawModel:
    """A model under the names of its source.

    Attributes:
        config: as in Hugging Face's config.json.
        tensors: by Hugging Face's names.
        files: every file read.
        generation_config: generation_config.json, or {}.
        metadata: a GGUF's key-values, or {}.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, LazyTensor]
    files: tuple[Path, ...]
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
