"""Round to nearest under the clip of least squared error. Uses no statistics."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, QuantizedTensor, quantize_nearest, stacked
from headrace.quantize.parallel import parallel_map
from headrace.quantize.statistics import InputStatistics

__all__ = ["quantize"]

_ROWS = 1024  # that a core rounds at once


def quantize(weight: NDArray[np.float32], statistics: InputStatistics | None, grid: Grid) -> QuantizedTensor:
    """A weight (N, K) to the nearest codes; `statistics` is not used."""
    strips = [weight[start : start + _ROWS] for start in range(0, len(weight), _ROWS)]
    return stacked(parallel_map(lambda strip: quantize_nearest(strip, grid), strips))
