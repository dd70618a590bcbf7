"""The eager decoder over a whole sequence: the numbers every other backend is compared with.

Streams layer by layer, so that one layer of weights is in memory at a time. Knows nothing about checkpoints, parts or
quantization; a caller that simulates these passes its own `Eager`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from headrace.config import ModelConfig
from headrace.model.decoder import block, embed, head
from headrace.model.ops import Array, Eager, Positions
from headrace.model.rope import rope_tables

__all__ = ["BLOCKED", "causal_mask", "eager_logits"]

BLOCKED = np.float32(-1e9)  # added to a score: its weight is exactly 0 in float32


def eager_logits(
    config: ModelConfig,
    weights: Callable[[str], Array],
    ids: NDArray[np.integer],
    chunk: int | None = None,
    ops: Eager | None = None,
) -> Array:
    """Logits (B, S, V), float32, of token ids (B, S).

    Args:
        config: the geometry.
        weights: gives a weight by canonical name, float32; asked once for each, in the order of use, and kept while
            its layer is computed.
        ids: the tokens, from position 0.
        chunk: tokens a step; each step sees the keys and values of those before it. None: one step.
        ops: another interpretation (taps, simulated quantization). It brings its own weights: `weights` is not used.
    """
    kept: dict[str, Array] = {}

    def once(name: str) -> Array:
        if name not in kept:
            kept[name] = weights(name)
        return kept[name]

    run = Eager(config, once) if ops is None else ops
    length = ids.shape[1]
    step = length if chunk is None else chunk
    spans = [(start, min(start + step, length)) for start in range(0, length, step)]
    cos, sin = rope_tables(config, length)
    at = [Positions(cos[None, None, a:b], sin[None, None, a:b], causal_mask(a, b)) for a, b in spans]
    streams = [embed(run, ids[:, a:b]) for a, b in spans]
    kept.clear()
    for layer in range(config.num_layers):
        past: tuple[Array, Array] | None = None
        for i, place in enumerate(at):
            streams[i], (keys, values) = block(run, layer, streams[i], place, past)
            past = (keys, values) if past is None else (
                np.concatenate([past[0], keys], 3), np.concatenate([past[1], values], 2)
            )  # fmt: skip
        kept.clear()
    return np.concatenate([head(run, stream) for stream in streams], axis=1)


def causal_mask(start: int, stop: int) -> Array:
    """What is added to the scores of tokens start … stop−1 over all tokens 0 … stop−1: (1, 1, S, C)."""
    later = np.arange(stop)[None, :] > np.arange(start, stop)[:, None]
    return np.where(later, BLOCKED, np.float32(0))[None, None]
