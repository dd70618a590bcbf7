"""What a model needs when it runs, from geometry and recipe: bytes a part, cache a context, what phones will do with it
(roofline.py) and whether it fits one (fit.py). Measures nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headrace.bundle.recipe import Recipe
from headrace.bundle.weights import layouts
from headrace.config import ModelConfig
from headrace.forecast.fit import PHONE_MEMORY, memory_fit, part_fit
from headrace.forecast.roofline import Workload, calibration, chips, estimate_decode, estimate_step, published
from headrace.model.weights import EMBEDDING, HEAD, quantized_weights, weight_table
from headrace.plan import Part, plan_parts
from headrace.quantize.budget import average_bits

__all__ = ["plan_model"]


def plan_model(
    config: ModelConfig,
    recipe: Recipe,
    parts: Sequence[Part],
    contexts: Sequence[int],
    prompt_length: int = 128,
    phone_memory: int = PHONE_MEMORY,
) -> dict[str, Any]:
    """What a bundle of this geometry and recipe takes, on disk and when it runs.

    Args:
        config: the geometry of what is quantized.
        recipe: grids and cache.
        parts: the plan.
        contexts: context lengths.
        prompt_length: tokens of a prompt step.
        phone_memory: of the phone it is for, bytes.

    Returns:
        parts [{name, layers, weight_bytes}] and weight_bytes, of the bundle; contexts [{context, kv_bytes, run_bytes}];
        phones [{device, context, tok_s, step_seconds, steps, ttft_seconds}], of which tok_s, step_seconds (of one
        prompt step) and ttft_seconds (of `steps` of them, the longest prompt) are {estimated, low, high} or None where
        nothing published says it; calibration: how far such estimates were off; least_published_bytes: of the smallest
        model among its rows; fits [{what, needed, limit, ok, change}]. On a phone weights of 5 and 6 bits have 8.

    Raises:
        RecipeError: a rule does not fit.
    """
    table = quantized_weights(config)
    rules = recipe.resolve(table)
    grids = {name: rule.grid for name, rule in rules.items()}
    on_phone = {name: grid.on_device for name, grid in grids.items()}

    def part_sizes(count: int) -> list[int]:
        return [layout.nbytes for layout in layouts(config, plan_parts(config, count), on_phone)]

    sizes = [layout.nbytes for layout in layouts(config, parts, grids)]
    kv_width = 1 if recipe.kv == "int8" else 4
    kv_token = 2 * config.num_layers * config.kv_size * kv_width
    # A token reads every linear and the head; of the embedding only a row.
    head = weight_table(config)[HEAD].stored_as
    read = sum(on_phone[n].nbytes(*weight.matrix) for n, weight in table.items() if n == head or n != EMBEDDING)
    return {
        "parts": [
            {"name": part.name, "layers": len(part.layers), "weight_bytes": size} for part, size in zip(parts, sizes)
        ],
        "weight_bytes": sum(sizes),
        "contexts": [
            {"context": c, "kv_bytes": c * kv_token, "run_bytes": sum(sizes) + c * kv_token} for c in contexts
        ],
        "phones": [
            _phone(device, config, c, read, c * kv_token, prompt_length) for device in chips() for c in contexts
        ],
        "calibration": calibration(),
        "least_published_bytes": int(min(row.workload.weight_bytes for row in published())),
        "fits": [
            part_fit(part_sizes, len(parts), config.num_layers + 1).to_dict(),
            memory_fit(
                sum(part_sizes(len(parts))), kv_token, contexts, recipe.kv, average_bits(config, rules), phone_memory
            ).to_dict(),
        ],
    }


def _phone(device: str, config: ModelConfig, context: int, read: int, cache: int, prompt_length: int) -> dict[str, Any]:
    """What a device will do with a context: an estimate, with its range."""
    plain = Workload.of(
        layers=config.num_layers,
        hidden=config.hidden_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        feed_forward=config.intermediate_size,
        vocabulary=config.vocab_size,
        context=context,
        step=prompt_length,
    )
    work = Workload(read, cache, plain.step_operations)
    step = estimate_step(device, work)
    # The longest prompt: its last step must end before the context does.
    steps = max(1, -(-(context - prompt_length) // prompt_length))
    return {
        "device": device,
        "context": context,
        "tok_s": estimate_decode(device, work).to_dict(),
        "step_seconds": None if step is None else step.to_dict(),
        "steps": steps,
        "ttft_seconds": None if step is None else step.times(steps).to_dict(),
    }
