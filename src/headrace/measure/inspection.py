"""What a checkpoint, a bundle or something compiled is, as plain values: geometry, tensors, precisions, sizes.

Runs nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from headrace.bundle.folder import is_bundle, open_bundle
from headrace.config import ModelConfig
from headrace.errors import UserError
from headrace.model.weights import linears, quantized_weights, weight_table

__all__ = ["inspect_path"]


def inspect_path(path: Path) -> dict[str, Any]:
    """A report: `summary` (name → value), `precisions` [(name, tensors, bytes)], `tensors` [{name, precision, shape}].

    For context binaries `graphs` stand in the place of `precisions` (see binary_inspection.py).

    Raises:
        UserError: it is neither a checkpoint nor a bundle nor compiled.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a checkpoint, a bundle, a Genie folder or a .bin of one")
    if is_bundle(path):
        return _bundle(path)
    from headrace.measure.binary_inspection import inspect_binaries, is_compiled

    return inspect_binaries(path) if is_compiled(path) else _checkpoint(path)


def _geometry(config: ModelConfig) -> dict[str, Any]:
    biased = [linear.role.value for linear in linears(config, 0).values() if linear.bias is not None]
    return {
        "architecture": config.architecture,
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "feed-forward": config.intermediate_size,
        "heads": f"{config.num_heads} of {config.head_dim}, {config.num_kv_heads} for keys and values",
        "vocabulary": config.vocab_size,
        "head": "tied to the embedding" if config.tied_head else "its own",
        "rope base": f"{config.rope_theta:g}"
        + (f", {config.rope_scaling.kind} scaling" if config.rope_scaling else ""),
        "context": config.max_context if config.sliding_window is None else f"{config.max_context}, its sliding window",
        **({"biases": ", ".join(biased)} if biased else {}),
    }


def _checkpoint(path: Path) -> dict[str, Any]:
    from headrace.checkpoint import BITS, open_checkpoint

    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    tensors, parameters = [], 0
    for name in checkpoint.names:
        tensor = checkpoint.tensor(name)
        if weight_table(config)[name].stored_as != name:
            continue
        elements = math.prod(tensor.shape)
        parameters += elements
        counts[tensor.dtype] += 1
        sizes[tensor.dtype] += int(elements * BITS[tensor.dtype] / 8)
        tensors.append({"name": name, "precision": tensor.dtype, "shape": list(tensor.shape)})
    summary = {"kind": "checkpoint", "path": str(checkpoint.path), **_geometry(config), "parameters": parameters}
    precisions = [(dtype, counts[dtype], sizes[dtype]) for dtype in sorted(counts)]
    return {"summary": summary, "precisions": precisions, "tensors": tensors}


def _bundle(path: Path) -> dict[str, Any]:
    bundle = open_bundle(path)
    config = bundle.config
    weights = quantized_weights(config)
    rules = bundle.recipe.resolve(weights)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    tensors = []
    for name, rule in rules.items():
        shape = weights[name].matrix
        precision = f"int{rule.bits} {f'block {rule.block}' if rule.block else 'channel'}"
        counts[precision] += 1
        sizes[precision] += rule.grid.nbytes(*shape)
        tensors.append({"name": name, "precision": precision, "shape": list(shape), "method": rule.method})
    kv_each = 2 * config.num_layers * config.kv_size * (1 if bundle.kv_scales else 4)
    summary = {
        "kind": "bundle",
        "path": str(path),
        **_geometry(config),
        "exported context": ", ".join(map(str, bundle.contexts)),
        "parts": len(bundle.parts),
        "prompt step": f"{', '.join(map(str, bundle.prompt_lengths))} tokens",
        "recipe": bundle.recipe.name,
        "weights": f"{bundle.weight_bytes} bytes",
        "KV cache": f"{bundle.kv_dtype}, {kv_each} bytes a token",
        "made from": bundle.provenance.get("checkpoint", "unknown"),
        "files": len(bundle.files),
    }
    precisions = [(name, counts[name], sizes[name]) for name in sorted(counts)]
    return {"summary": summary, "precisions": precisions, "tensors": tensors}
