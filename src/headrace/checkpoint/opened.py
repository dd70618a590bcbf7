"""Checkpoint: an open model, its weights lazy and under canonical names, whatever files it came in.

Carries out an architecture's table on the tensors a file format gave. Knows no file format's inside.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headrace.architectures import Source, architecture_for
from headrace.checkpoint.folder import read_folder
from headrace.checkpoint.gguf_model import read_gguf_model
from headrace.checkpoint.tensor import LazyTensor, select_rows, unit_rows
from headrace.config import ModelConfig
from headrace.errors import CheckpointError, ConfigError, did_you_mean

__all__ = ["Checkpoint", "open_checkpoint"]

# Tensors some files carry although they are derived from the config, or never used.
UNUSED = re.compile(r".*\.rotary_emb\.inv_freq|lm_head\.weight")


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        path: the folder or GGUF file.
        config: the geometry.
        files: every file that was read, sorted; what `digest` covers.
        generation_config: generation_config.json, or {}.
        metadata: a GGUF's key-values (tokenizer.* among them), each read when it is looked up; {} for a folder.
    """

    path: Path
    config: ModelConfig
    files: tuple[Path, ...]
    tensors: Mapping[str, LazyTensor] = field(repr=False)
    generation_config: Mapping[str, Any] = field(repr=False, default_factory=dict)
    metadata: Mapping[str, Any] = field(repr=False, default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of all weights, in the order they are used."""
        return tuple(self.tensors)

    def tensor(self, name: str) -> LazyTensor:
        """A weight by its canonical name; a tied head is the embedding.

        Raises:
            CheckpointError: there is no such weight.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} has no weight {name!r}{did_you_mean(name, self.tensors)}")
        return self.tensors[name]

    def digest(self) -> str:
        """sha256 over the names and contents of all files, hexadecimal; reads every byte."""
        total = hashlib.sha256()
        for path in self.files:
            with path.open("rb") as file:
                total.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
        return total.hexdigest()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a Hugging Face folder or a GGUF file; a folder that has one GGUF and no config.json is that GGUF.

    Only headers are read; weights are mapped and read when they are used.

    Raises:
        CheckpointError: a file is missing, damaged or hostile, or a tensor is missing or has a wrong shape.
        ConfigError: the geometry is missing, contradictory or not supported.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a folder with config.json, or a .gguf file")
    if path.is_dir() and not (path / "config.json").exists():
        models = sorted(path.glob("*.gguf"))
        if len(models) != 1:
            found = f"{len(models)} .gguf files; name one of them" if models else "no config.json and no .gguf file"
            raise CheckpointError(f"{path} has {found}; expected a Hugging Face model folder or one .gguf file")
        path = models[0]
    raw = read_folder(path) if path.is_dir() else read_gguf_model(path)
    architecture = architecture_for(raw.config.get("model_type"))
    config = architecture.config(raw.config)
    if config.num_layers > len(raw.tensors):  # before a table of that many layers is made
        raise ConfigError(f"{path} states {config.num_layers} layers, but has {len(raw.tensors)} tensors")
    table = architecture.sources(config, raw.config)
    tensors = {name: _bind(path, source, raw.tensors) for name, source in table.items()}
    used = {source.name for source in table.values()}
    for name in raw.tensors:
        if name not in used and not UNUSED.fullmatch(name):
            raise CheckpointError(
                f"{path} has a tensor {name!r}, which a {config.architecture} decoder of {config.num_layers} layers "
                "does not use; expected config.json and weights of one model"
            )
    return Checkpoint(path, config, tuple(sorted(raw.files)), tensors, raw.generation_config, raw.metadata)


def _bind(path: Path, source: Source, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
    """The rows of a tensor that a canonical weight is."""
    if source.name not in tensors:
        raise CheckpointError(
            f"{path} lacks tensor {source.name!r} {list(source.shape)}{did_you_mean(source.name, tensors)}"
        )
    tensor = tensors[source.name]
    if tensor.shape != source.shape:
        raise CheckpointError(
            f"{path}: tensor {source.name!r} has shape {list(tensor.shape)}; expected {list(source.shape)}, "
            "which is what its config says"
        )
    if source.rows is not None:
        tensor = select_rows(tensor, *source.rows)
    return unit_rows(tensor) if source.unit_rows else tensor
