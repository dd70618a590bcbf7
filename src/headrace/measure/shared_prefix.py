"""The float reference over many prompts that begin alike: what comes next after each, the beginning computed once.

Walks the decoder a layer at a time, so that one layer of weights is in memory. Knows no bundle and no question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from headrace.config import ModelConfig
from headrace.model.decoder import Residual, block, embed, head
from headrace.model.ops import Array, Eager, Positions
from headrace.model.reference import causal_mask
from headrace.model.rope import rope_tables
from headrace.model.weights import EMBEDDING, FINAL_NORM, HEAD, layer_weights
from headrace.progress import Progress, silent

__all__ = ["next_logits"]


def next_logits(
    config: ModelConfig,
    weights: Callable[[str], Array],
    prompts: Sequence[Sequence[int]],
    progress: Progress = silent,
) -> Iterator[Array]:
    """The logits after each prompt, float32 (V,), in order.

    Args:
        config: the geometry.
        weights: gives a weight by canonical name, float32; asked once for each.
        prompts: token ids, one or more of each.
        progress: told how many layers are done.
    """
    # What the first and the last prompt in sorted order share, all share. At least one token is left of each prompt,
    # since its logits are wanted.
    ordered = sorted(map(tuple, prompts))
    first, last = ordered[0], ordered[-1]
    same = next((n for n, (a, b) in enumerate(zip(first, last)) if a != b), len(first))
    shared = min(same, min(map(len, prompts)) - 1)
    cos, sin = rope_tables(config, max(map(len, prompts)))
    spans = [list(prompts[0][:shared]), *(list(p[shared:]) for p in prompts)] if shared else [list(p) for p in prompts]
    starts = [0, *[shared] * len(prompts)] if shared else [0] * len(prompts)
    at = [
        Positions(cos[None, None, a : a + len(s)], sin[None, None, a : a + len(s)], causal_mask(a, a + len(s)))
        for a, s in zip(starts, spans)
    ]
    ops = Eager(config, {EMBEDDING: weights(EMBEDDING)}.__getitem__)
    streams: list[Residual[Array]] = [embed(ops, np.array([span])) for span in spans]
    for layer in range(config.num_layers):
        progress("reference", layer, config.num_layers)
        ops = Eager(config, {name: weights(name) for name in layer_weights(config, layer)}.__getitem__)
        past = None
        for i, (stream, place) in enumerate(zip(streams, at)):
            out, made = block(ops, layer, stream, place, past)
            streams[i] = Residual(out.settle(ops))
            if shared and i == 0:
                past = made
    progress("reference", config.num_layers, config.num_layers)
    final = Eager(config, {FINAL_NORM: weights(FINAL_NORM), HEAD: weights(HEAD)}.__getitem__)
    for stream in streams[1 if shared else 0 :]:
        yield head(final, Residual(stream.x[:, -1:]))[0, 0]
