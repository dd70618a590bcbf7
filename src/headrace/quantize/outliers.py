"""Outlier channels of the gated product: one or two of thousands that are hundreds of times larger than all others.

On a fixed 16-bit grid they alone decide the step, and the other channels round to nothing (SmolLM2: KL 0.0010 in two
layers). So a device computes them apart, on a grid of their own, and adds the linear's output for them:

    gated ─┬─ all channels, fine grid ───► down_proj, outlier columns 0 ─┬─► + ─► update
           └─ outliers, their own grid ──► down_proj, outlier columns ───┘

Source: Dettmers et al. 2022 (LLM.int8()), for static grids. Knows no encoding and no graph.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.encodings import GATED_OUTLIERS
from headrace.config import ModelConfig
from headrace.model.ops import Array, Eager, mlp_name

__all__ = ["SplitEager", "find_outliers"]

MOST = 4  # channels that are computed apart
RATIO = 4.0  # times the largest peak that stays


def find_outliers(peaks: NDArray[np.floating]) -> tuple[int, ...]:
    """The channels to compute apart, rising: of the strongest `MOST`, those `RATIO` times the next one's peak.

    Never one alone: on a product of one column the HTP compiler takes all memory and does not return.

    Args:
        peaks: the largest magnitude of each channel, (I,).
    """
    order = np.argsort(-peaks, kind="stable")
    if len(order) <= MOST:
        return ()
    found = [int(c) for c in order[:MOST] if peaks[c] > RATIO * peaks[order[MOST]]]
    if len(found) == 1:
        found.append(int(order[1]))
    return tuple(sorted(found))


class SplitEager(Eager):
    """Eager whose gated product is split as a device splits it."""

    def __init__(self, config: ModelConfig, weights: Callable[[str], Array]) -> None:
        super().__init__(config, weights)
        self._apart: tuple[list[int], Array] | None = None  # until the linear that follows uses them

    @abstractmethod
    def outliers(self, name: str, gated: Array) -> Sequence[int]:
        """The outlier channels of the gated product (…, I) of the feed-forward `name`; none leaves it whole."""

    def gated(self, gate: Array, up: Array, layer: int) -> Array:
        name = mlp_name(layer)
        gated = self.silu(gate, f"{name}.silu") * up
        channels = list(self.outliers(name, gated))
        if channels:
            self._apart = channels, self.tap(f"{name}.{GATED_OUTLIERS}", gated[..., channels])
            gated[..., channels] = 0
        return self.tap(f"{name}.gated", gated)

    def product(self, x: Array, weight: str, name: str) -> Array:
        if self._apart is None:
            return super().product(x, weight, name)
        channels, few = self._apart
        self._apart = None
        table = self.weights(weight)
        inliers = self.tap(f"{name}.inliers", self.times(x, table))
        return self.tap(name, inliers + self.tap(f"{name}.outliers", self.times(few, table[:, channels])))
