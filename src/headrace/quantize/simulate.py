"""Simulated: the eager decoder on the device's own grids, each kind of quantization switched on by itself.

    activations   every named result on its static uint16 grid
    cache         keys and values on the grid of the 8-bit KV cache
    weights       whatever `weights` gives: float, or dequantized codes

Says what a16 and KV8 cost each on their own, without a graph. Knows no text and no file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.encodings import ATTENTION_MASK, GATED_OUTLIERS, Encoding
from headrace.config import ModelConfig
from headrace.model.decoder import Residual, block, embed, head
from headrace.model.ops import Array, Eager
from headrace.quantize.outliers import SplitEager
from headrace.quantize.windows import causal_positions

__all__ = ["Simulated", "simulated_logits"]


class Simulated(SplitEager):
    """Eager whose named results are rounded to their encodings.

    Args:
        config: the geometry.
        weights: gives a weight by canonical name, float32.
        encodings: the grid of each named result, as `device_encodings` gives them.
        activations: round everything but keys and values.
        cache: round keys and values.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Callable[[str], Array],
        encodings: Mapping[str, Encoding],
        *,
        activations: bool = True,
        cache: bool = True,
    ) -> None:
        super().__init__(config, weights)
        self.encodings = encodings
        self.activations = activations
        self.cache = cache

    def tap(self, name: str, value: Array) -> Array:
        return self.encodings[name].simulate(value) if self.activations else value

    def to_cache(self, x: Array, name: str) -> Array:
        return self.encodings[name].simulate(x) if self.cache else x

    def masked(self, scores: Array, mask: Array, name: str) -> Array:
        """As `Ops.masked`, with the device's own mask, which is not as deep as the eager decoder's."""
        if not self.activations:
            return scores + mask
        deepest = np.float32(self.encodings[ATTENTION_MASK].low)
        return super().masked(scores, np.maximum(mask, deepest), name)

    def outliers(self, name: str, gated: Array) -> Sequence[int]:
        apart = self.encodings.get(f"{name}.{GATED_OUTLIERS}")
        return apart.channels if apart is not None and self.activations else ()


def simulated_logits(run: Eager, ids: NDArray[np.integer[Any]], rows: NDArray[np.int64], start: int = 0) -> Array:
    """Logits (len(rows), V) of the wanted tokens of one sequence of ids (S,), in one step from position `start`."""
    at = causal_positions(run.config, len(ids), start)
    stream: Residual[Array] = embed(run, cast(Array, ids[None]))
    for layer in range(run.config.num_layers):
        stream, _ = block(run, layer, stream, at, None)
    return cast(Array, head(run, stream, cast(Array, rows))[0])
