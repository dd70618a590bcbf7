"""A Hugging Face model folder: config.json and its weights, in whatever files layout.py finds.

What a shard holds is what the shard says; an index tells which files belong to the model, and which of two shards is
meant where both have a tensor. Knows nothing about architectures.
"""

from __future__ import annotations

from pathlib import Path

from headrace.checkpoint.layout import find_layout
from headrace.checkpoint.raw import RawModel
from headrace.checkpoint.safetensors_file import read_safetensors
from headrace.checkpoint.tensor import LazyTensor
from headrace.checkpoint.torch_file import read_torch
from headrace.errors import CheckpointError, shown
from headrace.files import read_json

__all__ = ["read_folder"]

_FETCH = "fetch the model's folder again"


def read_folder(folder: Path) -> RawModel:
    """Open the folder; only headers are read.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    config = read_json(folder / "config.json", error=CheckpointError, advice=_FETCH)
    files = [folder / "config.json"]
    generation = {}
    if (folder / "generation_config.json").exists():
        generation = read_json(folder / "generation_config.json", error=CheckpointError, advice=_FETCH)
        files.append(folder / "generation_config.json")
    layout = find_layout(folder)
    if layout.index:
        files.append(layout.index)
    tensors: dict[str, LazyTensor] = {}
    for path in layout.files:
        for name, tensor in _read(path).items():
            if name in tensors and tensors[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{path} and another file both have a tensor {shown(name)}, of shapes {list(tensor.shape)} and "
                    f"{list(tensors[name].shape)}; expected the shards of one model"
                )
            # Where two have it, the one the index names, or the later one, as transformers takes it.
            if name not in tensors or layout.weight_map.get(name, path.name) == path.name:
                tensors[name] = tensor
    return RawModel(config, tensors, (*files, *layout.files), generation)


def _read(path: Path) -> dict[str, LazyTensor]:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
