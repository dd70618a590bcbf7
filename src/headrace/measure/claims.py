"""What a published model card claims, held against a model's geometry and plan.

Reads the bullet list and the table that on-device model cards share ("Num of key-value heads: 8", "Token generator
input (part1): 128 tokens", "0.208 - 6.658"). Knows no bundle.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from headrace.config import ModelConfig
from headrace.model.weights import weight_table
from headrace.plan import GraphStyle, Part, ports

__all__ = ["claim_problems"]

_SCALES = {"K": 1e3, "M": 1e6, "B": 1e9}


def claim_problems(
    text: str, config: ModelConfig, parts: Sequence[Part], prompt_length: int, context: int
) -> list[str]:
    """Claims that cannot be true of this model: a line for each, or one where there is no claim to check.

    Args:
        text: the card.
        config: the geometry that the checkpoint states.
        parts: the plan.
        prompt_length: tokens of a prompt step.
        context: the longest context.
    """
    first = r"input \(part ?1\):\s*(\d+) token"
    counted = (
        ("key-value heads", r"key-value heads:\s*(\d+)", config.num_kv_heads),
        ("layers", r"(\d+) layers,", config.num_layers),
        ("the hidden size", r"hidden(?: size)?:? (\d+)", config.hidden_size),
        ("the context", r"context length:\s*(?:\d+, )*(\d+)", context),
        ("parts", r"split into (\d+) parts", len(parts)),
        ("a prompt step", r"sequence length for prompt processor:\s*(\d+)", prompt_length),
        (
            "tokens into the prompt processor's first part",
            f"prompt processor {first}",
            _ids(config, parts, prompt_length, context),
        ),
        ("tokens into the token generator's first part", f"token generator {first}", _ids(config, parts, 1, context)),
    )
    claims = [
        (what, int(found), expected)
        for what, pattern, expected in counted
        for found in re.findall(pattern, text, re.IGNORECASE)
    ]
    if not claims and "number of parameters:" not in text.lower():
        return ["nothing of the model is stated; expected a card with its layers, heads, parts or parameters"]
    problems = [
        f"{what}: the card says {found}; the model has {expected}"
        for what, found, expected in claims
        if found != expected
    ]
    return problems + _parameters(text, config) + _times(text, prompt_length, context)


def _ids(config: ModelConfig, parts: Sequence[Part], length: int, context: int) -> int:
    inputs, _ = ports(config, parts[0], GraphStyle.DEVICE, length=length, context=context)
    return int(inputs[0].shape[1])


def _parameters(text: str, config: ModelConfig) -> list[str]:
    count = sum(w.size for name, w in weight_table(config).items() if w.stored_as == name)
    problems = []
    for number, unit in re.findall(r"number of parameters:\s*([\d.]+)\s*([KMB])", text, re.IGNORECASE):
        digits = len(number.partition(".")[2])
        if abs(float(number) * _SCALES[unit.upper()] - count) > 0.5000001 * 10**-digits * _SCALES[unit.upper()]:
            problems.append(f"parameters: the card says {number}{unit}; the model has {count:,}")
    for exact in re.findall(r"number of parameters:[^\n(]*\(([\d,]+)\)", text, re.IGNORECASE):
        if int(exact.replace(",", "")) != count:
            problems.append(f"parameters: the card says {exact}; the model has {count:,}")
    return problems


def _times(text: str, prompt_length: int, context: int) -> list[str]:
    """A range of times to the first token that one step multiplied gives was not measured."""
    problems = []
    for low, high in re.findall(r"(?<![\d.~])(\d+\.\d+)\s*[-–]\s*(\d+\.\d+)\s*(?:\(|\||\n|$)", text):
        steps = context // prompt_length
        # Both are rounded: half a unit of the last digit each.
        room = 0.5 * 10.0 ** -len(high.partition(".")[2]) + steps * 0.5 * 10.0 ** -len(low.partition(".")[2])
        if steps > 1 and abs(float(low) * steps - float(high)) <= room:
            problems.append(
                f"time to first token: {high} s is {steps} × {low} s: one step multiplied, not measured; and a prompt "
                f"of {context} tokens leaves no room for an answer"
            )
    return problems
