"""Corrected descent: linears also make up for what the layers quantized before them have already lost.

GPTQ asks a linear to give W·x for the inputs x that quantized layers before it give. The float model would have given
W·x*, for its own inputs x*. The weight that comes nearest to that, W + W·mean((x* − x) xᵀ)·mean(x xᵀ)⁻¹, is what is
rounded here, as far as calibration can be trusted: half the way, and damped.

Source: Li et al. 2025 (GPTAQ, asymmetric calibration), in closed form before rounding. This file does not know where
the moments come from.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, QuantizedTensor
from headrace.quantize import descent, gptq
from headrace.quantize.parallel import parallel_map
from headrace.quantize.statistics import InputStatistics

__all__ = ["corrected", "quantize"]

Array = NDArray[np.float32]

SHARE = 0.5  # of the way to the float model's output: measured, the whole way fits the calibration text too closely
DAMPING = 0.3  # as `gptq.damped`; a correction needs more than a rounding does


def quantize(weight: Array, statistics: InputStatistics, grid: Grid) -> QuantizedTensor:
    """A weight (N, K), corrected, by GPTQ and coordinate descent."""
    return descent.quantize(corrected(weight, statistics), statistics, grid)


def corrected(weight: Array, statistics: InputStatistics) -> Array:
    """The float weight (N, K) whose output on x is nearer to the float model's; the weight when x* is not known."""
    if statistics.shift is None:
        return weight
    factor, shift = gptq.upper_factor(gptq.damped(statistics.moment, DAMPING)), statistics.shift

    def strip(rows: slice) -> Array:
        change = gptq.divide_by_moment(weight[rows] @ shift, factor)
        change *= np.float32(SHARE)
        change += weight[rows]
        return change

    return np.concatenate(parallel_map(strip, gptq.row_strips(len(weight))))
