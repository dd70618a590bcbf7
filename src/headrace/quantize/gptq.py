"""GPTQ: columns are rounded one after the other; the columns not yet rounded make up for the errors of those before.

Source: Frantar et al. 2022 (GPTQ), with columns in the order of falling activation energy ("act-order") and the
scales of all blocks fixed beforehand ("static groups"), so that a block stays contiguous on disk. Instead of adding a
column's error to all later columns at once, each column sums up the earlier errors when its turn comes. With moment =
U·D·Uᵀ, U upper with ones on its diagonal, the loss of errors e (one row of them) is Σ d_k (e_k + Σ_{j<k} e_j U_jk)², so
column k is rounded from w_k + Σ_{j<k} e_j U_jk, which is what GPTQ does (Chee et al. 2023, QuIP, theorem 6) without
inverting anything. This file does not know where the second moments come from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, QuantizedTensor, dequantize, fit_scales
from headrace.quantize.parallel import parallel_map
from headrace.quantize.statistics import InputStatistics

__all__ = [
    "ROW_STRIP",
    "damped",
    "divide_by_moment",
    "factorize",
    "quantize",
    "rounding_loss",
    "row_strips",
    "solve",
    "solve_codes",
    "upper_factor",
]

Array = NDArray[np.float32]

DAMPING = 0.1  # of the typical energy of a channel
_POWERS = (0.5, 1.0)  # of a channel's energy, tried as weights of the clip search
_TRIED = 48  # rows that each power is tried on
_BATCH = 128  # columns that receive all earlier columns' errors by one matrix product
_INNER = 16  # of these, columns that receive the errors of their neighbours one at a time
_PANEL = 256  # columns of a factor that are computed at once
ROW_STRIP = 2048  # rows solved at once: bounds the temporary memory, and cores share strips


def quantize(weight: Array, statistics: InputStatistics, grid: Grid) -> QuantizedTensor:
    """A weight (N, K) to codes that keep weight·x, for the inputs x that `statistics` describe."""
    return solve(weight, damped(statistics.moment), grid)


def solve(weight: Array, moment: Array, grid: Grid) -> QuantizedTensor:
    """Codes and scales of a weight (N, K) for a damped second moment (K, K): scales by the clip search, then codes.

    The search weights a column's error by a power of its channel's energy. With the energy itself a few strong
    channels decide the clip of all the others, whose error GPTQ could have made up for. The square root is better for
    most weights, the energy for those whose input has huge channels, so both are tried on a few rows.
    """
    energy = np.diagonal(moment)
    powers = _POWERS if grid.bits < 8 else _POWERS[:1]  # int8 clips nothing
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

    codes, scales = zip(*parallel_map(strip, row_strips(len(weight))), strict=True)
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

    Panels of columns are computed from the last to the first, each from those to its right. It is done in float32,
    and in float64 only if that fails.
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


def divide_by_moment(values: Array, factor: Array) -> Array:
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


def row_strips(rows: int) -> list[slice]:
    """Rows that are solved together: an even number of equal strips, so that two cores end at the same time."""
    count = 1 if rows <= ROW_STRIP else 2 * -(-rows // (2 * ROW_STRIP))
    size = max(1, -(-rows // count))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def solve_codes(
    weight: Array,
    factors: tuple[NDArray[np.intp], Array],
    scales: NDArray[np.float16],
    grid: Grid,
    batch: int = _BATCH,
) -> NDArray[np.int8]:
    """The codes (N, K) that GPTQ finds for given scales.

    Args:
        weight: (N, K).
        factors: of the second moment, from `factorize`.
        scales: (N, blocks), as stored.
        grid: bits and block.
        batch: columns that receive all earlier errors by one product; it changes the speed, not the result.
    """
    rows, columns = weight.shape
    order, factor = factors
    block = columns // scales.shape[1]
    steps = np.ascontiguousarray(scales.astype(np.float32).T)  # (blocks, N)
    codes = np.empty((columns, rows), np.int8)
    errors = np.empty((columns, rows), np.float32)  # weight − rounded, in order
    code = np.empty(rows, np.float32)
    bottom, top = np.float32(grid.bottom), np.float32(grid.top)
    for start in range(0, columns, batch):
        stop = min(start + batch, columns)
        exact = np.ascontiguousarray(weight[:, order[start:stop]].T)  # a column of the weight is contiguous
        wanted = exact + factor[:start, start:stop].T @ errors[:start]
        for first in range(start, stop, _INNER):
            last = min(first + _INNER, stop)
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

        def subtract_later(
            rows: slice, panel: NDArray[Any] = panel, near: NDArray[Any] = near, stop: int = stop
        ) -> None:
            panel[rows] -= moment[rows, stop:] @ near.T

        parallel_map(subtract_later, row_strips(stop))
        square = panel[start:].astype(np.float64)
        upper = np.linalg.cholesky(square[::-1, ::-1])[::-1, ::-1]
        inverse = np.linalg.inv(upper).astype(moment.dtype)

        def divide_by_square(rows: slice, panel: NDArray[Any] = panel, inverse: NDArray[Any] = inverse) -> None:
            panel[rows] = panel[rows] @ inverse.T

        parallel_map(divide_by_square, row_strips(start))
        panel[start:] = upper
        moment[stop:, start:stop] = 0
    return moment
