"""LoRA adapters over a checkpoint: each weight W becomes W + s·B·A as it is read, which is merging in float32.

An adapter is a folder as PEFT writes it: adapter_config.json, and adapter_model.safetensors or .bin with the pairs
A (r, K) and B (N, r); s is lora_alpha / r, or lora_alpha / √r for rank-stabilised ones. Of several adapters all sums
are added. What is more than such a sum (DoRA, trained biases, whole modules) is refused.
Source: Hu et al. 2021 (LoRA), Kalajdzievski 2023 (rsLoRA), and PEFT's LoraConfig for keys and names. Knows nothing
about quantization.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.architectures import architecture_for
from headrace.architectures.fields import boolean, integer, number
from headrace.checkpoint.opened import Checkpoint
from headrace.checkpoint.safetensors_file import read_safetensors
from headrace.checkpoint.tensor import LazyTensor, select_rows
from headrace.checkpoint.torch_file import read_torch
from headrace.config import ModelConfig
from headrace.errors import CheckpointError, ConfigError, did_you_mean, shown
from headrace.files import read_json, sha256_file
from headrace.model.weights import Role, find_weight, weight_table
from headrace.patterns import Pattern, PatternError

__all__ = ["adapted", "adapter_digest"]

CONFIG = "adapter_config.json"
ADAPTER_FILES: Mapping[str, Callable[[Path], dict[str, LazyTensor]]] = {
    "adapter_model.safetensors": read_safetensors,
    "adapter_model.bin": read_torch,
}
PIECE = 512  # rows that are multiplied at once
FACTOR_LIMIT = 1e6  # of alpha over rank; published adapters have 0.1 to 64
DEFAULT_RANK, DEFAULT_ALPHA = 8, 8.0  # LoraConfig's
# base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight; an embedding's pair has no ".weight".
TENSOR = re.compile(r"base_model\.model\.(?:model\.)?(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
# Starts that change the base weights too: what the adapter is to be added to is not the published model.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class _Change:
    """s·B·A, added to a weight (N, K)."""

    a: LazyTensor
    b: LazyTensor
    factor: float
    turned: bool = False  # an embedding's: its table is (s·B·A)ᵀ

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        rows, columns = self.b.shape[0], self.a.shape[1]
        return (columns, rows) if self.turned else (rows, columns)

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start … stop−1 of the sum, the same bits whatever is read with them.

        On some processors a product's last bits depend on how many rows it has, so rows are multiplied in pieces that
        begin and end where they always do.
        """
        rows, columns = self.shape
        a, turned_b = self.a.load(), self.b.load().T if self.turned else None
        out = np.empty((stop - start, columns), np.float32)
        for first in range(start - start % PIECE, stop, PIECE):
            last = min(first + PIECE, rows)
            product = self.b.read(first, last) @ a if turned_b is None else a[:, first:last].T @ turned_b
            begin, end = max(first, start), min(last, stop)
            np.multiply(
                product[begin - first : end - first], np.float32(self.factor), out=out[begin - start : end - start]
            )
        return out


def adapted(checkpoint: Checkpoint, folders: Sequence[Path]) -> Checkpoint:
    """The checkpoint with adapters added to its weights; only headers are read.

    Args:
        checkpoint: the model the adapters were trained on.
        folders: of adapters, as PEFT's save_pretrained writes them.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor does not fit the model.
        ConfigError: an adapter is more than LoRA, or its settings contradict its tensors.
    """
    tensors = dict(checkpoint.tensors)
    for folder in folders:
        for name, change in _adapter(folder, checkpoint).items():
            tensors[name] = _sum(tensors[name], change)
    return replace(checkpoint, tensors=tensors)


def _sum(base: LazyTensor, change: _Change) -> LazyTensor:
    def read(start: int, stop: int) -> NDArray[np.float32]:
        with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 becomes infinite, which an export names
            return base.read(start, stop) + change.rows(start, stop)

    return replace(base, dtype="float32", read=read)


def adapter_digest(folder: Path) -> str:
    """sha256 over an adapter's settings and weights, hexadecimal."""
    total = hashlib.sha256()
    for name in (CONFIG, *ADAPTER_FILES):
        if (folder / name).is_file():
            total.update(f"{name}\0{sha256_file(folder / name)}\n".encode())
    return total.hexdigest()


