"""Checkpoint: an open model, its weights lazy and under canonical names, whatever files it came in.

Carries out an architecture's table on the tensors a file format gave. Knows no file format's inside.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from headrace.architectures import Source, architecture_for
from headrace.checkpoint.folder import read_folder
from headrace.checkpoint.gguf_model import read_gguf_model
from headrace.checkpoint.layout import shard_set
from headrace.checkpoint.quantized import quantization
from headrace.checkpoint.raw import RawModel
from headrace.checkpoint.tensor import ELEMENTS, FLOATS, LazyTensor, same_values, select_rows, unit_rows
from headrace.config import ModelConfig
from headrace.errors import CheckpointError, ConfigError, did_you_mean, shown

__all__ = ["Checkpoint", "open_checkpoint"]

_log = logging.getLogger(__name__)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Tensors some files carry although they are derived from the config, or never used.
UNUSED = re.compile(r".*\.rotary_emb\.(original_)?inv_freq|.*\.rotary_emb\.(cos|sin)_cached|lm_head\.weight")
WRAPPERS = ("_orig_mod.", "module.", "model.module.")  # of torch.compile and of data parallel training


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk.

    Attributes:
        path: the folder or GGUF file.
        config: the geometry.
        files: every file that was read, sorted; what `digest` covers.
        tensors: by canonical name.
        sources: where each comes from, by canonical name.
        generation_config: generation_config.json, or {}.
        metadata: a GGUF's key-values (tokenizer.* among them), each read when it is looked up; {} for a folder.
    """

    path: Path
    config: ModelConfig
    files: tuple[Path, ...]
    tensors: Mapping[str, LazyTensor] = field(repr=False)
    sources: Mapping[str, Source] = field(repr=False)
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
    """Open a Hugging Face folder or a GGUF file; a folder whose only weights are one GGUF is that GGUF.

    Only headers are read, and a head that is stored although it is tied; other weights when they are used.

    Raises:
        CheckpointError: a file is missing, damaged or hostile, or a tensor is missing or has a wrong shape.
        ConfigError: the geometry is missing, contradictory or not supported.
    """
    path = _model_of(Path(path))
    raw = read_folder(path) if path.is_dir() else read_gguf_model(path)
    tensors = _unwrapped(path, raw.tensors)
    if method := quantization(raw.config, tensors):
        raise CheckpointError(
            f"{path} is already quantized ({method}); expected the model's own floats, which export quantizes itself; "
            "fetch the model it was made from"
        )
    config = _config(path, raw)
    if config.num_layers > len(tensors):  # before a table of that many layers is made
        raise ConfigError(f"{path} states {config.num_layers} layers, but has {len(tensors)} tensors")
    if config.tied_head and HEAD in tensors:
        embedding = tensors.setdefault(EMBEDDING, tensors[HEAD])  # some writers keep the one under the head's name
        if not same_values(embedding, tensors[HEAD]):  # transformers too takes the file's word for it
            _log.warning("%s ties head and embedding, but they differ in the file; taken as they are there", path)
            config = replace(config, tied_head=False)
    table = architecture_for(raw.config.get("model_type")).sources(config, raw.config)
    bound = {name: _bind(path, source, tensors) for name, source in table.items()}
    used = {source.name for source in table.values()}
    for name, tensor in tensors.items():
        if name not in used and not UNUSED.fullmatch(name) and not _is_buffer(tensor):
            raise CheckpointError(
                f"{path} has a tensor {shown(name)}, which a {config.architecture} decoder of {config.num_layers} "
                "layers does not use; expected config.json and weights of one model"
            )
    return Checkpoint(path, config, tuple(sorted(raw.files)), bound, table, raw.generation_config, raw.metadata)


