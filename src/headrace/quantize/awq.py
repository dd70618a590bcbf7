"""AWQ: strong channels are scaled up before rounding and down again in the operation before, exactly in float.

    W·x = (W·s)·(x/s), and x/s costs nothing at run time: 1/s moves into a norm's gain or the rows of v_proj or up_proj

Source: Lin et al. 2023 (AWQ): s = (size of the channel)^α, the α of least output error. The error is measured here
with the whole second moment, not with sampled outputs. This file does not know which operation comes before.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, dequantize, quantize_nearest
from headrace.quantize.gptq import rounding_loss
from headrace.quantize.statistics import InputStatistics

__all__ = ["find_scale"]

Array = NDArray[np.float32]

_POWERS = np.linspace(0, 1, 9)
_SPREAD = 1e4  # a channel that is always 0 is scaled like one this many times weaker than the mean


def find_scale(
    weights: Sequence[Array], grids: Sequence[Grid], statistics: InputStatistics, heads: tuple[int, int] | None = None
) -> Array:
    """The scale s (K,) > 0 of least error when W·s is rounded to nearest, for all weights (N, K) of one input.

    Args:
        weights: the linears that share the input.
        grids: the grid of each.
        statistics: of the input.
        heads: (query heads that share a KV head, D) when the operation before gives values per KV head: their
            channels share s. (1, K) for a linear without heads.

    Scales are powers of two: they move through float16 scales unrounded, and an export that is resumed computes what
    the interrupted one did, to the last bit.
    """
    size = np.sqrt(np.diagonal(statistics.moment)).astype(np.float64)
    size = np.maximum(size, max(float(size.mean()), 1e-12) / _SPREAD)
    if heads is not None:
        copies, width = heads
        grouped = size.reshape(-1, copies, width)
        size = np.broadcast_to(grouped.mean(1, keepdims=True), grouped.shape).reshape(-1)
    best, least = np.ones(len(size), np.float32), np.inf
    for power in _POWERS:
        scale = size**power
        scale /= np.sqrt(scale.max() * scale.min())
        scale = np.exp2(np.rint(np.log2(scale))).astype(np.float32)
        loss = 0.0
        for weight, grid in zip(weights, grids, strict=True):
            rounded = dequantize(quantize_nearest(weight * scale, grid)) / scale
            loss += rounding_loss(weight, rounded, statistics.moment)
        if loss < least:
            best, least = scale, loss
    return best
