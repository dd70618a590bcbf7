"""Coordinate descent: GPTQ's codes and scales, improved in turn until little changes.

GPTQ decides each column once, without seeing what the later ones can make up for. Here each block's scales are moved
to their least-squares optimum for fixed codes, and each column's codes to theirs for all others fixed; the loss can
only fall. Source: Behdin et al. 2023 (QuantEase), with scales as further coordinates.
This file does not know where the second moments come from.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.quantize import gptq
from headrace.quantize.grid import Grid, QuantizedTensor, storable
from headrace.quantize.statistics import InputStatistics

__all__ = ["improve", "quantize"]

Array = NDArray[np.float32]

SWEEPS = 2  # a third gains a tenth of what the first did
_LAZY = 32  # columns whose changes reach the others in one product
_LEAST = np.float32(0.3)  # a scale shrinks to no less than this share in a sweep


def quantize(weight: Array, statistics: InputStatistics, grid: Grid) -> QuantizedTensor:
    """A weight (N, K) by GPTQ, then by coordinate descent on the same damped second moment."""
    moment = gptq.damped(statistics.moment)
    return improve(weight, moment, gptq.solve(weight, moment, grid))


def improve(weight: Array, moment: Array, start: QuantizedTensor, sweeps: int = SWEEPS) -> QuantizedTensor:
    """Codes and scales whose loss trace(E·moment·Eᵀ), E = weight − codes·scales, is at most that of `start`.

    Args:
        weight: (N, K).
        moment: (K, K), positive definite.
        start: where to begin; its grid is kept.
        sweeps: times that every scale and code is visited.
    """
    rows, columns = weight.shape
    grid, blocks = start.grid, start.scales.shape[1]
    block = columns // blocks
    steps = np.ascontiguousarray(start.scales.astype(np.float32).T)  # (blocks, N)
    codes = np.ascontiguousarray(start.codes.T.astype(np.float32))  # (K, N)
    error = np.ascontiguousarray(weight.T)
    error -= (codes.reshape(blocks, block, rows) * steps[:, None]).reshape(columns, rows)
    slope = moment @ error  # (K, N): minus half the loss's gradient
    for _ in range(sweeps):
        for b in range(blocks):
            _move_scales(slice(b * block, (b + 1) * block), codes, steps[b], slope, moment)
        for begin in range(0, columns, _LAZY):
            _move_codes(begin, min(begin + _LAZY, columns), codes, steps, slope, moment, grid)
    return QuantizedTensor(
        np.ascontiguousarray(codes.T).astype(np.int8), np.ascontiguousarray(steps.T).astype(np.float16), grid
    )


def _move_scales(at: slice, codes: Array, step: Array, slope: Array, moment: Array) -> None:
    """One block's scales, `step` (N,), to codesᵀ·H·w / codesᵀ·H·codes, the other blocks fixed; in place."""
    mine = codes[at]
    gain = np.einsum("kn,kn->n", mine, slope[at])
    curvature = np.einsum("kn,kn->n", mine, moment[at, at] @ mine)
    wanted = step + np.divide(gain, curvature, out=np.zeros_like(gain), where=curvature > 0)
    new = storable(np.where(wanted > _LEAST * step, wanted, step)).astype(np.float32)
    slope -= moment[:, at] @ (mine * (new - step))
    step[:] = new


def _move_codes(begin: int, end: int, codes: Array, steps: Array, slope: Array, moment: Array, grid: Grid) -> None:
    """Columns begin … end−1, one after the other, to the best codes for the others fixed; in place."""
    block = codes.shape[0] // steps.shape[0]
    bottom, top = np.float32(grid.bottom), np.float32(grid.top)
    near = moment[begin:end, begin:end]
    here = slope[begin:end]
    changes = np.empty_like(here)
    new = np.empty(codes.shape[1], np.float32)
    for j in range(begin, end):
        step, change = steps[j // block], changes[j - begin]
        np.divide(here[j - begin], moment[j, j], out=new)
        new /= step
        new += codes[j]
        np.rint(new, out=new)
        np.minimum(new, top, out=new)
        np.maximum(new, bottom, out=new)  # np.clip takes twice as long on so few values
        np.subtract(new, codes[j], out=change)
        change *= step
        codes[j] = new
        later = slice(j - begin + 1, None)
        here[later] -= near[later, j - begin, None] * change
    here -= np.triu(near) @ changes  # what the loop did not tell the columns before
    slope[:begin] -= moment[:begin, begin:end] @ changes
    slope[end:] -= moment[end:, begin:end] @ changes