def _model_of(path: Path) -> Path:
    """The folder or the GGUF file that a path means."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; expected a folder with config.json, or a .gguf file")
    if not path.is_dir():
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".json"):
            what = "name" if (path.parent / "config.json").exists() else "fetch config.json and name"
            raise CheckpointError(f"{path} is one file of a model; expected its folder; {what} {path.parent}")
        return path
    models = sorted(path.glob("*.gguf"))
    weights = [p for suffix in ("safetensors", "bin", "index.json") for p in path.glob(f"*.{suffix}")]
    if (path / "config.json").exists() and (weights or not models):
        return path
    if models and set(shard_set(models[0])) >= set(models):
        return models[0]
    if models:
        names = ", ".join(p.name for p in models[:6])
        raise CheckpointError(f"{path} has {len(models)} .gguf files ({names}); expected one model; name one of them")
    if (path / "params.json").exists():
        raise CheckpointError(
            f"{path} has params.json, the original format of Meta and Mistral; expected config.json; fetch the model "
            "in Hugging Face's format"
        )
    if snapshots := sorted(path.glob("snapshots/*/config.json")):
        raise CheckpointError(
            f"{path} is a hub's cache, not a model's folder; expected one of its snapshots; name {snapshots[0].parent}"
        )
    raise CheckpointError(
        f"{path} has no config.json and no .gguf file; expected a Hugging Face model folder or one .gguf file"
    )


def _config(path: Path, raw: RawModel) -> ModelConfig:
    """The geometry; what had to be assumed is logged."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(inner := raw.config.get(key), Mapping):
            raise ConfigError(
                f"{path}: model_type {shown(raw.config.get('model_type'))} is a {shown(inner.get('model_type'))} "
                f"language model inside another model ({key}); expected a language model alone; fetch one"
            )
    architecture = architecture_for(raw.config.get("model_type"))
    config = architecture.config(raw.config)
    if raw.config.get("max_position_embeddings") is None:
        _log.warning(
            "%s has no max_position_embeddings; taken as %d; export's --context chooses a shorter one",
            path / "config.json",
            config.max_context,
        )
    return config


def _unwrapped(path: Path, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors under the names a model saved by itself has, without what a wrapper put in front."""
    found = dict(tensors)
    for name in found:
        if ".lora_A." in name or ".base_layer." in name:
            raise CheckpointError(
                f"{path} has a tensor {shown(name)}: an adapter that is not merged; expected plain weights; save them "
                "after merge_and_unload(), or give the model and the adapter with --lora"
            )
    for wrapper in WRAPPERS:
        if found and all(name.startswith(wrapper) for name in found):
            found = {name.removeprefix(wrapper): tensor for name, tensor in found.items()}
    if EMBEDDING not in found and "embed_tokens.weight" in found:  # the decoder saved without its language model
        found = {name if name == HEAD else f"model.{name}": tensor for name, tensor in found.items()}
    return found


def _is_buffer(tensor: LazyTensor) -> bool:
    """Masks and positions are integers, which no weight of a decoder is."""
    return tensor.dtype in ELEMENTS and tensor.dtype not in FLOATS


def _bind(path: Path, source: Source, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
    """The rows of a tensor that a canonical weight is."""
    if source.name not in tensors:
        hint = "; config.json does not tie it to the embedding" if source.name == HEAD else ""
        raise CheckpointError(
            f"{path} lacks tensor {source.name!r} {list(source.shape)}{hint or did_you_mean(source.name, tensors)}"
        )
    tensor = tensors[source.name]
    if _is_buffer(tensor):
        raise CheckpointError(f"{path}: tensor {source.name!r} is of {tensor.dtype}; expected {', '.join(FLOATS)}")
    if tensor.shape != source.shape:
        raise CheckpointError(
            f"{path}: tensor {source.name!r} has shape {list(tensor.shape)}; expected {list(source.shape)}, "
            "which is what its config says"
        )
    if source.rows is not None:
        tensor = select_rows(tensor, *source.rows)
    return unit_rows(tensor) if source.unit_rows else tensor
