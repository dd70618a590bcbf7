"""What calibration knows about the input of a linear. Knows no model and no method."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["InputStatistics"]

_TOKENS = 4096  # counted at once: a weighted copy of all inputs would not fit in memory


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of an input x (K,), over the calibration tokens.

    Attributes:
        moment: float32 (K, K), the weighted mean of x xᵀ: half the Hessian of a linear's squared output error.
        peak: float32 (K,), the largest |x| of each channel.
        tokens: how many inputs were seen.
    """

    moment: NDArray[np.float32]
    peak: NDArray[np.float32]
    tokens: int

    @classmethod
    def of(cls, x: NDArray[np.float32], weights: NDArray[np.float32] | None = None) -> InputStatistics:
        """From all inputs at once.

        Args:
            x: (tokens, K).
            weights: (tokens,) how much each token's error counts, mean 1; equal when None.
        """
        moment = np.zeros((x.shape[1], x.shape[1]), np.float32)
        for start in range(0, len(x), _TOKENS):
            some = x[start : start + _TOKENS]
            if weights is not None:
                some = some * np.sqrt(weights[start : start + _TOKENS])[:, None]
            moment += some.T @ some
        moment /= len(x)
        return cls(moment, np.maximum(x.max(0), -x.min(0)), len(x))

    def scaled(self, scale: NDArray[np.float32]) -> InputStatistics:
        """Of x / scale, for a scale (K,)."""
        return InputStatistics(self.moment / np.outer(scale, scale), self.peak / scale, self.tokens)
