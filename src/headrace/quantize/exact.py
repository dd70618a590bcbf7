"""Weights that already lie on a recipe's grid: found again from their values, without knowing how they were stored.

A quantized checkpoint (GGUF's Q4_0, Q5_0, Q8_0) decodes to scale × integer exactly, in float32, since a float16 scale
times a code of up to 8 bits has 19 bits at most. So the scale is the largest magnitude divided by some integer of the
grid: each is tried. Knows no file format.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, QuantizedTensor

__all__ = ["keep_grid"]

_AT_ONCE = 1024  # blocks


def keep_grid(weight: NDArray[np.float32], grid: Grid, name: str = "a weight") -> QuantizedTensor | None:
    """Codes and scales that give back the weight (N, K) bit for bit, or None when the grid cannot hold it, as one of
    LPBQ scales is taken not to: no checkpoint has these.

    Raises:
        RecipeError: the block does not divide the row.
    """
    if grid.lpbq:
        return None
    rows, columns = weight.shape
    blocks = weight.reshape(-1, columns // grid.blocks(columns, name))  # (N · blocks, block)
    found: list[tuple[NDArray[np.int8], NDArray[np.float16]]] = []
    # A few at a time: the first that does not lie on the grid is nearly always among the first.
    for start in range(0, len(blocks), _AT_ONCE):
        kept = _solve(blocks[start : start + _AT_ONCE], grid)
        if kept is None:
            return None
        found.append(kept)
    codes, scales = (np.concatenate(each) for each in zip(*found, strict=True))
    return QuantizedTensor(codes.reshape(rows, columns), scales.reshape(rows, -1), grid)


def _solve(blocks: NDArray[np.float32], grid: Grid) -> tuple[NDArray[np.int8], NDArray[np.float16]] | None:
    """Codes (blocks, columns) and scales (blocks,) that give back the blocks, or None."""
    peak = np.abs(blocks).max(1)
    scales = np.full(len(blocks), np.finfo(np.float16).smallest_subnormal, np.float16)
    codes = np.zeros(blocks.shape, np.int8)
    unsolved = np.flatnonzero(peak > 0)
    # The largest magnitude's code; int4 reaches −8 but only 7, so a block may need a negative scale (Q4_0 and Q5_0 have
    # such).
    signs = (1, -1) if grid.bits < 8 and grid.block else (1,)
    for largest, sign in ((code, sign) for code in range(-grid.bottom, 0, -1) for sign in signs):
        if not len(unsolved):
            break
        scale = (peak[unsolved] / np.float32(sign * largest)).astype(np.float16)
        step = scale.astype(np.float32)[:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            tried = np.rint(blocks[unsolved] / step)
        fits = (tried * step == blocks[unsolved]) & (tried >= grid.bottom) & (tried <= grid.top)
        whole = fits.all(1)
        scales[unsolved[whole]] = scale[whole]
        codes[unsolved[whole]] = tried[whole].astype(np.int8)
        unsolved = unsolved[~whole]
    return None if len(unsolved) else (codes, scales)