def _adapter(folder: Path, checkpoint: Checkpoint) -> dict[str, _Change]:
    """An adapter's changes by canonical name."""
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"--lora {folder} has no {CONFIG}; expected an adapter's folder, as PEFT writes it")
    raw = read_json(folder / CONFIG, error=CheckpointError, advice="save the adapter again")
    _refuse_more(folder, raw)
    path = next((folder / name for name in ADAPTER_FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"--lora {folder} has no weights; expected one of {', '.join(ADAPTER_FILES)}")
    pairs: dict[str, dict[str, LazyTensor]] = {}
    for name, tensor in ADAPTER_FILES[path.name](path).items():
        match = TENSOR.fullmatch(name)
        if match is None or len(tensor.shape) != 2:
            raise CheckpointError(
                f"{path} has a tensor {shown(name)} {list(tensor.shape)}, which is no part of a LoRA pair; expected "
                "lora_A and lora_B alone"
            )
        pairs.setdefault(match[1], {})[f"{match[2] or ''}{match[3]}"] = tensor
    changes: dict[str, _Change] = {}
    modules = _modules(checkpoint.config)
    for module, pair in pairs.items():
        if module not in modules:
            raise CheckpointError(
                f"{path} changes {shown(module)}, which a {checkpoint.config.architecture} decoder of "
                f"{checkpoint.config.num_layers} layers does not have{did_you_mean(module, modules)}; expected an "
                "adapter of this model"
            )
        changes |= _places(path, module, modules[module], _change(path, raw, module, pair), checkpoint)
    return changes


def _refuse_more(folder: Path, raw: Mapping[str, Any]) -> None:
    """Raise ConfigError for what merging B·A alone would lose."""
    if raw.get("peft_type") != "LORA":
        raise ConfigError(f"{folder / CONFIG}: peft_type is {shown(raw.get('peft_type'))}; expected 'LORA'")
    reasons = {
        "use_dora": "DoRA scales whole weights",
        "lora_bias": "its pairs have biases",
        "modules_to_save": "it holds whole modules",
        "layer_replication": "it repeats layers",
        "alora_invocation_tokens": "it acts from a certain token on",
        "use_qalora": "its inputs are pooled",
        "kasa_config": "KaSA cuts singular values off the model",
    }
    for key, reason in reasons.items():
        if raw.get(key):
            raise ConfigError(
                f"{folder / CONFIG}: {key} is {shown(raw[key])}: {reason}, which is not supported; merge the adapter "
                "with PEFT and export what that gives"
            )
    if raw.get("bias", "none") != "none":
        raise ConfigError(
            f"{folder / CONFIG}: bias is {shown(raw['bias'])}: trained biases are not supported; expected 'none'"
        )
    start = raw.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise ConfigError(
            f"{folder / CONFIG}: init_lora_weights is {shown(start)}, which changes the model too; convert the adapter "
            "to plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )


def _change(path: Path, raw: Mapping[str, Any], module: str, pair: Mapping[str, LazyTensor]) -> _Change:
    """A module's pair with its factor."""
    turned = set(pair) == {"embedding_A", "embedding_B"}
    if not turned and set(pair) != {"A", "B"}:
        raise CheckpointError(f"{path} has {', '.join(sorted(pair))} of {module!r}; expected lora_A and lora_B")
    prefix = "embedding_" if turned else ""
    a, b = pair[f"{prefix}A"], pair[f"{prefix}B"]
    rank = int(_pattern(raw, "rank_pattern", module, integer(raw, "r", default=DEFAULT_RANK)))
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise ConfigError(
            f"{path}: the pair of {module!r} has shapes {list(a.shape)} and {list(b.shape)}; expected rank {rank}, "
            f"which is what {CONFIG} says"
        )
    alpha = _pattern(raw, "alpha_pattern", module, number(raw, "lora_alpha", DEFAULT_ALPHA))
    factor = alpha / (math.sqrt(rank) if boolean(raw, "use_rslora", False) else rank)
    if not abs(factor) < FACTOR_LIMIT:
        raise ConfigError(f"{path}: lora_alpha over r is {factor:g} for {module!r}; expected below {FACTOR_LIMIT:g}")
    return _Change(a, b, factor, turned)


def _pattern(raw: Mapping[str, Any], key: str, module: str, default: float) -> float:
    """A module's own value: patterns are regular expressions for the end of its name, the first that fits counts."""
    patterns = raw.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise ConfigError(f"{key} is {shown(patterns)}; expected an object")
    for pattern, value in patterns.items():
        try:
            fits = Pattern(rf"(^|\.)({pattern})$").found_in(f"model.{module}")
        except PatternError as error:
            raise ConfigError(f"{key} has {shown(pattern)}, which is no regular expression: {error}") from None
        if fits:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < FACTOR_LIMIT:
                raise ConfigError(f"{key} gives {shown(value)} for {module!r}; expected a number above 0")
            return value
    return default


def _places(
    path: Path, module: str, parts: Sequence[str], change: _Change, checkpoint: Checkpoint
) -> dict[str, _Change]:
    """The weights that a module's change is for: one, or those that are fused in it, each with its rows."""
    config = checkpoint.config
    table = weight_table(config)
    rows = [table[name].matrix[0] for name in parts]
    columns = table[parts[0]].matrix[1]
    if change.shape != (sum(rows), columns):
        raise CheckpointError(
            f"{path} changes {module!r} by {list(change.shape)}; expected {[sum(rows), columns]}: it is for another "
            "model"
        )
    role = table[parts[0]].role
    if role in (Role.EMBEDDING, Role.HEAD) and (config.tied_head or checkpoint.sources[parts[0]].unit_rows):
        reason = "the embedding and the head of this model are one" if config.tied_head else "this head is normalised"
        raise ConfigError(f"{path} changes {module!r}, but {reason}; expected an adapter of the layers alone")
    if len(parts) == 1:
        return {parts[0]: change}
    found, start = {}, 0
    for name, count in zip(parts, rows, strict=True):
        found[name] = replace(change, b=select_rows(change.b, start, start + count))
        start += count
    return found


def _modules(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Module → the weights that it is, fused ones of the architecture's own layout among them."""
    table = weight_table(config)
    found: dict[str, tuple[str, ...]] = {row.module: (name,) for name, row in table.items() if row.quantized}
    for module, roles in architecture_for(config.architecture).FUSED.items():
        for layer in range(config.num_layers):
            found[f"layers.{layer}.{module}"] = tuple(find_weight(config, role, layer).name for role in roles)
    return found
