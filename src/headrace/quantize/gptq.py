"""GPTQ: columns are rounded one after the other, and each column's error is made up for by those still to come.

Source: Frantar et al. 2022 (GPTQ), with columns in the order of falling activation energy ("act-order") and the
scales of all blocks fixed beforehand ("static groups"), so that a block stays contiguous on disk.
This file does not know where the second moments come from.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.quantize.grid import Grid, QuantizedTensor, dequantize, fit_scales
from headrace.quantize.statistics import InputStatistics

__all__ = ["damped", "factorize", "inverse_factor", "quantize", "rounding_loss", "solve", "solve_codes"]

Array = NDArray[np.float32]

DAMPING = 0.1  # of the typical energy of a channel
_POWERS = (0.5, 1.0)
_TRIED = 48  # rows
_LAZY = 96  # columns whose error reaches the later ones in one product
_TRIANGLE = 64  # below this a triangle is inverted directly


def quantize(weight: Array, statistics: InputStatistics, grid: Grid) -> QuantizedTensor:
    """A weight (N, K) to codes that keep weight·x, for the inputs of `statistics`, as well as rounding in turn can."""
    return solve(weight, damped(statistics.moment), grid)


def solve(weight: Array, moment: Array, grid: Grid) -> QuantizedTensor:
    """Scales by the clip search, then the codes for them.

    The search counts a column's error by a power of its energy. By the energy itself a few strong channels decide
    the clip of all the others, whose error GPTQ could have made up for: the root is better for most weights, the
    energy for those whose input has huge channels. A few rows are tried with each.
    """
    energy = np.diagonal(moment)
    powers = _POWERS if grid.bits == 4 else _POWERS[:1]  # int8 clips nothing
    factor = factorize(moment)
    few = weight[np.linspace(0, len(weight) - 1, min(_TRIED, len(weight))).round().astype(np.intp)]

    def loss(power: float) -> float:
        scales = fit_scales(few, grid, energy**power)
        tried = QuantizedTensor(solve_codes(few, factor, scales, grid), scales, grid)
        return rounding_loss(few, dequantize(tried), moment)

    best = min(powers, key=loss) if len(powers) > 1 else powers[0]
    scales = fit_scales(weight, grid, energy**best)
    return QuantizedTensor(solve_codes(weight, factor, scales, grid), scales, grid)


def damped(moment: Array, damping: float = DAMPING) -> Array:
    """moment + damping · (mean root of the diagonal)² · I, so that its inverse exists and generalises.

    The root keeps a few huge channels (SmolLM2's first token) from deciding how much all others are damped.
    """
    out = moment.copy()
    diagonal = np.einsum("ii->i", out)
    typical = float(np.sqrt(diagonal).mean()) ** 2
    diagonal += np.float32(damping * typical if typical > 0 else 1.0)
    return out


def inverse_factor(moment: Array) -> Array:
    """The upper U with moment⁻¹ = Uᵀ U, float32 (K, K), from one Cholesky factor and one triangular inverse.

    With J the reversal of order and J·moment·J = L Lᵀ, U = J L⁻¹ J.
    """
    lower = np.linalg.cholesky(moment[::-1, ::-1].astype(np.float64))
    _invert_lower(lower)
    return np.ascontiguousarray(lower[::-1, ::-1].astype(np.float32))


def factorize(moment: Array) -> tuple[NDArray[np.intp], Array]:
    """The order of falling energy, and the factor U of the moment in that order (see `inverse_factor`)."""
    order = np.argsort(-np.diagonal(moment), kind="stable")
    return order, inverse_factor(moment[np.ix_(order, order)])


def solve_codes(
    weight: Array,
    factors: tuple[NDArray[np.intp], Array],
    scales: NDArray[np.float16],
    grid: Grid,
    lazy: int = _LAZY,
) -> NDArray[np.int8]:
    """The codes (N, K) that GPTQ finds for given scales.

    Args:
        weight: (N, K).
        factors: of the second moment, from `factorize`.
        scales: (N, blocks), as stored.
        grid: bits and block.
        lazy: columns handled before later ones are told; changes the speed, not the result.
    """
    rows, columns = weight.shape
    order, factor = factors
    block = columns // scales.shape[1]
    steps = np.ascontiguousarray(scales.astype(np.float32).T)  # (blocks, N)
    rest = np.ascontiguousarray(weight.T[order])  # (K, N): a column of the weight is contiguous
    codes = np.empty((columns, rows), np.int8)
    bottom, top = np.float32(grid.bottom), np.float32(grid.top)
    for start in range(0, columns, lazy):
        stop = min(start + lazy, columns)
        errors = np.empty((stop - start, rows), np.float32)
        for i in range(start, stop):
            step = steps[order[i] // block]
            code = rest[i] / step
            np.rint(code, out=code)
            np.minimum(code, top, out=code)
            np.maximum(code, bottom, out=code)
            codes[order[i]] = code
            code *= step
            error = errors[i - start]
            np.subtract(rest[i], code, out=error)
            error /= factor[i, i]
            rest[i + 1 : stop] -= factor[i, i + 1 : stop, None] * error
        rest[stop:] -= factor[start:stop, stop:].T @ errors
    return np.ascontiguousarray(codes.T)


def rounding_loss(weight: Array, rounded: Array, moment: Array) -> float:
    """Mean squared output error: trace(E·moment·Eᵀ) with E = weight − rounded."""
    error = weight - rounded
    return float(np.einsum("nk,nk->", error @ moment, error, dtype=np.float64))


def _invert_lower(lower: NDArray[np.float64]) -> None:
    """Invert a lower triangle in place: [A 0; B C]⁻¹ = [A⁻¹ 0; −C⁻¹ B A⁻¹, C⁻¹]."""
    size = lower.shape[0]
    if size <= _TRIANGLE:
        lower[:] = np.tril(np.linalg.inv(lower))
        return
    half = size // 2
    _invert_lower(lower[:half, :half])
    _invert_lower(lower[half:, half:])
    lower[half:, :half] = -(lower[half:, half:] @ lower[half:, :half] @ lower[:half, :half])
