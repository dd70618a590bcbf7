"""The registry of methods: name → how a linear is brought to its grid. A new method is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.bundle.grid import Grid, QuantizedTensor
from headrace.errors import RecipeError, did_you_mean
from headrace.quantize import corrected, descent, gptq, nearest
from headrace.quantize.statistics import InputStatistics

__all__ = ["METHODS", "Method", "find_method"]


@dataclass(frozen=True)
class Method:
    """How a linear is quantized.

    Attributes:
        quantize: (weight (N, K) float32, statistics of its input, grid) → codes and scales.
        calibrated: it looks at the statistics.
        scaled: before, channels are scaled as AWQ finds best; needs all linears of one input to use the method.
        follows: the statistics hold the shift from the float model's inputs, which is followed beside.
    """

    quantize: Callable[[NDArray[np.float32], InputStatistics, Grid], QuantizedTensor]
    calibrated: bool
    scaled: bool = False
    follows: bool = False


METHODS: Mapping[str, Method] = {
    "nearest": Method(nearest.quantize, calibrated=False),
    "awq": Method(nearest.quantize, calibrated=True, scaled=True),
    "gptq": Method(gptq.quantize, calibrated=True),
    "descent": Method(descent.quantize, calibrated=True),
    "best": Method(corrected.quantize, calibrated=True, follows=True),
}


def find_method(name: str) -> Method:
    """A method by name.

    Raises:
        RecipeError: there is none.
    """
    if name not in METHODS:
        raise RecipeError(f"method {name!r} is unknown{did_you_mean(name, METHODS)}; expected {', '.join(METHODS)}")
    return METHODS[name]
