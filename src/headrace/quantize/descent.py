"""Coordinate descent: GPTQ's codes and scales, improved in turn until little changes.

GPTQ decides each column once, without seeing what the later ones can make up for. Here each block's scales are moved
to their least-squares optimum for fixed codes, and each column's codes to theirs for all others fixed; the loss can
only fall. Source: Behdin et al. 2023 (QuantEase), with scales as further coordinates.
This file does not know where the second moments come from.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, QuantizedTensor, nearest_factor, storable
from headrace.quantize import gptq
from headrace.quantize.parallel import parallel_map
from headrace.quantize.statistics import InputStatistics

__all__ = ["improve", "quantize"]

Array = NDArray[np.float32]

SWEEPS, BLOCK_SWEEPS = 2, 3  # with one scale a row, and with one a block; one more sweep gains less than 1 %
_BATCH = 128  # columns whose slopes are computed by one matrix product
_INNER = 16  # of these, columns whose slopes are updated one at a time as codes change
_LEAST = np.float32(0.3)  # in one sweep a scale does not shrink below this share of itself


def quantize(weight: Array, statistics: InputStatistics, grid: Grid) -> QuantizedTensor:
    """A weight (N, K) by GPTQ, then by coordinate descent on the same damped second moment."""
    moment = gptq.damped(statistics.moment)
    return improve(weight, moment, gptq.solve(weight, moment, grid))


def improve(weight: Array, moment: Array, start: QuantizedTensor, sweeps: int | None = None) -> QuantizedTensor:
    """Codes and scales whose loss trace(E·moment·Eᵀ), E = weight − codes·scales, is at most that of `start`.

    Args:
        weight: (N, K).
        moment: (K, K), positive definite.
        start: where to begin; its grid is kept.
        sweeps: how often every scale and code is visited; None takes `SWEEPS` or `BLOCK_SWEEPS`.
    """
    times = (SWEEPS if start.scales.shape[1] == 1 else BLOCK_SWEEPS) if sweeps is None else sweeps

    def strip(rows: slice) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
        return _improve(weight[rows], start.codes[rows], start.scales[rows], moment, start.grid, times)

    codes, scales = zip(*parallel_map(strip, gptq.row_strips(len(weight))), strict=True)
    return QuantizedTensor(np.concatenate(codes), np.concatenate(scales), start.grid)


def _improve(
    weight: Array, start: NDArray[np.int8], scales: NDArray[np.float16], moment: Array, grid: Grid, sweeps: int
) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    columns, blocks = weight.shape[1], scales.shape[1]
    block = columns // blocks
    steps = np.ascontiguousarray(scales.astype(np.float32).T)  # (blocks, N)
    unit = (
        steps.max(0) / np.float32(grid.largest_factor) if grid.lpbq else None
    )  # of which every scale stays a whole multiple
    codes = np.ascontiguousarray(start.T).astype(np.float32)  # (K, N)
    error = np.ascontiguousarray(weight.T)
    for b in range(blocks):
        error[b * block : (b + 1) * block] -= codes[b * block : (b + 1) * block] * steps[b]
    width = _BATCH if blocks == 1 else max(_BATCH, block)
    panels = [slice(begin, min(begin + width, columns)) for begin in range(0, columns, width)]
    # A column's slope is its row of moment @ error, (K, N). `later` holds the part of it that comes from the columns
    # which this sweep visits later. Sweeps alternate in direction, so those columns have not changed since the sweep
    # before, which computed the same part for the columns it had already visited.
    later = np.empty_like(error)
    for at in panels:
        np.matmul(moment[at, : at.start], error[: at.start], out=later[at])
    for sweep in range(sweeps):
        backward = sweep % 2 == 0
        if blocks == 1 and unit is None:  # one block's LPBQ scale is no free one
            _move_row_scale(codes, steps[0], error, later, moment, panels, backward)
        for at in panels[::-1] if backward else panels:
            visited = slice(at.stop, None) if backward else slice(at.start)
            earlier = moment[at, visited] @ error[visited]
            slope = later[at] + earlier
            slope += moment[at, at] @ error[at]
            later[at] = earlier
            near = moment[at, at]
            if blocks > 1:
                own = steps[at.start // block : at.stop // block]
                _move_block_scales(codes[at], own, unit, error[at], slope, near, grid)
            _move_codes(codes[at], steps[at.start // block : -(-at.stop // block)], error[at], slope, near, grid)
    return np.ascontiguousarray(codes.T.astype(np.int8)), np.ascontiguousarray(steps.T).astype(np.float16)


def _moved(step: Array, gain: Array, curvature: Array) -> Array:
    """Scales (N,) of least loss, rounded as they are stored: one Newton step from `step`."""
    wanted = step + np.divide(gain, curvature, out=np.zeros_like(gain), where=curvature > 0)
    return storable(np.where(wanted > _LEAST * step, wanted, step)).astype(np.float32)


def _move_row_scale(
    codes: Array, step: Array, error: Array, later: Array, moment: Array, panels: list[slice], backward: bool
) -> None:
    """One scale a row, `step` (N,), to its optimum codesᵀ·H·w / codesᵀ·H·codes; in place, and so `error`, `later`.

    H is symmetric, so only one side of its diagonal is multiplied: the other side counts the same once more.
    """
    gain, curvature = np.zeros_like(step), np.zeros_like(step)
    reach = np.empty_like(codes)
    for at in panels:
        side = slice(at.start) if backward else slice(at.stop, None)
        np.matmul(moment[at, side], codes[side], out=reach[at])
        own = moment[at, at] @ codes[at]
        gain += np.einsum("kn,kn->n", codes[at], later[at])
        own += reach[at]
        gain += np.einsum("kn,kn->n", error[at], own)
        own += reach[at]
        curvature += np.einsum("kn,kn->n", codes[at], own)
    new = _moved(step, gain, curvature)
    change = new - step
    for at in panels:
        error[at] -= codes[at] * change
        later[at] -= reach[at] * change
    step[:] = new


def _move_block_scales(
    codes: Array, steps: Array, unit: Array | None, error: Array, slope: Array, near: Array, grid: Grid
) -> None:
    """Scales (blocks, N) of a few columns' blocks, one after the other, to their optima for the others; in place.

    All arrays are those columns' part, `near` their part of H. LPBQ scales are factors of their row's `unit` (N,);
    those of the largest factor stay, since a row has one at least.
    """
    block = len(codes) // len(steps)
    for b, step in enumerate(steps):
        at = slice(b * block, (b + 1) * block)
        gain = np.einsum("kn,kn->n", codes[at], slope[at])
        curvature = np.einsum("kn,kn->n", codes[at], near[at, at] @ codes[at])
        new = _moved(step, gain, curvature)
        if unit is not None:
            new = np.where(step == grid.largest_factor * unit, step, nearest_factor(new, unit, grid) * unit)
        change = codes[at] * (new - step)
        error[at] -= change
        slope -= near[:, at] @ change
        step[:] = new


def _move_codes(codes: Array, steps: Array, error: Array, slope: Array, near: Array, grid: Grid) -> None:
    """A few columns, one after the other, to the best codes for the others fixed; in place, as above."""
    columns = len(codes)
    block = -(-columns // len(steps))
    bottom, top = np.float32(grid.bottom), np.float32(grid.top)
    changes = np.empty_like(slope)
    new = np.empty(codes.shape[1], np.float32)
    for first in range(0, columns, _INNER):
        last = min(first + _INNER, columns)
        slope[first:last] -= near[first:last, :first] @ changes[:first]
        for j in range(first, last):
            here, change, step = slope[j], changes[j], steps[j // block]
            here -= near[j, first:j] @ changes[first:j]
            np.divide(here, near[j, j], out=new)
            new /= step
            new += codes[j]
            np.rint(new, out=new)
            np.minimum(new, top, out=new)
            np.maximum(new, bottom, out=new)  # np.clip takes twice as long on so few values
            np.subtract(new, codes[j], out=change)
            change *= step
            codes[j] = new
    error -= changes
