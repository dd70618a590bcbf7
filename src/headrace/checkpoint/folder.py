"""A Hugging Face model folder: config.json and its weights, single or sharded, safetensors or torch .bin.

Knows nothing about architectures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from headrace.checkpoint.raw import RawModel
from headrace.checkpoint.safetensors_file import read_safetensors
from headrace.checkpoint.tensor import LazyTensor
from headrace.checkpoint.torch_file import read_torch
from headrace.errors import CheckpointError
from headrace.files import read_json

__all__ = ["read_folder"]

_FETCH = "fetch the model's folder again"

# In the order they are looked for, which is the order of Hugging Face's own loader.
LAYOUTS: tuple[tuple[str, Callable[[Path], dict[str, LazyTensor]]], ...] = (
    ("model.safetensors", read_safetensors),
    ("model.safetensors.index.json", read_safetensors),
    ("pytorch_model.bin", read_torch),
    ("pytorch_model.bin.index.json", read_torch),
)


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
    for name, reader in LAYOUTS:
        path = folder / name
        if not path.exists():
            continue
        files.append(path)
        if path.suffix != ".json":
            return RawModel(config, reader(path), tuple(files), generation)
        tensors, shards = _read_shards(path, reader)
        return RawModel(config, tensors, (*files, *shards), generation)
    raise CheckpointError(f"{folder} has no weights; expected one of {', '.join(name for name, _ in LAYOUTS)}")


def _read_shards(
    index: Path, reader: Callable[[Path], dict[str, LazyTensor]]
) -> tuple[dict[str, LazyTensor], list[Path]]:
    """The tensors an index lists, each from the shard it names."""
    weight_map = read_json(index, error=CheckpointError, advice=_FETCH).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; expected tensor names and their files; fetch it again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index} names the shard {shard!r}; expected a file name inside the folder")
    shards = {shard: index.parent / shard for shard in sorted(set(weight_map.values()))}
    for path in shards.values():
        if not path.exists():
            raise CheckpointError(f"{path} is missing, although {index.name} names it; fetch it")
    contents = {shard: reader(path) for shard, path in shards.items()}
    for name, shard in weight_map.items():
        if name not in contents[shard]:
            raise CheckpointError(
                f"{shards[shard]} has no tensor {name!r}, although {index.name} says so; fetch it again"
            )
    return {name: contents[shard][name] for name, shard in weight_map.items()}, list(shards.values())
