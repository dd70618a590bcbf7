"""What calibration knows about the input of a group of linears. Knows no model and no method."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["InputStatistics"]


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of an input x (K,), over the calibration tokens.

    Attributes:
        moment: float32 (K, K), the mean of x xᵀ: half the Hessian of a linear's squared output error.
        peak: float32 (K,), the largest |x| of each channel.
        tokens: how many inputs were seen.
        shift: float32 (K, K), the mean of (x* − x) xᵀ, where x* is the input that the float model has at the same
            token and x the one that the model quantized so far has; None when only x was followed.
    """

    moment: NDArray[np.float32]
    peak: NDArray[np.float32]
    tokens: int
    shift: NDArray[np.float32] | None = None

    @classmethod
    def of(
        cls,
        x: NDArray[np.float32],
        reference: NDArray[np.float32] | None = None,
        weights: NDArray[np.float32] | None = None,
    ) -> InputStatistics:
        """From all inputs at once.

        Args:
            x: (tokens, K).
            reference: the float model's inputs at the same tokens, (tokens, K).
            weights: (tokens,) how much each token's error counts, mean 1; equal when None.
        """
        tokens = x.shape[0]
        if weights is None:
            moment = x.T @ x
        else:
            scaled = x * np.sqrt(weights)[:, None]
            moment = scaled.T @ scaled
        shift = None if reference is None else _shift(x, reference, weights)
        moment /= tokens
        peak = np.maximum(x.max(0), -x.min(0))
        return cls(moment, peak, tokens, shift)

    def scaled(self, scale: NDArray[np.float32]) -> InputStatistics:
        """Of x / scale, for a scale (K,)."""
        shift = None if self.shift is None else self.shift / np.outer(scale, scale)
        return InputStatistics(self.moment / np.outer(scale, scale), self.peak / scale, self.tokens, shift)


def _shift(
    x: NDArray[np.float32], reference: NDArray[np.float32], weights: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    difference = reference - x
    if weights is not None:
        difference *= weights[:, None]
    return np.asarray(difference.T @ x / np.float32(len(x)), np.float32)
