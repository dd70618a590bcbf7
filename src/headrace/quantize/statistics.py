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
        shift: float32 (K, K), the weighted mean of (x* − x) xᵀ, where x* is the input that the float model has at the
            same token; None when only x was followed.
    """

    moment: NDArray[np.float32]
    peak: NDArray[np.float32]
    tokens: int
    shift: NDArray[np.float32] | None = None

    @classmethod
    def of(
        cls,
        x: NDArray[np.float32],
        weights: NDArray[np.float32] | None = None,
        reference: NDArray[np.float32] | None = None,
    ) -> InputStatistics:
        """From all inputs at once.

        Args:
            x: (tokens, K).
            weights: (tokens,) how much each token's error counts, mean 1; equal when None.
            reference: the float model's inputs at the same tokens, (tokens, K).
        """
        moment = np.zeros((x.shape[1], x.shape[1]), np.float32)
        shift = None if reference is None else np.zeros_like(moment)
        for start in range(0, len(x), _TOKENS):
            at = slice(start, start + _TOKENS)
            root = np.float32(1) if weights is None else np.sqrt(weights[at])[:, None]
            some = x[at] * root
            moment += some.T @ some
            if shift is not None and reference is not None:
                shift += ((reference[at] - x[at]) * root).T @ some
        moment /= len(x)
        if shift is not None:
            shift /= len(x)
        return cls(moment, np.maximum(x.max(0), -x.min(0)), len(x), shift)

    def scaled(self, scale: NDArray[np.float32]) -> InputStatistics:
        """Of x / scale, for a scale (K,)."""
        both = np.outer(scale, scale)
        shift = None if self.shift is None else self.shift / both
        return InputStatistics(self.moment / both, self.peak / scale, self.tokens, shift)
