"""What calibration knows about the input of a linear. Knows no model and no method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.quantize.parallel import parallel_map

__all__ = ["InputStatistics"]

Array = NDArray[np.float32]

_STRIP = 1024  # rows of a moment that are computed at once, up to their diagonal


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of an input x (K,), over the calibration tokens.

    Attributes:
        moment: float32 (K, K), the weighted mean of x xᵀ: half the Hessian of a linear's squared output error.
        peak: float32 (K,), the largest |x| of each channel.
        tokens: how many inputs were seen.
        shift: float32 (K, K), the weighted mean of (x* − x) xᵀ, where x* is the input that the float model has at the
            same token; None when the float model was not computed.
    """

    moment: Array
    peak: Array
    tokens: int
    shift: Array | None = None

    @classmethod
    def of(
        cls,
        x: Array | Sequence[Array],
        weights: Array | None = None,
        reference: Array | Sequence[Array] | None = None,
    ) -> InputStatistics:
        """From all inputs, in one piece or several.

        Args:
            x: (tokens, K), or pieces of it.
            weights: (tokens,) how much each token's error counts, mean 1; equal when None.
            reference: the float model's inputs at the same tokens, in the same pieces.
        """
        pieces = [x] if isinstance(x, np.ndarray) else x
        exact = [reference] if isinstance(reference, np.ndarray) else reference
        columns, tokens = pieces[0].shape[1], sum(map(len, pieces))
        moment = np.zeros((columns, columns), np.float32)
        shift = None if exact is None else np.zeros_like(moment)
        peak = np.zeros(columns, np.float32)
        # The longest strip first, so that cores finish at about the same time.
        strips = [slice(start, min(start + _STRIP, columns)) for start in range(0, columns, _STRIP)][::-1]
        begin = 0
        for number, piece in enumerate(pieces):
            end = begin + len(piece)
            root = np.float32(1) if weights is None else np.sqrt(weights[begin:end])[:, None]
            weighted = piece * root

            def add_moment(at: slice, weighted: Array = weighted) -> None:
                mine = weighted[:, at]
                moment[at, at] += mine.T @ mine  # NumPy computes half of a product with its own transpose
                moment[at, : at.start] += mine.T @ weighted[:, : at.start]

            parallel_map(add_moment, strips)
            if shift is not None and exact is not None:
                moved = (exact[number] - piece) * root

                def add_shift(at: slice, weighted: Array = weighted, moved: Array = moved) -> None:
                    shift[at] += moved[:, at].T @ weighted

                parallel_map(add_shift, strips)
            np.maximum(peak, np.maximum(piece.max(0), -piece.min(0)), out=peak)
            begin = end
        moment /= tokens
        for at in strips:
            moment[: at.start, at] = moment[at, : at.start].T
        if shift is not None:
            shift /= tokens
        return cls(moment, peak, tokens, shift)

    def scaled(self, scale: Array) -> InputStatistics:
        """Of x / scale, for a scale (K,)."""
        both = np.outer(scale, scale)
        shift = None if self.shift is None else self.shift / both
        return InputStatistics(self.moment / both, self.peak / scale, self.tokens, shift)
