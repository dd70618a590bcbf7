"""plan: what a model will need before anything is made: bytes a part, cache a context, time and memory of the export,
and the speed that memory bandwidth allows.

Everything is derived from geometry and recipe; the one thing measured is how fast this computer multiplies matrices.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headrace.bundle.recipe import Recipe
from headrace.bundle.weights import layouts, linear_shape, quantized_names
from headrace.config import ModelConfig
from headrace.model.decoder import EMBEDDING, HEAD, layer_linears
from headrace.plan import plan_parts
from headrace.quantize.descent import SWEEPS
from headrace.targets.qualcomm.compile_cost import estimate_compile

__all__ = ["BANDWIDTHS", "ExportEstimate", "estimate_export", "plan_model"]

# Peak memory bandwidth by the makers' data sheets, bytes a second: what a token's bytes can at best be read at.
BANDWIDTHS: Mapping[str, float] = {
    "snapdragon-8-elite": 84.8e9,  # LPDDR5X 5300 MHz, 64 bits
    "snapdragon-8-gen3": 76.8e9,  # LPDDR5X 4800 MHz
    "snapdragon-8-gen2": 67.2e9,  # LPDDR5X 4200 MHz
    "snapdragon-x-elite": 135e9,  # LPDDR5X-8448, 128 bits
}

_PROBE = 1024  # rows of the matrices that are multiplied to learn this computer's speed
# Share of the plain matrix product's speed that a whole layer reaches; benchmarks/layer_7b.py measures it.
_EFFICIENCY = 0.7
_WORKING = 1 << 30  # bytes: Python, and the temporary arrays of the windows and rows in work


@dataclass(frozen=True)
class ExportEstimate:
    """Quantizing all layers: seconds on this computer, and peak memory in bytes."""

    seconds: float
    peak_bytes: int


def plan_model(
    config: ModelConfig,
    recipe: Recipe,
    *,
    parts: int = 5,
    prompt_length: int = 128,
    contexts: Sequence[int] = (4096,),
    tokens: int = 32 * 512,
) -> dict[str, Any]:
    """What a bundle of this geometry and recipe will need.

    Args:
        config: the geometry.
        recipe: grids, cache and basis.
        parts: how many.
        prompt_length: tokens of a prompt step.
        contexts: context lengths.
        tokens: of calibration.

    Returns:
        parts [{name, layers, weight_bytes}]; weight_bytes; contexts [{context, kv_bytes, run_bytes}]; export
        {seconds, peak_bytes}; compile {seconds, peak_bytes}: for a chip, all contexts; decode
        [{device, context, tok_s}]: at most, by bandwidth.

    Raises:
        RecipeError: a rule does not fit.
    """
    config = replace(config, tied_head=config.tied_head and not recipe.rotate)  # see quantize/rotation.py
    grids = {name: rule.grid for name, rule in recipe.resolve(quantized_names(config)).items()}
    plan = plan_parts(config, parts)
    sizes = [layout.nbytes for layout in layouts(config, plan, grids)]
    kv_width = 1 if recipe.kv == "int8" else 4
    kv_token = 2 * config.num_layers * config.kv_size * kv_width
    # A token reads every linear and the head; of the embedding only a row.
    head = EMBEDDING if config.tied_head else HEAD
    read = sum(grids[n].nbytes(*linear_shape(config, n)) for n in grids if n != EMBEDDING or n == head)
    estimate = estimate_export(config, tokens)
    compiling = estimate_compile(config, plan, len(contexts))
    return {
        "parts": [
            {"name": part.name, "layers": len(part.layers), "weight_bytes": size} for part, size in zip(plan, sizes)
        ],
        "weight_bytes": sum(sizes),
        "contexts": [
            {"context": c, "kv_bytes": c * kv_token, "run_bytes": sum(sizes) + c * kv_token} for c in contexts
        ],
        "export": {"seconds": round(estimate.seconds, 1), "peak_bytes": estimate.peak_bytes, "tokens": tokens},
        "compile": {"seconds": round(compiling.seconds, 1), "peak_bytes": compiling.peak_bytes},
        "decode": [
            {"device": device, "context": c, "tok_s": round(bandwidth / (read + c * kv_token), 2)}
            for device, bandwidth in BANDWIDTHS.items()
            for c in contexts
        ],
        "prompt_steps": [{"context": c, "steps": -(-(c - prompt_length) // prompt_length)} for c in contexts],
    }


def estimate_export(config: ModelConfig, tokens: int) -> ExportEstimate:
    """Time and memory of calibrated quantization (descent), from its operations and this computer's speed.

    For T tokens, a linear (N, K) costs 2·T·N·K to compute what calibrates the next. An input of K columns costs T·K²
    for a second moment, the first group's two of them; a linear K³/3 for its factor, and N·K² each for GPTQ, for
    descent's start and for its scales and its codes in each sweep.

    Args:
        config: the geometry.
        tokens: of calibration, T.
    """
    operations = 0.0
    for number, group in enumerate(layer_linears(0)):
        shapes = [linear_shape(config, name) for name in group]
        columns = shapes[0][1]
        operations += (2.0 if number == 0 else 1.0) * tokens * columns**2
        operations += sum(2.0 * tokens * n * k + (2 + 2 * SWEEPS) * n * k**2 + k**3 / 3 for n, k in shapes)
    seconds = config.num_layers * operations / (_matmul_speed() * _EFFICIENCY)
    weights = sum(n * k for group in layer_linears(0) for n, k in (linear_shape(config, name) for name in group))
    widest = max(config.intermediate_size, config.query_size, config.hidden_size)
    # float32 values: the layer, and its codes in a byte; hidden states and the widest input; its second moment, that
    # damped, and the factor. benchmarks/layer_7b.py measures all but the embedding's codes.
    elements = 5 * weights // 4 + tokens * (config.hidden_size + widest) + 3 * widest**2
    return ExportEstimate(seconds, 4 * elements + config.vocab_size * config.hidden_size + _WORKING)


def _matmul_speed() -> float:
    """float32 operations a second of this computer's matrix product: the best of ten short ones."""
    a = np.random.default_rng(0).standard_normal((_PROBE, _PROBE), np.float32)
    best = np.inf
    for _ in range(10):
        started = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - started)
    return float(2 * _PROBE**3 / best)
