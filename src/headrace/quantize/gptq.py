"""GPTQ: columns are rounded one after the other, and each column's error is made up for by those still to come.

Source: Frantar et al. 2022 (GPTQ), with columns in the order of falling activation energy ("act-order") and the
scales of all blocks fixed beforehand ("static groups"), so that a block stays contiguous on disk. The error of a column
is not pushed into the later ones: these gather it when their turn comes. With moment = U·D·Uᵀ, U upper with ones on its
diagonal, the loss of errors e (one row of them) is Σ d_k (e_k + Σ_{j<k} e_j U_jk)², so column k is rounded from
w_k + Σ_{j<k} e_j U_jk, which is what GPTQ does (Chee et al. 2023, QuIP, theorem 6) without inverting anything.
This file does not know where the second moments come from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, QuantizedTensor, dequantize, fit_scales
from headrace.quantize.parallel import spread
from headrace.quantize.statistics import InputStatistics

__all__ = [
    "damped",
    "divide",
    "factorize",
    "quantize",
    "rounding_loss",
    "solve",
    "solve_codes",
    "strips",
    "upper_factor",
]

Array = NDArray[np.float32]

DAMPING = 0.1  # of the typical energy of a channel
_POWERS = (0.5, 1.0)
_TRIED = 48  # rows
_LAZY = 128  # columns that hear of the error of all earlier ones in one product
_NEAR = 16  # of these, columns that hear of it one after the other
_PANEL = 256  # columns of a factor that are computed at once
_STRIP = 2048  # rows solved at once: bounds the temporary memory, and cores share strips


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

    def strip(rows: slice) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
        scales = fit_scales(weight[rows], grid, energy**best)
        return solve_codes(weight[rows], factor, scales, grid), scales

    codes, scales = zip(*spread(strip, strips(len(weight))), strict=True)
    return QuantizedTensor(np.concatenate(codes), np.concatenate(scales), grid)


def damped(moment: Array, damping: float = DAMPING) -> Array:
    """moment + damping · (mean root of the diagonal)² · I, so that its inverse exists and generalises.

    The root keeps a few huge channels (SmolLM2's first token) from deciding how much all others are damped.
    """
    out = moment.copy()
    diagonal = np.einsum("ii->i", out)
    typical = float(np.sqrt(diagonal).mean()) ** 2
    diagonal += np.float32(damping * typical if typical > 0 else 1.0)
    return out


def upper_factor(moment: Array) -> Array:
    """The upper R, its diagonal positive, with moment = R Rᵀ, float32 (K, K).

    From the last panel of columns to the first, each from those right of it. Only where float32 fails is it float64.
    """
    try:
        return _factor_in_place(moment.copy())
    except np.linalg.LinAlgError:
        return _factor_in_place(moment.astype(np.float64)).astype(np.float32)


def factorize(moment: Array) -> tuple[NDArray[np.intp], Array]:
    """The order of falling energy, and the factor U of the moment in that order, with ones on its diagonal."""
    order = np.argsort(-np.diagonal(moment), kind="stable")
    factor = upper_factor(moment[np.ix_(order, order)])
    factor /= np.diagonal(factor).copy()
    return order, factor


def divide(values: Array, factor: Array) -> Array:
    """values · (R Rᵀ)⁻¹ for a factor R (K, K) of `upper_factor`, (N, K), a panel of columns at a time."""
    out = values.copy()
    columns = len(factor)
    panels = [slice(start, min(start + _PANEL, columns)) for start in range(0, columns, _PANEL)]
    inverses = [np.linalg.inv(factor[at, at].astype(np.float64)).astype(np.float32) for at in panels]
    for at, inverse in zip(panels[::-1], inverses[::-1], strict=True):  # by Rᵀ: the last column first
        out[:, at] = (out[:, at] - out[:, at.stop :] @ factor[at, at.stop :].T) @ inverse.T
    for at, inverse in zip(panels, inverses, strict=True):  # by R
        out[:, at] = (out[:, at] - out[:, : at.start] @ factor[: at.start, at]) @ inverse
    return out


def strips(rows: int) -> list[slice]:
    """Rows that are solved together: an even number of equal strips, so that two cores end at the same time."""
    count = 1 if rows <= _STRIP else 2 * -(-rows // (2 * _STRIP))
    size = max(1, -(-rows // count))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


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
        lazy: columns that hear of all earlier errors in one product; changes the speed, not the result.
    """
    rows, columns = weight.shape
    order, factor = factors
    block = columns // scales.shape[1]
    steps = np.ascontiguousarray(scales.astype(np.float32).T)  # (blocks, N)
    codes = np.empty((columns, rows), np.int8)
    errors = np.empty((columns, rows), np.float32)  # weight − rounded, in order
    code = np.empty(rows, np.float32)
    bottom, top = np.float32(grid.bottom), np.float32(grid.top)
    for start in range(0, columns, lazy):
        stop = min(start + lazy, columns)
        exact = np.ascontiguousarray(weight[:, order[start:stop]].T)  # a column of the weight is contiguous
        wanted = exact + factor[:start, start:stop].T @ errors[:start]
        for first in range(start, stop, _NEAR):
            last = min(first + _NEAR, stop)
            wanted[first - start : last - start] += factor[start:first, first:last].T @ errors[start:first]
            for i in range(first, last):
                goal, step = wanted[i - start], steps[order[i] // block]
                goal += factor[first:i, i] @ errors[first:i]
                np.divide(goal, step, out=code)
                np.rint(code, out=code)
                np.minimum(code, top, out=code)
                np.maximum(code, bottom, out=code)  # np.clip takes twice as long on so few values
                codes[order[i]] = code
                code *= step
                np.subtract(exact[i - start], code, out=errors[i])
    return np.ascontiguousarray(codes.T)


def rounding_loss(weight: Array, rounded: Array, moment: Array) -> float:
    """Mean squared output error: trace(E·moment·Eᵀ) with E = weight − rounded."""
    error = weight - rounded
    return float(np.einsum("nk,nk->", error @ moment, error, dtype=np.float64))


def _factor_in_place(moment: NDArray[Any]) -> NDArray[Any]:
    """The moment becomes R (see `upper_factor`), in its own precision; panels' squares are factored in float64."""
    size = len(moment)
    for stop in range(size, 0, -_PANEL):
        start = max(0, stop - _PANEL)
        panel, near = moment[:stop, start:stop], moment[start:stop, stop:].copy()

        def gather(rows: slice, panel: NDArray[Any] = panel, near: NDArray[Any] = near, stop: int = stop) -> None:
            panel[rows] -= moment[rows, stop:] @ near.T

        spread(gather, strips(stop))
        square = panel[start:].astype(np.float64)
        upper = np.linalg.cholesky(square[::-1, ::-1])[::-1, ::-1]
        inverse = np.linalg.inv(upper).astype(moment.dtype)

        def settle(rows: slice, panel: NDArray[Any] = panel, inverse: NDArray[Any] = inverse) -> None:
            panel[rows] = panel[rows] @ inverse.T

        spread(settle, strips(start))
        panel[start:] = upper
        moment[stop:, start:stop] = 0
    return moment
