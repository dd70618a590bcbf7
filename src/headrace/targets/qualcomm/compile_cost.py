"""What the HTP compiler will need for a model: time and memory, before it is started.

Fitted to what was measured (docs/snapdragon.md, "What it costs"), within about a quarter; another computer's core is as
much faster or slower as it is. Knows geometry only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.config import ModelConfig
from headrace.model.weights import linears
from headrace.plan import Part

__all__ = ["CompileEstimate", "estimate_compile"]

# Of a context with a prompt step and a token step. Seconds: a layer's nodes, and each weight.
_LAYER_SECONDS = 1.0
_WEIGHT_SECONDS = 0.12e-6
# Bytes at the peak: the compiler itself, each weight of a table, each of a linear, and of a linear again a context.
_COMPILER_BYTES = 0.3e9
_TABLE_BYTES = 8.5
_LINEAR_BYTES = 2.0
_CONTEXT_BYTES = 3.3


@dataclass(frozen=True)
class CompileEstimate:
    """All parts, one after the other: seconds, and the largest part's peak memory in bytes."""

    seconds: float
    peak_bytes: int


def estimate_compile(config: ModelConfig, parts: Sequence[Part], contexts: int) -> CompileEstimate:
    """What compiling a prompt step and a token step over so many contexts takes.

    Args:
        config: the geometry.
        parts: the plan.
        contexts: how many context lengths.
    """
    layer = sum(linear.size for linear in linears(config, 0).values())
    table = config.vocab_size * config.hidden_size
    seconds = peak = 0.0
    for part in parts:
        tables = table * (part.embeds + part.heads)
        weights = layer * len(part.layers)
        seconds += contexts * (_LAYER_SECONDS * len(part.layers) + _WEIGHT_SECONDS * (tables + weights))
        peak = max(peak, _TABLE_BYTES * tables + (_LINEAR_BYTES + _CONTEXT_BYTES * contexts) * weights)
    return CompileEstimate(seconds, int(_COMPILER_BYTES + peak))
