"""Which files of a folder hold a model's weights, under whatever names their writer gave them.

Hugging Face's own names come first, in the order of its loader; then a set of shards whose index is missing, and a
single file of another name. A folder without any is told by what it does have. Reads no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from headrace.errors import CheckpointError, shown
from headrace.files import read_json

__all__ = ["SHARD", "Layout", "find_layout", "shard_set"]

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
STANDARD = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SHARD = re.compile(r"(.+)[-_.](\d{5})-of-(\d{5})(\.[a-z]+)")
# What trainers write beside a model: never the model itself.
BESIDE = re.compile(r"(adapter|optim|scheduler|scaler|training_args|trainer|rng_state|random_states|consolidated).*")
SHARDS_LIMIT = 10_000
NAME_LIMIT = 255  # bytes, what file systems take


@dataclass(frozen=True)
class Layout:
    """Files with weights, in the order they are read, and what an index says: tensor → file name."""

    files: tuple[Path, ...]
    index: Path | None = None
    weight_map: Mapping[str, str] = field(default_factory=dict)


def find_layout(folder: Path) -> Layout:
    """The weights of a folder.

    Raises:
        CheckpointError: there are none, several models, or a part of one.
    """
    missing: CheckpointError | None = None
    for name in STANDARD:
        path = folder / name
        if path.suffix != ".json" and path.exists():
            return Layout((path,))
        if path.suffix == ".json" and path.exists():
            try:
                return _indexed(path)
            except _NoShard as error:  # two indexes, and the shards of one of them
                missing = missing or error
    others = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and not BESIDE.fullmatch(p.name))
    for suffix in SUFFIXES:
        for path in others:
            if path.suffix == suffix and SHARD.fullmatch(path.name):
                return Layout(shard_set(path))
    if missing:
        raise missing
    for suffix in SUFFIXES:
        alike = [path for path in others if path.suffix == suffix]
        if len(alike) == 1:
            return Layout((alike[0],))
        if alike:
            names = ", ".join(path.name for path in alike[:6])
            raise CheckpointError(
                f"{folder} has {len(alike)} {suffix} files ({names}) and no index; expected one model; rename its "
                f"weights to model{suffix} or keep one"
            )
    raise CheckpointError(f"{folder} has no weights{_instead(folder)}; expected {STANDARD[0]} or {STANDARD[2]}")


class _NoShard(CheckpointError):
    """An index none of whose shards is there."""


def _indexed(index: Path) -> Layout:
    """The shards an index names, and any other of their set; the shards tell what is in them."""
    weight_map = read_json(index, error=CheckpointError, advice="fetch the model's folder again").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; expected tensor names and their files; fetch it again")
    for shard in weight_map.values():
        if not _is_file_name(shard):
            raise CheckpointError(f"{index} names the shard {shown(shard)}; expected a file name inside the folder")
    names = sorted(set(weight_map.values()))
    there = [name for name in names if (index.parent / name).exists()]
    if not there:
        raise _NoShard(f"{index.parent / names[0]} is missing, although {index.name} names it; fetch it")
    for name in names:
        if name not in there:
            raise CheckpointError(f"{index.parent / name} is missing, although {index.name} names it; fetch it")
    sets = {_set_name(name) for name in names} - {None}
    files = {index.parent / name for name in names}
    files |= {path for path in index.parent.iterdir() if _set_name(path.name) in sets}
    return Layout(tuple(sorted(files)), index, weight_map)


def _is_file_name(shard: object) -> bool:
    """A name inside the folder, which a file system takes and a message can show."""
    if not isinstance(shard, str) or not shard.isprintable() or shard in ("", ".", ".."):
        return False
    return Path(shard).name == shard and len(shard.encode()) <= NAME_LIMIT


def shard_set(path: Path) -> tuple[Path, ...]:
    """All files of the set that `path` is one of, by their names: NAME-00001-of-00003.SUFFIX.

    Raises:
        CheckpointError: one is missing.
    """
    match = SHARD.fullmatch(path.name)
    if match is None:
        return (path,)
    if not 0 < int(match[3]) <= SHARDS_LIMIT:
        raise CheckpointError(f"{path} is one of {match[3]} files; expected 1 to {SHARDS_LIMIT}")
    start = path.name[: match.start(2)]
    files = []
    for number in range(1, int(match[3]) + 1):
        file = path.with_name(f"{start}{number:05}-of-{match[3]}{match[4]}")
        if not file.exists():
            raise CheckpointError(f"{file} is missing, although {path.name} is one of {int(match[3])}; fetch it")
        files.append(file)
    return tuple(files)


def _set_name(name: str) -> tuple[str, str, str] | None:
    """What the names of a set of shards have in common; None for another name."""
    match = SHARD.fullmatch(name)
    return (name[: match.start(2)], match[3], match[4]) if match else None


def _instead(folder: Path) -> str:
    """What a folder without weights is, if it shows."""
    names = sorted(p.name for p in folder.iterdir())
    trained = [name for name in names if re.fullmatch(r"checkpoint-\d+", name)]
    if any(name.startswith("adapter_") for name in names):
        return ", but a LoRA adapter; give the model it was trained on, and the adapter with --lora"
    if trained:
        last = max(trained, key=lambda name: int(name.rpartition("-")[2]))
        return f" of its own; they are in {last}: name that folder"
    if any(name.startswith("consolidated") for name in names):
        return " but consolidated.*, the original format of Meta and Mistral; fetch the files in Hugging Face's format"
    if any(name.startswith("global_step") or name == "zero_to_fp32.py" for name in names):
        return " but DeepSpeed's parts of them; run its zero_to_fp32.py"
    if any(name.endswith(".distcp") or name.startswith("pytorch_model_fsdp") for name in names):
        return " but FSDP's parts of them; merge them with: accelerate merge-weights"
    for ending, kind in (
        (".h5", "TensorFlow's"),
        (".msgpack", "Flax's"),
        (".onnx", "an ONNX graph"),
        (".npz", "MLX's"),
    ):
        if found := [name for name in names if name.endswith(ending)]:
            return f" but {found[0]} ({kind}), which is not read"
    return ""
