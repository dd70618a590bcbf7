"""Round to nearest under the clip of least squared error. Uses no statistics."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, QuantizedTensor, quantize_nearest
from headrace.quantize.statistics import InputStatistics

__all__ = ["quantize"]


def quantize(weight: NDArray[np.float32], statistics: InputStatistics | None, grid: Grid) -> QuantizedTensor:
    """A weight (N, K) to the nearest codes; `statistics` is not used."""
    return quantize_nearest(weight, grid)
