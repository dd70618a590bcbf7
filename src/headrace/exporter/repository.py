"""What a published repository holds, and which of its files a model needs: one format of the weights and what goes
with it, never an optimizer's state, another framework's copy, or code.

Pure: it is given a list of names, and the content of an index.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from headrace.checkpoint.layout import SHARD
from headrace.errors import CheckpointError, did_you_mean, shown

__all__ = ["RepositoryFile", "choose"]


@dataclass(frozen=True)
class RepositoryFile:
    """A file of a repository: its size in bytes, its git-lfs sha256 or its git blob id, each None where not told."""

    name: str
    size: int | None = None
    sha256: str | None = None
    blob: str | None = None


# What a Hugging Face model has beside its weights.
BESIDE = re.compile(
    r"config\.json|generation_config\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.json|merges\.txt|chat_template\.(jinja|json)|additional_chat_templates/[^/]+\.jinja"
    r"|[^/]+\.model"
)
# What anyone who passes a model on must pass on with it.
TERMS = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY|README)[^/]*|[^/]*license[^/]*\.(pdf|txt|md)", re.IGNORECASE)
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
# Weights of something else than the model itself.
OTHER = re.compile(
    r"(consolidated|adapter|optim|scheduler|scaler|training_args|rng_state|random_states|mmproj).*", re.I
)


def choose(
    files: Sequence[RepositoryFile], wanted: str | None, index: Callable[[str], Mapping[str, Any]]
) -> tuple[list[RepositoryFile], list[RepositoryFile]]:
    """The files to fetch: what goes with the weights, and the weights, in the order they are to be opened.

    Args:
        files: all that the repository has.
        wanted: a weights file's name, or a part of it that only one model has ("Q4_K_M"); None for the one there is.
        index: reads one of the repository's JSON files.

    Raises:
        CheckpointError: there are no weights that headrace reads, or several models and none is named.
    """
    by_name = {file.name: file for file in files if _is_inside(file.name)}
    names = _weights(by_name, wanted, index)
    terms = [name for name in by_name if TERMS.fullmatch(name)]
    if names[0].endswith(".gguf"):  # has its tokenizer and its geometry inside
        beside = terms
    elif names[0] in ADAPTER:
        beside = ["adapter_config.json", *terms]
    else:
        beside = [*terms, *(name for name in by_name if BESIDE.fullmatch(name))]
    return [by_name[name] for name in sorted(beside) if name in by_name], [by_name[name] for name in names]


def _is_inside(name: str) -> bool:
    """A name comes from a server, and becomes a path."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name and bool(name)


def _weights(
    by_name: Mapping[str, RepositoryFile], wanted: str | None, index: Callable[[str], Mapping[str, Any]]
) -> list[str]:
    """Names of the weights."""
    models = _gguf_models(by_name)
    if wanted is not None:
        return _named(by_name, models, wanted)
    here = [name for name in by_name if "/" not in name and not OTHER.fullmatch(name)]
    for single, suffix in (("model.safetensors", ".safetensors"), ("pytorch_model.bin", ".bin")):
        if single in by_name:
            return [single]
        if f"{single}.index.json" in by_name:
            return _indexed(by_name, f"{single}.index.json", index)
        alike = [name for name in here if name.endswith(suffix)]
        shards = sorted(name for name in alike if SHARD.fullmatch(name))
        if shards:
            return _shards_of(by_name, shards[0])
        if len(alike) == 1:
            return alike
    if len(models) == 1:
        return models[0]
    if models:
        raise CheckpointError(
            f"the repository has {len(models)} models: {', '.join(_told(by_name, model) for model in models)}; "
            "expected the name of one; add --file NAME, a part of it is enough"
        )
    for name in ADAPTER:
        if name in by_name:
            return [name]
    there = sorted({PurePosixPath(name).suffix for name in by_name if "." in name}) or ["nothing"]
    raise CheckpointError(
        f"the repository has no weights that are read (it has {', '.join(there[:12])}); expected .safetensors, .bin or "
        ".gguf"
    )


def _gguf_models(by_name: Mapping[str, RepositoryFile]) -> list[list[str]]:
    """Each GGUF model's files: a single one or all of a split one."""
    models = []
    for name in sorted(by_name):
        match = SHARD.fullmatch(name)
        if not name.endswith(".gguf") or OTHER.fullmatch(PurePosixPath(name).name):
            continue
        if match is None:
            models.append([name])
        elif int(match[2]) == 1:
            models.append(_shards_of(by_name, name))
    return models


def _named(by_name: Mapping[str, RepositoryFile], models: list[list[str]], wanted: str) -> list[str]:
    """The model one of whose files has that name, or that part of a name."""
    if wanted in by_name:
        return next((model for model in models if wanted in model), _shards_of(by_name, wanted))
    found = [model for model in models if any(wanted.lower() in name.lower() for name in model)]
    if len(found) == 1:
        return found[0]
    # Q4_K is a part of Q4_K_M too: a whole word wins.
    words = re.compile(rf"(?<![a-z0-9_]){re.escape(wanted.lower())}(?![a-z0-9_])")
    whole = [model for model in found if words.search(model[0].lower())]
    if len(whole) == 1:
        return whole[0]
    names = [model[0] for model in (found or models)]
    raise CheckpointError(
        f"--file {shown(wanted)} is {'in several names' if found else 'no file of the repository'}"
        f"{'' if found else did_you_mean(wanted, by_name)}; expected one of {', '.join(names[:12]) or 'its files'}"
    )


def _indexed(by_name: Mapping[str, RepositoryFile], name: str, index: Callable[[str], Mapping[str, Any]]) -> list[str]:
    """The shards an index names, and the index."""
    weight_map = index(name).get("weight_map")
    shards = sorted({str(shard) for shard in weight_map.values()}) if isinstance(weight_map, Mapping) else []
    lacking = [shard for shard in shards if shard not in by_name]
    if not shards or lacking:
        raise CheckpointError(
            f"{name} names {shown(lacking[0]) if lacking else 'no file'}; expected files of the repository; tell its "
            "authors"
        )
    return [*shards, name]


def _shards_of(by_name: Mapping[str, RepositoryFile], name: str) -> list[str]:
    """All files of the set that one belongs to."""
    match = SHARD.fullmatch(name)
    if match is None:
        return [name]
    start, names = name[: match.start(2)], []
    for number in range(1, int(match[3]) + 1):
        names.append(f"{start}{number:05}-of-{match[3]}{match[4]}")
        if names[-1] not in by_name:
            raise CheckpointError(f"the repository lacks {names[-1]}, although it has {name}; expected all {match[3]}")
    return names


def _told(by_name: Mapping[str, RepositoryFile], model: list[str]) -> str:
    sizes = [by_name[name].size for name in model]
    known = sum(size for size in sizes if size is not None)
    return model[0] + (f" ({known / 1e9:.1f} GB)" if known and None not in sizes else "")
